"""Which of Debian's kernels the lab is built of, and when."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from lab import image, kernel, requirements
from lab.errors import LabError, NoSpace


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
    changed.write_text(kernel.CHANGES.read_text(encoding="ascii") + "CONFIG_MORE=y\n", encoding="ascii")
    monkeypatch.setattr(kernel, "CHANGES", changed)
    assert kernel.folder(tmp_path) != before


@pytest.fixture
def standing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The base image in a cache that has no kernel; a double builds one at once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = image.base_image_path()
    found.parent.mkdir()
    found.write_text("the image")

    def build(scratch: Path, _report: image.Report) -> Path:
        (scratch / "made").mkdir()
        (scratch / "made/linux.uml").write_text("the kernel")
        return scratch / "made"

    monkeypatch.setattr(kernel, "_build", build)
    return found


def test_a_kernel_that_is_missing_beside_its_image_is_built_and_the_image_kept(standing: Path) -> None:
    assert image.base_image(print) == standing
    assert (kernel.folder(standing.parent) / "linux.uml").read_text() == "the kernel"
    assert standing.read_text() == "the image"


def test_a_kernel_that_is_missing_beside_its_image_needs_room(
    standing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1 << 30))
    with pytest.raises(NoSpace, match=rf"{standing.parent} needs 3072 MiB, 1024 MiB are free"):
        requirements.require_space(tmp_path, [])
    image.base_image(print)
    requirements.require_space(tmp_path, [])
