"""Faults of an inventory, found before any host is contacted.

Each rule yields sentences that name the value and the way out; `faults` groups equal sentences of several hosts.
"""

from __future__ import annotations

import difflib
import functools
import ipaddress
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from ansible.errors import AnsibleError
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator
from ansible.module_utils.common.text.formatters import human_to_bytes
from ansible_collections.llmkeep.estate.plugins.filter.cuda import (
    cuda_environments,
    cuda_set_fault,
    mixed_set_fault,
)
from ansible_collections.llmkeep.estate.plugins.filter.operators import operator_faults
from ansible_collections.llmkeep.estate.plugins.filter.serving import (
    DOMAIN,
    full_name,
    model_faults,
    sharing_faults,
)
from ansible_collections.llmkeep.estate.plugins.filter.training import job_faults
from ansible_collections.llmkeep.estate.plugins.filter.vllm import vllm_faults

Options = dict[str, dict[str, Any]]

TREE = Path(__file__).resolve().parents[2]

FEATURES: list[dict[str, Any]] = [
    {"group": row["hosts"], "needs": {}, "single": ""} | row
    for row in yaml.safe_load((TREE / "meta/features.yml").read_text())["features"]
]
# A host in none of these would be left unchanged silently.
GROUPS = tuple(
    dict.fromkeys(row["group"] for row in FEATURES if row["group"].isidentifier() and row["group"] != "all")
)
RENAMED_GROUPS = {"hsm": "softhsm"}
REQUIRED_GROUPS = {
    "control": "add the host that was bootstrapped from the medium",
    "mirror": "add the host that serves the bundle, such as the control node",
}
# Units that must wait for the volume that holds their files: group, variable of the directory or its path, unit.
NEEDED_UNITS = (
    ("serve", "llm_serving_models_dir", "llm-engine@.service"),
    ("engines", "llm_serving_models_dir", "llm-engine@.service"),
    ("vllm", "vllm_models_dir", "vllm@.service"),
    ("train", "llm_training_dir", "llm-train@.service"),
    ("slurm_node", "llm_training_dir", "slurmd.service"),
    ("serve", "/var/log/llm-audit", "llm-audit.service"),
    ("serve", "/var/lib/llm-feedback", "llm-gateway@.service"),
    ("search", "/var/lib/elasticsearch", "elasticsearch.service"),
    ("logstash", "/var/lib/logstash", "logstash.service"),
    ("search", "elasticsearch_snapshot_path", "elasticsearch.service"),
)
# What a folder may come to hold: group (any host where it is empty), folder or its variable, variable of the size, and its unit.
BUDGETS = (
    ("", "/var/log/journal", "base_journal_max", ""),
    ("logs", "/var/lib/filebeat", "filebeat_queue_mb", "M"),
    ("search", "/var/lib/elasticsearch", "elasticsearch_data_gb", "G"),
    ("search", "elasticsearch_snapshot_path", "elasticsearch_snapshot_gb", "G"),
)
FILLED = 0.85  # of a volume: the low watermark of Elasticsearch, far from the flood stage (95 %), at which it takes nothing
ANSIBLE_TAGS = {"all", "always", "never", "tagged", "untagged"}
NEAR_NAME = 0.88  # similarity (difflib) from which an unknown variable counts as misspelt
NEAR_GROUP = 0.75


def specifications(roles: Path) -> dict[str, Options]:
    """Options of all entry points by role, from roles/NAME/meta/argument_specs.yml."""
    by_role: dict[str, Options] = {}
    for path in sorted(roles.glob("*/meta/argument_specs.yml")):
        options: Options = {}
        for entry in yaml.safe_load(path.read_text())["argument_specs"].values():
            options.update(entry.get("options") or {})
        by_role[path.parents[1].name] = options
    return by_role


def gpu_defaults() -> dict[str, Any]:
    """The role gpu's default set of drivers, and its sets."""
    defaults: dict[str, Any] = yaml.safe_load((TREE / "roles/gpu/defaults/main.yml").read_text())
    return defaults


@functools.cache
def cuda_lock() -> dict[str, Any]:
    """The locked environments with CUDA."""
    lock: dict[str, Any] = yaml.safe_load((TREE / "artifacts.lock.d/gpu.yml").read_text())
    return lock


