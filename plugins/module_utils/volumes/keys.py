"""The key slots of an encrypted volume: enrol, prove, wipe.

Every step begins with a working bootstrap key, so that no step can make the volume inaccessible.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
import ssl

from ansible_collections.llmkeep.estate.plugins.module_utils.config import sealing
from ansible_collections.llmkeep.estate.plugins.module_utils.volumes import luks
from ansible_collections.llmkeep.estate.plugins.module_utils.volumes.record import (
    BOOTSTRAP,
    PKCS11,
    RECOVERY,
    RECOVERY_TOKEN,
    NeedsPerson,
    Refused,
)
from ansible_collections.llmkeep.estate.plugins.module_utils.volumes.volume import Volume


def new_bootstrap_key(of: Volume) -> bytes:
    key = secrets.token_bytes(64)
    of.keep(BOOTSTRAP, sealing.seal(f"{of.name}.{BOOTSTRAP}", key))
    return key


def bootstrap_key(of: Volume) -> bytes:
    """A bootstrap key that opens the volume; if there is none, one is added by means of the HSM."""
    file = of.at(BOOTSTRAP)
    key = b""
    if file.exists():
        with contextlib.suppress(luks.Failed):  # sealed before the host was reinstalled
            key = sealing.unseal(f"{of.name}.{BOOTSTRAP}", file.read_bytes())
    if key and luks.opens(of.path, key) is not None:
        return key
    key = key or new_bootstrap_key(of)
    header = of.header()
    problems = []
    for number, token in header.tokens.items():
        if token["type"] == PKCS11 and header.slots_of(number):
            try:
                luks.add_key(of.path, key, by_token=(number, of.pin))
            except luks.Failed as problem:
                problems.append(str(problem))
            else:
                return key
    raise (Refused if problems else NeedsPerson)(
        f"no key on this host opens {of.name} ({of.path}): {'; '.join(problems) or 'no token is enrolled'}."
        " If the HSM is unreachable, restore the connection and run again; otherwise open it with the recovery key "
        "(docs/operate/storage.md)"
    )


def wipe_orphans(of: Volume, key: bytes) -> None:
    """Wipe slots and tokens of interrupted runs. The bootstrap key still opens the volume."""
    header = of.header()
    keep = {luks.opens(of.path, key), *map(int, of.known.slots)}
    pairs = [luks.attributes(uri) for uri in of.tokens.values()]
    for token in header.tokens.values():
        if token["type"] == PKCS11 and luks.attributes(token["pkcs11-uri"]) in pairs:
            keep |= {int(slot) for slot in token["keyslots"]}  # enrol() has it proven, or wipes it
    wipe_but(of, keep, header)
    for gone in [slot for slot in of.known.slots if int(slot) not in header.slots]:
        del of.known.slots[gone]
    of.known.retiring = [slot for slot in of.known.retiring if slot in header.slots]
    of.save()


def wipe_but(of: Volume, keep: set[int | None] | set[int], header: luks.Header) -> None:
    for slot in header.slots:
        if slot not in keep:
            luks.wipe(of.path, slot)
    now = of.header()
    for number in now.tokens:
        if not now.slots_of(number):
            luks.forget(of.path, number)


def enrol(of: Volume, owner: str, uri: str, key: bytes) -> None:
    """Enrol a slot for an owner and prove that it opens the volume; a slot that does not is wiped again."""

    def candidates(header: luks.Header) -> list[tuple[int, int]]:
        return [
            (number, slot)
            for number, token in header.tokens.items()
            if token["type"] == PKCS11 and luks.attributes(token["pkcs11-uri"]) == luks.attributes(uri)
            for slot in header.slots_of(number)
            if slot not in of.known.retiring
        ]

    for number, slot in candidates(of.header()):
        if slot in of.known.owned_by(owner):
            return
        try:
            luks.prove(of.path, number, of.pin, of.hsm_seconds)
        except luks.Failed:
            luks.wipe(of.path, slot)  # half enrolled when a run ended
        else:
            of.own(slot, owner)
            return
    luks.enrol(of.path, uri, key, of.pin, of.hsm_seconds)
    ((number, slot),) = candidates(of.header())
    try:
        luks.prove(of.path, number, of.pin, of.hsm_seconds)
    except luks.Failed as problem:
        luks.wipe(of.path, slot)
        raise Refused(
            f"the key at {uri} enrols but does not open {of.name}, so its slot was removed again: {problem}. The connection "
            "to the HSM must support key derivation (pkcs11-proxy does not): see docs/operate/storage.md"
        ) from problem
    of.own(slot, owner)
    of.changes.append(f"enrol {owner} in slot {slot} of {of.name}")


def certificate_sha256(pem: str) -> str:
    """SHA-256 of the DER encoding, independent of PEM formatting."""
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem[pem.index("-----BEGIN") :].strip())).hexdigest()


def escrow_moved(of: Volume) -> bool:
    """Whether the enrolled recovery key was encrypted to another escrow key than the current one."""
    return of.known.escrow_sha256 not in ("", certificate_sha256(of.escrow))


def enrol_recovery(of: Volume, key: bytes) -> None:
    """Enrol a recovery key, which is encrypted to the escrow key and stored before it is added to the header."""
    if set(of.known.owned_by(RECOVERY)) - set(of.known.retiring):
        if not escrow_moved(of):
            return
        of.retire(RECOVERY)
    recovery = luks.recovery_key()
    envelope = {
        "volume": of.known_as or of.name,
        "uuid": of.known.uuid,
        "serial": of.serial,
        "recovery_key": recovery,
    }
    sealed = luks.encrypt_to(of.escrow, json.dumps(envelope).encode())
    of.keep("recovery.cms", sealed)
    luks.add_key(of.path, recovery.encode(), by_key=key)
    slot = luks.opens(of.path, recovery.encode())
    if slot is None:
        raise Refused(
            f"the recovery key of {of.name} was enrolled and does not open it: see `dmesg` for the disk"
        )
    luks.own(of.path, slot, RECOVERY_TOKEN)
    of.known.recovery_sha256 = hashlib.sha256(sealed).hexdigest()
    of.known.escrow_sha256 = certificate_sha256(of.escrow)
    of.own(slot, RECOVERY)
    of.changes.append(f"enrol the recovery key in slot {slot} of {of.name}")
