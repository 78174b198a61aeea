"""`llm-serve feedback list | forget`: the ratings of this host's gateways, and what is kept to learn from."""

import argparse
import os
import pwd
import sys
from pathlib import Path
from typing import Any

from pydantic_core import to_json

from llmcore import ratings
from llmcore.config import ConfigError
from llmserve.feedback import journal

FOLDER = Path("/var/lib/llm-feedback")


def add_commands(commands: Any) -> None:
    """Add `feedback` and its subcommands to the parser of llm-serve."""
    feedback = commands.add_parser("feedback", help="list ratings, and forget all that is kept of a subject")
    verbs = feedback.add_subparsers(dest="verb", required=True)
    listing = verbs.add_parser("list", help="the last rating of each answer, a JSON object a line")
    listing.set_defaults(run=list_command)
    forget = verbs.add_parser(
        "forget", help="remove ratings, prompts and answers of a subject, and show that none is left"
    )
    forget.add_argument("--subject", required=True)
    forget.add_argument("--tenant", required=True)
    forget.set_defaults(run=forget_command)
    for each in listing, forget:
        each.add_argument("--folder", type=Path, default=FOLDER, help=f"of the journal (default {FOLDER})")


def own(folder: Path) -> Path:
    """The folder, if this process may change it as its gateways do; raises ConfigError.

    Root would follow links that a gateway has put there, and leave files that no gateway can write.
    """
    if not folder.is_dir():
        raise ConfigError(f"--folder is {folder}, which is no folder: name the gateway's feedback.folder")
    owner = folder.stat().st_uid
    if os.geteuid() != owner:
        try:
            user = pwd.getpwuid(owner).pw_name
        except KeyError:  # of a copy from another host
            user = f"user {owner}, which this host does not know"
        raise ConfigError(f"{folder} belongs to {user}: run this as its owner, by `runuser -u OWNER -- …`")
    return folder


def list_command(options: argparse.Namespace) -> int:
    for record in ratings.by_transaction(own(options.folder), ratings.RATED).values():
        sys.stdout.write(to_json(record).decode() + "\n")
    return 0


def forget_command(options: argparse.Namespace) -> int:
    folder = own(options.folder)

    def theirs(record: ratings.Record) -> bool:
        return (record.get(ratings.SUBJECT), record.get(ratings.TENANT)) == (options.subject, options.tenant)

    removed = journal.forget(folder, theirs)
    left = sum(theirs(record) for path in ratings.files(folder) for record in ratings.read(path))
    print(f"removed {removed} records of {options.subject} in {options.tenant} on this host; {left} are left")
    return 1 if left else 0
