"""`llmkeep usage`: tokens by tenant, model and day, summed from copies of the hosts' audit records.

Each record is verified first: chain and signed heads, with the key and the heads that the witness keeps on this node.
Only records under a signed head count. A request, failed ones included, counts on the day (UTC) on which it ended,
answers from the cache included; copies made by shadow mode do not count. With -i there is a cost, where the inventory
has `prices: {MODEL: {input: 0.5, output: 1.5, currency: EUR}}`, per million tokens.

Exit codes: 0 all hosts' records cover the days; 1 refused; 2 wrong usage; 3 a record does not verify, and nothing was
summed; 4 summed, and a host's record is missing or does not cover the days: they are named.
"""

import argparse
import csv
import json
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

from llmkeep import source_tree
from llmkeep.errors import LlmkeepError, Refused, printable
from llmkeep.playbooks import inventory_path, listed
from llmkeep.record import witness
from llmproof import heads
from llmproof.chain import files
from llmproof.cli import ALTERED
from llmproof.heads import HeadError, Verifier
from llmproof.verify import verify

NAMES = ("tenant", "subject", "model", "day", "host", "action")
FIELDS = {"tenant": "organization.id", "subject": "user.id", "action": "event.action"}
INCOMPLETE = 4
NONE = "-"  # in place of a model, where a request asks none
QUOTED = 3  # findings of a record
RECENT = 100_000  # ended requests that are remembered: a gateway may send the last 10,000 outcomes twice
MILLION = 1_000_000


@dataclass
class Sums:
    """The sums of one row."""

    requests: int = 0
    input_tokens: int = 0
    output_tokens: int = 0

    def add(self, other: "Sums") -> None:
        self.requests += other.requests
        self.input_tokens += other.input_tokens
        self.output_tokens += other.output_tokens


type Key = tuple[str, ...]  # the values asked for, and the model


@dataclass
class Ledger:
    """The exchanges of one host's record between two days. Requests that have no outcome yet are all that grows with it."""

    host: str
    by: list[str]
    since: str
    until: str
    sums: dict[Key, Sums] = field(default_factory=lambda: defaultdict(Sums))
    begun: dict[str, tuple[str, str]] = field(default_factory=dict)  # model and day, by transaction
    ended: OrderedDict[str, None] = field(default_factory=OrderedDict)
    records: int = 0
    first: str = ""
    last: str = ""

    def add(self, record: dict[str, object]) -> None:
        """Count one verified record; LlmkeepError for tokens that are not a number."""
        self.records += 1
        self.last = str(record["@timestamp"])
        self.first = self.first or self.last
        phase, transaction = record.get("llmkeep.audit.phase"), str(record.get("transaction.id"))
        if record.get("event.category") != ["api"] or phase not in ("intent", "outcome"):
            return
        if transaction in self.ended or "llmkeep.experiment.shadow" in record:
            return
        if phase == "intent":
            self.begun[transaction] = str(record.get("gen_ai.request.model", NONE)), self.last[:10]
            return
        model, _ = self.begun.pop(transaction, (NONE, ""))
        self.ended[transaction] = None
        if len(self.ended) > RECENT:
            self.ended.popitem(last=False)
        if self.since <= self.last[:10] <= self.until:
            own = {"model": model, "day": self.last[:10], "host": self.host}
            key = [own[name] if name in own else str(record.get(FIELDS[name], NONE)) for name in self.by]
            used = (self.tokens(record, f"gen_ai.usage.{name}_tokens") for name in ("input", "output"))
            self.sums[*key, model].add(Sums(1, *used))

    def tokens(self, record: dict[str, object], name: str) -> int:
        value = record.get(name, 0)
        if not isinstance(value, int):
            raise LlmkeepError(
                f"{self.host}: record {record['event.sequence']} has {name} {value!r}, which is not a number: the gateway "
                "did not write that, examine the host"
            )
        return value

    @property
    def pending(self) -> int:
        """Requests of these days that have no outcome."""
        return sum(self.since <= day <= self.until for _, day in self.begun.values())