def nearest(name: str, names: Iterable[str], cutoff: float = 0.6) -> str:
    """The most similar of the names; an empty string if none is similar."""
    return next(iter(difflib.get_close_matches(name, list(names), n=1, cutoff=cutoff)), "")


# ---------------------------------------------------------------- the whole inventory
def group_faults(groups: Mapping[str, list[str]]) -> Iterator[str]:
    """Missing, renamed and misspelt groups."""
    for group, way_out in REQUIRED_GROUPS.items():
        if not groups.get(group):
            yield f"the group {group} is empty: {way_out}"
    for group in sorted(set(groups) - set(GROUPS) - {"all", "ungrouped"}):
        if group in RENAMED_GROUPS:
            yield f"the group {group} is called {RENAMED_GROUPS[group]} now: rename it in the inventory"
        elif near := nearest(group, GROUPS, NEAR_GROUP):
            yield f"the group {group} belongs to no role; did you mean {near}?"


def tag_faults(tags: Iterable[str], roles: Iterable[str]) -> Iterator[str]:
    """Tags that select nothing: Ansible would skip every role and report success."""
    known = {role for role in roles if not role.startswith("_")}
    for tag in sorted(set(tags) - known - ANSIBLE_TAGS):
        near = nearest(tag, known)
        hint = f"did you mean {near}?" if near else f"take one of {', '.join(sorted(known))}"
        yield f"the tag {tag} selects nothing; {hint}"


def limit_faults(limit: str, names: Iterable[str]) -> Iterator[str]:
    """Names in a --limit that are neither a host's nor a group's: the run would leave them out and report success."""
    known = sorted(names)
    for part in re.split("[,:]", limit):
        name = part.strip().lstrip("!&")
        if re.fullmatch(r"[\w.-]+", name) and name not in known:  # the others are patterns
            near = nearest(name, known)
            hint = f"did you mean {near}?" if near else f"take one of {', '.join(known)}"
            yield f"the limit {name} is not a host or group; {hint}"


# ---------------------------------------------------------------- one host
def unknown_variables(names: Iterable[str], known: Mapping[str, Options]) -> Iterator[str]:
    """Variables with a role's prefix that the role does not define, and misspelt ones without a prefix."""
    every = sorted({name for options in known.values() for name in options})
    prefixes = sorted((role for role in known if not role.startswith("_")), key=len, reverse=True)
    for name in sorted(set(names) - set(every)):
        role = next((role for role in prefixes if name.startswith(f"{role}_")), None)
        if role is None:
            if not name.startswith("ansible_") and (near := nearest(name, every, NEAR_NAME)):
                yield f"no role reads {name}; did you mean {near}?"
            continue
        near = nearest(name, every)
        hint = (
            f"did you mean {near}?" if near else f"it has {', '.join(sorted(known[role])) or 'no variables'}"
        )
        yield f"{name} is not a variable of the role {role}; {hint}"


def type_faults(values: Mapping[str, Any], known: Mapping[str, Options]) -> Iterator[str]:
    """Values that do not have the type in their role's specification."""
    for options in known.values():
        for name, option in options.items():
            if name not in values:
                continue
            spec = {
                key: value
                for key, value in option.items()
                if key in ("type", "elements", "choices", "options")
            }
            for message in ArgumentSpecValidator({name: spec}).validate({name: values[name]}).error_messages:
                yield f"{name} is {values[name]!r}: {message}"


