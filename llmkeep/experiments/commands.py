"""`llmkeep experiment check`: whether an experiment can find what it asks. `policy`: its entry in policy, by which gateways
assign users to its arms. `show`: what came out so far.
"""

import argparse
import json
import math
import re
import secrets
import sys
from collections.abc import Iterable
from dataclasses import asdict
from itertools import combinations
from pathlib import Path

import yaml

from llmkeep.errors import LlmkeepError
from llmkeep.experiments import outcomes
from llmkeep.experiments.definition import ALPHA, POWER, UNITS, Experiment, read

STOPPED = 3
ASSIGNED_BY = ("subject", "request")  # units that a gateway knows
SALT = re.compile("[A-Za-z0-9]{16,64}")
CHECK = """Reads experiments and says what each rung of their ladders will find. Exit codes: 0 they can run; 1 one cannot, or two
of them would ask the same tenants about the same model; the message has the arithmetic."""
POLICY = """Prints the entry of an experiment for llm/experiments/data.yaml of the policy. Exit codes: 0 printed; 1 refused."""
SHOW = """Compares both arms on each rung, by intervals that hold however often they are looked at. Exit codes: 0 told; 1 refused;
3 there is no verdict for a rung, since its units were not assigned as declared."""


def require_apart(experiments: Iterable[Experiment]) -> None:
    """Raises LlmkeepError where two have one name, or ask the same tenants about the same model."""
    for one, other in combinations(experiments, 2):
        if one.name == other.name:
            raise LlmkeepError(f"two files are the experiment {one.name!r}: give each a name of its own")
        both = sorted(set(one.tenants) & set(other.tenants))
        if one.model == other.model and both:
            raise LlmkeepError(
                f"{one.name} and {other.name} both ask {', '.join(both)} about {one.model!r}: each would see the other's "
                "difference as its own. End one first, or part the tenants"
            )


def _check(given: argparse.Namespace) -> int:
    experiments = [read(path) for path in given.files]
    require_apart(experiments)
    for each in experiments:
        print(
            f"{each.name}: {each.model} is {each.control}, and for some {each.candidate}; a step each {each.days} days"
        )
        for percent in each.compared:
            rung = each.rung(percent)
            print(
                f"  {percent:3} %: candidate {rung.candidate}, control {rung.control} {UNITS[each.unit]} that rate; finds a "
                f"difference of {rung.finds:.3f} with {POWER:.0%} power, at {ALPHA:.0%} false verdicts of the whole experiment"
            )
        for metric in each.metrics:
            if all(each.rung(percent).finds > metric.difference for percent in each.compared):
                print(
                    f"  no rung finds {metric.difference:g} of {metric.name}, which was said to matter: give it more days, or "
                    "expect no verdict"
                )
    return 0


def _policy(given: argparse.Namespace) -> int:
    experiment = read(given.file)
    if experiment.unit not in ASSIGNED_BY:
        raise LlmkeepError(
            f"unit of {experiment.name} is {experiment.unit!r}, which no request names: take {' or '.join(ASSIGNED_BY)}"
        )
    if given.percent not in (0, *experiment.ladder):
        raise LlmkeepError(
            f"--percent is {given.percent}: {experiment.name} has the steps {', '.join(map(str, experiment.ladder))}, and 0"
        )
    if given.salt is not None and not SALT.fullmatch(given.salt):
        raise LlmkeepError(
            f"--salt is {given.salt!r}: give 16 to 64 letters and digits, those that policy has"
        )
    if given.salt is None:
        print("a new salt assigns all units anew: at the next step give this one by --salt", file=sys.stderr)
    entry = {name: getattr(experiment, name) for name in ("model", "control", "candidate", "unit")}
    entry |= {"tenants": list(experiment.tenants), "percent": given.percent}
    entry["salt"] = given.salt or secrets.token_hex(16)
    print(yaml.safe_dump({experiment.name: entry}, sort_keys=False), end="")
    return 0


def _show(given: argparse.Namespace) -> int:
    experiment = read(given.file)
    seen = outcomes.read(given.outcomes, experiment)
    found = [outcomes.verdict(experiment, percent, seen[percent]) for percent in sorted(seen)]
    if given.json:
        told = [asdict(rung) for rung in found]
        for rung in told:
            for metric in rung["metrics"]:
                metric["interval"] = [None if math.isinf(end) else end for end in metric["interval"]]
                for arm in ("control", "candidate"):
                    if math.isinf(metric[arm]["variance"]):
                        metric[arm]["variance"] = None
        print(json.dumps(told, indent=2))
    else:
        print("\n".join(outcomes.lines(found)) or f"{given.outcomes} has no outcome yet")
    return STOPPED if any(rung.stopped for rung in found) else 0


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """`llmkeep experiment`."""
    verbs = subparsers.add_parser(
        "experiment", help="whether a new model is better: what an experiment can find, and what it found"
    ).add_subparsers(required=True, metavar="VERB")
    check = verbs.add_parser("check", help="whether experiments can find what they ask", description=CHECK)
    check.add_argument("files", nargs="+", type=Path, metavar="FILE", help="experiments/*.yml")
    check.set_defaults(run=_check)
    policy = verbs.add_parser(
        "policy", help="its entry in policy, by which gateways assign users", description=POLICY
    )
    policy.add_argument("file", type=Path, metavar="FILE", help="the experiment")
    policy.add_argument(
        "--percent", type=int, required=True, help="a step of its ladder; 0: the control alone"
    )
    policy.add_argument("--salt", help="what policy has already (default: a new one)")
    policy.set_defaults(run=_policy)
    show = verbs.add_parser("show", help="what came out so far", description=SHOW)
    show.add_argument("file", type=Path, metavar="FILE", help="the experiment")
    show.add_argument(
        "--outcomes", type=Path, required=True, metavar="FILE", help="JSON lines (docs/experiments.md)"
    )
    show.add_argument("--json", action="store_true", help="print JSON and nothing else")
    show.set_defaults(run=_show)
