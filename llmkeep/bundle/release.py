"""`llmkeep release init | passphrase | sign | verify | add | list`: models of the estate, signed by a key of its own.

`llm-train publish` and `llmkeep model add` make a candidate from a trained or imported model. `sign` turns it into a
release: MANIFEST.json with a serial that only rises, signed by the estate's publish key. `init` makes that key. It
has a passphrase, since a person signs; it is also sealed by systemd-creds, and opened only in memory. Hosts trust its
public part, keyring.pgp, for releases and nothing else: the bundle has another key. `add` puts a release on the
mirror, where hosts that name it in the inventory fetch it.

Exit codes: 0 done; 1 refused, with the reason. `verify` and `add` tell refusals apart: 3 unsigned, signed by another
key or as something else, 4 damaged (a changed, missing or extra file), 5 an older serial than was accepted before, 6
expired, 7 one medium of several. 9: the passphrase is wrong, weak or unavailable.
"""

import argparse
import datetime
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmcore.files import flush
from llmkeep import passphrase
from llmkeep.bundle import join, manifest, media, signing
from llmkeep.bundle.cache import sha256
from llmkeep.bundle.manifest import DAMAGED, BundleRefused, Entry, Manifest
from llmkeep.durable import readable, record, write
from llmkeep.errors import LlmkeepError, printable
from llmkeep.places import PUBLISH_KEY, Places
from llmkeep.sealing import in_memory, seal, unseal

DAYS = 365  # how long a release may be installed
MARGIN = 64 << 20  # bytes of free space beyond a release
TRAINING, PROVENANCE = "training.json", "provenance.json"  # what a candidate says of itself
PROFILE = "release "  # what a manifest is for, with the release's name
NAME = re.compile(r"[a-z0-9][a-z0-9.-]{0,62}")
# A model has weights that are numbers, and files that are text; what could run has no place in it.
KINDS = {
    "": "text/plain",
    ".jinja": "text/plain",
    ".json": "application/json",
    ".md": "text/markdown",
    ".model": "application/octet-stream",
    ".safetensors": "application/octet-stream",
    ".txt": "text/plain",
}


class ReleaseError(LlmkeepError):
    """A release was refused. The message says what is wrong, the value seen, and what to do."""


# ---------------------------------------------------------------- the key
def init(places: Places, word: str | None) -> str:
    """Generate the key if there is none; returns its fingerprint. Idempotent. `word`: its passphrase, None for a lab's.

    The public part is written last and marks completion: without it, no host can have trusted the key.
    """
    if not places.publish_public.exists():
        with tempfile.TemporaryDirectory(prefix="llmkeep-") as folder:
            revocation, certificate = Path(folder, "revocation.pgp"), Path(folder, "keyring.pgp")
            secret = signing.generate("llmkeep releases", revocation, word).encode()
            with in_memory(secret) as key:
                signing.certify(key, certificate)
            places.publish_key.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            write(places.publish_key, seal(secret, PUBLISH_KEY), 0o400)
            write(places.publish_public.with_name("revocation.pgp"), revocation.read_bytes(), 0o400)
            write(places.publish_public, certificate.read_bytes(), 0o644)
    return fingerprint(places)


def fingerprint(places: Places) -> str:
    """The publish key's fingerprint; raises ReleaseError if the key, or one half of it, is missing."""
    if not places.publish_public.exists():
        raise ReleaseError(
            f"there is no {places.publish_public}: make the publish key with `llmkeep release init`"
        )
    if not places.publish_key.exists():
        raise ReleaseError(
            f"{places.publish_key} is missing, although {places.publish_public} exists: restore it from a backup "
            "of this host"
        )
    return signing.fingerprint(places.publish_public)


@contextmanager
def unlocked(places: Places, passphrase_file: Path | None) -> Iterator[Path]:
    """Path of the publish key in memory, unsealed and without its passphrase."""
    with (
        in_memory(unseal(places.publish_key.read_bytes(), PUBLISH_KEY)) as sealed,
        signing.unlocked(sealed, passphrase_file, "the publish key") as key,
    ):
        if key == sealed:
            print(
                f"llmkeep: the publish key is {passphrase.WITHOUT}: `llmkeep release passphrase` gives it one",
                file=sys.stderr,
            )
        yield key


def change_passphrase(places: Places, old: Path | None, new: Path | None) -> str:
    """Set or change the publish key's passphrase. The old file stays complete until the new one is on disk."""
    fingerprint(places)
    with unlocked(places, old) as key:
        secret = signing.with_passphrase(key, passphrase.chosen(new, "the publish key"))
    write(places.publish_key, seal(secret, PUBLISH_KEY), 0o400)
    return (
        f"{places.publish_key}: the publish key has a new passphrase; existing backups of this host still have "
        "the old file"
    )


