"""Join media: a bundle, a release or a candidate appears once it is complete and matches its manifest."""

import os
import shutil
import stat
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from llmcore.files import flush
from llmkeep import durable
from llmkeep.bundle import manifest
from llmkeep.bundle.cache import sha256
from llmkeep.bundle.manifest import DAMAGED, FOREIGN, INCOMPLETE, BundleRefused, Entry
from llmkeep.bundle.media import MARGIN, Contents, Medium, by_content, contents, copy, fitting, read, size_of
from llmkeep.errors import LlmkeepError
from llmkeep.places import Places


def held(folders: Iterable[Path]) -> dict[str, list[Path]]:
    """Files by the sha256 in the manifests of these folders; nothing is hashed."""
    places = defaultdict(list)
    for folder in folders:
        for entry in contents(folder).files.values():
            if size_of(folder / entry.path) == entry.size:
                places[entry.sha256].append(folder / entry.path)
    return places


def here(places: Places) -> list[Path]:
    """The bundles and releases on this host."""
    folders = [*places.bundles.glob("[0-9]*"), *places.releases.glob("[!.]*")]
    return [
        folder
        for folder in folders
        if (folder / manifest.NAME).is_file() and (folder / manifest.SIGNATURE).is_file()
    ]


def mount_point(path: Path) -> Path:
    """Mount point of a path's file system. A folder bind-mounted on itself is one, although its device is the same."""
    points = {line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()}
    resolved = path.resolve()
    return next((each for each in (resolved, *resolved.parents) if str(each) in points), Path("/"))


def linkable(path: Path, place: Path) -> bool:
    """Whether a file may be hard-linked into PLACE: it is on the same mount, and only this user can change it."""
    status = path.lstat()
    return (
        status.st_dev == place.stat().st_dev
        and mount_point(path.parent) == mount_point(place)
        and status.st_uid == os.geteuid()
        and not status.st_mode & 0o022
        and stat.S_ISREG(status.st_mode)
    )


def join(source: Path, into: Path, bases: list[Path]) -> str:
    """Copy the files of a medium towards INTO; media may come in any order. Returns a message.

    INTO appears when it is complete. Until then, files are collected in a hidden folder beside it, where each gets
    its name after it was compared with the manifest. Files that BASES have are linked or copied from there. Raises
    BundleRefused: DAMAGED; FOREIGN for a medium of another bundle, or a delta whose base is not here; INCOMPLETE
    while media are missing.
    """
    medium = read(source)
    whole = contents(source, medium)
    carried = fitting(source, medium, whole)
    if os.path.lexists(into):
        if contents(into).digest != whole.digest or list(
            manifest.strays(into, set(whole.files), set(whole.head))
        ):
            raise BundleRefused(
                FOREIGN, f"{into} exists and is not {whole.title}: name a folder that does not exist"
            )
        return f"{into}: {whole.title} is already complete"
    aside = into.absolute().with_name(f".{into.name}.joining")
    with _working(aside):
        _begin(source, aside, medium, whole)
        at_hand = held(bases)
        absent = _absent(whole, aside)
        _check_reachable(medium, whole, absent, carried, at_hand)
        _check_space(aside, whole, absent, at_hand)
        for path, content in reversed(
            whole.head.items()
        ):  # the manifest last: with it, this is the aside of this manifest
            durable.write(aside / path, content, 0o644)
        if problems := list(_taken(source, aside, absent, carried, at_hand)):
            raise BundleRefused(
                DAMAGED,
                f"{source} does not match its manifest:\n  {manifest.shown(problems)}\nCopy the medium again; the other "
                "files are kept",
            )
        if absent := _absent(whole, aside):
            raise BundleRefused(
                INCOMPLETE, f"{whole.title} is not complete yet: {_to_bring(medium, whole, absent)}"
            )
        for path in set(manifest.walk(aside)) - whole.files.keys() - whole.head.keys():
            (aside / path).unlink()
        durable.sync_all(aside)
        aside.rename(into)
        flush(into.absolute().parent)
    return f"{into}: {whole.title} is complete, {len(whole.files)} files; manifest {whole.digest}"


@contextmanager
def _working(aside: Path) -> Iterator[None]:
    """Create and lock the folder; it is removed if it is empty in the end."""
    with durable.own(aside):
        try:
            yield
        finally:
            if aside.is_dir() and not any(aside.iterdir()):
                aside.rmdir()


def _begin(source: Path, aside: Path, medium: Medium | None, whole: Contents) -> None:
    """Refuse a medium of another bundle than the one begun here.

    Files without a manifest are left from an interrupted run.
    """
    try:
        begun = contents(aside, medium)
    except BundleRefused:
        for path in aside.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return
    if begun.digest != whole.digest:
        raise BundleRefused(
            FOREIGN,
            f"{source} belongs to {whole.title} (manifest {whole.digest}), but {aside} has files of {begun.title} "
            f"({begun.digest}): continue with media of the latter, or remove {aside} to abandon it",
        )


