"""The question to a host's models: what counts as an answer, and when asking again is of no use."""

import json
import socketserver
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from plugin_modules import load

canary = load("module_utils.gpu.canary")

CHAT = {"name": "chat", "embeds": False}


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Nothing on the terminal."""

    def address_string(self) -> str:
        return "a socket"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        gateway: Gateway = self.server  # type: ignore[assignment]
        gateway.asked.append((self.path, body))
        answers = gateway.answers.get(self.path, [(404, {})])
        status, answer = answers.pop(0) if len(answers) > 1 else answers[0]
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())


class Gateway(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        self.folder, self.answers, self.asked = folder, dict[str, Any](), list[tuple[str, Any]]()
        super().__init__(str(folder / "1.sock"), Handler)

    def ask(self, model: dict[str, Any] = CHAT, seconds: float = 0) -> None:
        canary.answered(self.folder, [model], "a key", seconds)


@pytest.fixture
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with Gateway(tmp_path_factory.mktemp("g")) as made:
        threading.Thread(target=made.serve_forever, args=(0.02,), daemon=True).start()
        yield made
        made.shutdown()


def tokens(number: int) -> tuple[int, Any]:
    return 200, {"usage": {"completion_tokens": number}}


def test_each_question_is_a_new_one_which_no_cache_knows(gateway: Gateway) -> None:
    gateway.answers["/v1/chat/completions"] = [tokens(3)]
    gateway.ask()
    gateway.ask()
    (_, one), (_, two) = gateway.asked
    assert one["messages"] != two["messages"]


def test_it_waits_for_a_model_that_loads(gateway: Gateway) -> None:
    gateway.answers["/v1/chat/completions"] = [(503, {"error": {"code": "engine_unavailable"}}), tokens(3)]
    gateway.ask(seconds=30)


def test_an_answer_without_tokens_is_none(gateway: Gateway) -> None:
    gateway.answers["/v1/chat/completions"] = [tokens(0)]
    with pytest.raises(canary.Failed, match=r"no answer within 0 s: chat at .*1\.sock: 200"):
        gateway.ask()


@pytest.mark.parametrize("answer", [{}, [], "a word", {"usage": None}, {"usage": {"completion_tokens": "3"}}])
@pytest.mark.parametrize("embeds", [False, True])
def test_an_answer_of_another_form_is_none(gateway: Gateway, answer: Any, embeds: bool) -> None:
    for place in ("/v1/chat/completions", "/v1/embeddings"):
        gateway.answers[place] = [(200, answer)]
    with pytest.raises(canary.Failed, match=r"no answer within 0 s: chat at .*1\.sock: 200"):
        gateway.ask({"name": "chat", "embeds": embeds})


def test_a_refusal_of_another_form_is_told(gateway: Gateway) -> None:
    gateway.answers["/v1/chat/completions"] = [(400, {"error": "no"})]
    with pytest.raises(canary.Failed, match=r"^chat at .*1\.sock: 400"):
        gateway.ask()


def test_a_key_that_is_refused_ends_it_at_once(gateway: Gateway) -> None:
    gateway.answers["/v1/chat/completions"] = [(401, {"error": {"code": "unauthenticated"}})]
    with pytest.raises(canary.Failed, match=r"^chat at .*1\.sock: 401"):
        gateway.ask(seconds=3600)


def test_a_model_without_a_chat_template_is_asked_without_one(gateway: Gateway) -> None:
    gateway.answers["/v1/chat/completions"] = [(400, {"error": {"code": "no_chat_template"}})]
    gateway.answers["/v1/completions"] = [tokens(3)]
    gateway.ask()


def test_an_encoder_has_to_answer_with_a_vector(gateway: Gateway) -> None:
    encoder = {"name": "texts", "embeds": True}
    gateway.answers["/v1/embeddings"] = [(200, {"data": [{"embedding": [0.1]}]})]
    gateway.ask(encoder)
    gateway.answers["/v1/embeddings"] = [(200, {"data": [{"embedding": []}]})]
    with pytest.raises(canary.Failed, match="texts at"):
        gateway.ask(encoder)


def test_a_host_whose_gateways_are_gone_has_not_answered(tmp_path: Path) -> None:
    with pytest.raises(canary.Failed, match="has no gateway"):
        canary.answered(tmp_path, [CHAT], "a key", 0)
