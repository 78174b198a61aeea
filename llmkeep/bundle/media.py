"""Media: a bundle, a release or a candidate on several disks, or only its difference from an older one.

Each medium carries the whole manifest and some of the files that it names, at their paths, each content once. The
other files are on other media, or already at the destination. MEDIUM.json says which file is on which medium. It is
neither signed nor trusted: it tells which medium is needed next. Only the manifest decides what is right, and nothing
is used before everything is there, so a forged list only costs time.
"""

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from llmcore.files import aside_of
from llmkeep import durable
from llmkeep.bundle import manifest
from llmkeep.bundle.manifest import DAMAGED, MEDIUM, UNSIGNED, BundleRefused, Entry
from llmkeep.errors import LlmkeepError
from llmkeep.resumable import CHUNK, Resumable, progress

FORMAT = 1
MOST = 64 << 20  # bytes of a MEDIUM.json that are read
MOST_MEDIA = 9999
BLOCK = 4096  # what a file takes on a disk is a multiple of it
MARGIN = 64 << 20  # bytes of free space beyond what is copied
EVERYWHERE = ("bootstrap", "keyring.pgp")  # what a control node needs to begin with any medium of a bundle
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?))?B?", re.IGNORECASE)


def size(text: str) -> int:
    """Bytes in `4.7G`, `25GB` (powers of 1000, as on a disk's label) or `900GiB` (powers of 1024)."""
    if not (match := SIZE.fullmatch(text.strip())):
        raise LlmkeepError(
            f"{text[:40]!r} is not a size: write it as 900G or 4.7GB (powers of 1000) or 900GiB (of 1024)"
        )
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index((unit or " ").upper()))


# ---------------------------------------------------------------- what a folder's manifest names
@dataclass(frozen=True)
class Contents:
    """The files that a manifest names.

    `head`: the files not named in it, the manifest first; `digest`: the manifest's sha256.
    """

    title: str
    serial: int
    digest: str
    head: dict[str, bytes]
    files: dict[str, Entry]


def contents(folder: Path, medium: "Medium | None" = None) -> Contents:
    """Parse the manifest of a bundle, a release or a candidate; nothing is verified. Each file is read once.

    A candidate's manifest has no sizes: they come from MEDIUM.json, or from the files.
    """
    if (folder / manifest.NAME).is_file():
        if not (folder / manifest.SIGNATURE).is_file():
            raise BundleRefused(
                UNSIGNED, f"{folder} lacks {manifest.SIGNATURE}: unsigned content is not used"
            )
        head = {name: (folder / name).read_bytes() for name in (manifest.NAME, manifest.SIGNATURE)}
        content = manifest.parse(folder, head[manifest.NAME])
        title = re.sub(r"[^A-Za-z0-9 ._-]", "?", content.profile)[:80] + f" serial {content.serial}"
        return Contents(
            title, content.serial, _digest(head), head, {entry.path: entry for entry in content.files}
        )
    sums = sorted(folder.glob("models/*.sha256"))
    if len(sums) != 1:
        raise BundleRefused(
            DAMAGED,
            f"{folder} has neither {manifest.NAME} nor one models/NAME.sha256: it is not a bundle, release or candidate",
        )
    name, path = sums[0].stem, f"models/{sums[0].name}"
    head, files = {path: sums[0].read_bytes()}, {}
    try:
        for line in head[path].decode("ascii").splitlines():
            digest, relative = line.split("  ", 1)
            if not manifest.SHA256.fullmatch(digest) or not manifest.safe(relative):
                raise ValueError(f"it has the line {line[:120]!r}")
            where = f"models/{name}/{relative}"
            bytes_ = medium.files[where][1] if medium and where in medium.files else size_of(folder / where)
            files[where] = Entry(where, bytes_, digest, "", "", "", "")
    except ValueError as error:
        raise BundleRefused(DAMAGED, f"{sums[0]} cannot be read ({error}): copy it again") from error
    return Contents(f"candidate {name}", 0, _digest(head), head, files)


def _digest(head: dict[str, bytes]) -> str:
    return hashlib.sha256(next(iter(head.values()))).hexdigest()


def size_of(path: Path) -> int:
    return path.lstat().st_size if os.path.lexists(path) else 0


