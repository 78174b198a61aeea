#!/usr/bin/python3
"""cluster_findings RECORDS IMAGE NAME=KUBECONFIG…: what clusters have, compared with what was applied, as JSON. Changes nothing.

RECORDS: folder with NAME/applied.json of each cluster; IMAGE: the signed image record. An API server that does not answer fails
all findings, since none is known to hold.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Manifest = dict[str, Any]
WORKLOADS = ("Deployment", "StatefulSet", "DaemonSet")
REGISTRY_OF_OTHERS = "registry.example.org"


@dataclass
class Cluster:
    """A cluster, and what was applied to it."""

    kubeconfig: str
    cache: str
    digest: str
    applied: list[Manifest] = field(default_factory=list)

    def kubectl(self, *words: str, stdin: object = None) -> subprocess.CompletedProcess[str]:
        argv = [
            "kubectl",
            f"--kubeconfig={self.kubeconfig}",
            f"--cache-dir={self.cache}",
            "--request-timeout=20s",
            *words,
        ]
        text = None if stdin is None else json.dumps(stdin)
        return subprocess.run(argv, input=text, capture_output=True, text=True, check=False)

    def objects(self, *words: str, stdin: object = None) -> list[Manifest]:
        done = self.kubectl("get", "--output=json", *words, stdin=stdin)
        if done.returncode != 0:
            raise OSError(" ".join(done.stderr.split())[-300:])
        answer = json.loads(done.stdout or '{"items": [], "kind": "List"}')
        return list(answer["items"]) if answer["kind"].endswith("List") else [answer]

    def workloads(self) -> list[Manifest]:
        """Those that were applied, as the cluster has them."""
        ours = [each for each in self.applied if each["kind"] in WORKLOADS]
        return self.objects("--filename=-", "--ignore-not-found", stdin=listed(ours)) if ours else []

    def pods(self) -> Iterator[Manifest]:
        for each in self.workloads():
            labels = ",".join(
                f"{key}={value}" for key, value in each["spec"]["selector"]["matchLabels"].items()
            )
            yield from self.objects(
                "pods", f"--namespace={each['metadata']['namespace']}", f"--selector={labels}"
            )

    def namespaces(self) -> list[str]:
        return sorted({each["metadata"]["namespace"] for each in self.applied if each["kind"] in WORKLOADS})


def listed(objects: list[Manifest]) -> Manifest:
    return {"apiVersion": "v1", "kind": "List", "items": objects}


def shown(manifest: Manifest) -> str:
    metadata = manifest["metadata"]
    return "/".join(filter(None, (manifest["kind"], metadata.get("namespace"), metadata["name"])))


def differing(cluster: Cluster) -> Iterator[str]:
    """Objects that are not as they were applied."""
    if not cluster.applied:
        yield "nothing was applied"
        return
    done = cluster.kubectl(
        "diff",
        "--server-side",
        "--field-manager=llmkeep",
        "--force-conflicts",
        "--filename=-",
        stdin=listed(cluster.applied),
    )
    if done.returncode > 1 or done.stderr.strip():
        yield " ".join(done.stderr.split())[-300:]
    for line in done.stdout.splitlines():
        if line.startswith("+++ "):
            yield f"{line.split()[1].rpartition('/')[2]} differs"


def unready(cluster: Cluster) -> Iterator[str]:
    """Workloads that are missing, or of which not all pods are ready and of the last revision."""
    live = {shown(each): each for each in cluster.workloads()}
    for name in (shown(each) for each in cluster.applied if each["kind"] in WORKLOADS):
        if name not in live:
            yield f"{name} is missing"
            continue
        each = live[name]
        status, replicas = each.get("status", {}), each["spec"].get("replicas", 1)
        if each["kind"] == "DaemonSet":
            replicas, ready = status.get("desiredNumberScheduled", 0), status.get("numberReady", 0)
        else:
            ready = min(status.get("readyReplicas", 0), status.get("updatedReplicas", 0))
        if ready < replicas or status.get("observedGeneration") != each["metadata"]["generation"]:
            yield f"{name} has {ready} of {replicas} pods ready"


def other_images(cluster: Cluster) -> Iterator[str]:
    """Containers of running pods that have another digest than the signed one."""
    for pod in cluster.pods():
        for each in [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]:
            if not each["image"].endswith(f"@{cluster.digest}"):
                yield f"{each['name']} of {shown(pod)} has {each['image']}"


def tokens(cluster: Cluster) -> Iterator[str]:
    """Pods with a service account token."""
    for pod in cluster.pods():
        sources = [
            source
            for volume in pod["spec"].get("volumes", [])
            for source in volume.get("projected", {}).get("sources", [])
        ]
        if any("serviceAccountToken" in source for source in sources):
            yield f"{shown(pod)} has a token"


def open_namespaces(cluster: Cluster) -> Iterator[str]:
    """Namespaces without a policy that denies all traffic that no other policy allows."""
    for namespace in cluster.namespaces():
        specs = [each["spec"] for each in cluster.objects("networkpolicies", f"--namespace={namespace}")]
        if not any(
            not spec.get("podSelector")
            and {"Ingress", "Egress"} <= set(spec.get("policyTypes", []))
            and not spec.get("ingress")
            and not spec.get("egress")
            for spec in specs
        ):
            yield f"{namespace} has no NetworkPolicy that denies by default"


def unprotected(cluster: Cluster) -> Iterator[str]:
    """Workloads whose pods a drain may take all at once."""
    for each in cluster.workloads():
        labels = each["spec"]["template"]["metadata"].get("labels", {})
        budgets = cluster.objects("poddisruptionbudgets", f"--namespace={each['metadata']['namespace']}")
        selectors = [budget["spec"]["selector"].get("matchLabels", {}) for budget in budgets]
        if each["kind"] != "DaemonSet" and not any(
            selector and selector.items() <= labels.items() for selector in selectors
        ):
            yield f"{shown(each)} has no PodDisruptionBudget"


def admitted(cluster: Cluster, change: Callable[[Manifest], object], refusal: str) -> Iterator[str]:
    """Pods that a server-side dry run does not refuse in these words, made of an applied workload's by a change."""
    for each in cluster.applied:
        if each["kind"] not in WORKLOADS:
            continue
        # A claim template becomes a volume of its name in the workload's own pods alone.
        claims = [
            {"name": claim["metadata"]["name"], "emptyDir": {}}
            for claim in each["spec"].get("volumeClaimTemplates", [])
        ]
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "llmkeep-check", "namespace": each["metadata"]["namespace"]},
            "spec": json.loads(json.dumps(each["spec"]["template"]["spec"])),
        }
        pod["spec"]["volumes"] = pod["spec"].get("volumes", []) + claims
        change(pod["spec"]["containers"][0])
        done = cluster.kubectl("create", "--dry-run=server", "--filename=-", stdin=pod)
        if done.returncode == 0:
            yield f"a pod of {shown(each)} was admitted"
        elif refusal not in done.stderr:
            yield f"a pod of {shown(each)} was refused otherwise: {' '.join(done.stderr.split())[-300:]}"


