"""An edge's key and certificate of another CA: served once everything fits, and the former one otherwise."""

import subprocess
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from other_authority import NOW, Authority, leaf_of, root_of
from plugin_modules import load

from llmkeep.pki.revocations import key_digest

module = load("modules.public_certificate")
NAMES = ["llm.example.org", "ask.example.org"]


@pytest.fixture(scope="module")
def root() -> Authority:
    return root_of("example")


@pytest.fixture(scope="module")
def issuing(root: Authority) -> Authority:
    return root.below("example issuing")


@pytest.fixture(autouse=True)
def reloads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Units that would be restarted: systemctl is not called."""
    called: list[str] = []
    really = subprocess.run

    def run(argv: list[str], **more: Any) -> Any:
        if argv[0] != "systemctl":
            return really(argv, **more)
        called.append(argv[-1])
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    return called


@pytest.fixture
def host(tmp_path: Path) -> dict[str, Any]:
    """The module's parameters on a host that has neither key nor certificate."""
    (tmp_path / "pki").mkdir()
    return {
        "names": NAMES, "chain": "", "root": "", "chain_names": [], "retired": [], "requested_key": "", "requested_names": [],
        "directory": str(tmp_path / "pki"), "public_key": "", "key": None, "openssl": ["openssl"], "group": "root",
        "reload_unit": "llmkeep-certificate.service", "served": ["true"],
    }  # fmt: skip


def file(host: dict[str, Any], name: str) -> Path:
    return Path(host["directory"]) / name


def key_of(request: str) -> ec.EllipticCurvePublicKey:
    key = x509.load_pem_x509_csr(request.encode()).public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    return key


def certified(
    host: dict[str, Any], issuing: Authority, root: Authority, request: str, **more: Any
) -> dict[str, Any]:
    """The parameters once the control node has a certificate for the request."""
    key = key_of(request)
    chain = [leaf_of(issuing, key, NAMES, **more), issuing.certificate]
    return host | {
        "chain": "".join(pem(each) for each in chain),
        "root": pem(root.certificate),
        "chain_names": NAMES,
        "requested_key": key_digest(key),
        "requested_names": NAMES,
    }


def pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


@pytest.fixture
def installed(host: dict[str, Any], issuing: Authority, root: Authority) -> dict[str, Any]:
    """The parameters on a host that has the certificate in place."""
    given = certified(host, issuing, root, module.settle(host, False)["request"])
    assert module.settle(given, False)["installed"]
    return given


def test_a_fresh_host_makes_its_key_and_asks(host: dict[str, Any]) -> None:
    result = module.settle(host, False)
    assert (result["changed"], result["installed"], result["days_left"]) == (True, False, -1)
    assert "PRIVATE" not in str(result)
    assert file(host, "public.key").stat().st_mode & 0o777 == 0o640
    assert not file(host, "public.pem").exists()


def test_check_mode_on_a_fresh_host_changes_nothing(host: dict[str, Any]) -> None:
    assert module.settle(host, True)["changed"]
    assert list(Path(host["directory"]).iterdir()) == []


def test_a_host_that_waits_for_its_certificate_asks_once(host: dict[str, Any]) -> None:
    key = key_of(module.settle(host, False)["request"])
    given = host | {"requested_key": key_digest(key), "requested_names": NAMES}
    for check in (True, False):
        result = module.settle(given, check)
        assert (result["changed"], result["request"]) == (False, "")


def test_other_names_are_asked_for_anew(installed: dict[str, Any]) -> None:
    assert module.settle(installed | {"names": NAMES[:1]}, False)["request"]


def test_an_installed_certificate_is_left_alone(installed: dict[str, Any], reloads: list[str]) -> None:
    for check in (True, False):
        result = module.settle(installed, check)
        assert (result["changed"], result["installed"], result["request"]) == (False, True, "")
        assert result["days_left"] == 364
    assert reloads == []


def test_the_key_is_readable_by_its_group_alone(installed: dict[str, Any]) -> None:
    assert file(installed, "public.pem").stat().st_mode & 0o777 == 0o640


