"""A host's key in the tokens of an HSM: find or generate it, and prove that it decrypts what was encrypted to it.

Runs in the module hsm_key and, on a host, as the program llmkeep-hsm. Each fault has a name and an exit code.
The rules: all tokens are inspected before any login; one login per token, and none after one that fails; no login at all
while a token warns that the next failed one might be its last.
"""

from __future__ import annotations

import json
import os
import pwd
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ansible_collections.llmkeep.estate.plugins.module_utils.config import formats
from ansible_collections.llmkeep.estate.plugins.module_utils.hsm import pins, pkcs11
from ansible_collections.llmkeep.estate.plugins.module_utils.hsm.key_pair import (
    Fault,
    Settings,
    described,
    generate,
    prove,
    the_pair,
)

EXIT = {
    "absent": 10,
    "slow": 11,
    "token_missing": 12,
    "two_tokens": 13,
    "token_reinitialised": 14,
    "pin_held_back": 15,
    "pin_wrong": 16,
    "key_missing": 17,
    "two_keys": 18,
    "key_weak": 19,
    "does_not_open": 20,
    "no_pin": 21,
    "failed": 22,
}
SETTINGS = Path("/etc/llmkeep/hsm.json")
# What every module that asks an HSM is told. Settings has the same names, but for the credential.
OPTIONS: dict[str, dict[str, Any]] = {
    "module": {"type": "path", "required": True},
    "address": {"type": "str", "default": ""},
    "tokens": {"type": "list", "elements": "str", "required": True, "no_log": False},
    "label": {"type": "str", "required": True},
    "pin": {"type": "path", "required": True, "no_log": False},
    "user": {"type": "str", "default": ""},
    "seconds": {"type": "int", "default": 20},
}


def settings_of(params: dict[str, Any]) -> Settings:
    """Settings from a module's parameters."""
    names = {each.name for each in fields(Settings)}
    return Settings(**{name: value for name, value in params.items() if name in names and value is not None})


def uri(token: str, label: str) -> str:
    """The public key, as systemd-cryptenroll takes it; no PIN is ever part of it."""
    return f"pkcs11:token={quote(token, safe='')};object={quote(label, safe='')};type=public"


def bounded(work: Callable[[Callable[[str], None]], Any], seconds: int, user: str = "") -> Any:
    """Run WORK in a child process and return its result, so that a PKCS#11 module that hangs or crashes ends only the child."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        say(writer, work, user)
    os.close(writer)
    ends, heard, late = time.monotonic() + seconds, b"", False
    with os.fdopen(reader, "rb", buffering=0) as stream:
        while not late:
            late = not select.select([stream], [], [], max(0.0, ends - time.monotonic()))[0]
            block = b"" if late else stream.read(65536)
            heard += block
            if not block:
                break
    if late:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    lines = [json.loads(line) for line in heard.splitlines()]
    step = next((line["step"] for line in reversed(lines) if "step" in line), "nothing yet")
    if late:
        raise Fault(
            "slow",
            f"the HSM gave no answer within {seconds} s; it was asked to {step}. Check the connection to it and its load, "
            "then run again; nothing was changed, but a requested login may have been counted",
        )
    if not lines or "step" in lines[-1]:
        raise Fault(
            "absent",
            f"the PKCS#11 module ended its process (status {status}) when it was asked to {step}; see whether the"
            " vendor's module fits this system, and run again",
        )
    if "fault" in lines[-1]:
        raise Fault(lines[-1]["fault"], lines[-1]["message"])
    return lines[-1]["result"]


def say(writer: int, work: Callable[[Callable[[str], None]], Any], user: str) -> None:
    """The child of `bounded`: reports its steps and its result, and exits without the parent's clean-up."""

    def tell(line: dict[str, Any]) -> None:
        os.write(writer, json.dumps(line).encode() + b"\n")

    try:
        if user:
            become(user)
        tell({"result": work(lambda step: tell({"step": step}))})
    except Fault as fault:
        tell({"fault": fault.kind, "message": str(fault)})
    except (pkcs11.Error, OSError, ValueError, subprocess.SubprocessError) as problem:
        gone = isinstance(problem, pkcs11.Error) and problem.gone
        words = "the HSM went away" if gone else "the HSM failed"
        message = f"{words}: {problem}. Check its log and the connection to it, and run again"
        tell({"fault": "absent" if gone else "failed", "message": message})
    finally:
        os._exit(0)


