"""`llmkeep audit report | reports | diff`: results of checks for a standard's controls, signed by the record's key.

Exit codes: as of `llmkeep audit`. An unmet control is not an error of these commands.
"""

import argparse
import hashlib
import json
import socket
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from llmkeep import source_tree
from llmkeep.durable import write
from llmkeep.errors import LlmkeepError, printable
from llmkeep.places import Places
from llmkeep.playbooks import inventory_path, memory
from llmkeep.record import (
    report_html,
    report_oscal,
    report_sboms,
    report_vulnerabilities,
    runs,
    software,
    standards,
    verification,
    witness,
)
from llmkeep.vulnerabilities import database
from llmproof import heads
from llmproof.archive import ArchiveRefused, packed
from llmproof.heads import HeadError, Signer, Verifier
from llmproof.report import (
    FORMAT,
    PURPOSE,
    RESULTS,
    VERDICTS,
    Report,
    judged,
    verified,
)
from llmproof.sbom import Sbom

PLACES = Places()
INVENTORY = "/etc/llmkeep/inventory"
TIME = "%Y-%m-%dT%H:%M:%SZ"
# What a check's result has beside its state, and how much of it a report takes: hosts send it.
TEXTS, SHOWN = ("id", "title", "expected", "observed"), 20_000


def host_results(document: dict[str, Any], all_roles: list[str]) -> dict[str, Any]:
    """Hosts of the report of `llmkeep verify`, with their checks.

    A host that did not answer is assumed to have ALL_ROLES.
    """
    hosts = {}
    for name, checks in document["hosts"].items():
        roles, done = document["roles"].get(name) or [], document["verified"].get(name) or []
        hosts[name] = {
            "answers": bool(roles),
            "roles": roles or all_roles,
            "verified": done if roles else [],
            "checks": [check_result(each) for each in checks],
        }
    return hosts


def check_result(check: dict[str, Any]) -> dict[str, str]:
    """A check's result, with its state instead of the fields that encode it, and its reason, if any."""
    result = {name: str(check.get(name, ""))[:SHOWN] for name in TEXTS}
    if check.get("ok") is True:
        return result | {"state": "ok"}
    for field, state in (("not_enforceable", "not enforceable"), ("accepted", "accepted")):
        if field in check:
            return result | {"state": state, "reason": str(check[field])[:SHOWN]}
    could_run = result["id"] != "reachable" and not result["id"].endswith(".checks_run")
    return result | {"state": "failed" if could_run else "error"}


