"""The command `llmkeep`. Each module registers its own verbs.

Exit codes: 0 done; 1 refused or failed, the message says what and what to do; 2 wrong usage; 130 interrupted.
`llmkeep bundle verify`, `llmkeep policy verify` and `llmkeep release verify` tell refusals apart by 3 to 6 (see their help).
"""

import argparse
import errno
import sys

from llmkeep import inventory, run
from llmkeep.bundle import commands, programs, release, signing, update
from llmkeep.errors import LlmkeepError
from llmkeep.pki import authority, issuing
from llmkeep.policy import bundle as policy
from llmkeep.record import commands as record

VERBS = (update, programs, signing, commands, authority, issuing, policy, release, inventory, run, record)


def main(argv: list[str] | None = None) -> int:
    """Run one verb; a LlmkeepError becomes its message and an exit code."""
    parser = argparse.ArgumentParser(prog="llmkeep", description="The control node of a private-LLM estate.")
    subparsers = parser.add_subparsers(required=True, metavar="VERB")
    for module in VERBS:
        module.register(subparsers)
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
