"""What a control node has for one cluster, for tests of module cluster_manifests."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from called_module import called
from cluster_overlay import Manifest, write
from control_plane import ControlPlane
from plugin_modules import load

module = load("modules.cluster_manifests")
NODE = "hollow-0"
NOWHERE = {"kubernetes.io/hostname": "nowhere"}


@dataclass
class Estate:
    """What a control node has for one cluster, in a namespace of its own there."""

    cluster: ControlPlane
    folder: Path
    keys: Path
    capsys: pytest.CaptureFixture[str]
    namespace: str
    objects: dict[str, Manifest] = field(default_factory=dict)
    kubeconfig: Path | None = None

    @property
    def pod(self) -> Any:
        """The pod template's specification."""
        return self.objects["Deployment"]["spec"]["template"]["spec"]

    def run(self, check: bool = False, seconds: int = 60, **given: object) -> dict[str, Any]:
        """What the module says."""
        known = {
            "kubeconfig": str(self.kubeconfig or self.cluster.kubeconfig),
            "overlay": str(write(self.folder / "overlay", self.objects)),
            "image": str(self.folder / "image.json"),
            "keyring": str(self.keys / "keyring.pgp"),
            "registry": "registry.llmkeep.internal",
            "record": str(self.folder / "record"),
            "seen": str(self.folder / "image.serial"),
            "seconds": seconds,
        }
        return called(module, {**known, **given, "_ansible_check_mode": check}, self.capsys)

    def deployed(self, **given: object) -> dict[str, Any]:
        """What a run says that has to succeed."""
        said = self.run(**given)  # type: ignore[arg-type]
        assert "failed" not in said, said["msg"]
        return said

    def refused(self, **given: object) -> str:
        """Why a run is refused."""
        said = self.run(**given)  # type: ignore[arg-type]
        assert said.get("failed"), said
        return str(said["msg"])

    def seen(self, kind: str, path: str) -> str:
        """A field of the cluster's object of this kind."""
        return self.cluster.kubectl("get", kind, "serving", "-n", self.namespace, f"--output=jsonpath={path}")

    def names(self, kind: str) -> list[str]:
        """Names of all objects of this kind in the namespace."""
        return self.cluster.kubectl("get", kind, "-n", self.namespace, "--output=name").split()

    def untouched(self) -> bool:
        """Whether the cluster has nothing of the namespace."""
        return f"namespace/{self.namespace}" not in self.cluster.kubectl("get", "namespaces", "-o", "name")


def stateful(estate: Estate) -> Manifest:
    """The workload, made a StatefulSet."""
    workload = estate.objects.pop("Deployment")
    workload["kind"] = "StatefulSet"
    workload["spec"]["serviceName"] = "serving"
    estate.objects["StatefulSet"] = workload
    return workload
