"""The builder's signing key has a passphrase, which no other process sees; the escrow key never comes to the builder."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sealing_double
import terminal

from llmkeep import cli
from llmkeep.bundle import build, keys, release, signing
from llmkeep.errors import LlmkeepError
from llmkeep.passphrase import PassphraseError
from llmkeep.places import Places

LLMKEEP = str(Path(sys.executable).with_name("llmkeep"))
WORD, OTHER = "six words that are hard to guess", "another six words, as hard to guess"


def written(folder: Path, name: str, word: str) -> Path:
    file = folder / name
    file.write_text(word + "\n")
    file.chmod(0o600)
    return file


@pytest.fixture(scope="module")
def escrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The certificate of an escrow key."""
    folder = tmp_path_factory.mktemp("escrow")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:3072", "-noenc", "-subj", "/CN=escrow", "-keyout",
         folder / "escrow.key", "-out", folder / "escrow.pem"],
        check=True, capture_output=True,
    )  # fmt: skip
    return folder / "escrow.pem"


@pytest.fixture
def made(tmp_path: Path, escrow: Path) -> Path:
    """Keys as `llmkeep keys init` makes them, with the passphrase WORD."""
    word = written(tmp_path, "word", WORD)
    argv = ["keys", "init", str(tmp_path / "keys"), "--escrow", str(escrow), "--passphrase-file", str(word)]
    assert cli.main(argv) == 0
    return tmp_path / "keys"


def opens(folder: Path, file: Path) -> bool:
    """Whether the signing key signs with this passphrase, and `sqv` accepts it."""
    (text := folder.parent / "text").write_bytes(b"text")
    try:
        with signing.unlocked(folder / "signing.key", file) as key:
            signing.sign(key, text, folder.parent / "signature")
    except PassphraseError:
        return False
    signature = folder.parent / "signature"
    signing.verify(folder / "keyring.pgp", text, b"text", signature.read_bytes())
    signature.unlink()
    return True


def test_the_terminal_is_asked_twice_for_a_new_passphrase_and_shows_neither(
    tmp_path: Path, escrow: Path
) -> None:
    argv = [LLMKEEP, "keys", "init", "keys", "--escrow", str(escrow)]
    code, screen = terminal.run(argv, [WORD, OTHER], tmp_path)
    assert (code, (tmp_path / "keys/keyring.pgp").exists()) == (9, False), screen
    assert "the two passphrases differ" in screen
    code, screen = terminal.run(argv, [""], tmp_path)
    assert code == 9
    assert "the passphrase was empty" in screen
    code, screen = terminal.run(argv, [WORD, WORD], tmp_path)
    assert code == 0, screen
    assert WORD not in screen
    assert opens(tmp_path / "keys", written(tmp_path, "word", WORD))


def test_without_a_terminal_and_a_file_no_key_is_made(tmp_path: Path, escrow: Path) -> None:
    argv = [LLMKEEP, "keys", "init", str(tmp_path / "keys"), "--escrow", str(escrow)]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, start_new_session=True, capture_output=True, text=True,
                          check=False)  # fmt: skip
    assert done.returncode == 9
    assert "no terminal to ask" in done.stderr
    assert not (tmp_path / "keys").exists()


