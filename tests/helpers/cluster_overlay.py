"""A small overlay of manifests, each with a namespace of its own, and an image record that is signed."""

import json
from pathlib import Path
from typing import Any

from llmkeep.bundle import signing

IMAGE = "registry.llmkeep.internal/llmkeep"
DIGESTS = [f"sha256:{letter * 64}" for letter in "ab"]
Manifest = dict[str, Any]


RECORD = {
    "type": "image",
    "serial": 7,
    "expires": "2999-01-01T00:00:00Z",
    "name": "llmkeep",
    "variant": "cpu",
    "digest": DIGESTS[0],
}


def signed_image(folder: Path, keys: Path, **stated: object) -> Path:
    """image.json and its signature, as `llmkeep image build` writes them, but for what is STATED."""
    return signed(folder, keys, json.dumps(RECORD | stated))


def signed(folder: Path, keys: Path, content: str) -> Path:
    """image.json of any content, and its signature."""
    path = folder / "image.json"
    path.write_text(content)
    signature = folder / "image.json.sig"
    signature.unlink(missing_ok=True)
    with signing.signer(signing.key_file(keys), None) as key:
        signing.sign(key, path, signature)
    return path


def manifests(namespace: str) -> dict[str, Manifest]:
    """A namespace with one workload, by kinds."""
    metadata = {"name": "serving", "namespace": namespace}
    labels = {"app": "serving"}
    pod = {"automountServiceAccountToken": False, "containers": [{"name": "gateway", "image": IMAGE}]}
    template = {"metadata": {"labels": labels}, "spec": pod}
    return {
        "Namespace": {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}},
        "Deployment": {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": metadata,
            "spec": {"replicas": 1, "selector": {"matchLabels": labels}, "template": template},
        },
        "PodDisruptionBudget": {
            "apiVersion": "policy/v1",
            "kind": "PodDisruptionBudget",
            "metadata": metadata,
            "spec": {"minAvailable": 1, "selector": {"matchLabels": labels}},
        },
    }


def write(folder: Path, objects: dict[str, Manifest]) -> Path:
    """The overlay as kustomize reads it."""
    folder.mkdir(exist_ok=True)
    names = []
    for kind, content in objects.items():
        (folder / f"{kind}.json").write_text(json.dumps(content))
        names.append(f"{kind}.json")
    (folder / "kustomization.yaml").write_text(json.dumps({"resources": names}))
    return folder
