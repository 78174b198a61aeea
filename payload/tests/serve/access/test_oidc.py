"""Tokens of an identity provider: which are accepted, why others are refused, and how soon changes take effect."""

import base64
import json
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from edge import in_front_of
from provider import Provider
from pydantic import ValidationError
from questions import LASTING, ask, error
from redis_server import PASSWORD, RedisServer
from service import PEPPER, Service, eventually, running

from llmcore.config import ConfigError
from llmcore.files import stamp
from llmserve.access.api_keys import KeyTable, edited, edited_file, end_subject, new_key
from llmserve.access.identity import Authenticator, Identity
from llmserve.access.oidc import MEMORY_TOKENS, Issuer, read_jwks
from llmserve.api.errors import ApiError

SLOW: dict[str, Any] = {"slow": {"driver": "echo", "token_seconds": 0.05}, "echo": {"driver": "echo"}}
LONG = {**LASTING, "model": "slow"}


@pytest.fixture
def provider(tmp_path: Path) -> Provider:
    """A provider whose JWKS file is in the test's folder."""
    return Provider(tmp_path / "jwks.json")


@pytest.fixture
def authenticator(provider: Provider, tmp_path: Path) -> Authenticator:
    """An authenticator that accepts the provider's tokens."""
    return Authenticator(KeyTable(tmp_path / "keys.json", PEPPER), None, Issuer(provider.oidc()))


def identify(authenticator: Authenticator, token: str) -> Identity:
    """Authenticate by this token."""
    return authenticator.identify([(b"authorization", f"Bearer {token}".encode())])


def refusal(authenticator: Authenticator, token: str) -> str:
    """The code of the refusal; checks that the message quotes nothing of the token."""
    with pytest.raises(ApiError) as caught:
        identify(authenticator, token)
    assert caught.value.status == 401
    assert caught.value.headers
    assert not [part for part in token.split(".") if len(part) > 8 and part in caught.value.message]
    assert "lea@corp" not in caught.value.message
    return caught.value.code


def refresh(authenticator: Authenticator) -> None:
    """Reload keys and JWKS, as the gateway does twice a second."""
    assert authenticator.issuer
    authenticator.issuer.refresh()


def raw(header: Any, claims: Any, signature: bytes = b"x" * 64) -> str:
    """A token with an arbitrary signature."""
    parts = [json.dumps(part).encode() for part in (header, claims)] + [signature]
    return ".".join(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in parts)


def test_a_token_identifies_its_subject_with_tenant_and_groups(
    provider: Provider, authenticator: Authenticator
) -> None:
    for kid in "ec1", "rsa1":
        token = provider.token(kid)
        identity = identify(authenticator, token)
        assert (identity.kind, identity.subject, identity.tenant) == ("oidc", "lea@corp", "corp")
        assert (identity.roles, identity.groups) == ((), ("developers",))
        assert identity.id == sha256(token.encode()).hexdigest()[:16]
    assert identify(authenticator, provider.token(jti="t-17")).id == "t-17"
    assert identify(authenticator, provider.token(jti="with\nnewline")).id != "with\nnewline"
    assert identify(authenticator, provider.token(aud=["other", "llm"])).subject == "lea@corp"
    names = ["/研发/a b", "CN=LLM Users,OU=Groups,DC=corp"]
    assert identify(authenticator, provider.token(realm={"groups": names})).groups == tuple(names)
    assert identify(authenticator, provider.token(realm={"groups": []})).groups == ()
    dotted: dict[str, Any] = {"realm.groups": ["c"]}
    assert identify(authenticator, provider.token(**dotted)).groups == ("c",)


