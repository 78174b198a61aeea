"""The command `llmkeep`. Each module registers its own verbs.

Exit codes: 0 done; 1 refused or failed, the message says what and what to do; 2 wrong usage; 130 interrupted.
`llmkeep bundle verify`, `llmkeep policy verify` and `llmkeep release verify` tell refusals apart by 3 to 6 (see their help).
"""

import argparse
import errno
import importlib
import importlib.util
import sys

from llmkeep.errors import LlmkeepError

VERBS = (
    "bundle.lock",
    "bundle.programs",
    "bundle.signing",
    "bundle.commands",
    "pki.authority",
    "pki.issuing",
    "policy.bundle",
    "bundle.release",
    "run",
    "record.commands",
)


def main(argv: list[str] | None = None) -> int:
    """Run one verb; a LlmkeepError becomes its message and an exit code."""
    parser = argparse.ArgumentParser(prog="llmkeep", description="The control node of a private-LLM estate.")
    subparsers = parser.add_subparsers(required=True, metavar="VERB")
    for name in VERBS:
        if importlib.util.find_spec(f"llmkeep.{name}"):
            importlib.import_module(f"llmkeep.{name}").register(subparsers)
    arguments = parser.parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except LlmkeepError as error:
        print(f"llmkeep: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EACCES, errno.EROFS):
            raise
        print(
            f"llmkeep: {error.filename or 'a file'}: {error.strerror}: make room, or use a folder "
            "you may write, and run it again",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("llmkeep: interrupted; run it again, what is done is kept", file=sys.stderr)
        return 130
