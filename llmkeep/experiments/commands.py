"""`llmkeep experiment`: compare two models by users' ratings.

`check`: whether an experiment has enough power. `start`, `step`, `stop`, `promote`: its entry in the policy, by which
gateways assign users to its arms. `show`: results so far.
"""

import argparse
import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path

from llmkeep import durable, source_tree
from llmkeep.errors import LlmkeepError
from llmkeep.experiments import ladder, outcomes
from llmkeep.experiments.definition import ALPHA, POWER, UNITS, Experiment, read
from llmkeep.experiments.ladder import Evidence
from llmkeep.experiments.outcomes import Verdict
from llmkeep.places import Places

STOPPED = 3
CHECK = """Reads experiments and prints the power of each rung of their ladders. Exit codes: 0 they can run; 1 one cannot, "
    "or two of them would ask the same tenants about the same model; the message shows the calculation."""
SHOW = """Compares both arms on each rung, by intervals that hold for any number of looks. Exit codes: 0 printed; 1 refused,
such as where a serving host of -i does not answer; 3 a rung has no verdict, since its units were not assigned as declared."""


def require_apart(experiments: Iterable[Experiment]) -> None:
    """Raises LlmkeepError if two have the same name, or ask the same tenants about the same model."""
    for one, other in combinations(experiments, 2):
        if one.name == other.name:
            raise LlmkeepError(f"two files are the experiment {one.name!r}: give each its own name")
        both = sorted(set(one.tenants) & set(other.tenants))
        if one.model == other.model and both:
            raise LlmkeepError(
                f"{one.name} and {other.name} both ask {', '.join(both)} about {one.model!r}: each would mistake the "
                "other's effect for its own. End one first, or separate the tenants"
            )


def _check(arguments: argparse.Namespace) -> int:
    experiments = [read(path) for path in arguments.files]
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
                    f"  no rung finds {metric.difference:g} of {metric.name}, the smallest that matters: give it more days, "
                    "or expect no verdict"
                )
    return 0


@contextmanager
def _source(arguments: argparse.Namespace) -> Iterator[Path]:
    """The policy's editable source, locked against other `llmkeep experiment` runs."""
    folder: Path = arguments.source or arguments.places.policy_source
    if not folder.is_dir():
        raise LlmkeepError(
            f"{folder} does not exist: create the estate's own source with `cp -r {source_tree.located()}/policy "
            f"{folder}`, or give "
            "--source"
        )
    with durable.alone(folder.resolve()):
        yield folder


def _start(arguments: argparse.Namespace) -> int:
    with _source(arguments) as source:
        print(ladder.start(source, read(arguments.file), arguments.reason, arguments.shadow))
    return 0


def _outcomes_of(arguments: argparse.Namespace, experiment: Experiment, source: Path) -> Evidence:
    """Outcomes by rung from all hosts, from a file, or none; and the llm_serving_models of all hosts."""
    if arguments.inventory:
        from llmkeep.experiments import hosts  # and with it Ansible: not for the rest

        return hosts.collect(arguments, experiment, ladder.run_of(source, experiment))
    return Evidence(outcomes.read(arguments.outcomes, experiment) if arguments.outcomes else None)


def _step(arguments: argparse.Namespace) -> int:
    experiment = read(arguments.file)
    with _source(arguments) as source:
        evidence = _outcomes_of(arguments, experiment, source)
        print(ladder.step(source, experiment, evidence.by_rung, arguments.reason, arguments.despite))
    return 0


def _promote(arguments: argparse.Namespace) -> int:
    experiment = read(arguments.file)
    with _source(arguments) as source:
        evidence = _outcomes_of(arguments, experiment, source)
        print(ladder.promote(source, experiment, evidence, arguments.reason, arguments.despite))
    return 0


def _stop(arguments: argparse.Namespace) -> int:
    with _source(arguments) as source:
        print(ladder.stop(source, arguments.name, arguments.reason, arguments.remove))
    return 0


