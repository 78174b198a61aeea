"""The text of a new inventory: hosts, groups, volumes, and comments on what is set elsewhere."""

import ipaddress
import math
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from llmkeep.errors import printable
from llmkeep.inventory.flows import Estate, features
from llmkeep.inventory.hosts import NAME, VOLUMES, Disk, Host, size_bytes
from llmkeep.size import AUDIT_BYTES, DAY, FILLED, GIB

HEAD_BYTES = 213  # of a host's record, one a minute, never removed (docs/develop/figures.md)
HEAD_YEARS = 5  # for which the volume has room for heads
SFTP = re.compile(r"sftp:(?:[^@\s]+@)?(?P<address>[^/\s]+?):/\S+")
SMALL_MODEL = {"name": "smollm2-135m-instruct", "driver": "naive", "model": "smollm2-135m-instruct"}


@dataclass(frozen=True)
class Answers:
    """The answers from which an inventory is made. Empty: unknown, or not wanted."""

    hosts: tuple[Host, ...]
    domain: str = "estate.internal"
    operators: tuple[str, ...] = ()  # networks, for base_ssh_from
    requests: int = 0  # a day, of the estate
    mail: tuple[str, ...] = ()  # recipient, sender, ADDRESS:PORT of the server
    webhook: str = ""
    backup: str = ""
    shared: tuple[str, ...] = ()  # addresses that move between hosts in keepalived
    hsm_module: str = ""
    hsm: str = ""  # ADDRESS:PORT
    model: str = ""
    context: int = 0


def groups_of(root: Path) -> dict[str, str]:
    """The groups of meta/features.yml, in its order, each with what the last of its roles is for."""
    described: dict[str, str] = {}
    for row in features(root):
        group = row.get("group", row["hosts"])
        if group.isidentifier() and group != "all":
            specification = (root / "roles" / row["role"] / "meta/argument_specs.yml").read_text()
            described[group] = yaml.safe_load(specification)["argument_specs"]["main"]["short_description"]
    return described | {"control": "The control node, which was bootstrapped from the medium"}


def keep_days(root: Path) -> int:
    """For how many days the record is kept by default."""
    return int(yaml.safe_load((root / "roles/_common/defaults/main.yml").read_text())["audit_keep_days"])