def test_an_expired_or_immature_token_is_refused_beyond_the_leeway(
    provider: Provider, authenticator: Authenticator
) -> None:
    now = int(time.time())
    assert refusal(authenticator, provider.token(exp=now - 31)) == "expired_token"
    assert identify(authenticator, provider.token(exp=now - 20))
    assert refusal(authenticator, provider.token(iat=now + 40)) == "immature_token"
    assert identify(authenticator, provider.token(iat=now + 20))
    assert refusal(authenticator, provider.token(nbf=now + 40)) == "immature_token"
    assert refusal(authenticator, provider.token(iat=now - 90_000)) == "token_too_old"
    assert refusal(authenticator, provider.token(exp="never")) == "malformed_token"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"iss": "https://elsewhere.example"}, "wrong_issuer"),
        ({"aud": "mail"}, "wrong_audience"),
        ({"aud": ["mail", "chat"]}, "wrong_audience"),
        ({"exp": None}, "incomplete_token"),
        ({"iat": None}, "incomplete_token"),
        ({"aud": None}, "incomplete_token"),
        ({"iss": None}, "incomplete_token"),
        ({"sub": None}, "incomplete_token"),
        ({"sub": "two words"}, "incomplete_token"),
        ({"tenant": None}, "incomplete_token"),
        ({"tenant": ["corp"]}, "incomplete_token"),
        ({"tenant": "../corp"}, "incomplete_token"),
        ({"realm": None}, "incomplete_token"),
        ({"realm": ["groups"]}, "incomplete_token"),
        ({"realm": {"groups": "developers"}}, "incomplete_token"),
        ({"realm": {"groups": {"developers": True}}}, "incomplete_token"),
        ({"realm": {"groups": 7}}, "incomplete_token"),
        ({"realm": {"groups": ["developers", 7]}}, "incomplete_token"),
        ({"realm": {"groups": ["developers", ["admins"]]}}, "incomplete_token"),
        ({"realm": {"groups": ["developers", ""]}}, "incomplete_token"),
        ({"realm": {"groups": ["developers\n"]}}, "incomplete_token"),
        ({"realm": {"groups": ["\ud800"]}}, "incomplete_token"),
        ({"realm": {"groups": ["x" * 257]}}, "incomplete_token"),
        ({"realm": {"groups": [f"g{number}" for number in range(257)]}}, "too_many_groups"),
    ],
)
def test_a_token_with_wrong_or_missing_claims_is_refused(
    provider: Provider, authenticator: Authenticator, changes: dict[str, Any], code: str
) -> None:
    assert refusal(authenticator, provider.token(**changes)) == code


def test_an_unsigned_or_symmetrically_signed_token_is_refused(
    provider: Provider, authenticator: Authenticator
) -> None:
    claims = provider.claims()
    for name in "none", "None", "HS256", "HS512", "ES384", "", None, ["ES256"]:
        assert refusal(authenticator, raw({"alg": name, "kid": "ec1"}, claims)) == "token_algorithm"
    assert refusal(authenticator, raw({"kid": "ec1"}, claims)) == "token_algorithm"
    # The classic attack: the provider's public key as the secret of an HMAC.
    public = provider.keys["rsa1"][0].public_key()
    pem = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    forged = raw({"alg": "HS256", "kid": "rsa1"}, claims).rsplit(".", 1)[0]
    signature = jwt.algorithms.HMACAlgorithm(jwt.algorithms.HMACAlgorithm.SHA256).sign(forged.encode(), pem)
    tail = base64.urlsafe_b64encode(signature).rstrip(b"=").decode()
    assert refusal(authenticator, f"{forged}.{tail}") == "token_algorithm"


def test_a_wrong_signature_or_a_changed_token_is_refused(
    provider: Provider, authenticator: Authenticator
) -> None:
    header, body, signature = provider.token().split(".")
    _, other_body, _ = provider.token(sub="root@corp").split(".")
    assert refusal(authenticator, f"{header}.{other_body}.{signature}") == "invalid_token"
    assert refusal(authenticator, raw({"alg": "ES256", "kid": "ec1"}, provider.claims())) == "invalid_token"
    stranger = jwt.encode(
        provider.claims(), ec.generate_private_key(ec.SECP256R1()), "ES256", headers={"kid": "ec1"}
    )
    assert refusal(authenticator, stranger) == "invalid_token"
    empty = refusal(authenticator, f"{header}.{body}.")
    assert empty in {"invalid_token", "malformed_token"}


