"""`llm-serve keys add | import | list | rotate | revoke`: manages API keys and client certificates."""

import argparse
import json
import re
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from llmserve.access.api_keys import (
    NAME,
    SUBJECT,
    KeyFileError,
    Record,
    check_pepper,
    edited,
    edited_file,
    end_subject,
    ended,
    new_certificate,
    new_key,
    read_keys,
    replacement,
)
from llmserve.access.client_certificates import read_certificate
from llmserve.access.key_handover import read_handover
from llmserve.access.last_used import last_used_file, read_last_used
from llmserve.credentials import SealedError, unsealed

PEPPER = "llm-gateway.pepper"
KEYS_FILE = Path("/var/lib/llm-gateway/keys.json")
NO_SUCH_KEY = 3
HANDED_BYTES = 64 * 1024
LIFETIME = re.compile(r"([1-9][0-9]{0,4})([dh])")


def lifetime(text: str) -> timedelta:
    """Parse a lifetime such as 90d or 12h."""
    match = LIFETIME.fullmatch(text)
    if not match:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a lifetime: specify days or hours, such as 90d or 12h"
        )
    return timedelta(**{"days" if match[2] == "d" else "hours": int(match[1])})


def word(text: str) -> str:
    """Parse a local subject, a tenant or a role."""
    if not NAME.fullmatch(text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a valid name: use up to 64 letters, digits and . _ @ -"
        )
    return text


def holder(text: str) -> str:
    """Parse a subject, which may come from an identity provider and then allows more characters."""
    if not SUBJECT.fullmatch(text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a valid subject: use up to 255 printable ASCII characters"
        )
    return text


def add_commands(commands: Any) -> None:
    """Add `keys` and its subcommands to the parser of llm-serve."""
    keys = commands.add_parser("keys", help="add, list, rotate and revoke API keys, and client certificates")
    verbs = keys.add_subparsers(dest="verb", required=True)
    add = verbs.add_parser(
        "add", help="create a key, which is printed once and never stored, or register a client certificate"
    )
    add.add_argument("--subject", type=word, required=True, help="holder of the key or certificate")
    add.add_argument("--tenant", type=word, required=True, help="tenant whose data it can access")
    add.add_argument(
        "--role",
        type=word,
        action="append",
        required=True,
        dest="roles",
        help="role of the holder; repeatable",
    )
    add.add_argument(
        "--expires",
        type=lifetime,
        metavar="90d",
        help="expire after this many days (d) or hours (h) (default: never)",
    )
    add.add_argument(
        "--certificate", type=Path, metavar="PEM", help="register this client certificate, and create no key"
    )
    add.set_defaults(run=add_key)
    imported = verbs.add_parser(
        "import",
        help="import a key of playbooks/identities.yml, or the --json output of another host's 'add' or 'rotate' (stdin)",
    )
    imported.set_defaults(run=import_key)
    listing = verbs.add_parser("list", help="list keys, their holders, and when they were last used")
    listing.set_defaults(run=list_keys)
    rotate = verbs.add_parser(
        "rotate", help="create a new key for the holder of an old one, which then expires soon"
    )
    rotate.add_argument("id", help="id of the old key, its middle part")
    rotate.add_argument(
        "--overlap", type=lifetime, metavar="24h", default="24h", help="how long the old key remains valid"
    )
    rotate.add_argument(
        "--expires",
        type=lifetime,
        metavar="90d",
        help="lifetime of the new key (default: that of the old one)",
    )
    rotate.set_defaults(run=rotate_key)
    revoke = verbs.add_parser(
        "revoke", help="revoke a key, or everything of one subject; takes effect within seconds"
    )
    which = revoke.add_mutually_exclusive_group(required=True)
    which.add_argument("id", nargs="?", help="id of the key, its middle part")
    which.add_argument(
        "--subject", type=holder, help="all keys of this subject, and its tokens issued so far"
    )
    revoke.set_defaults(run=revoke_key)
    for verb in (add, imported, rotate):
        verb.add_argument(
            "--pepper-file", type=Path, help=f"read the pepper from here, not from the credential {PEPPER}"
        )
    for verb in (add, imported, listing, rotate, revoke):
        verb.add_argument("--keys-file", type=Path, default=KEYS_FILE)
        verb.add_argument("--json", action="store_true", help="print one JSON document on standard output")