def placement_faults(values: Mapping[str, Any], groups: Mapping[str, list[str]]) -> Iterator[str]:
    """A host without a feature, without an address, or with a feature that requires another one."""
    mine = set(values["group_names"])
    if not mine & (set(GROUPS) | set(RENAMED_GROUPS)):
        place = ", ".join(sorted(mine - {"all", "ungrouped"})) or "no group"
        yield f"it is in {place}, and in none of the estate's groups: add it to one of {', '.join(GROUPS)}"
    address = str(values.get("ansible_host", values.get("inventory_hostname", "")))
    try:
        ipaddress.ip_address(address)
    except ValueError:
        yield f"its address is {address!r}: set ansible_host to its IP address, since no host of an estate uses DNS"
    if "storage" in mine and not groups.get("softhsm") and not values.get("hsm_module"):
        yield (
            "it is in storage, whose volumes are opened by a key in an HSM, and has none: set hsm_module to your HSM's"
            " PKCS#11 module (docs/operate/hsm.md), or add a host to softhsm, the lab's stand-in"
        )
    for row in FEATURES:
        group = row["group"]
        if group not in mine:
            continue
        for needed, reason in row["needs"].items():
            if not mine & set(needed.split(":")):
                either = needed.replace(":", " or ")
                yield f"it is in {group} and not in {either}, but {reason}: add it to {either} too"
        if row["single"] and len(groups.get(group) or []) > 1:
            yield f"{', '.join(groups[group])} are in {group}, {row['single']}"
    if mine & {"slurm_controller", "slurm_node"} and len(groups.get("slurm_controller") or []) != 1:
        place = ", ".join(groups.get("slurm_controller") or []) or "no host"
        yield f"Slurm has one controller, and there is {place} in slurm_controller: put one host in it"
    if (logging := sorted(mine & {"logs", "logstash", "kibana"})) and not groups.get("search"):
        yield f"it is in {' and '.join(logging)}, which need Elasticsearch, and no host is in search: put one in it"


def keepalived_faults(
    values: Mapping[str, Any], groups: Mapping[str, list[str]], addresses: dict[str, str]
) -> Iterator[str]:
    """Addresses that could not move between edges, or be certified."""
    if "keepalived" not in values["group_names"]:
        return
    if len(groups["keepalived"]) < 2:
        yield "it is alone in keepalived, and addresses move between hosts: put two or more edges in it"
    virtual = values.get("keepalived_addresses") or []
    if not virtual:
        yield "keepalived_addresses is empty: name the address that clients ask, an unused one of the network of these hosts"
    for address in virtual:
        try:
            version = ipaddress.ip_address(address).version
        except ValueError:
            yield f"keepalived_addresses has {address!r}: write an IP address, without a prefix"
            continue
        if version == 6 and not values.get("base_ipv6"):
            yield f"keepalived_addresses has {address}, but IPv6 is off: set base_ipv6 to true, or remove the address"
        for host in sorted(
            name for name, own in addresses.items() if ipaddress.ip_address(address) == as_address(own)
        ):
            yield f"keepalived_addresses has {address}, which is {host}'s: choose an unused address"
    name, domain = values.get("keepalived_name") or "", values.get("base_domain", "estate.internal")
    if name and not name.endswith(f".{domain}"):
        yield f"keepalived_name is {name}, which the estate's authority does not certify: choose a name below {domain}"
    elif name in addresses:
        yield f"keepalived_name is {name}, which is a host's: choose another name"


def as_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """None for an invalid address, which placement_faults reports."""
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def gpu_faults(values: Mapping[str, Any]) -> Iterator[str]:
    """A driver set that does not exist or is too old for the lock's CUDA, modules signed in an HSM out of reach, and GPUs whose
    number is not declared.
    """
    if "gpu" not in values["group_names"]:
        return
    defaults = gpu_defaults()
    sets = values.get("gpu_sets") or defaults["gpu_sets"]
    chosen = values.get("gpu_set") or defaults["gpu_set"]
    names = [*(entry["name"] for entry in sets), "provided"]
    if chosen not in names:
        yield f"gpu_set is {chosen}; take one of {', '.join(names)}"
    for entry in sets:
        if entry["name"] == chosen and "cuda" in entry and (fault := mixed_set_fault(entry)):
            yield fault
    for environment in cuda_environments(values["group_names"], values):
        if fault := cuda_set_fault(cuda_lock(), environment, chosen, sets):
            yield fault
    if values.get("gpu_signing") == "hsm" and "storage" not in values["group_names"]:
        yield (
            "gpu_signing is hsm and the host is not in storage, whose role hsm reaches the HSM: add it to storage, or set"
            " gpu_signing to none"
        )
    if {"serve", "engines", "train"} & set(values["group_names"]) and not values.get("gpu_health_expect"):
        yield "gpu_health_expect is not set: write how many GPUs the host has, such as {count: 8} (docs/operate/gpu-health.md)"


