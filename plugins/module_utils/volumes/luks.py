"""LUKS2 headers by cryptsetup and systemd-cryptenroll: read one, and the individual steps that change it.

Secrets appear in no argument, environment or file: keys and PINs pass through pipes, stored keys are sealed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

from ansible_collections.llmkeep.estate.plugins.module_utils.config.sealing import Failed
from ansible_collections.llmkeep.estate.plugins.module_utils.hsm.key_pair import Fault

SECONDS = 120
ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}
CIPHER, KEY_BITS = "aes-xts-plain64", 512
# Eight key slots in 2 MiB: a header backup travels, and even a rotation needs seven. Data starts at 16 MiB, as by default.
KEYSLOTS_SIZE, DATA_OFFSET = "2m", 32768
# Every key here has 256 random bits or more: no key derivation makes guessing harder than that.
DERIVATION = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"]
PIN = "cryptenroll.pkcs11-pin"
MODHEX = "cbdefghijklnrtuv"  # systemd's alphabet of recovery keys: the same places on every keyboard


def environment() -> dict[str, str]:
    """A clean environment, with only the paths to SoftHSM's tokens and to a forwarded token."""
    passed = {
        name: os.environ[name] for name in ("SOFTHSM2_CONF", "P11_KIT_SERVER_ADDRESS") if name in os.environ
    }
    return ENVIRONMENT | passed


def run(argv: list[str], content: bytes = b"", seconds: int = SECONDS, **more: Any) -> tuple[int, bytes, str]:
    """(exit code, output, error output) of a program; its input is passed through a pipe."""
    try:
        done = subprocess.run(
            argv, input=content, capture_output=True, timeout=seconds, check=False, env=environment(), **more
        )
    except FileNotFoundError:
        raise Failed(f"{argv[0]} is not installed on this host: install its package first") from None
    except subprocess.TimeoutExpired:
        raise Failed(f"{argv[0]} {argv[1]} did not end within {seconds} s") from None
    return done.returncode, done.stdout, done.stderr.decode(errors="replace").strip()


def must(argv: list[str], doing: str, content: bytes = b"", **more: Any) -> bytes:
    """The output of a program; Failed if its exit code is not 0."""
    code, out, words = run(argv, content, **more)
    if code != 0:
        raise Failed(f"{doing}: {argv[0]} ended with {code}: {words[-600:] or 'no message'}")
    return out


# ---------------------------------------------------------------- what a header holds
@dataclass(frozen=True)
class Header:
    """`slots`: slot to its JSON. `tokens`: token id to its JSON."""

    uuid: str
    slots: dict[int, dict[str, Any]]
    tokens: dict[int, dict[str, Any]]
    segment: dict[str, Any] = field(default_factory=dict)

    def tokens_of(self, slot: int) -> list[int]:
        return [number for number, token in self.tokens.items() if str(slot) in token["keyslots"]]

    def slots_of(self, token: int) -> list[int]:
        """The existing slots of a header token."""
        return [int(slot) for slot in self.tokens[token]["keyslots"] if int(slot) in self.slots]


def uuid_on(device: Path) -> str:
    """The UUID, which is not part of a header's JSON."""
    with device.open("rb") as stream:
        head = stream.read(208)
    if head.startswith(b"LUKS\xba\xbe"):
        return head[168:].rstrip(b"\0").decode(errors="replace")
    return (
        must(["cryptsetup", "luksUUID", str(device)], "read the header").decode().strip()
    )  # by the second one


def read(device: Path) -> Header | None:
    """The LUKS2 header on a device; None if cryptsetup finds no valid one."""
    code, out, _words = run(["cryptsetup", "luksDump", "--dump-json-metadata", str(device)])
    if code != 0:
        return None
    document = json.loads(out)
    return Header(
        uuid_on(device),
        {int(slot): content for slot, content in document["keyslots"].items()},
        {int(token): content for token, content in document["tokens"].items()},
        next(iter(document["segments"].values()), {}),
    )


