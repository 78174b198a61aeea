#!/usr/bin/python
"""State module: what the control node serves, copied to a mirror on another host, verified."""

from __future__ import annotations

DOCUMENTATION = r"""
module: mirror_copy
short_description: Copy bundle, releases and container images from the control node to the estate's mirror
description:
  - Downloads by TLS 1.3, resumes interrupted downloads, and verifies each file by its hash in a document whose OpenPGP
    signature is verified on this host. Contents that this host has in another bundle or release are linked.
  - C(journalctl -ft llmkeep-fetch) on the host follows it, with an estimate of the time that is left.
  - The bundle gets its name by one rename once it is complete, and C(current) points at it; the bundle before stays, for
    rollbacks. A bundle older than the one in use is refused.
  - Releases stay until a newer one of the same name comes. An image that the control node no longer has is removed.
  - A no-change run compares names and sizes; C(deep) hashes all files again, and copies what differs.
author: [llmkeep contributors (@llmkeep)]
options:
  url: {description: Base URL of the control node's server., type: str, required: true}
  releases: {description: Names of its releases., type: list, elements: str, default: []}
  images: {description: "Digests of its images, without C(sha256:).", type: list, elements: str, default: []}
  root: {description: Directory of what is served., type: path, default: /srv/llmkeep}
  deep: {description: Hash all files again., type: bool, default: false}
  ca: {description: The estate's root certificate., type: path, default: /etc/llmkeep/pki/root.pem}
  certificate:
    description: This host's certificate, with its key beside it as C(.key).
    type: path
    default: /etc/llmkeep/pki/host.pem
  keyring: {description: Keys that sign bundles and images., type: path, default: /etc/apt/keyrings/llmkeep.pgp}
  publish_keyring: {description: Keys that sign releases., type: path, default: /etc/llmkeep/publish/keyring.pgp}
"""

EXAMPLES = r"""
- name: Copy what the control node has
  llmkeep.estate.mirror_copy:
    url: https://ops1.estate.internal:8443
    releases: [support]
"""

RETURN = r"""
copied: {description: "What was copied, such as C(bundle 7) or C(releases/m).", returned: always, type: list, elements: str}
removed: {description: Digests of the images that were removed., returned: always, type: list, elements: str}
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.llmkeep.estate.plugins.module_utils.bundle.mirror import (
    MANIFEST,
    MANIFEST_BYTES,
    Entry,
    Mirror,
    MirrorError,
    Statement,
    entries,
    not_trusted_yet,
    progress_of,
)
from ansible_collections.llmkeep.estate.plugins.module_utils.config import files as atomic

RECORD = "image.json"
NAME = re.compile(r"[a-z0-9][a-z0-9.-]{0,62}")
DIGEST = re.compile(r"[0-9a-f]{64}")


def is_file(path: Path, entry: Entry, deep: bool) -> bool:
    """Whether a regular file has the entry's size and, with `deep`, its hash."""
    status = atomic.status_of(path)
    return (
        status is not None
        and stat.S_ISREG(status.st_mode)
        and status.st_size == entry.size
        and (not deep or atomic.sha256_of(path) == entry.sha256)
    )


def states(folder: Path, name: str, statement: Statement) -> bool:
    """Whether a folder has this statement and its signature."""
    signed, signature = folder / name, folder / f"{name}.sig"
    return (
        signed.is_file()
        and signature.is_file()
        and signed.read_bytes() == statement.content
        and signature.read_bytes() == statement.signature
    )


def write(folder: Path, name: str, statement: Statement) -> None:
    for path, content in ((folder / f"{name}.sig", statement.signature), (folder / name, statement.content)):
        atomic.write_file(path, content, os.geteuid(), os.getegid(), 0o644)


def is_whole(folder: Path, statement: Statement, deep: bool) -> bool:
    """Whether a folder has the files of its manifest, and no other."""
    listed = {entry.path: entry for entry in entries(statement.document)}
    present = {
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()
    }
    return (
        states(folder, MANIFEST, statement)
        and present == {*listed, MANIFEST, f"{MANIFEST}.sig"}
        and all(is_file(folder / path, entry, deep) for path, entry in listed.items())
    )


def at_hand(root: Path) -> dict[str, Path]:
    """A file of the bundles and releases here by each SHA-256, as their manifests have it."""
    return {
        entry.sha256: path.parent / entry.path
        for pattern in ("bundle/*/", "releases/.*/")
        for path in root.glob(f"{pattern}{MANIFEST}")
        for entry in entries(json.loads(path.read_bytes()))
    }


