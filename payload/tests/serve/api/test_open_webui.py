"""Requests as Open WebUI builds them, after its source, replayed; the program itself does not run here."""

import json
from typing import Any

import httpx2 as httpx
import pytest

# With ENABLE_FORWARD_USER_INFO_HEADERS; the gateway knows its caller by the key alone.
HEADERS = {
    "content-type": "application/json",
    "x-openwebui-user-name": "Mallory",
    "x-openwebui-user-id": "0f3c",
    "x-openwebui-user-email": "mallory@example.org",
    "x-openwebui-user-role": "admin",
}
QUESTION = {"role": "user", "content": "the quick brown fox"}


def test_the_models_are_listed_when_a_connection_is_verified(client: httpx.Client) -> None:
    listed = client.get("/v1/models", headers=HEADERS).json()
    assert listed["object"] == "list"
    assert [(each["id"], each["object"]) for each in listed["data"]] == [("echo", "model")]


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"stream_options": {"include_usage": True}},
        {"temperature": 0.8, "top_p": 0.9, "max_tokens": 128, "seed": 0, "stop": ["###"]},
        {"max_completion_tokens": 128},
    ],
)
def test_a_chat_is_streamed(client: httpx.Client, more: dict[str, Any]) -> None:
    system = {"role": "system", "content": "Answer briefly."}
    messages = [system, QUESTION, {"role": "assistant", "content": "It jumps."}, QUESTION]
    body = {"stream": True, "model": "echo", "messages": messages, **more}
    answer = client.post("/v1/chat/completions", json=body, headers=HEADERS)
    assert answer.status_code == 200, answer.text
    # It asks the content type whether it was given a stream.
    assert "text/event-stream" in answer.headers["content-type"]
    *events, end, _ = answer.text.split("\n\n")
    assert end == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    said = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks if chunk["choices"]]
    assert "".join(said) == QUESTION["content"]
    assert ("usage" in chunks[-1] and not chunks[-1]["choices"]) == ("stream_options" in more)


def test_titles_and_tags_are_asked_for_without_a_stream(client: httpx.Client) -> None:
    task = {
        "role": "user",
        "content": '### Task:\nGenerate a title.\n### Output:\nJSON format: {"title": "…"}',
    }
    for more in ({}, {"max_completion_tokens": 1000}, {"max_tokens": 1000}):
        body = {"model": "echo", "messages": [task], "stream": False, **more}
        answer = client.post("/v1/chat/completions", json=body, headers=HEADERS)
        assert answer.json()["choices"][0]["message"]["content"] == task["content"]


def test_a_picture_is_refused_by_name(client: httpx.Client) -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
    content = [{"type": "text", "text": "What is this?"}, picture]
    body = {"model": "echo", "messages": [{"role": "user", "content": content}], "stream": True}
    answer = client.post("/v1/chat/completions", json=body, headers=HEADERS)
    assert answer.status_code == 400
    assert "messages" in answer.json()["error"]["param"]


def test_a_refusal_is_shown_by_its_detail(client: httpx.Client) -> None:
    """It shows `error.message` where there is one."""
    body = {"model": "gone", "messages": [QUESTION], "stream": True}
    answer = client.post("/v1/chat/completions", json=body, headers=HEADERS)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    assert "there is no model 'gone'" in answer.json()["error"]["message"]
