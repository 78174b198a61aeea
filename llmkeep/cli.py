"""The command `llmkeep`. Each module registers its own verbs.

Exit codes: 0 done; 1 refused or failed, the message says what and what to do; 2 wrong usage;
3 the bundle did not verify; 130 interrupted.
"""

import argparse
import importlib
import importlib.util
import sys

from llmkeep.lock import LockError

VERBS = ("lock", "signing", "bundle", "pki", "run")


def main(argv: list[str] | None = None) -> int:
    """Run one verb; a LockError becomes its message and an exit code."""
    parser = argparse.ArgumentParser(prog="llmkeep", description="The control node of a private-LLM estate.")
    subparsers = parser.add_subparsers(required=True, metavar="VERB")
    for name in VERBS:
        if importlib.util.find_spec(f"llmkeep.{name}"):
            importlib.import_module(f"llmkeep.{name}").register(subparsers)
    arguments = parser.parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except LockError as error:
        print(f"llmkeep: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("llmkeep: interrupted; run it again, what is done is kept", file=sys.stderr)
        return 130
