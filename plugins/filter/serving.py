"""Filters of role llm_serving: what an inventory's models are on a host, and why they cannot be. Role vllm's are in vllm.py."""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

NAME = re.compile(r"[a-z0-9][a-z0-9.-]{0,62}")
MEMORY = re.compile(r"[1-9][0-9]*[MGT]")
LOOPBACK = {"127.0.0.1", "::1", "localhost"}
DOMAIN = "estate.internal"  # the default of base_domain
INSTANCES = range(1, 17)
PARTS = {"name", "driver", "instances", "memory"}  # of every engine of ours
LOADED = {"model", "release", "dtype", "context", "threads"}
GENERATED = LOADED | {"quantization", "temperature", "top_p", "merged"}
BATCHED = {"slots", "cache_tokens", "page_tokens", "batch_tokens", "share_prefixes"}
TAKES = {
    "echo": PARTS | {"context", "slots", "token_seconds"},
    "naive": PARTS | GENERATED | {"adapters"},
    "continuous": PARTS | GENERATED | BATCHED,
    "embed": PARTS | LOADED,
    "remote": {"name", "driver", "remote"},
}


def set_of(model: dict[str, Any]) -> dict[str, Any]:
    """What an inventory says of a model; a key without a value says nothing. A release's folder has its name."""
    options = {key: value for key, value in model.items() if value is not None}
    return {"model": options["release"], **options} if "release" in options else options


def engine_names(model: dict[str, Any]) -> list[str]:
    """The instances of the unit llm-engine@ that run a model. The first has its name, so it stays when more come."""
    if model.get("driver") == "remote":
        return []
    return [model["name"], *(f"{model['name']}-{one}" for one in range(2, model.get("instances", 1) + 1))]


