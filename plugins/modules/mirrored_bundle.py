#!/usr/bin/python
"""State module: the bundle that the mirror serves is signed, unexpired, complete, and no older than one served before."""

from __future__ import annotations

DOCUMENTATION = r"""
module: mirrored_bundle
short_description: Verify the bundle that is about to be served, and record its serial
description:
  - Verifies the manifest's signature with C(sqv) against the keyring that bootstrap accepted, its type and expiry, and
    that its serial is not lower than the highest recorded on this host. A higher serial is recorded.
  - With I(wanted), also returns what the manifest lacks. Debian packages are compared by name, since the
    builder may have pinned a later version; wheels and weights are compared by version.
  - The files themselves were verified by bootstrap; C(llmkeep bundle verify) verifies them again at any time.
author: [llmkeep contributors (@llmkeep)]
options:
  path: {description: Directory of the bundle., type: path, default: /srv/llmkeep/bundle/current}
  keyring: {description: Trusted keys., type: path, default: /etc/apt/keyrings/llmkeep.pgp}
  seen: {description: File that records the highest serial served here., type: path, default: /var/lib/llmkeep/serial}
  wanted: {description: Package URLs that the bundle must contain., type: list, elements: str, default: []}
  folders:
    description: Folders that the mirror must have, of the bundle or, below C(releases/), of the estate's own releases.
    type: list
    elements: str
    default: []
  releases: {description: Directory of the estate's releases., type: path, default: /srv/llmkeep/releases}
"""

EXAMPLES = r"""
- name: Verify the bundle
  llmkeep.estate.mirrored_bundle:
    path: /srv/llmkeep/bundle/current
"""

RETURN = r"""
serial: {description: Serial of the bundle., returned: always, type: int}
expires: {description: End of its validity., returned: always, type: str}
missing: {description: Package URLs that are not in it., returned: always, type: list, elements: str}
missing_folders: {description: Folders that the mirror does not have., returned: always, type: list, elements: str}
ansible_facts: {description: "C(llmkeep_programs): names of the programs in it.", returned: always, type: dict}
"""

import json
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.llmkeep.estate.plugins.module_utils.config import files as atomic
from ansible_collections.llmkeep.estate.plugins.module_utils.refused import Refused


def signed_manifest(folder: Path, keyring: Path) -> dict[str, Any]:
    """The manifest, once its signature holds and it is a bundle's."""
    manifest, signature = folder / "MANIFEST.json", folder / "MANIFEST.json.sig"
    for path in (manifest, signature, keyring):
        if not path.is_file():
            raise Refused(
                f"{path} does not exist: this host was not bootstrapped from the medium. Connect the medium, compare"
                " bootstrap's sha256, and run it on this host"
            )
    done = subprocess.run(
        ["sqv", "--keyring", str(keyring), "--signature-file", str(signature), str(manifest)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if done.returncode != 0:
        raise Refused(
            f"the signature of {manifest} does not hold ({done.stderr.strip()}): it was changed after"
            " bootstrap, or comes from another source. Bootstrap again from a stick you trust"
        )
    document: dict[str, Any] = json.loads(manifest.read_bytes())
    if (stated := document.get("type")) != "bundle":
        raise Refused(
            f"{manifest} is signed as {stated!r}, and 'bundle' is needed: the same key signs other documents."
            " Bootstrap again from a stick you trust"
        )
    return document


def judged(document: dict[str, Any], highest: int, now: datetime) -> None:
    """Refuse a replayed or an expired bundle."""
    if int(document["serial"]) < highest:
        raise Refused(
            f"the bundle's serial is {document['serial']}, but this host has seen {highest}: an old bundle would "
            "reintroduce fixed vulnerabilities. Bootstrap from the newest medium"
        )
    expires = datetime.fromisoformat(document["expires"])
    if now >= expires:
        raise Refused(
            f"the bundle expired at {document['expires']} and this host's clock says"
            f" {now:%Y-%m-%dT%H:%M:%SZ}: set the clock, or bootstrap from a newer medium"
        )


def identity(purl: str) -> str:
    """What two package URLs share that mean the same thing: of a Debian package the name."""
    plain = purl.split("?", 1)[0].split("#", 1)[0]
    return plain.rsplit("@", 1)[0] if plain.startswith("pkg:deb/") else plain


def lacking(document: dict[str, Any], purls: list[str]) -> list[str]:
    """Those of `purls` that the manifest does not list."""
    carried = {identity(entry["purl"]) for entry in document["files"] if entry.get("purl")}
    return sorted(purl for purl in purls if identity(purl) not in carried)


def lacking_folders(document: dict[str, Any], releases: Path, folders: list[str]) -> list[str]:
    """Which of the folders neither the manifest nor the directory of releases has."""
    paths = [str(entry["path"]) for entry in document["files"]]
    return [
        folder
        for folder in folders
        if not (
            (releases / folder.removeprefix("releases/") / "MANIFEST.json").is_file()
            if folder.startswith("releases/")
            else any(path.startswith(f"{folder}/") for path in paths)
        )
    ]


def programs(document: dict[str, Any]) -> list[str]:
    """Names of the programs that the bundle carries beside Debian's packages."""
    return sorted(
        entry["path"].removeprefix("bin/") for entry in document["files"] if entry["path"].startswith("bin/")
    )


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "default": "/srv/llmkeep/bundle/current"},
            "keyring": {"type": "path", "default": "/etc/apt/keyrings/llmkeep.pgp"},
            "seen": {"type": "path", "default": "/var/lib/llmkeep/serial"},
            "wanted": {"type": "list", "elements": "str", "default": []},
            "folders": {"type": "list", "elements": "str", "default": []},
            "releases": {"type": "path", "default": "/srv/llmkeep/releases"},
        },
        supports_check_mode=True,
    )
    remembered = Path(module.params["seen"])
    try:
        document = signed_manifest(Path(module.params["path"]), Path(module.params["keyring"]))
        highest = int(remembered.read_text()) if remembered.exists() else 0
        judged(document, highest, datetime.now(UTC))
    except (Refused, ValueError, KeyError) as problem:
        module.fail_json(msg=str(problem))
    serial = int(document["serial"])
    if serial > highest and not module.check_mode:
        remembered.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_file(remembered, f"{serial}\n".encode(), 0, 0, 0o644)
    module.exit_json(
        changed=serial > highest,
        serial=serial,
        expires=document["expires"],
        missing=lacking(document, module.params["wanted"]),
        missing_folders=lacking_folders(document, Path(module.params["releases"]), module.params["folders"]),
        ansible_facts={"llmkeep_programs": programs(document)},
    )


if __name__ == "__main__":
    main()
