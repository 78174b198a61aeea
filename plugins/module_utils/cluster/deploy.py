"""One run on a cluster: judge, apply, wait for health, and go back where it does not come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ansible_collections.llmkeep.estate.plugins.module_utils.cluster import capacity, declared, rollout
from ansible_collections.llmkeep.estate.plugins.module_utils.cluster.declared import Identity, identity
from ansible_collections.llmkeep.estate.plugins.module_utils.cluster.kubectl import (
    Cluster,
    Manifest,
    Refused,
    explained,
    listed,
)
from ansible_collections.llmkeep.estate.plugins.module_utils.cluster.record import Record


@dataclass(frozen=True)
class Outcome:
    """What differs and, after a run, differed. DIFFERS is there where a run would be refused, too."""

    changes: list[rollout.Change] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    refusal: str = ""


def deployed(
    cluster: Cluster, manifests: Sequence[Manifest], record: Record, seconds: int, check: bool
) -> Outcome:
    """Bring the cluster to what is declared, or say what that would change.

    Refused where nothing was changed; an Outcome with a refusal where a run was taken back, or shows a
    difference that it would not make.
    """
    capacity.judge_version(cluster)
    kinds = capacity.served(cluster)
    capacity.judge_kinds(manifests, kinds)
    capacity.judge_rights(cluster, manifests, kinds)
    before = rollout.live(cluster, manifests)
    judge_owners(before)
    capacity.judge_runtimes(cluster, manifests)
    capacity.judge_gpus(cluster, manifests, list(before.values()))
    capacity.judge_weights(cluster, manifests)
    made = [each for each in manifests if each["kind"] == "Namespace" and identity(each) not in before]
    if check:
        return previewed(cluster, manifests, before, record, made)
    after, warnings = judged_with(cluster, manifests, made)
    gone = rollout.left_over(cluster, record.owned(), manifests)
    changes = rollout.changes(before, after) + [rollout.Change(each, None) for each in gone]
    problems = []
    if changes:
        record.begin([*manifests, *gone])
        answer = rollout.apply(cluster, manifests)
        problems = [] if answer.ok else [explained(answer.error)]
    problems = problems or rollout.unhealthy(cluster, manifests, seconds)
    if problems:
        return Outcome(
            changes, warnings, f"{'. '.join(problems)}. {taken_back(cluster, manifests, record, seconds)}"
        )
    rollout.remove(cluster, gone)
    record.healthy(manifests)
    return Outcome(changes, warnings)


def judge_owners(before: dict[Identity, Manifest]) -> None:
    """Refuse to take over objects that llmkeep did not make; a namespace or a claim may have been prepared for it."""
    for each in before.values():
        if each["kind"] not in rollout.KEPT and (managers := rollout.others(each)):
            raise Refused(
                f"{declared.shown(each)} is there, and llmkeep did not make it (its managers: {', '.join(managers)})."
                " Remove or rename it, or deploy to another namespace"
            )


def previewed(
    cluster: Cluster,
    manifests: Sequence[Manifest],
    before: dict[Identity, Manifest],
    record: Record,
    made: Sequence[Manifest],
) -> Outcome:
    """What a run would change. Objects in a namespace that is still to be made are shown as they are declared."""
    names = {each["metadata"]["name"] for each in made}
    unborn = [each for each in manifests if each["metadata"].get("namespace") in names]
    answered = [each for each in manifests if each not in unborn]
    refusal = ""
    answer = rollout.apply(cluster, answered, "--dry-run=server")
    if not answer.ok and "conflict" in answer.error:
        # Forced in the dry run alone, to show what differs: a run refuses it.
        refusal = explained(answer.error)
        answer = rollout.apply(cluster, answered, "--dry-run=server", "--force-conflicts")
    if not answer.ok:
        raise Refused(explained(answer.error))
    gone = rollout.left_over(cluster, record.owned(), manifests)
    changes = rollout.changes(before, [*listed(answer.stdout), *unborn])
    return Outcome(changes + [rollout.Change(each, None) for each in gone], answer.warnings, refusal)


def judged_with(
    cluster: Cluster, manifests: Sequence[Manifest], made: Sequence[Manifest]
) -> tuple[list[Manifest], list[str]]:
    """The dry run of all objects. Namespaces in MADE are made for it, and removed again if it is refused."""
    answer = rollout.apply(cluster, made) if made else None
    try:
        if answer is not None and not answer.ok:
            raise Refused(explained(answer.error))
        answer = rollout.apply(cluster, manifests, "--dry-run=server")
        if not answer.ok:
            raise Refused(explained(answer.error))
    except Refused:
        rollout.remove(cluster, made)
        raise
    return listed(answer.stdout), answer.warnings


def taken_back(cluster: Cluster, manifests: Sequence[Manifest], record: Record, seconds: int) -> str:
    """Go back to what was healthy last; what came of it, as a sentence."""
    previous = record.applied()
    if previous == list(manifests):
        return "It is the last healthy revision, so there is none to roll back to: read the reason"
    answer = rollout.apply(cluster, previous) if previous else None
    if answer is not None and not answer.ok:
        return f"The revision before could not be applied again: {explained(answer.error)}"
    rollout.release(cluster, previous)
    rollout.remove(cluster, rollout.left_over(cluster, record.owned(), previous))
    problems = rollout.unhealthy(cluster, previous, seconds)
    if problems:
        return f"The revision before was applied again, and is not healthy either: {'. '.join(problems)}"
    record.end()
    if previous:
        return "The revision before was applied again and is healthy"
    return f"There was no earlier revision: created objects are removed, except those of the kinds {', '.join(rollout.KEPT)}"
