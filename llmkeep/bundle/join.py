"""Put media together: a bundle, a release or a candidate is there when all of it is, each content compared with the manifest."""

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
    """Files by the sha256 that the manifests of these folders give them; nothing is hashed."""
    places = defaultdict(list)
    for folder in folders:
        for entry in contents(folder).files.values():
            if size_of(folder / entry.path) == entry.size:
                places[entry.sha256].append(folder / entry.path)
    return places


def here(places: Places) -> list[Path]:
    """The bundles and releases of this host."""
    folders = [*places.bundles.glob("[0-9]*"), *places.releases.glob("[!.]*")]
    return [
        folder
        for folder in folders
        if (folder / manifest.NAME).is_file() and (folder / manifest.SIGNATURE).is_file()
    ]


def mount_point(path: Path) -> Path:
    """Where the file system of a path is mounted. A folder that is mounted on itself is one, of the same device."""
    points = {line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()}
    resolved = path.resolve()
    return next((each for each in (resolved, *resolved.parents) if str(each) in points), Path("/"))


def linkable(path: Path, place: Path) -> bool:
    """Whether a file may be linked into PLACE: it is on the same mount, and only this user can change it."""
    status = path.lstat()
    return (
        status.st_dev == place.stat().st_dev
        and mount_point(path.parent) == mount_point(place)
        and status.st_uid == os.geteuid()
        and not status.st_mode & 0o022
        and stat.S_ISREG(status.st_mode)
    )


def join(source: Path, into: Path, bases: list[Path]) -> str:
    """Take what a medium has into INTO, in any order of the media; returns a message.

    INTO appears when all is there. Until then it lies in a hidden folder beside it, where each file gets its name after it was
    compared with the manifest. What BASES have is linked or copied from there. Raises BundleRefused: DAMAGED; FOREIGN for a
    medium of something else, or a delta from what is not here; INCOMPLETE while media are missing.

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
        return f"{into}: {whole.title} is whole already"
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
                f"{source} is not what its manifest says:\n  {manifest.shown(problems)}\nCopy the medium again; the rest is kept",
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
    """Make the folder and hold it; a refusal before anything is in it leaves none."""
    with durable.own(aside):
        try:
            yield
        finally:
            if aside.is_dir() and not any(aside.iterdir()):
                aside.rmdir()


def _begin(source: Path, aside: Path, medium: Medium | None, whole: Contents) -> None:
    """Refuse a medium of something else than what was begun here. Files without a manifest are of a run that got no further."""
    try:
        begun = contents(aside, medium)
    except BundleRefused:
        for path in aside.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return
    if begun.digest != whole.digest:
        raise BundleRefused(
            FOREIGN,
            f"{source} is of {whole.title} (manifest {whole.digest}), {aside} has files of {begun.title} ({begun.digest}): "
            f"go on with the media of that, or remove {aside} to give it up",
        )


def _check_reachable(
    medium: Medium | None,
    whole: Contents,
    absent: dict[str, Entry],
    carried: set[str],
    at_hand: dict[str, list[Path]],
) -> None:
    """Refuse where files are neither here nor on any medium of the list: no further medium would ever complete them."""
    listed = {whole.files[path].sha256 for path in {*carried, *(medium.files if medium else ())}}
    nowhere = sorted(
        path for path, entry in absent.items() if entry.sha256 not in listed and entry.sha256 not in at_hand
    )
    if not nowhere:
        return
    problem = f"{len(nowhere)} files of {whole.title} are on no medium of it and not here, the first is {nowhere[0]}: "
    if medium and medium.base:
        raise BundleRefused(
            FOREIGN,
            f"{problem}it adds to {medium.base_title} (manifest {medium.base}); name that with --base, or bring a whole one",
        )
    raise BundleRefused(DAMAGED, f"{problem}do not use this medium; split again")


def _absent(whole: Contents, aside: Path) -> dict[str, Entry]:
    """The files that are not there yet, by path. A file gets its name after it was compared."""
    return {path: entry for path, entry in whole.files.items() if not os.path.lexists(aside / path)}


def _part(aside: Path, digest: str) -> Path:
    """Where a file lies while it is copied."""
    return aside / f".{digest}"


def _check_space(
    aside: Path, whole: Contents, absent: dict[str, Entry], at_hand: dict[str, list[Path]]
) -> None:
    """Refuse where there is no room for what is new: on all media, without what is linked or partly copied."""
    linked = {digest for digest, paths in at_hand.items() if any(linkable(path, aside) for path in paths)}
    linked |= {entry.sha256 for path, entry in whole.files.items() if path not in absent}
    new = [entry for digest, entry in by_content(absent.values()).items() if digest not in linked]
    needed = sum(entry.size - min(entry.size, size_of(_part(aside, entry.sha256))) for entry in new) + MARGIN
    if (free := shutil.disk_usage(aside).free) < needed:
        raise LlmkeepError(
            f"{aside.parent} has {free / 1e9:.2f} GB free, {needed / 1e9:.2f} GB are new: make room, or give another --into"
        )


def _taken(
    source: Path, aside: Path, absent: dict[str, Entry], carried: set[str], at_hand: dict[str, list[Path]]
) -> Iterator[str]:
    """Bring each content that is here or on the medium, under all of its paths; what is wrong with each."""
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
    """Copy and compare; what is wrong with it, in which case nothing is left."""
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
    """Which media have what is absent, by their list."""
    by_digest = (
        {whole.files[path].sha256: number for path, (number, _) in medium.files.items()} if medium else {}
    )
    counts: dict[int, list[int]] = defaultdict(list)
    for digest, entry in by_content(absent.values()).items():
        counts[by_digest.get(digest, 0)].append(entry.size)
    of = medium.of if medium else 1
    return "; ".join(
        f"bring medium {number} of {of} ({len(sizes)} files, {sum(sizes) / 1e6:.1f} MB)"
        if number
        else f"{len(sizes)} files were here and are damaged: bring a whole one"
        for number, sizes in sorted(counts.items())
    )