def become(user: str) -> None:
    """Drop privileges to another account permanently."""
    try:
        entry = pwd.getpwnam(user)
    except KeyError:
        raise Fault("absent", f"there is no account {user} on this host; the HSM's role creates it") from None
    os.initgroups(user, entry.pw_gid)
    os.setgid(entry.pw_gid)
    os.setuid(entry.pw_uid)
    os.environ["HOME"] = entry.pw_dir


def look(settings: Settings, pin: bytes, make: bool, change: bool) -> list[dict[str, Any]]:
    """Find the key in every token, in the order of settings. Missing keys are generated if `make` and `change`."""
    known = recorded(settings.record)
    rows: list[dict[str, Any]] = bounded(
        lambda step: ask(settings, pin, known, make and change, step), settings.seconds, settings.user
    )
    return rows


def ask(
    settings: Settings, pin: bytes, known: dict[str, Any], make: bool, step: Callable[[str], None]
) -> list[dict[str, Any]]:
    """In one process: load the module, inspect the tokens, log in, find or generate the key, prove it."""
    step(f"load {settings.module}")
    module = loaded(settings)
    step("list its tokens")
    tokens = module.tokens()
    chosen = [the_token(tokens, label, known.get(label), settings) for label in settings.tokens]
    rows = []
    for token in chosen:
        step(f"log in to the token {token.label}")
        with module.session(token.slot) as session:
            log_in(session, token, pin)
            step(f"find the key {settings.label} in the token {token.label}")
            key = the_pair(session, token, settings)
            state = "present" if key else "missing"
            if key is None and token.label in known:
                raise gone(session, token, settings)
            if key is None and make:
                step(f"make the key {settings.label} in the token {token.label}")
                with module.session(token.slot, writes=True) as writing:
                    generate(writing, settings)
                key, state = the_pair(session, token, settings), "made"
            facts = described(session, key, token, settings, known.get(token.label)) if key else {}
            if key:
                step(f"derive with the key {settings.label} of the token {token.label}")
                prove(session, key, facts, token, settings)
            rows.append({"state": state, **of_token(token, settings.label), **facts})
    return rows


def gone(session: Any, token: Any, settings: Settings) -> Fault:
    """Fault for a recorded key that is missing; SoftHSM and others keep a token's serial when it is reinitialised."""
    way_out = (
        " Its volumes can be opened with the other token or the recovery key. Restore it from the HSM's backup; to continue "
        f"with a new key, remove the token from {settings.record}, run again, and enrol it"
    )
    if not session.find({}):
        return Fault(
            "token_reinitialised",
            f"the token {token.label} (serial {token.serial}) is empty, but had the key {settings.label}: it was "
            f"initialized again, or its objects were deleted. No new key is made automatically.{way_out}",
        )
    return Fault(
        "key_missing",
        f"the key {settings.label} is gone from the token {token.label}, which holds others: it was deleted. No new one is "
        f"made automatically.{way_out}",
    )


def loaded(settings: Settings) -> Any:
    if settings.address:
        os.environ["P11_KIT_SERVER_ADDRESS"] = settings.address
    way = f"{settings.module}{f' at {settings.address}' if settings.address else ''}"
    try:
        module = pkcs11.Module(settings.module)
        if module.tokens():
            return module
    except (OSError, AttributeError) as problem:
        raise Fault(
            "absent",
            f"{settings.module} is not a loadable PKCS#11 module ({problem}); correct hsm_module",
        ) from problem
    except pkcs11.Error as problem:
        raise Fault(
            "absent", f"the HSM is not reached by {way}: {problem}. Check it and the connection to it"
        ) from problem
    raise Fault(
        "absent",
        f"the HSM is not reached by {way}, which shows no token at all. See that it runs, that its network is up"
        " (`systemctl status llmkeep-hsm-tls` where it is reached by TLS), and run again",
    )


