"""The witness keeps what replicas in clusters signed.

A stand-in for kubectl runs here, as this user, what would run in a pod; with the real one: tests/lab/nodes.
"""

import json
import shutil
import sys
import syslog
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from audit_records import NAME, SEED, checked, record

from llmkeep import cli
from llmkeep.record import pods, runs, witness
from llmproof.chain import Chain

KUBECTL = """#!{python}
import os, pathlib, sys
own, command = sys.argv[1 : sys.argv.index("--")], sys.argv[sys.argv.index("--") + 1 :]
assert "--kubeconfig=/etc/kubeconfig" in own and "--container=audit" in own and "--namespace=llmkeep" in own, own
pod = pathlib.Path({folder!r}, own[-1])
if not pod.is_dir():
    sys.exit(f'Error from server (NotFound): pods "{{own[-1]}}" not found')
for name, where in (("endless", 1), ("endless-errors", 2)):
    if (pod / name).exists():
        os.dup2(where, 1)
        os.execvp("yes", ["yes"])
os.chdir(pod)
os.execvp(command[0], command)
"""
HOSTS = """
all:
  vars: {ansible_connection: local, ansible_python_interpreter: /usr/bin/python3}
  children: {control: {hosts: {ops1: {}}}}
"""


def workload(kind: str, name: str, container: str = "audit", **spec: Any) -> dict[str, Any]:
    """A workload with one container."""
    return {
        "kind": kind,
        "metadata": {"name": name, "namespace": "llmkeep"},
        "spec": {"template": {"spec": {"containers": [{"name": container}]}}, **spec},
    }


@dataclass
class Estate:
    """A control node, and a cluster whose pods are folders."""

    root: Path

    def record(self, pod: str) -> Path:
        return self.root / "pods" / pod / "record"

    def kept(self, pod: str) -> Path:
        return self.root / "witness-pods" / f"main.{pod}"

    def applied(self, *workloads: dict[str, Any]) -> None:
        """What role kubernetes wrote of the cluster."""
        (self.root / "kubernetes/main").mkdir(parents=True, exist_ok=True)
        (self.root / "kubernetes/main/applied.json").write_text(json.dumps(workloads))

    def collect(self) -> int:
        """llmkeep audit collect."""
        words = ["-i", str(self.root / "hosts.yml"), "--clusters", str(self.root / "clusters.json")]
        return cli.main(["audit", "collect", *words])


@pytest.fixture
def estate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Estate]:
    """Two replicas with a record each."""
    made = Estate(tmp_path)
    (tmp_path / "hosts.yml").write_text(HOSTS)
    (tmp_path / "clusters.json").write_text('[{"name": "main", "kubeconfig": "/etc/kubeconfig"}]')
    program = tmp_path / "bin/kubectl"
    program.parent.mkdir()
    program.write_text(KUBECTL.format(python=sys.executable, folder=str(tmp_path / "pods")))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    monkeypatch.setattr(pods, "APPLIED", tmp_path / "kubernetes")
    monkeypatch.setattr(pods, "RECORD", "record")
    monkeypatch.setattr(pods, "SEEN", "seen")
    monkeypatch.setattr(witness, "KEPT", tmp_path / "witness")
    monkeypatch.setattr(witness, "KEPT_OF_PODS", tmp_path / "witness-pods")
    monkeypatch.setattr(runs, "FOLDER", tmp_path / "own")
    monkeypatch.setattr(runs, "SEALED_SEED", tmp_path / "seed")
    monkeypatch.setattr(runs, "unseal", lambda sealed, _name: sealed)
    monkeypatch.setattr(syslog, "syslog", lambda _level, _text: None)
    (tmp_path / "seed").write_text(SEED.hex())
    made.applied(workload("StatefulSet", "llm", replicas=2), workload("Deployment", "page"))
    for pod in ("llm-0", "llm-1"):
        record(made.record(pod), 20)
    with tempfile.TemporaryDirectory(prefix="run-", dir="/tmp") as memory:
        monkeypatch.setenv("TMPDIR", memory)
        yield made


