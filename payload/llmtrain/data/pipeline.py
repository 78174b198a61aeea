"""`llm-train data run`: all steps over all shards; a result is only recomputed if its input, options or code changed."""

import unicodedata
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

from llmcore import detectors
from llmcore.config import Section
from llmcore.files import sha256_of
from llmtrain.data import (
    annotate,
    chat,
    clean,
    cleaning_rules,
    decontaminate,
    documents,
    duplicates,
    minhash,
    pack,
    personal_data,
    quality,
    read,
    rows,
    shards,
    sources,
    tokenization,
    words,
)
from llmtrain.data.documents import Docs, Document, Rejects
from llmtrain.data.output import publish
from llmtrain.data.settings import Decontaminate, Settings
from llmtrain.data.shards import Shard, Step
from llmtrain.data.sources import Piece, Stamp
from llmtrain.data.work_directory import Found, Result, Task, Work, code_of, key_of, working
from llmtrain.exits import Refusal


class Pipeline:
    """One run: each method applies a step to the shards that the previous step returned."""

    def __init__(self, settings: Settings, work: Work) -> None:
        self.settings, self.work = settings, work
        self.results_by_step: dict[str, Found] = {}  # directories and results by step
        self.learned_from: set[str] = set()  # the sha256 of each input file that is one piece

    def results(self, tasks: list[Task]) -> Found:
        """The results of one step's tasks, recorded for the report."""
        results = self.work.results(tasks)
        if tasks:
            self.results_by_step[tasks[0].step] = results
        return results

    def read(self) -> list[Shard]:
        """Read and clean the raw files."""
        settings = self.settings
        groups = sources.shards_of(settings.inputs, settings.reading.shard_mb)
        stamps = [[piece.stamp() for piece in group] for group in groups]
        weights = [sum(piece.end - piece.start for piece in group) for group in groups]
        hashing = []
        for group, stamp, weight in zip(groups, stamps, weights, strict=True):
            key = key_of([(str(piece.path), piece.start, piece.end) for piece in group], stamp)
            hashing.append(Task("hash", key, weight, hash_pieces, (group,)))
        hashes = [result["sha256"] for _, result in self.work.results(hashing)]
        for group, stamped, hashed in zip(groups, stamps, hashes, strict=True):
            self.learned_from |= {
                digest
                for piece, (_, size, *_), digest in zip(group, stamped, hashed, strict=True)
                if (piece.start, piece.end) == (0, size)
            }
        code = code_of(documents, sources, read, clean, cleaning_rules, shards)
        tasks = []
        for number, group in enumerate(groups):
            input_settings = settings.inputs[group[0].input].model_dump(exclude={"path"})
            options = [
                settings.reading.model_dump(),
                settings.clean.model_dump(),
                settings.reject_text,
                input_settings,
            ]
            content = [(str(piece.path), piece.format, piece.start) for piece in group]
            key = key_of(code, unicodedata.unidata_version, options, content, hashes[number])
            arguments = (settings, group, stamps[number], number, len(groups))
            tasks.append(Task("clean", key, weights[number], read_and_clean, arguments))
        return [
            Shard(number, path, (), result["sha256"], result["count"], result["size"])
            for number, (path, result) in enumerate(self.results(tasks))
        ]

    def map(
        self,
        name: str,
        make: Callable[..., Step],
        modules: tuple[ModuleType, ...],
        before: list[Shard],
        arguments: Callable[[Shard], tuple[Any, ...]],
        content: Callable[[Shard], Any],
        keys: tuple[str, ...] | None = (),
    ) -> list[Shard]:
        """Apply the step `make(*arguments, rejects)` to each shard. `content` identifies the arguments in the cache key;
        `keys` is the metadata that the step sets, or None if it changes text.
        """
        code = code_of(*modules, documents, shards)
        tasks = []
        for shard in before:
            key = key_of(code, content(shard), self.settings.reject_text, shard.digest)
            task_arguments = (make, arguments(shard), self.settings.reject_text, shard, len(before), keys)
            tasks.append(Task(name, key, shard.size, shards.apply, task_arguments))
        after = []
        for shard, (path, result) in zip(before, self.results(tasks), strict=True):
            base, notes, digest = (path, (), result["sha256"]) if keys is None else (
                shard.base, (*shard.notes, path), key_of(shard.digest, result["sha256"])
            )  # fmt: skip
            after.append(Shard(shard.number, base, notes, digest, result["count"], result["size"]))
        return after

    def each(
        self,
        name: str,
        make: Callable[..., Step],
        modules: tuple[ModuleType, ...],
        before: list[Shard],
        options: Section,
        keys: tuple[str, ...] | None = (),
    ) -> list[Shard]:
        """Apply a step whose only argument is its section of the settings."""
        content = options.model_dump(mode="json")
        return self.map(name, make, modules, before, lambda _: (options,), lambda _: content, keys)

    def annotate(self, before: list[Shard]) -> list[Shard]:
        """Annotate domain and language."""
        options = self.settings.annotate
        content = annotate.digest(options)
        make = annotate.Annotate
        return self.map(
            "annotate", make, (annotate,), before, lambda _: (options,), lambda _: content, annotate.NOTED
        )

    def decontaminate(self, before: list[Shard], options: Decontaminate) -> list[Shard]:
        """Drop documents that contain a part of the evaluation set."""
        reading = self.settings.reading
        group = [piece for each in sources.shards_of(options.against, reading.shard_mb) for piece in each]
        content = [options.model_dump(), reading.model_dump(), [(str(p.path), p.sha256()) for p in group]]
        key = key_of(code_of(decontaminate, words, read), content)
        weight = sum(piece.end - piece.start for piece in group)
        task = Task("evaluation-set", key, weight, decontaminate.index, (options, reading, group))
        [(directory, result)] = self.results([task])
        return self.map(
            "decontaminate",
            decontaminate.Decontaminate,
            (decontaminate,),
            before,
            lambda _: (directory,),
            lambda _: [result["sha256"], code_of(words)],
        )

    def duplicates(
        self,
        name: str,
        keys: Callable[[Document], duplicates.Keys],
        bands: int,
        options: Any,
        before: list[Shard],
    ) -> list[Shard]:
        """Drop documents that share a key with an earlier one."""
        code = code_of(duplicates, documents, shards)
        memory = self.settings.duplicates.memory_mb << 20
        signing = [
            Task(f"{name}-keys", key_of(code, options, s.digest), s.size, sign, (keys, bands, s))
            for s in before
        ]
        signed = self.results(signing)
        folders = [path / str(result["folder"]) for path, result in signed]
        digests = [result["sha256"] for _, result in signed]
        count = sum(shard.count for shard in before)
        parts = duplicates.ranges_of(count, memory)
        comparing = [
            Task(
                f"{name}-same",
                key_of(code, digests, band, part, parts),
                count,
                duplicates.same_keys,
                (folders, band, part, parts),
            )
            for band in range(bands)
            for part in range(parts)
        ]
        same = self.results(comparing)
        pairs = [path for path, _ in same]
        pair_digests = [result["sha256"] for _, result in same]
        looking = [
            Task(
                f"{name}-drops",
                key_of(code, digests, pair_digests, shard.number),
                shard.count,
                duplicates.originals,
                (folders, pairs, shard.number),
            )
            for shard in before
        ]
        drops = self.results(looking)
        return self.map(
            name,
            duplicates.Drop,
            (duplicates,),
            before,
            lambda shard: (name, {shard.number: drops[shard.number][0]}),
            lambda shard: [name, drops[shard.number][1]["sha256"]],
        )

    def tokenize(self, before: list[Shard]) -> Found:
        """Tokenize each shard."""
        model = self.settings.tokenizer
        code = code_of(tokenization, chat, documents, shards)
        versions = [version("tokenizers"), version("transformers"), tokenization.digest(model)]
        tasks = [
            Task(
                "tokenize",
                key_of(code, versions, self.settings.reject_text, shard.digest),
                shard.size,
                tokenization.tokenize,
                (model, self.settings.reject_text, shard),
            )
            for shard in before
        ]
        return self.results(tasks)

    def pack(self, tokenized: Found) -> Found:
        """Pack rows, into one file for every few shards of tokens."""
        options = self.settings.pack
        pad = tokenized[0][1]["pad"]
        code = code_of(pack, rows, documents)
        groups: list[Found] = [[]]
        for path, result in tokenized:
            if sum(each["tokens"] for _, each in groups[-1]) >= options.shard_tokens:
                groups.append([])
            groups[-1].append((path, result))
        tasks = []
        for number, group in enumerate(groups):
            content = [result["sha256"] for _, result in group]
            weight = sum(result["tokens"] for _, result in group)
            arguments = (options, pad, number, [path for path, _ in group])
            tasks.append(
                Task("pack", key_of(code, options.model_dump(), pad, content), weight, pack.pack, arguments)
            )
        return self.results(tasks)