def test_an_expired_certificate_that_is_in_place_stays(
    installed: dict[str, Any], issuing: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "verify", lambda *_: pytest.fail("it is installed again"))
    key = x509.load_pem_x509_certificate(installed["chain"].encode()).public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    old = pem(leaf_of(issuing, key, NAMES, end=NOW - timedelta(days=1)))
    file(installed, "public.pem").write_text(old + file(installed, "public.key").read_text())
    result = module.settle(installed | {"chain": old}, False)
    assert (result["changed"], result["installed"]) == (False, True)
    assert result["days_left"] < 0


def test_a_renewed_certificate_replaces_the_former_one(
    installed: dict[str, Any], issuing: Authority, root: Authority, reloads: list[str]
) -> None:
    request = module.settle(installed | {"requested_key": ""}, False)["request"]
    given = certified(installed, issuing, root, request, end=NOW + timedelta(days=700))
    assert module.settle(given, False)["days_left"] > 690
    assert reloads == ["llmkeep-certificate.service"]


def test_a_certificate_that_is_not_served_is_rolled_back(
    installed: dict[str, Any], issuing: Authority, root: Authority, reloads: list[str]
) -> None:
    before = file(installed, "public.pem").read_bytes()
    request = module.settle(installed | {"requested_key": ""}, False)["request"]
    given = certified(installed, issuing, root, request) | {"served": ["false"]}
    with pytest.raises(module.Refused, match="the former one is in place again"):
        module.settle(given, False)
    assert file(installed, "public.pem").read_bytes() == before
    assert len(reloads) == 2


@pytest.mark.parametrize("more", [{"end": NOW - timedelta(hours=1)}, {"begin": NOW + timedelta(days=1)}])
def test_a_certificate_that_does_not_verify_here_is_not_taken(
    host: dict[str, Any], issuing: Authority, root: Authority, more: dict[str, Any]
) -> None:
    given = certified(host, issuing, root, module.settle(host, False)["request"], **more)
    with pytest.raises(module.Refused, match="Compare the clocks"):
        module.settle(given, False)
    assert [path.name for path in Path(host["directory"]).iterdir()] == ["public.key"]


def test_a_certificate_for_another_name_is_not_taken(
    host: dict[str, Any], issuing: Authority, root: Authority
) -> None:
    given = certified(host, issuing, root, module.settle(host, False)["request"])
    with pytest.raises(module.Refused, match=r"the certificate for other\.example\.org is not taken"):
        module.settle(given | {"chain_names": ["other.example.org"]}, False)


def test_a_certificate_whose_key_is_lost_is_not_installed(installed: dict[str, Any]) -> None:
    for path in Path(installed["directory"]).iterdir():
        path.unlink()
    result = module.settle(installed, False)
    assert not result["installed"]
    assert result["request"]
    assert not file(installed, "public.pem").exists()


def test_a_new_key_becomes_active_with_its_certificate(
    installed: dict[str, Any], issuing: Authority, root: Authority
) -> None:
    before = file(installed, "public.pem").read_bytes()
    retired = installed | {"retired": [installed["requested_key"]]}
    result = module.settle(retired, False)
    assert result["installed"]
    assert file(installed, "public.pem").read_bytes() == before
    given = certified(retired, issuing, root, result["request"])
    assert module.settle(given, False)["installed"]
    assert file(installed, "public.pem").read_text().endswith(file(installed, "public.key").read_text())


@pytest.mark.parametrize(
    "damage", [b"", b"\xff\x00", b"-----BEGIN PRIVATE KEY-----\nx\n-----END PRIVATE KEY-----\n"]
)
def test_a_damaged_file_is_written_anew(installed: dict[str, Any], damage: bytes) -> None:
    before = file(installed, "public.pem").read_bytes()
    file(installed, "public.pem").write_bytes(damage)
    assert module.settle(installed, False)["changed"]
    assert file(installed, "public.pem").read_bytes() == before


@pytest.mark.parametrize("name", ["*.example.org", "a,DNS:b", "", "a b", "-x"])
def test_names_that_would_say_more_to_openssl_are_refused(host: dict[str, Any], name: str) -> None:
    with pytest.raises(module.Refused, match="correct edge_public_names"):
        module.settle(host | {"names": [name]}, False)