def complete_heads(folder: Path) -> bytes:
    """All complete heads in a folder."""
    return b"".join(note + b"\n" for note in heads.read(folder / heads.NAME)[0])


def read(folder: Path, notes: Path, ledger: Ledger) -> int:
    """Verify a copy of a record, and count it; returns how many records are declared removed. Refused where it does not verify.

    `notes`: the witness's folder. Heads only grow, so either of the two files must be the beginning of the other.
    """
    size = sum(path.stat().st_size for path in files(folder)) / (1 << 20)
    print(f"verifying the record of {ledger.host} in {folder}: {size:,.0f} MiB", file=sys.stderr)
    here, there = complete_heads(folder), complete_heads(notes)
    if not (here.startswith(there) or there.startswith(here)):
        raise Refused(
            ALTERED,
            f"{folder / heads.NAME}: its heads differ from those that the witness keeps of {ledger.host} in {notes}: one of "
            "the two was changed. Nothing was summed; save both, and examine that host (docs/audit/audit-record.md)",
        )
    try:
        report = verify(folder, Verifier((notes / "verifier").read_text()), each=ledger.add)
    except HeadError as error:
        raise LlmkeepError(f"{notes / 'verifier'}: {error}") from error
    if not report.ok:
        findings = "\n".join(map(str, report.findings[:QUOTED]))
        more = f"\n… and {report.altered - QUOTED} more" if report.altered > QUOTED else ""
        raise Refused(
            ALTERED,
            f"the record of {ledger.host} does not verify, so nothing was summed:\n{findings}{more}\nCopy it again: a "
            "truncated copy looks like this too. If the error remains, save the evidence (docs/audit/audit-record.md)",
        )
    return report.removed


def witnessed() -> dict[str, Path]:
    """The witness's folder of each host and replica, by the key that signs its record; LlmkeepError if there is none."""
    places = (witness.KEPT, witness.KEPT_OF_PODS)
    by_key = {path.read_text().strip(): path.parent for place in places for path in place.glob("*/verifier")}
    if not by_key:
        raise LlmkeepError(
            f"the witness keeps no heads in {witness.KEPT}, so no record can be proved: run this as root on the host in the "
            "group control, after `llmkeep audit collect`"
        )
    return by_key


def of_hosts(folders: Iterable[Path], by_key: dict[str, Path]) -> dict[str, tuple[Path, Path]]:
    """By host, the copy of its record and the witness's folder; LlmkeepError for anything but a record of a known host."""
    names = ", ".join(sorted(notes.name for notes in by_key.values()))
    copies: dict[str, tuple[Path, Path]] = {}
    for folder in folders:
        path = folder / "verifier"
        if not path.exists():
            raise LlmkeepError(
                f"{folder} is not a copy of a record, it has no file `verifier`: give a copy of {witness.RECORD}"
            )
        key = path.read_text(errors="replace").strip()
        if key not in by_key:
            raise LlmkeepError(
                f"{folder} is signed by {key[:120]}, but the witness knows only {names}: give the records of this estate's "
                "hosts; a new host is known after the next `llmkeep audit collect`"
            )
        if by_key[key].name in copies:
            raise LlmkeepError(
                f"{folder} and {copies[by_key[key].name][0]} are both records of {by_key[key].name}: give one"
            )
        copies[by_key[key].name] = folder, by_key[key]
    if not copies:
        host = min(notes.name for notes in by_key.values())
        raise LlmkeepError(
            f"no record was given: the hosts keep theirs. Copy each one of {names}, or take its backup; as root of this host:\n"
            f"  mkdir -p records/{host} && ssh root@{host} tar --sort=name -cC {witness.RECORD} . | tar -xC records/{host}\n"
            "and name the folders: --record records/*"
        )
    return copies


