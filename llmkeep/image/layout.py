"""OCI image layouts (image-spec 1.1): blobs by their sha256, a manifest, an index, and what refers to the manifest."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkeep.bundle import cache
from llmkeep.image.archive import Layer

VERSION = {"imageLayoutVersion": "1.0.0"}
INDEX = "application/vnd.oci.image.index.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
EMPTY = "application/vnd.oci.empty.v1+json"
REFERENCE = "org.opencontainers.image.ref.name"

Descriptor = dict[str, Any]


@dataclass(frozen=True)
class Layout:
    """A layout in a folder, which is being written or read."""

    folder: Path

    def blob(self, digest: str) -> Path:
        """Path of the blob with this digest, `sha256:…`."""
        return self.folder / "blobs/sha256" / digest.removeprefix("sha256:")

    def read(self, digest: str) -> Any:
        """The document in a blob. ValueError if the blob is not the one with this digest."""
        content = self.blob(digest).read_bytes()
        if (actual := hashlib.sha256(content).hexdigest()) != digest.removeprefix("sha256:"):
            raise ValueError(f"the blob {digest} has sha256 {actual}")
        return json.loads(content)

    def index(self) -> list[Descriptor]:
        """Entries of the index."""
        descriptors: list[Descriptor] = json.loads((self.folder / "index.json").read_bytes())["manifests"]
        return descriptors

    def begin(self) -> None:
        """An empty layout."""
        (self.folder / "blobs/sha256").mkdir(parents=True)
        (self.folder / "oci-layout").write_bytes(encoded(VERSION))

    def add(self, content: bytes, media_type: str) -> Descriptor:
        """Write a blob."""
        digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
        self.blob(digest).write_bytes(content)
        return {"mediaType": media_type, "digest": digest, "size": len(content)}

    def add_layer(self, layer: Layer, source: Path) -> Descriptor:
        """Take over a layer's archive."""
        cache.place(source, self.blob(layer.digest))
        return {"mediaType": LAYER, "digest": layer.digest, "size": layer.size}

    def add_image(self, layers: list[Descriptor], config: dict[str, Any]) -> Descriptor:
        """Write config and manifest of an image."""
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": self.add(encoded(config), CONFIG),
            "layers": layers,
        }
        return self.add(encoded(manifest), MANIFEST)

    def add_referrer(self, subject: Descriptor, content: bytes, kind: str) -> Descriptor:
        """Write an artifact about another manifest, as registries list it among that one's referrers. `kind`: its media type."""
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "artifactType": kind,
            "config": self.add(b"{}", EMPTY),
            "layers": [self.add(content, kind)],
            "subject": subject,
        }
        return self.add(encoded(manifest), MANIFEST) | {"artifactType": kind}

    def end(self, name: str, image: Descriptor, referrer: Descriptor) -> None:
        """Write the index: the image under its name, and its referrer under NAME.sbom."""
        platform = {"architecture": "amd64", "os": "linux"}
        listed = [
            image | {"annotations": {REFERENCE: name}, "platform": platform},
            referrer | {"annotations": {REFERENCE: f"{name}.sbom"}},
        ]
        index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": listed}
        (self.folder / "index.json").write_bytes(encoded(index))


def encoded(document: Any) -> bytes:
    """JSON whose bytes depend only on the content."""
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
