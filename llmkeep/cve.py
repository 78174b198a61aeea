"""`llmkeep cve`: known vulnerabilities in the hosts' packages and programs, according to the bundle's databases.

No host is changed.

Exit codes: 0 none is open, and everything is known; 1 refused or failed; 2 wrong usage; 3 some are open, and
everything is known; 4 something is unknown: a database is missing, damaged, empty, too old or of another
distribution, a host did not answer, a version cannot be compared, or a unit runs files that were replaced. Open
vulnerabilities are printed in that case too.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llmkeep import durable, source_tree
from llmkeep.bundle import manifest
from llmkeep.errors import printable
from llmkeep.places import Places
from llmkeep.playbooks import inventory_path
from llmkeep.record import runs, software
from llmkeep.vulnerabilities import database, estate, fixes, vex

PLACES = Places()
INVENTORY = "/etc/llmkeep/inventory"
CURRENT = PLACES.bundles / "current"
VULNERABLE, UNKNOWN = 3, 4
MOST_HOSTS, MOST_UNITS = 6, 3  # named on a line


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """`llmkeep cve`."""
    parser = subparsers.add_parser(
        "cve",
        parents=[runs.whole_run(INVENTORY)],
        help="print known vulnerabilities of the hosts",
        description=__doc__,
    )
    parser.add_argument("--host", dest="limit", metavar="HOST,HOST", help="only these")
    parser.add_argument(
        "--database",
        type=Path,
        default=CURRENT,
        metavar="BUNDLE",
        help="bundle with the databases (default: %(default)s)",
    )
    parser.add_argument(
        "--fixed-by",
        type=Path,
        metavar="BUNDLE",
        help="mark the findings that the versions in this bundle fix",
    )
    parser.add_argument(
        "--days",
        type=int,
        default=database.DAYS,
        help="a database older than this counts as unknown (default: %(default)s)",
    )
    parser.add_argument(
        "--waivers",
        type=Path,
        default=PLACES.waivers,
        metavar="FOLDER",
        help="folder with waivers (default: %(default)s)",
    )
    parser.add_argument("--vex", type=Path, metavar="FILE", help="also write the scan as CycloneDX VEX")
    parser.add_argument("--json", action="store_true", help="print the scan as one JSON document")
    parser.set_defaults(run=_cve)


def _cve(arguments: argparse.Namespace) -> int:
    tree = source_tree.located()
    inventories = [inventory_path(place, tree) for place in arguments.inventory or [INVENTORY]]
    for bundle in filter(None, (arguments.database, arguments.fixed_by)):
        require_signed(bundle)
    scan = software.scan(tree, inventories, arguments, arguments.database, arguments.days, arguments.waivers)
    if arguments.fixed_by:
        fixes.close(scan, arguments.fixed_by, arguments.database, datetime.now(UTC))
    # Numbers by another limit or other waivers are not the estate's.
    if (arguments.database, arguments.days, arguments.waivers) == (CURRENT, database.DAYS, PLACES.waivers):
        runs.note(runs.VULNERABLE, tree, arguments, estate.summary(scan))
    if arguments.vex:
        durable.write(arguments.vex, vex.document(scan), 0o644)
    print(
        json.dumps(scan, indent=1, ensure_ascii=False)
        if arguments.json
        else printable("\n".join(lines(scan, not arguments.limit)))
    )
    if not estate.complete(scan):
        return UNKNOWN
    return VULNERABLE if any(sum(estate.counts(host).values()) for host in scan["hosts"].values()) else 0


def require_signed(bundle: Path) -> None:
    """Refuse a bundle that is not signed by a key accepted here. A developer's machine accepts any."""
    if PLACES.bundle_keyring.exists() and (bundle / manifest.NAME).exists():
        manifest.authentic(bundle, PLACES.bundle_keyring, manifest.BUNDLE)


def lines(scan: dict[str, Any], whole: bool) -> Iterator[str]:
    """The scan for people: databases, findings with the hosts that have them, the worst first, and what is unknown.

    WHOLE: whether all hosts of the inventory were asked.
    """
    for name, each in scan["databases"].items():
        yield f"database {name}: {each['date'] or 'none'}"
    rows: dict[tuple[Any, ...], list[str]] = {}
    for host, each in scan["hosts"].items():
        for finding in each["findings"]:
            if finding["state"] != "unimportant":
                rows.setdefault(_row(finding), []).append(f"{host}{running(finding)}")
    for row, hosts in rows.items():
        yield f"{'  '.join(row)}  on {shown(hosts, MOST_HOSTS)}"
    yield from summed(scan)
    if whole and not any(host["unknown"] for host in scan["hosts"].values()):
        yield from idle(scan)


def _row(finding: dict[str, Any]) -> tuple[str, ...]:
    """The line for a finding, which several hosts may share."""
    waiver, state = finding["waiver"], finding["state"]
    words = [
        finding["severity"] if state == "open" else state,
        finding["id"],
        f"{finding['package']} {finding['version']}",
        f"fixed in {finding['fixed']}" if finding["fixed"] else "no fix",
    ]
    if waiver:
        holds = "WAIVER EXPIRED on" if waiver["expired"] else "waived until"
        words.append(f"{holds} {waiver['until']} by {waiver['owner']}: {waiver['reason']}")
    if finding.get("closed"):
        words.append("closed by the bundle")
    return (*words, *filter(None, [finding["note"]]))


def running(finding: dict[str, Any]) -> str:
    """Units that run it, in brackets; `(unseen)` where no use can be seen."""
    if finding["units"] is None:
        return " (unseen)"
    return f" ({shown(finding['units'], MOST_UNITS)})" if finding["units"] else ""


def shown(names: Sequence[str], most: int) -> str:
    """The first names, and the number of the others."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def summed(scan: dict[str, Any]) -> Iterator[str]:
    """Numbers for each host, what is unknown, and what no database covers."""
    for host, each in scan["hosts"].items():
        open_now = [finding for finding in each["findings"] if estate.is_open(finding)]
        numbers = ", ".join(f"{number} {name}" for name, number in estate.counts(each).items() if number)
        unknown = len(each["unknown"]) + sum(map(estate.is_unknown, each["findings"]))
        closed = ""
        if "fixed_by_serial" in scan:
            number = sum(finding["closed"] for finding in open_now)
            closed = f", {number} closed by bundle {scan['fixed_by_serial']}"
        fixed = sum(bool(finding["fixed"]) for finding in open_now)
        yield f"{host}: {len(open_now)} open ({numbers or 'none'}; {fixed} with a fix{closed}), {unknown} unknown"
        yield from (f"{host}: UNKNOWN: {sentence}" for sentence in each["unknown"])
        if each["uncovered"]:
            yield f"{host}: no database covers {', '.join(each['uncovered'])}"
    if scan["uncovered"]:
        yield f"no database covers {', '.join(scan['uncovered'])}"


def idle(scan: dict[str, Any]) -> Iterator[str]:
    """Waivers that cover nothing."""
    covering = [
        finding["waiver"]
        for host in scan["hosts"].values()
        for finding in host["findings"]
        if finding["waiver"]
    ]
    for waiver in scan["waivers"]:
        if waiver not in covering:
            yield f"the waiver of {waiver['id']} in {waiver['package']} by {waiver['owner']} matches no finding: remove it"
