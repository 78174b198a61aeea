"""Model directories: no file of a model is opened before all of them match their hashes in the manifest.

The manifest has the format of `sha256sum`: a hash, two spaces, a path relative to the model's directory.
"""

import errno
import hashlib
import logging
import os
import re
import stat
import time
from pathlib import Path

from llmcore import verity
from llmcore.files import sha256_of

log = logging.getLogger("llmcore.manifest")

LINE = re.compile(r"([0-9a-f]{64})  ([^\0\n]+)")
PICKLED = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}


class ManifestError(Exception):
    """A model directory that differs from its manifest."""


def read_manifest(path: Path) -> dict[str, str]:
    """Relative path to SHA-256 for each line of the manifest; raises ManifestError."""
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise ManifestError(
            f"cannot read the manifest {path}: {error.strerror}; install the model from the bundle again"
        ) from error
    entries: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        match = LINE.fullmatch(line)
        if not match:
            raise ManifestError(f"{path} line {number} is {line[:80]!r}: expected '<sha256>  <path>'")
        name = match[2]
        if name.startswith("/") or ".." in Path(name).parts:
            raise ManifestError(f"{path} line {number} names {name!r}, which leaves the model's directory")
        entries[name] = match[1]
    if not entries:
        raise ManifestError(f"{path} is empty: a model has at least weights and a configuration")
    return entries


def verify_model(directory: Path, manifest: Path) -> str:
    """Verify every file of `directory`; returns the model's revision, the first 16 hex digits of the manifest's
    SHA-256.

    Files that the kernel checks (fs-verity) by the digest on record for their SHA-256 are read to the end, all others hashed.
    Raises ManifestError for a missing, extra, changed or pickled file, and for anything but regular files.
    """
    entries = read_manifest(manifest)
    present = set()
    for folder, _, names in os.walk(directory):
        for name in names:
            path = Path(folder, name)
            if path == manifest:
                continue
            relative = str(path.relative_to(directory))
            if not stat.S_ISREG(path.lstat().st_mode):
                raise ManifestError(f"{path} is not a regular file: a model contains nothing else")
            if relative not in entries:
                raise ManifestError(f"{path} is not in the manifest {manifest}: remove it")
            if path.suffix in PICKLED:
                raise ManifestError(f"{path} can run code when it is loaded: only safetensors are accepted")
            present.add(relative)
    for relative in sorted(entries.keys() - present):
        raise ManifestError(f"{directory / relative} is missing: install the model from the bundle again")
    installed, by_kernel, began = verity.recorded(directory), 0, time.monotonic()
    for relative, digest in sorted(entries.items()):
        path = directory / relative
        try:
            if relative in installed and installed[relative] == (digest, verity.measured(path)):
                verity.read(path)
                by_kernel += 1
                continue
            actual = sha256_of(path)
        except OSError as error:
            way = "check its owner and its disk"
            if error.errno == errno.EIO:
                way = "its disk is damaged or was tampered with, and `llmkeep site -e weights_deep=true` installs it again"
            raise ManifestError(f"cannot read {path}: {error.strerror}; {way}") from error
        if actual != digest:
            raise ManifestError(
                f"{path} has sha256 {actual}, its manifest says {digest}: install the model from the bundle again"
            )
    fields = {"kernel_verified": by_kernel, "hashed": len(entries) - by_kernel}
    log.info("files verified", extra={"fields": {**fields, "seconds": round(time.monotonic() - began, 3)}})
    return hashlib.sha256(manifest.read_bytes()).hexdigest()[:16]


def write_manifest(directory: Path, manifest: Path) -> None:
    """Write the manifest of the files in `directory`."""
    lines = []
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path != manifest:
            lines.append(f"{sha256_of(path)}  {path.relative_to(directory)}\n")
    manifest.write_text("".join(lines))


def manifest_of(directory: Path) -> Path:
    """Path of a model's manifest: DIRECTORY.sha256 beside it, or SHA256SUMS in it, as roles install it.

    Raises ManifestError if there is neither.
    """
    beside, inside = directory.parent / f"{directory.name}.sha256", directory / "SHA256SUMS"
    for path in beside, inside:
        if path.is_file():
            return path
    raise ManifestError(
        f"{directory} has no manifest, neither {beside} nor {inside}: install the model from the bundle, or write one for a "
        "model that you trust (sha256sum)"
    )


def verified(directory: Path, manifest: Path | None = None) -> str:
    """Verify a model against `manifest`, or its own; returns the manifest's full SHA-256."""
    manifest = manifest or manifest_of(directory)
    verify_model(directory, manifest)
    return hashlib.sha256(manifest.read_bytes()).hexdigest()