def engines(models: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each process that runs a model here, by the name of its unit's instance."""
    return [{"name": name, "model": model} for model in map(set_of, models) for name in engine_names(model)]


def answering(models: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What clients may ask for, by name: each model, then its adapters, which its engines answer for."""
    return [
        {"name": name, "model": model}
        for model in map(set_of, models)
        for name in (model["name"], *model.get("adapters", {}))
    ]


def offered_engines(models: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Engines of a host that gateways of other hosts may reach: name, model, socket, and the group that may open it.

    Servers of OpenAI's API count where they listen on UNIX sockets.
    """
    offered = [
        {**engine, "socket": f"/run/llm-engine/{engine['name']}.sock", "group": "llm-engine"}
        for engine in engines(models)
    ]
    for model in map(set_of, models):
        remote = remote_settings(model)
        for number, socket in enumerate(remote.get("socket") or [], 1):
            name = model["name"] if number == 1 else f"{model['name']}-{number}"
            offered.append(
                {"name": name, "model": model, "socket": socket, "group": remote.get("group", "root")}
            )
    return offered


def canary_engines(models: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same engines as module serving_canary takes them."""
    asked = []
    for engine in offered_engines(models):
        remote = remote_settings(engine["model"])
        asked.append(
            {
                "name": engine["model"]["name"],
                "embeds": engine["model"].get("driver") == "embed" or bool(remote.get("dimensions")),
                "socket": engine["socket"],
                "http": bool(remote),
                "credential": remote.get("key_credential", ""),
            }
        )
    return asked


def gateway_models(
    models: list[dict[str, Any]],
    hostvars: Mapping[str, Mapping[str, Any]],
    groups: Mapping[str, list[str]],
    host: str,
    port: int,
) -> list[dict[str, Any]]:
    """The models that the gateways of `host` answer for. Each has its name; `sockets` of our engines on this host; `remote`, the
    settings of servers of OpenAI's API; and `offered`: engines that other hosts offer, as in a gateway's configuration.

    `models`: the host's own, which come first. `port`: the default of engine_access_port.
    """
    answers = {
        each["name"]: {
            "name": each["name"],
            "sockets": [f"/run/llm-engine/{name}.sock" for name in engine_names(each["model"])],
            "remote": remote_settings(each["model"]),
            "offered": [],
        }
        for each in answering(models)
    }
    for other in sorted(set(groups.get("engines", [])) - {host}):
        there = hostvars[other]
        theirs = there.get("llm_serving_models") or []
        name = full_name(other, str(there.get("base_domain", DOMAIN)))
        for each in answering(theirs):
            # Sockets, URLs and the group are that host's own.
            remote = {
                key: value
                for key, value in remote_settings(each["model"]).items()
                if key not in ("socket", "url", "group")
            }
            answer = answers.setdefault(
                each["name"], {"name": each["name"], "sockets": [], "remote": remote, "offered": []}
            )
            answer["offered"] += [
                {
                    "host": name,
                    "port": int(there.get("engine_access_port", port)),
                    "name": engine["name"],
                    "socket": engine["socket"],
                    "gpus": other in groups.get("gpu", []),
                }
                for engine in offered_engines(theirs)
                if engine["model"]["name"] == each["model"]["name"]
            ]
    return [
        answer
        for answer in answers.values()
        if answer["sockets"] or answer["offered"] or {"socket", "url"} & set(answer["remote"])
    ]


def sharing_faults(
    models: list[dict[str, Any]],
    hostvars: Mapping[str, Mapping[str, Any]],
    groups: Mapping[str, list[str]],
    host: str,
) -> list[str]:
    """Why `host`, with these models, cannot share them with other hosts, or has none; a sentence for each fault."""
    faults = []
    if host in groups.get("engines", []) and not offered_engines(models):
        faults.append(
            "it is in engines, but has no engine to offer: name a model that runs here, or remove it from engines"
        )
    if host not in groups.get("serve", []):
        return faults
    if not gateway_models(models, hostvars, groups, host, 0):
        faults.append(
            "its gateways have no model: name one, or put a host that has models into the group engines"
        )
    kinds = {each["name"]: bool(remote_settings(each["model"])) for each in answering(models)}
    for other in sorted(set(groups.get("engines", [])) - {host}):
        for each in answering(hostvars[other].get("llm_serving_models") or []):
            remote = bool(remote_settings(each["model"]))
            if kinds.setdefault(each["name"], remote) != remote:
                faults.append(
                    f"{each['name']} is a model of driver remote on one host and of another driver on {other}, so gateways"
                    " would answer in two ways: give both the same driver, or one another name"
                )
    return faults


def remote_settings(model: dict[str, Any]) -> dict[str, Any]:
    """What an inventory says of a model's servers of OpenAI's API; nothing of other models."""
    return set_of(model.get("remote") or {})


def offered_addresses(answers: list[dict[str, Any]], hosts: dict[str, str]) -> list[dict[str, Any]]:
    """Address and port of each host that offers engines to these gateways. `hosts`: addresses by full name."""
    pairs = {(hosts[each["host"]], each["port"]) for answer in answers for each in answer["offered"]}
    return [{"address": address, "port": port} for address, port in sorted(pairs)]


def full_name(host: str, domain: str) -> str:
    """A host's name as its certificate has it."""
    return f"{host.removesuffix(f'.{domain}')}.{domain}"


def model_folders(models: list[dict[str, Any]]) -> list[str]:
    """Folders that these models are made of, each once: weights and adapters of the bundle, and releases."""
    return sorted(
        {
            folder
            for model in map(set_of, models)
            for folder in (model.get("model"), model.get("merged"), *model.get("adapters", {}).values())
            if folder
        }
    )


def release_names(models: list[dict[str, Any]]) -> list[str]:
    """Releases of the estate's own that these models are, each once."""
    return sorted({model["release"] for model in map(set_of, models) if "release" in model})


def mirrored_folders(hostvars: Mapping[str, Mapping[str, Any]], groups: Mapping[str, list[str]]) -> list[str]:
    """Folders of the mirror that an inventory's models come from: of its bundle, and below releases/ of the estate's own."""
    folders: set[str] = set()
    for group, variable in (
        ("serve", "llm_serving_models"),
        ("engines", "llm_serving_models"),
        ("vllm", "vllm_models"),
    ):
        for host in groups.get(group, []):
            models = hostvars[host].get(variable) or []
            released = release_names(models)
            folders |= {f"releases/{name}" for name in released}
            folders |= {f"models/{name}" for name in model_folders(models) if name not in released}
    for host in groups.get("train", []):
        folders |= {f"models/{name}" for name in hostvars[host].get("llm_training_models") or []}
        folders |= {f"releases/{name}" for name in hostvars[host].get("llm_training_releases") or []}
    return sorted(folders)


def memory_max(model: dict[str, Any]) -> str:
    """The most memory of a model's engine, as systemd shows it: in bytes, or infinity."""
    if not model.get("memory"):
        return "infinity"
    return str(int(model["memory"][:-1]) << {"M": 20, "G": 30, "T": 40}[model["memory"][-1]])


def upstreams(models: list[dict[str, Any]], hosts: dict[str, str]) -> list[dict[str, Any]]:
    """Address and port of each server behind TLS. `hosts` are the estate's full names with their addresses: no host asks DNS."""
    by_url = {}
    for url in (url for model in models for url in (model.get("remote") or {}).get("url") or []):
        parts = urlsplit(url)
        if parts.scheme == "https":
            by_url[url] = {
                "address": hosts.get(parts.hostname or "", parts.hostname),
                "port": parts.port or 443,
            }
    return [by_url[url] for url in sorted(by_url)]


def model_faults(models: list[dict[str, Any]], hosts: dict[str, str]) -> list[str]:
    """Why these models cannot be served, a sentence for each; `hosts` as above."""
    problems = []
    names = [str(model.get("name")) for model in models]
    names += [str(name) for model in models for name in model.get("adapters") or {}]
    for name, times in Counter(names).items():
        if times > 1:
            problems.append(
                f"{times} models or adapters are called {name}: clients ask by name, so give each its own; "
                "several engines of one model are its `instances`"
            )
    for model in map(set_of, models):
        problems += [f"{model.get('name')}: {fault}" for fault in faults(model, hosts)]
    problems += folder_faults(models)
    units = Counter(
        name
        for model in {str(model.get("name")): set_of(model) for model in models}.values()
        if model.get("instances", 1) in INSTANCES
        for name in engine_names(model)
    )
    problems += [
        f"two engines would be llm-engine@{name}: a model has the name of another one's instance; rename it"
        for name, times in units.items()
        if times > 1
    ]
    return problems


def faults(model: dict[str, Any], hosts: dict[str, str]) -> list[str]:
    """What is wrong with one model."""
    problems = []
    driver = model.get("driver", "")
    if not NAME.fullmatch(str(model.get("name"))):
        problems.append(
            "a name has small letters, digits, dots and dashes, at most 63, and starts with no dash or dot"
        )
    if driver not in TAKES:
        return [*problems, f"its driver is {driver!r}: take one of {', '.join(TAKES)}"]
    problems += adapter_faults(model)
    if driver == "continuous":
        model = {
            key: value for key, value in model.items() if key != "adapters"
        }  # told above, with the way out
    if strange := sorted(set(model) - TAKES[driver]):
        problems.append(
            f"driver {driver} takes no {', '.join(strange)}: leave it out, or take another driver"
        )
    if "model" in TAKES[driver]:
        problems += weights_faults(model)
    if model.get("instances", 1) not in INSTANCES:
        problems.append(f"instances is {model['instances']}: take {INSTANCES[0]} to {INSTANCES[-1]}")
    if "memory" in model and not MEMORY.fullmatch(str(model["memory"])):
        problems.append(f"memory is {model['memory']}: write a size such as 24G")
    for key in ("context", "threads", *sorted(BATCHED - {"share_prefixes"})):
        if key in model and int(model[key]) < 1:
            problems.append(f"{key} is {model[key]}: take 1 or more")
    if driver == "continuous":
        problems += batch_faults(model)
    if driver == "remote":
        problems += remote_faults(set_of(model.get("remote") or {}), hosts)
    return problems


def weights_faults(model: dict[str, Any]) -> list[str]:
    """Weights that are nowhere, or in two places."""
    if "model" not in model:
        return ["it needs `model`, the name of its folder under models/ in the bundle, or `release`"]
    problems = []
    if model.get("release", model["model"]) != model["model"]:
        problems.append(
            f"it is both the model {model['model']} and the release {model['release']}: name one of them"
        )
    if "release" in model and not NAME.fullmatch(str(model["release"])):
        problems.append(f"its release is {model['release']!r}: use a name that `llmkeep release list` prints")
    return problems


def folder_faults(models: list[dict[str, Any]]) -> list[str]:
    """Folders that would be a release's and the bundle's."""
    released = release_names(models)
    return [
        f"{folder} is a release and a folder of the bundle at once: publish the release under another name"
        for folder in model_folders([model for model in map(set_of, models) if "release" not in model])
        if folder in released
    ]


def adapter_faults(model: dict[str, Any]) -> list[str]:
    """Adapters that would not be applied, or could not be asked for."""
    problems = []
    adapters = model.get("adapters", {})
    if adapters and model["driver"] == "continuous":
        problems.append(
            f"a batch has the same weights for all, so {', '.join(adapters)} would not be applied: "
            "give each a model of its own with `merged`, or take driver naive"
        )
    problems += [
        f"an adapter is called {name!r}: a name has small letters, digits, dots and dashes, at most 63"
        for name in adapters
        if not NAME.fullmatch(str(name))
    ]
    problems += [
        f"its adapter {name} names no folder under models/ in the bundle"
        for name in adapters
        if not adapters[name]
    ]
    if model.get("merged") and model.get("quantization", "none") != "none":
        problems.append(
            f"`merged` and quantization {model['quantization']} do not go together: "
            "serve what `llm-serve merge` writes, quantized"
        )
    return problems


def batch_faults(model: dict[str, Any]) -> list[str]:
    """A cache and a step of continuous batching that are too small, or left to defaults that know no host."""
    problems = []
    lacking = sorted({"context", "slots", "cache_tokens", "batch_tokens"} - set(model))
    if lacking:
        return [
            f"driver continuous needs {', '.join(lacking)}: its cache takes memory from the start, so say how much"
        ]
    if int(model["cache_tokens"]) < int(model["context"]):
        problems.append(
            f"cache_tokens is {model['cache_tokens']} and context {model['context']}: one request has to fit, so raise the first"
        )
    if int(model["batch_tokens"]) < int(model["slots"]):
        problems.append(
            f"batch_tokens is {model['batch_tokens']} and slots {model['slots']}: each needs a token a step, so raise the first"
        )
    return problems


def remote_faults(remote: dict[str, Any], hosts: dict[str, str]) -> list[str]:
    """Servers that cannot be reached, or only unencrypted."""
    problems = []
    if not remote.get("socket") and not remote.get("url"):
        problems.append(
            "driver remote needs `remote` with `socket`, the path of a UNIX socket, or `url`, https://HOST:PORT"
        )
    problems += [
        f"the socket {path} is not an absolute path" for path in remote.get("socket") or [] if path[:1] != "/"
    ]
    for url in remote.get("url") or []:
        parts = urlsplit(url)
        if parts.scheme == "http" and parts.hostname in LOOPBACK:
            continue
        if parts.scheme != "https":
            problems.append(
                f"{url} would carry prompts in clear: take https, which is mutual TLS 1.3 here, a socket, or 127.0.0.1"
            )
        elif parts.hostname not in hosts and not is_address(parts.hostname or ""):
            problems.append(
                f"{url} names no host of this inventory, and hosts do not use DNS: use one of {', '.join(hosts)}, or "
                "an address"
            )
    return problems


def is_address(host: str) -> bool:
    """Whether it needs no name service."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


class FilterModule:
    """What Ansible asks for."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        return {
            "answering": answering,
            "canary_engines": canary_engines,
            "engines": engines,
            "gateway_models": gateway_models,
            "memory_max": memory_max,
            "mirrored_folders": mirrored_folders,
            "model_faults": model_faults,
            "model_folders": model_folders,
            "offered_addresses": offered_addresses,
            "offered_engines": offered_engines,
            "release_names": release_names,
            "sharing_faults": sharing_faults,
            "upstreams": upstreams,
        }