# ---------------------------------------------------------------- sign
@dataclass(frozen=True)
class Candidate:
    """A model to be signed. `origin` and `licence` go into the manifest, `standing` is shown to the operator.

    `unproved`: the reason for publishing a trained model that was not proved better than its base.
    """

    name: str
    origin: str
    licence: str
    purl: str
    standing: str
    unproved: str | None
    digests: dict[str, str]


def candidate(folder: Path) -> Candidate:
    """Check every byte of a candidate. Raises ReleaseError for anything that its builder did not write."""
    if (folder / manifest.MEDIUM).exists():
        raise ReleaseError(f"{folder} is one medium of several: put them together with `llmkeep bundle join`")
    if (folder / manifest.NAME).exists():
        raise ReleaseError(f"{folder} is signed already: add it with `llmkeep release add`")
    statements = [
        path for statement in (TRAINING, PROVENANCE) for path in folder.glob(f"models/*/{statement}")
    ]
    if len(statements) != 1 or not NAME.fullmatch(name := statements[0].parent.name):
        raise ReleaseError(
            f"{folder} is not a candidate: give a folder made by `llm-train publish --into` or `llmkeep model add --into`"
        )
    model, sums = statements[0].parent, folder / "models" / f"{name}.sha256"
    again = "publish it again" if statements[0].name == TRAINING else "add it again"
    present = set(manifest.walk(folder))
    for path in sorted(present):
        if (folder / path).is_symlink() or not (folder / path).is_file():
            raise ReleaseError(f"{folder}/{path} is not a plain file: a release holds nothing else; {again}")
        if Path(path).suffix.lower() not in KINDS and folder / path != sums:
            raise ReleaseError(f"{folder}/{path} is not a model file: only safetensors and text are accepted")
    try:
        lines = [line.split("  ", 1) for line in sums.read_text().splitlines()]
        in_model = {path: digest for digest, path in lines}
        statement = json.loads(statements[0].read_bytes())
        facts = (
            trained(model, statement["published"])
            if statements[0].name == TRAINING
            else brought(statement, in_model)
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ReleaseError(f"{folder} is not a complete candidate ({error}): {again}") from error
    digests_by_path = {f"models/{name}/{path}": digest for path, digest in in_model.items()} | {
        f"models/{name}.sha256": ""
    }
    for path in sorted(digests_by_path.keys() ^ present):
        raise ReleaseError(
            f"{folder}/{path} is {'missing' if path in digests_by_path else 'not in its manifest'}: copy the candidate again"
        )
    entries = [(folder / path, digest) for path, digest in digests_by_path.items() if digest]
    for file, actual, digest in manifest.hashed(lambda each: (each[0], sha256(each[0]), each[1]), entries):
        if actual != digest:
            raise ReleaseError(
                f"{file} has sha256 {actual}, but its manifest says {digest}: copy the candidate again"
            )
    if (
        not any(path.endswith(".safetensors") for path in present)
        or f"models/{name}/config.json" not in present
    ):
        raise ReleaseError(f"{folder} has no weights or no config.json: {again}")
    digests = {path: digest or sha256(sums) for path, digest in digests_by_path.items()}
    return Candidate(name=name, digests=digests, **facts)


def trained(model: Path, published: dict[str, Any]) -> dict[str, Any]:
    """Manifest fields of a model trained here. Raises ReleaseError without a promotion or a reason."""
    promoted = promotion(model, published) if "verdict" in published else None
    reason = published.get("unproved")
    if promoted != "promote" and not str(reason or "").strip():
        raise ReleaseError(
            f"{model} has neither a promotion nor a reason for going without: publish it again"
        )
    return {
        "origin": f"trained here from {published['base']}",
        "licence": str(published.get("licence", "")),
        "purl": "",
        "standing": f"NOT proved better than its base: {reason}" if reason else "promoted by its gate",
        "unproved": reason,
    }


def brought(provenance: dict[str, Any], in_model: dict[str, str]) -> dict[str, Any]:
    """Manifest fields of an imported model. Raises ReleaseError if its files or licence are not on record."""
    agreed, source = provenance["licence"], str(provenance["source"])
    for path, digest in in_model.items():
        if path != PROVENANCE and provenance["files"].get(path) != digest:
            raise ReleaseError(
                f"{PROVENANCE} has {provenance['files'].get(path)} for {path}, but the model's manifest has {digest}: "
                "add it again"
            )
    if not agreed["name"] or not agreed["accepted_by"]:
        raise ReleaseError(f"{PROVENANCE} names no accepted licence: add it again")
    return {
        "origin": source,
        "licence": str(agreed["name"]),
        "purl": str(provenance["purl"]),
        "standing": f"from {source}, licence {agreed['name']} accepted by {agreed['accepted_by']}",
        "unproved": None,
    }


def promotion(model: Path, published: dict[str, Any]) -> str:
    """The verdict in verdict.json, which must be about the published weights: an adapter with its base, or a whole model.

    Raises ReleaseError for a verdict about other weights. Weights are identified by the sha256 of their manifest.
    """
    verdict = json.loads((model / "verdict.json").read_bytes())
    base, learned = published["base"], published["learned"]
    weights = (
        {"model": base, "adapter": learned} if published["merged"] else {"model": learned, "adapter": None}
    )
    if (subject := {key: verdict["new"][key] for key in weights}) != weights:
        raise ReleaseError(
            f"{model}/verdict.json is about other weights: its NEW is {subject}, but {weights} was published; "
            "publish it again"
        )
    return str(verdict["verdict"])


def sign(
    places: Places,
    folder: Path,
    days: int = DAYS,
    now: datetime.datetime | None = None,
    expected: str | None = None,
    passphrase_file: Path | None = None,
) -> str:
    """Sign a candidate as a release; returns a message for the operator. A serial is never issued twice.

    `expected`: the sha256 of its manifest, as the builder printed it. The publish key's passphrase is read from a
    file, else asked for.
    """
    if not 1 <= days <= 3660:
        raise ReleaseError(f"--days is {days}: a release may be installed for 1 to 3660 days")
    content = candidate(folder)
    name, digests = content.name, content.digests
    if expected is not None and (actual := digests[f"models/{name}.sha256"]) != expected.lower():
        raise ReleaseError(
            f"{folder}/models/{name}.sha256 has sha256 {actual}, but --sha256 says {expected}: this is not the candidate "
            "that was noted; copy it again"
        )
    signer = fingerprint(places)
    with unlocked(places, passphrase_file) as key:
        return _signed(places, folder, content, days, now, signer, key)


def _signed(
    places: Places,
    folder: Path,
    model: Candidate,
    days: int,
    now: datetime.datetime | None,
    signer: str,
    key: Path,
) -> str:
    """Sign a checked candidate with an unlocked key."""
    name, digests = model.name, model.digests
    serial = int(places.publish_serial.read_text()) + 1 if places.publish_serial.exists() else 1
    write(places.publish_serial, f"{serial}\n".encode(), 0o644)
    moment = (now or datetime.datetime.now(datetime.UTC)).replace(microsecond=0)
    entries = [
        Entry(
            path,
            (folder / path).stat().st_size,
            digest,
            KINDS.get(Path(path).suffix.lower(), "text/plain"),
            model.licence,
            model.origin,
            model.purl,
        )
        for path, digest in digests.items()
    ]
    made = Manifest(
        type=manifest.RELEASE,
        serial=serial,
        profile=PROFILE + name,
        created=moment.strftime(manifest.TIME),
        expires=(moment + datetime.timedelta(days=days)).strftime(manifest.TIME),
        signer=signer,
        lock_sha256="",  # nothing of it came from a registry
        inputs_sha256=digests[f"models/{name}.sha256"],
        files=entries,
    )
    record(
        places.publish_signed,
        {
            "time": moment.isoformat(),
            "name": name,
            "serial": serial,
            "model": made.inputs_sha256,
            "origin": model.origin,
            "unproved": model.unproved,
        },
    )
    aside = folder / f".{manifest.SIGNATURE}"
    try:
        manifest.write(folder, made)
        signing.sign(key, folder / manifest.NAME, aside)
        aside.replace(folder / manifest.SIGNATURE)
        manifest.verify(folder, places.publish_public, manifest.RELEASE, now=moment)
    except BaseException:
        for path in (aside, folder / manifest.NAME, folder / manifest.SIGNATURE):
            path.unlink(missing_ok=True)
        raise
    signed = f"signed by {signer}, may be installed until {made.expires}"
    standing = " ".join(model.standing.split())  # in one line, whatever its maker wrote
    return f"{folder}: release {name}, serial {serial}, {standing}; {signed}"


# ---------------------------------------------------------------- verify and add
def name_of(listing: Manifest) -> str:
    """The release's signed name; raises BundleRefused for a manifest of something else."""
    name = listing.profile.removeprefix(PROFILE)
    if not listing.profile.startswith(PROFILE) or not NAME.fullmatch(name):
        raise BundleRefused(
            DAMAGED,
            f"it is for {listing.profile!r}, not a model release: give one that was signed as a model release",
        )
    for entry in listing.files:
        if not entry.path.startswith(f"models/{name}/") and entry.path != f"models/{name}.sha256":
            raise BundleRefused(
                DAMAGED,
                f"the release {name} lists {entry.path}, which does not belong in a release: do not use it",
            )
    return name


def verify(places: Places, folder: Path, keyring: Path, now: datetime.datetime | None = None) -> Manifest:
    """Verify a release like a bundle; raises BundleRefused. Changes nothing."""
    if not keyring.is_file():
        raise ReleaseError(f"there is no {keyring}: give the publish key's public part with --keyring")
    good = manifest.verify(folder, keyring, manifest.RELEASE, _seen(places, folder), now)
    name_of(good)
    return good


def _seen(places: Places, folder: Path) -> int:
    """The highest serial of this release accepted here."""
    if not ((folder / manifest.SIGNATURE).is_file() and (folder / manifest.NAME).is_file()):
        return 0
    record_of = places.publish_seen(name_of(manifest.read(folder)))
    return int(record_of.read_text()) if record_of.exists() else 0


@readable()
def add(places: Places, folder: Path, keyring: Path) -> str:
    """Bring a release to the mirror and verify it there; returns a message for the operator. Idempotent.

    This user's files on the mirror's disk are hard-linked, and so are contents of its bundles or releases; others are
    copied. The release replaces an older one of the same name by one rename; the older one is removed afterwards.
    """
    sign_again(places, folder)
    good = verify(places, folder, keyring)
    name = name_of(good)
    target = places.releases / f".{name}-{good.serial}"
    places.releases.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    paths = [manifest.NAME, manifest.SIGNATURE, *(entry.path for entry in good.files)]
    linked = {path: folder / path for path in paths if join.linkable(folder / path, places.releases)}
    linked |= _at_hand(places, [entry for entry in good.files if entry.path not in linked])
    size = sum((folder / path).stat().st_size for path in paths if path not in linked)
    if (free := shutil.disk_usage(places.releases).free) < size + MARGIN:
        raise ReleaseError(
            f"{places.releases} has {free / 1e9:.2f} GB free, the copy takes {size / 1e9:.2f} GB: make room, or move {folder} to "
            "that disk"
        )
    try:
        for path in paths:
            (partial / path).parent.mkdir(parents=True, exist_ok=True)
            if path in linked:
                (partial / path).hardlink_to(linked[path])
            else:
                with (folder / path).open("rb") as source, (partial / path).open("wb") as copy:
                    shutil.copyfileobj(source, copy, 1 << 22)
                    copy.flush()
                    os.fsync(copy.fileno())
            (partial / path).chmod(0o644)
        if verify(places, partial, keyring) != good:
            raise BundleRefused(
                DAMAGED,
                f"{folder} changed while it was being copied: copy it to a local disk, and add that copy",
            )
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    write(places.publish_seen(name), f"{good.serial}\n".encode(), 0o644)
    link = places.releases / f".{name}.new"
    link.unlink(missing_ok=True)
    link.symlink_to(target.name)
    link.replace(places.releases / name)
    flush(places.releases)
    for old in places.releases.glob(f".{name}-*"):
        if re.fullmatch(rf"\.{re.escape(name)}-\d+", old.name) and old != target:
            shutil.rmtree(old)
    return f"{places.releases / name}: serial {good.serial}, {len(good.files)} files; name it in an inventory: release: {name}"


def sign_again(places: Places, folder: Path) -> None:
    """Give an unsigned candidate the signature that this mirror has of it: a restore brings back only signatures."""
    for sums in [] if (folder / manifest.NAME).exists() else folder.glob("models/*.sha256"):
        standing = places.releases / sums.stem
        if (standing / manifest.NAME).is_file() and manifest.read(standing).inputs_sha256 == sha256(sums):
            for file in (manifest.SIGNATURE, manifest.NAME):
                write(folder / file, (standing / file).read_bytes(), 0o644)


def _at_hand(places: Places, entries: list[Entry]) -> dict[str, Path]:
    """Files of the local bundles and releases with the wanted contents, hashed again, by the path at which they are wanted."""
    copies = join.held(join.here(places)) if entries else {}
    return {
        entry.path: path
        for entry in entries
        for path in copies.get(entry.sha256, [])[:1]
        if join.linkable(path, places.releases) and sha256(path) == entry.sha256
    }


def listed(places: Places) -> str:
    """One line per release on this mirror, from its manifest, unverified."""
    releases = (
        [(path, manifest.read(path)) for path in sorted(places.releases.glob("[!.]*"))]
        if places.releases.is_dir()
        else []
    )
    lines = [
        f"{path.name}  serial {each.serial}  created {each.created}  expires {each.expires}"
        for path, each in releases
    ]
    return "\n".join(lines) or f"{places.releases} has no release: add one with `llmkeep release add`"


# ---------------------------------------------------------------- command line
def _as_command(verb: Any) -> Any:
    """Print a verb's result; turn a refusal into its exit code."""

    def run(arguments: argparse.Namespace) -> int:
        try:
            print(printable(verb(arguments)))
        except BundleRefused as refusal:
            print(f"llmkeep: refused: {arguments.folder}: {refusal}", file=sys.stderr)
            return refusal.code
        return 0

    return run


def _init(arguments: argparse.Namespace) -> str:
    places = arguments.places
    missing = not places.publish_public.exists()
    word = (
        passphrase.of_new_key("the publish key", arguments.passphrase_file, arguments.without_passphrase)
        if missing
        else None
    )
    return f"{places.publish_public}: releases are signed by {init(places, word)}"


def _verify(arguments: argparse.Namespace) -> str:
    keyring = arguments.keyring or arguments.places.publish_public
    if media.read(arguments.folder):
        return media.verify(
            arguments.folder, keyring, manifest.RELEASE, _seen(arguments.places, arguments.folder)
        )
    good = verify(arguments.places, arguments.folder, keyring)
    count = f"{len(good.files)} files, all as signed by {good.signer}"
    return f"{arguments.folder}: release {name_of(good)}, serial {good.serial}, {count}"


def register(
    subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]",
) -> "argparse._SubParsersAction[argparse.ArgumentParser]":
    """`llmkeep release init | passphrase | sign | verify | add | list`; returns the subparsers."""
    parser = subparsers.add_parser(
        "release", help="sign and publish models that the estate trained or imported", description=__doc__
    )
    parser.set_defaults(places=Places())
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    verb = verbs.add_parser("init", help="generate the publish key if there is none")
    passphrase.add_options(verb)
    verb.set_defaults(run=_as_command(_init))
    verb = verbs.add_parser("passphrase", help="set or change the publish key's passphrase")
    verb.add_argument("--passphrase-file", type=Path, help="the present one (default: ask, if there is one)")
    verb.add_argument("--new-passphrase-file", type=Path, help="the new one (default: ask twice)")
    verb.set_defaults(
        run=_as_command(
            lambda arguments: change_passphrase(
                arguments.places, arguments.passphrase_file, arguments.new_passphrase_file
            )
        )
    )
    verb = verbs.add_parser("sign", help="turn a candidate into a release")
    verb.add_argument("folder", type=Path)
    verb.add_argument(
        "--days", type=int, default=DAYS, help="days for which it may be installed (default: %(default)s)"
    )
    verb.add_argument(
        "--sha256", help="sha256 of the candidate's manifest, as its builder printed it; any other is refused"
    )
    verb.add_argument(
        "--passphrase-file",
        type=Path,
        help="file or pipe with the publish key's passphrase (default: ask once)",
    )
    verb.set_defaults(
        run=_as_command(
            lambda arguments: sign(
                arguments.places,
                arguments.folder,
                arguments.days,
                expected=arguments.sha256,
                passphrase_file=arguments.passphrase_file,
            )
        )
    )
    trust = "the trusted key (default: /etc/llmkeep/publish/keyring.pgp)"
    verb = verbs.add_parser(
        "verify",
        help="check signature, type, serial, age and every byte, without a network",
        description=__doc__,
    )
    verb.add_argument("folder", type=Path)
    verb.add_argument("--keyring", type=Path, help=trust)
    verb.set_defaults(run=_as_command(_verify))
    verb = verbs.add_parser("add", help="verify a release and put it on this mirror", description=__doc__)
    verb.add_argument("folder", type=Path)
    verb.add_argument("--keyring", type=Path, help=trust)
    verb.set_defaults(
        run=_as_command(
            lambda arguments: add(
                arguments.places, arguments.folder, arguments.keyring or arguments.places.publish_public
            )
        )
    )
    verb = verbs.add_parser("list", help="list the releases on this mirror")
    verb.set_defaults(run=_as_command(lambda arguments: listed(arguments.places)))
    return verbs