def hash_pieces(directory: Path, group: list[Piece]) -> Result:
    """The sha256 of each piece of a shard."""
    return {"sha256": [piece.sha256() for piece in group]}


def read_and_clean(
    directory: Path, settings: Settings, group: list[Piece], stamps: list[Stamp], number: int, world_size: int
) -> Result:
    """The first step of a shard. Raises Refusal if a file changed after it was hashed."""
    rejects = Rejects(directory, settings.reject_text)
    docs = read.Read(settings.inputs, settings.reading, rejects)(group, number, world_size)
    result = shards.rewritten(directory, clean.Clean(settings.clean, rejects)(docs, number, world_size))
    for piece, stamp in zip(group, stamps, strict=True):
        if piece.stamp() != stamp:
            raise Refusal(f"{piece.path} changed while it was read: run again when nothing writes to it")
    return result


def sign(directory: Path, keys: Callable[[Document], duplicates.Keys], bands: int, shard: Shard) -> Result:
    """Write the keys of a shard's documents."""
    docs: Docs = duplicates.Sign(keys, bands, directory)(shard.documents(), shard.number)
    count = sum(1 for _ in docs)
    folder = directory / f"{shard.number:05d}"
    digests = [sha256_of(folder / name) for name in (duplicates.KEYS, duplicates.PLACES, duplicates.IDS)]
    return {"count": count, "folder": folder.name, "sha256": digests}