def attributes(uri: str) -> dict[str, str]:
    """The path attributes of a PKCS#11 URI without `type`, which differs between public and private key."""
    path = uri.removeprefix("pkcs11:").split("?")[0]
    return dict(
        pair.split("=", 1) for pair in path.split(";") if "=" in pair and not pair.startswith("type=")
    )


# ---------------------------------------------------------------- the steps
def format_device(device: Path, uuid: str, label: str, key: bytes) -> None:
    must(
        ["cryptsetup", "luksFormat", "--batch-mode", "--type", "luks2", "--uuid", uuid, "--label", label,
         "--cipher", CIPHER, "--key-size", str(KEY_BITS), "--luks2-keyslots-size", KEYSLOTS_SIZE,
         "--offset", str(DATA_OFFSET), *DERIVATION, "--key-file", "-", str(device)],
        "format",
        key,
    )  # fmt: skip


def opens(device: Path, key: bytes) -> int | None:
    """The slot that a key opens, or None. The volume is not activated."""
    argv = ["cryptsetup", "open", "--test-passphrase", "--verbose", "--key-file", "-", str(device)]
    code, out, words = run(argv, key)
    match = re.search(r"Key slot (\d+) unlocked", out.decode(errors="replace") + words)
    return int(match[1]) if code == 0 and match else None


def prove(device: Path, token: int, pin: bytes, seconds: int) -> None:
    """Prove that the HSM opens the volume, with one login. Fault if it refuses the PIN, Failed if token or key are missing."""
    argv = ["cryptsetup", "open", "--test-passphrase", "--token-only", "--token-id", str(token), str(device)]
    code, out, words = run(argv, pin, seconds)
    if code != 0:
        refused(out.decode(errors="replace") + words)
        raise Failed(f"token {token} of the header does not open {device}: {words[-600:] or 'no message'}")


def refused(words: str) -> None:
    """Raise Fault if a program reports that the token refused the PIN, which is then never tried again."""
    if "is incorrect" in words or "No token could be unlocked with this PIN" in words:
        raise Fault(
            "pin_wrong",
            "the token rejected the PIN. It was tried once, and will not be tried again: put the correct one in the"
            " vault (docs/operate/storage.md) before its lock-out counter ends",
        )


@contextlib.contextmanager
def shown_once(pin: bytes) -> Iterator[Path]:
    """A credentials directory whose PIN can be read once: systemd would otherwise try a wrong PIN three times."""
    with tempfile.TemporaryDirectory(prefix="llmkeep-", dir="/run") as folder:
        fifo = Path(folder, PIN)
        os.mkfifo(fifo, 0o600)

        def feed() -> None:
            with contextlib.suppress(OSError):
                fifo.write_bytes(pin)

        threading.Thread(target=feed, daemon=True).start()
        try:
            yield Path(folder)
        finally:
            with contextlib.suppress(OSError):  # release a feeder that no process has read from
                os.close(os.open(fifo, os.O_RDONLY | os.O_NONBLOCK))


def enrol(device: Path, uri: str, key: bytes, pin: bytes, seconds: int) -> None:
    """Enrol a key slot that the private key at URI opens."""
    argv = ["systemd-cryptenroll", f"--pkcs11-token-uri={uri}", "--unlock-key-file=/dev/stdin", str(device)]
    with shown_once(pin) as credentials, tempfile.TemporaryFile() as words:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=words,
            stderr=words,
            env=environment() | {"CREDENTIALS_DIRECTORY": str(credentials)},
        )
        with contextlib.suppress(BrokenPipeError), cast(IO[bytes], process.stdin) as pipe:
            pipe.write(key)
        until = time.monotonic() + seconds

        def transcript() -> str:
            words.seek(0)
            return words.read().decode(errors="replace").strip()

        try:
            while process.poll() is None:
                refused(transcript())
                if time.monotonic() > until:
                    raise Failed(f"enrolling {uri} did not end within {seconds} s: {transcript()[-600:]}")
                time.sleep(0.02)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        if process.returncode != 0:
            raise Failed(
                f"enrolling {uri}: systemd-cryptenroll ended with {process.returncode}: {transcript()[-600:]}"
            )


