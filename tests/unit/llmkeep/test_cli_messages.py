"""Messages of `llmkeep` for bad input: what is wrong, the value seen, the way out; never a traceback."""

import errno
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import small_bundle

from llmkeep import cli


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A signed bundle; its keyring is in it."""
    keys = small_bundle.signing_keys(tmp_path_factory.mktemp("keys"))
    return small_bundle.write(tmp_path_factory.mktemp("bundle"), keys)


def verified(bundle: Path, keyring: Path, seen: Path) -> int:
    """Exit code of `llmkeep bundle verify`."""
    return cli.main(["bundle", "verify", str(bundle), "--keyring", str(keyring), "--seen", str(seen)])


def test_a_record_of_serials_that_holds_none_is_told_with_its_content(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "serial").write_text("garbage\n")
    assert verified(bundle, bundle / "keyring.pgp", tmp_path / "serial") == 1
    assert "holds 'garbage', which is not a serial" in capsys.readouterr().err


def test_a_file_that_is_no_keyring_is_told_without_another_programs_backtrace(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "keys.txt").write_text("not a key\n")
    assert verified(bundle, tmp_path / "keys.txt", tmp_path / "serial") == 1
    told = capsys.readouterr().err
    assert "keys.txt is not a file of OpenPGP keys" in told
    assert "backtrace" not in told


def test_a_reader_that_closes_the_pipe_ends_a_list_quietly(bundle: Path) -> None:
    listing = subprocess.Popen(
        [sys.executable, "-m", "llmkeep", "bundle", "list", str(bundle)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert listing.stdout
    listing.stdout.close()
    assert listing.stderr
    assert listing.stderr.read() == b""
    assert listing.wait() == 128 + signal.SIGPIPE


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (errno.EACCES, "a user with access to it"),
        (errno.ENOSPC, "make room"),
        (errno.ENOENT, "check the path"),
    ],
)
def test_an_error_of_the_system_comes_with_its_own_way_out(
    number: int, told: str, bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(_: object) -> None:
        raise OSError(number, "it fails", str(bundle))

    monkeypatch.setattr("llmkeep.bundle.manifest.read", fails)
    assert cli.main(["bundle", "list", str(bundle)]) == 1
    assert f"{bundle}: it fails: " in (said := capsys.readouterr().err)
    assert told in said


def test_a_missing_file_of_a_certificate_request_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("csr", "root", "root-key", "escrow-key")
    words = [word for name in names for word in (f"--{name}", str(tmp_path / name))]
    assert cli.main(["issuing", "certify", *words]) == 1
    assert f"{tmp_path}/csr: No such file or directory: check the path" in capsys.readouterr().err


def test_a_word_that_is_no_time_is_refused_by_audit_show(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["audit", "show", str(tmp_path), "--since", "yesterday"])
    assert ended.value.code == 2
    assert "'yesterday' is not a time as in the record" in capsys.readouterr().err
