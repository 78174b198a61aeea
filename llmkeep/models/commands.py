"""`llmkeep model add SOURCE`: fetch an external model as a candidate for `llmkeep release sign`.

SOURCE is hub:OWNER/REPO@COMMIT (HF_ENDPOINT, HF_TOKEN, proxies and SSL_CERT_FILE of the environment apply), a
directory, or a GGUF file. Only safetensors, their index, tokenizer, chat template, configuration, card and licence
are accepted; skipped files are printed. Code from a repository is never accepted, and pickles are never opened. An
interrupted run continues when it is run again.

Exit codes: 0 done; 1 the model cannot be accepted (pickles, links, a custom class, a name); 2 wrong usage; 3 the hub
refuses or does not answer; 4 damaged or contradictory files, or files that the maker did not sign; 5 the licence is
not accepted; 6 not enough space; 130 interrupted.
"""

import argparse
import datetime
import getpass
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from llmkeep import durable, passphrase
from llmkeep.bundle import gguf
from llmkeep.bundle.cache import sha256
from llmkeep.errors import LlmkeepError, printable
from llmkeep.models import intake, licence, signature
from llmkeep.models.folder import Folder
from llmkeep.models.hub import Hub
from llmkeep.models.licence import Licence
from llmkeep.models.refusal import DAMAGED, LICENCE, UNFIT, ModelRefused
from llmkeep.models.signature import Signature


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """`llmkeep model add | sign`."""
    verbs = subparsers.add_parser("model", help="import and sign external models").add_subparsers(
        required=True, metavar="VERB"
    )
    parser = verbs.add_parser(
        "add",
        help="fetch a model from a hub, a directory or a GGUF file",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("--into", type=Path, required=True, help="a folder that does not exist yet")
    parser.add_argument("--name", help="name of the model in the estate (default: that of the source)")
    parser.add_argument("--licence-file", type=Path, help="text of the licence, if the source has none")
    parser.add_argument(
        "--accept-licence",
        metavar="NAME",
        help="accept the licence with this name (default: ask on the terminal)",
    )
    parser.add_argument(
        "--maker-key",
        type=Path,
        metavar="PEM",
        help="public key of the model's maker; requires their signature by OpenSSF's model signing",
    )
    parser.add_argument(
        "--signature", type=Path, help=f"the maker's signature; default: {signature.NAME} in a directory"
    )
    parser.set_defaults(run=_add)
    parser = verbs.add_parser(
        "sign", help="sign a model's files for its recipients with OpenSSF's model signing"
    )
    parser.add_argument(
        "folder", type=Path, help="the model's folder; in a candidate or release, models/NAME"
    )
    parser.add_argument(
        "--key", type=Path, required=True, metavar="PEM", help="your private key, on a NIST curve"
    )
    parser.add_argument(
        "--passphrase-file", type=Path, help="file or pipe with the key's passphrase (default: ask once)"
    )
    parser.add_argument(
        "--signature", type=Path, required=True, help="file for the signature, outside the folder"
    )
    parser.set_defaults(run=_sign)


def _sign(arguments: argparse.Namespace) -> int:
    try:
        if not arguments.folder.is_dir() or arguments.signature.resolve().is_relative_to(
            arguments.folder.resolve()
        ):
            raise ModelRefused(
                UNFIT,
                f"{arguments.folder} must be a model's folder, and {arguments.signature} must be outside it",
            )
        encrypted = arguments.key.is_file() and b"ENCRYPTED" in arguments.key.read_bytes()
        word = passphrase.existing(arguments.passphrase_file, str(arguments.key)) if encrypted else None
        durable.write(
            arguments.signature,
            signature.make(arguments.folder, signature.private(arguments.key, word)),
            0o644,
        )
    except ModelRefused as refusal:
        print(f"llmkeep: refused: {refusal}", file=sys.stderr)
        return refusal.code
    print(
        f"{arguments.signature}: signature of {arguments.folder} written; pass it and the public key on with the model"
    )
    return 0


def _add(arguments: argparse.Namespace) -> int:
    try:
        if arguments.source.endswith(".gguf"):
            made = _add_gguf(Path(arguments.source), arguments)
        elif arguments.source.startswith("hub:"):
            made = _add_source(Hub(arguments.source), arguments)
        else:
            if not Path(arguments.source).is_dir():
                raise ModelRefused(
                    UNFIT,
                    f"{arguments.source[:120]!r} is not a directory, a GGUF file or hub:OWNER/REPO@COMMIT: give "
                    "one of these",
                )
            made = _add_source(Folder(Path(arguments.source)), arguments)
    except ModelRefused as refusal:
        print(f"llmkeep: refused: {printable(arguments.source)}: {refusal}", file=sys.stderr)
        return refusal.code
    for kind, names in (("left out", made.left_out), ("accepted without its auto_map", made.changed)):
        if names:
            print(f"{kind}: {', '.join(map(printable, names))}")
    print(
        f"{arguments.into}: model {made.name}, {made.files} files, {made.size / 1e6:.1f} MB, licence {printable(made.licence)}\n"
        f"sign it on the control node; write down this command with its digest:\n"
        f"  llmkeep release sign {arguments.into} --sha256 {made.digest}"
    )
    return 0


def _add_source(
    source: Hub | Folder, arguments: argparse.Namespace, stated: str | None = None
) -> intake.Taken:
    def accept(terms: Licence, text: str) -> dict[str, Any]:
        return _accepted(terms, text, arguments.accept_licence)

    return intake.add(
        source, arguments.into, arguments.name, accept, arguments.licence_file, stated, _signed(arguments)
    )


def _signed(arguments: argparse.Namespace) -> Signature | None:
    """The signature of the model's maker, if the operator requires it."""
    if not arguments.maker_key:
        if arguments.signature:
            raise ModelRefused(
                UNFIT, f"{arguments.signature} cannot be verified without its maker's key: give --maker-key"
            )
        return None
    if arguments.source.endswith(".gguf"):
        raise ModelRefused(
            UNFIT, "a GGUF file is converted, so its maker did not sign the result: omit --maker-key"
        )
    return signature.read(arguments.signature or Path(arguments.source, signature.NAME), arguments.maker_key)


def _add_gguf(file: Path, arguments: argparse.Namespace) -> intake.Taken:
    """Convert a GGUF file beside INTO, then import the result."""
    if not file.is_file():
        raise ModelRefused(UNFIT, f"there is no file {file}: give the path of a GGUF file")
    try:
        stated, size = gguf.outline(file)
    except gguf.Unreadable as error:
        raise ModelRefused(DAMAGED, str(error)) from error
    place = arguments.into.absolute().with_name(f".{arguments.into.name}.gguf")
    intake.check_space(place, 2 * size)  # the conversion, and the copy of it
    shutil.rmtree(place, ignore_errors=True)  # of an interrupted run
    try:
        with durable.own(place):
            gguf.convert(file, place / file.stem)
            source = Folder(place / file.stem, f"GGUF file {file.name}, sha256 {sha256(file)}")
            return _add_source(source, arguments, stated)
    except LlmkeepError as error:
        raise error if isinstance(error, ModelRefused) else ModelRefused(UNFIT, str(error)) from error
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _accepted(terms: Licence, text: str, name: str | None) -> dict[str, Any]:
    """The record of this user's acceptance, given as an option or typed on a terminal."""
    if name is None:
        print(
            f"{printable(text)}\nlicence {printable(terms.name)}: {terms.file}, sha256 {terms.sha256}",
            flush=True,
        )
        if not sys.stdin.isatty():
            raise ModelRefused(
                LICENCE,
                f"its licence is {printable(terms.name)!r} ({terms.file}, above), which is not accepted: read it, and run this "
                f"again with --accept-licence '{printable(terms.name)}'",
            )
        try:
            name = input("To accept it, type its name: ")
        except EOFError:
            name = ""
    person = os.environ.get("SUDO_USER") or getpass.getuser()
    moment = datetime.datetime.now(datetime.UTC).replace(microsecond=0).isoformat()
    return licence.accepted(terms, name, person, moment)