def add_key(device: Path, new: bytes, by_key: bytes = b"", by_token: tuple[int, bytes] | None = None) -> None:
    """Add a key slot for a key, authorised by another key or by a token (id, PIN)."""
    way = (
        ["--token-only", "--token-id", str(by_token[0])] if by_token else ["--key-file", "-"]
    )  # either reads stdin
    ours, theirs = os.pipe()
    try:
        os.write(theirs, new)
        os.close(theirs)
        argv = ["cryptsetup", "luksAddKey", "--batch-mode", *DERIVATION, *way, str(device), f"/dev/fd/{ours}"]
        secret = by_token[1] if by_token else by_key
        code, out, words = run(argv, secret, pass_fds=(ours,))
    finally:
        os.close(ours)
    if code != 0:
        refused(out.decode(errors="replace") + words)
        raise Failed(f"add a key slot: cryptsetup ended with {code}: {words[-600:] or 'no message'}")


def own(device: Path, slot: int, kind: str) -> None:
    """Record a key slot's owner in the header."""
    token = json.dumps({"type": kind, "keyslots": [str(slot)]}).encode()
    must(["cryptsetup", "token", "import", "--json-file", "-", str(device)], "name the slot", token)


def wipe(device: Path, slot: int) -> None:
    """Wipe a slot and the tokens that refer to it alone; systemd-cryptenroll refuses to wipe the last slot."""
    must(["systemd-cryptenroll", f"--wipe-slot={slot}", str(device)], f"wipe slot {slot}")


def forget(device: Path, token: int) -> None:
    """Remove a header token whose slot was wiped."""
    must(["cryptsetup", "token", "remove", "--token-id", str(token), str(device)], f"remove token {token}")


def show(device: Path, uuid: str, links: Path = Path("/dev/disk/by-uuid")) -> None:
    """Have udev probe a block device again if it does not know its UUID, by which systemd and the boot find it.

    While udev probes a device it receives no change events, so it may have missed the write of the header.
    """
    if not (links / uuid).exists():
        must(["udevadm", "trigger", "--action=change", "--settle", str(device)], "let udev look at the disk")


def close(mapping: str) -> None:
    """Close an open volume; retries while udev holds a new one open for probing."""
    run(["udevadm", "settle", "--timeout=10"])
    for attempt in range(10):
        code, _out, words = run(["cryptsetup", "close", mapping])
        if code == 0:
            return
        time.sleep(0.1 * attempt)
    raise Failed(f"{mapping} cannot be closed: {words[-600:]}. Find its users with `lsblk` and `fuser`")


def backup(device: Path) -> bytes:
    """A backup of the header with its key slots, for `cryptsetup luksHeaderRestore`."""
    with tempfile.TemporaryDirectory(prefix="llmkeep-", dir="/run") as folder:
        path = Path(folder, "header")
        argv = ["cryptsetup", "luksHeaderBackup", str(device), "--header-backup-file", str(path)]
        must(argv, "back up the header")
        return path.read_bytes()


# ---------------------------------------------------------------- secrets
def recovery_key() -> str:
    """256 random bits in systemd's recovery key format, which a person can type."""
    text = "".join(MODHEX[byte >> 4] + MODHEX[byte & 15] for byte in secrets.token_bytes(32))
    return "-".join(re.findall(".{8}", text))


def encrypt_to(certificate: str, secret: bytes) -> bytes:
    """Encrypt to the escrow certificate (CMS, PEM), as `llmkeep pki` does with the root key."""
    with tempfile.TemporaryDirectory() as folder:
        recipient = Path(folder, "escrow.pem")
        recipient.write_text(certificate)
        return must(
            ["openssl", "cms", "-encrypt", "-aes-256-gcm", "-binary", "-outform", "PEM", "-recip", str(recipient),
             "-keyopt", "rsa_padding_mode:oaep", "-keyopt", "rsa_oaep_md:sha256"],
            "encrypt to the escrow key",
            secret,
        )  # fmt: skip
