"""Keys, requests and certificates of a host, by its openssl."""

from __future__ import annotations

import ipaddress
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from ansible_collections.llmkeep.estate.plugins.module_utils.config import files as atomic
from ansible_collections.llmkeep.estate.plugins.module_utils.refused import Refused

CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----\n?", re.DOTALL)
RELOAD_SECONDS = 120


@dataclass(frozen=True)
class Leaf:
    """What a certificate says."""

    names: frozenset[str]
    public_key: str
    ends: datetime


def openssl(*words: str, stdin: str = "", called: Sequence[str] = ("openssl",)) -> str:
    """Output of an openssl command; Refused with its words when it fails."""
    try:
        done = subprocess.run(
            [*called, *words], input=stdin, capture_output=True, text=True, timeout=60, check=False
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
        raise Refused(f"the output of openssl x509 on {path} cannot be parsed: {shown[:200]!r}")
    return Leaf(
        frozenset(normal(name) for name in names),
        key[0],
        datetime.fromisoformat(ends[1].replace("Z", "+00:00")),
    )


def key_in_place(path: Path, group: str, check: bool) -> bool:
    """Make the key if there is none; True if something was or would be changed."""
    gid = atomic.group_id(group)
    if gid is None:
        if check:
            return True
        raise Refused(f"there is no group {group!r} on this host; the role must create it first")
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


def reload_unit(unit: str) -> None:
    """Have services take in a certificate that is in place; Refused where the unit that reloads them fails.

    The path unit would do it a moment later; by waiting here, what follows sees the new certificate served.
    """
    done = subprocess.run(
        ["systemctl", "restart", unit], capture_output=True, text=True, timeout=RELOAD_SECONDS, check=False
    )
    if done.returncode != 0:
        raise Refused(
            f"the new certificate is in place, but {unit} failed: {done.stderr.strip()}."
            f" Look at `journalctl -u {unit}`, then run again"
        )


def days_left(path: Path) -> int:
    try:
        return (leaf_of(path).ends - datetime.now(UTC)).days
    except Refused:
        return -1
