"""llm-audit: write, verify and read the record.

Exit codes: 0 good; 1 failed, the message says why; 2 wrong usage; 3 the record was altered; 4 there is nothing to
verify or to show.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from llmproof import heads, sbom, vulnerabilities
from llmproof.archive import ArchiveRefused
from llmproof.chain import ROTATE, UNSIGNED_SECONDS, Chain, ChainError, files, lines
from llmproof.heads import HeadError, Verifier
from llmproof.report import reasons, verified
from llmproof.retention import MIN_DAYS
from llmproof.verify import Report, verify

FOLDER = Path("/var/log/llm-audit")
SOCKET = Path("/run/llm-audit/audit.sock")
CREDENTIAL = "llm-audit.seed"
ALTERED, NOTHING = 3, 4
MOMENT = re.compile(r"\d{4}(-\d\d(-\d\d(T\d\d(:\d\d(:\d\d(\.\d+)?)?)?Z?)?)?)?$")
SETTINGS = {name: f"LLM_AUDIT_{name.upper()}" for name in ("unsigned_seconds", "seen", "keep_days", "hold")}


def add_commands(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", folder: Path = FOLDER
) -> None:
    """`verify` and `show`, of the record in FOLDER if none is named."""
    parser = commands.add_parser(
        "verify", help="verify that nothing was changed; read-only", description=__doc__
    )
    parser.add_argument("folder", type=Path, nargs="?", default=folder, help="default: %(default)s")
    parser.add_argument("--verifier", help="the verifier key, or a file with it; default: the folder's own, which proves "
        "nothing against anyone who can write there")  # fmt: skip
    parser.add_argument("--heads", type=Path, help="a copy of `heads` kept on another host")
    _add_unsigned_seconds(parser, "report a tail that has been without a head for longer")
    parser.add_argument(
        "--live",
        action="store_true",
        help="the writer is running: measure the tail up to the present time, not to its end",
    )
    parser.add_argument("--json", action="store_true", help="one JSON document")
    parser.set_defaults(run=as_command(run_verify))
    parser = commands.add_parser(
        "verify-report", help="verify a report, and print its results", description=__doc__
    )
    parser.add_argument("archive", type=Path, help="as `llmkeep audit report` wrote it")
    parser.add_argument(
        "--verifier", required=True, help="the verifier key of the control node's record, or a file with it"
    )
    parser.add_argument("--json", action="store_true", help="one JSON document")
    parser.set_defaults(run=as_command(run_verify_report))
    parser = commands.add_parser(
        "verify-sbom", help="verify an SBOM of hosts, and print it", description=__doc__
    )
    parser.add_argument("archive", type=Path, help="as `llmkeep sbom make` wrote it")
    parser.add_argument(
        "--verifier", required=True, help="the verifier key of the control node's record, or a file with it"
    )
    parser.set_defaults(run=as_command(run_verify_sbom))
    parser = commands.add_parser("show", help="print the records, one per line; read-only")
    parser.add_argument("folder", type=Path, nargs="?", default=folder, help="default: %(default)s")
    parser.add_argument("--subject", help="user.id or user.name")
    parser.add_argument("--tenant", help="organization.id")
    parser.add_argument("--request", help="http.request.id")
    parser.add_argument("--since", type=moment, help="a time as in the record, or a prefix: 2027-01-31T08")
    parser.add_argument("--until", type=moment, help="likewise")
    parser.add_argument("--json", action="store_true", help="the records' own lines")
    parser.set_defaults(run=as_command(run_show))


def moment(text: str) -> str:
    """A time as in the record, or a prefix. The records are compared with it as text."""
    if not MOMENT.match(text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a time as in the record: write one such as 2027-01-31T08"
        )
    return text


def _add_unsigned_seconds(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--unsigned-seconds", type=float, default=UNSIGNED_SECONDS, help=f"{what} (default: %(default)s)"
    )


def _keep_days(text: str) -> int:
    if not text.isdigit() or int(text) < MIN_DAYS:
        raise argparse.ArgumentTypeError(f"{text!r} days: records are kept for {MIN_DAYS} days or more")
    return int(text)


def run_verify(options: argparse.Namespace) -> int:
    """`llm-audit verify`; returns the exit code."""
    key = options.verifier or str(options.folder / "verifier")
    if not options.verifier and not Path(key).exists() and not files(options.folder):
        report = Report("")
    else:
        text = Path(key).read_text() if Path(key).exists() or not options.verifier else key
        report = verify(options.folder, Verifier(text), options.heads, options.unsigned_seconds, options.live)
    code = NOTHING if report.nothing else 0 if report.ok else ALTERED
    if options.json:
        print(json.dumps(asdict(report) | {"ok": code == 0}))
        return code
    for finding in report.findings:
        print(finding)
    if report.altered > len(report.findings):
        print(f"… and {report.altered - len(report.findings)} more")
    if report.nothing:
        print(f"{options.folder}: there is no record")
        return code
    print(f"{options.folder}: {report.records} records from {report.first} to {report.last}, {report.heads} heads by "
          f"{report.verifier}, {report.kept_heads} kept elsewhere: "
          + ("nothing was altered" if report.ok else f"ALTERED, {report.altered} findings"))  # fmt: skip
    if report.removed:
        print(f"records 1 to {report.removed} were removed by declared retention, according to record {report.removed_by} "
            f"of {report.removed_at}: verified from record {report.removed + 1} on")  # fmt: skip
    if report.open_tail:
        print(f"the last {report.open_tail} records come after the last head: only the chain protects them")
    if report.late:
        print(
            f"{report.late} heads were signed more than {options.unsigned_seconds:g} s after a record that they cover"
        )
    if report.recovered:
        print(
            f"{report.recovered} times the writer removed a record torn by a power cut (event.action recovered)"
        )
    if report.pending:
        print(f"{report.pending} intents have no outcome: {', '.join(map(printable, report.pending_ids))}")
    return code


def run_verify_report(options: argparse.Namespace) -> int:
    """`llm-audit verify-report`; returns the exit code."""
    key = Path(options.verifier)
    verifier = Verifier(key.read_text() if key.is_file() else options.verifier)
    try:
        report = verified(options.archive.read_bytes(), verifier)
        scan = report.files.get(vulnerabilities.SCAN)
        scanned = vulnerabilities.lines(scan) if scan else ["vulnerabilities: not in this report"]
    except ArchiveRefused as error:
        print(printable(f"{options.archive}: {error}"))
        return ALTERED
    counts, standard, hosts = report.counts(), report.results["standard"], report.results["hosts"]
    silent = sorted(name for name, host in hosts.items() if not host["answers"])
    if options.json:
        print(json.dumps({"standard": standard["id"], "time": report.head.time, "hosts": len(hosts), "silent": silent,
                          "verdicts": counts, "verifier": report.verifier}))  # fmt: skip
        return 0
    print(printable(f"{options.archive}: as signed by {report.verifier} at {report.head.time}"))
    print(
        printable(
            f"{standard['title']}, mapping reviewed by {standard['reviewed_by']}, on {len(hosts)} hosts"
        )
    )
    print(", ".join(f"{number} {name}" for name, number in counts.items() if number))
    for name in silent:
        print(printable(f"{name} did not answer"))
    installed = sbom.lines(report.installed)[0] if report.installed else "none was made"
    print(printable(f"SBOM of the hosts: {installed}"))
    for line in scanned:
        print(printable(line))
    for line in reasons(report.verdicts):
        print(printable(line))
    return 0


def run_verify_sbom(options: argparse.Namespace) -> int:
    """`llm-audit verify-sbom`; returns the exit code."""
    key = Path(options.verifier)
    verifier = Verifier(key.read_text() if key.is_file() else options.verifier)
    try:
        bills, head = sbom.verified(options.archive.read_bytes(), verifier)
    except ArchiveRefused as error:
        print(printable(f"{options.archive}: {error}"))
        return ALTERED
    print(printable(f"{options.archive}: as signed by {verifier.text} at {head.time}"))
    for line in sbom.lines(bills):
        print(printable(line))
    return 0 if bills.complete else 1


def run_show(options: argparse.Namespace) -> int:
    """`llm-audit show`; returns the exit code."""
    any_record = False
    for line, record in _records(options.folder):
        at = str(record.get("@timestamp", ""))
        if options.subject and options.subject not in (record.get("user.id"), record.get("user.name")):
            continue
        if options.tenant and options.tenant != record.get("organization.id"):
            continue
        if options.request and options.request != record.get("http.request.id"):
            continue
        if (options.since and at < options.since) or (
            options.until and at[: len(options.until)] > options.until
        ):
            continue
        any_record = True
        names = (
            "llmkeep.audit.phase",
            "event.outcome",
            "event.action",
            "http.response.status_code",
            "http.request.id",
        )
        who = f"{record.get('user.id', record.get('user.name', '-'))}@{record.get('organization.id', '-')}"
        words = [
            str(record.get("event.sequence")),
            at,
            who,
            *(str(record[name]) for name in names if name in record),
        ]
        print(line.decode(errors="replace") if options.json else printable("  ".join(words)))
    return 0 if any_record else NOTHING


def printable(text: str) -> str:
    """The text without control characters."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text
    )