def copy(source: Mirror, statement: Statement, target: Path, contents: dict[str, Path]) -> None:
    """Copy a folder: it gets its name once all of its files are as signed. One of this name that is damaged is replaced."""
    listed = entries(statement.document)
    partial = target.with_name(f".partial-{target.name}")
    for stale in {*target.parent.glob(".partial-*")} - {partial}:
        shutil.rmtree(stale)
    if atomic.status_of(partial) is not None and not atomic.is_safe(partial):
        raise MirrorError(
            f"{partial} can be changed by a user other than root: find out who created it, and remove it"
        )
    atomic.make_directories(partial, 0o755)
    for entry in listed:
        path = partial / entry.path
        if not path.exists() and entry.sha256 in contents:
            path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(OSError):  # what cannot be linked is downloaded
                path.hardlink_to(contents[entry.sha256])
    progress = progress_of(target.name, partial, [(entry, partial / entry.path) for entry in listed])
    for entry in listed:
        source.fetch(entry, partial / entry.path, progress)
    progress.end()
    for path in [path for path in partial.rglob("*") if not path.is_dir()]:
        if str(path.relative_to(partial)) not in {entry.path for entry in listed}:
            path.unlink()
    write(partial, MANIFEST, statement)
    for path in (partial, *(path for path in partial.rglob("*") if path.is_dir())):
        atomic.fsync_directory(path)  # on disk before it gets its name
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)
    atomic.fsync_directory(target.parent)


class Copies:
    """A run of the module. `copied` and `removed` name what changed, or would change in check mode."""

    def __init__(self, params: dict[str, Any], check_mode: bool) -> None:
        self.params, self.check_mode = params, check_mode
        self.root = Path(params["root"])
        self.copied: list[str] = []
        self.removed: list[str] = []

    def source(self, place: str = "", keyring: str = "keyring") -> Mirror:
        params = self.params
        certificate = Path(params["certificate"])
        return Mirror(f"{params['url']}{place}", Path(params["ca"]), Path(params[keyring]), certificate)

    def bundle(self) -> None:
        """Copy the bundle in use, and keep the one before."""
        source, folder = self.source(), self.root / "bundle"
        statement = source.statement(MANIFEST, "bundle")
        serial, standing = int(statement.document["serial"]), 0
        if (folder / "current" / MANIFEST).is_file():
            standing = int(json.loads((folder / "current" / MANIFEST).read_bytes())["serial"])
        if serial < standing:
            raise MirrorError(
                f"{source.url} has the bundle {serial}, and this mirror has {standing}: an old bundle reintroduces fixed "
                "vulnerabilities. Run bootstrap on the control node from the newest medium"
            )
        target, current = folder / str(serial), folder / "current"
        whole = is_whole(target, statement, self.params["deep"])
        if whole and current.is_symlink() and current.readlink() == Path(target.name):
            return
        self.copied.append(f"bundle {serial}")
        if self.check_mode:
            return
        if not whole:
            copy(source, statement, target, at_hand(self.root))
        atomic.link(current, target.name)
        numbered = sorted(
            (path for path in folder.iterdir() if path.name.isdecimal()), key=lambda path: int(path.name)
        )
        for old in numbered[:-2]:
            shutil.rmtree(old)

    def release(self, name: str) -> None:
        """Copy a release, which replaces an older one of its name."""
        source, folder = self.source(f"/releases/{name}", "publish_keyring"), self.root / "releases"
        statement = source.statement(MANIFEST, "release")
        target = folder / f".{name}-{int(statement.document['serial'])}"
        whole = is_whole(target, statement, self.params["deep"])
        if whole and (folder / name).is_symlink() and (folder / name).readlink() == Path(target.name):
            return
        self.copied.append(f"releases/{name}")
        if self.check_mode:
            return
        if not whole:
            copy(source, statement, target, at_hand(self.root))
        atomic.link(folder / name, target.name)
        for old in folder.glob(f".{name}-*"):
            if re.fullmatch(rf"\.{re.escape(name)}-\d+", old.name) and old != target:
                shutil.rmtree(old)

    def image(self, digest: str) -> None:
        """Copy the blobs of an image, then its record."""
        source, folder = self.source(), self.root / "images"
        statement = source.statement(f"images/{digest}/{RECORD}", "image")
        if statement.document["digest"] != f"sha256:{digest}":
            raise MirrorError(
                f"{source.url} has another image's record for {digest}: find out who changed it"
            )
        blobs = folder / ".blobs"
        if states(folder / digest, RECORD, statement) and not (
            self.params["deep"] and is_damaged(blobs, statement.document)
        ):
            return
        self.copied.append(f"images/{digest}")
        if self.check_mode:
            return
        atomic.make_directories(folder / digest, 0o755)
        atomic.make_directories(blobs, 0o755)
        for name in (statement.document["digest"], statement.document["sbom"]):
            content = source.small(blob(name), MANIFEST_BYTES)
            if hashlib.sha256(content).hexdigest() != blob_name(name):
                raise MirrorError(f"{source.url} has other content for {name}: find out who changed it")
            atomic.write_file(blobs / blob_name(name), content, os.geteuid(), os.getegid(), 0o644)
        for entry in referred(blobs, statement.document):
            source.fetch(entry, blobs / entry.sha256)
        atomic.fsync_directory(blobs)
        write(folder / digest, RECORD, statement)

    def stray_images(self, digests: list[str]) -> None:
        """Remove images that the control node does not have, with the blobs that no other image has."""
        folder = self.root / "images"
        self.removed = sorted({path.parent.name for path in folder.glob(f"[!.]*/{RECORD}")} - {*digests})
        if not self.removed or self.check_mode:
            return
        for digest in self.removed:
            shutil.rmtree(folder / digest)
        used: set[str] = set()
        for digest in digests:
            document = json.loads((folder / digest / RECORD).read_bytes())
            used |= {blob_name(document["digest"]), blob_name(document["sbom"])}
            used |= {entry.sha256 for entry in referred(folder / ".blobs", document)}
        for path in (folder / ".blobs").iterdir():
            if path.name not in used:
                path.unlink()


