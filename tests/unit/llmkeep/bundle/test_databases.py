"""Databases of vulnerabilities: from the mirror folder, and over https from a server on this machine."""

import functools
import os
import ssl
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import advisories
import other_authority
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from llmkeep.bundle import cache, databases

WANTED = {"debian": {"uri": "https://127.0.0.1:1/json", "licence": "NOASSERTION"}}


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("LLMKEEP_MIRROR", raising=False)


def mirrored(folder: Path, content: bytes, time: int = 1_700_000_000) -> Path:
    path = folder / "vulnerabilities/debian.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    os.utime(path, (time, time))
    return folder


def test_a_file_of_the_mirror_folder_is_locked_with_its_time_and_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMKEEP_MIRROR", str(mirrored(tmp_path / "mirror", advisories.tracker())))
    locked = databases.resolve(WANTED, {})
    assert locked["debian"].version == "2023-11-14T22:13:20Z"
    assert locked["debian"].purl == "pkg:generic/debian-vulnerabilities@2023-11-14T22:13:20Z"
    path = databases.find(WANTED, locked, None)["debian"]
    assert path.read_bytes() == advisories.tracker()
    assert cache.sha256(path) == locked["debian"].sha256


def test_a_source_that_is_not_reached_leaves_the_lock_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert databases.resolve(WANTED, {}) == {}
    assert (
        "debian: WITHOUT its database: https://127.0.0.1:1/json was not reached (" in capsys.readouterr().out
    )
    monkeypatch.setenv("LLMKEEP_MIRROR", str(mirrored(tmp_path / "mirror", advisories.tracker())))
    locked = databases.resolve(WANTED, {})
    monkeypatch.delenv("LLMKEEP_MIRROR")
    capsys.readouterr()
    assert databases.resolve(WANTED, locked) == locked
    assert "debian: kept as of 2023-11-14T22:13:20Z: " in capsys.readouterr().out


def test_a_build_names_what_it_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    assert databases.find(WANTED, {}, None) == {}
    warning = "WITHOUT the database of vulnerabilities debian: it is not in the lock: run `llmkeep lock update --only databases`"
    assert warning in capsys.readouterr().out
    warning = "WITHOUT the database of vulnerabilities debian: it is not in the lock: run `llmkeep lock update --only databases`"


def test_a_newer_database_is_not_taken_for_the_locked_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mirror = mirrored(tmp_path / "mirror", advisories.tracker())
    monkeypatch.setenv("LLMKEEP_MIRROR", str(mirror))
    locked = databases.resolve(WANTED, {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    mirrored(mirror, advisories.tracker({"zlib": {}}))
    assert databases.find(WANTED, locked, mirror) == {}
    assert "its source now has another one" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"<html>Sign in</html>", b"[]", b"", advisories.tracker()[:-9]])
def test_what_is_no_database_is_not_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    monkeypatch.setenv("LLMKEEP_MIRROR", str(mirrored(tmp_path / "mirror", content)))
    assert databases.resolve(WANTED, {}) == {}
    assert "did not serve a database (" in capsys.readouterr().out


def test_an_address_without_tls_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert databases.resolve({"debian": {"uri": "http://127.0.0.1/", "licence": ""}}, {}) == {}
    assert "http://127.0.0.1/ is not an https address" in capsys.readouterr().out


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A server of a folder over https, whose authority this process trusts; its port."""
    authority = other_authority.root_of("Test")
    key = ec.generate_private_key(ec.SECP256R1())
    leaf = other_authority.leaf_of(authority, key.public_key(), ["localhost"])
    pem = serialization.Encoding.PEM
    (tmp_path / "root.pem").write_bytes(authority.certificate.public_bytes(pem))
    (tmp_path / "leaf.pem").write_bytes(
        leaf.public_bytes(pem)
        + key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "root.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "leaf.pem")
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "mirror/vulnerabilities"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as listening:
        listening.socket = context.wrap_socket(listening.socket, server_side=True)
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        yield listening.server_port
        listening.shutdown()
        thread.join()


def test_a_server_says_since_when_it_has_a_database(tmp_path: Path, server: int) -> None:
    mirrored(tmp_path / "mirror", advisories.tracker())
    wanted = {"debian": {"uri": f"https://localhost:{server}/debian.json", "licence": "NOASSERTION"}}
    assert databases.resolve(wanted, {})["debian"].version == "2023-11-14T22:13:20Z"


def test_a_server_whose_certificate_does_not_fit_is_not_reached(
    tmp_path: Path, server: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mirrored(tmp_path / "mirror", advisories.tracker())
    monkeypatch.delenv("SSL_CERT_FILE")
    wanted = {"debian": {"uri": f"https://localhost:{server}/debian.json", "licence": "NOASSERTION"}}
    assert databases.resolve(wanted, {}) == {}
    assert "CERTIFICATE_VERIFY_FAILED" in capsys.readouterr().out
