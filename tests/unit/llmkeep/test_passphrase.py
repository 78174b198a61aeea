"""A passphrase comes from a terminal or from a file that only its owner can read, and a new one is not short."""

import os
from pathlib import Path

import pytest

from llmkeep import passphrase
from llmkeep.passphrase import PassphraseError

GOOD = "six words that are hard to guess"


def written(folder: Path, content: bytes, mode: int = 0o600) -> Path:
    file = folder / "passphrase"
    file.write_bytes(content)
    file.chmod(mode)
    return file


def test_takes_a_line_from_a_file_without_its_newline(tmp_path: Path) -> None:
    assert passphrase.read(written(tmp_path, GOOD.encode() + b"\n")) == GOOD


def test_takes_a_line_from_a_pipe() -> None:
    reader, writer = os.pipe()
    os.write(writer, GOOD.encode())
    os.close(writer)
    assert passphrase.read(Path(f"/dev/fd/{reader}")) == GOOD
    os.close(reader)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_refuses_a_file_that_others_can_open(tmp_path: Path, mode: int) -> None:
    with pytest.raises(PassphraseError, match=f"mode {mode:04o} .* readable only by you:"):
        passphrase.read(written(tmp_path, GOOD.encode(), mode))


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file to another user")
def test_refuses_a_file_of_another_user(tmp_path: Path) -> None:
    os.chown(file := written(tmp_path, GOOD.encode()), 4711, -1)
    with pytest.raises(PassphraseError, match="belongs to user 4711"):
        passphrase.read(file)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "is empty"),
        (b"\n", "is empty"),
        (b"two\nlines\n", "more than a line of text"),
        (b"a\0b", "more than a line of text"),
        (b"\xff\xfe", "more than a line of text"),
        (b"x" * 2000, "more than a line of text"),
    ],
)
def test_refuses_a_file_that_holds_no_passphrase(tmp_path: Path, content: bytes, told: str) -> None:
    with pytest.raises(PassphraseError, match=told):
        passphrase.read(written(tmp_path, content))


def test_names_a_file_that_is_not_there_or_is_a_folder(tmp_path: Path) -> None:
    with pytest.raises(PassphraseError, match="No such file"):
        passphrase.read(tmp_path / "none")
    with pytest.raises(PassphraseError, match="Is a directory"):
        passphrase.read(tmp_path)


@pytest.mark.parametrize(
    ("weak", "told"), [("elevenchars", "has 11 characters"), ("abababababababab", "2 of them different")]
)
def test_a_new_passphrase_is_neither_short_nor_one_letter_again_and_again(
    tmp_path: Path, weak: str, told: str
) -> None:
    file = written(tmp_path, weak.encode())
    with pytest.raises(PassphraseError, match=f"{told}.* at least 12"):
        passphrase.chosen(file, "a key")
    assert passphrase.existing(file, "a key") == weak  # an existing key may have it