def test_heads_of_each_replica_are_kept_as_they_grow(
    estate: Estate, capfd: pytest.CaptureFixture[str]
) -> None:
    assert estate.collect() == 0, capfd.readouterr().err
    record(estate.record("llm-1"), 10)
    assert estate.collect() == 0, capfd.readouterr().err
    for pod in ("llm-0", "llm-1"):
        for name in ("heads", "verifier"):
            assert (estate.kept(pod) / name).read_bytes() == (estate.record(pod) / name).read_bytes()


def test_a_replica_whose_record_was_signed_anew_is_found(
    estate: Estate, capfd: pytest.CaptureFixture[str]
) -> None:
    assert estate.collect() == 0
    shutil.rmtree(estate.record("llm-0"))
    record(estate.record("llm-0"), 30)
    assert estate.collect() == 3
    assert "the heads on main.llm-0 do not begin with" in capfd.readouterr().err
    assert not checked(estate.record("llm-0"), estate.kept("llm-0") / "heads").ok


def test_a_replica_that_is_not_there_is_named_and_the_others_are_kept(
    estate: Estate, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(estate.root / "pods/llm-0")
    assert estate.collect() == 1
    reason = "main.llm-0, pod llmkeep/llm-0, did not return the state of its record: Error from server (NotFound): "
    assert f'{reason}pods "llm-0" not found' in capfd.readouterr().err
    assert (estate.kept("llm-1") / "heads").exists()


def test_a_replica_that_keeps_no_record_is_named(estate: Estate, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(estate.record("llm-0"))
    assert estate.collect() == 1
    assert "main.llm-0 keeps no audit record" in capfd.readouterr().err


def test_a_pod_that_talks_without_end_is_not_heard(estate: Estate, capfd: pytest.CaptureFixture[str]) -> None:
    (estate.root / "pods/llm-0/endless").touch()
    assert estate.collect() == 1
    assert "main.llm-0 returned more than 1 MiB" in capfd.readouterr().err


def test_a_pod_that_complains_without_end_is_cut_off(
    estate: Estate, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pods, "SECONDS", 2)
    (estate.root / "pods/llm-0/endless-errors").touch()
    assert estate.collect() == 1
    told = capfd.readouterr().err
    assert "main.llm-0, pod llmkeep/llm-0, did not return the state of its record: " in told
    assert len(told) < 1000


def test_what_the_last_look_saw_is_left_for_the_writer(estate: Estate) -> None:
    """So it may remove what is old, and refuses to go on with a record that was set back."""
    assert estate.collect() == 0
    assert estate.collect() == 0
    seen = estate.root / "pods/llm-0/seen/head"
    with Chain(estate.record("llm-0"), SEED, NAME, seen=seen) as chain:
        assert chain._seen.size == 20


@pytest.mark.parametrize(
    ("declared", "names"),
    [
        (workload("StatefulSet", "llm", replicas=3), ["llm-0", "llm-1", "llm-2"]),
        (workload("StatefulSet", "llm"), ["llm-0"]),
        (workload("StatefulSet", "llm", replicas=2, ordinals={"start": 5}), ["llm-5", "llm-6"]),
        (workload("StatefulSet", "llm", container="page", replicas=3), []),
        (workload("Deployment", "llm", replicas=3), []),
    ],
)
def test_replicas_are_those_that_were_applied_and_write_a_record(
    declared: dict[str, Any], names: list[str], estate: Estate
) -> None:
    estate.applied(declared)
    assert [each.pod for each in pods.replicas(estate.root / "clusters.json")] == names


def test_a_cluster_to_which_nothing_was_deployed_has_no_replicas(estate: Estate) -> None:
    shutil.rmtree(estate.root / "kubernetes")
    assert pods.replicas(estate.root / "clusters.json") == []


def test_a_list_of_clusters_that_is_none_is_told_and_hosts_are_looked_at(
    estate: Estate, capfd: pytest.CaptureFixture[str]
) -> None:
    (estate.root / "clusters.json").write_text("main")
    assert estate.collect() == 1
    assert "clusters.json" in capfd.readouterr().err
    assert (estate.root / "witness/findings.json").exists()
