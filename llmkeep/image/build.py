"""Build an image aside from a verified bundle, sign its record, put it in place."""

import json
import os
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llmkeep.bundle import bill, cache, manifest, signing
from llmkeep.bundle.build import Keys, swap
from llmkeep.bundle.manifest import Manifest
from llmkeep.durable import readable
from llmkeep.errors import LlmkeepError
from llmkeep.image import contents, layers, layout, sbom
from llmkeep.image.layers import Made
from llmkeep.image.layout import Layout
from llmkeep.image.record import FOLDER, IMAGE, NAME, SIGNATURE, Record
from llmkeep.policy import source as policy

NAMED = "llmkeep"
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HOME": "/nonexistent",
    "LANG": "C.UTF-8",
    "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONUNBUFFERED": "1",
}


def build(bundle: Path, out: Path, variant: str, keys: Keys, passphrase_file: Path | None = None) -> Record:
    """Build the image of a bundle that these keys signed, and replace OUT by it. The same bundle gives the same digest.

    Needs root, since Debian's packages are installed in a root file system of their own, and neither network nor registry.
    """
    for file in (keys.signing, keys.keyring):
        if not file.is_file():
            raise LlmkeepError(
                f"there is no {file}: give the folder of the keys that signed {bundle} with --keys"
            )
    if os.geteuid() != 0:
        raise LlmkeepError(
            f"this user ({os.geteuid()}) cannot install packages in a root file system: run it as root"
        )
    if out.exists() and any(out.iterdir()) and not (out / NAME).is_file():
        raise LlmkeepError(
            f"{out} has other content than an image: give an empty folder, or one that does not exist"
        )
    verified = manifest.verify(bundle, keys.keyring, manifest.BUNDLE)
    source = contents.source(bundle, verified, *layers.VARIANTS[variant])
    aside = out.with_name(f".{out.name}.new")
    with signing.signer(keys.signing, passphrase_file) as key, cache.alone("image-"), readable():
        shutil.rmtree(aside, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=cache.home(), prefix="image-") as scratch:
            record = _write(Layout(aside / FOLDER), layers.make(source, Path(scratch)), source, variant)
        (aside / NAME).write_text(json.dumps(asdict(record), indent=1) + "\n")
        signing.sign(key, aside / NAME, aside / SIGNATURE)
        swap(aside, out)
    return record


def _write(target: Layout, made: list[Made], source: contents.Source, variant: str) -> Record:
    verified = source.manifest
    target.begin()
    described = [target.add_layer(each.layer, each.blob) for each in made]
    labels = _labels(source, variant)
    image = target.add_image(described, _config(made, verified, labels))
    document = sbom.document(source, [each.tree for each in made], image["digest"], verified.created)
    referrer = target.add_referrer(image, layout.encoded(document), bill.MEDIA_TYPE)
    target.end(NAMED, image, referrer)
    return Record(
        type=IMAGE,
        serial=verified.serial,
        created=verified.created,
        expires=verified.expires,
        signer=verified.signer,
        name=NAMED,
        variant=variant,
        digest=image["digest"],
        sbom=referrer["digest"],
        bundle_manifest=labels["org.llmkeep.bundle.manifest"],
        policy_revision=labels["org.llmkeep.policy.revision"],
        layers=[each.layer for each in made],
    )


def _config(made: list[Made], verified: Manifest, labels: dict[str, str]) -> dict[str, Any]:
    return {
        "created": verified.created,
        "architecture": "amd64",
        "os": "linux",
        "config": {
            "User": f"{contents.USER}:{contents.USER}",
            "Env": [f"{name}={value}" for name, value in ENVIRONMENT.items()],
            "Cmd": ["llm-serve", "--help"],
            "WorkingDir": "/",
            "Labels": labels,
        },
        "rootfs": {"type": "layers", "diff_ids": [each.layer.diff_id for each in made]},
        "history": [
            {"created": verified.created, "created_by": "llmkeep image build", "comment": each.layer.name}
            for each in made
        ],
    }


def _labels(source: contents.Source, variant: str) -> dict[str, str]:
    verified, tree = source.manifest, source.bundle / "tree"
    commits = {entry.source for entry in verified.files if entry.path.startswith("tree/")}
    return {
        "org.llmkeep.bundle.manifest": cache.sha256(source.bundle / manifest.NAME),
        "org.llmkeep.bundle.serial": str(verified.serial),
        "org.llmkeep.policy.revision": policy.read(tree / "policy").sha256,
        "org.opencontainers.image.created": verified.created,
        "org.opencontainers.image.description": "Gateway, engines, audit writer, OPA and edge of a private LLM",
        "org.opencontainers.image.licenses": "Apache-2.0",
        "org.opencontainers.image.revision": ",".join(sorted(commits)),
        "org.opencontainers.image.title": f"llmkeep ({variant})",
        "org.opencontainers.image.version": str(verified.serial),
    }
