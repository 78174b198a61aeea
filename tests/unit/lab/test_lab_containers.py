"""What a lab of containers stands on, where this machine lacks it; real containers are tested in tests/lab/containers."""

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import cgroup, image, inventory, requirements
from lab.container import FILES, Container
from lab.errors import LabError, MissingProgram, Unsupported
from lab.files import copy
from lab.network import Namespace

PROC_MOUNTS = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 {},relatime 0 0\n"


@pytest.fixture
def mounts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the kernel says is mounted."""
    file = tmp_path / "mounts"
    monkeypatch.setattr(cgroup, "MOUNTS", file)
    return file


def test_the_hierarchy_of_version_2_is_found_beside_version_1(mounts: Path) -> None:
    mounts.write_text(PROC_MOUNTS.format("rw"), encoding="ascii")
    assert cgroup.mount_point() == Path("/sys/fs/cgroup/unified")


@pytest.mark.parametrize("content", ["", PROC_MOUNTS.format("ro")])
def test_without_a_writable_one_no_container_can_run_and_the_way_out_is_named(
    mounts: Path, content: str
) -> None:
    mounts.write_text(content, encoding="ascii")
    with pytest.raises(Unsupported, match=r"no writable cgroup2 hierarchy.*mount -t cgroup2"):
        cgroup.mount_point()
    assert "no writable cgroup2 hierarchy" in requirements.no_container_because(mounts.parent)


def test_a_module_of_a_zip_is_compiled_once_and_again_when_it_changes(tmp_path: Path) -> None:
    hook = image.COMPILED.read_text(encoding="utf-8").replace("/run/lab/compiled", str(tmp_path / "kept"))
    program = (
        "import sys, zipimport; given = zipimport._compile_source; compiled = []\n"
        "zipimport._compile_source = lambda *what: compiled.append(what) or given(*what)\n"
        f"exec({hook!r}, {{}}); sys.path.insert(0, sys.argv[1]); import module; print(module.WHICH, len(compiled))"
    )
    seen = []
    for name, which in (("a.zip", 1), ("b.zip", 1), ("c.zip", 2)):
        with zipfile.ZipFile(tmp_path / name, "w") as made:
            made.writestr("module.py", f"WHICH = {which}\n")
        command = [sys.executable, "-I", "-c", program, str(tmp_path / name)]
        seen.append(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    assert seen == [["1", "1"], ["1", "0"], ["2", "1"]]


@pytest.fixture
def overlay(tmp_path: Path) -> Iterator[Path]:
    """A disk as a Docker container has it."""
    for name in ("lower", "upper", "work", "disk"):
        (tmp_path / name).mkdir()
    options = "lowerdir=lower,upperdir=upper,workdir=work"
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, "disk"], cwd=tmp_path, check=True)
    yield tmp_path / "disk"
    subprocess.run(["umount", tmp_path / "disk"], check=True)


def test_a_disk_on_which_no_overlay_can_lie_is_told(overlay: Path, tmp_path: Path) -> None:
    assert requirements.no_container_because(tmp_path) == ""
    assert f"an overlay in {overlay} cannot be mounted" in requirements.no_container_because(overlay)
    assert list(overlay.iterdir()) == []


def test_a_path_that_no_overlay_can_be_told_is_refused(tmp_path: Path) -> None:
    assert "has a colon or a comma in its path" in requirements.no_container_because(tmp_path / "a:b")


def test_a_program_that_is_missing_is_told_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None if name == "systemd-nspawn" else f"/usr/bin/{name}")
    with pytest.raises(MissingProgram, match="apt-get install systemd-container"):
        requirements.require_programs(["container"])
    requirements.require_programs(["kernel"])


def test_a_bare_debian_that_was_half_made_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def cut(root: Path, _: Path) -> None:
        root.mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(image, "_build", cut)
    with pytest.raises(KeyboardInterrupt):
        image.base_tree(lambda _: None)
    (image.cache_folder() / "lab-root-killed/root").mkdir(parents=True)

    def build(root: Path, _: Path) -> None:
        (root / "etc").mkdir(parents=True)

    monkeypatch.setattr(image, "_build", build)
    tree = image.base_tree(lambda _: None)
    assert sorted(path.name for path in image.cache_folder().iterdir()) == ["lab-image.lock", tree.name]
    assert (tree / "etc").is_dir()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", place], check=True)
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk_is_told_and_leaves_no_half_copy(small_disk: Path, tmp_path: Path) -> None:
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot/large").write_bytes(bytes(2 << 20))
    with pytest.raises(LabError, match="is the disk full\\?"):
        copy(tmp_path / "snapshot", small_disk / "snapshot", "--archive")
    assert list(small_disk.iterdir()) == []


def created(checkout: Path, instance: str) -> Container:
    """A container that was never started."""
    lab = inventory.read([Path("inventory/lab")])
    folder = checkout / "instances" / instance / "hosts/ops1"
    container = Container(lab.host("ops1"), lab, folder, Namespace("nothing"))
    (base := checkout / "base").mkdir(parents=True, exist_ok=True)
    container.create(base, {"/root/.ssh/authorized_keys": (b"", 0o600)})
    return container


def test_a_layer_is_there_as_long_as_a_lab_has_a_snapshot_on_it(tmp_path: Path) -> None:
    first, second = (created(tmp_path, name) for name in ("first", "second"))
    first.written.mkdir()
    (first.written / "file").touch()
    first.snapshot("kept")
    second.take_over(first, "kept")
    shutil.rmtree(first.folder)
    second.restore("kept")
    [layer] = [layer for layer in first.layers.iterdir() if (layer / "file").exists()]
    assert f"lowerdir+=../../../../layers/{layer.name}," in second.overlay(second.chain())
    (second.snapshots / "kept").rename(second.snapshots / "gone")
    second.snapshot("gone")
    assert layer.exists(), "the host lies on it"
    shutil.rmtree(second.folder)
    third = created(tmp_path, "third")
    third.snapshot("alone")
    assert {each.name for each in third.layers.iterdir()} == set(third.chain()[:-1])


def test_a_root_of_many_layers_is_mounted_however_long_the_path_of_its_folder_is(tmp_path: Path) -> None:
    container = created(tmp_path / ("long" * 30), "lab")
    folder = container.folder
    for number in range(20):
        container.written.mkdir()
        (container.written / f"file{number}").touch()
        container.snapshot("kept")
        container.restore("kept")
    for place in (container.written, folder / "work", folder / "root"):
        place.mkdir()
    mount = 'mount -t overlay overlay -o "$0" root && ls root'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", mount, container.overlay(container.chain())],
        cwd=folder,
        check=True,
        capture_output=True,
        text=True,
    )
    assert {f"file{number}" for number in range(20)} < set(done.stdout.split())


def test_a_snapshots_tree_has_what_was_written_and_not_what_only_a_container_needs(tmp_path: Path) -> None:
    container = created(tmp_path, "lab")
    container.written.mkdir()
    (container.written / "installed").touch()
    container.snapshot("floor")
    with container.tree("floor") as root:
        assert (root / "root/.ssh/authorized_keys").exists()
        assert (root / "installed").exists()
        assert not [path for path in FILES if (root / path.removeprefix("/")).exists()]
        (root / "etc/fstab").touch()
    with container.tree("floor") as root:
        assert not (root / "etc/fstab").exists()
