"""MANIFEST.json: the content of a bundle or of a model release, and its verification.

Verifying needs the standard library, `sqv` and no network; nothing of the bundle is executed. Each file has a
line of its own, `path` first, so that `bootstrap` can read it with sed on a host that has no JSON parser.

One key signs bundles and images, so each of these documents names its type, and a verifier demands the type it
expects. apt's InRelease, signed by the same key, keeps apt's format: it is not JSON, and JSON has none of the fields
that apt demands.
"""

import datetime
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmkeep.bundle import signing
from llmkeep.bundle.cache import sha256
from llmkeep.errors import LlmkeepError, Refused

NAME, SIGNATURE = "MANIFEST.json", "MANIFEST.json.sig"
BUNDLE, RELEASE = "bundle", "release"  # what a manifest is signed as
MEDIUM = "MEDIUM.json"  # on a medium of several: which one it is, see llmkeep.bundle.media
FORMAT = 1
SAFE_PATH = re.compile(r"[A-Za-z0-9._+~@%=,:-]+(/[A-Za-z0-9._+~@%=,:-]+)*")
SHA256 = re.compile(r"[0-9a-f]{64}")
TIME = "%Y-%m-%dT%H:%M:%SZ"

# Exit codes of `llmkeep bundle verify` and `join`, and of bootstrap.
UNSIGNED, DAMAGED, REPLAYED, EXPIRED, INCOMPLETE, FOREIGN = 3, 4, 5, 6, 7, 8
NO_TEXTS = {"format", "serial", "size", "files"}  # of a manifest and its entries


class BundleRefused(Refused):
    """The bundle, release or image must not be used."""


@dataclass(frozen=True)
class Entry:
    """One file of the bundle. `size` in bytes."""

    path: str
    size: int
    sha256: str
    media_type: str
    licence: str
    source: str
    purl: str


@dataclass
class Manifest:
    """A bundle's table of contents. `type`: its kind; `inputs_sha256` shows whether a rebuild would differ."""

    type: str
    serial: int
    profile: str
    created: str
    expires: str
    signer: str
    lock_sha256: str
    inputs_sha256: str
    files: list[Entry]
    format: int = FORMAT


def safe(path: str) -> bool:
    """Whether a path stays below its folder and needs no quoting in sh and sed."""
    return bool(SAFE_PATH.fullmatch(path)) and not {".", ".."} & set(path.split("/"))


def write(folder: Path, manifest: Manifest) -> None:
    """Write MANIFEST.json: a header, then one line a file, sorted by path."""
    for entry in manifest.files:
        if not safe(entry.path):
            raise LlmkeepError(
                f"the path {entry.path!r} cannot go into a bundle: use letters, digits and . _ + ~ - only"
            )
    header = {key: value for key, value in asdict(manifest).items() if key != "files"}
    rows = [asdict(entry) for entry in sorted(manifest.files, key=lambda entry: entry.path)]
    (folder / NAME).write_text(document(header, rows))


