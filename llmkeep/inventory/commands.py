"""`llmkeep inventory new | check`."""

import argparse
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from llmkeep import source_tree
from llmkeep.errors import LlmkeepError
from llmkeep.inventory import check, flows, new
from llmkeep.inventory.hosts import COLUMNS, VOLUMES, Host, cell_faults, hosts, table
from llmkeep.places import Places
from llmkeep.playbooks import listed
from llmkeep.policy import source
from llmkeep.policy.bundle import source_folder

NEW = """`llmkeep inventory new`: a commented hosts.yml, from a table of hosts or from answers on a terminal.

The result passes `llmkeep inventory check` before it is written; a file that exists is never replaced. No host is contacted.

Exit codes: 0 written; 1 refused, and nothing written.
"""
OUT = Path("/etc/llmkeep/inventory/hosts.yml")
ROWS = (
    ("ops1", "10.20.30.11", "control prometheus", "", "", "", ""),
    (
        "llm1",
        "10.20.30.21",
        "serve vllm edge",
        "8",
        "NVIDIA A100-SXM4-80GB",
        "80G",
        "LLM1-SERIAL-1:2T:data LLM1-SERIAL-2::audit LLM1-SERIAL-3:10G:feedback",
    ),
)


def template(described: dict[str, str]) -> str:
    """A table to fill, in CSV; lines that begin with # are comments."""
    lines = ["# A line for each host; delete these. Commas, semicolons or tabs separate cells."]
    lines += [f"# {column}: {meaning}" for column, meaning in COLUMNS.items()]
    lines += [
        (
            f"# purposes of disks: {', '.join(VOLUMES)}; the size of audit may be omitted, and is then computed from "
            "--requests-per-day"
        )
    ]
    lines += [f"# group {group}: {description}" for group, description in described.items()]
    lines += [",".join(row) for row in ((*COLUMNS,), *ROWS)]
    return "\n".join(lines) + "\n"


def write(answers: new.Answers, out: Path, root: Path) -> int:
    """Write the inventory of ANSWERS to OUT if `inventory check` finds no fault; returns the number of hosts."""
    days = new.keep_days(root)
    if faults := new.answer_faults(answers, days):
        raise _refusal(faults)
    rates = sorted(source.read(source_folder(Places())).data.get("llm/rates", {}))
    text = new.text(answers, new.groups_of(root), days, rates)
    with tempfile.TemporaryDirectory(prefix="llmkeep-inventory-") as folder:
        draft = Path(folder, "hosts.yml")
        draft.write_text(text)
        if faults := check.faults([draft], root):
            raise _refusal(faults)
        text += new.ports(flows.estate(listed([draft], root)))
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=out.parent, prefix=".new-") as file:
        file.write(text)
        file.flush()
        os.fchmod(file.fileno(), 0o644)
        os.fsync(file.fileno())
        try:
            os.link(file.name, out)
        except FileExistsError as error:
            raise _exists(out) from error
    return len(answers.hosts)


def _refusal(faults: list[str]) -> LlmkeepError:
    return LlmkeepError("nothing was written:\n" + "\n".join(f"- {fault}" for fault in faults))


def _exists(out: Path) -> LlmkeepError:
    return LlmkeepError(f"{out} exists, and was not changed: choose another path with --out, or edit it")


def _new(arguments: argparse.Namespace) -> int:
    root = source_tree.located()
    described = new.groups_of(root)
    if arguments.template:
        print(template(described), end="")
        return 0
    if os.path.lexists(arguments.out):
        raise _exists(arguments.out)
    answers = new.Answers(
        hosts=(),
        domain=arguments.domain,
        operators=tuple(arguments.operators),
        requests=arguments.requests_per_day,
        mail=tuple(arguments.alert_mail),
        webhook=arguments.alert_webhook,
        backup=arguments.backup,
        shared=tuple(arguments.shared_address),
        hsm_module=arguments.hsm_module,
        hsm=arguments.hsm,
        model=arguments.model,
        context=arguments.context,
    )
    if arguments.hosts:
        rows = table(arguments.hosts.read_bytes(), str(arguments.hosts))
        inventory, faults = hosts(rows, described, answers.domain)
        if faults:
            raise _refusal([f"{arguments.hosts}, {fault}" for fault in faults])
        answers = replace(answers, hosts=tuple(inventory))
    else:
        answers = from_terminal(answers, described)
    number = write(answers, arguments.out, root)
    print(f"{arguments.out}: {number} hosts, no fault found; no host was contacted")
    print(f"draw it with: llmkeep inventory check -i {arguments.out} --graph estate.svg")
    return 0