def _show(arguments: argparse.Namespace) -> int:
    experiment = read(arguments.file)
    if arguments.publish and not arguments.inventory:
        raise LlmkeepError("--publish needs the outcomes of all hosts: give -i instead of --outcomes")
    with _source(arguments) if arguments.inventory else nullcontext(Path()) as source:
        by_rung = _outcomes_of(arguments, experiment, source).by_rung or {}
    verdicts = [outcomes.verdict(experiment, percent, by_rung[percent]) for percent in sorted(by_rung)]
    text = _as_json(verdicts)
    if arguments.json:
        print(text)
    else:
        print("\n".join(outcomes.lines(verdicts)) or f"{experiment.name} has no outcome in this run")
    if arguments.publish:
        from llmkeep.experiments import hosts  # as above

        if code := hosts.publish(arguments, arguments.places.verdicts / f"{experiment.name}.json", text):
            return code
    return STOPPED if any(rung.stopped for rung in verdicts) else 0


def _as_json(verdicts: list[Verdict]) -> str:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    rows = [{"time": now} | asdict(rung) for rung in verdicts]
    for rung in rows:
        for metric in rung["metrics"]:
            metric["interval"] = [None if math.isinf(end) else end for end in metric["interval"]]
            for arm in ("control", "candidate"):
                if math.isinf(metric[arm]["variance"]):
                    metric[arm]["variance"] = None
    return json.dumps(rows, indent=2)


def _outcomes(parser: argparse.ArgumentParser, required: bool) -> None:
    """Of all serving hosts, whose collection is a recorded run, or of a file."""
    either = parser.add_mutually_exclusive_group(required=required)
    either.add_argument(
        "-i",
        "--inventory",
        action="append",
        help="inventory: collect outcomes from all serving hosts; may be repeated",
    )
    either.add_argument(
        "--outcomes",
        type=Path,
        metavar="FILE",
        help="file with outcomes of all hosts as JSON lines (docs/use/experiments.md)",
    )
    parser.add_argument(
        "--unrecorded",
        metavar="REASON",
        help="collect even if the audit record cannot be written; REASON goes to the journal",
    )
    parser.set_defaults(
        limit=None, tags=None, skip_tags=None, extra_vars=[], check=False, diff=False, ansible=[]
    )


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """`llmkeep experiment`."""
    verbs = subparsers.add_parser(
        "experiment", help="compare a new model with the present one by users' ratings"
    ).add_subparsers(required=True, metavar="VERB")
    check = verbs.add_parser("check", help="compute the power of experiments", description=CHECK)
    check.add_argument("files", nargs="+", type=Path, metavar="FILE", help="experiments/*.yml")
    check.set_defaults(run=_check)
    acts = argparse.ArgumentParser(add_help=False)
    acts.add_argument("--source", type=Path, help="policy's source (default: /etc/llmkeep/policy/source)")
    acts.set_defaults(places=Places())
    of_file = argparse.ArgumentParser(add_help=False)
    of_file.add_argument("file", type=Path, metavar="FILE", help="the experiment")
    why = argparse.ArgumentParser(add_help=False)
    why.add_argument("--reason", required=True, help="for the readers of the record")
    judged = argparse.ArgumentParser(add_help=False)
    _outcomes(judged, required=False)
    either = judged.add_mutually_exclusive_group(required=True)
    either.add_argument("--reason", help="for the readers of the record")
    either.add_argument("--despite", metavar="REASON", help="override the outcomes; REASON is put on record")
    for name, run, parents, text in (
        ("start", _start, [of_file, why], "add an experiment to the policy, at the first step of its ladder"),
        ("step", _step, [of_file, judged], "move an experiment to the next step, if its outcomes permit"),
        ("promote", _promote, [of_file, judged], "give the candidate to all units, if it is better"),
        ("stop", _stop, [why], "give the control to all units"),
    ):
        verb = verbs.add_parser(name, parents=[acts, *parents], help=text, description=ladder.__doc__)
        verb.set_defaults(run=run)
        if name == "start":
            verb.add_argument(
                "--shadow",
                type=int,
                default=0,
                metavar="PERCENT",
                help="before the first step: percent of the control's requests to copy to the candidate, whose answers no "
                "client gets",
            )
    verb.add_argument("name", help="name of the experiment in the policy")
    verb.add_argument("--remove", action="store_true", help="also remove its entry from the policy")
    show = verbs.add_parser(
        "show", parents=[acts, of_file], help="print the results so far", description=SHOW
    )
    _outcomes(show, required=True)
    show.add_argument("--json", action="store_true", help="print JSON and nothing else")
    show.add_argument("--publish", action="store_true", help="also publish it on the pages of product owners")
    show.set_defaults(run=_show)