@dataclass(frozen=True)
class Prices:
    """Prices per million tokens by model, for input and output."""

    currency: str
    of_model: dict[str, tuple[Decimal, Decimal]]

    def cost(self, parts: dict[str, Sums]) -> Decimal | None:
        """The cost of a row's models; None if one of them has tokens but no price."""
        if self.unpriced(parts):
            return None
        zero = (Decimal(0), Decimal(0))
        priced = ((sums, self.of_model.get(model, zero)) for model, sums in parts.items())
        return sum(
            ((sums.input_tokens * paid[0] + sums.output_tokens * paid[1]) / MILLION for sums, paid in priced),
            Decimal(0),
        )

    def unpriced(self, parts: dict[str, Sums]) -> set[str]:
        used = {model for model, sums in parts.items() if sums.input_tokens or sums.output_tokens}
        return used - self.of_model.keys()


def prices(hostvars: dict[str, dict[str, Any]]) -> Prices | None:
    """The price list of an inventory, if it has one; LlmkeepError for one that cannot be used."""
    lists = [each["prices"] for each in hostvars.values() if "prices" in each]
    if not lists:
        return None
    if any(each != lists[0] for each in lists) or not isinstance(lists[0], dict):
        raise LlmkeepError("`prices` of the inventory differs between hosts: set it once, in the group all")
    of_model, currencies = {}, set()
    for model, price in lists[0].items():
        numbers = [price.get("input"), price.get("output")] if isinstance(price, dict) else []
        amounts = [
            Decimal(str(each))
            for each in numbers
            if isinstance(each, int | float) and not isinstance(each, bool) and 0 <= each < MILLION
        ]
        if len(amounts) != 2:
            raise LlmkeepError(
                f"prices of {model} are {price!r}: write {{input: 0.5, output: 1.5, currency: EUR}}, per million tokens"
            )
        of_model[str(model)] = amounts[0], amounts[1]
        currencies.add(str(price.get("currency")))
    if len(currencies) > 1:
        raise LlmkeepError(f"prices are in {', '.join(sorted(currencies))}: use one currency")
    return Prices(currencies.pop() if currencies else "", of_model)


def lacking(host: str, folder: Path, ledger: Ledger, removed: int) -> str:
    """Why a host's record does not cover the days; empty if it does."""
    if not ledger.records:
        return f"{host}: there is no signed record in {folder}"
    if ledger.last[:10] <= ledger.until:
        return f"{host}: its signed record ends at {ledger.last}; later requests on these days are not in the sums"
    if removed and ledger.first[:10] >= ledger.since:
        return f"{host}: retention removed a part of its record: it begins at {ledger.first}"
    return ""