def gateway_pepper(file: Path | None) -> bytes:
    """The pepper: from `file`, this unit's credentials, or, as root, the sealed credential. Raises KeyFileError."""
    if file is not None:
        return check_pepper(file.read_bytes(), str(file))
    try:
        return check_pepper(unsealed(PEPPER), f"the credential {PEPPER}")
    except SealedError as error:
        raise KeyFileError(
            f"there is no pepper: {error}, or specify a file of random bytes with --pepper-file"
        ) from None


def public_fields(record: Record) -> dict[str, object]:
    """A record for output, without its hash."""
    expired = record.expires is not None and record.expires <= datetime.now(UTC)
    state = "revoked" if record.revoked else "expired" if expired else "live"
    return {**record.model_dump(mode="json", exclude={"hash"}), "state": state}


def until(record: Record) -> str:
    return record.expires.isoformat() if record.expires else "for ever"


def no_such_key(number: str) -> int:
    print(f"llm-serve: there is no key {number!r}: 'llm-serve keys list' shows the ids", file=sys.stderr)
    return NO_SUCH_KEY


def hand_over(options: argparse.Namespace, key: str, record: Record, old: Record | None = None) -> int:
    """Print a new key, which is shown only this once."""
    if options.json:
        ends = {"replaced_expires": old.model_dump(mode="json")["expires"]} if old else {}
        print(json.dumps({**public_fields(record), **ends, "key": key}))
        return 0
    note = f" (the old one, {old.id}, expires {until(old)})" if old else ""
    who = f"key {record.id} for {record.subject} of {record.tenant}"
    print(f"{who}, valid until {until(record)}{note}; shown only once:", file=sys.stderr)
    print(key)
    return 0


def refuse_another_holder(records: list[Record], record: Record) -> None:
    """Raise KeyFileError if the certificate is registered already: it identifies one holder at a time."""
    for each in records:
        if each.fingerprint and each.fingerprint == record.fingerprint and ended(each) is None:
            raise KeyFileError(
                f"the certificate already belongs to {each.subject} as {each.id}: revoke that first"
            )


def add_certificate(options: argparse.Namespace) -> int:
    try:
        certificate = read_certificate(options.certificate.read_bytes())
    except ValueError:
        raise KeyFileError(f"{options.certificate} contains no certificate: specify a PEM file") from None
    record = new_certificate(certificate, options.subject, options.tenant, options.roles, options.expires)
    if ended(record):
        raise KeyFileError(f"{options.certificate} expired at {until(record)}: specify a valid one")
    with edited(options.keys_file) as records:
        refuse_another_holder(records, record)
        records.append(record)
    if options.json:
        print(json.dumps(public_fields(record)))
    else:
        who = f"certificate {record.id} for {record.subject} of {record.tenant}"
        print(f"{who}, SHA-256 {record.fingerprint}, valid until {until(record)}", file=sys.stderr)
    return 0


def add_key(options: argparse.Namespace) -> int:
    if options.certificate:
        return add_certificate(options)
    pepper = gateway_pepper(options.pepper_file)
    key, record = new_key(pepper, options.subject, options.tenant, options.roles, options.expires)
    with edited(options.keys_file) as records:
        records.append(record)
    return hand_over(options, key, record)


def holder_fields(record: Record) -> dict[str, str]:
    return {"subject": record.subject, "tenant": record.tenant, "roles": ", ".join(record.roles)}


def refuse_change_of_holder(here: Record, record: Record) -> None:
    """Raise KeyFileError unless `record`, the same key or its successor, has the holder of `here`."""
    expected, observed = holder_fields(here), holder_fields(record)
    for name, value in expected.items():
        if observed[name] != value:
            raise KeyFileError(
                f"the {name} of {here.id} is {value} here, and {observed[name]} in the record {record.id}: "
                "create a new one with 'keys add'"
            )


