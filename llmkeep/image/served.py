"""Images on the mirror, whose nginx gives hosts their blobs by digest as registries do (OCI distribution-spec 1.1, pull).

`images/DIGEST` is what `llmkeep image build` wrote, as `llmkeep image verify` reads it. `images/.blobs` has a hard link to each
blob, which is what nginx serves: images have layers in common, and a pull names no image.
"""

import re
import shutil
from pathlib import Path

from llmcore.files import flush
from llmkeep import source_tree
from llmkeep.bundle import manifest
from llmkeep.bundle.cache import sha256
from llmkeep.bundle.manifest import DAMAGED, BundleRefused
from llmkeep.bundle.media import copy
from llmkeep.durable import alone, readable, write
from llmkeep.errors import LlmkeepError
from llmkeep.image.record import FOLDER, NAME, SIGNATURE, Record, read, verify
from llmkeep.places import Places
from llmkeep.record import runs

BLOBS = ".blobs"


@readable()
def add(places: Places, folder: Path, keyring: Path, allow_older: str | None = None) -> Record:
    """Bring an image to the mirror and verify it there. Idempotent; raises BundleRefused.

    `allow_older`: the reason, for the record, for accepting an image with an older serial; from then on its serial
    counts. Nothing is served if that cannot be recorded (RecordError).
    """
    highest = manifest.highest_serial(places.image_serial)
    good = verify(folder, keyring, 0 if allow_older else highest)
    images, shared = places.images, places.images / BLOBS
    shared.mkdir(parents=True, exist_ok=True)
    with alone(images):
        partial = images / ".partial"
        shutil.rmtree(partial, ignore_errors=True)
        layout = (path for path in (folder / FOLDER).rglob("*") if path.is_file())
        try:
            for source in [folder / NAME, folder / SIGNATURE, *layout]:
                target = partial / source.relative_to(folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                known = shared / source.name
                if known.is_file() and sha256(known) == source.name:
                    target.hardlink_to(known)
                else:
                    copy(source, target, source.stat().st_size)
                    target.chmod(0o644)
            if verify(partial, keyring) != good:
                raise BundleRefused(DAMAGED, f"{folder} changed while it was being copied: add it again")
            if allow_older and good.serial < highest:
                _record(good, highest, allow_older)
            write(places.image_serial, f"{good.serial}\n".encode(), 0o644)
            for blob in (partial / FOLDER / "blobs/sha256").iterdir():
                _replace(blob, shared / blob.name)
            flush(shared)
            final = _folder(places, good.digest)
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            flush(images)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return good


def _record(image: Record, highest: int, reason: str) -> None:
    """Put on the control node's record that an image older than HIGHEST is served, and why. A developer's machine keeps none."""
    if runs.is_kept(source_tree.located()):
        runs.append(
            {
                "event.kind": "event",
                "event.category": ["configuration"],
                "event.type": ["change"],
                "event.action": "image add --allow-older",
                "event.outcome": "success",
                "event.reason": reason,
                "user.name": runs.who(),
                "llmkeep.image.digest": image.digest,
                "llmkeep.image.serial": image.serial,
                "llmkeep.image.highest": highest,
            }
        )


def _replace(blob: Path, link: Path) -> None:
    """Make `link` another name of `blob`, in one step."""
    if link.exists() and link.samefile(blob):
        return
    aside = link.with_name(".new")
    aside.unlink(missing_ok=True)
    aside.hardlink_to(blob)
    aside.replace(link)


def _folder(places: Places, digest: str) -> Path:
    return places.images / digest.removeprefix("sha256:")


def listed(places: Places, keyring: Path) -> list[Record]:
    """The images on this mirror, the newest bundle's first. Raises BundleRefused at one that is not signed."""
    records = [read(path, keyring) for path in places.images.glob("[!.]*")]
    return sorted(records, key=lambda record: (-record.serial, record.digest))


def remove(places: Places, digest: str) -> None:
    """Remove an image from this mirror, with the blobs that no other image has."""
    folder = _folder(places, digest)
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", digest) or not (folder / NAME).is_file():
        raise LlmkeepError(f"{places.images} has no image {digest}: `llmkeep image list` shows those it has")
    with alone(places.images):
        removed = folder.with_name(".removed")
        shutil.rmtree(removed, ignore_errors=True)
        folder.rename(removed)
        flush(places.images)
        shutil.rmtree(removed)
        for blob in (places.images / BLOBS).iterdir():
            if blob.stat().st_nlink == 1:
                blob.unlink()
