"""A signed image of two layers with a file each, as `llmkeep image build` writes one."""

import datetime
import json
from dataclasses import asdict
from pathlib import Path

from llmkeep.bundle import manifest, signing
from llmkeep.image import archive
from llmkeep.image.layout import Layout
from llmkeep.image.record import FOLDER, IMAGE, NAME, SIGNATURE, Record


def write(folder: Path, keys: Path, above: str = "above", serial: int = 7, days: int = 30) -> Path:
    """Fill `folder`; the upper layer's file has the content `above`. Archives of the layers stay beside it.

    The record expires in so many days.
    """
    target, made = Layout(folder / FOLDER), []
    target.begin()
    for name, content in {"below": "below", "above": above}.items():
        source = folder.parent / f"{folder.name}-{name}"
        source.mkdir()
        (source / name).write_text(content)
        made.append(archive.write(name, source, source.with_suffix(".gz"), 0))
    described = [target.add_layer(layer, folder.parent / f"{folder.name}-{layer.name}.gz") for layer in made]
    config = {
        "architecture": "amd64",
        "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in made]},
    }
    image = target.add_image(described, config)
    bill = target.add_referrer(image, b"{}", "application/vnd.cyclonedx+json")
    target.end("llmkeep", image, bill)
    now = datetime.datetime.now(datetime.UTC)
    record = Record(
        type=IMAGE,
        serial=serial,
        created=now.strftime(manifest.TIME),
        expires=(now + datetime.timedelta(days=days)).strftime(manifest.TIME),
        signer=signing.fingerprint(keys / "keyring.pgp"),
        name="llmkeep",
        variant="cpu",
        digest=image["digest"],
        sbom=bill["digest"],
        bundle_manifest="",
        policy_revision="",
        layers=made,
    )
    sign(folder, keys, record)
    return folder


def sign(folder: Path, keys: Path, record: Record) -> None:
    """Write the record, and its signature."""
    (folder / NAME).write_text(json.dumps(asdict(record)))
    (folder / SIGNATURE).unlink(missing_ok=True)
    signing.sign(keys / "signing.key", folder / NAME, folder / SIGNATURE)
