#!/usr/bin/python
"""State module: a folder of the bundle, fetched from the mirror, verified, and read-only from then on."""

from __future__ import annotations

DOCUMENTATION = r"""
module: bundle_folder
short_description: Install folders of the bundle, verified against its signed manifest
description:
  - Downloads every file from the mirror by TLS 1.3, resumes interrupted downloads, and verifies each file by its
    hash in the bundle's manifest, whose OpenPGP signature is verified on this host. Waits for a mirror that is busy.
  - C(journalctl -ft llmkeep-fetch) on the host follows it, with an estimate of the time that is left.
  - A folder appears whole or not at all. Files get mode 0444 and belong to root.
  - Writes C(SHA256SUMS) into it, which C(sha256sum --check) and the engine read.
  - Where the file system has fs-verity, the kernel checks each read of the files from then on, and C(FOLDER.fsverity)
    beside the folder records their digests.
  - A no-change run compares names, sizes, modes, times and fs-verity digests; C(deep) hashes again, and fetches what differs.
author: [llmkeep contributors (@llmkeep)]
options:
  url: {description: Base URL of the mirror., type: str, required: true}
  folders: {description: Folders in the bundle; the list may be empty., type: list, elements: str, required: true}
  dest: {description: Parent directory; each folder is installed under its base name., type: path, required: true}
  deep: {description: Hash all installed files again., type: bool, default: false}
  units: {description: Units that read the folders., type: list, elements: str, default: []}
  ca: {description: The estate's root certificate., type: path, default: /etc/llmkeep/pki/root.pem}
  keyring: {description: Trusted keys., type: path, default: /etc/apt/keyrings/llmkeep.pgp}
  certificate:
    description: This host's certificate, with its key beside it as C(.key), for folders that the mirror gives to hosts only.
    type: path
  seen:
    description:
      - File that records the highest serial of this release accepted on this host. A lower serial is refused, and an
        expired manifest is not fetched. Without it the manifest is the bundle's, whose serial the mirror enforces.
    type: path
"""

EXAMPLES = r"""
- name: Fetch the weights
  llmkeep.estate.bundle_folder:
    url: "{{ mirror_url }}"
    folders: [models/smollm2-135m-instruct]
    dest: /srv/llmkeep/models
"""

RETURN = r"""
fetched: {description: Folders that were or would be fetched., returned: always, type: list, elements: str}
sealed: {description: Folders whose files the kernel checks from now on., returned: always, type: list, elements: str}
bytes: {description: "Size of each folder by its base name, as signed.", returned: once the host trusts the mirror, type: dict}
"""

import contextlib
import os
import shutil
import stat
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.llmkeep.estate.plugins.module_utils.bundle import mirror, verity
from ansible_collections.llmkeep.estate.plugins.module_utils.config import files as atomic

SUMS = verity.SUMS


def hashes(content: dict[str, Any]) -> dict[str, str]:
    """SHA-256 of each file, by path."""
    return {name: entry.sha256 for name, entry in content.items()}


def sums(content: dict[str, Any]) -> str:
    """What sha256sum would print of the folder."""
    return "".join(f"{entry.sha256}  {name}\n" for name, entry in sorted(content.items()))


def is_there(dest: Path, content: dict[str, Any], deep: bool) -> bool:
    """Is the folder as wanted? Contents are hashed where deep, or where a file is younger than its sums."""
    record = dest / SUMS
    if (
        not atomic.is_safe(dest)
        or dest.is_symlink()
        or not record.is_file()
        or record.read_text() != sums(content)
    ):
        return False
    written = record.stat().st_mtime_ns
    names = set()
    for path in dest.rglob("*"):
        status = path.lstat()
        if stat.S_ISDIR(status.st_mode):
            if not atomic.is_safe(path):
                return False
            continue
        if path == record:
            continue
        name = str(path.relative_to(dest))
        names.add(name)
        entry = content.get(name)
        if entry is None or not stat.S_ISREG(status.st_mode) or status.st_size != entry.size:
            return False
        if stat.S_IMODE(status.st_mode) != 0o444 or status.st_uid != os.geteuid():
            return False
        if (deep or status.st_mtime_ns > written) and not verity.is_on_disk(path, entry.sha256):
            return False
    return names == set(content)


def seal(folder: Path, dest: Path, content: dict[str, Any]) -> None:
    """Have the kernel check the files of a folder that is or becomes dest, and record their digests, where it can."""
    record = verity.record_of(dest)
    if text := verity.seal_all(folder, hashes(content), verity.recorded(record)):
        atomic.write_file(record, text.encode(), os.geteuid(), os.getegid(), 0o444)