def test_a_key_verifies_its_own_algorithm_only(provider: Provider, authenticator: Authenticator) -> None:
    for kid, algorithm in ("ec1", "RS256"), ("rsa1", "ES256"):
        assert refusal(authenticator, raw({"alg": algorithm, "kid": kid}, {})) == "token_key_mismatch"
    wide = Authenticator(authenticator.keys, None, Issuer(provider.oidc(algorithms=["RS256", "PS256"])))
    as_pss = jwt.encode(provider.claims(), provider.keys["rsa1"][0], "PS256", headers={"kid": "rsa1"})
    assert refusal(wide, as_pss) == "token_key_mismatch", "the key says RS256"


def test_keys_and_extensions_inside_a_token_are_refused(
    provider: Provider, authenticator: Authenticator
) -> None:
    mine = ec.generate_private_key(ec.SECP256R1())
    own = json.loads(jwt.algorithms.ECAlgorithm.to_jwk(mine.public_key()))
    for more in {"jwk": own}, {"jku": "https://elsewhere.example/keys"}, {"x5c": ["AAAA"]}:
        token = jwt.encode(provider.claims(), mine, "ES256", headers={"kid": "ec1", **more})
        assert refusal(authenticator, token) == "invalid_token"
        token = jwt.encode(provider.claims(), mine, "ES256", headers={"kid": "mine", **more})
        assert refusal(authenticator, token) == "unknown_token_key"
    assert refusal(authenticator, raw({"alg": "ES256"}, {})) == "unknown_token_key"
    for crit in ["exp"], ["b64"], [], "exp":
        head = {"alg": "ES256", "kid": "ec1", "crit": crit}
        assert refusal(authenticator, raw(head, provider.claims())) == "token_critical_header"


def test_an_oversized_or_malformed_token_is_refused_before_verification(
    provider: Provider, authenticator: Authenticator
) -> None:
    assert refusal(authenticator, provider.token(padding="x" * 8200)) == "token_too_long"
    deep = base64.urlsafe_b64encode(b"[" * 4000).decode()
    for text in "..", "a.b.c", f"{deep}.e30.x", raw([], {}), raw("x", {}), "\xff\xfe.\xff.\xff", "=.=.=":
        with pytest.raises(ApiError, match="malformed_token"):
            authenticator.identify([(b"authorization", b"Bearer " + text.encode("latin-1"))])
    two_parts = provider.token().rsplit(".", 1)[0]
    assert refusal(authenticator, two_parts) == "malformed_key"
    assert refusal(authenticator, provider.token() + ".more") == "malformed_key"


def test_without_a_provider_every_token_is_refused(provider: Provider, tmp_path: Path) -> None:
    plain = Authenticator(KeyTable(tmp_path / "keys.json", PEPPER))
    assert refusal(plain, provider.token()) == "malformed_key"


def test_symmetric_algorithms_cannot_be_configured(provider: Provider) -> None:
    for wrong in ["HS256"], ["none"], []:
        with pytest.raises(ValidationError):
            provider.oidc(algorithms=wrong)


