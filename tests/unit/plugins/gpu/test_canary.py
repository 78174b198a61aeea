"""The question to a host's models: what counts as an answer, and when asking again is of no use."""

import json
import signal
import socketserver
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from plugin_modules import load

canary = load("module_utils.gpu.canary")

ROOT = Path(__file__).resolve().parents[4]
CHAT = {"name": "chat", "embeds": False, "socket": None, "http": False, "credential": ""}


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Nothing on the terminal."""

    def address_string(self) -> str:
        return "a socket"

    def do_GET(self) -> None:
        self.send_response(self.server.health)  # type: ignore[attr-defined]
        self.end_headers()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        gateway: Gateway = self.server  # type: ignore[assignment]
        gateway.asked.append((self.path, body))
        gateway.keys.append(self.headers["authorization"])
        answers = gateway.answers.get(self.path, [(404, {})])
        status, answer = answers.pop(0) if len(answers) > 1 else answers[0]
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())


class Gateway(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    health = 200

    def __init__(self, folder: Path) -> None:
        self.folder, self.answers, self.asked = folder, dict[str, Any](), list[tuple[str, Any]]()
        self.keys = list[str]()
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
        gateway.ask(CHAT | {"embeds": embeds})


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
    encoder = CHAT | {"name": "texts", "embeds": True}
    gateway.answers["/v1/embeddings"] = [(200, {"data": [{"embedding": [0.1]}]})]
    gateway.ask(encoder)
    gateway.answers["/v1/embeddings"] = [(200, {"data": [{"embedding": []}]})]
    with pytest.raises(canary.Failed, match="texts at"):
        gateway.ask(encoder)


def test_a_host_whose_gateways_are_gone_has_not_answered(tmp_path: Path) -> None:
    with pytest.raises(canary.Failed, match="has no gateway"):
        canary.answered(tmp_path, [CHAT], "a key", 0)


@pytest.fixture
def engine(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[dict[str, Any], subprocess.Popen[bytes]]]:
    """A model of a host in `engines`, and its engine, `echo` of the payload."""
    folder = tmp_path_factory.mktemp("e")
    place, ready = folder / "chat.sock", folder / "chat.yaml"
    ready.write_text(f"socket: {place}\nmodel: {{driver: echo, token_seconds: 0.1}}\n")
    program = ROOT / "payload/.venv/bin/llm-serve"
    with subprocess.Popen([program, "engine", "--name", "chat", "--config", ready]) as process:
        until(place.exists)
        yield CHAT | {"socket": str(place)}, process
        process.kill()


class Busy:
    """A request for some seconds of answer, as another host's gateway has one."""

    def __init__(self, model: dict[str, Any]) -> None:
        request = {"kind": "generate", "id": 1, "stream": False, "max_tokens": 40, "prompt": "a " * 40}
        self.thread = threading.Thread(
            target=canary.frame_of, args=(Path(model["socket"]), ("done",), request), daemon=True
        )

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.thread.join(60)


def until(holds: Any) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_an_engine_is_asked_at_its_own_socket_without_a_key(engine: Any, tmp_path: Path) -> None:
    canary.answered(tmp_path, [engine[0]], "", 0)


def test_an_engine_that_is_away_has_not_answered(tmp_path: Path) -> None:
    with pytest.raises(canary.Failed, match=r"no answer within 0 s: chat at .*chat\.sock: FileNotFoundError"):
        canary.answered(tmp_path, [CHAT | {"socket": str(tmp_path / "chat.sock")}], "", 0)


def test_a_host_with_engines_alone_is_ready_while_they_take_requests(engine: Any, tmp_path: Path) -> None:
    model, process = engine
    assert canary.is_ready(tmp_path, [model])
    with Busy(model):  # which it finishes once it is told to stop
        until(lambda: canary.beat(model)["requests"])
        process.send_signal(signal.SIGTERM)
        until(lambda: not canary.is_ready(tmp_path, [model]))
    assert not canary.is_ready(tmp_path, [])


def test_a_host_is_quiet_once_its_engines_have_answered(engine: Any, tmp_path: Path) -> None:
    model, _ = engine
    with Busy(model):
        until(lambda: canary.quiet(tmp_path, [model], 0) == 1)
        assert canary.quiet(tmp_path, [model], 60) == 0


def test_a_server_of_openais_api_is_asked_with_its_key(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(canary, "credential", lambda name: f"the key {name}")
    server = CHAT | {"socket": str(gateway.folder / "1.sock"), "http": True, "credential": "vllm.key"}
    gateway.answers["/v1/chat/completions"] = [tokens(3)]
    canary.answered(gateway.folder / "none", [server], "", 0)
    assert gateway.keys == ["Bearer the key vllm.key"]
    assert canary.is_ready(gateway.folder / "none", [server])
    gateway.health = 503
    assert not canary.is_ready(gateway.folder / "none", [server])


def test_a_gateway_that_is_ready_by_another_hosts_engines_does_not_stand_for_its_own(
    gateway: Gateway, tmp_path: Path
) -> None:
    assert canary.is_ready(gateway.folder, [])
    assert not canary.is_ready(gateway.folder, [CHAT | {"socket": str(tmp_path / "chat.sock")}])