def the_token(tokens: list[Any], label: str, known: dict[str, Any] | None, settings: Settings) -> Any:
    """The one token of a label, ready for a login."""
    fitting = [token for token in tokens if token.label == label]
    if len(fitting) > 1:
        serials = ", ".join(token.serial for token in fitting)
        raise Fault(
            "two_tokens",
            f"{len(fitting)} tokens are called {label} (serials {serials}), so the choice is ambiguous. No login was made. "
            "Give one of them another label, or disconnect it",
        )
    if not fitting:
        names = ", ".join(sorted(token.label or "(no label)" for token in tokens))
        raise Fault(
            "token_missing",
            f"the HSM has no token {label}; it has {names}. Correct its name, or see what became of it",
        )
    token = fitting[0]
    if known and known["serial"] != token.serial:
        raise Fault(
            "token_reinitialised",
            f"the token {label} was initialized again: its serial is {token.serial}, formerly {known['serial']}. Its keys "
            "are gone, and no new one is made automatically. Volumes can be opened with the other token or the recovery "
            f"key; restore the token from its backup, or remove it from {settings.record}, run again, and enrol the new key",
        )
    if not token.flags & pkcs11.USER_PIN_INITIALIZED:
        raise Fault(
            "token_reinitialised",
            f"the token {label} (serial {token.serial}) has no user PIN: its initialization was begun and not completed."
            " Set its PIN at the HSM, to the one that is sealed here",
        )
    if token.pin_flags:
        raise Fault(
            "pin_held_back",
            f"the token {label} says {', '.join(token.pin_flags)}, so no login was tried: a failed one might be the last. "
            "Log in once by hand with the correct PIN, which clears it, or unblock the PIN at the HSM",
        )
    return token


def log_in(session: Any, token: Any, pin: bytes) -> None:
    """Log in with the PIN, once. The caller must not try a refused PIN again; see pins.shown(), and the record of hsm_pin."""
    try:
        session.login(pin)
    except pkcs11.Error as problem:
        if problem.code == pkcs11.PIN_LOCKED:
            raise Fault(
                "pin_held_back", f"the PIN of the token {token.label} is locked; unblock it at the HSM"
            ) from problem
        if problem.code == pkcs11.PIN_INCORRECT:
            raise Fault(
                "pin_wrong",
                f"the token {token.label} rejects the PIN that is sealed here. It was tried once, and is not tried again "
                "until another one is sealed (docs/operate/hsm.md)",
            ) from problem
        raise


def of_token(token: Any, label: str) -> dict[str, Any]:
    return {
        "token": token.label,
        "serial": token.serial,
        "manufacturer": token.manufacturer,
        "double": token.manufacturer.startswith("SoftHSM"),
        "uri": uri(token.label, label),
    }


def recorded(path: str) -> dict[str, Any]:
    """The recorded tokens by label, as of the last proof of the key."""
    if not path or not Path(path).exists():
        return {}
    try:
        known: dict[str, Any] = json.loads(Path(path).read_text())
        formats.require(path, known, partial(Fault, "failed"))
        return {
            label: {"serial": of["serial"], "public_sha256": of["public_sha256"]}
            for label, of in known.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise Fault(
            "token_reinitialised",
            f"{path}, which identifies known tokens, cannot be read ({problem}). Restore it, or remove it if the tokens are "
            "certainly those with which the volumes were enrolled",
        ) from problem


def description(key: dict[str, Any]) -> str:
    """The properties of a verified key in words, for auditors."""
    attributes = [name for name, value in key.items() if value is True and name != "double"]
    maker = f"{key['manufacturer']}{', a double' if key['double'] else ''}"
    return f"{key['token']} ({maker}, serial {key['serial']}): {key['type']}, {', '.join(attributes)}, opens"


def main() -> int:
    """llmkeep-hsm: report the state of the host's key as JSON; exits with the fault's code.

    With the argument `refused` it only notes that a token refused the PIN to another program.
    """
    try:
        known = json.loads(SETTINGS.read_text())
        known.pop("double_allowed", None)  # for the role's check
        credential = Path(known.pop("pin"))
        if sys.argv[1:] == ["refused"]:
            pins.remember(credential, credential.read_bytes())
            return 0
        with pins.shown(credential, known.pop("pin_name")) as pin:
            rows = look(Settings(**known), pin, make=False, change=False)
        missing = [each["token"] for each in rows if each["state"] == "missing"]
        if missing:
            raise Fault("key_missing", f"the key was never made in {', '.join(missing)}; run the role hsm")
    except Fault as fault:
        print(json.dumps({"fault": fault.kind, "message": str(fault)}))
        return EXIT[fault.kind]
    except (OSError, ValueError, KeyError, TypeError) as problem:
        print(
            json.dumps(
                {"fault": "settings", "message": f"{SETTINGS} cannot be used: {problem}; run the role hsm"}
            )
        )
        return 2
    opens = {"ok": True, "observed": "; ".join(map(description, rows))}
    print(json.dumps({"opens": [each["token"] for each in rows], "keys": rows, "checks": {"opens": opens}}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
