#!/usr/bin/python
"""State module: a host's own key and certificate; only requests and certificates travel."""

from __future__ import annotations

DOCUMENTATION = r"""
module: host_certificate
short_description: Keep a host's EC key and certificate, and say when a new one has to be signed
description:
  - Makes the key on the host where there is none, and keeps the estate's root certificate beside it.
  - Without I(certificate) it says in C(reasons) why a certificate has to be signed, and returns the request.
  - With I(certificate) it proves that key, names and issuer fit, puts it in place by one rename, and has the
    units reloaded that are named in C(reload.d).
  - The private key never leaves the host and is in no output.
  - A key that is in an HSM is not made here (M(llmkeep.estate.hsm_key) makes it). I(public_key) is its public part
    then, and the file of the key says for OpenSSL's provider where it is.
author: [llmkeep contributors]
options:
  names:
    description: DNS names and addresses of the host, as the certificate carries them. The first names it.
    type: list
    elements: str
    required: true
  chain: {description: The estate's issuing and then its root certificate., type: str, required: true}
  certificate: {description: A signed certificate with its chain., type: str}
  directory: {description: Where the files lie., type: path, default: /etc/llmkeep/pki}
  name: {description: What certificate and key are called there., type: str, default: host}
  public_key: {description: Public part (PEM) of a key that is in an HSM., type: str}
  key: {description: File that says where in the HSM the key is., type: path}
  openssl:
    description: How openssl is called to sign the request, which needs the PIN where the key is in an HSM.
    type: list
    elements: str
    default: [openssl]
  group: {description: The group that may read the key., type: str, default: ssl-cert}
  renew_days: {description: A certificate with fewer days left is renewed., type: int, default: 30}
  reload_unit:
    description: Unit that reloads what serves the certificate.
    type: str
    default: llmkeep-certificate.service
"""

EXAMPLES = r"""
- name: Look at the certificate
  llmkeep.estate.host_certificate:
    names: [llm1.estate.internal, 10.77.0.12]
    chain: "{{ chain.stdout }}"
  register: certificate
"""

RETURN = r"""
reasons:
  description: Why a certificate has to be signed; empty when it stands.
  returned: always
  type: list
  elements: str
request: {description: The certificate request (PEM) when there are reasons., returned: always, type: str}
days_left: {description: Days until the certificate on disk ends; -1 without one., returned: always, type: int}
"""

import ipaddress
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.llmkeep.estate.plugins.module_utils.config import files as atomic

CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----\n?", re.DOTALL)
RELOAD_SECONDS = 120


class Refused(Exception):
    """Key or certificate cannot be had or used; the message says why and what to do."""


@dataclass(frozen=True)
class Leaf:
    """What a certificate says."""

    names: frozenset[str]
    public_key: str
    ends: datetime


def openssl(*words: str, given: str = "", called: Sequence[str] = ("openssl",)) -> str:
    """Output of an openssl command; Refused with its words when it fails."""
    try:
        done = subprocess.run(
            [*called, *words], input=given, capture_output=True, text=True, timeout=60, check=False
        )
    except FileNotFoundError:
        raise Refused(f"{called[0]} is not on this host; the role installs it first") from None
    if done.returncode != 0:
        raise Refused(
            f"openssl {words[0]} ended with {done.returncode}: {done.stderr.strip() or done.stdout.strip()}"
        )
    return done.stdout


def normal(name: str) -> str:
    """One spelling for each name: openssl prints addresses in its own."""
    try:
        return str(ipaddress.ip_address(name))
    except ValueError:
        return name.lower()


def leaf_of(path: Path) -> Leaf:
    """Names, public key and end of the first certificate in a file."""
    shown = openssl(
        "x509",
        "-in",
        str(path),
        "-noout",
        "-enddate",
        "-dateopt",
        "iso_8601",
        "-ext",
        "subjectAltName",
        "-pubkey",
    )
    ends = re.search(r"notAfter=(\S+ \S+)", shown)
    names = re.findall(r"(?:DNS|IP Address):([^,\s]+)", shown)
    key = re.search(r"-----BEGIN PUBLIC KEY-----.+-----END PUBLIC KEY-----", shown, re.DOTALL)
    if not ends or not key:
        raise Refused(f"openssl x509 said nothing of {path} that is understood: {shown[:200]!r}")
    return Leaf(
        frozenset(normal(name) for name in names),
        key[0],
        datetime.fromisoformat(ends[1].replace("Z", "+00:00")),
    )


def doubts(
    path: Path, names: list[str], public_key: str, chain: str, root: Path, renew_days: int
) -> list[str]:
    """Why the certificate at path is not the one that should be there."""
    if not path.exists():
        return ["there is none"]
    try:
        leaf = leaf_of(path)
    except Refused as problem:
        return [f"it is not readable: {problem}"]
    found: list[str] = []
    if leaf.names != {normal(name) for name in names}:
        found.append(f"it names {', '.join(sorted(leaf.names))}, not {', '.join(names)}")
    if leaf.public_key != public_key:
        found.append("it was made for another key")
    left = (leaf.ends - datetime.now(UTC)).days
    if left < renew_days:
        found.append(f"it ends in {left} days ({leaf.ends:%Y-%m-%d}), fewer than {renew_days}")
    issuing = CERTIFICATE.findall(chain)[0]
    if issuing.strip() not in path.read_text(errors="replace"):
        found.append("it was not issued by the estate's issuing certificate of today")
    elif not found:
        try:
            openssl("verify", "-x509_strict", "-CAfile", str(root), "-untrusted", str(path), str(path))
        except Refused as problem:
            found.append(f"it does not verify: {problem}")
    return found


