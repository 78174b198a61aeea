"""Which header identifies a caller, and what ends an identity; without a gateway."""

import asyncio
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import quote

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from provider import Provider

from llmserve.access import identity
from llmserve.access.api_keys import KeyTable, edited, edited_file, end_subject, new_certificate, new_key
from llmserve.access.client_certificates import presented, read_certificate
from llmserve.access.identity import Authenticator, Identity
from llmserve.access.last_used import read_last_used
from llmserve.access.oidc import Issuer
from llmserve.api.errors import ApiError

PEPPER = b"a pepper for tests"
Header = tuple[bytes, bytes]


def certificate() -> bytes:
    """A certificate that is valid for a day, as PEM."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    now = datetime.now(UTC).replace(microsecond=0)
    made = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + timedelta(days=1))
    return made.sign(key, SHA256()).public_bytes(Encoding.PEM)


def escaped(pem: bytes) -> bytes:
    """As nginx passes it on."""
    return quote(pem).encode()


class Callers:
    """An authenticator, a key of ada's and a certificate of bob's."""

    def __init__(self, folder: Path, issuer: Issuer | None = None) -> None:
        self.pem = certificate()
        self.key, self.adas = new_key(PEPPER, "ada", "research", ["analyst"], None)
        self.bobs = new_certificate(read_certificate(self.pem), "bob", "sales", ["rater"], None)
        with edited(folder / "keys.json") as records:
            records += [self.adas, self.bobs]
        self.authenticator = Authenticator(KeyTable(folder / "keys.json", PEPPER), "X-Cert", issuer)

    def identify(self, *headers: Header) -> Identity:
        return self.authenticator.identify(headers)

    def code(self, *headers: Header) -> str:
        """The code of the refusal, which is a 401."""
        with pytest.raises(ApiError) as caught:
            self.identify(*headers)
        assert caught.value.status == 401
        return caught.value.code

    def bearer(self, scheme: str = "Bearer ") -> Header:
        return b"authorization", (scheme + self.key).encode()

    def shown(self) -> Header:
        return b"x-cert", escaped(self.pem)


@pytest.fixture
def callers(tmp_path: Path) -> Callers:
    return Callers(tmp_path)


def test_a_key_and_a_certificate_identify_their_holders(callers: Callers) -> None:
    ada = Identity("api_key", callers.adas.id, "ada", "research", ("analyst",))
    assert callers.identify((b"host", b"llm"), callers.bearer()) == ada
    for scheme in "bearer ", "BEARER ", "Bearer   ":
        assert callers.identify(callers.bearer(scheme)) == ada
    bob = Identity("certificate", callers.bobs.id, "bob", "sales", ("rater",))
    assert callers.identify(callers.shown()) == bob


def test_an_authorization_header_alone_counts_and_only_one(callers: Callers) -> None:
    assert callers.identify(callers.shown(), callers.bearer()).subject == "ada"
    assert callers.code(callers.shown(), (b"authorization", b"Bearer x")) == "malformed_key"
    assert callers.code(callers.bearer(), callers.bearer()) == "malformed_key"
    for scheme in "Basic ", "Bearer", "Bearer x ":
        assert callers.code(callers.bearer(scheme)) == "malformed_key"
    assert callers.code(callers.shown(), callers.shown()) == "invalid_certificate"
    assert callers.code((b"x-cert", b"no certificate")) == "invalid_certificate"
    assert callers.code((b"x-cert", escaped(certificate()))) == "unknown_certificate"
    assert callers.code((b"host", b"llm")) == "missing_key"


def test_without_a_configured_header_certificates_and_tokens_are_not_looked_at(callers: Callers) -> None:
    plain = Authenticator(callers.authenticator.keys)
    assert (plain.certificate_header, plain.issuer) == (None, None)
    with pytest.raises(ApiError, match="missing_key"):
        plain.identify([callers.shown()])
    with pytest.raises(ApiError, match=r"malformed_key.*is not 'Bearer llmk_<id>_<secret>': send"):
        plain.identify([(b"authorization", b"Bearer a.b.c")])


def test_a_presented_certificate_is_parsed_once(callers: Callers) -> None:
    _, value = callers.shown()
    assert presented(value) is presented(value)
    assert presented(value) == read_certificate(callers.pem)
    assert timedelta(hours=23) < presented(value).not_after - datetime.now(UTC) <= timedelta(days=1)
    for wrong in b"", b"no certificate", callers.pem[:90]:
        with pytest.raises(ValueError, match=r"\w"):
            read_certificate(wrong)


def test_each_use_is_noted_for_the_record_that_was_used(callers: Callers) -> None:
    callers.identify(callers.bearer())
    assert callers.authenticator.last_used.minutes.keys() == {callers.adas.id}
    callers.identify(callers.shown())
    callers.authenticator.close()
    file = callers.authenticator.keys.path.with_name("last-used.json")
    assert read_last_used(file).keys() == {callers.adas.id, callers.bobs.id}
    before = file.stat().st_mtime_ns
    callers.authenticator.close()
    assert file.stat().st_mtime_ns == before, "nothing was unwritten"
    callers.authenticator.last_used.unwritten = True
    callers.authenticator.keys.records = None
    callers.authenticator.close()
    assert file.stat().st_mtime_ns == before, "which ids are known cannot be read"


def test_a_revoked_record_ends_its_identity_with_and_without_a_provider(tmp_path: Path) -> None:
    callers = Callers(tmp_path, Issuer(Provider(tmp_path / "jwks.json").oidc()))
    ada, bob = callers.identify(callers.bearer()), callers.identify(callers.shown())
    assert (callers.authenticator.ended(ada), callers.authenticator.ended(bob)) == (None, None)
    with edited_file(callers.authenticator.keys.path) as content:
        end_subject(content, "ada")
    callers.authenticator.keys.refresh()
    for issuer in callers.authenticator.issuer, None:
        callers.authenticator.issuer = issuer
        refusal = callers.authenticator.ended(ada)
        assert refusal
        assert (refusal.status, refusal.code) == (401, "revoked_key")
        assert callers.authenticator.ended(bob) is None


def test_a_token_is_told_apart_from_a_key_by_its_form(tmp_path: Path) -> None:
    provider = Provider(tmp_path / "jwks.json")
    callers = Callers(tmp_path, Issuer(provider.oidc()))
    token = provider.token()
    for scheme in "Bearer", "bearer":
        lea = callers.identify((b"authorization", f"{scheme} {token}".encode()))
        assert (lea.kind, lea.subject, lea.tenant) == ("oidc", "lea@corp", "corp")
        assert (lea.roles, lea.groups) == ((), ("developers",)), "the policy gives roles to groups"
        assert lea.token
        assert lea.id == lea.token.id
        assert token not in repr(lea)
    with pytest.raises(ApiError, match=r"malformed_key.* or 'Bearer <token>': send"):
        callers.identify((b"authorization", b"Bearer a.b"))
    assert callers.code((b"authorization", f"Basic {token}".encode())) == "malformed_key"
    assert callers.code((b"authorization", f"Bearer {token}.d".encode())) == "malformed_key"
    callers.authenticator.keys.records = None
    refusal = callers.authenticator.ended(lea)
    assert refusal
    assert (refusal.status, refusal.code, refusal.headers) == (
        503,
        "keys_unreadable",
        [(b"retry-after", b"5")],
    )


async def watched(authenticator: Authenticator, until: Callable[[], bool], changed: list[str]) -> None:
    """Watch until that holds."""
    watching = asyncio.create_task(authenticator.watch(lambda: changed.append("changed")))
    async with asyncio.timeout(30):
        while not until():
            await asyncio.sleep(0.01)
    watching.cancel()


def test_changed_files_are_reloaded_and_uses_written_while_it_watches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "POLL_SECONDS", 0.01)
    provider = Provider(tmp_path / "jwks.json")
    callers = Callers(tmp_path, Issuer(provider.oidc()))
    authenticator, changed = callers.authenticator, list[str]()
    file = tmp_path / "last-used.json"
    callers.identify(callers.bearer())
    asyncio.run(watched(authenticator, file.exists, changed))
    assert changed == []
    assert json.loads(file.read_text()).keys() == {callers.adas.id}
    provider.publish({"kty": "none"})
    asyncio.run(watched(authenticator, lambda: bool(changed), changed))
    authenticator.keys.path.write_text("{")
    asyncio.run(watched(authenticator, lambda: len(changed) == 2, changed))
    assert authenticator.keys.records is None
    authenticator.issuer = None
    asyncio.run(watched(authenticator, lambda: True, changed))
    assert changed == ["changed"] * 2
