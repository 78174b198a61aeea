"""`llmkeep model add SOURCE`: fetch a model from outside, as a candidate for `llmkeep release sign`.

SOURCE is hub:OWNER/REPO@COMMIT (HF_ENDPOINT, HF_TOKEN, proxies and SSL_CERT_FILE of the environment apply), a directory, or a
GGUF file. Taken are safetensors, their index, tokenizer, chat template, configuration, card and licence; what is left out is
printed. Code of a repository is never taken, and a pickle never opened. An interrupted run continues when it is run again.

Exit codes: 0 done; 1 no model that can be taken (pickles, links, a class of its own, a name); 2 wrong usage; 3 the hub refuses or
does not answer; 4 damaged or contradictory files,
or others than the maker signed; 5 the licence is not accepted; 6 not enough space; 130 interrupted.
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
    verbs = subparsers.add_parser("model", help="models from outside").add_subparsers(
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
    parser.add_argument("--name", help="name of the model in the estate; default: that of the source")
    parser.add_argument("--licence-file", type=Path, help="text of the licence, where the source has none")
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
        "--signature", type=Path, help=f"that signature; default: {signature.NAME} in a directory"
    )
    parser.set_defaults(run=_add)
    parser = verbs.add_parser(
        "sign", help="sign a model's files by OpenSSF's model signing, for its recipients"
    )
    parser.add_argument("folder", type=Path, help="its folder: of a candidate or release, models/NAME")
    parser.add_argument(
        "--key", type=Path, required=True, metavar="PEM", help="your private key, on a NIST curve"
    )
    parser.add_argument(
        "--passphrase-file", type=Path, help="file or pipe with the key's passphrase (default: ask once)"
    )
    parser.add_argument(
        "--signature", type=Path, required=True, help="file for the signature, outside of the folder"
    )
    parser.set_defaults(run=_sign)


def _sign(arguments: argparse.Namespace) -> int:
    try:
        if not arguments.folder.is_dir() or arguments.signature.resolve().is_relative_to(
            arguments.folder.resolve()
        ):
            raise ModelRefused(
                UNFIT,
                f"{arguments.folder} has to be a model's folder, and {arguments.signature} outside of it",
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
        f"{arguments.signature}: the signature of {arguments.folder}; give it and the public key with the model"
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
                    f"{arguments.source[:120]!r} is no directory, no GGUF file and no hub:OWNER/REPO@COMMIT: give one",
                )
            made = _add_source(Folder(Path(arguments.source)), arguments)
    except ModelRefused as refusal:
        print(f"llmkeep: refused: {printable(arguments.source)}: {refusal}", file=sys.stderr)
        return refusal.code
    for kind, names in (("left out", made.left_out), ("taken without its auto_map", made.changed)):
        if names:
            print(f"{kind}: {', '.join(map(printable, names))}")
    print(
        f"{arguments.into}: model {made.name}, {made.files} files, {made.size / 1e6:.1f} MB, licence {printable(made.licence)}\n"
        f"sign it on the control node; write down what it shall have:\n"
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
    """The signature of the model's maker, where the operator demands it."""
    if not arguments.maker_key:
        if arguments.signature:
            raise ModelRefused(
                UNFIT, f"{arguments.signature} proves nothing without its maker's key: give --maker-key"
            )
        return None
    if arguments.source.endswith(".gguf"):
        raise ModelRefused(
            UNFIT, "a GGUF file is converted, so no maker signed what is made of it: leave --maker-key away"
        )
    return signature.read(arguments.signature or Path(arguments.source, signature.NAME), arguments.maker_key)


def _add_gguf(file: Path, arguments: argparse.Namespace) -> intake.Taken:
    """Convert beside INTO, then take the result in."""
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
    """The record of an acceptance by this user: as given, or as typed on a terminal."""
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