def test_the_key_is_in_no_file_but_encrypted_and_the_passphrase_in_no_argument_or_variable(
    tmp_path: Path, escrow: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    real = subprocess.run

    def run(argv: list[str], **more: Any) -> Any:
        seen.append(f"{argv} {more.get('env')} {dict(os.environ)}")
        return real(argv, **more)

    monkeypatch.setattr(subprocess, "run", run)
    word, other = written(tmp_path, "word", WORD), written(tmp_path, "other", OTHER)
    keys.init(tmp_path / "keys", escrow, word, False)
    keys.change_passphrase(tmp_path / "keys", word, other)
    assert opens(tmp_path / "keys", other)
    assert len(seen) > 5
    assert not [words for words in seen if WORD in words or OTHER in words]
    assert signing.has_passphrase(tmp_path / "keys/signing.key")
    assert sorted(path.name for path in (tmp_path / "keys").iterdir()) == [
        "escrow.pem", "keyring.pgp", "revocation.pgp", "signing.key",
    ]  # fmt: skip


def test_a_wrong_passphrase_signs_nothing_and_has_an_exit_code_of_its_own(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong, new = written(tmp_path, "wrong", "not the passphrase"), written(tmp_path, "new", OTHER)
    assert not opens(made, wrong)
    before = (made / "signing.key").read_bytes()
    files = ["--passphrase-file", str(wrong), "--new-passphrase-file", str(new)]
    assert cli.main(["keys", "passphrase", str(made), *files]) == 9
    said = capsys.readouterr().err
    assert f"the passphrase does not open {made}/signing.key" in said
    assert "<unknown>" not in said
    assert (made / "signing.key").read_bytes() == before


def test_a_build_asks_before_it_downloads(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "_programs", lambda *_: {})
    monkeypatch.setattr(build, "_fetch", lambda *_: pytest.fail("it downloads"))
    wrong = written(tmp_path, "wrong", "not the passphrase")
    with pytest.raises(PassphraseError, match="nothing was signed"):
        build.build("lab", tmp_path / "out", build.Keys(made), False, False, None, wrong)
    assert not list(tmp_path.glob("*out*"))


def test_an_existing_key_without_a_passphrase_gets_one(
    tmp_path: Path, escrow: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "keys"
    assert cli.main(["keys", "init", str(folder), "--escrow", str(escrow), "--without-passphrase"]) == 0
    assert "only for disposable labs" in capsys.readouterr().err
    shutil.copy(escrow.with_name("escrow.key"), folder / "escrow.key")
    keys.warn(folder)
    said = capsys.readouterr().err
    assert f"`llmkeep keys passphrase {folder}`" in said
    assert "move the escrow key to a machine that stays offline" in said
    signer = signing.fingerprint(folder / "keyring.pgp")
    new = written(tmp_path, "new", WORD)
    assert cli.main(["keys", "passphrase", str(folder), "--new-passphrase-file", str(new)]) == 0
    assert opens(folder, new)
    assert not opens(folder, written(tmp_path, "wrong", OTHER))
    assert signing.fingerprint(folder / "signing.key") == signer


@pytest.mark.parametrize("cut", ["sync", "rename"])
def test_a_change_that_is_cut_short_leaves_the_old_passphrase(
    made: Path, tmp_path: Path, cut: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    word, new = tmp_path / "word", written(tmp_path, "new", OTHER)
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync" if cut == "sync" else "pathlib.Path.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            keys.change_passphrase(made, word, new)
    assert opens(made, word)
    keys.change_passphrase(made, word, new)
    assert (opens(made, word), opens(made, new)) == (False, True)
    assert not list(made.glob(".signing*"))


def test_the_builder_takes_the_escrow_certificate_and_keeps_it(
    made: Path, tmp_path: Path, escrow: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not (made / "escrow.key").exists()
    assert cli.main(["keys", "init", str(made)]) == 0  # again, and it asks for nothing
    (tmp_path / "second").mkdir()
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:3072", "-noenc", "-subj", "/CN=other", "-keyout", "other.key",
         "-out", "other.pem"], cwd=tmp_path, check=True, capture_output=True,
    )  # fmt: skip
    capsys.readouterr()
    assert cli.main(["keys", "init", str(made), "--escrow", str(tmp_path / "other.pem")]) == 1
    assert "nothing was changed" in capsys.readouterr().err
    assert (
        cli.main(["keys", "init", str(tmp_path / "new"), "--escrow", str(escrow.with_name("escrow.key"))])
        == 1
    )
    assert "delete it here" in capsys.readouterr().err
    assert cli.main(["keys", "init", str(tmp_path / "new")]) == 1
    assert "`llmkeep keys escrow` on a machine that stays offline" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_file_that_is_no_private_key_is_named(made: Path) -> None:
    shutil.copy(made / "keyring.pgp", made / "signing.key")
    with (
        pytest.raises(LlmkeepError, match=r"signing\.key is not a private OpenPGP key"),
        signing.unlocked(made / "signing.key", None),
    ):
        pass


def test_a_release_is_signed_with_a_passphrase_which_can_be_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sealing_double.use(monkeypatch, release, release)
    places = Places(tmp_path / "root")
    word, new = written(tmp_path, "word", WORD), written(tmp_path, "new", OTHER)
    monkeypatch.setattr(release, "Places", lambda: places)
    assert cli.main(["release", "init", "--passphrase-file", str(word)]) == 0
    assert cli.main(["release", "init"]) == 0  # again, and it asks for nothing
    assert (
        b"BEGIN PGP PRIVATE KEY" in places.publish_key.read_bytes()
    )  # sealed by the double, which only marks it
    files = ["--passphrase-file", str(word), "--new-passphrase-file", str(new)]
    assert cli.main(["release", "passphrase", *files]) == 0
    with (
        pytest.raises(PassphraseError, match="does not open the publish key"),
        release.unlocked(places, word),
    ):
        pass
    with release.unlocked(places, new) as key:
        assert not signing.has_passphrase(key)
        assert signing.fingerprint(key) == release.fingerprint(places)


def test_a_publish_key_of_an_earlier_llmkeep_is_used_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sealing_double.use(monkeypatch, release, release)
    release.init(places := Places(tmp_path / "root"), None)
    with release.unlocked(places, None):
        assert "`llmkeep release passphrase` gives it one" in capsys.readouterr().err
    release.change_passphrase(places, None, word := written(tmp_path, "word", WORD))
    capsys.readouterr()
    with release.unlocked(places, word):
        assert not capsys.readouterr().err