def table(header: list[str], rows: list[list[str]], texts: int) -> list[str]:
    """Lines for a person; all columns but the first TEXTS are numbers."""
    cells = [[printable(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if at < texts else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]


@dataclass(frozen=True)
class Row:
    """What is printed of one combination of values."""

    values: Key
    sums: Sums
    cost: Decimal | None

    def cells(self, priced: bool, number: str = "d") -> list[str]:
        counted = (self.sums.requests, self.sums.input_tokens, self.sums.output_tokens)
        cost = [] if not priced else ["" if self.cost is None else f"{self.cost:f}"]
        return [*self.values, *(format(each, number) for each in counted), *cost]


def row(values: Key, parts: dict[str, Sums], priced: Prices | None) -> Row:
    total = Sums()
    for each in parts.values():
        total.add(each)
    return Row(values, total, priced.cost(parts) if priced else None)


def _usage(arguments: argparse.Namespace) -> int:
    if arguments.until < arguments.since:
        raise LlmkeepError(f"--to {arguments.until} is before {arguments.since}: swap the two")
    by_key = witnessed()
    expected, priced = {place.name for place in by_key.values()}, None
    if arguments.inventory:
        tree = source_tree.located()
        groups = listed([inventory_path(place, tree) for place in arguments.inventory], tree)
        expected |= {*groups.get("serve", {}).get("hosts", [])}
        priced = prices(groups["_meta"]["hostvars"])
    parts: dict[Key, dict[str, Sums]] = defaultdict(lambda: defaultdict(Sums))
    hosts, notes, incomplete = {}, [], []
    for host, (folder, heads_folder) in sorted(of_hosts(arguments.record, by_key).items()):
        ledger = Ledger(host, arguments.by, arguments.since, arguments.until)
        removed = read(folder, heads_folder, ledger)
        for (*values, model), sums in ledger.sums.items():
            parts[tuple(values)][model].add(sums)
        hosts[host] = {"record": str(folder), "records": ledger.records, "ends": ledger.last or None}
        if ledger.pending:
            notes.append(f"{host}: {ledger.pending} requests have no outcome and are not counted: a process was killed, or "
                "they were in progress")  # fmt: skip
        if reason := lacking(host, folder, ledger, removed):
            incomplete.append(reason)
    incomplete += [f"{host}: no record of it was given" for host in sorted(expected - hosts.keys())]
    whole: dict[str, Sums] = defaultdict(Sums)
    for models in parts.values():
        for model, sums in models.items():
            whole[model].add(sums)
    if priced and (unpriced := priced.unpriced(whole)):
        notes.append(f"no price is listed for {', '.join(sorted(unpriced))}: rows with it have no cost")
    rows = [row(values, models, priced) for values, models in sorted(parts.items())]
    _print(arguments, rows, row(("total",) + ("",) * (len(arguments.by) - 1), whole, priced), priced,
           {"hosts": hosts, "incomplete": incomplete, "notes": notes})  # fmt: skip
    return INCOMPLETE if incomplete else 0


def _print(
    arguments: argparse.Namespace, rows: list[Row], total: Row, priced: Prices | None, about: dict[str, Any]
) -> None:
    counted = ["requests", "input_tokens", "output_tokens"]
    if arguments.json:
        made = []
        for each in rows:
            cost = {"cost": None if each.cost is None else f"{each.cost:f}"} if priced else {}
            made.append(dict(zip(arguments.by, each.values, strict=True)) | vars(each.sums) | cost)
        money = {"currency": priced.currency} if priced else {}
        print(
            json.dumps(
                {"from": arguments.since, "to": arguments.until, "rows": made} | money | about, indent=2
            )
        )
        return
    if arguments.csv:
        out = csv.writer(sys.stdout, lineterminator="\n")
        out.writerow([*arguments.by, *counted, *(["cost", "currency"] if priced else [])])
        for each in rows:
            out.writerow([*each.cells(priced is not None), *([priced.currency] if priced else [])])
    else:
        header = [*arguments.by, *(name.replace("_", " ") for name in counted)]
        header += [priced.currency or "cost"] if priced else []
        cells = [each.cells(priced is not None, ",d") for each in (*rows, total)]
        print("\n".join(table(header, cells, len(arguments.by))))
    for line in (*about["incomplete"], *about["notes"]):
        print(printable(f"llmkeep usage: {line}"), file=sys.stderr)


def day(text: str) -> str:
    """A day as records have it."""
    try:
        return date.fromisoformat(text).isoformat()
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a day: write one such as 2026-11-01") from None


def dimensions(text: str) -> list[str]:
    """Names of columns, separated by commas."""
    for name in text.split(","):
        if name not in NAMES:
            raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(NAMES)}")
    return list(dict.fromkeys(text.split(",")))


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """`llmkeep usage`."""
    parser = subparsers.add_parser(
        "usage",
        help="tokens used by tenants and models, from the hosts' verified records",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--from", dest="since", type=day, required=True, metavar="DAY", help="the first day")
    parser.add_argument(
        "--to",
        dest="until",
        type=day,
        default=datetime.now(UTC).date().isoformat(),
        metavar="DAY",
        help="the last day (default: today)",
    )
    parser.add_argument(
        "--by",
        type=dimensions,
        default=["tenant", "model"],
        metavar="NAMES",
        help=f"any of {','.join(NAMES)} (default: tenant,model)",
    )
    parser.add_argument(
        "--record",
        type=Path,
        nargs="+",
        action="extend",
        default=[],
        metavar="FOLDER",
        help=f"copies of the hosts' {witness.RECORD}; without any, prints how to make them",
    )
    parser.add_argument(
        "-i", "--inventory", action="append", help="for prices and the hosts in [serve]; may be repeated"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--csv", action="store_true", help="comma-separated values")
    form.add_argument("--json", action="store_true", help="one JSON document")
    parser.set_defaults(run=_usage)
