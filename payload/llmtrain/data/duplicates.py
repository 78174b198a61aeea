"""Duplicates: each document has a few keys, and one that shares a key with an earlier document goes.

Exact ones have one key, the hash of the text; near ones have one for each band of MinHash. A shard's keys are kept sorted, so
that a range of keys can be read from every shard without the rest: memory is bounded by the size of a range, however much
text there is. Keys have 64 bits: two different ones among n are equal by chance with probability n**2 / 2**65, which is
3e-5 for 33 million documents.

"Earlier" is by shard and place. Only the earlier one of a pair must be there, not be kept: of a chain of likenesses the first
goes on alone. What is found does not depend on how ranges are cut.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from llmcore.files import sha256_of
from llmtrain.data.documents import Docs, Document, Rejects
from llmtrain.data.work_directory import Result

Keys = NDArray[numpy.uint64]
KEYS, PLACES, IDS = "keys.npy", "places.npy", "ids.json"
PAIR = 40  # bytes that a key needs in memory while a range is compared


def exact_key(document: Document) -> Keys:
    """The first 64 bits of the hash of what a document says; of a conversation also of who says it."""
    messages = document.metadata.get("messages")
    said = document.text if messages is None else json.dumps(messages, sort_keys=True)
    return numpy.frombuffer(hashlib.sha256(said.encode()).digest()[:8], "<u8").astype(numpy.uint64)


class Sign:
    """The step that writes down the keys of each document of a shard, sorted; all documents go on."""

    name = "sign"

    def __init__(self, keys: Callable[[Document], Keys], bands: int, directory: Path) -> None:
        self.keys, self.bands, self.directory = keys, bands, directory

    def __call__(self, docs: Docs, rank: int = 0, world_size: int = 1) -> Docs:
        found: list[Keys] = []
        ids: list[str] = []
        for document in docs:
            found.append(self.keys(document))
            ids.append(document.id)
            yield document
        directory = self.directory / f"{rank:05d}"
        directory.mkdir(parents=True, exist_ok=True)
        keys = numpy.stack(found, axis=1) if found else numpy.empty((self.bands, 0), numpy.uint64)
        places = numpy.argsort(keys, axis=1, kind="stable")
        numpy.save(directory / KEYS, numpy.take_along_axis(keys, places, axis=1))
        numpy.save(directory / PLACES, places.astype(numpy.uint32))
        (directory / IDS).write_text(json.dumps(ids, ensure_ascii=False))


def ranges_of(documents: int, memory: int) -> int:
    """Into how many ranges the keys are cut, so that one of them needs at most `memory` bytes."""
    return max(1, -(-documents * PAIR // memory))


def same_keys(directory: Path, signed: list[Path], band: int, part: int, parts: int) -> Result:
    """Of one band and range of keys: each document that has an earlier one's key, and the earliest that has it."""
    low, high = ((2**64 * each) // parts for each in (part, part + 1))
    keys: list[Keys] = []
    numbers: list[NDArray[numpy.uint64]] = []
    for shard, source in enumerate(signed):
        sorted_keys = numpy.load(source / KEYS, mmap_mode="r")[band]
        begin = int(numpy.searchsorted(sorted_keys, numpy.uint64(low)))
        end = (
            len(sorted_keys)
            if part == parts - 1
            else int(numpy.searchsorted(sorted_keys, numpy.uint64(high)))
        )
        if begin < end:
            places = numpy.load(source / PLACES, mmap_mode="r")[band, begin:end]
            keys.append(numpy.array(sorted_keys[begin:end]))
            # A document's number: its shard, and its place among those that were signed in it.
            numbers.append((numpy.uint64(shard) << numpy.uint64(32)) | places.astype(numpy.uint64))
    pairs: Keys = numpy.empty((0, 2), numpy.uint64)
    if keys:
        key, number = numpy.concatenate(keys), numpy.concatenate(numbers)
        order = numpy.lexsort((number, key))
        key, number = key[order], number[order]
        first = numpy.concatenate(([True], key[1:] != key[:-1]))
        earliest = number[numpy.flatnonzero(first)][numpy.cumsum(first) - 1]
        pairs = numpy.stack([number[~first], earliest[~first]], axis=1)
    # By document, so that a shard's own can be read without the rest.
    pairs = pairs[numpy.argsort(pairs[:, 0], kind="stable")]
    numpy.save(directory / "pairs.npy", pairs)
    return {"pairs": len(pairs), "sha256": sha256_of(directory / "pairs.npy")}


def originals(directory: Path, signed: list[Path], found: list[Path], shard: int) -> Result:
    """For one shard: which of its documents go, by id, and the id of the earliest that each is the same as."""
    low, high = (numpy.uint64(each << 32) for each in (shard, shard + 1))
    earliest: dict[int, int] = {}
    for source in found:
        pairs = numpy.load(source / "pairs.npy", mmap_mode="r")
        begin, end = (int(numpy.searchsorted(pairs[:, 0], each)) for each in (low, high))
        for number, original in pairs[begin:end].tolist():
            earliest[number] = min(original, earliest.get(number, original))
    ids: dict[int, list[str]] = {}
    drops: dict[str, str] = {}
    for number, original in sorted(earliest.items(), key=lambda pair: pair[1] >> 32):
        of_shard = original >> 32
        if of_shard not in ids:
            ids = {of_shard: json.loads((signed[of_shard] / IDS).read_text())}
        drops[str(number & 0xFFFFFFFF)] = ids[of_shard][original & 0xFFFFFFFF]
    (directory / "drops.json").write_text(json.dumps(drops, sort_keys=True, ensure_ascii=False))
    return {"drops": len(drops), "sha256": sha256_of(directory / "drops.json")}


class Drop:
    """The step that lets go what `originals` found. It has to see the documents that `Sign` saw."""

    def __init__(self, name: str, found: Mapping[int, Path], rejects: Rejects) -> None:
        self.name, self.found, self.rejects = name, found, rejects

    def __call__(self, docs: Docs, rank: int = 0, world_size: int = 1) -> Docs:
        drops: dict[str, Any] = json.loads((self.found[rank] / "drops.json").read_text())
        with self.rejects.of(self.name, rank) as reject:
            for place, document in enumerate(docs):
                original = drops.get(str(place))
                if original is None:
                    yield document
                else:
                    reject(document, f"{self.name}_duplicate", f"the same as {original}")
