"""What a cluster must have before anything is changed there: version, APIs, rights, GPUs, weights."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ansible_collections.llmkeep.estate.plugins.module_utils.cluster import declared
from ansible_collections.llmkeep.estate.plugins.module_utils.cluster.declared import GPU
from ansible_collections.llmkeep.estate.plugins.module_utils.cluster.kubectl import (
    Cluster,
    Manifest,
    Refused,
    stream,
)

OLDEST = (1, 33)  # native sidecars are stable since 1.33, ValidatingAdmissionPolicy v1 since 1.30
WRITES = ("get", "create", "patch", "delete")
# What tells why pods do not become ready, and what takes a StatefulSet's back. Secrets are not among them.
READS = (
    ("", "pods", "list"),
    ("", "pods", "delete"),
    ("", "events", "list"),
    ("", "resourcequotas", "list"),
)
# So the witness asks a replica for the heads of its record (llmkeep audit collect). By WebSocket it is `get` before 1.35.
EXECUTES = (("", "pods/exec", "create"), ("", "pods/exec", "get"))
EVERYWHERE = (("", "nodes", "list"), ("", "persistentvolumes", "list"))


@dataclass(frozen=True)
class Resource:
    """A kind as the cluster serves it."""

    group: str
    plural: str
    namespaced: bool


def judge_version(cluster: Cluster) -> str:
    """The cluster's version; Refused below OLDEST."""
    version = json.loads(cluster.do("get", "--raw", "/version"))
    major, minor = (int(re.match(r"\d+", version[part]).group()) for part in ("major", "minor"))  # type: ignore[union-attr]
    if (major, minor) < OLDEST:
        raise Refused(
            f"the cluster runs Kubernetes {version['gitVersion']}, and manifests need {OLDEST[0]}.{OLDEST[1]} or later"
            " (native sidecars). Upgrade the cluster"
        )
    return str(version["gitVersion"])


def served(cluster: Cluster) -> dict[tuple[str, str], Resource]:
    """The cluster's kinds by apiVersion and kind."""
    resources = {}
    for line in cluster.do("api-resources", "--no-headers").splitlines():
        words = line.split()
        plural, (version, namespaced, kind) = words[0], words[-3:]
        group = version.rpartition("/")[0]
        resources[version, kind] = Resource(group, plural, namespaced == "true")
    return resources


def judge_kinds(manifests: Sequence[Manifest], kinds: Mapping[tuple[str, str], Resource]) -> None:
    """Refuse kinds that the cluster does not serve, and objects whose namespace the kubeconfig would choose."""
    lacking = sorted({(each["apiVersion"], each["kind"]) for each in manifests} - kinds.keys())
    if lacking:
        names = ", ".join(f"{kind} ({version})" for version, kind in lacking)
        raise Refused(
            f"the cluster does not serve {names}. Install its CustomResourceDefinition, or upgrade the cluster to a"
            " version with this API"
        )
    for each in manifests:
        if kinds[each["apiVersion"], each["kind"]].namespaced and not each["metadata"].get("namespace"):
            raise Refused(
                f"{declared.shown(each)} has no namespace. Set `namespace` in the overlay's kustomization"
            )


def judge_rights(
    cluster: Cluster, manifests: Sequence[Manifest], kinds: dict[tuple[str, str], Resource]
) -> None:
    """Refuse a kubeconfig whose user lacks a right that a run needs; one request for all of them."""
    rights: set[tuple[str, str, str, str]] = {(*each, "") for each in EVERYWHERE}
    for manifest in manifests:
        kind = kinds[manifest["apiVersion"], manifest["kind"]]
        namespace = manifest["metadata"].get("namespace", "") if kind.namespaced else ""
        verbs = WRITES + (("list", "watch") if manifest["kind"] in declared.WORKLOADS else ())
        rights |= {(kind.group, kind.plural, verb, namespace) for verb in verbs}
        if kind.namespaced:
            rights |= {(*each, namespace) for each in READS}
        if declared.has_record(manifest):
            rights |= {(*each, namespace) for each in EXECUTES}
        if declared.runtime_class(manifest):
            rights.add(("node.k8s.io", "runtimeclasses", "list", ""))
    asked = [
        {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {
                "resourceAttributes": {
                    "group": group,
                    "resource": plural.partition("/")[0],
                    "subresource": plural.partition("/")[2],
                    "verb": verb,
                    **({"namespace": namespace} if namespace else {}),
                }
            },
        }
        for group, plural, verb, namespace in sorted(rights)
    ]
    reviews = cluster.objects("create", "--filename=-", "--validate=false", stdin=stream(asked))
    lacking = []
    for review in reviews:
        if not review["status"]["allowed"]:
            right = review["spec"]["resourceAttributes"]
            resource = ".".join(filter(None, (right["resource"], right.get("group"))))
            resource += f"/{right['subresource']}" if right.get("subresource") else ""
            where = f" in {right['namespace']}" if right.get("namespace") else ""
            lacking.append(f"{right['verb']} {resource}{where}")
    if lacking:
        raise Refused(
            f"the user of {cluster.kubeconfig} has no right to {', '.join(lacking)}."
            " Bind its user to a ClusterRole with these rights (docs/operate/kubernetes.md)"
        )


