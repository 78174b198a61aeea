"""What role kubernetes refuses of an inventory, and how the manifests of git reach the control node."""

from pathlib import Path
from typing import Any

import pytest
from plugin_modules import load
from rendered_role import played

CLUSTER = {"name": "main", "kubeconfig": "/etc/llmkeep/kubernetes/main.kubeconfig", "overlay": "cpu"}
FACTS = {
    "distribution": "Debian",
    "distribution_major_version": "13",
    "os_family": "Debian",
    "pkg_mgr": "apt",
}


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What preflight says on hosts of which each has one fault."""
    clusters: dict[str, list[dict[str, Any]]] = {
        "ops1": [CLUSTER],
        "llm1": [CLUSTER],
        "ops2": [CLUSTER, CLUSTER],
        "ops3": [{**CLUSTER, "name": "../main"}],
    }
    play = {
        "hosts": "kubernetes",
        "connection": "local",
        "gather_facts": False,
        "vars": {"ansible_facts": FACTS},
        "tasks": [
            {"ansible.builtin.import_role": {"name": "llmkeep.estate.kubernetes", "tasks_from": "preflight"}}
        ],
    }
    hosts = {name: {"kubernetes_clusters": declared} for name, declared in clusters.items()}
    children = {
        "kubernetes": {"hosts": dict.fromkeys(hosts)},
        "control": {"hosts": dict.fromkeys(name for name in hosts if name != "llm1")},
    }
    done = played(tmp_path_factory.mktemp("preflight"), play, {"hosts": hosts, "children": children})
    return " ".join(done.stdout.split())


def test_a_host_that_is_no_control_node_is_refused(refusals: str) -> None:
    assert "llm1 is in group kubernetes, and not in group control; nothing was changed" in refusals


def test_two_clusters_of_one_name_are_refused(refusals: str) -> None:
    assert "kubernetes_clusters of ops2 has the names main, main; nothing was changed" in refusals


def test_a_name_that_leaves_its_folder_is_refused(refusals: str) -> None:
    assert "kubernetes_clusters of ops3 has the names ../main; nothing was changed" in refusals


def test_a_control_node_with_a_cluster_is_not_refused(refusals: str) -> None:
    assert "of ops1" not in refusals
    assert "ops1 is" not in refusals


def test_folders_of_manifests_are_brought_whole(tmp_path: Path) -> None:
    for name in ("base/a.yaml", "overlays/cpu/b.yaml"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(name)
    tree = load("filter.kubernetes").folder_tree(str(tmp_path), "/there")
    assert [each["path"] for each in tree["directories"]] == [
        "/there",
        "/there/base",
        "/there/overlays",
        "/there/overlays/cpu",
    ]
    assert tree["files"][1] == {"dest": "/there/overlays/cpu/b.yaml", "content": "overlays/cpu/b.yaml"}
