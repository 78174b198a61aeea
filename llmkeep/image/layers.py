"""The layers of an image. Layers below our code are cached by their inputs until others replace them.

A change of our code therefore rebuilds only the last layer, and hosts fetch only that one.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from llmkeep.bundle import cache
from llmkeep.image import archive, contents
from llmkeep.image.archive import Layer
from llmkeep.image.contents import Source

# Environments and roles (of artifacts.yml) by variant. GPUs compute for vLLM alone; our engines' torch and numpy are Debian's.
VARIANTS = {
    "cpu": ([contents.OWN], ["image", "llm_serving"]),
    "cuda": ([contents.OWN, "vllm"], ["image", "llm_serving", "vllm"]),
}
# A layer that was made by other code is made anew.
RECIPE = [Path(file).read_text() for file in (archive.__file__, contents.__file__, contents.ENTER)]


@dataclass(frozen=True)
class Made:
    """A layer, as a folder of added files and as an archive."""

    layer: Layer
    tree: Path
    blob: Path


def make(source: Source, folder: Path) -> list[Made]:
    """The layers from bottom to top. FOLDER, on the cache's file system, takes what is not cached."""
    packages = [source.sha256(contents.PACKAGES_INDEX), source.packages, source.epoch]
    debian = _cached("debian", packages, source, lambda tree: contents.debian(source, tree))
    layers = [debian]
    for each in source.environments:
        made_of = [debian.layer.diff_id, source.requirements(each, ours=False)]
        fill = partial(contents.wheels, source, each, below=[debian.tree])
        layers.append(_cached("wheels" if each == contents.OWN else each, made_of, source, fill))
    if source.has(contents.OPA):
        programs = [source.sha256(contents.OPA), source.epoch]
        layers.append(_cached("programs", programs, source, lambda tree: contents.programs(source, tree)))
    for stale in debian.blob.parent.parent.glob(f"{_prefix(source)}-*"):
        if stale not in {made.blob.parent for made in layers}:
            shutil.rmtree(stale)
    trees = [each.tree for each in layers[:2]]  # Debian's packages, and the environment that our wheels join
    code = _made("code", folder, source, lambda tree: contents.code(source, tree, trees))
    return [*layers, code]


def _prefix(source: Source) -> str:
    """The common prefix of names of a variant's cached layers."""
    return "+".join(source.environments)


def _cached(name: str, made_of: object, source: Source, fill: Callable[[Path], None]) -> Made:
    """A layer from the cache; it is built if there is none with these inputs, or if its archive is damaged."""
    key = hashlib.sha256(json.dumps([RECIPE, made_of]).encode()).hexdigest()[:32]
    place = cache.home() / "image" / f"{_prefix(source)}-{name}-{key}"
    place.parent.mkdir(exist_ok=True)
    facts, blob = place / "layer.json", place / "layer.tar.gz"
    layer = Layer(**json.loads(facts.read_text())) if facts.exists() else None
    if not layer or layer.digest != f"sha256:{cache.sha256(blob)}":
        shutil.rmtree(place, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=place.parent) as aside:
            made = _made(name, Path(aside), source, fill)
            layer = made.layer
            (made.tree.parent / "layer.json").write_text(json.dumps(asdict(layer)))
            made.tree.parent.rename(place)
    return Made(layer, place / "tree", blob)


def _made(name: str, folder: Path, source: Source, fill: Callable[[Path], None]) -> Made:
    tree, blob = folder / name / "tree", folder / name / "layer.tar.gz"
    tree.mkdir(parents=True)
    fill(tree)
    return Made(archive.write(name, tree, blob, source.epoch), tree, blob)
