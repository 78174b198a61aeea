"""The repository that we make is one that apt accepts, and only as we signed it."""

import datetime
import subprocess
import time
from email.utils import format_datetime
from pathlib import Path

import pytest
import small_bundle
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed, decode_dss_signature

from llmkeep.bundle import aptrepo, cache, lock, openpgp, signing
from llmkeep.bundle.aptsources import Source
from llmkeep.errors import LlmkeepError

CONTROL = """Package: {name}
Version: 1:2.0~rc1+b1-3
Architecture: all
Maintainer: nobody <nobody@example.org>
Description: a package of a test
"""


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(small_bundle.signing_keys(tmp_path_factory.mktemp("keys")))


@pytest.fixture
def repository(tmp_path: Path, keys: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one package."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = tmp_path / "source"
    (source / "DEBIAN").mkdir(parents=True)
    (source / "DEBIAN/control").write_text(CONTROL.format(name="odd-one"))
    copyright_file = source / "usr/share/doc/odd-one/copyright"
    copyright_file.parent.mkdir(parents=True)
    copyright_file.write_text(
        "Format: x\n\nFiles: *\nLicense: MIT\n\nFiles: b\nLicense: GPL-2+\n\nLicense: odd\x1b[2J\n"
    )
    subprocess.run(
        ["dpkg-deb", "--build", str(source), str(tmp_path / "a.deb")], check=True, capture_output=True
    )
    digest = cache.put(tmp_path / "a.deb")
    deb = aptrepo.describe("odd-one=1:2.0~rc1+b1-3", digest, Source("debian"))
    assert deb.licence == "MIT AND GPL-2+ AND odd?[2J"
    assert deb.file == "odd-one_2.0~rc1+b1-3_all.deb"
    assert deb.purl == "pkg:deb/debian/odd-one@1%3A2.0~rc1%2Bb1-3?arch=all"
    later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=9)
    aptrepo.repository(
        tmp_path / "apt", {"odd-one=1": deb}, keys / "signing.key", format_datetime(later, usegmt=True)
    )
    return tmp_path / "apt"


def update(repository: Path, keys: Path) -> subprocess.CompletedProcess[str]:
    """`apt-get update` from this repository alone, then the URIs that an install would fetch."""
    state = repository.parent / "state"
    (state / "lists/partial").mkdir(parents=True, exist_ok=True)
    (state / "status").touch()
    (state / "sources.list").write_text(
        f"deb [signed-by={keys / 'keyring.pgp'}] file:{repository} trixie main\n"
    )
    options = [
        f"Dir::State={state}",
        f"Dir::State::status={state}/status",
        f"Dir::Cache={state}",
        f"Dir::Etc::sourcelist={state}/sources.list",
        "Dir::Etc::sourceparts=/dev/null",
        "Acquire::Languages=none",
        "APT::Sandbox::User=root",
        "APT::Update::Error-Mode=any",
        "Acquire::Check-Valid-Until=true",
        "Acquire::Check-Date=true",
    ]
    apt = ["apt-get", "-qq", *(f"--option={option}" for option in options)]
    run = subprocess.run([*apt, "update"], capture_output=True, text=True, check=False)
    if run.returncode == 0:
        run = subprocess.run(
            [*apt, "install", "--print-uris", "odd-one"], capture_output=True, text=True, check=False
        )
    return run


def test_apt_accepts_it(repository: Path, keys: Path) -> None:
    run = update(repository, keys)
    assert run.returncode == 0, run.stderr
    assert f"file:{repository}/pool/odd-one_2.0~rc1+b1-3_all.deb" in run.stdout.replace("%7e", "~").replace(
        "%2b", "+"
    )


def test_apt_accepts_it_with_the_packets_that_are_made_around_a_tokens_signature(
    repository: Path, keys: Path, tmp_path: Path
) -> None:
    secret = ec.generate_private_key(
        ec.SECP384R1()
    )  # a stand-in for the token: test_token_key.py has a real one
    form = serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint
    algorithm = ec.ECDSA(Prehashed(hashes.SHA384()))
    key = openpgp.Key(
        secret.public_key().public_bytes(*form),
        int(time.time()) - 60,
        lambda digest: decode_dss_signature(secret.sign(digest, algorithm)),
    )
    signed = repository / "dists/trixie/InRelease"
    argv = [
        "sqv",
        "--keyring",
        str(keys / "keyring.pgp"),
        "--cleartext",
        "--output",
        str(tmp_path / "Release"),
    ]
    subprocess.run([*argv, str(signed)], check=True, capture_output=True)
    signing.sign_inline(key, tmp_path / "Release", signed)
    (tmp_path / "keyring.pgp").write_bytes(openpgp.certificate(key, "a token"))
    assert update(repository, keys).returncode != 0
    run = update(repository, tmp_path)
    assert run.returncode == 0, run.stderr


def test_apt_refuses_a_changed_index(repository: Path, keys: Path) -> None:
    index = repository / "dists/trixie/main/binary-amd64/Packages"
    index.write_text(index.read_text().replace("2.0~rc1", "2.0~rc2"))
    assert update(repository, keys).returncode != 0


def test_apt_refuses_a_foreign_signature(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    foreign = small_bundle.signing_keys(tmp_path_factory.mktemp("foreign"))
    run = update(repository, foreign)
    assert run.returncode != 0
    assert "signature" in run.stderr.lower() or "signed" in run.stderr.lower()


WORDS = """E: Version '3.5.0-1' for 'openssl' was not found
E: Version '5:8.0.2-3' for 'redis-server' was not found"""


def test_what_the_mirror_no_longer_has_is_named_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def get(*_: object) -> str:
        raise LlmkeepError(WORDS)

    monkeypatch.setattr(aptrepo.Apt, "update", lambda _: None)
    monkeypatch.setattr(aptrepo.Apt, "get", get)
    deb = lock.Deb("openssl.deb", "3.5.0-1", "0" * 64, 1, "", "", "debian")
    with pytest.raises(
        aptrepo.Moved, match=r"no longer has openssl=3\.5\.0-1, redis-server=5:8\.0\.2-3: run"
    ):
        aptrepo.fetch(lock.catalogue()["apt"], {"openssl=3.5.0-1": deb})


def test_a_published_package_that_changed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(aptrepo.Apt, "update", lambda _: None)
    monkeypatch.setattr(aptrepo.Apt, "get", lambda *_: "")
    archive = tmp_path / "llmkeep/apt/archives/openssl_1%3a3.5_all.deb"
    archive.parent.mkdir(parents=True)
    archive.write_text("other bytes")
    deb = lock.Deb("openssl.deb", "1:3.5", "0" * 64, 1, "", "", "debian")
    with pytest.raises(LlmkeepError, match="a published package changed"):
        aptrepo.fetch(lock.catalogue()["apt"], {"openssl=1:3.5": deb})


def test_a_mirror_that_the_machine_does_not_know_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    wanted = {"architecture": "amd64", "sources": {"debian": {"suites": ["trixie-nowhere"]}}}
    with pytest.raises(LlmkeepError, match="has no Debian mirror for trixie-nowhere"):
        aptrepo.Apt(wanted, ["debian"]).update()
