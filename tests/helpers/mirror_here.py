"""An estate's authority, and its mirror: the role's nginx, in the network namespace of this thread."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rendered_role import content, rendered
from role_nginx import COMMON, configuration, running

from llmkeep.pki import authority as pki
from llmkeep.pki import revoking
from llmkeep.places import Places

GROUPS = {"mirror": ["ops1"], "control": ["ops1"]}


def configured(
    folder: Path,
    hosts: dict[str, str],
    port: int,
    groups: dict[str, list[str]] = GROUPS,
    readers: list[str] | None = None,
) -> dict[str, Any]:
    """Files that role mirror writes on ops1, with the bundle in FOLDER; HOSTS are full names and addresses."""
    given = {
        "mirror_port": port,
        "_common_nginx_user": "root",
        "mirror_bundle": str(folder / "bundle"),
        "mirror_docs_from": readers or [],
    }
    found: dict[str, Any] = rendered(folder, "mirror", COMMON, "ops1", hosts, given, groups, configured=True)
    return {**found, "folder": folder, "port": port}


def certify(places: Places, name: str, alternative: str) -> Path:
    """A key, and a certificate of the estate's CA for the host or user NAME, with a DNS name or an address."""
    path = places.root / f"{name}.pem"
    asked = f"{'IP' if alternative.replace('.', '').isdecimal() else 'DNS'}:{alternative}"
    request = subprocess.run(
        ["openssl", "req", "-quiet", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
         "-subj", f"/CN={name}", "-addext", f"subjectAltName={asked}", "-keyout", str(path.with_suffix(".key"))],
        capture_output=True, check=True,
    ).stdout  # fmt: skip
    path.write_bytes(pki.sign(places, request, [alternative], name))
    return path


@contextmanager
def authority(folder: Path) -> Iterator[Places]:
    """A new one; its sealing is left out."""
    found = Places(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pki, "seal", lambda secret, _: secret)
        patch.setattr(pki, "unseal", lambda sealed, _: sealed)
        patch.setattr(pki, "encrypt_to", lambda *_: b"")
        pki.init(found, "estate.internal", Path("escrow.pem"), list(pki.NETWORKS))
        yield found


@contextmanager
def mirror(made: dict[str, Any], places: Places, alternative: str) -> Iterator[None]:
    """The mirror as `configured`, with the images of FOLDER/srv/llmkeep/images, under this name."""
    folder: Path = made["folder"]
    (folder / "pki").mkdir()
    host = certify(places, "ops1", alternative)
    for suffix in (".pem", ".key"):
        shutil.copy(host.with_suffix(suffix), folder / f"pki/host{suffix}")
    shutil.copy(places.root_certificate, folder / "pki/root.pem")
    revoking.publish(places)
    shutil.copy(places.revocation_list, folder / "pki/crl.pem")
    (folder / "images").symlink_to("srv/llmkeep/images")
    server = content(made, "conf.d/llmkeep-mirror.conf")
    with running(folder, configuration(folder, made["nginx"], server, {"/srv/llmkeep": str(folder)})):
        yield