def volume_faults(values: Mapping[str, Any], known: Mapping[str, Options]) -> Iterator[str]:
    """Volumes and swaps that cannot be made, and services that would start without their volume."""
    volumes, swaps = values.get("luks_volumes") or [], values.get("luks_swap") or []
    for kind, entries in (("name", volumes + swaps), ("serial", volumes + swaps), ("mount", volumes)):
        names = [entry[kind] for entry in entries]
        for twice in sorted({one for one in names if names.count(one) > 1}):
            yield f"luks_volumes and luks_swap use the {kind} {twice} more than once: each needs its own"
    for entry in volumes + swaps:
        try:
            human_to_bytes(entry["size"])
        except ValueError:
            yield f"the size of {entry['name']} is {entry['size']!r}: write a size such as 3.5T"
    defaults = {name: option.get("default") for options in known.values() for name, option in options.items()}

    def held(place: str) -> tuple[str, list[dict[str, Any]]]:
        """The folder, and volumes that it lies on."""
        folder = str(values.get(place) or defaults.get(place) or place)
        return folder, [
            volume for volume in volumes if f"{folder}/".startswith(f"{str(volume['mount']).rstrip('/')}/")
        ]

    for group, place, unit in NEEDED_UNITS:
        folder, holding = held(place)
        if group in values["group_names"] and holding and unit not in holding[-1].get("units", []):
            yield f"the volume {holding[-1]['name']} holds {folder}: add {unit} to its units, which start only with it"
    budgets: dict[str, dict[str, int]] = {}
    for group, place, size, prefix in BUDGETS:
        budget = values.get(size, defaults.get(size))
        _, holding = held(place)
        if (not group or group in values["group_names"]) and holding and budget is not None:
            try:
                budgets.setdefault(holding[-1]["name"], {})[size] = human_to_bytes(f"{budget}{prefix}")
            except ValueError:
                yield f"{size} is {budget!r}, which is not a size: write one such as {defaults.get(size)}"
    for volume in volumes:
        asked = budgets.get(volume["name"], {})
        try:
            room = human_to_bytes(volume["size"]) * FILLED
        except ValueError:  # which was told above
            continue
        if (together := sum(asked.values())) > room:
            yield (
                f"the volume {volume['name']} has {volume['size']}, and {' and '.join(asked)} come to {together >> 20} MiB:"
                f" that may be {FILLED:.0%} of it; enlarge it, or lower them (`llmkeep size` says what logs need)"
            )


def serving_faults(
    values: Mapping[str, Any],
    addresses: dict[str, str],
    by_host: Mapping[str, Mapping[str, Any]],
    groups: Mapping[str, list[str]],
) -> Iterator[str]:
    """Models that cannot be served."""
    mine, models = set(values["group_names"]), values.get("llm_serving_models")
    # Without a list, role llm_serving has a model of its own, which no other host learns.
    if "engines" in mine or ("serve" in mine and models is not None):
        wrong = model_faults(models or [], addresses)
        # Of models that are wrong by themselves, nothing more is asked.
        for fault in wrong or sharing_faults(models or [], by_host, groups, values["inventory_hostname"]):
            yield f"llm_serving_models: {fault}"
    if "vllm" in mine:
        for fault in vllm_faults(
            values.get("vllm_models") or [], str(values.get("vllm_gpu_memory") or ""), models or []
        ):
            yield f"vllm_models: {fault}"


def training_faults(values: Mapping[str, Any], groups: Mapping[str, list[str]]) -> Iterator[str]:
    """Training jobs that cannot run."""
    if "train" in values["group_names"] and "llm_training_jobs" in values:
        hosts = values.get("llm_training_hosts") or groups["train"]
        name = values["inventory_hostname"]
        bases = [*(values.get("llm_training_models") or []), *(values.get("llm_training_releases") or [])]
        for fault in job_faults(values["llm_training_jobs"], bases, name, hosts):
            yield f"llm_training_jobs: {fault}"


