"""What is declared: manifests rendered by kustomize with the digest of a signed image record."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from ansible_collections.llmkeep.estate.plugins.module_utils.cluster.kubectl import (
    Cluster,
    Manifest,
    Refused,
)
from ansible_collections.llmkeep.estate.plugins.module_utils.config import files

IMAGE = "registry.llmkeep.internal/llmkeep"  # as the manifests call it
GPU = "nvidia.com/gpu"
WORKLOADS = ("Deployment", "StatefulSet", "DaemonSet")
Identity = tuple[str, str, str, str]


def identity(manifest: Manifest) -> Identity:
    """API group, kind, namespace and name: the same object in each version of its API."""
    metadata = manifest["metadata"]
    group = manifest["apiVersion"].rpartition("/")[0]
    return group, manifest["kind"], metadata.get("namespace", ""), metadata["name"]


def shown(manifest: Manifest) -> str:
    """KIND NAMESPACE/NAME, for people."""
    _, kind, namespace, name = identity(manifest)
    return f"{kind} {namespace}/{name}" if namespace else f"{kind} {name}"


def deployed_serial(path: Path) -> int:
    """The serial of the image that was deployed last; 0 where none was."""
    try:
        text = files.read(path).decode(errors="replace").strip()
    except FileNotFoundError:
        return 0
    if not text.isdecimal():
        raise Refused(
            f"{path} holds {text[:40]!r}, which is not a serial. Write the serial of the last deployed image into it"
        )
    return int(text)


def image_record(path: Path, keyring: Path, highest: int = 0) -> dict[str, Any]:
    """What `llmkeep image build` wrote of an image.

    Refused unless a key of the keyring signed it, as an image, it is in date, and its serial is HIGHEST or later.
    """
    try:
        content, signature = files.read(path), files.read(path.with_name(f"{path.name}.sig"))
    except OSError as problem:
        raise Refused(
            f"the image record {path} or its signature cannot be read: {problem.strerror}."
            " Bring image.json and image.json.sig from `llmkeep image build`"
        ) from None
    with tempfile.TemporaryDirectory(prefix="llmkeep-image-") as folder:
        record, signed = Path(folder, "image.json"), Path(folder, "image.json.sig")
        record.write_bytes(content)
        signed.write_bytes(signature)
        argv = ["sqv", "--keyring", str(keyring), "--signature-file", str(signed), str(record)]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)
    if done.returncode != 0:
        raise Refused(
            f"the image record {path} has no valid signature by a key in {keyring} ({done.stderr.strip()[-300:]})."
            " Do not deploy this image; find out who changed the record"
        )
    try:
        document = dict(json.loads(content))
        stated, serial, expires = document.get("type"), int(document["serial"]), str(document["expires"])
        past = (now := datetime.now(UTC)) >= datetime.fromisoformat(expires)
    except (KeyError, TypeError, ValueError) as problem:
        raise Refused(
            f"{path} is signed, but is not an image record ({type(problem).__name__}: {problem})."
            " Bring image.json of an image that this version's `llmkeep image build` made"
        ) from None
    # The same key signs the bundle's manifest and apt's InRelease.
    if stated != "image":
        raise Refused(
            f"{path} is signed as {stated!r}, and 'image' is needed. Bring image.json of `llmkeep image build`"
        )
    if past:
        raise Refused(
            f"the image record {path} expired at {expires}, and this host's clock says {now:%Y-%m-%dT%H:%M:%SZ}."
            " Set the clock, or build an image from a newer bundle"
        )
    if serial < highest:
        raise Refused(
            f"the image record {path} has serial {serial}, and {highest} was deployed from here: an old image reintroduces "
            "fixed vulnerabilities. Use one with that serial or a later one, or set kubernetes_allow_older to the reason"
        )
    return document


def rendered(
    cluster: Cluster, overlay: Path, registry: str, image: Mapping[str, Any], replicas: Mapping[str, int]
) -> list[Manifest]:
    """The overlay's objects with the digest of the recorded IMAGE, and with so many REPLICAS of workloads by name.

    Refused if others can change the overlay, if it has a Secret or a container with another image, or asks for GPUs that the
    image does not compute on.
    """
    if not files.is_safe(overlay):
        raise Refused(
            f"the overlay {overlay} does not exist, or users other than root can change its content. Create the folder, and "
            "give it to root, mode 0755 or less"
        )
    with tempfile.TemporaryDirectory(prefix="llmkeep-overlay-") as folder:
        kustomization = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "resources": [os.path.relpath(overlay.resolve(), Path(folder).resolve())],
            "images": [{"name": IMAGE, "newName": f"{registry}/llmkeep", "digest": image["digest"]}],
            "replicas": [{"name": name, "count": int(count)} for name, count in sorted(replicas.items())],
        }
        Path(folder, "kustomization.yaml").write_text(json.dumps(kustomization))
        text = cluster.do("kustomize", folder)
    manifests = [each for each in yaml.safe_load_all(text) if each]
    reference = f"{registry}/llmkeep@{image['digest']}"
    for manifest in manifests:
        if manifest["kind"] == "Secret":
            raise Refused(
                f"{shown(manifest)} is declared in a manifest, where each reader of the manifests reads it."
                " Take it out, and make the Secret in the cluster by hand"
            )
        if asked(manifest, GPU) and image["variant"] != "cuda":
            raise Refused(
                f"{shown(manifest)} asks for GPUs, and the signed image is of the variant {image['variant']}."
                " Build the variant cuda, or declare the overlay cpu"
            )
        for container in containers(manifest):
            if container.get("image") != reference:
                raise Refused(
                    f"container {container['name']} of {shown(manifest)} has the image {container.get('image')},"
                    f" and the signed record names {reference}. Deploy what was signed: remove the patch that names another image"
                )
    return manifests


def template(manifest: Manifest) -> Manifest:
    """The pod template of a workload or a job; empty for other objects."""
    if manifest["kind"] == "Pod":
        return manifest
    spec = manifest.get("spec") or {}
    content = (spec.get("jobTemplate", {}).get("spec", spec) or {}).get("template")
    return content if isinstance(content, dict) else {}


def containers(manifest: Manifest) -> Iterator[dict[str, Any]]:
    """All containers of an object's pods, init containers included."""
    spec = template(manifest).get("spec") or {}
    for kind in ("initContainers", "containers"):
        yield from spec.get(kind) or []


def runtime_class(manifest: Manifest) -> str:
    """Name of the runtime class of an object's pods; empty where it is the cluster's default."""
    return str((template(manifest).get("spec") or {}).get("runtimeClassName") or "")


def has_record(manifest: Manifest) -> bool:
    """Whether the pods of a workload write audit records, which outlive them (llmkeep.record.pods reads the same)."""
    return manifest["kind"] == "StatefulSet" and any(each["name"] == "audit" for each in containers(manifest))


def asked(manifest: Manifest, resource: str) -> int:
    """How much of an extended resource one pod of a workload asks for."""
    return sum(
        int((each.get("resources") or {}).get("limits", {}).get(resource, 0)) for each in containers(manifest)
    )


def pods(manifest: Manifest) -> int:
    """Declared pods of a workload; one where it does not say, as for a DaemonSet."""
    return int((manifest.get("spec") or {}).get("replicas", 1))