def test_unusable_keys_are_skipped_and_private_ones_refuse_the_file(
    provider: Provider, tmp_path: Path
) -> None:
    secret = {"kty": "oct", "k": "c2VjcmV0", "kid": "ec1", "alg": "HS256"}
    weak = {**jwt.algorithms.RSAAlgorithm.to_jwk(rsa.generate_private_key(65537, 1024).public_key(), True)}  # noqa: S505 - refused
    broken = [None, 5, {}, {"kty": "EC"}, {"kty": ["EC"], "kid": "x"}, {"kty": "RSA", "kid": "y", "n": "!"}]
    provider.publish(secret, {**weak, "kid": "weak"}, {**provider.jwk("ec1"), "use": "enc"}, *broken)
    assert [key.kid for key in read_jwks(provider.jwks_file)] == ["ec1", "rsa1"]
    off_curve = {**provider.jwk("ec1"), "crv": "P-384", "alg": "ES384", "kid": "z"}
    provider.publish(off_curve)
    assert [key.kid for key in read_jwks(provider.jwks_file)] == ["ec1", "rsa1"]
    private = json.loads(jwt.algorithms.ECAlgorithm.to_jwk(ec.generate_private_key(ec.SECP256R1())))
    file = tmp_path / "wrong.json"
    for content, reason in [
        (json.dumps({"keys": [{**private, "kid": "p"}]}), "private key"),
        (json.dumps({"keys": [secret]}), "none that can verify tokens"),
        (json.dumps({"keys": {}}), "not a JWKS"),
        ("[" * 100_000, "not a JWKS"),
        (" " * 1_100_000 + '{"keys": []}', "not a JWKS"),
    ]:
        file.write_text(content)
        with pytest.raises(ConfigError, match=reason):
            read_jwks(file)


def test_all_families_of_keys_work(provider: Provider, authenticator: Authenticator) -> None:
    provider.keys["ed"] = ed25519.Ed25519PrivateKey.generate(), "EdDSA"
    provider.keys["p384"] = ec.generate_private_key(ec.SECP384R1()), "ES384"
    provider.publish()
    wide = Authenticator(
        authenticator.keys, None, Issuer(provider.oidc(algorithms=["EdDSA", "ES384", "RS256"]))
    )
    for kid in "ed", "p384", "rsa1":
        assert identify(wide, provider.token(kid)).subject == "lea@corp"


def test_a_new_key_is_used_at_once_and_a_withdrawn_one_no_more(
    provider: Provider, authenticator: Authenticator
) -> None:
    old = provider.token()
    running_stream = identify(authenticator, old)
    provider.keys["ec2"] = ec.generate_private_key(ec.SECP256R1()), "ES256"
    provider.publish()
    assert identify(authenticator, provider.token("ec2")).subject == "lea@corp", (
        "an unknown kid causes one reload"
    )
    assert authenticator.ended(running_stream) is None
    provider.keys["ec1"] = provider.keys.pop("ec2")  # another key under the same kid
    provider.publish()
    refresh(authenticator)
    assert refusal(authenticator, old) == "invalid_token", "although it was verified just before"
    ended = authenticator.ended(running_stream)
    assert ended
    assert ended.code == "revoked_token"


