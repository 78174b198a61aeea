"""Which layers a variant has, what each lies on, and which of them stay in the cache. What fills them is small here."""

from pathlib import Path

import pytest

from llmkeep.bundle import manifest
from llmkeep.bundle.manifest import Entry, Manifest
from llmkeep.image import contents, layers
from llmkeep.image.contents import Source


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """Two environments of a wheel each, OPA, and a list of packages."""
    for path in (contents.PACKAGES_INDEX, contents.OPA):
        (tmp_path / "bundle" / path).parent.mkdir(parents=True)
        (tmp_path / "bundle" / path).touch()
    for each in contents.VENVS:
        folder = tmp_path / "bundle/wheels" / each
        folder.mkdir(parents=True)
        (folder / "requirements.txt").write_text(f"{each}==1 --hash=sha256:{digest(each)}\n")
    return tmp_path / "bundle"


def digest(environment: str) -> str:
    return environment.encode().hex().ljust(64, "0")


def source(bundle: Path, variant: str) -> Source:
    """What this bundle has for a variant."""
    environments, _ = layers.VARIANTS[variant]
    files = [Entry(path, 0, "0" * 64, "", "", "", "") for path in (contents.PACKAGES_INDEX, contents.OPA)]
    files += [
        Entry(f"wheels/{each}/{each}-1-py3-none-any.whl", 0, digest(each), "", "", "", f"pkg:pypi/{each}@1")
        for each in contents.VENVS
    ]
    return Source(
        bundle, Manifest(manifest.BUNDLE, 1, "gpu", "", "", "", "", "", files), environments, [variant], 0
    )


@pytest.fixture
def filled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, list[str]]:
    """What each environment, and our code, was put on: names of the files that are below it."""
    seen: dict[str, list[str]] = {}

    def fill(name: str, tree: Path, below: list[Path]) -> None:
        (tree / name).touch()
        seen[name] = sorted(path.name for folder in below for path in folder.iterdir())

    monkeypatch.setattr(contents, "debian", lambda _, tree: fill("debian", tree, []))
    monkeypatch.setattr(contents, "wheels", lambda _, name, tree, below: fill(name, tree, below))
    monkeypatch.setattr(contents, "programs", lambda _, tree: fill("programs", tree, []))
    monkeypatch.setattr(contents, "code", lambda _, tree, below: fill("code", tree, below))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return seen


def made(given: Source, folder: Path) -> list[str]:
    folder.mkdir()
    return [each.layer.name for each in layers.make(given, folder)]


def test_vllm_is_a_layer_of_variant_cuda(bundle: Path, tmp_path: Path, filled: dict[str, list[str]]) -> None:
    names = made(source(bundle, "cuda"), tmp_path / "made")
    assert names == ["debian", "wheels", "vllm", "programs", "code"]
    assert filled["vllm"] == ["debian"]
    assert filled["code"] == ["debian", "serving"]


def test_variant_cpu_has_no_vllm(bundle: Path, tmp_path: Path, filled: dict[str, list[str]]) -> None:
    assert made(source(bundle, "cpu"), tmp_path / "made") == ["debian", "wheels", "programs", "code"]
    assert "vllm" not in filled


def test_a_variant_leaves_the_others_layers_in_the_cache(
    bundle: Path, tmp_path: Path, filled: dict[str, list[str]]
) -> None:
    for number, variant in enumerate(("cuda", "cpu")):
        made(source(bundle, variant), tmp_path / f"made-{number}")
    filled.clear()
    made(source(bundle, "cuda"), tmp_path / "again")
    assert list(filled) == ["code"]


def test_other_wheels_of_vllm_make_that_layer_anew(
    bundle: Path, tmp_path: Path, filled: dict[str, list[str]]
) -> None:
    given = source(bundle, "cuda")
    made(given, tmp_path / "made")
    filled.clear()
    (bundle / "wheels/vllm/requirements.txt").write_text(f"vllm==1.1 --hash=sha256:{digest('vllm')}\n")
    made(given, tmp_path / "again")
    assert sorted(filled) == ["code", "vllm"]
    assert len(list((tmp_path / "cache/llmkeep/image").glob("serving+vllm-vllm-*"))) == 1