def run(settings: Settings, workers: int, prune: bool) -> dict[str, Any]:
    """Build the data set in `output`; return the report. Raises Refusal."""
    with working(settings.work, workers) as work:
        pipeline = Pipeline(settings, work)
        remaining = pipeline.read()
        remaining = pipeline.annotate(remaining)
        if settings.quality is not None:
            remaining = pipeline.each("quality", quality.Quality, (quality,), remaining, settings.quality)
        if settings.personal is not None:
            remaining = pipeline.each(
                "personal",
                personal_data.Personal,
                (personal_data, detectors),
                remaining,
                settings.personal,
                None,
            )
        if settings.duplicates.exact:
            remaining = pipeline.duplicates("exact", duplicates.exact_key, 1, [], remaining)
        if near := settings.duplicates.near:
            options = [near.model_dump(), code_of(minhash, words)]
            remaining = pipeline.duplicates(
                "near", partial(minhash.near_keys, near), near.bands, options, remaining
            )
        if settings.decontaminate is not None:
            remaining = pipeline.decontaminate(remaining, settings.decontaminate)
        packed = pipeline.pack(pipeline.tokenize(remaining))
        report = publish(settings, pipeline.results_by_step, packed, pipeline.learned_from)
        if prune:
            work.prune()
        return report
