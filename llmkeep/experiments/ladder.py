"""`llmkeep experiment start | step | stop | promote`: change an experiment's entry in the policy's source.

Each change puts operator, change and reason on the control node's audit record, and into the entry, which hosts get
signed. Nothing reaches a host before `llmkeep policy build` and `llmkeep site`.
"""

import math
import secrets
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from llmcore.experiments import identifier
from llmkeep import durable, source_tree
from llmkeep.errors import LlmkeepError
from llmkeep.experiments import outcomes
from llmkeep.experiments.definition import UNITS, Experiment, Guardrails
from llmkeep.experiments.outcomes import Seen
from llmkeep.policy import source as policy_source
from llmkeep.policy.source import Source
from llmkeep.record import runs

ASSIGNED_BY = ("subject", "request")  # units that a gateway knows
FIXED = ("model", "control", "candidate", "unit", "minimum")  # another one is another experiment
DECIDED = (*FIXED, "tenants", "metrics", "guardrails")  # before the first result is seen
FOLDER = "llm/experiments"
NEXT = "next: llmkeep policy build, then llmkeep site"

type Entry = dict[str, Any]
type Model = dict[str, Any]  # an entry of llm_serving_models


@dataclass(frozen=True)
class Evidence:
    """Outcomes by rung, if requested; and the llm_serving_models of all serving hosts, if they answered."""

    by_rung: dict[int, Seen] | None
    models: Mapping[str, list[Model]] = field(default_factory=dict)


def rails(of: Guardrails) -> Entry:
    """Guardrails in the policy's format."""
    return asdict(of) | {"refusals": list(of.refusals)}


def entry(experiment: Experiment, percent: int, salt: str, shadow: int = 0) -> Entry:
    """The policy's entry of an experiment, without the operator who changed it."""
    if experiment.unit not in ASSIGNED_BY:
        raise LlmkeepError(
            f"unit of {experiment.name} is {experiment.unit!r}, which no request names: use one of "
            f"{' or '.join(ASSIGNED_BY)}"
        )
    return {
        **{name: getattr(experiment, name) for name in FIXED},
        "tenants": list(experiment.tenants),
        "percent": percent,
        "salt": salt,
        "shadow": shadow,
        "metrics": {metric.name: metric.better for metric in experiment.metrics},
        "guardrails": rails(experiment.guardrails),
    }


def entries(source: Source) -> dict[str, Entry]:
    """The experiments of a policy's source."""
    return dict(source.data.get(FOLDER) or {})


def running(source: Source, experiment: Experiment) -> Entry:
    """The entry of a running experiment; LlmkeepError if it does not run, or is another experiment than the file's."""
    current = entries(source).get(experiment.name)
    if current is None or not current["percent"]:
        raise LlmkeepError(
            f"{experiment.name} is not running in this policy: start it with `llmkeep experiment start`"
        )
    return same(experiment, current)


def same(experiment: Experiment, current: Entry) -> Entry:
    """The entry; LlmkeepError if it is another experiment than the file's."""
    expected = entry(experiment, current["percent"], current["salt"])
    if other := [name for name in DECIDED if expected[name] != current.get(name)]:
        raise LlmkeepError(
            f"{', '.join(other)} of {experiment.name} differs from the policy: give the file it was started with, or stop "
            "it and start another one"
        )
    return current


def run_of(folder: Path, experiment: Experiment) -> str:
    """The id of its run in this policy, by which hosts know it; raises LlmkeepError if there is none."""
    current = entries(policy_source.read(folder)).get(experiment.name)
    if current is None:
        raise LlmkeepError(
            f"{folder} has no experiment {experiment.name!r}, so its run is unknown: give its outcomes with --outcomes"
        )
    return identifier(experiment.name, same(experiment, current)["salt"])