def from_terminal(answers: new.Answers, described: dict[str, str]) -> new.Answers:
    """ANSWERS completed on the terminal; a host whose cells have a fault is asked for again."""
    if not sys.stdin.isatty():
        raise LlmkeepError(
            "standard input is not a terminal: give the hosts with --hosts FILE.csv, starting from --template"
        )
    print("Press Enter to accept the value in brackets. Groups:")
    for group, description in described.items():
        print(f"  {group}: {description}")
    try:
        domain = _answer("Domain, as given to bootstrap", answers.domain)
        inventory = _hosts_from_terminal(described, domain)
        groups = {group for host in inventory for group in host.groups}
        answers = replace(answers, hosts=tuple(inventory), domain=domain)
        if not answers.operators:
            answers = replace(
                answers, operators=tuple(_answer("Operators' networks, separated by spaces").split())
            )
        if any(disk.purpose == "audit" for host in inventory for disk in host.disks) and not answers.requests:
            answers = replace(answers, requests=_number("Requests a day of the whole estate"))
        if "prometheus" in groups and not (answers.mail or answers.webhook):
            mail = _answer(
                "Mail for alerts: TO FROM ADDRESS:PORT of the server (empty for a webhook)"
            ).split()
            webhook = "" if mail else _answer("URL that gets alerts")
            answers = replace(answers, mail=tuple(mail), webhook=webhook)
        if not answers.backup:
            answers = replace(
                answers, backup=_answer("Backups to, as sftp:USER@ADDRESS:/FOLDER (empty for none)")
            )
        if "keepalived" in groups and not answers.shared:
            addresses = _answer("Addresses that move between hosts in keepalived, separated by spaces")
            answers = replace(answers, shared=tuple(addresses.split()))
        if "storage" in groups and not answers.hsm_module:
            module = _answer("PKCS#11 module of the HSM", "/usr/lib/vendor/libpkcs11.so")
            answers = replace(
                answers, hsm_module=module, hsm=_answer("ADDRESS:PORT of the HSM (empty if it is local)")
            )
        if "vllm" in groups and not answers.model:
            answers = replace(
                answers, model=_answer("Release of the model"), context=_number("Its context in tokens")
            )
    except EOFError as error:
        raise LlmkeepError("the input ended early, and nothing was written: start again") from error
    return answers


def _hosts_from_terminal(described: dict[str, str], domain: str) -> list[Host]:
    rows: list[tuple[str, dict[str, str]]] = []
    while True:
        name = _answer(
            "Next host's name (empty: no more)" if rows else "Name of the control node",
            "" if rows else "ops1",
        )
        if not name:
            inventory, faults = hosts(rows, described, domain)
            if not faults:
                return inventory
            print("\n".join(f"- {fault}" for fault in faults) + "\nenter all hosts again, from the first one")
            rows = []
            continue
        cells = {"name": name, "address": _answer("  IP address")}
        cells["groups"] = _answer(
            "  groups, separated by spaces", "serve edge" if rows else "control prometheus"
        )
        cells["gpus"] = _answer("  GPUs", "0")
        if cells["gpus"] != "0":
            cells["gpu_name"] = _answer("  name of the GPUs (may be empty)")
            cells["gpu_memory"] = _answer("  memory of each, such as 80G")
        cells["disks"] = _answer(
            "  disks to encrypt, SERIAL:SIZE:PURPOSE separated by spaces (empty for none)"
        )
        taken = [row["name"] for _, row in rows]
        faults = [*cell_faults(cells, described)] + (
            ["the name is taken: choose another"] if name in taken else []
        )
        if faults:
            print("\n".join(f"- {fault}" for fault in faults) + "\nonce more:")
        else:
            rows.append((f"host {name}", cells))


def _answer(question: str, default: str = "") -> str:
    return input(f"{question}{f' [{default}]' if default else ''}: ").strip() or default


def _number(question: str) -> int:
    while True:
        answer = _answer(question).replace(",", "")
        if answer.isdecimal() and int(answer):
            return int(answer)
        print(f"- {answer!r} is not a number above 0: write one such as 20000")


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return int(text)


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """`llmkeep inventory new` and `check`."""
    parser = subparsers.add_parser(
        "inventory", help="write, check and draw an inventory offline", description=__doc__
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    verb = verbs.add_parser(
        "check", help="print an inventory's faults; contacts no host", description=check.__doc__
    )
    verb.add_argument(
        "-i", "--inventory", action="append", required=True, help="file or folder; may be repeated"
    )
    verb.add_argument("--json", action="store_true", help="print JSON and nothing else")
    verb.add_argument("--graph", type=Path, metavar="FILE.svg", help="draw hosts, and ports between them")
    verb.set_defaults(run=check.check)
    verb = verbs.add_parser(
        "new",
        help="write a commented hosts.yml; contacts no host",
        description=NEW,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.add_argument(
        "--hosts", type=Path, metavar="FILE.csv", help="the table of hosts (default: ask on the terminal)"
    )
    verb.add_argument("--template", action="store_true", help="print an empty table for --hosts, and exit")
    verb.add_argument("--out", type=Path, default=OUT, metavar="FILE", help="new file (default %(default)s)")
    verb.add_argument(
        "--domain", default="estate.internal", help="as given to bootstrap (default %(default)s)"
    )
    verb.add_argument(
        "--operators", nargs="+", default=[], metavar="NETWORK", help="network of operators' workstations"
    )
    verb.add_argument(
        "--requests-per-day",
        type=_positive,
        default=0,
        metavar="N",
        help="of the whole estate; determines the size of the audit record",
    )
    verb.add_argument(
        "--alert-mail",
        nargs=3,
        default=[],
        metavar=("TO", "FROM", "ADDRESS:PORT"),
        help="mail for each alert",
    )
    verb.add_argument(
        "--alert-webhook", default="", metavar="URL", help="gets each alert, in Alertmanager's format"
    )
    verb.add_argument(
        "--backup", default="", metavar="REPOSITORY", help="folder, or sftp:USER@ADDRESS:/FOLDER"
    )
    verb.add_argument(
        "--shared-address",
        nargs="+",
        default=[],
        metavar="ADDRESS",
        help="address for clients, which moves between hosts in keepalived",
    )
    verb.add_argument(
        "--hsm-module", default="", metavar="PATH", help="PKCS#11 module, where disks are encrypted"
    )
    verb.add_argument("--hsm", default="", metavar="ADDRESS:PORT", help="address of a network HSM")
    verb.add_argument(
        "--model", default="", metavar="RELEASE", help="release that hosts in vllm run on all their GPUs"
    )
    verb.add_argument("--context", type=_positive, default=0, metavar="TOKENS", help="context of the model")
    verb.set_defaults(run=_new)
