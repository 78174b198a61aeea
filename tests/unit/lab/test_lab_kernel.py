"""Which of Debian's kernels the lab is built of, and when."""

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from lab import image, kernel, requirements
from lab.errors import LabError, NoSpace
from lab.machine import Machine


class Offered:
    """Archives that offer these packages."""

    def __init__(self, *packages: str) -> None:
        self.packages = packages

    def versions(self, _pattern: str) -> dict[str, str]:
        return {package: f"{package.rpartition('-')[2]}.9-1~bpo13+1" for package in self.packages}

    def download(self, package: str, version: str) -> Path:
        return Path(f"{package}={version}")


@pytest.mark.parametrize(
    ("packages", "taken"),
    [
        (["linux-source-6.12", "linux-source-7.2", "linux-source-7.3"], "linux-source-7.2"),
        (["linux-source-6.12", "linux-source-7.10", "linux-source-7.9"], "linux-source-7.9"),
    ],
)
def test_takes_the_series_that_was_tried_else_the_nearest_newer_one(packages: list[str], taken: str) -> None:
    package, file = kernel._source(Offered(*packages))  # type: ignore[arg-type]
    assert package == taken
    assert str(file).startswith(f"{taken}={taken.rpartition('-')[2]}.9")


def test_refuses_archives_without_backports() -> None:
    with pytest.raises(
        LabError, match=r"7\.2 or newer, which trixie-backports has; seen: linux-source-6\.12"
    ):
        kernel._source(Offered("linux-source-6.12"))  # type: ignore[arg-type]


def test_another_configuration_is_another_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = kernel.folder(tmp_path)
    changed = tmp_path / "kernel.config"
    changed.write_text(kernel.CONFIGURATION.read_text(encoding="ascii") + "CONFIG_MORE=y\n", encoding="ascii")
    monkeypatch.setattr(kernel, "CONFIGURATION", changed)
    assert kernel.folder(tmp_path) != before


def test_refuses_a_kernel_that_cannot_have_what_is_stated(tmp_path: Path) -> None:
    stated = tmp_path / "kernel.config"
    stated.write_text("# Disks.\nCONFIG_MD=y\nCONFIG_RENAMED=y\n", encoding="ascii")
    taken = tmp_path / ".config"
    taken.write_text("CONFIG_MD=y\n# CONFIG_OTHER is not set\n", encoding="utf-8")
    with pytest.raises(LabError, match=rf"cannot have CONFIG_RENAMED=y: .*correct {stated}"):
        kernel._require_all(stated, taken)
    taken.write_text("CONFIG_MD=y\nCONFIG_RENAMED=y\n", encoding="utf-8")
    kernel._require_all(stated, taken)


def test_reports_how_many_files_are_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = tmp_path / "linux"
    tree.mkdir()
    seen = tmp_path / "seen"
    monkeypatch.setattr(kernel, "PROGRESS_SECONDS", 0.01)

    def report(message: str) -> None:
        if message == f"building the kernel: 2 of about {kernel.FILES} files":
            seen.touch()

    make = f"echo '  CC      a.o'; echo '  LD      b.o'; echo '  CC      c.o'; until [ -e {seen} ]; do sleep 0.01; done"
    kernel._compile(["timeout", "60", "sh", "-c", make], tree, report)
    assert seen.exists()


def test_a_build_that_fails_shows_its_last_words(tmp_path: Path) -> None:
    tree = tmp_path / "linux"
    tree.mkdir()
    with pytest.raises(LabError, match=r"ended with 2:\n  a.c:1: error: no such header"):
        kernel._compile(["sh", "-c", "echo 'a.c:1: error: no such header' >&2; exit 2"], tree, print)


@pytest.fixture
def inserting(tmp_path: Path) -> Path:
    """A built kernel whose program insert-sys-cert takes certificates with the word GOOD only."""
    (tmp_path / "linux.uml").write_text("the kernel")
    program = tmp_path / "insert-sys-cert"
    program.write_text('#!/bin/sh\n[ "$1 $3" = "-b -c" ] && grep GOOD "$4" >> "$2"\n')
    program.chmod(0o755)
    return tmp_path


def test_a_kernel_with_one_more_certificate_leaves_the_built_one_as_it_was(inserting: Path) -> None:
    certificate, program = inserting / "modules.der", inserting / "own.uml"
    for text in ("GOOD\n", "GOOD too\n"):  # the last one counts
        certificate.write_text(text)
        kernel.enrol(inserting, certificate, program)
        assert program.read_text() == f"the kernel{text}"
    certificate.write_text("too long\n")
    with pytest.raises(LabError, match=r"insert-sys-cert -b .* ended with 1"):
        kernel.enrol(inserting, certificate, program)
    assert program.read_text() == "the kernelGOOD too\n"
    assert (inserting / "linux.uml").read_text() == "the kernel"


@pytest.fixture
def standing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The base image in a cache that has no kernel; a double builds one at once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found: Path = image.image_path()
    found.parent.mkdir()
    found.write_text("the image")
    image.tree_path().mkdir()

    def build(scratch: Path, _report: image.Report) -> Path:
        (scratch / "made").mkdir()
        (scratch / "made/linux.uml").write_text("the kernel")
        return scratch / "made"

    monkeypatch.setattr(kernel, "_build", build)
    monkeypatch.setattr(kernel, "_locked_archive", lambda: None)
    return found


def test_a_kernel_that_is_missing_beside_its_image_is_built_and_the_image_kept(standing: Path) -> None:
    assert image.base_image(print) == standing
    assert (kernel.folder(standing.parent) / "linux.uml").read_text() == "the kernel"
    assert standing.read_text() == "the image"


def archive(folder: Path, recipe: str) -> Path:
    """An archive as the mirror folder has it, of a kernel with this recipe."""
    built = folder / f"lab-kernel-{recipe}"
    built.mkdir()
    (built / "linux.uml").write_text("the archive's kernel")
    packed = folder / "kernel.tar"
    subprocess.run(["tar", "-C", folder, "-cf", packed, built.name], check=True)
    return packed


@pytest.mark.parametrize(
    ("recipe", "program"),
    [(kernel.recipe(), "the archive's kernel"), ("000000000000", "the kernel")],
    ids=["its own recipe", "another recipe"],
)
def test_a_kernel_of_the_lock_is_taken_if_it_has_the_recipe(
    standing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, program: str
) -> None:
    packed = archive(tmp_path, recipe)
    monkeypatch.setattr(kernel, "_locked_archive", lambda: packed)
    image.base_image(print)
    assert (kernel.folder(standing.parent) / "linux.uml").read_text() == program


def test_a_kernel_that_is_missing_beside_its_image_needs_room(
    standing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = cast("Machine", SimpleNamespace(kind="kernel", exists=lambda: True))
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1 << 30))
    with pytest.raises(NoSpace, match=rf"{standing.parent} needs 3072 MiB, 1024 MiB are free"):
        requirements.require_space(tmp_path, [host])
    image.base_image(print)
    requirements.require_space(tmp_path, [host])
