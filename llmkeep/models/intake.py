"""Import a model: copy it aside, check it, have its licence accepted, and put it in place as a release candidate."""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmcore.files import flush
from llmkeep import durable
from llmkeep.bundle import release
from llmkeep.bundle.cache import sha256
from llmkeep.models import contents, licence
from llmkeep.models.contents import File
from llmkeep.models.folder import Folder
from llmkeep.models.hub import Hub
from llmkeep.models.licence import Licence
from llmkeep.models.refusal import DAMAGED, LICENCE, SPACE, UNFIT, ModelRefused
from llmkeep.models.signature import Signature
from llmkeep.resumable import Resumable, TooLong

MARGIN = 64 << 20  # bytes of free space beyond the files


@dataclass(frozen=True)
class Taken:
    """A finished candidate. `digest`: sha256 of its manifest, which identifies its bytes."""

    name: str
    files: int
    size: int
    left_out: list[str]
    changed: list[str]
    licence: str
    digest: str


def add(
    source: Hub | Folder,
    into: Path,
    name: str | None,
    accept: Callable[[Licence, str], dict[str, Any]],
    licence_file: Path | None = None,
    stated: str | None = None,
    signed: Signature | None = None,
) -> Taken:
    """Make the candidate INTO from a source.

    `accept` gets the licence with its text, and returns the record of its acceptance.

    INTO appears complete or not at all. Files copied by an interrupted run stay in a hidden folder beside it, and the
    next run continues there; a refused model leaves nothing. `stated`: the licence's name, if the source knows it.
    `signed`: the files that the maker signed; additional and missing files are refused.
    """
    name = name or re.sub(r"[^a-z0-9.-]", "-", source.name.lower())
    if not release.NAME.fullmatch(name) or ".." in name:
        raise ModelRefused(
            UNFIT,
            f"the name is {name[:80]!r}: use lower-case letters, digits, dots and dashes, at most 63, with --name",
        )
    if into.exists() or into.is_symlink():
        raise ModelRefused(UNFIT, f"{into} exists: name a folder that does not")
    own_text = licence_file.read_bytes() if licence_file else None
    files = source.files()
    texts = contents.texts(files)
    needed = [*texts, *(file for file in files if contents.TENSORS.fullmatch(file.path))]
    if signed:
        signed.require_whole({file.path for file in files})
    with _working(into, source.source, needed) as aside:
        model = aside / "models" / name
        _keep_only(needed, aside, model)
        digests = dict(_copied(source, texts, model))
        if signed:
            signed.require(digests)
        changed = _without_code(model, digests)
        contents.check_class(contents.read_object(model / contents.CONFIG))
        index = contents.read_index(model / contents.INDEX) if contents.INDEX in digests else None
        weights = contents.weights(files, index)
        if own_text is not None:
            digests["LICENSE"] = _place_licence(own_text, model)
        agreed = licence.stated(model, stated)
        record = accept(agreed, (model / agreed.file).read_text(errors="replace"))
        for path, digest in _copied(source, weights, model):
            with (model / path).open("rb") as stream:
                contents.check_weights(
                    stream, path, os.fstat(stream.fileno()).st_size, index[path] if index else None
                )
            if signed:
                signed.require({path: digest})
            digests[path] = digest
        taken = {file.path for file in [*texts, *weights]}
        left_out = [file.path for file in files if file.path not in taken] + source.folders()
        provenance = {
            "format": 1,
            "source": source.source,
            "purl": source.purl,
            **source.facts,
            "checked_by": source.checked_by,
            **({"maker": {"key": signed.key, "signature": signed.sha256}} if signed else {}),
            "licence": record,
            "left_out": left_out,
            "changed": changed,
            "files": digests,
        }
        _write(model / release.PROVENANCE, provenance)
        digests[release.PROVENANCE] = sha256(model / release.PROVENANCE)
        sums = aside / "models" / f"{name}.sha256"
        text = "".join(f"{digest}  {path}\n" for path, digest in sorted(digests.items()))
        durable.write(sums, text.encode(), 0o644)
        size = sum((model / path).stat().st_size for path in digests)
        made = Taken(name, len(digests), size, left_out, list(changed), agreed.name, sha256(sums))
        durable.sync_all(aside)
        aside.rename(into)
        flush(aside.parent)
    return made


