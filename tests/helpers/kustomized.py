"""The manifests in deploy/kubernetes, rendered as role kubernetes does: with the digest of an image."""

import json
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from control_plane import kube
from plugin_modules import ROOT

FOLDER = ROOT / "deploy/kubernetes"
IMAGE = "registry.llmkeep.internal/llmkeep"
DIGEST = "sha256:" + "5e" * 32
Manifest = dict[str, Any]


@cache
def _rendered(overlay: str, scraped_by: str) -> str:
    with tempfile.TemporaryDirectory() as name:

        def ours(folder: str) -> str:
            return os.path.relpath(FOLDER / folder, Path(name).resolve())

        content: dict[str, Any] = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "resources": [ours(overlay)],
            "images": [{"name": IMAGE, "digest": DIGEST}],
        }
        if scraped_by:
            clients = f'metrics-clients="SUCCESS CN={scraped_by}" prometheus;'
            edge = {"name": "llm-edge", "namespace": "llmkeep", "behavior": "merge", "literals": [clients]}
            content |= {"components": [ours("components/metrics")], "configMapGenerator": [edge]}
        Path(name, "kustomization.yaml").write_text(json.dumps(content))
        argv = [str(kube()), "kubectl", "kustomize", name]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    text: str = done.stdout
    return text


def kustomized(overlay: str, scraped_by: str = "") -> list[Manifest]:
    """An overlay's objects, of which the caller may change what it likes.

    SCRAPED_BY: with metrics, for a client whose certificate has this name.
    """
    return list(yaml.safe_load_all(_rendered(overlay, scraped_by)))


def one(manifests: list[Manifest], kind: str) -> Manifest:
    """The only object of a kind."""
    (found,) = (each for each in manifests if each["kind"] == kind)
    return found


def pod(manifests: list[Manifest]) -> Manifest:
    """A pod as the StatefulSet makes it, without what only its claims bring."""
    template = one(manifests, "StatefulSet")["spec"]["template"]
    metadata = {"name": "llm-9", "namespace": "llmkeep", "labels": template["metadata"]["labels"]}
    claims = one(manifests, "StatefulSet")["spec"]["volumeClaimTemplates"]
    named = [
        {
            "name": each["metadata"]["name"],
            "persistentVolumeClaim": {"claimName": f"{each['metadata']['name']}-llm-9"},
        }
        for each in claims
    ]
    spec = json.loads(json.dumps(template["spec"]))
    spec["volumes"] += named
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def containers(spec: Manifest) -> dict[str, Manifest]:
    """All containers of a pod by name, its sidecars among them."""
    return {each["name"]: each for each in (*spec["initContainers"], *spec["containers"])}
