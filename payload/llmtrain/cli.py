"""llm-train: data, describe, plan, run, compare, publish.

The exit codes stand in `exits.py`.
"""

import argparse
import sys
from collections.abc import Sequence

from llmcore.config import ConfigError
from llmcore.manifest import ManifestError
from llmtrain import architecture, exits, plan_command, run_cli


def parser() -> argparse.ArgumentParser:
    """All commands. Each one's module imports what is heavy when it runs, so that help is there at once."""
    top = argparse.ArgumentParser(
        prog="llm-train", description="Train a language model: data, plan, run, gate, publish."
    )
    commands = top.add_subparsers(dest="command", required=True)
    architecture.add_command(commands)
    plan_command.add_command(commands)
    run_cli.add_command(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code."""
    arguments = parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
    except exits.Refusal as refusal:
        print(f"llm-train: {refusal}", file=sys.stderr)
        return refusal.code
    except ConfigError as error:
        print(f"llm-train: {error}", file=sys.stderr)
        return exits.USAGE
    except ManifestError as error:
        print(f"llm-train: {error}", file=sys.stderr)
        return exits.ALTERED
    return code
