"""`llmkeep bundle build | verify | list`: everything that crosses the air gap, signed, in one directory.

Exit codes of `verify`: 0 good, 3 unsigned or signed by an unknown key, 4 damaged (a changed, missing or extra
file), 5 an older serial than was accepted before, 6 expired. `bootstrap` uses the same ones.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from llmkeep import escrow
from llmkeep.bundle import cache, keys, manifest
from llmkeep.bundle.manifest import BundleRefused
from llmkeep.errors import LlmkeepError


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """`llmkeep bundle build | verify | list`."""
    verbs = subparsers.add_parser("bundle", help="what crosses the air gap").add_subparsers(required=True)
    parser = verbs.add_parser("build", help="build and sign it (needs the registries, or a warm cache)")
    parser.add_argument("--profile", default="lab", help="profile of artifacts.yml (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path(".lab/bundle"), help="default: %(default)s")
    parser.add_argument(
        "--keys",
        type=Path,
        default=Path(".lab/keys"),
        help="folder with signing.key, keyring.pgp and escrow.pem (default: %(default)s)",
    )
    parser.add_argument(
        "--passphrase-file",
        type=Path,
        help="file or pipe with the signing key's passphrase (default: ask once, if it has one)",
    )
    parser.add_argument(
        "--resolve-apt",
        action="store_true",
        help="if the mirror no longer has the locked versions, take those it has, and print the differences",
    )
    parser.add_argument(
        "--refresh", action="store_true", help="build again even if lock and tree did not change"
    )
    parser.add_argument(
        "--mirror",
        type=Path,
        help="folder with programs that no registry carries (default: the variable LLMKEEP_MIRROR)",
    )
    parser.set_defaults(run=_build)
    parser = verbs.add_parser(
        "verify", help="signature, serial, age, every byte; no network", description=__doc__
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--keyring",
        type=Path,
        default=Path("/etc/apt/keyrings/llmkeep.pgp"),
        help="the trusted keys; never take this file from the bundle itself (default: %(default)s)",
    )
    parser.add_argument(
        "--seen",
        type=Path,
        default=Path("/var/lib/llmkeep/serial"),
        help="file with the highest serial accepted so far (default: %(default)s)",
    )
    parser.set_defaults(run=_verify)
    parser = verbs.add_parser("list", help="the content that a bundle declares")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(run=_list)


def _build(arguments: argparse.Namespace) -> int:
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    from llmkeep.bundle.build import Keys, build  # rich and the resolvers: not for `verify`

    built = build(
        arguments.profile,
        arguments.out,
        Keys(arguments.keys),
        arguments.resolve_apt,
        arguments.refresh,
        arguments.mirror,
        arguments.passphrase_file,
    )
    keys.warn(arguments.keys)
    recipient = escrow.fingerprint(escrow.load(arguments.out / escrow.CERTIFICATE))
    print(
        f"{arguments.out}: serial {built.serial}, {len(built.files)} files, "
        f"{sum(entry.size for entry in built.files) / 1e6:.0f} MB, expires {built.expires}\n"
        f"compare before you run it:  sha256sum bootstrap  →  {cache.sha256(arguments.out / 'bootstrap')}\n"
        f"compare with the paper:  sha256 of the escrow certificate  →  {recipient}"
    )
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    if not arguments.keyring.is_file():
        raise LlmkeepError(f"there is no {arguments.keyring}: give the keyring that you trust with --keyring")
    seen = arguments.seen.read_text().strip() if arguments.seen.exists() else "0"
    if not seen.isdecimal():
        raise LlmkeepError(
            f"{arguments.seen} holds {seen[:40]!r}, which is no serial: write the highest serial that you accepted into it"
        )
    try:
        good = manifest.verify(arguments.folder, arguments.keyring, int(seen))
    except BundleRefused as refusal:
        print(f"llmkeep: refused: {refusal}", file=sys.stderr)
        return refusal.code
    print(
        f"{arguments.folder}: serial {good.serial}, {len(good.files)} files, all as signed by {good.signer}"
    )
    return 0


def _list(arguments: argparse.Namespace) -> int:
    found = manifest.read(arguments.folder)
    if arguments.json:
        print(json.dumps(asdict(found)))
        return 0
    for entry in found.files:
        print(f"{entry.size:>11}  {entry.path}  {entry.licence}  {entry.purl}")
    print(
        f"serial {found.serial}, profile {found.profile}, created {found.created}, expires {found.expires}, "
        f"signer {found.signer} (not checked here: `llmkeep bundle verify`)"
    )
    return 0