def _mode(path: Path) -> int:
    return (
        path.lstat().st_mode if os.path.lexists(path) else stat.S_IFREG
    )  # what is missing is another problem


def by_content(entries: Iterable[Entry]) -> dict[str, Entry]:
    """Each content once: the first path by sha256."""
    firsts: dict[str, Entry] = {}
    for entry in entries:
        firsts.setdefault(entry.sha256, entry)
    return firsts


# ---------------------------------------------------------------- MEDIUM.json
@dataclass(frozen=True)
class Medium:
    """One of several media. `files`: medium and size of each path.

    `base`: manifest of the bundle or release that a delta extends.
    """

    medium: int
    of: int
    manifest: str
    base: str
    base_title: str
    files: dict[str, tuple[int, int]]

    def __str__(self) -> str:
        return f"medium {self.medium} of {self.of}" + (
            f", a delta from {self.base_title}" if self.base else ""
        )

    @property
    def carried(self) -> set[str]:
        return {path for path, (number, _) in self.files.items() if number == self.medium}

    def json(self) -> bytes:
        header = {key: value for key, value in asdict(self).items() if key != "files"}
        rows = [
            {"path": path, "medium": number, "size": size}
            for path, (number, size) in sorted(self.files.items())
        ]
        return manifest.document({**header, "format": FORMAT}, rows).encode()


def read(folder: Path) -> Medium | None:
    """MEDIUM.json of a folder, or None for a complete bundle, release or candidate."""
    path = folder / MEDIUM
    if not os.path.lexists(path):
        return None
    with path.open("rb") as stream:
        content = stream.read(MOST + 1)
    try:
        if len(content) > MOST:
            raise ValueError(f"it has more than {MOST} bytes")
        document = json.loads(content)
        if document.pop("format") != FORMAT:
            raise ValueError("another format")
        rows = {row["path"]: (row["medium"], row["size"]) for row in document.pop("files")}
        medium = Medium(**document, files=rows)
        numbers = [medium.medium, medium.of, *(number for row in rows.values() for number in row)]
        if any(type(number) is not int or number < 0 for number in numbers):
            raise ValueError("invalid numbers")
        if not all(
            1 <= number <= medium.of <= MOST_MEDIA
            for number in (medium.medium, *(row[0] for row in rows.values()))
        ):
            raise ValueError(f"medium {medium.medium} of {medium.of}, or a file on none of the media")
        if not manifest.SHA256.fullmatch(medium.manifest) or not manifest.SHA256.fullmatch(
            medium.base or "0" * 64
        ):
            raise ValueError("an invalid digest")
        if not re.fullmatch(r"[A-Za-z0-9 .,?_-]{0,120}", medium.base_title):
            raise ValueError("an invalid title")
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise BundleRefused(DAMAGED, f"{path} cannot be read ({error}): copy the medium again") from error
    return medium


def fitting(folder: Path, medium: Medium | None, whole: Contents) -> set[str]:
    """The paths that a medium carries according to its list; exactly these must be on it. Raises BundleRefused."""
    if medium is None:
        carried = set(whole.files)
    else:
        if medium.manifest != whole.digest:
            raise BundleRefused(
                DAMAGED,
                f"{folder}/{MEDIUM} belongs to the manifest {medium.manifest}, but the manifest beside it is "
                f"{whole.digest}: copy the medium again",
            )
        if unknown := sorted(medium.files.keys() - whole.files.keys()):
            raise BundleRefused(
                DAMAGED,
                f"{folder}/{MEDIUM} lists {unknown[0]!r}, which the manifest does not name: do not use it",
            )
        carried = medium.carried | (set(EVERYWHERE) & whole.files.keys())
    problems = list(manifest.strays(folder, carried, {*whole.head, MEDIUM}))
    problems += [
        f"not a plain file: {path}" for path in sorted(carried) if not stat.S_ISREG(_mode(folder / path))
    ]
    if problems:
        raise BundleRefused(
            DAMAGED,
            f"{folder} does not match its lists:\n  {manifest.shown(problems)}\nCopy the medium again",
        )
    return carried