def key_in_place(path: Path, group: str, check: bool) -> bool:
    """Make the key where there is none; True when something was or would be changed."""
    gid = atomic.group_id(group)
    if gid is None:
        if check:
            return True
        raise Refused(f"there is no group {group!r} on this host; the role makes it first")
    if not path.exists():
        if not check:
            key = openssl("genpkey", "-quiet", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256")
            atomic.write_file(path, key.encode(), 0, gid, 0o640)
        return True
    now = path.stat()
    if (now.st_uid, now.st_gid, now.st_mode & 0o7777) == (0, gid, 0o640):
        return False
    if not check:
        atomic.set_attributes(path, 0, gid, 0o640)
    return True


def request(key: Path, names: list[str], called: Sequence[str] = ("openssl",)) -> str:
    """A certificate request for exactly these names."""
    alternatives = ",".join(f"{'IP' if is_address(name) else 'DNS'}:{name}" for name in names)
    return openssl(
        "req",
        "-new",
        "-config",
        "/etc/ssl/openssl.cnf",  # OPENSSL_CONF is another one where the key is in an HSM
        "-key",
        str(key),
        "-subj",
        f"/CN={names[0][:64]}",
        "-addext",
        f"subjectAltName={alternatives}",
        called=called,
    )


def is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def install(params: dict[str, Any], folder: Path, public_key: str) -> None:
    """Put a signed certificate in place once everything about it was proved, and have it taken in."""
    place = folder / f"{params['name']}.pem"
    aside = atomic.write_beside(place, params["certificate"].encode(), 0, 0, 0o644)
    try:
        found = doubts(aside, params["names"], public_key, params["chain"], folder / "root.pem", 1)
        if found:
            raise Refused(
                f"the signed certificate is not taken, since {'; '.join(found)}. The one on disk stays."
                " If the clock of this host or of the control node is wrong, set it right and run again"
            )
        atomic.replace(aside, place)
    finally:
        aside.unlink(missing_ok=True)
    # The path unit would do it a moment later; by waiting here, what follows sees the new certificate served.
    done = subprocess.run(
        ["systemctl", "restart", params["reload_unit"]],
        capture_output=True,
        text=True,
        timeout=RELOAD_SECONDS,
        check=False,
    )
    if done.returncode != 0:
        raise Refused(
            f"the new certificate is in place, but {params['reload_unit']} failed: {done.stderr.strip()}."
            f" Look at `journalctl -u {params['reload_unit']}`, then run again"
        )


def settle(params: dict[str, Any], check: bool) -> dict[str, Any]:
    """Probe and apply; what the module returns."""
    folder = Path(params["directory"])
    names: list[str] = params["names"]
    bad = [name for name in names if not re.fullmatch(r"[A-Za-z0-9.:-]{1,253}", name)]
    if bad or not names:
        raise Refused(f"names is {names}: give DNS names and addresses, no wildcards; correct the inventory")
    certificates = CERTIFICATE.findall(params["chain"])
    if len(certificates) != 2:
        raise Refused(
            f"chain holds {len(certificates)} certificates, not the issuing and the root certificate;"
            " look at `llmkeep pki status` on the control node"
        )
    root = folder / "root.pem"
    changed = not root.exists() or root.read_text() != certificates[1]
    if changed and not check:
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        atomic.write_file(root, certificates[1].encode(), 0, 0, 0o444)
    if not check:
        # What a power cut left of an earlier run; one of them may hold an unused key.
        for stale in folder.glob(".*.new"):
            stale.unlink()
    key, place = Path(params["key"] or folder / f"{params['name']}.key"), folder / f"{params['name']}.pem"
    if not params["public_key"]:
        changed = key_in_place(key, params["group"], check) or changed
    if check and (changed or not key.exists()):
        return {"changed": True, "reasons": ["there is none"], "request": "", "days_left": -1}
    public_key = (params["public_key"] or openssl("pkey", "-in", str(key), "-pubout")).strip()
    if params["certificate"]:
        if not check:
            install(params, folder, public_key)
        return {"changed": True, "reasons": [], "request": "", "days_left": days_left(place)}
    found = doubts(place, names, public_key, params["chain"], root, params["renew_days"])
    return {
        "changed": changed or bool(found and check),
        "reasons": found,
        "request": request(key, names, params["openssl"]) if found else "",
        "days_left": days_left(place),
    }


def days_left(path: Path) -> int:
    try:
        return (leaf_of(path).ends - datetime.now(UTC)).days
    except Refused:
        return -1


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "names": {"type": "list", "elements": "str", "required": True},
            "chain": {"type": "str", "required": True},
            "certificate": {"type": "str"},
            "directory": {"type": "path", "default": "/etc/llmkeep/pki"},
            "name": {"type": "str", "default": "host"},
            "public_key": {"type": "str", "no_log": False},
            "key": {"type": "path", "no_log": False},
            "openssl": {"type": "list", "elements": "str", "default": ["openssl"]},
            "group": {"type": "str", "default": "ssl-cert"},
            "renew_days": {"type": "int", "default": 30},
            "reload_unit": {"type": "str", "default": "llmkeep-certificate.service"},
        },
        supports_check_mode=True,
    )
    try:
        module.exit_json(**settle(module.params, module.check_mode))
    except Refused as problem:
        module.fail_json(msg=str(problem))


if __name__ == "__main__":
    main()
