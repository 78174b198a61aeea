"""Deduplication: each document has keys, and is dropped if it shares one with an earlier document.

For exact duplicates the key is the hash of the text; for near duplicates there is a key per MinHash band. The keys of a shard
are sorted, so that one range of keys can be read from every shard: memory is bounded by the size of a range, regardless of the
amount of text. Keys have 64 bits: among n of them two are equal by chance with probability n**2 / 2**65, which is 3e-5 for
33 million documents.

"Earlier" is by shard and position. The earlier document of a pair may itself be dropped: of a chain of near duplicates only
the first is kept. The result does not depend on how the ranges are divided.
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
PAIR = 40  # bytes of memory per key while a range is compared


def exact_key(document: Document) -> Keys:
    """The first 64 bits of the hash of a document's text; for a conversation, of its roles and contents."""
    messages = document.metadata.get("messages")
    content = document.text if messages is None else json.dumps(messages, sort_keys=True)
    return numpy.frombuffer(hashlib.sha256(content.encode()).digest()[:8], "<u8").astype(numpy.uint64)


class Sign:
    """The step that writes the sorted keys of a shard's documents. It drops none."""

    name = "sign"

    def __init__(self, keys: Callable[[Document], Keys], bands: int, directory: Path) -> None:
        self.keys, self.bands, self.directory = keys, bands, directory

    def __call__(self, docs: Docs, rank: int = 0, world_size: int = 1) -> Docs:
        signatures: list[Keys] = []
        ids: list[str] = []
        for document in docs:
            signatures.append(self.keys(document))
            ids.append(document.id)
            yield document
        directory = self.directory / f"{rank:05d}"
        directory.mkdir(parents=True, exist_ok=True)
        keys = numpy.stack(signatures, axis=1) if signatures else numpy.empty((self.bands, 0), numpy.uint64)
        places = numpy.argsort(keys, axis=1, kind="stable")
        numpy.save(directory / KEYS, numpy.take_along_axis(keys, places, axis=1))
        numpy.save(directory / PLACES, places.astype(numpy.uint32))
        (directory / IDS).write_text(json.dumps(ids, ensure_ascii=False))


def ranges_of(documents: int, memory: int) -> int:
    """The number of ranges to divide the keys into, so that each needs at most `memory` bytes."""
    return max(1, -(-documents * PAIR // memory))


def same_keys(directory: Path, signed: list[Path], band: int, part: int, parts: int) -> Result:
    """For one band and range of keys: the documents that share a key with an earlier one, and the earliest with that key."""
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
            # A document's number consists of its shard and its position among those that were signed in it.
            numbers.append((numpy.uint64(shard) << numpy.uint64(32)) | places.astype(numpy.uint64))
    pairs: Keys = numpy.empty((0, 2), numpy.uint64)
    if keys:
        key, number = numpy.concatenate(keys), numpy.concatenate(numbers)
        order = numpy.lexsort((number, key))
        key, number = key[order], number[order]
        first = numpy.concatenate(([True], key[1:] != key[:-1]))
        earliest = number[numpy.flatnonzero(first)][numpy.cumsum(first) - 1]
        pairs = numpy.stack([number[~first], earliest[~first]], axis=1)
    # Sorted by document, so that those of one shard can be read alone.
    pairs = pairs[numpy.argsort(pairs[:, 0], kind="stable")]
    numpy.save(directory / "pairs.npy", pairs)
    return {"pairs": len(pairs), "sha256": sha256_of(directory / "pairs.npy")}


def originals(directory: Path, signed: list[Path], sources: list[Path], shard: int) -> Result:
    """For one shard: the ids of the documents to drop, and the id of the earliest duplicate of each."""
    low, high = (numpy.uint64(each << 32) for each in (shard, shard + 1))
    earliest: dict[int, int] = {}
    for source in sources:
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
    """The step that drops what `originals` found. Its input has to be that of `Sign`."""

    def __init__(self, name: str, directories: Mapping[int, Path], rejects: Rejects) -> None:
        self.name, self.directories, self.rejects = name, directories, rejects

    def __call__(self, docs: Docs, rank: int = 0, world_size: int = 1) -> Docs:
        drops: dict[str, Any] = json.loads((self.directories[rank] / "drops.json").read_text())
        with self.rejects.of(self.name, rank) as reject:
            for place, document in enumerate(docs):
                original = drops.get(str(place))
                if original is None:
                    yield document
                else:
                    reject(document, f"{self.name}_duplicate", f"the same as {original}")
