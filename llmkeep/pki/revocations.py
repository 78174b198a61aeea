"""Revocations: revoked names, and the signed list of them.

A list is valid for 30 days. It is signed again for each revocation, and by the daily renewal once a week has passed.

"""

import hashlib
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from llmkeep.durable import recorded
from llmkeep.places import Places

LEAF_DAYS = 90
LIST_DAYS = 30
RENEWED_BELOW = timedelta(days=23)
REVOKED, REINSTATED = "revoke", "reinstate"


def revoked_names(places: Places) -> dict[str, dict[str, Any]]:
    """The record's entry of each revoked name that was not reinstated."""
    names: dict[str, dict[str, Any]] = {}
    for entry in recorded(places.revoked):
        if entry["action"] == REVOKED:
            names[entry["name"]] = entry
        else:
            names.pop(entry["name"], None)
    return names


def revoked_serials(places: Places) -> dict[int, datetime]:
    """Serial numbers of revoked certificates, with the time; a reinstated name's too."""
    return {
        int(serial, 16): datetime.fromisoformat(entry["time"])
        for entry in recorded(places.revoked)
        if entry["action"] == REVOKED
        for serial in entry["serials"]
    }


def living_serials(places: Places, name: str, now: datetime, with_host: bool = False) -> list[str]:
    """Serial numbers (hexadecimal) of the name's unexpired certificates; WITH_HOST: only if the key is lost with the host."""
    return [
        str(entry["serial"])
        for entry in recorded(places.issued)
        if entry["host"] == name and datetime.fromisoformat(entry["not_after"]) > now
        if not (with_host and entry.get("hsm"))
    ]


def key_digest(key: ec.EllipticCurvePublicKey) -> str:
    """SHA-256 of a public key (DER), as in the record."""
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return hashlib.sha256(key.public_bytes(serialization.Encoding.DER, form)).hexdigest()


def refused(places: Places, host: str, key: ec.EllipticCurvePublicKey) -> str | None:
    """Reason why HOST gets no certificate for KEY: the host is revoked, or a revoked certificate had that key."""
    if entry := revoked_names(places).get(host):
        return (
            f"{host} is revoked since {entry['time']} ({entry['reason']}), so it gets no certificate: once it is trusted "
            f"again, `llmkeep pki reinstate {host} --reason …`, then run site.yml"
        )
    serials, digest = revoked_serials(places), key_digest(key)
    for entry in recorded(places.issued):
        if entry.get("key") == digest and int(entry["serial"], 16) in serials:
            return (
                f"{host} sent the key of a revoked certificate: remove /etc/llmkeep/pki/host.key "
                "there, or the key in the HSM's token, and run site.yml again"
            )
    return None


def signed_list(
    issuer: x509.Certificate,
    key: ec.EllipticCurvePrivateKey,
    serials: Mapping[int, datetime],
    number: int,
    until: datetime,
) -> x509.CertificateRevocationList:
    """A list by ISSUER (RFC 5280, section 5) of these serials and the time each was revoked."""
    now = datetime.now(UTC).replace(microsecond=0)
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(issuer.subject)
        # A host whose clock is a little behind must not refuse it.
        .last_update(now - timedelta(hours=1))
        .next_update(until)
        .add_extension(x509.CRLNumber(number), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
    )
    for serial, time in sorted(serials.items()):
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(time)
        builder = builder.add_revoked_certificate(entry.build())
    return builder.sign(key, hashes.SHA384())


def number_of(signed: x509.CertificateRevocationList) -> int:
    return signed.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
