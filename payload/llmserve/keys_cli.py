"""`llm-serve keys add | list | revoke`: who may ask."""

import argparse
import json
import os
import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from llmserve.keys import KeyFileError, Record, check_pepper, edited, new_key, read_keys

PEPPER = "llm-gateway.pepper"
SEALED_PEPPER = Path("/etc/credstore.encrypted", PEPPER)
KEYS_FILE = Path("/var/lib/llm-gateway/keys.json")
NO_SUCH_KEY = 3
LIFETIME = re.compile(r"([1-9][0-9]{0,4})([dh])")


def lifetime(text: str) -> timedelta:
    """90d or 12h."""
    match = LIFETIME.fullmatch(text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no lifetime: write days or hours, as in 90d or 12h")
    return timedelta(**{"days" if match[2] == "d" else "hours": int(match[1])})


def word(text: str) -> str:
    """A subject, tenant or role."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no name: use up to 64 letters, digits and . _ @ -")
    return text


def add_commands(commands: Any) -> None:
    """Give the parser of llm-serve its `keys`."""
    keys = commands.add_parser("keys", help="add, list and revoke API keys")
    verbs = keys.add_subparsers(dest="verb", required=True)
    add = verbs.add_parser("add", help="make a key; it is printed once, on standard output, and kept nowhere")
    add.add_argument("--subject", type=word, required=True, help="who will hold it")
    add.add_argument("--tenant", type=word, required=True, help="whose data it may see")
    add.add_argument(
        "--role", type=word, action="append", required=True, dest="roles", help="may be given repeatedly"
    )
    add.add_argument(
        "--expires", type=lifetime, metavar="90d", help="days (d) or hours (h) from now; else never"
    )
    add.add_argument("--pepper-file", type=Path, help=f"instead of the credential {PEPPER}")
    add.set_defaults(run=add_key)
    listing = verbs.add_parser("list", help="who has keys")
    listing.set_defaults(run=list_keys)
    revoke = verbs.add_parser("revoke", help="end a key; the gateway knows within seconds")
    revoke.add_argument("id", help="the middle part of the key")
    revoke.set_defaults(run=revoke_key)
    for verb in (add, listing, revoke):
        verb.add_argument("--keys-file", type=Path, default=KEYS_FILE)
        verb.add_argument("--json", action="store_true", help="one JSON document on standard output")


def gateway_pepper(file: Path | None) -> bytes:
    """The pepper: from `file`, from this unit's credentials, or, for root, out of the sealed credential."""
    if file is not None:
        return check_pepper(file.read_bytes(), str(file))
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    if folder and Path(folder, PEPPER).exists():
        return check_pepper(Path(folder, PEPPER).read_bytes(), f"the credential {PEPPER}")
    if not SEALED_PEPPER.exists():
        raise KeyFileError(
            f"there is no pepper: neither the credential {PEPPER} nor {SEALED_PEPPER}; "
            "provision this host, or name a file of random bytes with --pepper-file"
        )
    command = ["systemd-creds", "decrypt", f"--name={PEPPER}", str(SEALED_PEPPER), "-"]
    opened = subprocess.run(command, capture_output=True, check=False)
    if opened.returncode:
        reason = opened.stderr.decode(errors="replace").strip()
        raise KeyFileError(f"cannot unseal {SEALED_PEPPER} ({reason}): only root of this host can")
    return check_pepper(opened.stdout, str(SEALED_PEPPER))


def shown(record: Record) -> dict[str, object]:
    """A record for people and machines, without its hash."""
    expired = record.expires is not None and record.expires <= datetime.now(UTC)
    state = "revoked" if record.revoked else "expired" if expired else "live"
    return {**record.model_dump(mode="json", exclude={"hash"}), "state": state}


def add_key(options: argparse.Namespace) -> int:
    """llm-serve keys add."""
    pepper = gateway_pepper(options.pepper_file)
    key, record = new_key(pepper, options.subject, options.tenant, options.roles, options.expires)
    with edited(options.keys_file) as records:
        records.append(record)
    if options.json:
        print(json.dumps({**shown(record), "key": key}))
        return 0
    until = record.expires.isoformat() if record.expires else "for ever"
    print(
        f"key {record.id} for {record.subject} of {record.tenant}, good until {until}; shown only now:",
        file=sys.stderr,
    )
    print(key)
    return 0


def list_keys(options: argparse.Namespace) -> int:
    """llm-serve keys list."""
    records = read_keys(options.keys_file)
    if options.json:
        print(json.dumps([shown(record) for record in records]))
        return 0
    for record in records:
        until = record.expires.isoformat() if record.expires else "never"
        state, roles = shown(record)["state"], ",".join(record.roles)
        print(f"{record.id}  {state:8} {record.subject}  {record.tenant}  {roles}  {until}")
    return 0


def revoke_key(options: argparse.Namespace) -> int:
    """llm-serve keys revoke."""
    with edited(options.keys_file) as records:
        for index, record in enumerate(records):
            if record.id == options.id:
                if record.revoked is None:
                    now = datetime.now(UTC).replace(microsecond=0)
                    records[index] = record.model_copy(update={"revoked": now})
                result = shown(records[index])
                break
        else:
            print(
                f"llm-serve: there is no key {options.id!r}: 'llm-serve keys list' shows the ids",
                file=sys.stderr,
            )
            return NO_SUCH_KEY
    if options.json:
        print(json.dumps(result))
    else:
        print(f"key {options.id} is revoked", file=sys.stderr)
    return 0