def against(experiment: Experiment, percent: int, by_rung: dict[int, Seen] | None, better: bool) -> list[str]:
    """Objections to the next step, one sentence each; BETTER: one objection is that no metric is better."""
    if by_rung is None:
        return ["there are no outcomes: give -i or --outcomes"]
    if percent not in by_rung:
        return [f"there is no outcome at {percent} %, the experiment's present step"]
    verdict = outcomes.verdict(experiment, percent, by_rung[percent])
    if verdict.stopped:
        return [f"at {percent} % there is no verdict: {verdict.stopped}"]
    reasons = [
        f"{metric.metric} of the {arm} has {of.clusters} {UNITS[experiment.unit]} that rate at {percent} %, but minimum is "
        f"{experiment.minimum}"
        for metric in verdict.metrics
        for arm, of in (("control", metric.control), ("candidate", metric.candidate))
        if of.clusters < experiment.minimum
    ]
    reasons += [
        f"{each.metric} is worse at {percent} %" for each in verdict.metrics if each.verdict == "worse"
    ]
    if better and not any(each.verdict == "better" for each in verdict.metrics):
        reasons.append(f"no metric is better at {percent} %")
    return reasons


def start(folder: Path, experiment: Experiment, reason: str, shadow: int = 0) -> str:
    """Write the entry at the first step, with a new salt, and report it.

    SHADOW: at 0 %, copying this percentage of requests.
    """
    current = entries(policy_source.read(folder)).get(experiment.name)
    if current and current["percent"]:
        raise LlmkeepError(f"{experiment.name} is already running at {current['percent']} %: step or stop it")
    first = experiment.ladder[0]
    new = entry(experiment, 0 if shadow else first, secrets.token_hex(16), shadow)
    what = f"start in shadow mode at {shadow} %" if shadow else f"start at {first} %"
    return _put(folder, experiment.name, current, new, what, reason, [])


def step(
    folder: Path, experiment: Experiment, by_rung: dict[int, Seen] | None, reason: str, despite: str | None
) -> str:
    """Move the entry to the next step of the ladder; raises LlmkeepError if the outcomes forbid it."""
    state = running(policy_source.read(folder), experiment)
    higher = [percent for percent in experiment.ladder if state["percent"] < percent < 100]
    if not higher:
        raise LlmkeepError(
            f"{experiment.name} is at {state['percent']} %, its last step with a control group: `llmkeep experiment "
            "promote` gives all units the candidate, `stop` the control"
        )
    known = against(experiment, state["percent"], by_rung, better=False)
    _permit(known, despite)
    new = entry(experiment, higher[0], state["salt"])
    what = f"step from {state['percent']} to {higher[0]} %"
    return _put(folder, experiment.name, state, new, what, despite or reason, known)


def promote(
    folder: Path, experiment: Experiment, evidence: Evidence, reason: str, despite: str | None
) -> str:
    """Give all units the candidate; raises LlmkeepError unless the outcomes show that it is better."""
    current = running(policy_source.read(folder), experiment)
    if current["percent"] == 100:
        raise LlmkeepError(f"all units of {experiment.name} already have the candidate")
    known = against(experiment, current["percent"], evidence.by_rung, better=True)
    _permit(known, despite)
    new = entry(experiment, 100, current["salt"])
    what = f"promote from {current['percent']} %"
    message = _put(folder, experiment.name, current, new, what, despite or reason, known)
    return "\n".join(
        [
            message,
            "A host that halted it keeps the control, and no guardrail is watched at 100 %.",
            *for_good(experiment, evidence.models),
        ]
    )


def for_good(experiment: Experiment, models: Mapping[str, list[Model]]) -> list[str]:
    """Instructions to give the candidate the name and end the experiment without the control answering in between."""
    name, candidate = experiment.model, experiment.candidate
    hosts_by_entry: dict[str, list[str]] = defaultdict(list)
    for host in sorted(models):  # hosts answer in any order
        hosts_by_entry[served_as(name, candidate, models[host])].append(host)
    if not hosts_by_entry:
        hosts_by_entry[f"  - {{name: {name}, …}}, the rest as its entry {candidate} has it"].append(
            "each serving host"
        )
    lines = ["Then for good:"]
    for text, hosts in hosts_by_entry.items():
        lines += [f"to llm_serving_models of {', '.join(hosts)}, in place of an entry {name}, add", text]
    return [
        *lines,
        "and run llmkeep site; then",
        f"  llmkeep experiment stop {experiment.name} --remove --reason promoted",
        "  llmkeep policy build",
        "  llmkeep site",
        (
            f"After that, {', '.join(sorted({experiment.control, candidate} - {name}))} can be removed, unless clients ask for "
            "it by name;"
        ),
        "until then, each of these hosts has the candidate in memory twice",
    ]


