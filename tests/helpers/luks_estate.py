"""A small estate for encrypted volumes: an HSM and its spare (SoftHSM), an escrow key, a control node that is a folder.

As a program it is what role `luks` does with one volume: call, store what came back, call again. Tests kill it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plugin_modules import load

MIB = 1 << 20
SOFTHSM = "/usr/lib/softhsm/libsofthsm2.so"
PIN = "27182818284590"  # so long that it is in no hash and no encrypted file by chance
SIZE = 24 * MIB
SCHEMA = "pkcs11:token={token};object={key};type=public"


def tool(*argv: str | Path, given: bytes = b"") -> bytes:
    return subprocess.run([str(word) for word in argv], input=given, check=True, capture_output=True).stdout


disks, luks, sealing = (
    load("module_utils.volumes.disks"),
    load("module_utils.volumes.luks"),
    load("module_utils.config.sealing"),
)
volume, volume_phases = load("module_utils.volumes.volume"), load("module_utils.volumes.phases")


def forms(secret: bytes) -> set[bytes]:
    """As it is, in hexadecimal, as UTF-16, and in base64 wherever in a text it begins."""
    wide = b"\0".join(bytes([byte]) for byte in secret)
    found = {secret, secret.hex().encode(), secret.hex().upper().encode(), wide}
    for before in range(3):  # what neither the bytes before nor those behind have a part in
        text = base64.b64encode(bytes(before) + secret)
        found.add(text[-(-8 * before // 6) : 8 * (before + len(secret)) // 6])
    return found


@dataclass
class Estate:
    """All of it below one folder."""

    root: Path

    @property
    def conf(self) -> Path:
        return self.root / "softhsm2.conf"

    @property
    def disk(self) -> Path:
        return self.root / "DISK-1"

    @property
    def store(self) -> Path:
        return self.root / "control"

    @property
    def state(self) -> Path:
        return self.root / "state"

    def make(self) -> None:
        (self.root / "tokens").mkdir()
        self.store.mkdir()
        self.conf.write_text(f"directories.tokendir = {self.root}/tokens\nobjectstore.backend = file\n")
        os.environ["SOFTHSM2_CONF"] = str(self.conf)
        for token in ("main", "spare"):
            tool(
                "softhsm2-util",
                "--init-token",
                "--free",
                "--label",
                token,
                "--pin",
                PIN,
                "--so-pin",
                "314159",
            )
            self.new_key(token, "host1")
        tool("openssl", "req", "-x509", "-newkey", "rsa:3072", "-noenc", "-days", "30", "-subj", "/CN=escrow",
             "-keyout", self.root / "escrow.key", "-out", self.root / "escrow.pem")  # fmt: skip
        self.set_pin(PIN)
        self.blank()
        shutil.copytree(self.root / "tokens", self.root / "tokens.kept")

    def new_key(self, token: str, key: str) -> None:
        tool("pkcs11-tool", "--module", SOFTHSM, "--token-label", token, "--login", "--pin", PIN, "--keypairgen",
             "--key-type", "EC:secp384r1", "--label", key, "--usage-derive", "--sensitive")  # fmt: skip

    def set_pin(self, pin: str) -> None:
        path = self.root / "hsm-pin"
        path.write_bytes(tool("systemd-creds", "encrypt", "--name=hsm-pin", "-", "-", given=pin.encode()))

    def blank(self) -> None:
        with self.disk.open("wb") as stream:
            stream.truncate(SIZE)

    def heal_tokens(self) -> None:
        """SoftHSM rewrites a token at each login and loses it if killed then; a real HSM does not."""
        shutil.rmtree(self.root / "tokens")
        shutil.copytree(self.root / "tokens.kept", self.root / "tokens")

    def stored(self) -> dict[str, str]:
        return {
            kind: hashlib.sha256((self.store / f"{kind}.cms").read_bytes()).hexdigest()
            for kind in ("recovery", "header")
            if (self.store / f"{kind}.cms").exists()
        }

    def register(self) -> list[dict[str, str]]:
        path = self.store / "register.json"
        return json.loads(path.read_text()) if path.exists() else []

    def volume(self, **other: Any) -> Any:
        key = other.pop("key", "host1")
        given: dict[str, Any] = {
            "name": "data",
            "serial": "DISK-1",
            "size": SIZE,
            "device": str(self.disk),
            "tokens": {owner: SCHEMA.format(token=token, key=key) for owner, token in (("hsm", "main"), ("spare", "spare"))},
            "pin_credential": self.root / "hsm-pin",
            "escrow": (self.root / "escrow.pem").read_text(),
            "state_dir": self.state,
            "registered": disks.from_register(self.register()),
            "known_as": "host1/data",
            "stored": self.stored(),
        } | other  # fmt: skip
        return volume.Volume(**given)

    def keep(self, made: Any) -> None:
        """The control node stores what came back, and notes the volume."""
        for kind in ("recovery", "header"):
            content = made.cms(kind, getattr(made.known, f"{kind}_sha256"))
            if content:
                beside = self.store / f".{kind}.new"
                beside.write_text(content)
                beside.replace(self.store / f"{kind}.cms")
        entry = {"uuid": made.known.uuid, "serial": "DISK-1", "volume": "host1/data"}
        (self.store / ".register.new").write_text(json.dumps([entry]))
        (self.store / ".register.new").replace(self.store / "register.json")

    def call(self, **other: Any) -> Any:
        """What one call of the module does."""
        made = self.volume(**other)
        with made.alone():
            volume_phases.converge(made)
        return made

    def run(self, **other: Any) -> Any:
        """Call, store, call again, as the role does."""
        for _ in range(3):
            made = self.call(**other)
            self.keep(made)
            if made.known.phase == "done":
                return made
            other.pop("rotate", None)
        raise AssertionError(f"still in {made.known.phase} after three calls")

    def opened(self, kind: str) -> bytes:
        """What the owner of the escrow key reads."""
        return tool("openssl", "cms", "-decrypt", "-inform", "PEM", "-binary", "-inkey", self.root / "escrow.key",
                    "-in", self.store / f"{kind}.cms")  # fmt: skip

    def recovery_key(self) -> bytes:
        return str(json.loads(self.opened("recovery"))["recovery_key"]).encode()

    def ways_in(self) -> set[str]:
        """Which of the ways open the volume now."""
        found = set()
        header = luks.read(self.disk)
        for number, token in (header.tokens if header else {}).items():
            if token["type"] == "systemd-pkcs11" and header.slots_of(number):
                try:
                    luks.prove(self.disk, number, PIN.encode(), 20)
                except luks.Failed:
                    continue
                found.add("spare" if "token=spare" in token["pkcs11-uri"] else "hsm")
        if (self.store / "recovery.cms").exists() and luks.opens(self.disk, self.recovery_key()) is not None:
            found.add("recovery")
        kept = self.state / "data.bootstrap"
        if (
            kept.exists()
            and luks.opens(self.disk, sealing.unseal("data.bootstrap", kept.read_bytes())) is not None
        ):
            found.add("bootstrap")
        return found

    def put_data(self, content: bytes) -> None:
        with self.disk.open("r+b") as stream:
            stream.seek(16 * MIB)
            stream.write(content)

    def data(self, size: int) -> bytes:
        with self.disk.open("rb") as stream:
            stream.seek(16 * MIB)
            return stream.read(size)


if __name__ == "__main__":
    os.environ["SOFTHSM2_CONF"] = f"{sys.argv[1]}/softhsm2.conf"
    print("begins", flush=True)
    try:
        Estate(Path(sys.argv[1])).run(**json.loads(sys.argv[2]))
    except Exception as problem:
        sys.exit(f"{type(problem).__name__}: {problem}")
