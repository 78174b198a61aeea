"""Redaction: what identifies a person or opens something is in no record, wherever it stands in whichever request."""

import json
import time
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from questions import CHAT
from scripted_opa import ScriptedOpa, answer
from service import running

from llmserve.audit.redact import LONGEST, redact

JWT = "eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOiJhIn0.c2lnbmF0dXJl"
OURS = "llmk_0123456789ab_" + "f" * 48
# Each with the part that must not be recorded.
CANARIES = {
    "4111 1111 1111 1111": "1111 1111",
    "6222021234567890123": "6222021234567890123",
    "+49 170 1234567": "1234567",
    "DE89370400440532013000": "370400440532013000",
    "GB29 NWBK 6016 1331 9268 19": "NWBK 6016",
    "sk-proj-abcdefghijklmnopqrstuvwx": "abcdefghijklmnopqrstuvwx",
    "github_pat_11ABCDEFG0123456789_abcdefgh": "11ABCDEFG0123456789",
    "ada.l@mail.example.org": "ada.l@mail",
    "password=hunter2-and-more": "hunter2-and-more",
    'password: "correct horse"': "correct",
    "密码:hunter2-and-more": "hunter2-and-more",
    "密码\uff1ahunter2-and-more": "hunter2-and-more",
    "Basic YWRhOmh1bnRlcjI=": "YWRhOmh1bnRlcjI",
    "Authorization: Bearer abcdef0123456789": "abcdef0123456789",
    "postgres://app:S3cr3tPass@db": "S3cr3tPass",
    "4111,1111,1111,1111": "1111,1111",
    "4111 - 1111 - 1111 - 1111": "1111 - 1111",
    "4111\u200b1111\u200b1111\u200b1111": "\u200b1111",
    "AIzaSyA1234567890abcdefghijklmnopqrstuv": "1234567890abcdefghij",
    "npm_abcdefghijklmnopqrstuvwxyz0123456789": "abcdefghijklmnop",
    "aws_secret_access_key wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY": "wJalrXUtnFEMI",
    "my password is hunter2-and-more": "hunter2-and-more",
    "Passwort: hunter2-and-more": "hunter2-and-more",
    JWT: "eyJhbGciOiJFUzI1NiJ9",
    OURS: "ffffffff",
}
SEPARATORS = [
    "",
    " ",
    "\n",
    "\r\n",
    "\t",
    "\\n",
    "\\t",
    "\\u000a",
    "\\x0a",
    "%0A",
    "_",
    "-",
    ":",
    "=",
    '"',
    "'",
    "(",
    "卡号",
    "é",
    "\u00a0",
    "\0",
]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("my mail is ada.l@mail.example.org.", "my mail is [address]."),
        ("call +49 170 1234567 now", "call [number] now"),
        ("card 4111 1111 1111 1111", "card [number]"),
        ("id 11010519491231002X", "id [number]"),
        ("pay to DE89370400440532013000 today", "pay to [account] today"),
        (f"key {OURS}", "key [key]"),
        (f"jwt {JWT}", "jwt [token]"),
        ("-----BEGIN PRIVATE KEY-----\nMIIB\n-----END PRIVATE KEY-----", "[private key]"),
        ("use password=hunter2, please", "use password=[secret], please"),
        ("curl -H 'Authorization: Basic YWRhOmh1bnRlcjI='", "curl -H 'Authorization: [credential]'"),
        ("in 2026 we had 12 of 3.14", "in 2026 we had 12 of 3.14"),
        ("PuTTY-User-Key-File-3: ssh-ed25519\nAAAA\nPrivate-MAC: 00ff\nthat was it", "[private key]\nthat was it"),
        ("the password is wrong, the token is long", "the password is wrong, the token is long"),
        ("see 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12", "see 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12"),
        ("http://localhost:8080/a@b and 10:30@noon", "http://localhost:8080/a@b and 10:30@noon"),
        ("a basic understanding of task-oriented risks", "a basic understanding of task-oriented risks"),
        ([{"role": "user", "content": "line\n4111111111111111"}], '[{"role":"user","content":"line\\n[number]"}]'),
    ],
)  # fmt: skip
def test_redaction_removes_what_identifies_or_opens(text: object, kept: str) -> None:
    assert redact(text) == kept


@settings(max_examples=400, deadline=None)
@given(
    canary=st.sampled_from(sorted(CANARIES)),
    separator=st.sampled_from(SEPARATORS),
    before=st.sampled_from(["", "my card", "第一行", "x = 1;", "see https://example.org/?q"]),
    after=st.sampled_from(["", " thanks", "\nnext line", ".", "\\n", '"', "。"]),
    nested=st.sampled_from([0, 1, 2]),
)
def test_no_separator_hides_a_secret(
    canary: str, separator: str, before: str, after: str, nested: int
) -> None:
    text = before + (separator or (" " if before[-1:].isalnum() else "")) + canary + after
    for _ in range(nested):  # as the arguments of a tool's call hold JSON in a string
        text = json.dumps({"arguments": text}, ensure_ascii=False)
    for content in (text, [{"role": "user", "content": text}], {text: [text]}):
        assert CANARIES[canary] not in redact(content)


def test_redaction_of_a_hostile_text_takes_no_time() -> None:
    before = time.thread_time()  # CPU time: the machine may be busy
    for hostile in (
        "1 " * 500_000,
        "a@" * 500_000,
        "-----BEGIN PRIVATE KEY-----" * 50_000,
        "eyJaaaaaaaa." * 90_000,
        "password" * 100_000,
        "DE89" * 200_000,
        "basic " * 100_000,
        "password is " * 50_000,
        "://a:" * 100_000,
        "4 - " * 100_000,
        ["1 "] * 200_000,
        {"a" * 10_000: "b"},
    ):
        assert len(redact(hostile)) <= LONGEST + 5
    assert time.thread_time() - before < 2


def bodies(text: str) -> list[tuple[str, dict[str, Any]]]:
    """A request of every route that carries text, in every form that it takes."""
    parts = [{"type": "text", "text": text}]
    return [
        (CHAT, {"model": "echo", "messages": [{"role": "user", "content": text}]}),
        (
            CHAT,
            {
                "model": "echo",
                "messages": [{"role": "system", "content": "x"}, {"role": "user", "content": parts}],
            },
        ),
        (CHAT, {"model": "echo", "messages": [{"role": "user", "content": text}], "stream": True}),
        ("/v1/completions", {"model": "echo", "prompt": text}),
        ("/generate", {"prompt": text}),
    ]


def test_a_secret_at_the_start_of_a_line_is_in_no_record_of_any_route(tmp_path: Path) -> None:
    opa = ScriptedOpa(tmp_path / "opa.sock")
    opa.server.reply = answer(log_prompt=True)
    with (
        running(tmp_path, policy={"engine": "server", "socket": str(opa.socket)}) as service,
        service.client() as client,
    ):
        text = "first line\n" + "\n".join(CANARIES)
        answers: list[httpx.Response] = [client.get("/generate", params={"prompt": text})]
        for path, body in bodies(text):
            answers.append(client.post(path, json=body))
        assert [each.status_code for each in answers] == [200] * len(answers)
        records = json.dumps(service.records(), ensure_ascii=False)
    opa.stop()
    assert records.count("first line") == len(answers)
    assert [hidden for hidden in CANARIES.values() if hidden in records] == []