def verify(folder: Path, keyring: Path, kind: str, highest: int) -> str:
    """Verify a bundle or a release, or one medium of it: signature, type, age, serial and every byte; returns a message."""
    good = manifest.signed(folder, keyring, kind, highest)
    whole = contents(folder)
    if whole.files != {entry.path: entry for entry in good.files}:
        raise BundleRefused(
            DAMAGED, f"{folder} returned another manifest when it was read again: do not use it"
        )
    return f"{_verified(folder, read(folder), whole)} signed by {good.signer}"


def verify_candidate(folder: Path, digest: str) -> str:
    """Verify a candidate, or one medium of it, against the digest that its builder printed; returns a message."""
    medium = read(folder)
    if (whole := contents(folder, medium)).digest != digest:
        raise BundleRefused(
            DAMAGED,
            f"the manifest of {folder} ({whole.title}) has sha256 {whole.digest}, but {digest} was expected: do not use it",
        )
    return f"{_verified(folder, medium, whole)} listed by its builder"


def _verified(folder: Path, medium: Medium | None, whole: Contents) -> str:
    carried = fitting(folder, medium, whole)
    manifest.check(folder, (whole.files[path] for path in carried), {*whole.head, MEDIUM})
    what = f"{medium}, {len(carried)} of its {len(whole.files)}" if medium else f"{len(whole.files)}"
    return f"{folder}: {whole.title}, {what} files, all as"


# ---------------------------------------------------------------- split and delta
def split(source: Path, out: Path, room: int | None, old: Path | None = None) -> list[str]:
    """Write OUT/1, OUT/2 and so on, each of at most ROOM bytes; returns a line about each.

    Without ROOM there is one medium. OLD: leave out the contents that this one has. Files are hard links where OUT is
    on the same file system, else copies, which are hashed. An interrupted run continues. Raises LlmkeepError if a
    file fits on no medium, or if there is not enough space.
    """
    if read(source):
        raise LlmkeepError(
            f"{source} is a medium itself: give the bundle, release or candidate that it was made from"
        )
    whole = contents(source)
    base = contents(old) if old else None
    if base and base.digest == whole.digest:
        raise LlmkeepError(f"{old} and {source} are the same ({whole.title}): there is nothing to carry")
    if lost := [path for path, entry in whole.files.items() if size_of(source / path) != entry.size]:
        raise BundleRefused(DAMAGED, f"{source}/{lost[0]} is missing or truncated: build or copy it again")
    there = {entry.sha256 for entry in base.files.values()} if base else set()
    head = [whole.files[path] for path in EVERYWHERE if path in whole.files]
    there |= {entry.sha256 for entry in head}
    entries = [entry for digest, entry in by_content(whole.files.values()).items() if digest not in there]
    first = Medium(1, 1, whole.digest, base.digest if base else "", base.title if base else "", {})
    media = _packed(
        entries, None if room is None else room - _overhead(whole, head, first, entries), room or 0
    )
    rows = {entry.path: (number, entry.size) for number, files in enumerate(media, 1) for entry in files}
    media_json = {
        number: replace(first, medium=number, of=len(media), files=rows).json()
        for number in range(1, len(media) + 1)
    }
    written = [Path(path) for path in (*whole.head, MEDIUM)]
    unfinished = [aside_of(path) for path in written]
    planned = {
        f"{number}/{path}"
        for number, files in enumerate(media, 1)
        for path in [*written, *unfinished, *(entry.path for entry in [*head, *files])]
    }
    _check_place(source, out, planned, media_json, [entry.size for files in media for entry in files])
    for number, content in media_json.items():
        durable.write(out / str(number) / MEDIUM, content, 0o644)
    lines = []
    for number, files in enumerate(media, 1):
        place = out / str(number)
        for path, content in whole.head.items():
            durable.write(place / path, content, 0o644)
        for entry in [*head, *files]:
            _put(source / entry.path, place / entry.path, entry)
        taken = sum(entry.size for entry in [*head, *files])
        lines.append(
            f"{place}: {whole.title}, {replace(first, medium=number, of=len(media))}: {len(files)} files, {taken / 1e6:.1f} MB"
        )
    durable.sync_all(out)
    return lines


