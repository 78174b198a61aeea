"""From what a cluster has to what is declared: the difference, the way there, and the rollback."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import yaml
from ansible_collections.llmkeep.estate.plugins.module_utils.cluster import declared
from ansible_collections.llmkeep.estate.plugins.module_utils.cluster.declared import Identity, identity
from ansible_collections.llmkeep.estate.plugins.module_utils.cluster.kubectl import (
    MANAGER,
    Answer,
    Cluster,
    Manifest,
    explained,
    stream,
)

# Never removed by a run: others live in a namespace, and the record of answers on a claim.
KEPT = ("Namespace", "PersistentVolume", "PersistentVolumeClaim")
SET_BY_THE_SERVER = ("managedFields", "resourceVersion", "generation", "uid", "creationTimestamp")
REASONS = 6


@dataclass(frozen=True)
class Change:
    """An object before and after; None where there is none."""

    before: Manifest | None
    after: Manifest | None

    @property
    def line(self) -> str:
        verb = "create" if self.before is None else "remove" if self.after is None else "change"
        return f"{verb} {declared.shown(self.after or self.before or {})}"


def compared(manifest: Manifest) -> Manifest:
    """An object without what the API server keeps about it."""
    copy_without_status = copy.deepcopy(manifest)
    copy_without_status.pop("status", None)
    for key in SET_BY_THE_SERVER:
        copy_without_status["metadata"].pop(key, None)
    annotations = copy_without_status["metadata"].get("annotations", {})
    annotations.pop("deployment.kubernetes.io/revision", None)
    if not annotations:
        copy_without_status["metadata"].pop("annotations", None)
    return copy_without_status


def text(manifest: Manifest | None) -> str:
    return yaml.safe_dump(compared(manifest), sort_keys=True) if manifest else ""


def live(cluster: Cluster, manifests: Sequence[Manifest]) -> dict[Identity, Manifest]:
    """Those objects that the cluster has."""
    if not manifests:
        return {}
    objects = cluster.objects(
        "get", "--filename=-", "--ignore-not-found", "--show-managed-fields", stdin=stream(manifests)
    )
    return {identity(each): each for each in objects}


def apply(cluster: Cluster, manifests: Sequence[Manifest], *options: str) -> Answer:
    """Server-side apply."""
    return cluster.ask(
        "apply", "--server-side", f"--field-manager={MANAGER}", "--filename=-", "--output=json", *options,
        stdin=stream(manifests), seconds=120,
    )  # fmt: skip


def changes(before: dict[Identity, Manifest], after: Iterable[Manifest]) -> list[Change]:
    """Objects that differ."""
    pairs = [Change(before.get(identity(each)), each) for each in after]
    return [each for each in pairs if text(each.before) != text(each.after)]


def others(manifest: Manifest) -> list[str]:
    """Who manages an object of which llmkeep manages nothing; none where it does, or where the object has no fields."""
    managers = {field["manager"] for field in manifest["metadata"].get("managedFields", [])}
    return [] if MANAGER in managers else sorted(managers)


def left_over(cluster: Cluster, applied: Sequence[Manifest], manifests: Sequence[Manifest]) -> list[Manifest]:
    """Objects that llmkeep applied, and that are declared no more; those in KEPT and those that it no longer manages stay."""
    names = {identity(each) for each in manifests}
    gone = [each for each in applied if identity(each) not in names and each["kind"] not in KEPT]
    return [each for each in live(cluster, gone).values() if not others(each)]


def remove(cluster: Cluster, manifests: Sequence[Manifest]) -> None:
    if manifests:
        cluster.do(
            "delete",
            "--filename=-",
            "--ignore-not-found",
            "--timeout=60s",
            stdin=stream(manifests),
            seconds=90,
        )


def unhealthy(cluster: Cluster, manifests: Sequence[Manifest], seconds: float) -> list[str]:
    """Reasons why workloads are not rolled out and ready within so many seconds; none if they are."""
    end = time.monotonic() + seconds
    problems = []
    for each in manifests:
        if each["kind"] not in declared.WORKLOADS:
            continue
        left = max(1.0, end - time.monotonic())
        answer = cluster.ask(
            "rollout", "status", f"{each['kind']}/{each['metadata']['name']}",
            f"--namespace={each['metadata']['namespace']}", f"--timeout={left:.0f}s", seconds=left + 30,
        )  # fmt: skip
        if not answer.ok:
            problems.append(
                f"{declared.shown(each)} is not ready: {reasons(cluster, each) or explained(answer.error)}"
            )
    return problems


def pods(cluster: Cluster, workload: Manifest) -> list[Manifest]:
    """The pods that a workload selects."""
    selector = ",".join(
        f"{key}={value}" for key, value in workload["spec"]["selector"]["matchLabels"].items()
    )
    namespace = workload["metadata"]["namespace"]
    objects: list[Manifest] = cluster.objects(
        "get", "pods", f"--namespace={namespace}", f"--selector={selector}"
    )
    return objects


def release(cluster: Cluster, manifests: Sequence[Manifest]) -> None:
    """Delete pods of StatefulSets that are not ready: their controller waits for them, and never replaces them."""
    for each in manifests:
        if each["kind"] == "StatefulSet":
            remove(cluster, [pod for pod in pods(cluster, each) if not is_ready(pod)])


def is_ready(pod: Manifest) -> bool:
    return any(
        (condition["type"], condition["status"]) == ("Ready", "True")
        for condition in pod.get("status", {}).get("conditions", [])
    )


def reasons(cluster: Cluster, workload: Manifest) -> str:
    """Why, by the workload itself, its pods and their events."""
    namespace, name = workload["metadata"]["namespace"], workload["metadata"]["name"]
    causes = []
    for each in live(cluster, [workload]).values():
        causes += [
            condition["message"]
            for condition in each.get("status", {}).get("conditions", [])
            if (condition["type"], condition["status"]) == ("ReplicaFailure", "True")
        ]
    members = pods(cluster, workload)
    for pod in members:
        causes += [f"pod {pod['metadata']['name']}: {reason}" for reason in pod_reasons(pod)]
    involved = {name, *(pod["metadata"]["name"] for pod in members)}
    events = cluster.objects("get", "events", f"--namespace={namespace}", "--field-selector=type=Warning")
    causes += [
        f"{event['involvedObject']['name']}: {event['message']}"
        for event in events
        if event["involvedObject"]["name"] in involved
    ]
    return "; ".join([*dict.fromkeys(" ".join(each.split()) for each in causes)][:REASONS])


def pod_reasons(pod: Manifest) -> list[str]:
    """What keeps a pod from being ready."""
    status = pod.get("status", {})
    causes = [
        condition.get("message", condition.get("reason", ""))
        for condition in status.get("conditions", [])
        if (condition["type"], condition["status"]) == ("PodScheduled", "False")
    ]
    for container in [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]:
        state = container.get("state", {})
        ended = state.get("terminated") or container.get("lastState", {}).get("terminated")
        if waiting := state.get("waiting"):
            causes.append(
                f"{container['name']} waits: {waiting.get('reason', '')} {waiting.get('message', '')}".rstrip()
            )
        if ended and ended.get("exitCode"):
            causes.append(f"{container['name']} ended with {ended['exitCode']} ({ended.get('reason', '')})")
        if not causes and not container.get("ready") and "running" in state:
            causes.append(f"{container['name']} runs and is not ready")
    return causes