def install(source: Any, dest: Path, content: dict[str, Any], units: list[str]) -> None:
    """Fetch into a hidden folder beside dest, then exchange the two."""
    partial, old = dest.parent / f".{dest.name}.partial", dest.parent / f".{dest.name}.old"
    atomic.make_directories(dest.parent, 0o755)
    if not atomic.is_safe(partial) or partial.is_symlink():
        forget(partial)
        atomic.make_directory(partial, 0o755)
    for name in content:
        here = dest / name
        if (
            atomic.is_safe(here.parent)
            and not (partial / name).exists()
            and here.is_file()
            and not here.is_symlink()
        ):
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(OSError):  # what cannot be read is fetched
                shutil.copy2(here, partial / name)
    progress = mirror.progress_of(
        dest.name, partial, [(entry, partial / name) for name, entry in content.items()]
    )
    for name, entry in content.items():
        source.fetch(entry, partial / name, progress)
    progress.end()
    for path in sorted(partial.rglob("*"), reverse=True):
        if path.is_dir():
            atomic.set_attributes(path, os.geteuid(), os.getegid(), 0o755)
        elif str(path.relative_to(partial)) in content:
            atomic.set_attributes(path, os.geteuid(), os.getegid(), 0o444)
        else:
            path.unlink()
    atomic.write_file(partial / SUMS, sums(content).encode(), os.geteuid(), os.getegid(), 0o444)
    atomic.set_attributes(partial, os.geteuid(), os.getegid(), 0o755)
    try:
        seal(partial, dest, content)
    except verity.Altered as problem:
        problem.path.unlink()
        raise
    atomic.mark_pending(units)
    forget(old)
    if atomic.status_of(dest) is not None:
        dest.rename(old)
    partial.rename(dest)
    atomic.fsync_directory(dest.parent)
    forget(old)


def forget(path: Path) -> None:
    """Remove what is there, a folder with all that is in it; nothing where nothing is."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def judged(manifest: dict[str, Any], highest: int, url: str) -> int:
    """The serial of a manifest that stands for itself; an older one than was accepted before is refused."""
    serial = int(manifest["serial"])
    if serial < highest:
        raise mirror.MirrorError(
            f"{url} has serial {serial}, but this host has had {highest}: an old one was put back. Find out who changed the "
            "mirror, and add the newest release again (`llmkeep release add`)"
        )
    return serial


def in_date(manifest: dict[str, Any], url: str, now: datetime) -> None:
    """Refuse to fetch what has expired."""
    if now >= datetime.fromisoformat(manifest["expires"]):
        raise mirror.MirrorError(
            f"{url} expired at {manifest['expires']}, and this host's clock says {now:%Y-%m-%dT%H:%M:%SZ}: set the clock, "
            "or publish and sign the model again"
        )


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "url": {"type": "str", "required": True},
            "folders": {"type": "list", "elements": "str", "required": True},
            "dest": {"type": "path", "required": True},
            "deep": {"type": "bool", "default": False},
            "units": {"type": "list", "elements": "str", "default": []},
            "ca": {"type": "path", "default": "/etc/llmkeep/pki/root.pem"},
            "keyring": {"type": "path", "default": "/etc/apt/keyrings/llmkeep.pgp"},
            "certificate": {"type": "path"},
            "seen": {"type": "path"},
        },
        supports_check_mode=True,
    )
    parameters = module.params
    if parameters["folders"] and mirror.not_trusted_yet(
        module, parameters["ca"], parameters["keyring"], parameters["certificate"]
    ):
        module.exit_json(changed=True, fetched=parameters["folders"], sealed=[])
    fetched, sealed, sizes = [], [], {}
    try:
        if parameters["folders"]:
            certificate = Path(parameters["certificate"]) if parameters["certificate"] else None
            source = mirror.Mirror(
                parameters["url"], Path(parameters["ca"]), Path(parameters["keyring"]), certificate
            )
            remembered = Path(parameters["seen"]) if parameters["seen"] else None
            manifest = source.manifest("release" if remembered else "bundle")
            highest = int(remembered.read_text()) if remembered and remembered.exists() else 0
            serial = judged(manifest, highest, parameters["url"]) if remembered else 0
        for folder in [name.strip("/") for name in parameters["folders"]]:
            entries = mirror.entries(manifest, folder)
            content = {entry.path[len(folder) + 1 :]: entry for entry in entries}
            dest = Path(parameters["dest"]) / Path(folder).name
            sizes[dest.name] = sum(entry.size for entry in entries)
            there = is_there(dest, content, parameters["deep"])
            if there and not verity.is_sealed(dest, hashes(content), verity.record_of(dest)):
                sealed.append(folder)
                if not module.check_mode:
                    try:
                        seal(dest, dest, content)
                    except verity.Altered:
                        there = False
            if not there:
                if remembered:
                    in_date(manifest, parameters["url"], datetime.now(UTC))
                fetched.append(folder)
                if not module.check_mode:
                    install(source, dest, content, parameters["units"])
        if parameters["folders"] and remembered and serial > highest and not module.check_mode:
            remembered.parent.mkdir(parents=True, exist_ok=True)
            atomic.write_file(remembered, f"{serial}\n".encode(), os.geteuid(), os.getegid(), 0o644)
    except (mirror.MirrorError, verity.Altered, OSError, ValueError, KeyError) as problem:
        module.fail_json(msg=str(problem))
    module.exit_json(changed=bool(fetched or sealed), fetched=fetched, sealed=sealed, bytes=sizes)


if __name__ == "__main__":
    main()
