"""llm-train: data, describe, plan, run, submit, compare, publish, feedback, annotate.

Exit codes are listed in `exits.py`.
"""

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from llmcore.config import ConfigError, load
from llmcore.manifest import ManifestError
from llmtrain import exits
from llmtrain.annotation import command as annotation
from llmtrain.data import command as data
from llmtrain.data.settings import Settings
from llmtrain.feedback import command as feedback
from llmtrain.gate import compare
from llmtrain.job import Job
from llmtrain.planning import architecture
from llmtrain.planning import command as planning
from llmtrain.publish import command as publish
from llmtrain.run import command as run
from llmtrain.run import submission


def parser() -> argparse.ArgumentParser:
    """All commands. Their modules import heavy libraries only when they run, so that help is printed at once."""
    top = argparse.ArgumentParser(
        prog="llm-train", description="Train a language model: data, plan, run, gate, publish."
    )
    commands = top.add_subparsers(dest="command", required=True)
    data.add_command(commands)
    architecture.add_command(commands)
    planning.add_command(commands)
    run.add_command(commands)
    submission.add_commands(commands)
    compare.add_command(commands)
    publish.add_command(commands)
    feedback.add_command(commands)
    annotation.add_command(commands)
    check = commands.add_parser("check", help="validate a configuration file; print nothing if it is valid")
    check.add_argument("kind", choices=["job", "data"])
    check.add_argument("file", type=Path)
    check.set_defaults(run=check_command)
    return top


def check_command(arguments: argparse.Namespace) -> int:
    """Raise ConfigError for a file that `run` or `data run` would refuse."""
    load(arguments.file, Job if arguments.kind == "job" else Settings)
    return exits.DONE


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
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
    except OSError as error:
        # ELOOP: a link lies where a file is to be written.
        if not isinstance(error, PermissionError) and error.errno != errno.ELOOP:
            raise
        print(
            f"llm-train: user {os.geteuid()} has no access to {error.filename}: grant it, or specify another path (root works on "
            f"the files of a job as their owner)",
            file=sys.stderr,
        )
        return exits.USAGE
    return code
