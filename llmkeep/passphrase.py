"""Passphrases of private keys: asked for on the terminal, or read from a file that only its owner can read.

They are never in arguments or in the environment. A new passphrase has at least 12 characters, 6 of them different:
with the key derivations in use (OpenPGP's iterated SHA-256, scrypt for the escrow key), an attacker must try each
candidate.
"""

import argparse
import getpass
import os
import stat
import sys
from pathlib import Path

from llmkeep.errors import LlmkeepError

LENGTH, DIFFERENT = 12, 6  # characters of a new passphrase
LIMIT = 1024  # bytes of a file that holds one
WITHOUT = "without a passphrase, so a copy of the file is enough to use the key: only for disposable labs"


class PassphraseError(LlmkeepError):
    """A passphrase is wrong, too weak or unavailable."""

    code = 9


def read(file: Path) -> str:
    """The passphrase in FILE, which may be a pipe (/dev/fd/3), without the newline at its end.

    Raises PassphraseError for a file that others can read, and for one that holds anything but one line.
    """
    try:
        opened = file.open("rb")
    except OSError as error:
        raise PassphraseError(f"{file}: {error.strerror}: give the file that holds the passphrase") from error
    with opened:
        status = os.fstat(opened.fileno())
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISFIFO(status.st_mode):
            raise PassphraseError(
                f"{file} is neither a file nor a pipe: give the file that holds the passphrase"
            )
        if status.st_mode & 0o077 or status.st_uid not in (0, os.geteuid()):
            raise PassphraseError(
                f"{file} has mode {stat.S_IMODE(status.st_mode):04o} and belongs to user {status.st_uid}: a passphrase file "
                "must be readable only by you: `chmod 600` it, and choose another passphrase if others could read it"
            )
        content = opened.read(LIMIT + 1)
    try:
        text = content.decode().removesuffix("\n")
    except UnicodeDecodeError:
        text = "\0"
    if len(content) > LIMIT or not text.isprintable():
        raise PassphraseError(
            f"{file} holds more than a line of text: write the passphrase into it, and nothing else"
        )
    if not text:
        raise PassphraseError(f"{file} is empty: write the passphrase into it")
    return text


def existing(file: Path | None, key: str) -> str:
    """The passphrase of an existing KEY: read from FILE, else prompted for once."""
    return read(file) if file else _asked(f"Passphrase of {key}: ")


def chosen(file: Path | None, key: str) -> str:
    """A new passphrase for KEY: read from FILE, else prompted for twice. Raises PassphraseError for a weak one."""
    text = read(file) if file else _asked(f"New passphrase of {key}: ")
    if len(text) < LENGTH or len(set(text)) < DIFFERENT:
        raise PassphraseError(
            f"the new passphrase has {len(text)} characters, {len(set(text))} of them different: it needs at least "
            f"{LENGTH}, {DIFFERENT} of them different; six random words are strong and easy to type"
        )
    if not file and _asked("Repeat it: ") != text:
        raise PassphraseError("the two passphrases differ, so nothing was changed: run it again")
    return text


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for the passphrase of a key that a verb generates; `of_new_key` takes both values."""
    either = parser.add_mutually_exclusive_group()
    either.add_argument(
        "--passphrase-file", type=Path, help="file or pipe with the passphrase (default: ask twice)"
    )
    either.add_argument(
        "--without-passphrase", action="store_true", help="for a disposable lab: do not protect the key"
    )


def of_new_key(key: str, file: Path | None, without: bool) -> str | None:
    """The passphrase chosen for KEY, or None if it is explicitly made without one, which is printed as a warning."""
    if without:
        print(f"llmkeep: {key} is {WITHOUT}", file=sys.stderr)
        return None
    return chosen(file, key)


def _asked(question: str) -> str:
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError as error:
        raise PassphraseError(
            "there is no terminal to ask for a passphrase: give a file or a pipe with --passphrase-file"
        ) from error
    text = getpass.getpass(question)
    if not text:
        raise PassphraseError("the passphrase was empty: run it again, and enter one")
    return text