def blob(name: str) -> str:
    return f"v2/llmkeep/blobs/{name}"


def blob_name(digest: str) -> str:
    """The name of a blob's file; MirrorError where it is no SHA-256."""
    algorithm, _, name = digest.partition(":")
    if algorithm != "sha256" or not DIGEST.fullmatch(name):
        raise MirrorError(
            f"an image's record has the digest {digest!r}, and llmkeep writes sha256 alone: build the image again"
        )
    return name


def is_damaged(blobs: Path, record: dict[str, Any]) -> bool:
    """Whether a blob of an image is missing, or not as its digest says."""
    manifests = [blobs / blob_name(record[name]) for name in ("digest", "sbom")]

    def altered(path: Path) -> bool:
        return not path.is_file() or atomic.sha256_of(path) != path.name

    return any(map(altered, manifests)) or any(
        altered(blobs / entry.sha256) for entry in referred(blobs, record)
    )


def referred(blobs: Path, record: dict[str, Any]) -> Iterator[Entry]:
    """The blobs that an image's manifest and that of its SBOM refer to. Both are here, verified."""
    for name in (record["digest"], record["sbom"]):
        manifest = json.loads((blobs / blob_name(name)).read_bytes())
        for each in (manifest["config"], *manifest["layers"]):
            yield Entry(blob(each["digest"]), int(each["size"]), blob_name(each["digest"]))


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "url": {"type": "str", "required": True},
            "releases": {"type": "list", "elements": "str", "default": []},
            "images": {"type": "list", "elements": "str", "default": []},
            "root": {"type": "path", "default": "/srv/llmkeep"},
            "deep": {"type": "bool", "default": False},
            "ca": {"type": "path", "default": "/etc/llmkeep/pki/root.pem"},
            "certificate": {"type": "path", "default": "/etc/llmkeep/pki/host.pem"},
            "keyring": {"type": "path", "default": "/etc/apt/keyrings/llmkeep.pgp"},
            "publish_keyring": {"type": "path", "default": "/etc/llmkeep/publish/keyring.pgp"},
        },
        supports_check_mode=True,
    )
    params = module.params
    for kind, pattern in (("releases", NAME), ("images", DIGEST)):
        for name in params[kind]:
            if not pattern.fullmatch(name):
                module.fail_json(
                    msg=f"{kind} has {name!r}, which is not a valid name: check it on the control node"
                )
    trust = [
        params["ca"],
        params["keyring"],
        params["certificate"],
        *([params["publish_keyring"]] if params["releases"] else []),
    ]
    if not_trusted_yet(module, *trust):
        module.exit_json(changed=True, copied=[], removed=[])
    os.umask(0o022)
    copies = Copies(params, module.check_mode)
    try:
        copies.bundle()
        for name in params["releases"]:
            copies.release(name)
        for digest in params["images"]:
            copies.image(digest)
        copies.stray_images(params["images"])
    except (MirrorError, OSError, ValueError, KeyError, TypeError) as problem:
        module.fail_json(msg=str(problem))
    module.exit_json(
        changed=bool(copies.copied or copies.removed), copied=copies.copied, removed=copies.removed
    )


if __name__ == "__main__":
    main()