def test_a_flood_of_unknown_keys_reads_the_file_at_most_once_a_second(
    authenticator: Authenticator, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[Path] = []

    def counted(path: Path) -> tuple[int, int, int] | None:
        looks.append(path)
        return stamp(path)

    monkeypatch.setattr("llmserve.access.oidc.stamp", counted)
    started = time.monotonic()
    for number in range(500):
        assert refusal(authenticator, raw({"alg": "ES256", "kid": f"k{number}"}, {})) == "unknown_token_key"
    assert 1 <= len(looks) <= 2 + time.monotonic() - started


def test_verified_tokens_are_cached_within_bounds_and_until_they_expire(
    provider: Provider, authenticator: Authenticator, monkeypatch: pytest.MonkeyPatch
) -> None:
    verified: list[str] = []
    decode = jwt.decode

    def counted(text: str, *rest: Any, **options: Any) -> Any:
        verified.append(text)
        return decode(text, *rest, **options)

    monkeypatch.setattr("llmserve.access.oidc.jwt.decode", counted)
    monkeypatch.setattr("llmserve.access.oidc.MEMORY_TOKENS", 10)
    assert MEMORY_TOKENS < 10_000
    issuer = authenticator.issuer
    assert issuer
    first = provider.token()
    for _ in range(20):
        identify(authenticator, first)
    assert verified == [first]
    for number in range(20):
        identify(authenticator, provider.token(jti=f"t{number}"))
    assert len(issuer.verified) == 10
    identify(authenticator, first)
    assert verified.count(first) == 2, "it was evicted"
    end = int(time.time()) + 60
    brief = provider.token(exp=end)
    identify(authenticator, brief)
    with monkeypatch.context() as later:
        later.setattr("llmserve.access.oidc.time.time", lambda: end + 29)
        assert code_of(authenticator, brief) == "", "the leeway is 30 seconds"
        later.setattr("llmserve.access.oidc.time.time", lambda: end + 30)
        assert code_of(authenticator, brief) == "expired_token", "although it is cached"
    assert verified.count(brief) == 1
    started = time.monotonic()
    monkeypatch.setattr("llmserve.access.oidc.time.monotonic", lambda: started + 61)
    identify(authenticator, first)
    assert verified.count(first) == 3, "after a minute it is verified again"


def code_of(authenticator: Authenticator, token: str) -> str:
    """The code of the refusal, or None."""
    try:
        identify(authenticator, token)
    except ApiError as error:
        return error.code
    return ""


def test_a_blocked_subject_has_to_log_in_again_and_others_do_not(
    provider: Provider, authenticator: Authenticator
) -> None:
    now = int(time.time())
    # The second one by a clock that is ahead.
    tokens = (
        provider.token(iat=now - 5),
        provider.token(iat=now + 25),
    )
    other = provider.token(sub="max@corp")
    stream = identify(authenticator, tokens[0])
    with edited_file(authenticator.keys.path) as content:
        end_subject(content, "lea@corp")
    authenticator.keys.refresh()
    assert [refusal(authenticator, token) for token in tokens] == ["revoked_token"] * 2
    ended = authenticator.ended(stream)
    assert ended
    assert ended.code == "revoked_token"
    assert identify(authenticator, other).subject == "max@corp"
    with edited_file(authenticator.keys.path) as content:
        content.blocked = [
            each.model_copy(update={"since": each.since.fromtimestamp(now - 60, each.since.tzinfo)})
            for each in content.blocked
        ]
    authenticator.keys.refresh()
    assert identify(authenticator, provider.token()).subject == "lea@corp", "a token issued a minute later"


def test_without_readable_keys_tokens_get_503_and_api_keys_work(
    provider: Provider, authenticator: Authenticator
) -> None:
    with edited(authenticator.keys.path) as records:
        key, record = new_key(PEPPER, "s@t", "t", ["user"], None)
        records.append(record)
    token = provider.token()
    stream = identify(authenticator, token)
    for breakage in (provider.jwks_file.unlink, lambda: provider.jwks_file.write_text("{")):
        breakage()
        refresh(authenticator)
        assert code_of(authenticator, token) == "identity_unavailable"
        ended = authenticator.ended(stream)
        assert ended
        assert (ended.code, ended.headers) == ("identity_unavailable", [(b"retry-after", b"5")])
        assert identify(authenticator, key).subject == "s@t"
    provider.publish()
    refresh(authenticator)
    assert identify(authenticator, token).subject == "lea@corp"
    authenticator.keys.path.write_text("{")
    authenticator.keys.refresh()
    assert code_of(authenticator, token) == "keys_unreadable", "blocked subjects are unknown"


@pytest.fixture(scope="module")
def corp(tmp_path_factory: pytest.TempPathFactory) -> Provider:
    """The identity provider of `service`."""
    return Provider(tmp_path_factory.mktemp("corp") / "jwks.json")


@pytest.fixture(scope="module")
def service(corp: Provider, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A gateway that accepts the provider's tokens."""
    oidc = corp.settings(leeway_seconds=0)
    with running(tmp_path_factory.mktemp("oidc"), SLOW, identity={"oidc": oidc}) as service:
        yield service


def last_code(service: Service, token: str, meanwhile: Any) -> str:
    """The code of the error that ends a stream."""
    with (
        service.client(token) as client,
        client.stream("POST", "/v1/chat/completions", json=LONG) as stream,
    ):
        meanwhile()
        last = [line for line in stream.iter_lines() if line][-1]
    code: str = json.loads(last.removeprefix("data: "))["error"]["code"]
    return code


def test_a_token_works_through_the_edge_like_a_key(service: Service, corp: Provider, tmp_path: Path) -> None:
    token = corp.token()
    with (
        in_front_of(service.folder / "http.sock", tmp_path / "nginx") as edge,
        edge.client(authorization=f"Bearer {token}") as client,
    ):
        answer = client.get("/generate?prompt=x")
        assert answer.status_code == 200
        changed = token[:-20] + token[-20:-4][::-1] + token[-4:]
        wrong = client.get("/v1/models", headers={"authorization": f"Bearer {changed}"})
        assert error(wrong, 401, "invalid_token")["type"] == "authentication_error"
    eventually("it is logged", lambda: '"llmkeep.identity.kind":"oidc"' in service.logs())
    assert token not in service.logs()


def test_running_streams_end_with_their_token_its_holder_or_its_key(service: Service, corp: Provider) -> None:
    keys = ["--keys-file", str(service.folder / "keys.json")]
    brief = corp.token(exp=int(time.time()) + 3)
    assert last_code(service, brief, lambda: None) == "expired_token"
    blocked = corp.token(sub="eve@corp")
    revoke = ("keys", "revoke", "--subject", "eve@corp", *keys)
    assert last_code(service, blocked, lambda: service.cli(*revoke)) == "revoked_token"

    def withdraw() -> None:
        corp.keys["ec9"] = corp.keys.pop("ec1")
        corp.keys["ec9"] = ec.generate_private_key(ec.SECP256R1()), "ES256"
        corp.publish()

    assert last_code(service, corp.token("ec1"), withdraw) == "revoked_token"
    with service.client(corp.token("ec9")) as client:
        assert client.get("/v1/models").status_code == 200


def test_a_subject_in_two_tenants_shares_no_cached_answer(tmp_path: Path) -> None:
    provider = Provider(tmp_path / "jwks.json")
    redis = RedisServer(tmp_path)
    options = {"url": f"unix://{redis.socket}", "user": "gateway-local", "deadline_ms": 5000}
    secret = {"redis.gateway": PASSWORD}
    options["password_credential"] = "redis.gateway"
    identity = {"oidc": provider.settings()}
    try:
        with running(tmp_path, redis=options, credentials=secret, identity=identity) as service:
            key = service.add_key("lea@corp", "first")["key"]
            eventually("the answer is cached", lambda: ask(service, key)[0] == "hit")
            assert ask(service, provider.token(tenant="first")) == ("hit", "one two")
            assert ask(service, provider.token(tenant="second")) == ("miss", "one two")
            eventually("it is logged", lambda: '"organization.id":"second"' in service.logs())
    finally:
        redis.stop()


def test_a_lost_jwks_is_503_for_tokens_only_and_shows_in_the_metrics(
    service: Service, corp: Provider
) -> None:
    corp.publish()
    eventually("the keys are counted", lambda: service.metrics()["llm_issuer_keys"] == len(corp.keys), 5)
    corp.jwks_file.rename(corp.jwks_file.with_suffix(".away"))
    eventually("the loss is counted", lambda: service.metrics()["llm_issuer_keys"] == -1, 5)
    with service.client(corp.token("rsa1")) as client:
        answer = client.get("/v1/models")
        error(answer, 503, "identity_unavailable")
        assert answer.headers["retry-after"]
    with service.client() as client:
        assert client.get("/v1/models").status_code == 200
        assert client.get("/readyz").status_code == 200
    corp.publish()
    eventually("tokens work again", lambda: service.metrics()["llm_issuer_keys"] == len(corp.keys), 5)


def test_the_check_command_validates_a_jwks(service: Service, corp: Provider, tmp_path: Path) -> None:
    assert service.cli("check", "jwks", str(corp.jwks_file)).returncode == 0
    (tmp_path / "wrong").write_text("{}")
    refused = service.cli("check", "jwks", str(tmp_path / "wrong"))
    assert (refused.returncode, "not a JWKS" in refused.stderr) == (2, True)
