"""`llmkeep keys init | passphrase | escrow`: the builder's signing key, and the escrow key from an offline machine.

A passphrase is asked for on the terminal, or read from --passphrase-file: a file that only its owner can read, or a pipe.

Exit codes: 0 done; 1 refused, with the reason; 9 the passphrase is wrong, weak or unavailable. The former state is
kept then.

"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from cryptography.hazmat.primitives import serialization

from llmkeep import escrow, passphrase
from llmkeep.bundle import signing
from llmkeep.bundle.token_key import Token
from llmkeep.durable import write
from llmkeep.errors import LlmkeepError


def init(
    folder: Path,
    certificate: Path | None,
    passphrase_file: Path | None,
    without: bool,
    token: Token | None = None,
) -> str:
    """Generate the signing key if there is none, and put the escrow certificate beside it. Idempotent."""
    standing = folder / escrow.CERTIFICATE
    if certificate is None and not standing.exists():
        raise LlmkeepError(
            "an estate needs an escrow key, and this machine may have only its certificate: make it with `llmkeep keys "
            f"escrow` on a machine that stays offline, and give its {escrow.CERTIFICATE} with --escrow"
        )
    recipient = escrow.load(certificate or standing)
    mark = escrow.fingerprint(recipient)
    if standing.exists() and (current := escrow.fingerprint(escrow.load(standing))) != mark:
        raise LlmkeepError(
            f"{standing} has sha256 {current}, but {certificate} has {mark}: this estate encrypts to the former, and "
            "nothing was changed. To replace it, see docs/operate/keys.md"
        )
    if not (folder / signing.CERTIFICATE).exists():
        if token:
            signing.init_in_token(
                folder, token, passphrase.existing(passphrase_file, f"the token {token.token} (its PIN)")
            )
        else:
            signing.init(folder, passphrase.of_new_key(str(folder / signing.KEY), passphrase_file, without))
    if not standing.exists():
        write(standing, recipient.public_bytes(serialization.Encoding.PEM), 0o644)
    warn(folder)
    signer = signing.fingerprint(folder / signing.CERTIFICATE)
    return (
        f"{folder}: bundles are signed by {signer}\n"
        f"sha256 of the escrow certificate, to compare with your written copy: {mark}"
    )


def warn(folder: Path) -> None:
    """Print warnings about keys that an earlier llmkeep or a lab made."""
    if (folder / signing.KEY).exists() and not signing.has_passphrase(folder / signing.KEY):
        print(
            f"llmkeep: {folder / signing.KEY} is {passphrase.WITHOUT}: `llmkeep keys passphrase {folder}` gives it one",
            file=sys.stderr,
        )
    if (folder / escrow.KEY).exists():
        print(
            f"llmkeep: {folder / escrow.KEY} is beside the signing key: move the escrow key to a machine that stays offline",
            file=sys.stderr,
        )


def change_passphrase(folder: Path, old: Path | None, new: Path | None) -> str:
    """Set or change the signing key's passphrase. The old file stays complete until the new one is on disk."""
    key = signing.key_file(folder)
    if key.name == signing.PKCS11:
        raise LlmkeepError(
            f"{key}: the signing key is in a token: change the token's PIN with the HSM's own tool"
        )
    with signing.unlocked(key, old) as opened:
        secret = signing.with_passphrase(opened, passphrase.chosen(new, str(key)))
    write(key, secret, 0o600)
    return f"{key} has a new passphrase; copies of the file have the old one, so replace or destroy them"


def create_escrow(folder: Path, passphrase_file: Path | None, without: bool) -> str:
    """Generate the escrow key and its certificate; returns a message with the fingerprint to write down."""
    made = escrow.create(folder, passphrase.of_new_key(str(folder / escrow.KEY), passphrase_file, without))
    return (
        f"{folder / escrow.KEY}: keep it offline, with a copy at another site\n"
        f"{folder / escrow.CERTIFICATE}: carry only this file to the builder; it expires at "
        f"{made.not_valid_after_utc:%Y-%m-%d}\n"
        f"write down the sha256 of the certificate: {escrow.fingerprint(made)}"
    )


def add_signing_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for the keys that sign a bundle and its image."""
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


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """`llmkeep keys init | passphrase | escrow`."""
    verbs = subparsers.add_parser(
        "keys", help="the signing key and the escrow key", description=__doc__
    ).add_subparsers(required=True, metavar="VERB")
    parser = verbs.add_parser("init", help="builder: make the signing key", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--escrow", type=Path, help="certificate of the escrow key, from the machine that has it"
    )
    passphrase.add_options(parser)
    parser.add_argument(
        "--module",
        help="path of a PKCS#11 module: the key is made in its token, and the passphrase is the PIN",
    )
    parser.add_argument("--token", help="label of a token that holds no other key")
    parser.add_argument("--label", default="llmkeep bundle", help="the key's label (default: %(default)s)")
    parser.add_argument("--user", default="", help="account that may use the module (default: this one)")
    parser.set_defaults(
        run=_as_command(
            lambda arguments: init(
                arguments.folder,
                arguments.escrow,
                arguments.passphrase_file,
                arguments.without_passphrase,
                _token(arguments),
            )
        )
    )
    parser = verbs.add_parser(
        "passphrase", help="builder: set or change the signing key's passphrase", description=__doc__
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--passphrase-file", type=Path, help="the present one (default: ask, if there is one)"
    )
    parser.add_argument("--new-passphrase-file", type=Path, help="the new one (default: ask twice)")
    parser.set_defaults(
        run=_as_command(
            lambda arguments: change_passphrase(
                arguments.folder, arguments.passphrase_file, arguments.new_passphrase_file
            )
        )
    )
    parser = verbs.add_parser("escrow", help="offline machine: make the escrow key", description=__doc__)
    parser.add_argument("folder", type=Path)
    passphrase.add_options(parser)
    parser.set_defaults(
        run=_as_command(
            lambda arguments: create_escrow(
                arguments.folder, arguments.passphrase_file, arguments.without_passphrase
            )
        )
    )


def _token(arguments: argparse.Namespace) -> Token | None:
    if bool(arguments.module) != bool(arguments.token) or (arguments.module and arguments.without_passphrase):
        raise LlmkeepError(
            "--module and --token belong together, and a token always has a PIN: give both, or neither"
        )
    return (
        Token(arguments.module, arguments.token, arguments.label, arguments.user)
        if arguments.module
        else None
    )


def _as_command(verb: Callable[[argparse.Namespace], str]) -> Callable[[argparse.Namespace], int]:
    def run(arguments: argparse.Namespace) -> int:
        print(verb(arguments))
        return 0

    return run
