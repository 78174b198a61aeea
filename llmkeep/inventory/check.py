"""`llmkeep inventory check`: faults of an inventory, found without contacting a host.

It reads the inventory as a run would and prints one line per fault, with the hosts that share it and what to do.
Without faults, it prints the rate class of each role of the policy in pages of text. It warns of classes smaller than
one full context of a model that their holders may use, and of aliases of the policy that lead to no model or have the
name of one. With --graph it draws the estate's hosts, and the ports that they open to each other, as an SVG.

Exit codes: 0 no fault, possibly warnings; 1 faults, or not an inventory in YAML.

"""

import argparse
import json
from collections.abc import Collection
from itertools import chain
from pathlib import Path
from typing import Any

from llmkeep import source_tree
from llmkeep.inventory import flows, graph
from llmkeep.places import Places
from llmkeep.playbooks import inventory_path, listed, play
from llmkeep.policy import source
from llmkeep.policy.bundle import source_folder

PAGE_WORDS = 500  # of single-spaced text
PAGE_TOKENS = (
    PAGE_WORDS * 4 / 3
)  # English prose has 1.2 to 1.3 tokens a word (the GPL by SmolLM2's tokenizer), and some names
MOST_CONTEXT = 2**24  # as in llmserve.settings


def faults(inventories: list[Path], root: Path) -> list[str]:
    """Faults of the inventories together, one line each; in Ansible's words where it cannot read them."""
    code, results = play(root / "playbooks/check-inventory.yml", inventories, [], quiet=True)
    return results.faults or (results.failures or results.complaints) * code


def contexts(hostvars: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The largest context of each model, in tokens, by the name that clients ask for; None where the inventory has
    none.
    """
    largest: dict[str, Any] = {}
    for values in hostvars.values():
        declared = (values.get(name) for name in ("llm_serving_models", "vllm_models"))
        for model in chain.from_iterable(each for each in declared if isinstance(each, list)):
            context = model.get(
                "max_model_len", model.get("context", (model.get("remote") or {}).get("context"))
            )
            for name in (model["name"], *(model.get("adapters") or {})):
                if isinstance(context, int):  # else it is a template
                    largest[name] = max(context, largest.get(name) or context)
                largest.setdefault(name, None)
    return largest


def rate_classes(policy: dict[str, Any], models: dict[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """The rate classes of roles that generate, each with its pages, and warnings. `policy`: data by folder, as
    `llm/rates`. `models`: contexts in tokens.
    """
    warnings = [
        f"the context of {name} is {context} tokens: give 1 to {MOST_CONTEXT}"
        for name, context in models.items()
        if context is not None and not 0 < context <= MOST_CONTEXT
    ]
    holders: dict[str, dict[str, Any]] = {}
    for name, role in policy["llm/roles"].items():
        if role.get("max_tokens"):
            holders.setdefault(str(role.get("rate_class")), {})[name] = role
    classes = []
    for name, roles in sorted(holders.items()):
        rate = policy["llm/rates"].get(name) or {}
        minute, day = (rate.get(f"tokens_per_{period}") for period in ("minute", "day"))
        if not (isinstance(minute, int) and isinstance(day, int) and min(minute, day) > 0):
            warnings.append(
                f"the rate class {name} has {minute} tokens a minute and {day} a day: write numbers above 0 in "
                "llm/rates/data.yaml"
            )
            continue
        pages = round(minute / PAGE_TOKENS), round(day / PAGE_TOKENS)
        classes.append(
            {"class": name, "roles": [*roles], "tokens_per_minute": minute, "tokens_per_day": day}
            | dict(zip(("pages_per_minute", "pages_per_day"), pages, strict=True))
        )
        for model, context in models.items():
            asking = [role for role, row in roles.items() if {"*", model} & {*row["models"]}]
            if asking and min(minute, day) < (context or 0) <= MOST_CONTEXT:
                warnings.append(
                    f"a prompt that fills the {context} tokens of {model} is refused for {', '.join(asking)}: the "
                    "rate class "
                    f"{name} has {minute} tokens a minute and {day} a day; raise them in llm/rates/data.yaml, or lower "
                    "the model's context"
                )
    return classes, warnings


def alias_warnings(policy: dict[str, Any], models: Collection[str]) -> list[str]:
    """The aliases that no host answers, or that have the name of one of `models`, which the hosts serve."""
    aliases = policy.get("llm/aliases")
    leads = aliases.items() if isinstance(aliases, dict) else ()
    known = {*models, *(each["model"] for each in policy.get("llm/experiments", {}).values())}
    warnings = []
    for name, model in [(name, alias.get("model")) for name, alias in leads if isinstance(alias, dict)]:
        if model not in known:
            warnings.append(
                f"the alias {name} leads to {model}, which no host serves, so requests for it are refused: name one of "
                f"{', '.join(sorted(known))} in llm/aliases/data.yaml"
            )
        if name in models:
            warnings.append(
                f"the alias {name} has the name of a model that is served, so it has no effect: take out one of the two"
            )
    return warnings


def check(arguments: argparse.Namespace) -> int:
    """Print faults, or rate classes and warnings; draw the estate if there is no fault."""
    root = source_tree.located()
    inventories = [inventory_path(place, root) for place in arguments.inventory]
    outcomes = faults(inventories, root)
    classes: list[dict[str, Any]] = []
    warnings: list[str] = []
    if not outcomes:
        listing = listed(inventories, root)
        models = contexts(listing["_meta"]["hostvars"])
        policy = source.read(source_folder(Places())).data
        classes, warnings = rate_classes(policy, models)
        warnings += alias_warnings(policy, models)
        if arguments.graph:
            title = ", ".join(arguments.inventory)
            drawing = graph.svg(flows.estate(listing), flows.features(root), f"Estate of {title}")
            arguments.graph.write_text(drawing)
    if arguments.json:
        report = {"ok": not outcomes, "faults": outcomes, "rate_classes": classes, "warnings": warnings}
        print(json.dumps(report, indent=2))
    elif outcomes:
        print("\n".join(f"- {fault}" for fault in outcomes))
    else:
        print(f"{', '.join(map(str, inventories))}: no fault found; no host was contacted")
        for row in classes:
            print(
                f"rate class {row['class']} ({', '.join(row['roles'])}): {row['tokens_per_minute']:,} tokens a minute, about "
                f"{row['pages_per_minute']:,} pages of {PAGE_WORDS} English words, prompts and answers together; "
                f"{row['pages_per_day']:,} pages a day"
            )
        print("".join(f"warning: {warning}\n" for warning in warnings), end="")
    return int(bool(outcomes))