def _check_reachable(
    medium: Medium | None,
    whole: Contents,
    absent: dict[str, Entry],
    carried: set[str],
    at_hand: dict[str, list[Path]],
) -> None:
    """Refuse if files are neither here nor on any listed medium, since no further medium could complete them."""
    listed = {whole.files[path].sha256 for path in {*carried, *(medium.files if medium else ())}}
    nowhere = sorted(
        path for path, entry in absent.items() if entry.sha256 not in listed and entry.sha256 not in at_hand
    )
    if not nowhere:
        return
    problem = f"{len(nowhere)} files of {whole.title} are neither on its media nor here, the first is {nowhere[0]}: "
    if medium and medium.base:
        raise BundleRefused(
            FOREIGN,
            f"{problem}it is a delta from {medium.base_title} (manifest {medium.base}): name that with --base, or use "
            "a full one",
        )
    raise BundleRefused(DAMAGED, f"{problem}do not use this medium; split again")


def _absent(whole: Contents, aside: Path) -> dict[str, Entry]:
    """The files that are missing, by path. A file gets its name after it was compared."""
    return {path: entry for path, entry in whole.files.items() if not os.path.lexists(aside / path)}


def _part(aside: Path, digest: str) -> Path:
    """Path of a file while it is being copied."""
    return aside / f".{digest}"


def _check_space(
    aside: Path, whole: Contents, absent: dict[str, Entry], at_hand: dict[str, list[Path]]
) -> None:
    """Refuse if there is no room for the new files on all media, apart from linked and partly copied ones."""
    linked = {digest for digest, paths in at_hand.items() if any(linkable(path, aside) for path in paths)}
    linked |= {entry.sha256 for path, entry in whole.files.items() if path not in absent}
    new = [entry for digest, entry in by_content(absent.values()).items() if digest not in linked]
    needed = sum(entry.size - min(entry.size, size_of(_part(aside, entry.sha256))) for entry in new) + MARGIN
    if (free := shutil.disk_usage(aside).free) < needed:
        raise LlmkeepError(
            f"{aside.parent} has {free / 1e9:.2f} GB free, {needed / 1e9:.2f} GB are needed: make room, or give "
            "another --into"
        )


def _taken(
    source: Path, aside: Path, absent: dict[str, Entry], carried: set[str], at_hand: dict[str, list[Path]]
) -> Iterator[str]:
    """Link or copy each content that is here or on the medium to all its paths; returns the problems found."""
    own = {
        entry.sha256: aside / path
        for path, entry in contents(aside).files.items()
        if path not in absent and os.path.lexists(aside / path)
    }
    paths = defaultdict(list)
    for path, entry in absent.items():
        paths[entry.sha256].append(path)
    for digest, targets in paths.items():
        size = absent[targets[0]].size
        part = _part(aside, digest)
        on_medium = next((path for path in targets if path in carried), None)
        if digest in own:
            part.unlink(missing_ok=True)
            part.hardlink_to(own[digest])
        elif not _from_here(at_hand.get(digest, []), part, digest, size):
            if on_medium is None:
                continue
            problem = _copied(source / on_medium, part, digest, size)
            if problem:
                yield problem
                continue
        for path in targets:
            (aside / path).parent.mkdir(parents=True, exist_ok=True)
            (aside / path).hardlink_to(part)
        part.unlink()


def _from_here(at_hand: list[Path], part: Path, digest: str, size: int) -> bool:
    for path in at_hand:
        if linkable(path, part.parent):
            if sha256(path) == digest:
                part.unlink(missing_ok=True)
                part.hardlink_to(path)
                return True
        elif _copied(path, part, digest, size) is None:
            return True
    return False


def _copied(path: Path, part: Path, digest: str, size: int) -> str | None:
    """Copy and compare a file; returns the problem, if any, in which case the copy is removed."""
    try:
        actual = copy(path, part, size)
    except LlmkeepError as error:
        actual = str(error)
    if actual != digest:
        part.unlink()
        return f"{path}: found {actual}, expected {digest}"
    part.chmod(0o755 if path.stat().st_mode & 0o100 else 0o644)
    return None


def _to_bring(medium: Medium | None, whole: Contents, absent: dict[str, Entry]) -> str:
    """The media that have the missing files, according to their list."""
    by_digest = (
        {whole.files[path].sha256: number for path, (number, _) in medium.files.items()} if medium else {}
    )
    counts: dict[int, list[int]] = defaultdict(list)
    for digest, entry in by_content(absent.values()).items():
        counts[by_digest.get(digest, 0)].append(entry.size)
    of = medium.of if medium else 1
    return "; ".join(
        f"insert medium {number} of {of} ({len(sizes)} files, {sum(sizes) / 1e6:.1f} MB)"
        if number
        else f"{len(sizes)} files on this host are damaged: use a full one"
        for number, sizes in sorted(counts.items())
    )