def served_as(name: str, candidate: str, known: list[Model]) -> str:
    """The entry of llm_serving_models that serves CANDIDATE's model as NAME."""
    for each in known:
        if each.get("name") == candidate:
            more = f"  # its servers must also have it as {name}" if each.get("driver") == "remote" else ""
            return f"  - {_flow(each | {'name': name})}{more}"
        if folder := (each.get("adapters") or {}).get(candidate):
            return f"  {name}: {folder}, in the adapters of {each['name']}"
    return f"  nothing yet: there is no {candidate}"


def _flow(model: Model) -> str:
    return yaml.safe_dump(model, default_flow_style=True, sort_keys=False, width=math.inf).strip()


def stop(folder: Path, name: str, reason: str, remove: bool) -> str:
    """Give all units the control, or remove the entry, and with it the name unless a model is served under it."""
    known = entries(policy_source.read(folder))
    current = known.get(name)
    if current is None:
        raise LlmkeepError(f"policy has no experiment {name!r}: it has {', '.join(known) or 'none'}")
    what = "remove" if remove else f"stop at {current['percent']} %"
    stopped = current | {"percent": 0, "shadow": 0}
    return _put(folder, name, current, None if remove else stopped, what, reason, [])


def _permit(known: list[str], despite: str | None) -> None:
    if known and not despite:
        listed = "\n".join(f"- {each}" for each in known)
        raise LlmkeepError(
            f"refused, since\n{listed}\nWait, or give --despite REASON, which is put on record"
        )


def _put(
    folder: Path,
    name: str,
    before: Entry | None,
    new: Entry | None,
    what: str,
    reason: str,
    despite: list[str],
) -> str:
    """Change the entry, which must equal BEFORE, once that is on record; returns what was done and what is next."""
    source = policy_source.read(folder)
    if entries(source).get(name) != before:
        raise LlmkeepError(
            f"the entry of {name} in {folder / FOLDER} was changed by another process; nothing was changed: try again"
        )
    now = datetime.now(UTC)
    changed = {"by": runs.who(), "at": now.strftime("%Y-%m-%dT%H:%M:%SZ"), "what": what, "reason": reason}
    every = {other: each for other, each in entries(source).items() if other != name}
    if new is not None:
        every[name] = new | {"changed": changed}
    # Without its tests, which are of roles: `llmkeep policy build` runs them.
    data = source.data | {FOLDER: every}
    source = replace(source, tests={})
    already = policy_source.problems(source)  # of other entries, which this one does not mend
    problems = policy_source.problems(replace(source, data=data))
    if problems := [each for each in problems if each not in already]:
        raise LlmkeepError(
            "the policy would be invalid; nothing was changed:\n"
            + "\n".join(f"- {each}" for each in problems)
            + "\nRemove an unwanted entry with `llmkeep experiment stop NAME --remove`"
        )
    recorded = runs.is_kept(source_tree.located())
    if recorded:
        event: runs.Event = {
            "event.kind": "event",
            "event.category": ["configuration"],
            "event.type": ["change"],
            "event.action": f"experiment {what.split()[0]} {name}",
            "event.outcome": "success",
            "event.reason": reason,
            "user.name": changed["by"],
            "llmkeep.experiment.name": name,
            "llmkeep.experiment.percent": new["percent"] if new else None,
        }
        runs.append(event | ({"llmkeep.experiment.despite": despite} if despite else {}))
    path = folder / FOLDER / "data.yaml"
    text = path.read_text() if path.exists() else ""
    comments = [line for line in text.splitlines(keepends=True) if line.startswith("#")]
    body = yaml.safe_dump(every, sort_keys=False, allow_unicode=True, width=200) if every else "{}\n"
    durable.write(path, ("".join(comments) + body).encode(), 0o644)
    standing = "on record" if recorded else "not on record: this host has no audit record"
    return f"{name}: {what}, {standing}; {path}\n{NEXT}"
