"""`llmkeep sbom bundle | make | list | show | diff`: software bills of materials (CycloneDX 1.6) of bundles and hosts.

Exit codes: 0 good; 1 refused or failed, or a host did not answer; 2 wrong usage; 3 an archive was altered; 4 there is no bundle,
or half of one.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmkeep.bundle import bill
from llmkeep.durable import write
from llmkeep.errors import LlmkeepError, printable
from llmkeep.places import Places
from llmkeep.record import sboms
from llmkeep.record.report import own_verifier
from llmkeep.record.runs import whole_run
from llmkeep.sbom import hosts
from llmproof.heads import HeadError, Verifier
from llmproof.sbom import Sbom, lines, origin

PLACES = Places()
ALTERED = 3


def _bundle(arguments: argparse.Namespace) -> int:
    _written(bill.encoded(bill.of_bundle(arguments.folder)), arguments.out)
    return 0


def _written(content: bytes, out: Path | None) -> None:
    if out:
        write(out, content, 0o644)
    else:
        sys.stdout.write(content.decode())


def _make(arguments: argparse.Namespace) -> int:
    name, content = hosts.made(arguments, PLACES)
    path = PLACES.sboms / name
    write(path, content, 0o600)
    bills = sboms.opened(path, own_verifier())
    print(path)
    if arguments.out:
        write(arguments.out / name, content, 0o644)
        print(f"{arguments.out / name}: the same")
    _print(lines(bills))
    return 0 if bills.complete else 1


def _print(text: list[str]) -> None:
    for line in text:
        print(printable(line))


def _list(_: argparse.Namespace) -> int:
    code = 0
    for path in sboms.paths(PLACES):
        try:
            text = lines(sboms.opened(path, own_verifier()))[0]
        except (LlmkeepError, HeadError) as error:
            text, code = f"ALTERED: {error}", ALTERED
        print(printable(f"{path.name}: {text}"))
    return code


def _opened(arguments: argparse.Namespace, name: str | None) -> Sbom:
    verifier = Verifier(arguments.verifier) if arguments.verifier else own_verifier()
    return sboms.opened(sboms.named(PLACES, name), verifier)


def _show(arguments: argparse.Namespace) -> int:
    bills = _opened(arguments, arguments.name)
    if not arguments.host:
        _print(lines(bills))
        return 0 if bills.complete else 1
    if arguments.host not in bills.documents:
        raise LlmkeepError(
            f"it has no components of {arguments.host}, only of {', '.join(bills.documents) or 'no host'}"
        )
    _written(bill.encoded(bills.documents[arguments.host]), arguments.out)
    return 0


def _diff(arguments: argparse.Namespace) -> int:
    for line in differences(_opened(arguments, arguments.before), _opened(arguments, arguments.after)):
        print(printable(line))
    return 0


def differences(before: Sbom, after: Sbom) -> Iterator[str]:
    """Lines on hosts and components that differ. Hosts that did not answer are named, but not compared."""
    for name in sorted(before.summary["hosts"].keys() | after.summary["hosts"].keys()):
        silent = [when for when, each in (("before", before), ("after", after)) if name not in each.documents]
        if silent:
            known = [name in each.summary["hosts"] for each in (before, after)]
            reason = "it did not answer" if all(known) else "not in the inventory"
            yield f"{name}: not compared, {reason} {' and '.join(silent)}"
            continue
        was, now = (_origins(each.documents[name]) for each in (before, after))
        for ref in sorted(was.keys() | now.keys()):
            if ref not in was:
                yield f"{name}: + {ref} ({now[ref]})"
            elif ref not in now:
                yield f"{name}: - {ref} ({was[ref]})"
            elif was[ref] != now[ref]:
                yield f"{name}: {ref}: {was[ref]} -> {now[ref]}"


def _origins(document: dict[str, Any]) -> dict[str, str]:
    """The identity of components: their origin, with the SHA-256 of a file."""
    origins = {}
    for each in document.get("components", []):
        digests = "".join(f" {value['content'][:16]}" for value in each.get("hashes", []))
        origins[each["bom-ref"]] = f"{origin(each)}{digests}"
    return origins


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """`llmkeep sbom …`."""
    parser = subparsers.add_parser("sbom", help="software bills of materials", description=__doc__)
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    verb = verbs.add_parser(
        "bundle", help="make that of a bundle from its manifest; the same bundle gives the same bytes"
    )
    verb.add_argument("folder", type=Path, help="bundle; `llmkeep bundle verify` checks it")
    verb.add_argument("--out", type=Path, help="file to write (default: standard output)")
    verb.set_defaults(run=_bundle)
    verb = verbs.add_parser(
        "make", parents=[whole_run(hosts.INVENTORY)], help="make those of all hosts, compared with the bundles, "
            "and sign them"
    )  # fmt: skip
    verb.add_argument("--out", type=Path, help="a folder for a copy that leaves this host")
    verb.set_defaults(run=_make)
    verbs.add_parser("list", help="list those of hosts that were made here").set_defaults(run=_list)
    verb = verbs.add_parser(
        "show", help="print unknown and missing packages of hosts, or everything on one host"
    )
    verb.add_argument("name", nargs="?", help="a file, or a name that `list` prints (default: the newest)")
    verb.add_argument("--host", help="print the CycloneDX document of this host")
    verb.add_argument("--out", type=Path, help="file for that document (default: standard output)")
    verb.set_defaults(run=_show)
    diff = verbs.add_parser("diff", help="print additions, removals and changes between two")
    diff.add_argument("before", help="a file, or a name that `list` prints")
    diff.add_argument("after", help="likewise")
    diff.set_defaults(run=_diff)
    for each in (verb, diff):
        each.add_argument(
            "--verifier", help="verifier key of the record that signed it (default: this host's)"
        )
