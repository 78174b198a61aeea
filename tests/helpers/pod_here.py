"""A pod of deploy/kubernetes as processes of this machine, which kubelet and a container runtime would start."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from kustomized import Manifest, containers, kustomized, pod
from namespaces import inside, ip, namespace
from plugin_modules import ROOT

from llmkeep.bundle import cache, programs
from llmkeep.image.contents import COMMANDS

PYTHON = "/usr/bin/python3.13"
SERVING = ROOT / "payload/.venv/bin"


def capable() -> Path:
    """OPA; skips the test where a pod's processes cannot be started, and says what is missing."""
    if not (os.geteuid() == 0 and all(map(shutil.which, ("unshare", "setpriv", "nsenter", "nginx")))):
        pytest.skip("a pod's processes take root, util-linux and nginx")
    if not SERVING.is_dir():
        pytest.skip("there is no payload/.venv: `make env`")
    try:
        subprocess.run(["unshare", "--mount", "true"], check=True, capture_output=True)
        os.close(namespace())
    except (OSError, subprocess.CalledProcessError) as problem:
        pytest.skip(f"no mount and network namespaces here: {problem}")
    with cache.alone():
        opa = programs.find("opa")
    if opa is None:
        pytest.skip("there is no OPA: LLMKEEP_MIRROR names a folder that has it, or the cache does")
    return opa


class PodHere:
    """Containers by name, in a network namespace with loopback alone."""

    def __init__(
        self,
        folder: Path,
        given: dict[str, dict[str, bytes]],
        weights: Path,
        scraped_by: str = "",
        overlay: str = "overlays/cpu",
        standins: dict[str, Path] | None = None,
    ) -> None:
        """GIVEN: what ConfigMaps and Secrets hold that no manifest defines, by name. WEIGHTS: the folder of models.
        SCRAPED_BY: with metrics, for a client whose certificate has this name. STANDINS: files by their path in each container,
        libraries in /usr/local/lib.
        """
        self.standins = standins or {}
        self.opa = capable()
        self.folder, self.weights = folder, weights
        self.manifests = kustomized(overlay, scraped_by)
        self.spec: Manifest = pod(self.manifests)["spec"]
        self.group = self.spec["securityContext"]["fsGroup"]
        self.network = namespace()
        ip(self.network, "link set lo up")
        self.held = dict(given)
        for each in self.manifests:
            if each["kind"] == "ConfigMap":
                self.held[each["metadata"]["name"]] = {
                    key: text.encode() for key, text in each["data"].items()
                }
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.volumes = {each["name"]: self._volume(each) for each in self.spec["volumes"]}

    def _volume(self, volume: Manifest) -> Path:
        """The folder that kubelet would make."""
        path = self.folder / "volumes" / str(volume["name"])
        if volume.get("persistentVolumeClaim", {}).get("claimName", "").startswith("weights-"):
            return self.weights
        path.mkdir(parents=True)
        os.chown(path, 0, self.group)
        path.chmod(0o2777 if "emptyDir" in volume else 0o2775)
        secret, config_map = volume.get("secret"), volume.get("configMap")
        source = secret or config_map
        if source:
            name = source["secretName"] if secret else source["name"]
            held = self.held.get(name, {}) if source.get("optional") else self.held[name]
            for key, content in held.items():
                file = path / key
                file.write_bytes(content)
                file.chmod(source.get("defaultMode", 0o644))
                os.chown(file, 0, self.group)
        return path

    def container(self, name: str) -> Manifest:
        return containers(self.spec)[name]

    def user(self, name: str) -> list[str]:
        """The words that make a process the container's."""
        pods, own = self.spec["securityContext"], self.container(name)["securityContext"]
        assert own["capabilities"] == {"drop": ["ALL"]}
        return [
            "/usr/bin/setpriv",
            f"--reuid={own['runAsUser']}",
            f"--regid={pods['runAsGroup']}",
            f"--groups={pods['fsGroup']}",
            "--no-new-privs",
            "--bounding-set=-all",
            "--inh-caps=-all",
        ]

    def start(self, name: str) -> subprocess.Popen[bytes]:
        """Start a container; its output goes to FOLDER/NAME.log."""
        container = self.container(name)
        files = ROOT / "roles/opa/files"
        specification: dict[str, Any] = {
            "root": str(self.folder / f"root-{name}"),
            "system": [str(ROOT)],
            "programs": {
                **{f"/usr/local/bin/{name}": str(SERVING / name) for name in COMMANDS},
                "/usr/local/bin/opa": str(self.opa),
                "/usr/local/lib/llmkeep/serve-policy": str(files / "serve_policy.py"),
                "/usr/local/lib/llmkeep/opa-query": str(files / "opa_query.py"),
                **{place: str(file) for place, file in self.standins.items()},
            },
            "volumes": [
                {
                    "source": str(self.volumes[each["name"]]),
                    "target": each["mountPath"],
                    "read_only": each.get("readOnly", False),
                }
                for each in container["volumeMounts"]
            ],
            "user": self.user(name),
            "command": container["command"],
            "environment": {
                "PATH": "/usr/local/bin:/usr/bin:/usr/sbin",
                **({"LD_LIBRARY_PATH": "/usr/local/lib"} if self.standins else {}),
                **{each["name"]: each["value"] for each in container.get("env", [])},
            },
        }
        file = self.folder / f"{name}.json"
        file.write_text(json.dumps(specification))
        shutil.rmtree(specification["root"], ignore_errors=True)
        log = self.folder / f"{name}.log"
        log.touch()
        os.chown(
            log, container["securityContext"]["runAsUser"], -1
        )  # as runtimes do with what a program writes to
        with log.open("ab") as output, inside(self.network):
            self.processes[name] = subprocess.Popen(
                ["unshare", "--mount", PYTHON, ROOT / "tests/helpers/contained.py", file],
                stdout=output,
                stderr=output,
            )
        return self.processes[name]

    def execute(self, name: str, command: list[str]) -> subprocess.CompletedProcess[str]:
        """As `kubectl exec`, and as kubelet's probes."""
        target = ["--target", str(self.processes[name].pid), "--mount", "--net", "--root", "--wd"]
        argv = ["nsenter", *target, *self.user(name), *command]
        return subprocess.run(argv, capture_output=True, text=True, check=False)

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def stop(self, name: str) -> int:
        """Send SIGTERM; returns the exit code."""
        process = self.processes.pop(name)
        process.terminate()
        try:
            return process.wait(self.spec["terminationGracePeriodSeconds"])
        finally:
            process.kill()

    def close(self) -> None:
        """Stop what still runs, in the pod's order."""
        try:
            for name in reversed(list(containers(self.spec))):
                if name in self.processes:
                    self.stop(name)
        finally:
            os.close(self.network)


@contextmanager
def pod_here(
    folder: Path, given: dict[str, dict[str, bytes]], weights: Path, scraped_by: str = "", **more: Any
) -> Iterator[PodHere]:
    """A pod whose containers the test starts. MORE: as PodHere takes it."""
    made = PodHere(folder, given, weights, scraped_by, **more)
    try:
        yield made
    finally:
        made.close()