def _copied(source: Hub | Folder, files: list[File], model: Path) -> Iterator[tuple[str, str]]:
    """Copy the files; path and sha256 of each."""
    for file in files:
        path = model / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with Resumable(path, file.size) as target:
                source.copy(file, target)
        except TooLong as error:
            raise ModelRefused(DAMAGED, str(error)) from error
        path.chmod(0o644)
        yield file.path, target.digest()


def _place_licence(text: bytes, model: Path) -> str:
    """Write the licence given by the operator if the model has no licence text; returns its sha256."""
    if own := sorted(path.name for path in model.iterdir() if contents.is_licence(path.name)):
        raise ModelRefused(LICENCE, f"it has its own {own[0]}: omit --licence-file, and accept that")
    durable.write(model / "LICENSE", text, 0o644)
    return sha256(model / "LICENSE")


def _without_code(model: Path, digests: dict[str, str]) -> dict[str, Any]:
    """Remove `auto_map` from the model's JSON files; returns the changed files with their former sha256."""
    changed = {}
    for name in (contents.CONFIG, contents.TOKENIZER):
        content = contents.read_object(model / name) if name in digests else {}
        if (cleaned := contents.without_code(content)) != content:
            _write(model / name, cleaned)
            changed[name] = {"removed": "auto_map", "sha256_before": digests[name]}
            digests[name] = sha256(model / name)
    if contents.TOKENIZER in changed and "tokenizer.json" not in digests:
        raise ModelRefused(
            UNFIT,
            f"{contents.TOKENIZER} has auto_map and there is no tokenizer.json: its tokenizer is code in the repository, "
            "which is never run. Use a model with a tokenizer.json",
        )
    return changed


def _write(path: Path, content: dict[str, Any]) -> None:
    durable.write(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode(), 0o644)


def _keep_only(files: list[File], aside: Path, model: Path) -> None:
    """Keep the source's files from an earlier run, under the model's present name."""
    for other in [path for path in aside.glob("models/*/") if path != model]:
        other.rename(model)
    targets = {model / file.path for file in files}
    for path in [path for path in aside.rglob("*") if path.is_file() and path not in targets]:
        path.unlink()


# ---------------------------------------------------------------- aside
def check_space(folder: Path, size: int) -> Path:
    """Refuse if FOLDER cannot hold SIZE bytes, including those it has; returns its nearest existing parent."""
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    place = next(path for path in folder.parents if path.is_dir())
    needed, free = size - there + MARGIN, shutil.disk_usage(place).free
    if needed > free:
        raise ModelRefused(
            SPACE,
            f"{place} has {free / 1e9:.2f} GB free, the model takes {needed / 1e9:.2f} GB more: make room, or give "
            "another place with --into",
        )
    return place


@contextmanager
def _working(into: Path, source: str, files: list[File]) -> Iterator[Path]:
    """A folder beside INTO for this source and run, with room for the files.

    If the run is refused, it is removed unless the next run can continue in it. Folders of other sources are removed.
    """
    start = f".{into.name}.partial-"
    aside = into.absolute().with_name(start + hashlib.sha256(source.encode()).hexdigest()[:8])
    for other in aside.parent.iterdir() if aside.parent.is_dir() else ():
        if other.name.startswith(start) and other != aside:
            with durable.alone(other):
                shutil.rmtree(other)
    place = check_space(aside, sum(file.size for file in files))
    with durable.own(aside):
        fresh = not any(aside.rglob("*.safetensors"))
        try:
            yield aside
        except ModelRefused as refusal:
            # A licence that was misspelt costs no weights that an earlier run fetched.
            if not refusal.resumable and (fresh or refusal.code != LICENCE):
                shutil.rmtree(aside)
            raise
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise ModelRefused(
                SPACE,
                f"the disk of {place} is full ({error.strerror}): make room and run it again to continue, or remove the "
                f"partial copy {aside}",
            ) from error
