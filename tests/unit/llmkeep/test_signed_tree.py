"""The bundle's tree is compared with its signed manifest before each run: what differs is named, and nothing runs."""

import argparse
import os
import py_compile
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import small_bundle
from bootstrapped import Machine

from llmkeep import cli, playbooks, revoke, source_tree
from llmkeep.bundle import manifest
from llmkeep.pki import revoking
from llmkeep.places import Places
from llmkeep.playbooks import RunError

SITE = """
- hosts: all
  gather_facts: false
  tasks:
    - name: Leave a mark
      ansible.builtin.copy: {content: "{{ 'ran' | llmkeep.estate.loud }}", dest: "{{ mark }}", mode: "0600"}
"""
FILTER = """
class FilterModule:
    def filters(self):
        return {"loud": str.upper}
"""
ACTION = """
from ansible.plugins.action import ActionBase

class ActionModule(ActionBase):
    def run(self, tmp=None, task_vars=None):
        return super().run(tmp, task_vars) | {"changed": False}
"""


@dataclass
class Node:
    """A control node below `root`, where bootstrap was run."""

    root: Path
    stick: Path
    keys: Path

    @property
    def tree(self) -> Path:
        return self.root / "srv/llmkeep/bundle/7/tree"

    def site(self) -> bool:
        """Whether `llmkeep site` ran; without it nothing was run at all."""
        code = cli.main(["site", "-i", str(self.root / "hosts.yml"), "--unrecorded", "no record here"])
        ran = (self.root / "mark").exists()
        (self.root / "mark").unlink(missing_ok=True)
        assert ran == (code == 0)
        return ran


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_bundle.signing_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def node(tmp_path: Path, keys: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    root, stick = tmp_path / "root", tmp_path / "stick"
    files = {
        "site.yml": SITE,
        "ansible.cfg": "[defaults]\nnocows = true\n",
        "galaxy.yml": "namespace: llmkeep\nname: estate\nversion: 1.0.0\n",
        "plugins/filter/loud.py": FILTER,
        "plugins/action/quiet.py": ACTION,
        "roles/some/tasks/main.yml": "[]\n",
    }
    for path, content in files.items():
        (stick / "tree" / path).parent.mkdir(parents=True, exist_ok=True)
        (stick / "tree" / path).write_text(content)
    small_bundle.write(stick, keys)
    bundle = root / "srv/llmkeep/bundle/7"
    shutil.copytree(stick, bundle)
    places = Places(root)
    for place, data in (
        (places.bundle_keyring, (keys / "keyring.pgp").read_bytes()),
        (places.bundle_serial, b"7\n"),
    ):
        place.parent.mkdir(parents=True)
        place.write_bytes(data)
    (bundle.parent / "current").symlink_to("7")
    installed = root / "opt/llmkeep/tree"
    installed.parent.mkdir(parents=True)
    installed.symlink_to(bundle.parent / "current/tree")
    (root / "hosts.yml").write_text(
        f"all: {{hosts: {{here: {{ansible_connection: local, mark: '{root}/mark'}}}}}}\n"
    )
    monkeypatch.setattr(source_tree, "TREE", tmp_path / "site-packages")
    monkeypatch.setattr(source_tree, "INSTALLED", installed)
    monkeypatch.setattr(playbooks, "PLACES", places)
    playbooks._require_signed.cache_clear()
    with tempfile.TemporaryDirectory(prefix="run-", dir="/tmp") as memory:
        monkeypatch.setenv("TMPDIR", memory)
        monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
        yield Node(root, stick, keys)


def test_a_tree_as_it_was_signed_runs_and_stays_as_it_is(node: Node) -> None:
    before = small_bundle.snapshot(node.tree)
    (node.root / "uses-an-action.yml").write_text(
        "- hosts: all\n  gather_facts: false\n  tasks: [{llmkeep.estate.quiet: {}}]\n"
    )
    words = ["-i", str(node.root / "hosts.yml"), "--unrecorded", "no record here"]
    assert node.site()
    assert cli.main(["run", str(node.root / "uses-an-action.yml"), *words]) == 0
    assert small_bundle.snapshot(node.tree) == before


def _change(tree: Path) -> None:
    (tree / "site.yml").write_text(SITE.replace("ran", "RAN"))


def _lengthen(tree: Path) -> None:
    (tree / "roles/some/tasks/main.yml").write_text("[]\n# more\n")


def _remove(tree: Path) -> None:
    (tree / "galaxy.yml").unlink()


def _add_variables(tree: Path) -> None:
    (tree / "group_vars").mkdir()
    (tree / "group_vars/all.yml").write_text("mark: /tmp/elsewhere\n")


def _add_plugin(tree: Path) -> None:
    (tree / "plugins/filter/core.py").write_text("")


def _add_bytecode(tree: Path) -> None:
    """What Python runs in place of the signed source, which it does not even compare."""
    source = tree.parent / "other.py"
    source.write_text("raise SystemExit")
    place = tree / "plugins/action/__pycache__/quiet.cpython-313.pyc"
    py_compile.compile(
        str(source), str(place), invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH
    )
    source.unlink()


def _link(tree: Path) -> None:
    (tree / "site.yml").rename(tree.parent / "elsewhere.yml")
    (tree / "site.yml").symlink_to(tree.parent / "elsewhere.yml")


def _link_a_folder(tree: Path) -> None:
    (tree / "roles/some").rename(tree.parent / "some")
    (tree / "roles/some").symlink_to(tree.parent / "some")


ALTERED: dict[str, tuple[Callable[[Path], None], str]] = {
    "a changed file": (_change, "site.yml has sha256 "),
    "a longer file": (_lengthen, "roles/some/tasks/main.yml has 10 bytes, but 3 were signed"),
    "a missing file": (_remove, "missing: galaxy.yml"),
    "unsigned variables": (_add_variables, "not in the manifest: group_vars/all.yml"),
    "an unsigned plugin": (_add_plugin, "not in the manifest: plugins/filter/core.py"),
    "bytecode": (_add_bytecode, "not in the manifest: plugins/action/__pycache__/quiet.cpython-313.pyc"),
    "a link for a file": (_link, "not a plain file: site.yml"),
    "a link for a folder": (_link_a_folder, "not in the manifest: roles/some"),
}


@pytest.mark.parametrize("alter", ALTERED)
def test_a_tree_that_was_altered_is_refused_with_the_file_and_put_back_by_bootstrap(
    alter: str, node: Node, capfd: pytest.CaptureFixture[str]
) -> None:
    act, reason = ALTERED[alter]
    act(node.tree)
    assert not node.site()
    message = capfd.readouterr().err
    assert f"{node.tree} differs from the signed tree of bundle 7:\n" in message
    assert reason in message
    assert "Nothing was run" in message
    if os.geteuid() != 0:  # which bootstrap needs
        return
    done = Machine(node.root, node.stick).bootstrap()
    assert done.returncode == 0, done.stderr
    playbooks.verified_tree()


def test_a_revocation_is_refused_before_it_changes_anything(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    _change(node.tree)
    monkeypatch.setattr(revoking, "revoke", lambda *_: pytest.fail("the record was changed"))
    with pytest.raises(RunError, match=r"site\.yml has sha256"):
        revoke._distributed(revoking.revoke, argparse.Namespace(inventory=None))


def test_a_manifest_that_is_not_the_builders_is_refused(
    node: Node, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    _change(node.tree)
    small_bundle.sign(node.tree.parent, small_bundle.signing_keys(foreign), 8, 30)
    assert not node.site()
    assert "is not signed by a key of" in capfd.readouterr().err
    (node.tree.parent / manifest.SIGNATURE).unlink()
    assert not node.site()
    assert "unsigned content is not used" in capfd.readouterr().err


def test_an_older_bundles_tree_is_refused(node: Node, capfd: pytest.CaptureFixture[str]) -> None:
    (node.root / "var/lib/llmkeep/serial").write_text("8\n")
    assert not node.site()
    assert "serial 7 is older than 8" in capfd.readouterr().err


def test_an_expired_bundles_tree_runs_since_certificates_have_to_be_renewed_and_revoked(node: Node) -> None:
    small_bundle.sign(node.tree.parent, node.keys, 7, -1)
    assert node.site()


def test_a_developers_checkout_is_compared_with_nothing(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    checkout = shutil.copytree(node.tree, node.root / "checkout")
    _change(checkout)
    monkeypatch.setattr(source_tree, "TREE", checkout)
    assert node.site()
