#!/usr/bin/python
"""State module: releases of a Python program, side by side."""

from __future__ import annotations

DOCUMENTATION = r"""
module: release
short_description: Install a wheelhouse of the bundle as a release beside the existing ones
description:
  - The release's name is a hash of its wheels; the same wheels change nothing.
  - Wheels are fetched from the mirror, verified by the signed manifest and by their own records, and unpacked, over
    Debian's own packages where they are used. What a wheel requires must be there in a version that it accepts.
  - A release is complete once its record is written; an incomplete one, after a power cut, is installed again.
  - No unit runs the release yet; M(llmkeep.estate.release_rollout) moves units to it.
  - The current release, and releases that a unit runs, are never removed.
author: [llmkeep contributors (@llmkeep)]
options:
  url: {description: Base URL of the mirror., type: str, required: true}
  folder: {description: Wheelhouse in the bundle with its requirements.txt., type: str, required: true}
  root: {description: Folder of releases and of the links to them., type: path, default: /opt/llmkeep}
  keep: {description: Number of releases to keep., type: int, default: 2}
  over_debian: {description: "Whether the environment includes Debian's own Python packages.", type: bool, default: true}
  ca: {description: The estate's root certificate., type: path, default: /etc/llmkeep/pki/root.pem}
  keyring: {description: Trusted keys., type: path, default: /etc/apt/keyrings/llmkeep.pgp}
"""

EXAMPLES = r"""
- name: Install the serving environment
  llmkeep.estate.release:
    url: "{{ mirror_url }}"
    folder: wheels/serving
"""

RETURN = r"""
id: {description: Name of the release., returned: always, type: str}
"""

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.llmkeep.estate.plugins.module_utils.bundle import mirror, wheels
from ansible_collections.llmkeep.estate.plugins.module_utils.config import files as atomic
from ansible_collections.llmkeep.estate.plugins.module_utils.refused import Refused

INSTALL_SECONDS = 1800
RECORD = "release.json"


def release_id(listed: list[Any]) -> str:
    """Twelve hex digits that change when, and only when, a wheel or the requirements do."""
    lines = "".join(f"{entry.sha256} {entry.path}\n" for entry in listed)
    return hashlib.sha256(lines.encode()).hexdigest()[:12]


def run(argv: list[str], entered: str = "") -> str:
    environment = {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "LC_ALL": "C.UTF-8",
        "HOME": "/root",
        "PYTHONHASHSEED": "0",
    }
    try:
        done = subprocess.run(
            argv,
            input=entered,
            capture_output=True,
            text=True,
            timeout=INSTALL_SECONDS,
            check=False,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        raise Refused(f"{' '.join(argv[:4])} did not end within {INSTALL_SECONDS} s") from None
    if done.returncode != 0:
        raise Refused(
            f"{' '.join(argv)} ended with {done.returncode}: {(done.stderr + done.stdout).strip()[-1500:]}"
        )
    return done.stdout


def make(source: Any, listed: list[Any], target: Path, serial: object, over_debian: bool = True) -> None:
    """Fetch the wheels and build the release; its record is written last."""
    shutil.rmtree(target, ignore_errors=True)
    wheelhouse = target.parent / f".wheels-{target.name}"
    hashes = {Path(entry.path).name: entry.sha256 for entry in listed}
    files = sorted(name for name in hashes if name.endswith(".whl"))
    for entry in listed:
        if entry.path.endswith(".whl"):
            source.fetch(entry, wheelhouse / Path(entry.path).name)
    options = ["--system-site-packages"] if over_debian else []
    run(["/usr/bin/python3", "-m", "venv", "--without-pip", *options, str(target)])
    for name in files:
        wheels.unpack(wheelhouse / name, target)
    python = [str(target / "bin/python"), "-B", "-P", "-s"]
    path = run([*python, "-c", "import sys; print(*sys.path, sep='\\n')"]).splitlines()
    if lacking := wheels.faults(files, path):
        raise Refused(
            f"{target.name} is not whole: {'; '.join(lacking)}; resolve the lock again, and build the bundle again"
        )
    run([*python, "-S", "-W", "ignore", "-c", wheels.COMPILE], wheels.sources(target))
    run(["sync", "--file-system", str(target)])
    record = {"id": target.name, "bundle_serial": serial, "wheels": hashes}
    content = json.dumps(record, indent=1, sort_keys=True).encode() + b"\n"
    atomic.write_file(target / RECORD, content, os.geteuid(), os.getegid(), 0o644)
    shutil.rmtree(wheelhouse)


def in_use(root: Path) -> set[str]:
    """Releases that are current, or that a unit runs."""
    links = [root / "current", *(root / "units").glob("*")]
    return {link.readlink().name for link in links if link.is_symlink()}


def forget_old(releases: Path, used: set[str], keep: int) -> list[str]:
    """Remove what is neither used nor among the youngest; half-made releases always go."""
    whole = [path for path in releases.iterdir() if path.is_dir() and (path / RECORD).is_file()]
    youngest = sorted(
        whole, key=lambda path: (path.name in used, (path / RECORD).stat().st_mtime), reverse=True
    )
    stay = {path.name for path in youngest[: max(keep, len(used))]}
    gone = [path for path in releases.iterdir() if path.is_dir() and path.name not in stay]
    for path in gone:
        shutil.rmtree(path)
    return sorted(path.name for path in gone)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "url": {"type": "str", "required": True},
            "folder": {"type": "str", "required": True},
            "root": {"type": "path", "default": "/opt/llmkeep"},
            "keep": {"type": "int", "default": 2},
            "over_debian": {"type": "bool", "default": True},
            "ca": {"type": "path", "default": "/etc/llmkeep/pki/root.pem"},
            "keyring": {"type": "path", "default": "/etc/apt/keyrings/llmkeep.pgp"},
        },
        supports_check_mode=True,
    )
    parameters = module.params
    if parameters["keep"] < 1:
        module.fail_json(
            msg=f"keep is {parameters['keep']}; at least the current release has to stay: take 1 or more"
        )
    if mirror.not_trusted_yet(module, parameters["ca"], parameters["keyring"]):
        module.exit_json(changed=True, id="unknown")
    root = Path(parameters["root"])
    releases = root / "releases"
    try:
        source = mirror.Mirror(parameters["url"], Path(parameters["ca"]), Path(parameters["keyring"]))
        manifest = source.manifest("bundle")
        listed = mirror.entries(manifest, parameters["folder"].strip("/"))
        target = releases / release_id(listed)
        made = (target / RECORD).is_file()
        if not module.check_mode and not made:
            releases.mkdir(parents=True, exist_ok=True, mode=0o755)
            make(source, listed, target, manifest["serial"], parameters["over_debian"])
            forget_old(releases, {*in_use(root), target.name}, parameters["keep"])
    except (Refused, mirror.MirrorError, OSError) as problem:
        module.fail_json(msg=str(problem))
    module.exit_json(changed=not made, id=target.name)


if __name__ == "__main__":
    main()
