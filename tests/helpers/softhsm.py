"""Real SoftHSM with tokens of its own, for tests; and a fake around it that has one fault."""

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from plugin_modules import load

pkcs11 = load("module_utils.hsm.pkcs11")
hsm = load("module_utils.hsm.token_keys")
softhsm_tokens = load("modules.softhsm_tokens")
hsm_key = load("modules.hsm_key")

MAIN = "llmkeep"
PIN = "0123456789abcdef0123456789abcde"
SOFTHSM = "/usr/lib/softhsm/libsofthsm2.so"
# Opens what was "sealed" by encoding it, as systemd-creds would on a host.
CREDS = """#!/bin/sh
test "$1" = decrypt && exec cat "$3"
"""


@dataclass(frozen=True)
class Double:
    """SoftHSM in a folder of its own."""

    folder: Path

    def seal(self, name: str, pin: str) -> Path:
        path = self.folder / name
        path.write_text(pin)
        return path

    def make_tokens(self, check: bool = False, **more: Any) -> dict[str, Any]:
        """What the module softhsm_tokens returns."""
        params = {
            "tokens": ["llmkeep", "llmkeep-spare"],
            "user_pin": str(self.folder / "user-pin"),
            "officer_pin": str(self.folder / "so-pin"),
            "module": SOFTHSM,
            "user": "",
            "record": str(self.folder / "tokens.json"),
            **more,
        }
        result: dict[str, Any] = softhsm_tokens.settle(params, check)
        return result

    def key(self, check: bool = False, **more: Any) -> dict[str, Any]:
        """What the module hsm_key returns."""
        params = {
            "module": SOFTHSM,
            "address": "",
            "tokens": ["llmkeep", "llmkeep-spare"],
            "label": "llm1",
            "type": "ec",
            "signs": False,
            "state": "present",
            "pin": str(self.folder / "user-pin"),
            "pin_name": "",
            "record": str(self.folder / "hsm.json"),
            "user": "",
            "seconds": 20,
            **more,
        }
        result: dict[str, Any] = hsm_key.settle(params, check)
        return result

    def by_hand(self, work: Any, token: str = MAIN) -> Any:
        """What work does with a session that is logged in to a token."""
        pin = (self.folder / "user-pin").read_bytes()

        def logged_in(_step: Any) -> Any:
            module = pkcs11.Module(SOFTHSM)
            slot = next(each.slot for each in module.tokens() if each.label == token)
            with module.session(slot, writes=True) as session:
                session.login(pin)
                return work(session)

        return hsm.bounded(logged_in, 20)

    def reinitialise(self, token: str = MAIN) -> None:
        """Initialize a token again under the same label."""
        officer, user = ((self.folder / name).read_bytes() for name in ("so-pin", "user-pin"))

        def anew(_step: Any) -> None:
            module = pkcs11.Module(SOFTHSM)
            slot = next(each.slot for each in module.tokens() if each.label == token)
            module.initialise(slot, officer, token)
            slot = next(each.slot for each in module.tokens() if each.label == token)
            with module.session(slot, writes=True) as session:
                session.login(officer, pkcs11.SECURITY_OFFICER)
                session.set_user_pin(user)

        hsm.bounded(anew, 20)


def double(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Double:
    """SoftHSM with no token yet, and its PINs."""
    (folder / "tokens").mkdir()
    (folder / "softhsm2.conf").write_text(
        f"directories.tokendir = {folder}/tokens\nobjectstore.backend = file\nlog.level = ERROR\n"
    )
    program = folder / "bin/systemd-creds"
    program.parent.mkdir()
    program.write_text(CREDS)
    program.chmod(0o755)
    monkeypatch.setenv("SOFTHSM2_CONF", f"{folder}/softhsm2.conf")
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/sbin:/usr/bin:/bin")
    found = Double(folder)
    found.seal("user-pin", PIN)
    found.seal("so-pin", "fedcba9876543210")
    return found


def faulty(folder: Path) -> str:
    """The fake, compiled."""
    module = folder / "faulty_hsm.so"
    source = Path(__file__).with_name("faulty_hsm.c")
    subprocess.run(
        ["gcc-14", "-std=gnu17", "-shared", "-fPIC", "-O1", "-o", str(module), str(source)], check=True
    )
    return str(module)
