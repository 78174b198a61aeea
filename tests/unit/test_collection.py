"""The collection as `make release` builds it, installed by itself: no checkout is around it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("collection")
    built = folder / "built"
    galaxy = [str(Path(sys.executable).with_name("ansible-galaxy")), "collection"]
    subprocess.run([*galaxy, "build", "--output-path", str(built), str(ROOT)], check=True)
    (file,) = built.iterdir()
    subprocess.run([*galaxy, "install", "--offline", "--force", "-p", str(folder), str(file)], check=True)
    return folder / "ansible_collections/llmkeep/estate"


def test_it_checks_an_inventory(collection: Path) -> None:
    command = [str(Path(sys.executable).with_name("ansible-playbook")), "-i", str(ROOT / "inventory/example")]
    done = subprocess.run(
        [*command, str(collection / "playbooks/check-inventory.yml")],
        capture_output=True,
        text=True,
        check=False,
        cwd=collection.parent,
        env={**os.environ, "ANSIBLE_COLLECTIONS_PATH": str(collection.parents[2])},
    )
    assert "Validate the inventory" in done.stdout
    assert done.returncode == 0, done.stdout + done.stderr
