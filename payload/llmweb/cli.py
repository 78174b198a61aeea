"""llm-web: the operator page. Exit codes: 0 success, 1 failure, 2 wrong usage or configuration."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from llmcore import logs
from llmcore.config import ConfigError, load
from llmserve.access.api_keys import KeyFileError
from llmserve.access.api_keys_cli import gateway_pepper
from llmweb.settings import WebConfig


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="llm-web", description="Serve the operator page, behind the edge.")
    commands = top.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve", help="serve until SIGTERM")
    serve.add_argument("--config", type=Path, required=True, help="web.yaml")
    serve.set_defaults(run=serve_command)
    check = commands.add_parser("check", help="validate a configuration file; prints nothing if it is valid")
    check.add_argument("config", type=Path)
    check.set_defaults(run=lambda options: load(options.config, WebConfig) and 0)
    return top


def serve_command(options: argparse.Namespace) -> int:
    import uvloop

    from llmweb.process import run_web

    config = load(options.config, WebConfig)
    logs.configure(config.log_level)
    uvloop.run(run_web(config, gateway_pepper(None)))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run llm-web; returns the exit code (see the module's docstring)."""
    options = parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except ConfigError as error:
        print(f"llm-web: {error}", file=sys.stderr)
        return 2
    except (KeyFileError, OSError) as error:
        print(f"llm-web: {error}", file=sys.stderr)
        return 1
