"""Hosts of a new inventory, from a table in CSV or from answers: the same cells, and the same refusals."""

import csv
import difflib
import io
import ipaddress
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from llmkeep.errors import LlmkeepError, printable

COLUMNS = {
    "name": "short name of the host, such as llm1",
    "address": "its IP address, since no host of an estate uses DNS",
    "groups": "its groups, separated by spaces; gpu, mirror and storage are derived from the others",
    "gpus": "number of its GPUs; empty for none",
    "gpu_name": "as `nvidia-smi --query-gpu=name --format=csv` prints it; may be empty",
    "gpu_memory": "of each GPU, such as 80G; needed by vllm",
    "disks": "empty disks to encrypt, SERIAL:SIZE:PURPOSE, separated by spaces",
}
REQUIRED = ("name", "address", "groups")
NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*")
SIZE = re.compile(r"(\d+(?:\.\d+)?)([MGT])")
UNITS = {"M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
# Where the volume of a purpose is mounted, and the units that wait for it by the group of the host. `inventory check` refuses a
# unit that is missing.
VOLUMES: dict[str, tuple[str, dict[str, tuple[str, ...]]]] = {
    "data": (
        "/srv/llmkeep",
        {
            "serve": ("llm-gateway@.service", "llm-engine@.service"),
            "engines": ("llm-engine@.service",),
            "vllm": ("vllm@.service",),
            "train": ("llm-train@.service",),
            "slurm_node": ("slurmd.service",),
        },
    ),
    "audit": ("/var/log/llm-audit", {"serve": ("llm-audit.service",)}),
    "feedback": ("/var/lib/llm-feedback", {"serve": ("llm-gateway@.service",)}),
    "logs": ("/var/lib/elasticsearch", {"search": ("elasticsearch.service",)}),
}


@dataclass(frozen=True)
class Disk:
    serial: str
    size: str  # as 3.5T; empty for an audit record's, which is computed
    purpose: str


@dataclass(frozen=True)
class Host:
    name: str
    address: str
    groups: tuple[str, ...]
    gpus: int = 0
    gpu_name: str = ""
    gpu_memory: str = ""
    disks: tuple[Disk, ...] = ()


def size_bytes(size: str) -> int | None:
    """Bytes of a size such as 3.5T; None if it is not a size."""
    parts = SIZE.fullmatch(size)
    return int(float(parts[1]) * UNITS[parts[2]]) if parts else None


def table(content: bytes, name: str) -> list[tuple[str, dict[str, str]]]:
    """Cells of each row by column, after the number of its line. Takes commas, semicolons or tabs, any line ends, and a
    byte-order mark. Raises LlmkeepError for anything else.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise LlmkeepError(
            f"{name} is not UTF-8 (byte 0x{content[error.start]:02x} at offset {error.start}): save it as CSV in UTF-8"
        ) from error
    lines = text.splitlines()
    first = next((line for line in lines if line.strip() and not line.startswith("#")), "")
    if not first:
        raise LlmkeepError(f"{name} is empty: start with `llmkeep inventory new --template`")
    separator = max(",;\t", key=first.count)
    reader = csv.reader(io.StringIO("\n".join(lines)), delimiter=separator)
    header: list[str] = []
    rows = []
    for cells in reader:
        cells = [cell.strip() for cell in cells]
        while cells and not cells[-1]:  # a spreadsheet fills each line to the longest one
            cells.pop()
        if not cells or cells[0].startswith("#"):
            continue
        if not header:
            header = [cell.lower().replace(" ", "_") for cell in cells]
            _require_columns(header, name)
        elif len(cells) > len(header):
            raise LlmkeepError(
                f"{name}, line {reader.line_num}: it has {len(cells)} cells, but the table has {len(header)} columns: "
                "put spaces, not separators, between the groups or disks of one cell"
            )
        else:
            filled = [*cells, *[""] * (len(header) - len(cells))]
            rows.append((f"line {reader.line_num}", dict(zip(header, filled, strict=True))))
    if not rows:
        raise LlmkeepError(f"{name} names no host: write a line for each below the column names")
    return rows


def _require_columns(header: list[str], name: str) -> None:
    for column in header:
        if column not in COLUMNS or header.count(column) > 1:
            fault = "twice" if column in COLUMNS else "which is unknown"
            raise LlmkeepError(
                f"{name} has the column {printable(column)!r}, {fault}: {_nearest(column, COLUMNS)}"
            )
    if lacking := [column for column in REQUIRED if column not in header]:
        raise LlmkeepError(
            f"{name} lacks {', '.join(lacking)} in its first line, {', '.join(map(repr, header))}: name the columns there"
        )


def hosts(
    rows: list[tuple[str, dict[str, str]]], groups: Collection[str], domain: str
) -> tuple[list[Host], list[str]]:
    """Hosts of a table, and its faults, a sentence each. GROUPS: those of meta/features.yml."""
    faults, inventory = [], []
    names: dict[str, str] = {}
    addresses: dict[str, str] = {}
    for place, cells in rows:
        own = [*cell_faults(cells, groups)]
        name, address = cells["name"], _canonical(cells.get("address", ""))
        short = name.removesuffix(f".{domain}")
        if short and names.setdefault(short, place) != place:
            own.append(f"{name} is also the name of {names[short]}: give each host its own")
        if address and addresses.setdefault(address, place) != place:
            own.append(f"{address} is also the address of {addresses[address]}: give each host its own")
        faults += [f"{place}: {fault}" for fault in own]
        if not own:
            inventory.append(_host(cells, groups))
    if not faults and not any("control" in host.groups for host in inventory):
        faults.append("no host is in control: add it to the host that was bootstrapped from the medium")
    return inventory, faults


def cell_faults(cells: dict[str, str], groups: Collection[str]) -> Iterator[str]:
    """Faults of one host, by its cells alone."""
    name, address, mine = cells["name"], cells.get("address", ""), _words(cells.get("groups", ""))
    for column, cell in cells.items():
        if "{{" in cell or "{%" in cell or "{#" in cell or not cell.isprintable():
            yield f"{column} is {printable(cell)!r}, which Ansible would evaluate: write plain text"
    if not NAME.fullmatch(name):
        yield f"the name is {printable(name)!r}: write lowercase letters, digits and dashes, such as llm1"
    elif name in (*groups, "all", "ungrouped", "localhost"):
        yield f"the name is {name}, which is reserved by Ansible or a group: choose another, such as {name}1"
    if not _canonical(address):
        yield f"the address is {printable(address)!r}: write the IP address at which other hosts reach it"
    for group in mine:
        if group not in groups:
            yield f"the group {printable(group)} is unknown: {_nearest(group, groups)}"
    if not mine:
        yield f"groups is empty: write one or more of {', '.join(groups)}"
    gpus = cells.get("gpus", "")
    if gpus and not re.fullmatch(r"\d{1,3}", gpus):
        yield f"gpus is {printable(gpus)!r}: write the number of GPUs, such as 8"
    elif not int(gpus or 0) and (reason := next((group for group in ("vllm", "gpu") if group in mine), "")):
        yield f"it is in {reason}, and gpus is {gpus or 'empty'}: write how many GPUs it has, such as 8"
    memory = cells.get("gpu_memory", "")
    if (memory or "vllm" in mine) and not size_bytes(memory):
        yield f"gpu_memory is {printable(memory) or 'empty'}: write the memory of each GPU, such as 80G"
    for word in _words(cells.get("disks", "")):
        yield from _disk_faults(word, mine)


def _disk_faults(word: str, mine: list[str]) -> Iterator[str]:
    parts = word.rsplit(":", 2)
    if len(parts) != 3 or not parts[0]:
        yield f"the disk {printable(word)!r} is not SERIAL:SIZE:PURPOSE: write it such as S6XNNA0T:2T:data"
        return
    _, size, purpose = parts
    if purpose not in VOLUMES:
        yield f"the disk {printable(word)} has the purpose {printable(purpose)!r}: {_nearest(purpose, VOLUMES)}"
    elif not {*VOLUMES[purpose][1]} & {*mine}:
        yield (
            f"the disk {printable(word)} is for {purpose}, which only hosts in {' or '.join(VOLUMES[purpose][1])} have: add "
            "the group, or remove the disk"
        )
    if not size_bytes(size) and (size or purpose != "audit"):
        yield f"the disk {printable(word)} has the size {printable(size)!r}: write one such as 3.5T"


def _host(cells: dict[str, str], groups: Collection[str]) -> Host:
    gpus = int(cells.get("gpus") or 0)
    disks = tuple(Disk(*word.rsplit(":", 2)) for word in _words(cells.get("disks", "")))
    mine = {*_words(cells["groups"])}
    mine |= {"gpu"} if gpus else set()
    mine |= {"storage"} if disks else set()
    return Host(
        cells["name"],
        str(_canonical(cells["address"])),
        tuple(group for group in groups if group in mine),
        gpus,
        cells.get("gpu_name", ""),
        cells.get("gpu_memory", ""),
        disks,
    )


def _words(cell: str) -> list[str]:
    return re.split(r"[\s,;+]+", cell.strip(" ,;+")) if cell.strip(" ,;+") else []


def _canonical(address: str) -> str:
    """The address as Python writes it; an empty string for one that other hosts cannot reach."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return ""
    return "" if parsed.is_unspecified or parsed.is_loopback or parsed.is_multicast else str(parsed)


def _nearest(name: str, names: Collection[str]) -> str:
    near = difflib.get_close_matches(name.lower(), [*names], n=1)
    return f"did you mean {near[0]}?" if near else f"take one of {', '.join(names)}"