def _records(folder: Path) -> Iterator[tuple[bytes, dict[str, object]]]:
    for path in files(folder):
        for line in lines(path):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue  # `verify` tells it
            if isinstance(record, dict):
                yield line.rstrip(b"\n"), record


def run_serve(options: argparse.Namespace) -> int:
    """`llm-audit serve`; returns the exit code."""
    from llmproof.service import Retention, serve  # asyncio: not for the others

    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    if not options.seed_file and not folder:
        raise HeadError(f"there is no credential {CREDENTIAL}: start it by systemd, or give --seed-file")
    seed = heads.seed_of((options.seed_file or Path(str(folder), CREDENTIAL)).read_text())
    rotate = int(options.rotate_mib * 2**20)
    with Chain(
        options.folder,
        seed,
        options.name,
        rotate,
        unsigned_seconds=options.unsigned_seconds,
        seen=options.seen,
    ) as chain:
        retention = Retention(options.keep_days, options.hold) if options.keep_days else None
        serve(
            chain,
            options.socket,
            int(options.socket_mode, 8),
            options.head_seconds,
            retention,
            int(options.reserve_mib * 2**20),
        )
    return 0


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    top = argparse.ArgumentParser(prog="llm-audit", description=__doc__)
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    serve = commands.add_parser("serve", help="write events that other processes send over a UNIX socket")
    serve.add_argument("--folder", type=Path, default=FOLDER, help="default: %(default)s")
    serve.add_argument("--socket", type=Path, default=SOCKET, help="default: %(default)s")
    serve.add_argument("--socket-mode", default="0660", help="default: %(default)s")
    serve.add_argument("--seed-file", type=Path, help=f"instead of the systemd credential {CREDENTIAL}")
    serve.add_argument(
        "--name", default="", help="name of the signer, fixed when the record begins (llm-audit/HOSTNAME)"
    )
    serve.add_argument(
        "--head-seconds",
        type=float,
        default=60.0,
        help="interval between signed heads (default: %(default)s)",
    )
    serve.add_argument(
        "--rotate-mib", type=float, default=ROTATE / 2**20, help="size of a file (default: %(default)s)"
    )
    _add_unsigned_seconds(serve, "refuse records while one has been without a head for longer")
    serve.add_argument(
        "--seen", type=Path, help="the witness's statement: the last head it saw of this record"
    )
    serve.add_argument(
        "--keep-days",
        type=_keep_days,
        help="remove files that are signed, witnessed and older (default: none)",
    )
    serve.add_argument(
        "--hold",
        type=Path,
        help="while this file exists, nothing is removed; its text is put on record",
    )
    serve.add_argument(
        "--reserve-mib",
        type=float,
        default=1024,
        help="of the volume, but at most a tenth of it, for intents and outcomes "
        "alone (default: %(default)s)",
    )
    # By the environment, a unit file may set what the release that it still starts does not know.
    serve.set_defaults(
        run=as_command(run_serve),
        **{name: os.environ[variable] for name, variable in SETTINGS.items() if variable in os.environ},
    )
    add_commands(commands)
    return top


def as_command(command: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """COMMAND with refusals turned into a message and exit code 1."""

    def run(options: argparse.Namespace) -> int:
        try:
            return command(options)
        except BrokenPipeError:  # `show | head`
            sys.stdout = None
            return 1
        except (ChainError, HeadError, OSError) as error:
            print(f"llm-audit: {error}", file=sys.stderr)
            return 1

    return run


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; returns its exit code."""
    options = parser().parse_args(arguments)
    code: int = options.run(options)
    return code
