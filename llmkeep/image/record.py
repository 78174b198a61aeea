"""image.json, the signed record of an image: what is pinned by manifests and clusters, and verified with the image."""

import datetime
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llmkeep.bundle import cache, manifest
from llmkeep.bundle.manifest import DAMAGED, BundleRefused
from llmkeep.image import archive
from llmkeep.image.archive import Layer
from llmkeep.image.layout import Layout

NAME, SIGNATURE, FOLDER = "image.json", "image.json.sig", "oci"
IMAGE = "image"  # what a record is signed as
FORMAT = 1


@dataclass(frozen=True)
class Record:
    """An image. Digests are `sha256:…`, but `bundle_manifest` (of MANIFEST.json) and `policy_revision` (of the bundle's policy)
    are bare hex digits. `sbom` is the digest of the manifest that refers to the image. `serial`, `created` and `expires` are the
    bundle's, so that all images of a bundle are of one age, and building one again never makes it younger."""

    type: str
    serial: int
    created: str
    expires: str
    signer: str
    name: str
    variant: str
    digest: str
    sbom: str
    bundle_manifest: str
    policy_revision: str
    layers: list[Layer]
    format: int = FORMAT


def read(folder: Path, keyring: Path) -> Record:
    """The record of an image, after its signature and type were verified, whatever its age. Raises BundleRefused."""
    document = manifest.statement(folder, NAME, keyring, IMAGE)
    try:
        layers = [Layer(**layer) for layer in document.pop("layers")]
        return Record(layers=layers, **document)
    except (KeyError, TypeError) as error:
        raise BundleRefused(
            DAMAGED, f"{folder}/{NAME} is not an image record ({error}): use the llmkeep that came with it"
        ) from error


def verify(folder: Path, keyring: Path, highest: int = 0, now: datetime.datetime | None = None) -> Record:
    """Signature, record, age, serial, each blob's digest, each layer's diff id. Raises BundleRefused; changes nothing.

    `highest`: the last serial accepted here.
    """
    record = read(folder, keyring)
    manifest.require_serial(
        record.serial,
        highest,
        "an old image reintroduces fixed vulnerabilities. Use one with that serial or a later one, or roll back to "
        "this one with"
        " `llmkeep image add --allow-older REASON`, which is put on record",
    )
    manifest.require_in_date(record.expires, now)
    try:
        problems = list(_problems(Layout(folder / FOLDER), record))
    except (OSError, KeyError, TypeError, ValueError) as error:
        problems = [f"it cannot be read ({error})"]
    if problems:
        raise BundleRefused(
            DAMAGED,
            f"{folder} differs from what was signed:\n  {manifest.shown(problems)}\nCopy it again, or build it again",
        )
    return record


def _problems(target: Layout, record: Record) -> Iterator[str]:
    """What is wrong with a layout, one sentence each. No blob is read before its digest was compared."""
    layers = [layer.digest for layer in record.layers]
    image, bill = target.read(record.digest), target.read(record.sbom)
    others = [
        image["config"]["digest"],
        bill["config"]["digest"],
        *(each["digest"] for each in bill["layers"]),
    ]
    blobs = {digest: target.blob(digest) for digest in [record.digest, record.sbom, *layers, *others]}
    listed = {str(path.relative_to(target.folder)) for path in blobs.values()}
    yield from manifest.strays(target.folder, listed, {"index.json", "oci-layout"})
    if not all(path.is_file() for path in blobs.values()):
        return
    for digest, actual in zip(blobs, manifest.hashed(_digest, list(blobs.values())), strict=True):
        if digest != actual:
            yield f"the blob {digest} has sha256 {actual}"
            return
    config = target.read(image["config"]["digest"])
    if [(each["digest"], each["size"]) for each in image["layers"]] != [
        (each.digest, each.size) for each in record.layers
    ]:
        yield "its manifest has other layers than its record"
    if config["rootfs"]["diff_ids"] != [each.diff_id for each in record.layers]:
        yield "its configuration has other diff ids than its record"
    if [each["digest"] for each in target.index()] != [record.digest, record.sbom]:
        yield "its index lists other manifests than its record"
    if bill["subject"]["digest"] != record.digest:
        yield f"its SBOM is about {bill['subject']['digest']}"
    unpacked = manifest.hashed(archive.unpacked, [blobs[digest] for digest in layers])
    for layer, actual in zip(record.layers, unpacked, strict=True):
        if actual != layer.diff_id:
            yield f"the layer {layer.name} unpacks to {actual}, but {layer.diff_id} was signed"


def _digest(path: Path) -> str:
    return f"sha256:{cache.sha256(path)}"