def import_key(options: argparse.Namespace) -> int:
    """Importing the same record again changes nothing, and does not undo a revocation."""
    handover = read_handover(sys.stdin.buffer.read(HANDED_BYTES))
    record = handover.record(lambda: gateway_pepper(options.pepper_file))
    with edited(options.keys_file) as records:
        at = {each.id: index for index, each in enumerate(records)}
        existing = record.id in at
        if existing:
            here = records[at[record.id]]
            if (here.hash, here.fingerprint) != (record.hash, record.fingerprint):
                raise KeyFileError(
                    f"{record.id} is the id of another key here: create a new one with 'keys add'"
                )
            refuse_change_of_holder(here, record)
        else:
            here = record
            if ended(record):
                raise KeyFileError(
                    f"{record.id} expired at {until(record)}: create a new one with 'keys add'"
                )
            refuse_another_holder(records, record)
            records.append(record)
            if record.replaces in at and handover.replaced_expires:
                old = records[at[record.replaces]]
                if old.kind != "api_key":
                    raise KeyFileError(f"{old.id} is a certificate here: a key cannot replace a certificate")
                refuse_change_of_holder(old, record)
                ends = min(old.expires or handover.replaced_expires, handover.replaced_expires)
                records[at[old.id]] = old.model_copy(update={"expires": ends})
    if options.json:
        print(json.dumps({**public_fields(here), "imported": not existing}))
    else:
        print(f"{record.id} {'was already imported' if existing else 'is now valid here'}", file=sys.stderr)
    return 0


def list_keys(options: argparse.Namespace) -> int:
    content = read_keys(options.keys_file)
    used = read_last_used(last_used_file(options.keys_file))
    last = {record.id: used[record.id].isoformat() if record.id in used else None for record in content.keys}
    if options.json:
        print(
            json.dumps([{**public_fields(record), "last_used": last[record.id]} for record in content.keys])
        )
        return 0
    for record in content.keys:
        state, roles = public_fields(record)["state"], ",".join(record.roles)
        words = [
            record.id,
            f"{record.kind:11}",
            f"{state:7}",
            record.subject,
            record.tenant,
            roles,
            f"until {until(record)}",
        ]
        print("  ".join([*words, f"last used {last[record.id] or 'never'}"]))
    for block in content.blocked:
        print(f"{block.subject}: tokens issued until {block.since.isoformat()} are rejected", file=sys.stderr)
    return 0


def rotate_key(options: argparse.Namespace) -> int:
    pepper = gateway_pepper(options.pepper_file)
    with edited(options.keys_file) as records:
        index = next((at for at, record in enumerate(records) if record.id == options.id), None)
        if index is None:
            return no_such_key(options.id)
        if records[index].kind != "api_key":
            raise KeyFileError(f"{options.id} is a certificate: add the new one with 'llm-serve keys add'")
        if refusal := ended(records[index]):
            raise KeyFileError(
                f"{refusal.message} with 'llm-serve keys add'; only a valid key can be rotated"
            )
        for each in records:
            if each.replaces == options.id and ended(each) is None:
                raise KeyFileError(f"the key {options.id} has been replaced by {each.id}: rotate that one")
        key, record, records[index] = replacement(pepper, records[index], options.overlap, options.expires)
        records.append(record)
        old = records[index]
    return hand_over(options, key, record, old)


def revoke_key(options: argparse.Namespace) -> int:
    if options.subject:
        return revoke_subject(options)
    with edited(options.keys_file) as records:
        index = next((at for at, record in enumerate(records) if record.id == options.id), None)
        if index is None:
            return no_such_key(options.id)
        if records[index].revoked is None:
            now = datetime.now(UTC).replace(microsecond=0)
            records[index] = records[index].model_copy(update={"revoked": now})
        result = public_fields(records[index])
    if options.json:
        print(json.dumps(result))
    else:
        print(f"key {options.id} is revoked", file=sys.stderr)
    return 0


def revoke_subject(options: argparse.Namespace) -> int:
    with edited_file(options.keys_file) as content:
        revoked, block = end_subject(content, options.subject)
    numbers = [record.id for record in revoked]
    since = block.since.isoformat()
    if options.json:
        print(json.dumps({"subject": options.subject, "revoked": numbers, "tokens_refused_until": since}))
    else:
        what = f"revoked: {', '.join(numbers) or 'nothing, there were no live keys'}"
        print(f"{options.subject}: {what}; tokens issued until {since} are rejected", file=sys.stderr)
    return 0