def audit_gib(requests: int, days: int) -> int:
    """The least volume for a host's record, in GiB, at so many requests a day: two records each, and a head a minute."""
    heads = HEAD_BYTES * (DAY // 60) * 365 * HEAD_YEARS
    return math.ceil((requests * days * AUDIT_BYTES + heads) / FILLED / GIB)


def endpoint(text: str) -> tuple[str, int] | None:
    """Address and port of ADDRESS:PORT, with IPv6 in brackets; None for anything else."""
    address, _, port = text.rpartition(":")
    try:
        return str(ipaddress.ip_address(address.strip("[]"))), int(port)
    except ValueError:
        return None


def answer_faults(answers: Answers, days: int) -> list[str]:
    """Faults of the answers, one sentence each."""
    faults = []
    if not NAME.fullmatch(answers.domain):
        faults.append(
            f"--domain is {printable(answers.domain)!r}: write the one given to bootstrap, such as estate.internal"
        )
    for network in answers.operators:
        try:
            ipaddress.ip_network(network)
        except ValueError as error:
            faults.append(
                f"--operators is {printable(network)!r} ({error}): write a network such as 10.20.10.0/24"
            )
    texts = {
        "--alert-mail": " ".join(answers.mail),
        "--alert-webhook": answers.webhook,
        "--backup": answers.backup,
        "--hsm-module": answers.hsm_module,
        "--model": answers.model,
    }
    for flag, text in texts.items():
        if "{{" in text or "{%" in text or "{#" in text or not text.isprintable():
            faults.append(f"{flag} is {printable(text)!r}, which Ansible would evaluate: write plain text")
    mail_server = answers.mail[-1] if answers.mail else ""
    for flag, text in (("--alert-mail", mail_server), ("--hsm", answers.hsm)):
        if text and endpoint(text) is None:
            faults.append(
                f"{flag} has {printable(text)!r}: write ADDRESS:PORT, since no host of an estate uses DNS"
            )
    if answers.webhook and webhook_endpoint(answers.webhook) is None:
        faults.append(
            f"--alert-webhook is {printable(answers.webhook)!r}: write a URL with an IP address, such as https://10.20.30.50/alert"
        )
    if answers.backup and not answers.backup.startswith("/") and backup_endpoint(answers.backup) is None:
        faults.append(
            f"--backup is {printable(answers.backup)!r}: write a folder, or sftp:USER@ADDRESS:/FOLDER with an IP address"
        )
    groups = {group for host in answers.hosts for group in host.groups}
    if "prometheus" in groups and not (answers.mail or answers.webhook):
        faults.append(
            "a host is in prometheus, but its alerts reach no operator: give --alert-mail or --alert-webhook"
        )
    if "prometheus" not in groups and (answers.mail or answers.webhook):
        faults.append("alerts have a destination, but no host is in prometheus: add the control node to it")
    if "keepalived" in groups and not answers.shared:
        faults.append(
            "hosts are in keepalived, but no address moves between them: give --shared-address ADDRESS, once per "
            "simultaneously active edge"
        )
    for address in answers.shared:
        if endpoint(f"{address}:0") is None:
            faults.append(
                f"--shared-address is {printable(address)!r}: write an unused IP address of the edges' network"
            )
    if "vllm" in groups and not (answers.model and answers.context):
        faults.append("a host is in vllm, but there is no model: give --model NAME and --context TOKENS")
    if "storage" in groups and "softhsm" not in groups and not answers.hsm_module:
        faults.append("disks are encrypted by a key in an HSM: give --hsm-module PATH, or no disks")
    need = audit_gib(answers.requests, days)
    for host in answers.hosts:
        for disk in host.disks if answers.requests else ():
            size = size_bytes(disk.size)
            if disk.purpose == "audit" and size is not None and size < need * GIB:
                faults.append(
                    f"{host.name}'s disk for audit has {disk.size}, and {days} days of {answers.requests:,} requests a day need "
                    f"{need}G: give a larger disk, or fewer requests"
                )
        if not answers.requests and any(disk.purpose == "audit" and not disk.size for disk in host.disks):
            faults.append(f"{host.name}'s disk for audit has no size: give --requests-per-day, or the size")
    return faults


def webhook_endpoint(url: str) -> tuple[str, int] | None:
    try:
        parts = urlsplit(url)
        port = parts.port or {"https": 443, "http": 80}[parts.scheme]
        return endpoint(f"{parts.hostname}:{port}")
    except (ValueError, KeyError):
        return None


def backup_endpoint(repository: str) -> tuple[str, int] | None:
    parts = SFTP.fullmatch(repository)
    return endpoint(f"{parts['address']}:22") if parts else None


def text(answers: Answers, described: dict[str, str], days: int, rates: Iterable[str]) -> str:
    """hosts.yml, without the ports. DESCRIBED: groups_of. RATES: names of the policy's rate classes."""
    lines = [
        "# Written by `llmkeep inventory new`. Edit it, and check each change: llmkeep inventory check -i FILE.",
        "# docs/operate/estate.md explains it, inventory/example has more settings.",
        "all:",
        "  vars:",
        "    ansible_user: root",
        f"    {_entry('base_domain', answers.domain)}  # as given to bootstrap",
    ]
    if answers.operators:
        lines.append(
            f"    {_entry('base_ssh_from', [*answers.operators])}  # the control node may connect without it"
        )
    else:
        lines.append(
            "    # base_ssh_from: [10.20.10.0/24]  # operators' workstations; without it only the control node connects"
        )
    if any(":" in host.address for host in answers.hosts):
        lines.append("    base_ipv6: true")
    if any(disk.purpose == "audit" for host in answers.hosts for disk in host.disks):
        lines += _audit_comment(answers, days)
    lines.append("  hosts:")
    for host in answers.hosts:
        lines += _host(host, answers, days)
    lines.append("  children:")
    members = {group: [host for host in answers.hosts if group in host.groups] for group in described}
    control = [host for host in answers.hosts if "control" in host.groups][:1]
    members["mirror"] = members.get("mirror") or control
    for group, description in described.items():
        if members[group]:
            lines += [f"    {group}:  # {description}", "      hosts:"]
            lines += [f"        {_entry(host.name, None)}" for host in members[group]]
            variables = _group_lines(group, members[group], answers)
            lines += ["      vars:"] if any(not line.startswith("#") for line in variables) else []
            lines += [f"        {line}" for line in variables]
    lines.append("    # Groups without a host, which add nothing until they have one:")
    lines += [
        f"    # {group}: {description}" for group, description in described.items() if not members[group]
    ]
    lines += [
        "# Rate classes are not set in the inventory, but by role in the policy (docs/audit/policy.md), at present in",
        f"# llm/rates/data.yaml: {', '.join(rates)}; `llmkeep inventory check` prints each in pages of text.",
    ]
    return "\n".join(lines) + "\n"


def ports(estate: Estate) -> str:
    """Comments: what firewalls between networks have to let through, from the roles' own rules."""
    lines = [
        "# Your own firewalls between networks have to allow (the hosts' own firewalls do; docs/operate/estate.md, Ports):"
    ]
    for flow in estate.flows:
        sources, targets = (
            ", ".join(box.title if box.groups else f"{box.title} {box.address}".strip() for box in boxes)
            for boxes in (flow.sources, flow.targets)
        )
        targets = "each other" if sources == targets else targets
        lines.append(f"#   {flow.port} ({flow.label}): {sources} -> {targets}")
    lines += [f"#   not listed: {reason}" for reason in estate.unread]
    return "\n".join(lines) + "\n"


def _audit_comment(answers: Answers, days: int) -> list[str]:
    if not answers.requests:
        return ["  # Size of audit: `llmkeep inventory new --requests-per-day N` computes it."]
    requests, need = answers.requests, audit_gib(answers.requests, days)
    return [
        f"  # A volume audit of {need}G holds {days} days (audit_keep_days) of {requests:,} requests, {AUDIT_BYTES:,} bytes",
        f"  # each, and heads of {HEAD_YEARS} years, and is then filled to {FILLED:.0%}. Each host has one, since it may have to",
        "  # answer all requests alone. Roles with log_prompt in the policy add their prompts.",
    ]


def _host(host: Host, answers: Answers, days: int) -> list[str]:
    """The host's own variables."""
    lines = [f"    {_entry(host.name, None)}", f"      {_entry('ansible_host', host.address)}"]
    if host.gpus:
        expected = {"count": host.gpus} | ({"name": host.gpu_name} if host.gpu_name else {})
        lines.append(f"      {_entry('gpu_health_expect', expected)}")
    if "vllm" in host.groups:
        lines.append(f"      {_entry('vllm_gpu_memory', host.gpu_memory)}")
        lines.append(f"      {_entry('vllm_models', [_vllm_model(host, answers)])}")
    elif "engines" in host.groups:
        comment = "the bundle's small model: name yours (roles/llm_serving)"
        lines.append(f"      {_entry('llm_serving_models', [SMALL_MODEL])}  # {comment}")
    elif "serve" in host.groups and any("engines" in each.groups for each in answers.hosts):
        lines.append(f"      {_entry('llm_serving_models', [])}  # its gateways use the hosts in engines")
    if opened := _open_out(host, answers):
        lines.append(f"      {_entry('base_open_out', opened)}")
    if host.disks:
        lines.append("      luks_volumes:")
        lines += [f"        - {_flow(_volume(disk, host.groups, answers, days))}" for disk in host.disks]
    return lines


def _vllm_model(host: Host, answers: Answers) -> dict[str, Any]:
    model = {"name": answers.model, "release": answers.model}
    return {**model, "gpus": [*range(host.gpus)], "max_model_len": answers.context}


def _open_out(host: Host, answers: Answers) -> list[dict[str, Any]]:
    """What this host reaches outside of the estate."""
    endpoints = []
    if "storage" in host.groups and answers.hsm:
        endpoints.append(endpoint(answers.hsm))
    if "prometheus" in host.groups:
        endpoints += [endpoint(answers.mail[-1])] if answers.mail else []
        endpoints += [webhook_endpoint(answers.webhook)] if answers.webhook else []
    if "control" in host.groups and answers.backup:
        endpoints.append(backup_endpoint(answers.backup))
    return [{"addresses": [each[0]], "port": each[1]} for each in endpoints if each]


def _volume(disk: Disk, groups: Collection[str], answers: Answers, days: int) -> dict[str, Any]:
    mount, units = VOLUMES[disk.purpose]
    return {
        "name": disk.purpose,
        "serial": disk.serial,
        "size": disk.size or f"{audit_gib(answers.requests, days)}G",
        "mount": mount,
        "units": list(
            dict.fromkeys(unit for group, names in units.items() if group in groups for unit in names)
        ),
    }


def _group_lines(group: str, members: list[Host], answers: Answers) -> list[str]:
    """Variables of a group."""
    if group == "control":
        if answers.backup:
            return [_entry("backup_repository", answers.backup)]
        return [
            "# vars: {backup_repository: 'sftp:USER@ADDRESS:/FOLDER'}  # without it there is no backup, and an alert says so"
        ]
    if group == "prometheus":
        mail = dict(zip(("to", "from", "server"), answers.mail, strict=True)) if answers.mail else {}
        lines = [_entry("prometheus_mail", mail)] if mail else []
        return lines + ([_entry("prometheus_webhook", answers.webhook)] if answers.webhook else [])
    if group == "keepalived":
        return [_entry("keepalived_addresses", [*answers.shared])]
    if group == "gpu":
        return ["gpu_set: provided  # install the driver yourself (docs/operate/gpu.md)"]
    if group == "vllm":
        socket = f"/run/vllm/{answers.model}/api.sock"
        remote = {"socket": [socket], "group": "vllm", "key_credential": "vllm.key", "revision": "1"}
        return [_entry("llm_serving_models", [{"name": answers.model, "driver": "remote", "remote": remote}])]
    if group == "train" and all(host.gpus for host in members):
        return ["llm_training_gpus: true"]
    if group == "storage" and answers.hsm_module:
        return [
            f"{_entry('hsm_module', answers.hsm_module)}  # how its PIN gets to hosts: docs/operate/hsm.md"
        ]
    return []


def _entry(name: str, value: object) -> str:
    """`name: value` on one line, quoted where YAML would read another thing."""
    entry = _flow({name: value})[1:-1]
    return entry.removesuffix(" null") if value is None else entry


def _flow(value: object) -> str:
    dumped: str = yaml.safe_dump(
        value, default_flow_style=True, sort_keys=False, width=math.inf, allow_unicode=True
    )
    return dumped.strip()
