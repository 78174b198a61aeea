"""The command `llmkeep`. Each module registers its own verbs.

Exit codes: 0 done; 1 refused or failed, the message says what and what to do; 2 wrong usage; 9 a passphrase is wrong,
weak or unavailable; 130 interrupted. `llmkeep lock update`, `bundle build`, `verify`, `split` and `join`, `image
build` and `verify`, `policy verify`, `release verify` and `model add` tell refusals apart by 3 to 8 (see their help).
`llmkeep cve`: 3 if vulnerabilities are open, 4 if something is unknown. `llmkeep pki revoke` and `reinstate`: 3 if a
host was not reached. `llmkeep audit` and `usage`: 3 if a record was altered, and 4 (see their help).
"""

import argparse
import errno
import os
import signal
import sys
from importlib.metadata import version
from pathlib import Path

from llmkeep import cve, fetch, logs, packages, patch, replacement, revoke, run, size
from llmkeep.backup import commands as backup
from llmkeep.bundle import commands, keys, programs, update
from llmkeep.errors import LlmkeepError, printable
from llmkeep.experiments import commands as experiments
from llmkeep.image import commands as image
from llmkeep.inventory import commands as inventory
from llmkeep.models import commands as models
from llmkeep.pki import issuing
from llmkeep.policy import bundle as policy
from llmkeep.record import commands as record
from llmkeep.record import usage
from llmkeep.sbom import commands as sbom

VERBS = (
    update,
    programs,
    keys,
    commands,
    revoke,
    issuing,
    policy,
    models,
    fetch,
    image,
    inventory,
    run,
    record,
    usage,
    logs,
    size,
    packages,
    sbom,
    patch,
    cve,
    experiments,
    backup,
    replacement,
)


WAYS_OUT = {
    errno.ENOSPC: "make room, and run it again",
    errno.EACCES: "run it as a user with access to it, or choose another path",
    errno.EROFS: "choose a path on a writable disk",
    errno.ENOENT: "check the path",
    errno.EIO: "reconnect the medium, and run it again; if the error remains, the disk is failing",
}


def main(argv: list[str] | None = None) -> int:
    """Run one verb; a LlmkeepError becomes its message and an exit code."""
    parser = argparse.ArgumentParser(prog="llmkeep", description="The control node of a private-LLM estate.")
    parser.add_argument("--version", action="version", version=f"llmkeep {version('llmkeep')}")
    subparsers = parser.add_subparsers(required=True, metavar="VERB")
    for module in VERBS:
        module.register(subparsers)
    # bootstrap links ansible-playbook to this program, so that a bare run is on record too.
    as_ansible = argv is None and Path(sys.argv[0]).name == "ansible-playbook"
    arguments = None if as_ansible else parser.parse_args(argv)
    try:
        return int(arguments.run(arguments)) if arguments else run.ansible_playbook(sys.argv[1:])
    except LlmkeepError as error:
        print(f"llmkeep: {printable(str(error))}", file=sys.stderr)
        return error.code
    except BrokenPipeError:  # as in `llmkeep bundle list X | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno not in WAYS_OUT:
            raise
        print(
            f"llmkeep: {error.filename or 'a file'}: {error.strerror}: {WAYS_OUT[error.errno]}",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("llmkeep: interrupted; run it again to continue", file=sys.stderr)
        return 130