def inventory_digest(places: list[Path]) -> str:
    """SHA-256 over the names and the SHA-256 of all files of inventories, sorted, one after the other."""
    whole = hashlib.sha256()
    for place in places:
        files = sorted(path for path in place.rglob("*") if path.is_file()) if place.is_dir() else [place]
        for path in files:
            name = path.relative_to(place) if place.is_dir() else path.name
            whole.update(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {name}\n".encode())
    return whole.hexdigest()


def record_heads() -> tuple[str, dict[str, str]]:
    """The last signed head of the control node's record, and the last one that the witness keeps of each host."""
    own, _ = heads.read(runs.FOLDER / heads.NAME)
    if not own:
        raise runs.RecordError(
            f"{runs.FOLDER} has no signed head: create the record with `llmkeep audit init`"
        )
    others = {}
    for folder in sorted(witness.KEPT.glob("*")):
        notes, _ = heads.read(folder / heads.NAME)
        if notes:
            others[folder.name] = notes[-1].decode(errors="replace")
    return own[-1].decode(), others


def results(
    tree: Path, standard: dict[str, Any], document: dict[str, Any], inventories: list[Path], begun: datetime
) -> dict[str, Any]:
    """The reported and signed results. DOCUMENT: the report of `llmkeep verify`; BEGUN: when it began."""
    features = yaml.safe_load((tree / "meta/features.yml").read_text())["features"]
    head, witnessed = record_heads()
    return {
        "format": FORMAT,
        "standard": standard,
        "conditional": standards.conditional(tree),
        "control_node": socket.gethostname(),
        "operator": runs.who(),
        "begun": begun.strftime(TIME),
        "ended": datetime.now(UTC).strftime(TIME),
        "inventory_sha256": inventory_digest(inventories),
        "bundle_serial": int(runs.SERIAL.read_text()) if runs.SERIAL.exists() else None,
        "tree_revision": runs.revision(tree),
        "record_head": head,
        "witnessed_heads": witnessed,
        "hosts": host_results(document, sorted({row["role"] for row in features})),
    }


def archive(
    document: dict[str, Any],
    scan: dict[str, Any],
    installed: Sbom | None,
    verifier: Verifier,
    seed: bytes,
    now: datetime,
) -> bytes:
    """The signed report of DOCUMENT, the vulnerability SCAN and INSTALLED software, for programs and people."""
    verdicts = judged(document)
    files = {
        RESULTS: _json(document),
        VERDICTS: _json(verdicts),
        **{f"report.{language}.html": report_html.page(
               document, verdicts, language, report_vulnerabilities.section(scan, language),
               report_sboms.section(installed, language)).encode()
           for language in report_html.LANGUAGES},
        "oscal.json": _json(report_oscal.results(document, verdicts, now)),
        **report_vulnerabilities.files(scan),
        **(installed.files if installed else {}),
    }  # fmt: skip
    return packed(files, Signer(verifier.scoped(PURPOSE).name, seed), now)


def _json(document: object) -> bytes:
    return json.dumps(document, indent=1, ensure_ascii=False, sort_keys=True).encode() + b"\n"


def own_verifier() -> Verifier:
    """The verifier key of the control node's record."""
    return Verifier((runs.FOLDER / "verifier").read_text())


def make(arguments: argparse.Namespace) -> int:
    """`llmkeep audit report`: run all checks, and sign the results."""
    tree = source_tree.located()
    standard = standards.read(tree, arguments.standard)
    if not runs.is_kept(tree) or not (runs.FOLDER / "verifier").exists():
        raise runs.RecordError("reports are signed by the record's key, which is not on this host: run it on the control "
            "node, after `llmkeep audit init`")  # fmt: skip
    runs.seed()  # before checks are run in vain
    installed = report_sboms.newest(PLACES, own_verifier())
    inventories = [inventory_path(place, tree) for place in arguments.inventory or [INVENTORY]]
    begun = datetime.now(UTC)
    with tempfile.TemporaryDirectory(prefix="llmkeep-", dir=memory()) as folder:
        path = Path(folder, "verified.json")
        verification.run(tree, inventories, arguments, [], path, quiet=arguments.quiet)
        if not path.exists():
            raise LlmkeepError("the checks did not complete, so there is no report")
        document = results(tree, standard, json.loads(path.read_text()), inventories, begun)
    bundle, limit = PLACES.bundles / "current", database.DAYS
    scan = software.scan(tree, inventories, arguments, bundle, limit, PLACES.waivers)
    now = datetime.now(UTC)
    content = archive(document, scan, installed, own_verifier(), runs.seed(), now)
    digest = hashlib.sha256(content).hexdigest()
    name = f"{arguments.standard}-{now.strftime('%Y%m%dT%H%M%S')}-{digest[:8]}.tar"
    shown = _counted(_verified(content, own_verifier(), name))
    runs.append(
        {
            "event.kind": "event",
            "event.category": ["configuration"],
            "event.action": "audit report",
            "event.outcome": "success",
            "user.name": runs.who(),
            "llmkeep.report.name": name,
            "llmkeep.report.sha256": digest,
            "llmkeep.report.standard": arguments.standard,
        }
    )
    write(PLACES.reports / name, content, 0o600)
    print(f"{PLACES.reports / name}: SHA-256 {digest}")
    if arguments.out:
        write(arguments.out / name, content, 0o644)
        print(f"{arguments.out / name}: the same")
    print(shown)
    return 0


def _counted(report: Report) -> str:
    counts = report.counts()
    return ", ".join(f"{number} {verdict}" for verdict, number in counts.items() if number)


def opened(path: Path, verifier: Verifier) -> Report:
    """A report that verifies; LlmkeepError with the reason for any other."""
    return _verified(path.read_bytes(), verifier, path)


def _verified(content: bytes, verifier: Verifier, name: object) -> Report:
    try:
        return verified(content, verifier)
    except ArchiveRefused as error:
        raise LlmkeepError(f"{name}: {error}") from error


def show_list(_: argparse.Namespace) -> int:
    """`llmkeep audit reports`: the reports on this host, with verdicts; one that does not verify is altered."""
    code = 0
    for path in sorted(PLACES.reports.glob("*.tar"), key=lambda path: path.name):
        try:
            summary = _counted(opened(path, own_verifier()))
        except (LlmkeepError, HeadError) as error:
            summary, code = f"ALTERED: {error}", 3
        print(printable(f"{path.name}: {summary}"))
    return code


def differences(before: Report, after: Report) -> list[str]:
    """Lines on controls, checks and hosts that differ between two reports on the same standard."""
    if before.results["standard"]["id"] != after.results["standard"]["id"]:
        raise LlmkeepError(f"one is on {before.results['standard']['id']}, the other on {after.results['standard']['id']}: "
            "compare two reports on the same standard")  # fmt: skip
    lines = []
    for field in ("bundle_serial", "tree_revision", "inventory_sha256"):
        lines += _changed(field, before.results.get(field), after.results.get(field))
    was, now = ({each["control"]: each["verdict"] for each in report.verdicts} for report in (before, after))
    for control in [*was, *(now.keys() - was.keys())]:
        lines += _changed(f"control {control}", was.get(control), now.get(control))
    was, now = (
        {f"{each['id']} on {name}": each["state"] for name, host in report.results["hosts"].items()
         for each in host["checks"]}
        for report in (before, after)
    )  # fmt: skip
    for check in sorted(was.keys() | now.keys()):
        lines += _changed(check, was.get(check), now.get(check))
    return lines


def _changed(name: str, before: object, after: object) -> list[str]:
    return [] if before == after else [f"{name}: {_shown(before)} -> {_shown(after)}"]


def _shown(value: object) -> str:
    return "absent" if value is None else str(value)


def diff(arguments: argparse.Namespace) -> int:
    """`llmkeep audit diff`: what changed between two reports, each verified first."""
    verifier = Verifier(arguments.verifier) if arguments.verifier else own_verifier()
    pair = [path if path.exists() else PLACES.reports / path for path in (arguments.before, arguments.after)]
    for line in differences(*(opened(path, verifier) for path in pair)):
        print(printable(line))
    return 0


def add_commands(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """`report`, `reports` and `diff`."""
    parser = verbs.add_parser(
        "report", parents=[runs.whole_run(INVENTORY)], help="run all checks, and sign their results for a standard"
    )  # fmt: skip
    parser.add_argument("--standard", required=True, help="name of a file in controls/, such as cis-debian13")
    parser.add_argument("--out", type=Path, help="a folder for a copy that leaves this host")
    parser.add_argument("--quiet", action="store_true", help="suppress Ansible's output")
    parser.set_defaults(run=make)
    verbs.add_parser("reports", help="list the reports made here, and their verdicts").set_defaults(
        run=show_list
    )
    parser = verbs.add_parser("diff", help="print changes between two reports")
    parser.add_argument("before", type=Path, help="a file, or a name that `reports` lists")
    parser.add_argument("after", type=Path, help="likewise")
    parser.add_argument(
        "--verifier", help="verifier key of the record that signed them (default: this host's)"
    )
    parser.set_defaults(run=diff)