def with_tag(container: Manifest) -> None:
    container["image"] = f"{container['image'].partition('@')[0]}:latest"


def of_others(container: Manifest) -> None:
    container["image"] = f"{REGISTRY_OF_OTHERS}/{container['image'].partition('/')[2]}"


def privileged(container: Manifest) -> None:
    container["securityContext"] = {
        **container.get("securityContext", {}),
        "privileged": True,
        "allowPrivilegeEscalation": True,
    }


FINDINGS: dict[str, Callable[[Cluster], Iterator[str]]] = {
    "as_applied": differing,
    "ready": unready,
    "image": other_images,
    "token": tokens,
    "network": open_namespaces,
    "drains": unprotected,
    "tags": lambda cluster: admitted(cluster, with_tag, "ValidatingAdmissionPolicy"),
    "registries": lambda cluster: admitted(cluster, of_others, "ValidatingAdmissionPolicy"),
    "privileged": lambda cluster: admitted(cluster, privileged, "violates PodSecurity"),
}


def main() -> None:
    records, image = Path(sys.argv[1]), Path(sys.argv[2])
    faults: dict[str, list[str]] = {name: [] for name in FINDINGS}
    with tempfile.TemporaryDirectory(prefix="llmkeep-findings-") as cache:
        for name, kubeconfig in (each.split("=", 1) for each in sys.argv[3:]):
            for finding, find in FINDINGS.items():
                try:
                    digest = json.loads(image.read_bytes())["digest"]
                    applied = json.loads((records / name / "applied.json").read_bytes())
                    sentences = [*find(Cluster(kubeconfig, f"{cache}/{name}", digest, applied))]
                except (OSError, KeyError, ValueError) as problem:
                    sentences = [str(problem)]
                faults[finding] += [f"{name}: {fault}" for fault in sentences]
    print(
        json.dumps(
            {
                "checks": {
                    name: {"ok": not sentences, "observed": "; ".join(sentences)}
                    for name, sentences in faults.items()
                }
            }
        )
    )


if __name__ == "__main__":
    main()