def judge_runtimes(cluster: Cluster, manifests: Sequence[Manifest]) -> None:
    """Refuse pods of a runtime class that the cluster lacks: it would store their workload, and refuse each of them."""
    naming = {name: each for each in manifests if (name := declared.runtime_class(each))}
    if not naming:
        return
    present = {each["metadata"]["name"] for each in cluster.objects("get", "runtimeclasses")}
    for name in sorted(naming.keys() - present):
        raise Refused(
            f"{declared.shown(naming[name])} has the runtime class {name}, and the cluster has"
            f" {', '.join(sorted(present)) or 'none'}. Make it; for GPUs, install NVIDIA's container toolkit on their nodes first"
        )


def judge_gpus(cluster: Cluster, manifests: Sequence[Manifest], live: Sequence[Manifest]) -> None:
    """Refuse workloads that ask for more GPUs than nodes have, or a quota of their namespace leaves."""
    hungry = [
        each
        for each in manifests
        if each["kind"] in declared.WORKLOADS and declared.asked(each, GPU) * declared.pods(each)
    ]
    if not hungry:
        return
    nodes = cluster.objects("get", "nodes")
    free = [int(node["status"].get("allocatable", {}).get(GPU, 0)) for node in nodes]
    for each in hungry:
        if declared.asked(each, GPU) > max(free, default=0):
            raise Refused(
                f"{declared.shown(each)} asks for {declared.asked(each, GPU)} {GPU} a pod, and no node has more than"
                f" {max(free, default=0)} allocatable. Install NVIDIA's driver and device plugin"
                " on a node, or declare the overlay cpu"
            )
    total = sum(declared.asked(each, GPU) * declared.pods(each) for each in hungry)
    if total > sum(free):
        raise Refused(
            f"{total} {GPU} are declared, and the nodes have {sum(free)} allocatable. Declare fewer replicas, or add nodes"
        )
    for namespace in sorted({each["metadata"]["namespace"] for each in hungry}):
        need, ours = (
            sum(
                declared.asked(each, GPU) * declared.pods(each)
                for each in among
                if each["kind"] in declared.WORKLOADS and each["metadata"].get("namespace") == namespace
            )
            for among in (hungry, live)
        )
        for quota in cluster.objects("get", "resourcequotas", f"--namespace={namespace}"):
            status = quota.get("status", {})
            most = status.get("hard", {}).get(f"requests.{GPU}")
            others = max(0, int(status.get("used", {}).get(f"requests.{GPU}", 0)) - ours)
            if most is not None and need > int(most) - others:
                raise Refused(
                    f"{need} {GPU} are declared in {namespace}, and ResourceQuota {quota['metadata']['name']} allows {most},"
                    f" of which others use {others}. Ask for a larger quota, or declare fewer replicas"
                )


def judge_weights(cluster: Cluster, manifests: Sequence[Manifest]) -> None:
    """Refuse replicas for which no node has the verified release, as told by the volumes of a class without a provisioner."""
    local = {
        each["metadata"]["name"]
        for each in manifests
        if each["kind"] == "StorageClass" and each["provisioner"] == "kubernetes.io/no-provisioner"
    }
    for each in manifests:
        claims = (each.get("spec") or {}).get("volumeClaimTemplates", [])
        for name in sorted(local & {claim["spec"].get("storageClassName") for claim in claims}):
            volumes = {
                volume["metadata"]["name"]: volume["spec"]
                for volume in [*cluster.objects("get", "persistentvolumes"), *manifests]
                if volume["kind"] == "PersistentVolume" and volume["spec"].get("storageClassName") == name
            }
            selector = declared.template(each)["spec"].get("nodeSelector") or {}
            nodes = [node["metadata"]["labels"] for node in cluster.objects("get", "nodes")]
            taken = [labels for labels in nodes if selector.items() <= labels.items()]
            having = [
                volume for volume, spec in volumes.items() if any(on_node(spec, labels) for labels in taken)
            ]
            if len(having) < declared.pods(each):
                labels = ", ".join(f"{key}={value}" for key, value in selector.items()) or "any label"
                raise Refused(
                    f"{declared.shown(each)} has {declared.pods(each)} replicas, and {len(having)} volumes with the verified"
                    f" release (class {name}) are on a node with {labels}; these are not:"
                    f" {', '.join(sorted(set(volumes) - set(having))) or 'none'}. Install the release on a node by role"
                    " llm_serving, label the node, and declare its PersistentVolume"
                )


def on_node(volume: Manifest, labels: Mapping[str, str]) -> bool:
    """Whether a volume is on a node with these labels, by the values that its affinity names; without one it is on each."""
    terms = volume.get("nodeAffinity", {}).get("required", {}).get("nodeSelectorTerms", [])
    return not terms or any(
        all(
            labels.get(expression["key"]) in expression.get("values", [])
            for expression in term.get("matchExpressions", [])
        )
        for term in terms
    )
