"""The model files in a repository: an allow-list, and consistency checks between files. No file's content is executed."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, BinaryIO

from llmkeep.errors import printable
from llmkeep.models.refusal import DAMAGED, UNFIT, ModelRefused

CONFIG, CARD, WEIGHTS, INDEX = "config.json", "README.md", "model.safetensors", "model.safetensors.index.json"
TOKENIZER = "tokenizer_config.json"
LICENCE_TEXT = re.compile(r"(LICEN[CS]E|COPYING|NOTICE|USE_POLICY)([._-][A-Za-z0-9._-]*)?", re.IGNORECASE)
TEXT = re.compile(
    r"config\.json|generation_config\.json|README\.md|model\.safetensors\.index\.json"
    r"|tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json"
    r"|vocab\.(json|txt)|merges\.txt|[A-Za-z0-9._-]+\.model|[A-Za-z0-9._-]+\.jinja|chat_template\.json"
    r"|1_Pooling/config\.json"  # by which the engine of embeddings refuses another pooling than its own
)
SHARD = re.compile(r"[A-Za-z0-9._-]+-of-[0-9]+\.safetensors")
TENSORS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack")
MOST = 64 << 20  # bytes of a file that is no weights
DEEPEST = 100  # levels of JSON
PARSED = 16 << 20  # bytes of a file that is parsed here, or of a shard's header


@dataclass(frozen=True)
class File:
    """A file of a source. `size` in bytes; `sha256` and `blob` (git's SHA-1) as the source states them, or None."""

    path: str
    size: int
    sha256: str | None = None
    blob: str | None = None


def is_text(path: str) -> bool:
    """Whether a file is accepted whatever the weights are."""
    return bool(TEXT.fullmatch(path)) or is_licence(path)


def is_licence(path: str) -> bool:
    """Whether a file name is that of a licence text."""
    return bool(LICENCE_TEXT.fullmatch(path)) and Path(path).suffix.lower() in {"", ".md", ".txt"}


def texts(files: Iterable[File]) -> list[File]:
    """The files of the allow-list that are not weights; refuses a repository without a model that can be loaded safely."""
    files = list(files)
    names = {file.path for file in files}
    if not any(TENSORS.fullmatch(name) for name in names):
        pickles = sorted(name for name in names if name.endswith(PICKLES))
        what = (
            f"only {', '.join(map(printable, pickles[:3]))}, which can run code" if pickles else "no weights"
        )
        raise ModelRefused(
            UNFIT,
            f"it has {what}, and no *.safetensors: use a repository that has them, or convert it elsewhere",
        )
    if CONFIG not in names:
        what = "adapter_config.json: it is an adapter" if "adapter_config.json" in names else f"no {CONFIG}"
        raise ModelRefused(
            UNFIT, f"it has {what}, but no complete model: give the repository of the complete model"
        )
    taken = [file for file in files if is_text(file.path)]
    for file in taken:
        if file.size > MOST:
            raise ModelRefused(
                UNFIT,
                f"{file.path} has {file.size} bytes, but at most {MOST} are read: this is not a valid file of its kind",
            )
    return taken


def weights(files: Iterable[File], index: dict[str, set[str]] | None) -> list[File]:
    """The files of weights that the index names, or model.safetensors where there is none."""
    tensors = {file.path: file for file in files if TENSORS.fullmatch(file.path)}
    shards = set(index) if index is not None else {WEIGHTS}
    if absent := sorted(shards - tensors.keys()):
        names = INDEX if index is not None else "the model"
        raise ModelRefused(
            DAMAGED,
            f"{names} wants {absent[0]} ({len(absent)} files), which is missing: download the complete model",
        )
    if unnamed := sorted(name for name in tensors.keys() - shards if SHARD.fullmatch(name)):
        where = f"{INDEX} does not name it" if index is not None else f"there is no {INDEX}"
        raise ModelRefused(
            DAMAGED,
            f"{unnamed[0]} ({len(unnamed)} files) is a shard, but {where}: download the complete model again",
        )
    return [tensors[name] for name in sorted(shards)]


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    if (size := path.stat().st_size) > PARSED:
        raise ModelRefused(
            UNFIT,
            f"{path.name} has {size} bytes, but at most {PARSED} are read: this is not a valid file of its kind",
        )
    text = path.read_bytes()
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelRefused(DAMAGED, f"{path.name} is not JSON ({error}): get the model again") from error
    if not isinstance(content, dict):
        shown = text[:60].decode(errors="replace")
        raise ModelRefused(DAMAGED, f"{path.name} is {shown!r}, not a JSON object: download the model again")
    return content


def read_index(path: Path) -> dict[str, set[str]]:
    """The tensors of each shard, according to the index."""
    tensors_of: dict[str, set[str]] = {}
    mapped = read_object(path).get("weight_map")
    if not isinstance(mapped, dict) or not mapped:
        raise ModelRefused(DAMAGED, f"{path.name} has no weight_map: get the model again")
    for tensor, shard in mapped.items():
        if not isinstance(shard, str) or not TENSORS.fullmatch(shard):
            raise ModelRefused(
                DAMAGED,
                f"{path.name} names the shard {str(shard)[:80]!r}, but a shard must be a file beside it: do not use "
                "this model",
            )
        tensors_of.setdefault(shard, set()).add(tensor)
    return tensors_of


def check_weights(stream: BinaryIO, name: str, size: int, tensors: set[str] | None) -> None:
    """Check that a weight file has the length in its header and the tensors that the index expects in it."""
    count = int.from_bytes(stream.read(8), "little")
    try:
        if not 2 <= count <= min(PARSED, size - 8):
            raise ValueError(f"a header of {count} bytes")
        header = json.loads(stream.read(count))
        header.pop("__metadata__", None)
        end = 8 + count + max(item["data_offsets"][1] for item in header.values())
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise ModelRefused(
            DAMAGED, f"{name} is not a safetensors file ({error}): download it again"
        ) from error
    if end != size:
        raise ModelRefused(DAMAGED, f"{name} has {size} bytes, but its header says {end}: download it again")
    if absent := sorted((tensors or set()) - header.keys()):
        raise ModelRefused(
            DAMAGED,
            f"{name} lacks the tensor {absent[0]!r} ({len(absent)} in all), which {INDEX} expects in it: get the model again",
        )


def check_class(config: dict[str, Any]) -> None:
    """Check that the model's class is built into transformers: code from the repository is never run."""
    table = files("llmkeep.models").joinpath("transformers_classes.txt").read_text()
    classes = {kind: set(names) for kind, *names in map(str.split, table.splitlines())}
    kind, named = config.get("model_type"), config.get("architectures")
    if not isinstance(kind, str) or not isinstance(named, list) or not named:
        raise ModelRefused(
            UNFIT, f"{CONFIG} has model_type {kind!r} and architectures {named!r}: both are needed to load it"
        )
    for name in named:
        if not isinstance(name, str) or name not in classes.get(kind, ()):
            raise ModelRefused(
                UNFIT,
                f"{CONFIG} wants {str(name)[:80]!r} for model_type {kind[:80]!r}, which is not built into transformers: its "
                "code would have to come from the repository, and such code is never run. Use another model",
            )


def without_code(content: Any, depth: int = 0) -> Any:
    """The same JSON without any `auto_map`, which names code in the repository."""
    if depth > DEEPEST:
        raise ModelRefused(
            UNFIT,
            f"its configuration is nested more than {DEEPEST} levels deep: it is not a model's configuration",
        )
    if isinstance(content, dict):
        return {key: without_code(value, depth + 1) for key, value in content.items() if key != "auto_map"}
    if isinstance(content, list):
        return [without_code(value, depth + 1) for value in content]
    return content
