"""`llmkeep bundle build | verify | list | provenance | compare | split | delta | join`: everything that crosses the air gap,
signed, in one directory.

A bundle, a release or a candidate can also be carried on several media (`split`), or as the difference from an older
one (`delta`). `join` puts the media together, in any order; for bundles, `bootstrap` does.

Exit codes of all but `build`: 0 done, 1 refused (`compare`: they differ), 3 unsigned, signed by an unknown key or as
something else, 4 damaged (a changed, missing or extra file, a wrong list), 5 an older serial than was accepted
before, 6 expired, 7 more media are needed, 8 a medium of another bundle, or a delta from a base that is not here.
`bootstrap` uses the same codes.

Exit codes of `build`: 0 good, 1 refused or failed, 3 a package source was not reached, 4 a source was refused (key, signature,
age or content), 5 a package was refused, such as a vendor's file that differs from the lock.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from llmkeep import escrow
from llmkeep.bundle import cache, compare, join, keys, manifest, media, provenance
from llmkeep.bundle.manifest import INCOMPLETE, BundleRefused
from llmkeep.errors import LlmkeepError
from llmkeep.places import Places


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """`llmkeep bundle build | verify | list | provenance | compare | split | delta | join`."""
    verbs = subparsers.add_parser(
        "bundle", help="build, verify and carry bundles across the air gap"
    ).add_subparsers(required=True)
    parser = verbs.add_parser("build", help="build and sign a bundle (needs the registries, or a warm cache)")
    parser.add_argument("--profile", default="lab", help="profile of artifacts.yml (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path(".lab/bundle"), help="default: %(default)s")
    keys.add_signing_options(parser)
    parser.add_argument(
        "--resolve-apt",
        action="store_true",
        help="if the mirror no longer has the locked versions, use its present ones, and print the differences",
    )
    parser.add_argument("--refresh", action="store_true", help="build even if lock and tree are unchanged")
    parser.add_argument(
        "--mirror",
        type=Path,
        help="folder with programs that no registry carries (default: the variable LLMKEEP_MIRROR)",
    )
    parser.set_defaults(run=_build)
    parser = verbs.add_parser(
        "verify",
        help="check signature, type, serial, age and every byte, without a network",
        description=__doc__,
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--keyring",
        type=Path,
        default=Places().bundle_keyring,
        help="the trusted keys; never take this file from the bundle itself (default: %(default)s)",
    )
    parser.add_argument(
        "--seen",
        type=Path,
        default=Places().bundle_serial,
        help="file with the highest serial accepted before (default: %(default)s)",
    )
    parser.add_argument(
        "--sha256",
        help="sha256 of a candidate's manifest, as printed by `model add`: verify a candidate, or one of its media, "
        "against it",
    )
    parser.set_defaults(run=_refusing(_verify))
    parser = verbs.add_parser("list", help="print print print print the content that a bundle declares")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(run=_list)
    parser = verbs.add_parser(
        "provenance",
        help="print print print print the signed statement of a bundle's sources (in-toto, SLSA)",
        description=__doc__,
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--keyring",
        type=Path,
        default=Places().bundle_keyring,
        help="the trusted keys (default: %(default)s)",
    )
    parser.set_defaults(run=_refusing(_provenance))
    parser = verbs.add_parser(
        "compare",
        help="print each difference in content between two bundles, such as builds of two teams",
        description=__doc__,
    )
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.set_defaults(run=_refusing(_compare))
    out = "folder for the media: OUT/1, OUT/2 …; files are hard links if it is on the same file system"
    units = (
        "capacity of a medium in bytes: 900G, 4.7GB (powers of 1000), 900GiB (of 1024). "
        "Leave 2 %% of a disk to its file system"
    )
    parser = verbs.add_parser(
        "split", help="split it over several media, each verifiable by itself", description=__doc__
    )
    parser.add_argument("folder", type=Path, help="bundle, release or candidate")
    parser.add_argument("--size", required=True, help=units)
    parser.add_argument("--out", type=Path, required=True, help=out)
    parser.set_defaults(run=_refusing(_split))
    parser = verbs.add_parser(
        "delta", help="write only the contents of a newer one that an older one lacks", description=__doc__
    )
    parser.add_argument("old", type=Path, help="the one in use at the destination; its manifest is enough")
    parser.add_argument("folder", type=Path, help="the newer one")
    parser.add_argument("--size", help=f"{units}; default: one medium")
    parser.add_argument("--out", type=Path, required=True, help=out)
    parser.set_defaults(run=_refusing(_split))
    parser = verbs.add_parser("join", help="put media together; run it once per medium", description=__doc__)
    parser.add_argument("folder", metavar="medium", type=Path)
    parser.add_argument(
        "--into",
        type=Path,
        required=True,
        help="destination, which destination, which destination, which destination, which appears when it is complete",
    )
    parser.add_argument(
        "--base",
        type=Path,
        action="append",
        default=[],
        help="base of a delta, in addition to the bundles and releases on this host; may be repeated",
    )
    parser.set_defaults(run=_refusing(_join))


def _refusing(verb: Callable[[argparse.Namespace], None]) -> Callable[[argparse.Namespace], int]:
    """Turn a refusal into its exit code."""

    def run(arguments: argparse.Namespace) -> int:
        try:
            verb(arguments)
        except BundleRefused as refusal:
            waits = "" if refusal.code == INCOMPLETE else "refused: "
            print(f"llmkeep: {waits}{refusal}", file=sys.stderr)
            return refusal.code
        return 0

    return run


def _split(arguments: argparse.Namespace) -> None:
    room = None if arguments.size is None else media.size(arguments.size)
    print("\n".join(media.split(arguments.folder, arguments.out, room, getattr(arguments, "old", None))))
    print(
        "copy the content of each folder to the top of a medium; `llmkeep bundle verify MEDIUM` checks it there"
    )


def _join(arguments: argparse.Namespace) -> None:
    print(join.join(arguments.folder, arguments.into, [*arguments.base, *join.here(Places())]))


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
        f"compare before you run it:  →  {cache.sha256(arguments.out / 'bootstrap')}\n"
        f"compare with the paper:  sha256 of the escrow certificate  →  {recipient}"
    )
    return 0


def _verify(arguments: argparse.Namespace) -> None:
    if arguments.sha256:
        print(media.verify_candidate(arguments.folder, arguments.sha256))
        return
    if not arguments.keyring.is_file():
        raise LlmkeepError(f"there is no {arguments.keyring}: give the keyring that you trust with --keyring")
    highest = manifest.highest_serial(arguments.seen)
    print(media.verify(arguments.folder, arguments.keyring, manifest.BUNDLE, highest))


def _provenance(arguments: argparse.Namespace) -> None:
    print(json.dumps(provenance.verified(arguments.folder, arguments.keyring), indent=1))


def _compare(arguments: argparse.Namespace) -> None:
    differences = list(compare.differences(arguments.first, arguments.second))
    if differences:
        raise LlmkeepError(
            f"their content differs in {len(differences)} places:\n  {'\n  '.join(differences)}"
        )
    serials = [manifest.read(folder).serial for folder in (arguments.first, arguments.second)]
    print(
        f"equal content: each byte but keys, signatures and dates; serials {serials[0]} and {serials[1]}\n"
        "the signatures were not checked: `llmkeep bundle verify` does, each with its team's keyring"
    )


def _list(arguments: argparse.Namespace) -> int:
    content = manifest.read(arguments.folder)
    if arguments.json:
        print(json.dumps(asdict(content)))
        return 0
    for entry in content.files:
        print(f"{entry.size:>11}  {entry.path}  {entry.licence}  {entry.purl}")
    print(
        f"serial {content.serial}, profile {content.profile}, created {content.created}, expires {content.expires}, "
        f"signer {content.signer} (not checked here: `llmkeep bundle verify`)"
    )
    return 0
