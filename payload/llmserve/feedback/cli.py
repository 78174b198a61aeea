"""`llm-serve feedback list | outcomes | forget | expire | ship`: this host's ratings and training data.
`llm-serve experiment guard | halted | shadow`: the guard that halts experiments on this host, the halted ones, and shadow mode.
"""

import argparse
import json
import os
import pwd
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic_core import to_json

from llmcore import logs, ratings
from llmcore.config import ConfigError, load
from llmcore.files import flush
from llmserve.feedback import journal, outcomes, ship
from llmserve.feedback.halts import GUARD, GUARD_SECONDS
from llmserve.settings import GatewayConfig

FOLDER = Path("/var/lib/llm-feedback")
PKI = Path("/etc/llmkeep/pki")


def add_commands(commands: Any) -> None:
    """Add `feedback` and its subcommands to the parser of llm-serve."""
    feedback = commands.add_parser("feedback", help="list ratings, and delete a subject's stored data")
    verbs = feedback.add_subparsers(dest="verb", required=True)
    listing = verbs.add_parser("list", help="print the last rating of each answer, one JSON object per line")
    listing.set_defaults(run=list_command)
    coming = verbs.add_parser(
        "outcomes", help="print an experiment's outcomes for `llmkeep experiment show --outcomes`"
    )
    coming.add_argument("--experiment", required=True, metavar="NAME", help="its name in the policy")
    coming.add_argument(
        "--metrics",
        nargs="+",
        choices=outcomes.METRICS,
        default=["thumb", "corrected"],
        help="the metrics that the experiment fixed in advance (default: thumb corrected)",
    )
    coming.add_argument(
        "--of-run",
        default="",
        metavar="ID",
        help="outcomes of the run with this id (default: the newest run); the last line is their number",
    )
    coming.set_defaults(run=outcomes_command)
    forget = verbs.add_parser(
        "forget",
        help="remove a subject's ratings, prompts and answers, and reviews of and by it; verify that none is left",
    )
    forget.add_argument("--subject", required=True)
    forget.add_argument("--tenant", required=True)
    forget.add_argument(
        "--ids",
        type=Path,
        metavar="FILE",
        help="first write the ids of the exchanges to this new file, for `llm-train feedback remove`",
    )
    forget.add_argument(
        "--wait",
        type=float,
        default=90,
        metavar="SECONDS",
        help="seconds to wait for the deletion from Elasticsearch, which the shipping unit performs every minute (default: 90)",
    )
    forget.set_defaults(run=forget_command)
    expire = verbs.add_parser("expire", help="remove entries older than this number of days")
    expire.add_argument("--days", type=int, required=True)
    expire.set_defaults(run=expire_command)
    shipping = verbs.add_parser(
        "ship",
        help="send new ratings to Elasticsearch and delete removed ones there, once",
    )
    shipping.add_argument("--url", required=True, help="https://HOST:PORT of Elasticsearch")
    shipping.add_argument(
        "--pki", type=Path, default=PKI, help=f"root.pem, host.pem and host.key (default {PKI})"
    )
    shipping.set_defaults(run=ship_command)
    experiment = commands.add_parser(
        "experiment", help="watch this host's experiments, and halt those with a harmful candidate"
    )
    acts = experiment.add_subparsers(dest="verb", required=True)
    guarding = acts.add_parser("guard", help="watch until stopped")
    guarding.add_argument("--config", type=Path, required=True, help="gateway.yaml: policy, audit, feedback")
    guarding.add_argument("--interval", type=float, default=GUARD_SECONDS, help="seconds between two checks")
    guarding.add_argument("--once", action="store_true", help="look once")
    guarding.set_defaults(run=guard_command)
    ended = acts.add_parser(
        "halted", help="print the experiments that this host has halted, one JSON object per line"
    )
    ended.set_defaults(run=halted_command)
    shadow = acts.add_parser(
        "shadow",
        help="compare the candidate's answers to copied requests with the control's answers to the originals",
    )
    shadow.add_argument("--experiment", required=True, metavar="NAME", help="its name in the policy")
    shadow.set_defaults(run=shadow_command)
    for each in listing, coming, forget, expire, shipping, ended, shadow:
        each.add_argument(
            "--folder", type=Path, default=FOLDER, help=f"folder of the journal (default: {FOLDER})"
        )


def own(folder: Path) -> Path:
    """The folder, if this process has the same owner as its gateways; raises ConfigError.

    Root would follow links that a gateway has put there, and leave files that gateways cannot write.
    """
    if not folder.is_dir():
        raise ConfigError(
            f"--folder is {folder}, which is not a folder: specify the gateway's feedback.folder"
        )
    owner = folder.stat().st_uid
    if os.geteuid() != owner:
        try:
            user = pwd.getpwuid(owner).pw_name
        except KeyError:  # of a copy from another host
            user = f"user {owner}, who is unknown on this host"
        raise ConfigError(f"{folder} belongs to {user}: run this as its owner, with `runuser -u OWNER -- …`")
    return folder