def _overhead(whole: Contents, head: list[Entry], first: Medium, entries: list[Entry]) -> int:
    """Bytes on each medium in addition to its files: manifest, list, common files, folders."""
    widest = replace(
        first,
        medium=MOST_MEDIA,
        of=MOST_MEDIA,
        files={entry.path: (MOST_MEDIA, entry.size) for entry in entries},
    )
    folders = {parent for path in whole.files for parent in Path(path).parents}
    sizes = [len(widest.json()), *map(len, whole.head.values()), *(entry.size for entry in head)]
    return sum(map(_blocks, sizes)) + BLOCK * len(folders)


def _blocks(bytes_: int) -> int:
    return -(-bytes_ // BLOCK) * BLOCK


def _packed(entries: list[Entry], room: int | None, limit: int) -> list[list[Entry]]:
    """The files of each medium: the largest file first, each on the first medium with room for it."""
    if room is None:
        return [entries]
    media: list[list[Entry]] = [[]]
    left = [room]
    for entry in sorted(entries, key=lambda entry: (-entry.size, entry.path)):
        takes = _blocks(entry.size)
        if takes > room:
            raise LlmkeepError(
                f"{entry.path} takes {takes} bytes, and manifest and lists take {limit - room} on each medium: "
                f"{takes + limit - room} in total, but --size is {limit}: give a --size of at least "
                f"{-(-(takes + limit - room) // 10**6)}M"
            )
        if (number := next((number for number, free in enumerate(left) if takes <= free), None)) is None:
            number = len(media)
            media.append([])
            left.append(room)
        media[number].append(entry)
        left[number] -= takes
    if len(media) > MOST_MEDIA:
        raise LlmkeepError(f"that would be {len(media)} media of {limit} bytes: give a larger --size")
    return media


def _check_place(
    source: Path, out: Path, planned: set[str], media_json: dict[int, bytes], sizes: list[int]
) -> None:
    """Refuse an OUT that has other content than these media, or no space for their copies."""
    there = set(manifest.walk(out))
    other = sorted(there - planned)
    for number, content in media_json.items():
        path = out / str(number) / MEDIUM
        if path.is_file() and path.read_bytes() != content:
            other.append(f"{number}/{MEDIUM}")
    if other:
        raise LlmkeepError(
            f"{out}/{other[0]} belongs to other media, or to another --size: remove {out}, or give another --out"
        )
    place = next(path for path in [out, *out.absolute().parents] if path.is_dir())
    if place.stat().st_dev == source.stat().st_dev:
        return
    needed = sum(sizes) - sum((out / path).stat().st_size for path in there) + MARGIN
    if (free := shutil.disk_usage(place).free) < needed:
        raise LlmkeepError(
            f"{place} has {free / 1e9:.2f} GB free, the media take {needed / 1e9:.2f} GB more: make room, or give an --out "
            f"on the disk of {source}, where they take none"
        )


def _put(source: Path, target: Path, entry: Entry) -> None:
    """Hard-link SOURCE to TARGET, else copy it and compare it with the manifest. Copies of an earlier run are kept."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        if target.samefile(source):
            return
        if target.stat().st_nlink > 1:  # never write into a file that has another name
            target.unlink()
    if not target.exists():
        try:
            target.hardlink_to(source)
        except OSError:  # another file system, or one without hard links
            pass
        else:
            return
    if (digest := copy(source, target, entry.size)) != entry.sha256:
        target.unlink()
        raise BundleRefused(
            DAMAGED,
            f"{source} has sha256 {digest}, but its manifest says {entry.sha256}: build or copy it again",
        )
    target.chmod(source.stat().st_mode & 0o777)


def copy(source: Path, target: Path, bytes_: int) -> str:
    """Copy a plain file of the given size, and sync it; returns its sha256. Bytes already in TARGET are compared instead."""
    descriptor = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb", buffering=0) as stream, Resumable(target, bytes_) as target_file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise LlmkeepError(f"{source} is not a plain file: copy it again")
        with progress(stream, bytes_, source.name) as shown:
            while chunk := shown.read(CHUNK):
                target_file.write(chunk)
        target_file.truncate()
        os.fsync(target_file.stream.fileno())
        return target_file.digest()
