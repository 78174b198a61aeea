"""Passes of the page: for whom they stand, and when they do not; without a gateway."""

from dataclasses import asdict
from pathlib import Path

import jwt
import pytest

from llmserve.access import passes
from llmserve.access.api_keys import KeyTable, edited, new_key
from llmserve.access.identity import Authenticator
from llmserve.access.oidc import Token
from llmserve.access.passes import PREFIX, Passes
from llmserve.api.errors import ApiError

PEPPER = b"a pepper for tests"
TOKEN = Token("t1", "lea@corp", "corp", ("developers",), 0.0, 2.0**33, "thumbprint")


@pytest.fixture
def authenticator(tmp_path: Path) -> Authenticator:
    return Authenticator(KeyTable(tmp_path / "keys.json", PEPPER))


def code(authenticator: Authenticator, text: str) -> str:
    with pytest.raises(ApiError) as caught:
        authenticator.identify([(b"authorization", f"Bearer {text}".encode())])
    assert caught.value.status == 401
    return caught.value.code


def test_a_pass_stands_for_a_record_that_has_just_been_added(authenticator: Authenticator) -> None:
    with edited(authenticator.keys.path) as records:
        _, record = new_key(PEPPER, "ada", "research", ["developer"], None)
        records.append(record)
    text = Passes(PEPPER).issue(record.id)
    identity = authenticator.identify([(b"authorization", f"Bearer {text}".encode())])
    assert (identity.subject, identity.id, identity.kind) == ("ada", record.id, "api_key")


def test_a_pass_of_a_record_that_is_gone_is_refused(authenticator: Authenticator) -> None:
    assert code(authenticator, Passes(PEPPER).issue("000000000000")) == "revoked_key"


def test_a_pass_holds_for_seconds(authenticator: Authenticator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "PASS_SECONDS", -1)
    assert code(authenticator, Passes(PEPPER).issue("000000000000")) == "invalid_pass"


def test_a_pass_by_another_pepper_or_without_an_end_is_refused(authenticator: Authenticator) -> None:
    assert code(authenticator, Passes(b"another pepper, also for tests").issue("0")) == "invalid_pass"
    endless = jwt.encode({"sub": "0"}, authenticator.passes.key, "HS256")
    assert code(authenticator, f"{PREFIX}{endless}") == "invalid_pass"


def test_what_a_token_said_comes_back_as_it_was() -> None:
    assert Passes(PEPPER).holder(Passes(PEPPER).issue(TOKEN)) == TOKEN
    assert asdict(TOKEN)["groups"] == ("developers",)


def test_a_gateway_without_an_identity_provider_takes_no_pass_of_a_token(
    authenticator: Authenticator,
) -> None:
    """Its keys would not have verified the token."""
    assert code(authenticator, Passes(PEPPER).issue(TOKEN)) == "revoked_key"


def test_a_pass_of_a_page_of_another_release_is_refused(authenticator: Authenticator) -> None:
    later = {"token": asdict(TOKEN) | {"more": 1}, "exp": 2**33}
    other = jwt.encode(later, authenticator.passes.key, "HS256")
    assert code(authenticator, f"{PREFIX}{other}") == "invalid_pass"