def list_command(options: argparse.Namespace) -> int:
    for record in ratings.by_transaction(own(options.folder), ratings.RATED).values():
        sys.stdout.write(to_json(record).decode() + "\n")
    return 0


def outcomes_command(options: argparse.Namespace) -> int:
    number = 0
    for outcome in outcomes.outcomes(
        own(options.folder), options.experiment, options.metrics, options.of_run
    ):
        sys.stdout.write(to_json(outcome).decode() + "\n")
        number += 1
    if options.of_run:  # the control node takes no part for the whole
        sys.stdout.write(f'{{"lines":{number}}}\n')
    return 0


def forget_command(options: argparse.Namespace) -> int:
    folder = own(options.folder)

    def theirs(record: ratings.Record) -> bool:
        who = (
            (record.get(subject), record.get(tenant))
            for subject, tenant in (
                (ratings.SUBJECT, ratings.TENANT),
                (ratings.REVIEWER, ratings.REVIEWER_TENANT),
                (ratings.DELETER, ratings.DELETER_TENANT),
            )
        )
        return (options.subject, options.tenant) in who

    if options.ids:
        write_ids(options.ids, folder, theirs)
    removed = journal.forget(folder, theirs)
    remaining = sum(theirs(record) for path in ratings.files(folder) for record in ratings.read(path))
    print(
        f"removed {removed} records of {options.subject} in {options.tenant} on this host; {remaining} are left"
    )
    return 1 if remaining or not unindexed(folder, options.wait) else 0


def write_ids(path: Path, folder: Path, theirs: Callable[[ratings.Record], bool]) -> None:
    """Write the ids of these exchanges durably to a new file, one per line; raises ConfigError."""
    identifiers = {
        record[ratings.TRANSACTION]: None
        for each in ratings.files(folder)
        for record in ratings.read(each)
        if theirs(record)
    }
    try:
        with path.open("x", encoding="ascii") as file:
            file.writelines(f"{identifier}\n" for identifier in identifiers)
        flush(path)
        flush(path.parent.resolve())
    except OSError as error:
        raise ConfigError(
            f"--ids is {path}, which cannot be created ({error.strerror}): specify a new file that this user may write. Nothing "
            f"was removed"
        ) from error
    if not identifiers:
        print(
            f"warning: {path} is empty, since this host's journal has no such exchanges; exports may contain exchanges that the "
            f"journal removed by age (docs/use/loop.md, Where it is)",
            file=sys.stderr,
        )


def unindexed(folder: Path, seconds: float) -> bool:
    """Wait until Elasticsearch contains no ratings that left the journal; returns whether that is the case, and prints it.

    The shipping unit has the key, so it deletes them. Its list of deletions is removed once Elasticsearch has acknowledged each.
    """
    if not (folder / journal.SHIPPING).is_dir():
        return True
    waiting = folder / journal.SHIPPING / journal.UNINDEXED
    end = time.monotonic() + seconds
    while waiting.exists() and time.monotonic() < end:
        time.sleep(0.2)
    remaining = sum(1 for _ in ratings.read(waiting))
    if not waiting.exists():
        print("0 of these ratings of this host are left in Elasticsearch")
        return True
    print(
        f"{remaining} ratings are waiting to be deleted from Elasticsearch, which happens once it answers (`systemctl status "
        f"llmkeep-ratings-ship.service`): run this again later"
    )
    return False


def expire_command(options: argparse.Namespace) -> int:
    if options.days < 1:
        raise ConfigError(f"--days is {options.days}: specify 1 or more")
    removed = journal.expire(own(options.folder), options.days)
    print(f"removed {removed} records that were older than {options.days} days")
    return 0


def guard_command(options: argparse.Namespace) -> int:
    from llmserve.feedback.guard import Guard, watch  # not for the others

    logs.configure("INFO")
    config = load(options.config, GatewayConfig)
    if not config.feedback or not config.audit or not config.policy or not config.policy.bundle:
        raise ConfigError(
            f"{options.config} lacks feedback, audit or policy.bundle, which are needed to watch experiments: set them"
        )
    folder = own(config.feedback.folder)
    watch(
        Guard(folder, config.policy.bundle, config.policy.key, config.audit.socket),
        options.interval,
        options.once,
    )
    return 0


def halted_command(options: argparse.Namespace) -> int:
    from llmserve.feedback.guard import halt_in  # not for the others

    for path in sorted((own(options.folder) / GUARD).glob("halted-*.json")):
        print(json.dumps(halt_in(path)))
    return 0


def shadow_command(options: argparse.Namespace) -> int:
    for arm in outcomes.shadowed(own(options.folder), options.experiment):
        sys.stdout.write(to_json(arm).decode() + "\n")
    return 0


def ship_command(options: argparse.Namespace) -> int:
    logs.configure("INFO")
    try:
        totals = ship.ship(own(options.folder), options.url, options.pki)
    except ship.AwayError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if totals.sent or totals.removed:
        print(f"sent {totals.sent} ratings, deleted {totals.removed}")
    return 0
