"""`llmkeep audit …`: the control node's own audit record, its witness of the hosts' records, and signed reports.

Exit codes: 0 good; 1 failed or refused; 2 wrong usage; 3 a record was altered; 4 there is nothing to verify or show.
"""

import argparse
import json
import os
import socket
from dataclasses import asdict
from pathlib import Path

from llmkeep import logs
from llmkeep.durable import write
from llmkeep.places import Places
from llmkeep.record import findings, report, shipped, witness
from llmkeep.record import runs as record
from llmkeep.record.runs import CREDENTIAL, RecordError
from llmkeep.record.witness import Altered
from llmkeep.sealing import seal
from llmproof import cli as audit_cli
from llmproof.chain import Chain, ChainError
from llmproof.heads import SEED_BYTES, HeadError


def init() -> str:
    """Create the seed if there is none, and begin the record; returns a message for the operator. Idempotent."""
    if not record.SEALED_SEED.exists():
        if (record.FOLDER / "verifier").exists():
            raise RecordError(f"{record.FOLDER} was signed with a seed that is missing from {record.SEALED_SEED}: restore "
                "the seed, or move the folder away and keep it")  # fmt: skip
        record.SEALED_SEED.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write(record.SEALED_SEED, seal(os.urandom(SEED_BYTES).hex().encode(), CREDENTIAL), 0o400)
    record.FOLDER.mkdir(mode=0o700, parents=True, exist_ok=True)
    with Chain(record.FOLDER, record.seed(), f"llmkeep-audit/{socket.gethostname()}", wait=True) as chain:
        return (
            f"runs from this node are recorded in {record.FOLDER}\n"
            f"Note its verifier key in a place where this host cannot write: {chain.verifier.text}"
        )


def _init(_: argparse.Namespace) -> int:
    try:
        print(init())
    except (ChainError, HeadError) as error:
        raise RecordError(str(error)) from error
    return 0


def _collect(arguments: argparse.Namespace) -> int:
    try:
        return witness.collect(arguments.inventory, arguments.clusters)
    except Altered as error:
        record.shout(f"THE AUDIT RECORD WAS ALTERED. {error}")
        return audit_cli.ALTERED


def _findings(arguments: argparse.Namespace) -> int:
    known = findings.load(witness.KEPT)
    if known is None:
        print("the witness has not looked at any record: start llmkeep-audit-witness.service")
        return 1
    for number, each in known.altered.items():
        print(audit_cli.printable(f"{number} since {each.since}: {each.what}"))
    unheard = known.lasting(arguments.minutes)
    for each in unheard:
        print(audit_cli.printable(f"since {each.since}: {each.what}"))
    return audit_cli.ALTERED if known.altered else int(bool(unheard))


def _shipped(arguments: argparse.Namespace) -> int:
    folders = [folder for folder in witness.KEPT.glob("*") if (folder / "verifier").exists()]
    witnesses = {
        folder.name: (witness.Kept(folder).data(), (folder / "verifier").read_text()) for folder in folders
    }
    with logs.asked(arguments.places) as client:
        copies = shipped.check(client, witnesses)
    for host, each in copies.items():
        if arguments.json:
            print(json.dumps({"host": host} | asdict(each)))
            continue
        print(
            f"{host}: records {each.first} to {each.last}, {each.records} present, {each.withheld} of them only as leaves, "
            f"{each.duplicates} duplicates; {each.heads} signed heads match"
        )
        for finding in [*each.findings, *each.notes]:
            print(audit_cli.printable(f"{host}: {finding}"))
        if each.first > 1:
            print(
                f"{host}: records 1 to {each.first - 1} are missing, so no head could be compared: only links were checked"
            )
    if any(each.findings for each in copies.values()):
        return audit_cli.ALTERED
    return 0 if any(each.records for each in copies.values()) else audit_cli.NOTHING


def _acknowledge(arguments: argparse.Namespace) -> int:
    print(
        audit_cli.printable(f"acknowledged on record: {witness.acknowledge(arguments.id, arguments.reason)}")
    )
    return 0


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """`llmkeep audit …`."""
    parser = subparsers.add_parser("audit", help="the audit record of runs and hosts", description=__doc__)
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    verbs.add_parser(
        "init", help="create the signing key and begin the record (called by bootstrap)"
    ).set_defaults(run=_init)
    audit_cli.add_commands(verbs, record.FOLDER)
    report.add_commands(verbs)
    collect = verbs.add_parser(
        "collect", help="copy each record's signed heads, and refuse a rewritten record"
    )
    collect.add_argument(
        "-i", "--inventory", action="append", required=True, help="file or folder; may be repeated"
    )
    collect.add_argument(
        "--clusters", type=Path, help="JSON list of clusters whose replicas have records: name and kubeconfig"
    )
    collect.set_defaults(run=_collect)
    verb = verbs.add_parser("findings", help="list unacknowledged findings of the witness, and silent hosts")
    verb.add_argument(
        "--minutes",
        type=int,
        default=0,
        help="ignore records that are silent for a shorter time (default: %(default)s)",
    )
    verb.set_defaults(run=_findings)
    copy = verbs.add_parser("shipped", help="verify Elasticsearch's copy of the hosts' records")
    copy.add_argument("--json", action="store_true", help="print one line per host")
    copy.set_defaults(run=_shipped, places=Places())
    known = verbs.add_parser(
        "acknowledge", help="record that a finding is known, and remove it from the list"
    )
    known.add_argument("id", help="id of the finding, from `findings`")
    known.add_argument("--reason", required=True, help="result of the investigation, and measures")
    known.set_defaults(run=_acknowledge)
