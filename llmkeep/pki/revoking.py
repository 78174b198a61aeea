"""Revoke and reinstate names, and keep the signed list current.

The record is written before the list: after a power cut the next call signs what is missing.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from llmkeep.durable import record, recorded, write
from llmkeep.pki.authority import PkiError, general_names, issuing_pair, load, permitted, private, sign
from llmkeep.pki.revocations import (
    LEAF_DAYS,
    LIST_DAYS,
    REINSTATED,
    RENEWED_BELOW,
    REVOKED,
    living_serials,
    number_of,
    revoked_names,
    revoked_serials,
    signed_list,
)
from llmkeep.places import Places

PROBE = "revoked"  # the name under which that certificate is on record


@dataclass(frozen=True)
class Published:
    """The list for hosts, and whether this call signed it."""

    number: int
    until: datetime
    signed: bool

    def __str__(self) -> str:
        return f"revocation list {self.number} {'signed' if self.signed else 'kept'}, valid until {self.until:%Y-%m-%d %H:%M} UTC"


def revoke(places: Places, name: str, reason: str, by: str, with_host: bool = False) -> str:
    """Revoke all certificates of a name, and refuse new ones; returns a message. Idempotent.

    WITH_HOST: only those whose keys were on the host and not in an HSM.
    """
    if not reason.strip():
        raise PkiError("--reason is empty: say why, for the readers of the record")
    now = datetime.now(UTC).replace(microsecond=0)
    with _alone(places):
        names = sorted({entry["host"] for entry in recorded(places.issued)} - {PROBE})
        if name not in names:
            raise PkiError(f"there has never been a certificate for {name!r}; nothing was changed. "
                           f"Names with certificates: {', '.join(names) or 'none'}")  # fmt: skip
        known = revoked_serials(places)
        serials = [
            serial for serial in living_serials(places, name, now, with_host) if int(serial, 16) not in known
        ]
        entry = revoked_names(places).get(name)
        if serials or not entry:
            record(places.revoked, {"time": now.isoformat(), "action": REVOKED, "name": name, "reason": reason,
                                    "by": by, "serials": serials})  # fmt: skip
        published = _publish(places)
    done = f"{len(serials)} certificates" if serials or not entry else f"since {entry['time']}"
    return f"{name} is revoked ({done}); {published}"


def reinstate(places: Places, name: str, reason: str, by: str) -> str:
    """Allow certificates for a revoked name again; revoked ones stay revoked. Idempotent."""
    if not reason.strip():
        raise PkiError("--reason is empty: say why, for the readers of the record")
    with _alone(places):
        if name in revoked_names(places):
            now = datetime.now(UTC).replace(microsecond=0)
            record(places.revoked, {"time": now.isoformat(), "action": REINSTATED, "name": name,
                                    "reason": reason, "by": by})  # fmt: skip
        published = _publish(places)
    return f"{name} may have certificates again: site.yml gives it a new key and certificate; {published}"


def publish(places: Places) -> Published:
    """Sign a new list if a revocation is missing in it, or fewer than 23 of its 30 days are left."""
    with _alone(places):
        return _publish(places)


def _publish(places: Places) -> Published:
    now = datetime.now(UTC).replace(microsecond=0)
    issuing, key = issuing_pair(places)
    root, before = _root_list(places), _last(places, issuing)
    # A revocation whose record was lost stays in the list.
    listed = {entry.serial_number: entry.revocation_date_utc for entry in (() if before is None else before)}
    # What was revoked longer ago than a certificate lives has expired.
    oldest = now - timedelta(days=LEAF_DAYS + 1)
    serials = {serial: time for serial, time in (listed | revoked_serials(places)).items() if time > oldest}
    until = before.next_update_utc if before is not None else None
    current = before
    signed = (
        current is None
        or until is None
        or until - now < RENEWED_BELOW
        or serials != listed
        or _probe_serial(places) not in listed
    )
    if current is None or until is None or signed:
        number = max(int(now.timestamp()), _last_number(places) + 1)
        until = min(now + timedelta(days=LIST_DAYS), issuing.not_valid_after_utc)
        current = signed_list(issuing, key, serials | {_new_probe(places): now}, number, until)
    names = "".join(f"# revoked: {name}\n" for name in sorted(revoked_names(places)))
    text = names.encode() + current.public_bytes(serialization.Encoding.PEM) + root
    if not places.revocation_list.exists() or places.revocation_list.read_bytes() != text:
        write(places.revocation_list, text, 0o444)
    return Published(number_of(current), until, signed)


def _new_probe(places: Places) -> int:
    """Make the revoked certificate with which listeners are tested; returns its serial number."""
    domain = permitted(load(places.issuing_certificate))[0][0]
    name, key = f"revoked.{domain}", ec.generate_private_key(ec.SECP256R1())
    csr = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, PROBE)]))
        .add_extension(x509.SubjectAlternativeName(general_names([name])), critical=False)
        .sign(key, hashes.SHA256())
    )
    chain = sign(places, csr.public_bytes(serialization.Encoding.PEM), [name], PROBE)
    write(places.revoked_probe, private(key) + chain, 0o400)
    return x509.load_pem_x509_certificate(chain).serial_number


def _probe_serial(places: Places) -> int | None:
    try:
        return x509.load_pem_x509_certificate(places.revoked_probe.read_bytes()).serial_number
    except (FileNotFoundError, ValueError):
        return None


def _root_list(places: Places) -> bytes:
    """The root's list as PEM. Without it, a server that checks lists refuses every client."""
    path, root = places.root_list, load(places.root_certificate)
    if not path.exists():
        raise PkiError(f"{path} is missing, so no list can take effect. On the machine with the escrow key, run `llmkeep "
                       "issuing root-list --root root.pem --root-key root-key.cms --escrow-key escrow.key > root.crl` and "
                       "copy the result to this path")  # fmt: skip
    try:
        signed = x509.load_pem_x509_crl(path.read_bytes())
    except ValueError as error:
        raise PkiError(
            f"{path} is not a revocation list ({error}): restore it from a backup of this host"
        ) from error
    if not signed.is_signature_valid(root.public_key()):  # type: ignore[arg-type]
        raise PkiError(
            f"{path} is not signed by {places.root_certificate}: restore both from a backup of this host"
        )
    return signed.public_bytes(serialization.Encoding.PEM)


def _last(places: Places, issuing: x509.Certificate) -> x509.CertificateRevocationList | None:
    """The previous list, if this issuing CA's key signed it."""
    try:
        signed = x509.load_pem_x509_crl(places.revocation_list.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return signed if signed.is_signature_valid(issuing.public_key()) else None  # type: ignore[arg-type]


def _last_number(places: Places) -> int:
    """The number of the previous list, whichever key signed it."""
    try:
        return number_of(x509.load_pem_x509_crl(places.revocation_list.read_bytes()))
    except (FileNotFoundError, ValueError):
        return 0


@contextmanager
def _alone(places: Places) -> Iterator[None]:
    """Wait for another `llmkeep pki` that is signing a list."""
    folder = places.revoked.parent
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