def document(header: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """JSON that sed can also read: each field of the header and each row is on its own line."""
    body = ",\n  ".join(map(json.dumps, rows))
    return json.dumps(header, indent=1)[:-2] + ',\n "files": [\n  ' + body + "\n ]\n}\n"


def read(folder: Path) -> Manifest:
    """Parse a manifest, without checking its signature."""
    try:
        return parse(folder, (folder / NAME).read_bytes())
    except FileNotFoundError as error:
        raise BundleRefused(
            DAMAGED, f"{folder} has no {NAME}: it is not a bundle or release, or is incomplete"
        ) from error


def parse(folder: Path, content: bytes) -> Manifest:
    """The manifest of `folder`, whose MANIFEST.json has this content."""
    try:
        return _parsed(folder, json.loads(content))
    except (ValueError, RecursionError) as error:
        raise BundleRefused(DAMAGED, f"{folder}/{NAME} cannot be read ({error}): fetch it again") from error


def _parsed(folder: Path, document: dict[str, Any]) -> Manifest:
    try:
        if document["format"] != FORMAT:
            raise BundleRefused(
                DAMAGED,
                f"{folder} has format {document['format']}, but this llmkeep reads {FORMAT}: use the llmkeep that "
                "came with it",
            )
        entries = [Entry(**entry) for entry in document.pop("files")]
        for entry in entries:
            if not (safe(entry.path) and type(entry.size) is int and SHA256.fullmatch(entry.sha256)):
                raise ValueError(f"the file {entry.path!r:.120} has no valid path, size or sha256")
        if type(document["serial"]) is not int:
            raise ValueError("its serial is not a number")
        # One of an earlier version has no type. It is read, for the files that it lists, and never verified.
        manifest = Manifest(**{"type": "", **document}, files=entries)
        for name, value in (item for each in (manifest, *entries) for item in vars(each).items()):
            if name not in NO_TEXTS and not isinstance(value, str):
                raise ValueError(f"its {name} is not a string")
        return manifest
    except (KeyError, TypeError, ValueError) as error:
        raise BundleRefused(DAMAGED, f"{folder}/{NAME} cannot be read ({error}): fetch it again") from error


def verify(
    folder: Path, keyring: Path, kind: str, highest: int = 0, now: datetime.datetime | None = None
) -> Manifest:
    """Signature, type, age, serial, then every byte. Raises BundleRefused; changes nothing.

    `kind`: BUNDLE or RELEASE. `highest`: the highest serial accepted here so far.
    """
    manifest = signed(folder, keyring, kind, highest, now)
    if (folder / MEDIUM).exists():
        raise BundleRefused(
            INCOMPLETE,
            f"{folder} is one medium of several: put them together with `llmkeep bundle join`",
        )
    check(folder, manifest.files, {NAME, SIGNATURE})
    return manifest


def highest_serial(record: Path) -> int:
    """The highest serial accepted here, read from RECORD; 0 if there is none."""
    text = record.read_text().strip() if record.exists() else "0"
    if not text.isdecimal():
        raise LlmkeepError(
            f"{record} holds {text[:40]!r}, which is not a serial: write the highest serial that you accepted into it"
        )
    return int(text)


def signed(
    folder: Path, keyring: Path, kind: str, highest: int = 0, now: datetime.datetime | None = None
) -> Manifest:
    """The manifest, with verified signature, type, age and serial. Raises BundleRefused."""
    manifest = authentic(folder, keyring, kind, highest)
    require_in_date(manifest.expires, now)
    return manifest


def authentic(folder: Path, keyring: Path, kind: str, highest: int = 0) -> Manifest:
    """The manifest, with verified signature, type and serial, whatever its age. Raises BundleRefused."""
    manifest = _parsed(folder, statement(folder, NAME, keyring, kind))
    require_serial(manifest.serial, highest, "use one with that serial or a later one")
    return manifest


def statement(folder: Path, name: str, keyring: Path, kind: str) -> dict[str, Any]:
    """The JSON of FOLDER/NAME, with its signature beside it; BundleRefused unless a key of the keyring signed it, as KIND.

    It is read once: a medium may answer differently the second time.
    """
    for path in (folder / name, folder / f"{name}.sig"):
        if not path.is_file():
            raise BundleRefused(UNSIGNED, f"{folder} lacks {path.name}: unsigned content is not used")
    content, signature = (folder / name).read_bytes(), (folder / f"{name}.sig").read_bytes()
    try:
        signer = signing.verify(keyring, folder / name, content, signature)
    except signing.SignatureRefused as error:
        raise BundleRefused(UNSIGNED, str(error)) from error
    try:
        document: dict[str, Any] = dict(json.loads(content))
    except (TypeError, ValueError, RecursionError) as error:
        raise BundleRefused(DAMAGED, f"{folder}/{name} cannot be read ({error}): fetch it again") from error
    if (stated := document.get("type", "")) != kind:
        raise BundleRefused(
            UNSIGNED,
            f"{folder}/{name} is signed as {stated!r}, but {kind!r} is needed: give one that was signed as that; "
            "if an earlier version omitted the type, build or sign it again",
        )
    if document.get("signer") != signer:
        raise BundleRefused(
            UNSIGNED,
            f"{folder}/{name} is signed by {signer}, but names the signer {document.get('signer')}: it is not its "
            "builder's original",
        )
    return document


def require_serial(serial: int, highest: int, way_out: str) -> None:
    """Raise BundleRefused for an older serial than HIGHEST, the highest that was accepted here."""
    if serial < highest:
        raise BundleRefused(
            REPLAYED, f"serial {serial} is older than {highest}, which was accepted before: {way_out}"
        )


def require_in_date(expires: str, now: datetime.datetime | None = None) -> None:
    """Raise BundleRefused if it has expired, at NOW or by the clock."""
    moment = (now or datetime.datetime.now(datetime.UTC)).strftime(TIME)
    if moment >= expires:
        raise BundleRefused(
            EXPIRED,
            f"it expired at {expires}, and the clock says {moment}: set the clock, or use a newer one",
        )


def check(folder: Path, entries: Iterable[Entry], beside: set[str]) -> None:
    """Raise BundleRefused unless FOLDER holds exactly these files, every byte as listed, apart from those `beside`."""
    if problems := differences(folder, entries, beside):
        raise BundleRefused(
            DAMAGED, f"{folder} differs from what was signed:\n  {shown(problems)}\nCopy or fetch it again"
        )


def differences(folder: Path, entries: Iterable[Entry], beside: set[str]) -> list[str]:
    """A sentence for each file of FOLDER that differs from its entry, is missing, or has no entry and is not `beside`."""
    listed = {entry.path: entry for entry in entries}
    there = [
        (folder / path, entry) for path, entry in sorted(listed.items()) if os.path.lexists(folder / path)
    ]
    return [*strays(folder, set(listed), beside), *filter(None, hashed(_differs, there))]


def shown(problems: list[str]) -> str:
    """The first 20, one per line."""
    more = [f"… and {len(problems) - 20} more"] if len(problems) > 20 else []
    return "\n  ".join(problems[:20] + more)


def strays(folder: Path, listed: set[str], beside: set[str]) -> Iterator[str]:
    """Missing and extra files of FOLDER, one sentence each."""
    present = set(walk(folder)) - beside
    yield from (f"missing: {path}" for path in sorted(listed - present))
    yield from (f"not in the manifest: {path}" for path in sorted(present - listed))


def walk(folder: Path) -> Iterator[str]:
    """Every path under the folder that is not a directory, links and devices included."""
    for place, directories, names in os.walk(folder):
        links = [name for name in directories if Path(place, name).is_symlink()]
        below = Path(place).relative_to(folder)
        for name in names + links:
            yield str(below / name)


def hashed[T, R](function: Callable[[T], R], items: list[T]) -> Iterator[R]:
    """Map in threads: hashing releases the GIL."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(function, items)


def _differs(item: tuple[Path, Entry]) -> str | None:
    path, entry = item
    if path.is_symlink() or not path.is_file():
        return f"not a plain file: {entry.path}"
    if (size := path.stat().st_size) != entry.size:
        return f"{entry.path} has {size} bytes, but {entry.size} were signed"
    if (digest := sha256(path)) != entry.sha256:
        return f"{entry.path} has sha256 {digest}, but {entry.sha256} was signed"
    return None
