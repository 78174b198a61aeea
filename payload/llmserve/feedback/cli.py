"""`llm-serve feedback list | outcomes | forget | expire | ship`: this host's ratings, and what is kept to learn from.
`llm-serve experiment guard | halted | shadow`: what ends experiments on this host, those that it ended, and shadow mode.
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
    listing = verbs.add_parser("list", help="the last rating of each answer, a JSON object a line")
    listing.set_defaults(run=list_command)
    coming = verbs.add_parser(
        "outcomes", help="outcomes of an experiment, as `llmkeep experiment show --outcomes` reads them"
    )
    coming.add_argument("--experiment", required=True, metavar="NAME", help="as policy names it")
    coming.add_argument(
        "--metrics",
        nargs="+",
        choices=outcomes.METRICS,
        default=["thumb", "corrected"],
        help="those that the experiment fixed in advance (default thumb corrected)",
    )
    coming.add_argument(
        "--of-run",
        default="",
        metavar="ID",
        help="outcomes of the run with this id (default: the newest); the last line is then their number",
    )
    coming.set_defaults(run=outcomes_command)
    forget = verbs.add_parser(
        "forget",
        help="remove ratings, prompts and answers of a subject, and reviews of and by it; show that none is left",
    )
    forget.add_argument("--subject", required=True)
    forget.add_argument("--tenant", required=True)
    forget.add_argument(
        "--ids",
        type=Path,
        metavar="FILE",
        help="first write the ids of their exchanges into this new file, for `llm-train feedback remove`",
    )
    forget.add_argument(
        "--wait",
        type=float,
        default=90,
        metavar="SECONDS",
        help="seconds to wait for the deletion from Elasticsearch, which the shipping unit does each minute (default 90)",
    )
    forget.set_defaults(run=forget_command)
    expire = verbs.add_parser("expire", help="remove entries older than this number of days")
    expire.add_argument("--days", type=int, required=True)
    expire.set_defaults(run=expire_command)
    shipping = verbs.add_parser(
        "ship",
        help="send new ratings to Elasticsearch, and delete there the journal's removals; once",
    )
    shipping.add_argument("--url", required=True, help="https://HOST:PORT of Elasticsearch")
    shipping.add_argument(
        "--pki", type=Path, default=PKI, help=f"root.pem, host.pem and host.key (default {PKI})"
    )
    shipping.set_defaults(run=ship_command)
    experiment = commands.add_parser(
        "experiment", help="watch this host's experiments, and end those with a harmful candidate"
    )
    acts = experiment.add_subparsers(dest="verb", required=True)
    guarding = acts.add_parser("guard", help="watch, until it is stopped")
    guarding.add_argument("--config", type=Path, required=True, help="gateway.yaml: policy, audit, feedback")
    guarding.add_argument("--interval", type=float, default=GUARD_SECONDS, help="seconds between two looks")
    guarding.add_argument("--once", action="store_true", help="look once")
    guarding.set_defaults(run=guard_command)
    ended = acts.add_parser("halted", help="experiments that this host has halted, a JSON object a line")
    ended.set_defaults(run=halted_command)
    shadow = acts.add_parser(
        "shadow", help="compare the candidate's answers to copies with the control's to the originals"
    )
    shadow.add_argument("--experiment", required=True, metavar="NAME", help="as policy names it")
    shadow.set_defaults(run=shadow_command)
    for each in listing, coming, forget, expire, shipping, ended, shadow:
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
    """Write the ids of these exchanges durably into a new file, a line each; raises ConfigError."""
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
            f"--ids is {path}, which cannot be made ({error.strerror}): name a new file where this user may write. "
            "Nothing was forgotten"
        ) from error
    if not identifiers:
        print(
            f"warning: {path} is empty, since this host's journal has nothing of them; exports may have what was removed from it "
            "by age (docs/use/loop.md, Where it is)",
            file=sys.stderr,
        )


def unindexed(folder: Path, seconds: float) -> bool:
    """Whether nothing is left in Elasticsearch of what left the journal; waits for that, and says so.

    The unit that ships has the key, so it deletes. Its note of what to delete goes once Elasticsearch has acknowledged each.
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
        f"{remaining} ratings wait to be deleted from Elasticsearch, which happens once it answers "
        "(`systemctl status llmkeep-ratings-ship.service`): run this again then"
    )
    return False


def expire_command(options: argparse.Namespace) -> int:
    if options.days < 1:
        raise ConfigError(f"--days is {options.days}: take 1 or more")
    removed = journal.expire(own(options.folder), options.days)
    print(f"removed {removed} records that were older than {options.days} days")
    return 0


def guard_command(options: argparse.Namespace) -> int:
    from llmserve.feedback.guard import Guard, watch  # not for the others

    logs.configure("INFO")
    config = load(options.config, GatewayConfig)
    if not config.feedback or not config.audit or not config.policy or not config.policy.bundle:
        raise ConfigError(
            f"{options.config} lacks feedback, audit or policy.bundle: without them no experiment is watched"
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