def preflight_faults(values: Mapping[str, Any], groups: Mapping[str, list[str]]) -> Iterator[str]:
    """Values that a role's preflight refuses, hours into a run, by the inventory alone."""
    mine = values["group_names"]
    if "slurm_node" in mine and values.get("llm_training_jobs"):
        jobs = ", ".join(job["name"] for job in values["llm_training_jobs"])
        yield (
            f"it is in slurm_node, and llm_training_jobs has {jobs}, which systemd would start beside Slurm's: submit these to"
            " Slurm (docs/operate/slurm.md), or remove the host from slurm_node"
        )
    if "prometheus" in mine and not (values.get("prometheus_webhook") or values.get("prometheus_mail")):
        yield "its alerts would reach no operator: set prometheus_webhook or prometheus_mail (docs/operate/metrics.md)"
    if "operators" in mine:
        accounts, breakglass = (
            values.get("operators_accounts") or [],
            values.get("operators_breakglass_keys") or [],
        )
        for fault in operator_faults(accounts, breakglass, bool(values.get("operators_plain_keys_allowed"))):
            yield f"operators_accounts: {fault}"
    for group, name in (("prometheus", "prometheus_hosts"), ("softhsm", "softhsm_clients")):
        unknown = set(values.get(name) or []) - set(groups["all"]) if group in mine else set()
        if unknown:
            yield f"{name} names {', '.join(sorted(unknown))}, which the inventory does not have: name hosts of it"
    authority = values.get("edge_client_ca_file")
    serving = sorted({"control", "mirror"} & {*mine})
    if "edge" in mine and values.get("edge_key_source") == "hsm" and (authority or serving):
        cause = f"edge_client_ca_file is {authority}" if authority else f"it is in {' and '.join(serving)}"
        way_out = "leave edge_client_ca_file empty" if authority else "remove it from edge"
        yield (
            f"edge_key_source is hsm and {cause}, so nginx would verify clients in the HSM, too (docs/operate/hsm.md): set"
            f" edge_key_source to file, or {way_out}"
        )


# ---------------------------------------------------------------- all of it
def values_of(variables: Mapping[str, Any], known: Mapping[str, Options]) -> dict[str, Any]:
    """A host's values of the roles' variables. A value that needs a fact is left to its role's preflight."""
    values: dict[str, Any] = {}
    roles = {name for options in known.values() for name in options}
    for name in sorted(roles | {"ansible_host", "group_names", "inventory_hostname"}):
        try:
            if name in variables:
                values[name] = variables[name]
        except AnsibleError:
            continue
    return values


def faults(
    groups: Mapping[str, list[str]],
    hostvars: Mapping[str, Mapping[str, Any]],
    known: Mapping[str, Options],
    tags: Iterable[str] = (),
    limit: str = "",
) -> list[str]:
    """All faults of an inventory, one line each, with the hosts that share it."""
    by_host = {host: values_of(hostvars[host], known) for host in groups["all"]}
    addresses = full_names(by_host)
    hosts_by_fault: dict[str, list[str]] = {}
    names = {*groups, *groups["all"], "localhost"}
    for fault in (*group_faults(groups), *tag_faults(tags, known), *limit_faults(limit, names)):
        hosts_by_fault[fault] = []
    for host, values in by_host.items():
        misfit = list(type_faults(values, known))
        problems = [*placement_faults(values, groups), *unknown_variables(hostvars[host], known), *misfit]
        if not misfit:  # the rules below read values of the right type only
            problems += volume_faults(values, known)
            problems += keepalived_faults(values, groups, addresses)
            problems += gpu_faults(values)
            problems += serving_faults(values, addresses, by_host, groups)
            problems += training_faults(values, groups)
            problems += preflight_faults(values, groups)
        for fault in problems:
            hosts_by_fault.setdefault(fault, []).append(host)
    return [f"{', '.join(hosts)}: {fault}" if hosts else fault for fault, hosts in hosts_by_fault.items()]


def full_names(by_host: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Address of each host by its full name, as certificates have it."""
    names = {}
    for host, values in by_host.items():
        name = full_name(host, str(values.get("base_domain", DOMAIN)))
        names[name] = str(values.get("ansible_host", host))
    return names
