"""When Elasticsearch already has what is declared, and what is said of answers that are none."""

import base64
import copy
from pathlib import Path
from typing import Any

import pytest
from plugin_modules import load

ask = load("module_utils.search.ask")
search_key = load("modules.search_key")
search_settings = load("modules.search_settings")

WANTED: dict[str, Any] = {
    "cluster": ["cluster:monitor/main"],
    "indices": [{"names": ["logs-llmkeep.*-llm1"], "privileges": ["create_doc", "auto_configure"]}],
}


def answered() -> Any:
    """A role as Elasticsearch tells it, with keys of its own."""
    found = copy.deepcopy(WANTED)
    found["indices"][0]["allow_restricted_indices"] = False
    return found | {"applications": [], "run_as": []}


def test_keys_that_elasticsearch_adds_are_no_difference() -> None:
    assert ask.has(answered(), WANTED)


@pytest.mark.parametrize(
    "more",
    [
        {"cluster": ["cluster:monitor/main", "all"]},
        {"indices": [*WANTED["indices"], {"names": ["*"]}]},
        {"cluster": []},
    ],
)
def test_a_role_that_may_more_or_less_is_another_one(more: dict[str, Any]) -> None:
    assert not ask.has(answered() | more, WANTED)


def test_a_document_that_is_not_there_is_not_the_one() -> None:
    assert not ask.has(None, WANTED)


def answers(program: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """A stand-in for elasticsearch-request, which runs SCRIPT: its second argument is the user."""
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(ask, "PROGRAM", str(program))


def test_what_is_no_json_is_refused_with_path_status_and_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers(tmp_path / "request", monkeypatch, "echo '200 <html>a proxy'")
    with pytest.raises(ask.Refused, match="GET /_x: what answered is not Elasticsearch: 200 <html>a proxy"):
        ask.ask("GET", "/_x")


def test_a_document_that_may_not_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers(tmp_path / "request", monkeypatch, """echo '403 {"error": "x"}'""")
    with pytest.raises(
        ask.Refused, match=r'GET /_index_template/x: Elasticsearch answered 403: {"error": "x"}'
    ):
        search_settings.current("_index_template/x")


def test_a_document_of_which_elasticsearch_says_404_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers(tmp_path / "request", monkeypatch, "echo '404 {}'")
    assert search_settings.current("_index_template/x") is None


def test_a_password_that_is_refused_while_elasticsearch_starts_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = tmp_path / "asked"
    answers(
        tmp_path / "request",
        monkeypatch,
        f"echo $2 >> {asked}; [ $(grep -c elastic {asked}) -lt 2 ] && echo '401 {{}}' || echo '200 {{}}'",
    )
    assert search_settings.retire_the_first_password(check=False) == []
    assert asked.read_text().split() == ["elastic", "bootstrap", "elastic"]


def test_a_superuser_with_neither_password_is_refused_and_both_credentials_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers(tmp_path / "request", monkeypatch, "echo '401 {}'")
    monkeypatch.setattr(search_settings, "SECONDS", 0)
    with pytest.raises(ask.Refused, match=r"elasticsearch\.elastic and elasticsearch\.bootstrap of /etc"):
        search_settings.retire_the_first_password(check=False)


TOKEN = base64.b64encode(b"\0\1\0\1elastic/kibana/kibana-llm1_0a1b2c3d:secret").rstrip(b"=")


@pytest.mark.parametrize(("secret", "name"), [(TOKEN, "kibana-llm1_0a1b2c3d"), (b"id:key", ""), (b"", "")])
def test_the_name_of_a_token_is_in_it(secret: bytes, name: str) -> None:
    assert search_key.token_name(secret) == name


@pytest.mark.parametrize(
    ("there", "held", "asked"),
    [
        ([], "", ["POST"]),
        (["kibana-llm1_0a1b2c3d", "kibana-llm2_00000000"], "kibana-llm1_0a1b2c3d", []),
        (["kibana-llm1_0a1b2c3d"], "", ["POST", "DELETE kibana-llm1_0a1b2c3d"]),
        (
            ["kibana-llm1_0a1b2c3d", "kibana-llm1_ffffffff"],
            "kibana-llm1_0a1b2c3d",
            ["DELETE kibana-llm1_ffffffff"],
        ),
    ],
)
def test_one_token_is_valid_the_one_that_is_held(
    monkeypatch: pytest.MonkeyPatch, there: list[str], held: str, asked: list[str]
) -> None:
    done: list[str] = []

    def do(method: str, path: str) -> Any:
        if method == "GET":
            return {"tokens": {name: {} for name in there}}
        done.append("POST" if method == "POST" else f"{method} {path.rpartition('/')[2]}")
        return {"token": {"value": "new"}}

    monkeypatch.setattr(search_key.ask, "do", do)
    monkeypatch.setattr(
        search_key.sealing, "encrypted_to", lambda _certificate, secret: f"sealed {secret.decode()}"
    )
    holder = {"token": held, "certificate": "PEM"}
    changed, cms = search_key.issued_token("elastic/kibana", "kibana-llm1", holder, check=False)
    assert (done, changed, cms) == (asked, bool(asked), "sealed new" if "POST" in asked else "")
    done.clear()
    assert search_key.issued_token("elastic/kibana", "kibana-llm1", holder, check=True) == (bool(asked), "")
    assert done == []
