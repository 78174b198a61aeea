"""Engines that are servers of OpenAI's API: another gateway of ours, and a scripted one that misbehaves."""

import json
import re
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
from edge import authority, issue, revoke
from questions import error
from redis_server import PASSWORD, RedisServer
from scripted_upstream import END, USAGE, Script, ScriptedUpstream, answer, chunk, delta, stream
from service import PATIENCE, Service, events, eventually, running

from llmcore.config import ConfigError, load
from llmserve.settings import GatewayConfig

CHAT = "/v1/chat/completions"
WORDS = " ".join(f"word{number}" for number in range(100))
TOOLS = [{"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}]


def remote(upstream: Service, **more: Any) -> dict[str, Any]:
    """The configuration of `upstream` as a remote engine."""
    return {"socket": str(upstream.folder / "http.sock"), "key_credential": "upstream.key", **more}


def asking(**change: Any) -> dict[str, Any]:
    """A request for the model of the scripted server."""
    return {"model": "m", "messages": [{"role": "user", "content": "hello you"}], **change}


def tokens_of(record: dict[str, Any]) -> tuple[int | None, int | None]:
    """Tokens of prompt and answer, as in an audit record."""
    return record.get("gen_ai.usage.input_tokens"), record.get("gen_ai.usage.output_tokens")


ANSWERED = {
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "yes"}}],
    "usage": {"prompt_tokens": 5, "completion_tokens": 1},
}


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Another gateway of ours, whose engine takes 10 ms per token."""
    models = {"echo": {"driver": "echo", "token_seconds": 0.01}}
    with running(tmp_path_factory.mktemp("upstream"), models) as service:
        yield service


@pytest.fixture(scope="module")
def front(upstream: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A gateway whose only engine is `upstream`."""
    remotes = {"echo": remote(upstream, fields=["seed"])}
    keys = {"upstream.key": upstream.key}
    with running(tmp_path_factory.mktemp("front"), {}, remotes=remotes, credentials=keys) as service:
        yield service


@pytest.fixture
def client(front: Service) -> Iterator[httpx.Client]:
    with front.client() as client:
        yield client


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ScriptedUpstream, Service]]:
    """A scripted server, and a gateway in front of it."""
    folder = tmp_path_factory.mktemp("played")
    server = ScriptedUpstream(folder / "upstream.sock")
    described = {"socket": str(folder / "upstream.sock"), "revision": "7", "fields": ["tools", "seed", "n"]}
    with running(folder, {}, remotes={"m": described}) as service:
        yield server, service
    server.stop()


def test_the_official_client_chats_streams_and_completes_through_two_gateways(front: Service) -> None:
    transport = httpx.HTTPTransport(uds=str(front.folder / "http.sock"))
    with openai.OpenAI(
        api_key=front.key,
        base_url="http://llm/v1",
        http_client=openai.DefaultHttpxClient(transport=transport),
    ) as client:
        messages: Any = [{"role": "user", "content": "one two three"}]
        whole = client.chat.completions.create(model="echo", messages=messages)
        assert whole.choices[0].message.content == "one two three"
        assert whole.system_fingerprint == "fp_echo-1"
        pieces = list(client.chat.completions.create(model="echo", messages=messages, stream=True))
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == "one two three"
        plain = client.completions.create(model="echo", prompt="four five", max_tokens=1)
        assert (plain.choices[0].text, plain.choices[0].finish_reason) == ("four ", "length")
        assert [model.id for model in client.models.list()] == ["echo"]


def test_generate_keeps_its_own_format_with_a_remote_engine(client: httpx.Client) -> None:
    whole = client.get("/generate", params={"prompt": "one two three", "max_tokens": 2}).json()
    assert whole["response"] == "one two "
    assert whole["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    with client.stream("POST", "/generate", json={"prompt": "one two", "stream": True}) as got:
        *pieces, last, end = events(got)
    assert [piece["response"] for piece in pieces] == ["one ", "two"]
    assert (last["model"], last["usage"]["total_tokens"], end) == ("echo", 4, "[DONE]")


@pytest.mark.parametrize("usage", [True, False])
def test_a_stream_passes_through_unchanged_with_usage_only_on_request(
    played: tuple[ScriptedUpstream, Service], usage: bool
) -> None:
    server, service = played
    pieces = [b": a comment\n\n", delta("h\u00e9"), delta("llo") + delta(" you"), delta("", "stop")]
    odd = b'data:{"choices": [{"delta": {}, "vendor": 1}]}\r\n\r\n'
    server.script = stream(*pieces, odd, USAGE[:20], USAGE[20:], END)
    body = asking(stream=True, **({"stream_options": {"include_usage": True}} if usage else {}))
    with service.client() as client:
        got = client.post(CHAT, json=body)
    assert got.content == b"".join(pieces) + odd + (USAGE if usage else b"") + END
    assert got.headers["x-llm-model"] == "m"
    assert server.requests[-1]["stream_options"] == {"include_usage": True}
    eventually("the outcome has the tokens", lambda: tokens_of(service.records()[-1]) == (3, 2))


@pytest.mark.parametrize("streaming", [True, False])
def test_answers_in_succession_share_a_connection_to_the_upstream(tmp_path: Path, streaming: bool) -> None:
    server = ScriptedUpstream(tmp_path / "upstream.sock")
    server.reuse = True
    server.script = stream(delta("hi"), USAGE, END, 0.02) if streaming else answer(ANSWERED)
    remotes = {"m": {"socket": str(tmp_path / "upstream.sock"), "revision": "7"}}
    with running(tmp_path, {}, remotes=remotes) as service, service.client() as client:
        before = server.connections
        for _ in range(10):
            assert client.post(CHAT, json=asking(stream=streaming)).status_code == 200
            time.sleep(0.05)
        assert server.connections - before <= 2, "one that was idle, and a probe"
    server.stop()


def test_events_that_arrive_byte_by_byte_or_all_at_once_pass_through_unchanged(
    played: tuple[ScriptedUpstream, Service],
) -> None:
    server, service = played
    content = b": hi\r\n\r\n" + delta("h\u00e9") + delta("llo").replace(b"\n", b"\r\n") + delta("", "stop")
    for pieces in [content], [content[at : at + 1] for at in range(len(content))]:
        server.script = stream(*pieces, USAGE, END)
        with service.client() as client:
            assert client.post(CHAT, json=asking(stream=True)).content == content + END


def test_a_whole_answer_passes_through_with_unknown_fields(
    played: tuple[ScriptedUpstream, Service],
) -> None:
    server, service = played
    choice = {
        "index": 0,
        "finish_reason": "tool_calls",
        "message": {"content": None, "tool_calls": [{"id": "c"}]},
    }
    body = json.dumps({"choices": [choice], "usage": {"prompt_tokens": 5, "completion_tokens": 1}, "odd": 1})
    server.script = answer(body.encode())
    with service.client() as client:
        got = client.post(CHAT, json=asking(tools=TOOLS, seed=5, temperature=0))
    assert got.text == body
    assert got.headers["x-llm-cache"] == "bypass"
    assert server.requests[-1]["tools"] == TOOLS
    assert (server.requests[-1]["seed"], server.requests[-1]["temperature"]) == (5, 0)


CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "type": "function", "function": {}}]}
RESULT = {"role": "tool", "tool_call_id": "c", "content": "noon"}


def test_a_conversation_with_tool_calls_reaches_an_upstream_that_supports_them(
    played: tuple[ScriptedUpstream, Service], echo: Service
) -> None:
    server, service = played
    server.script = stream(delta("noon"), delta("", "stop"), USAGE, END)
    messages = [{"role": "user", "content": "when?"}, CALL, RESULT]
    with service.client() as client:
        client.post(CHAT, json=asking(messages=messages, tools=TOOLS, stream=True))
        assert server.requests[-1]["messages"] == messages
        client.post(CHAT, json=asking(messages=messages, stream=True))
        assert server.requests[-1]["messages"] == messages
        for wrong in {**RESULT, "role": "user"}, {**CALL, "role": "user"}, {"role": "user", "content": None}:
            error(client.post(CHAT, json=asking(messages=[wrong], tools=TOOLS)), 400, "invalid_value")
    with echo.client() as client:
        refused = client.post(CHAT, json={"model": "echo", "messages": messages, "tools": TOOLS})
        error(refused, 400, "unsupported_field")


def test_a_client_that_pauses_gets_all_events_in_their_order(
    played: tuple[ScriptedUpstream, Service],
) -> None:
    server, service = played
    words = [f"{number} {'x' * 300}" for number in range(2000)]  # more than sockets and buffers hold
    later = [each for number in range(2000, 2050) for each in (0.005, delta(f"{number}"))]
    server.script = stream(*map(delta, words), *later, delta("", "stop"), USAGE, END)
    with service.client() as client, client.stream("POST", CHAT, json=asking(stream=True)) as got:
        time.sleep(0.3)
        *pieces, _, end = events(got)
    texts = [piece["choices"][0]["delta"]["content"] for piece in pieces]
    assert [text.split()[0] for text in texts] == [str(number) for number in range(2050)]
    assert end == "[DONE]"


def test_an_undeclared_field_is_refused_by_name_without_contacting_the_upstream(
    played: tuple[ScriptedUpstream, Service],
) -> None:
    server, service = played
    before = len(server.requests)
    with service.client() as client:
        refused = error(client.post(CHAT, json=asking(logprobs=True)), 400, "unsupported_field")
    assert refused["param"] == "logprobs"
    assert len(server.requests) == before


BAD = delta("hello") + b"data: {not json\n\n"
LINE = b"data: " + b"x" * 2_000_000
BROKEN: dict[str, Script] = {
    "cut in the middle": stream(delta("hello"), b"data: {", whole=False),
    "ended without [DONE]": stream(delta("hello"), delta("", "stop"), USAGE),
    "bad JSON": stream(BAD, END),
    "a huge event": stream(delta("hello"), LINE, END),
    "an error in the stream": stream(delta("hello"), chunk({"error": {"message": "CUDA out of memory"}})),
    "no usage": stream(delta("hello"), delta("", "stop"), END),
    "no HTTP after the head": [*stream(delta("hello"), whole=False), 0.2, b"zzz\r\n"],
}


@pytest.mark.parametrize("script", BROKEN.values(), ids=BROKEN)
def test_a_broken_stream_ends_with_an_error_event_and_no_done(
    played: tuple[ScriptedUpstream, Service], script: Script
) -> None:
    server, service = played
    server.script = script
    with service.client() as client, client.stream("POST", CHAT, json=asking(stream=True)) as got:
        *pieces, last = events(got)
    assert pieces[0]["choices"][0]["delta"]["content"] == "hello"
    assert last["error"]["code"] in {"engine_lost", "engine_failed"}
    assert "CUDA" not in json.dumps(last)


REFUSED: dict[str, tuple[Script, int, str]] = {
    "500": (answer({"error": {"message": "Traceback"}}, 500), 503, "engine_failed"),
    "401": (answer({"error": {"message": "bad key"}}, 401), 503, "engine_failed"),
    "redirect": ([b"HTTP/1.1 302 X\r\nlocation: http://elsewhere/\r\ncontent-length: 0\r\n\r\n"], 503, "engine_failed"),
    "429": (answer({"error": {"message": "busy"}}, 429), 503, "overloaded"),
    "hangs up": ([], 503, "engine_lost"),
    "no HTTP": ([b"SSH-2.0-x\r\n\r\n"], 503, "engine_failed"),
    "endless headers": ([b"HTTP/1.1 200 OK\r\nx: " + b"y" * 200_000], 503, "engine_failed"),
    "no JSON": (answer(b"<html>"), 503, "engine_failed"),
    "no choices": (answer({"usage": {"prompt_tokens": 1, "completion_tokens": 1}}), 503, "engine_failed"),
    "no answer": ([5.0], 503, "deadline_exceeded"),
    "its own 400": (
        answer({"error": {"message": "tools: bad", "code": "made_up_xyz", "param": "tools"}}, 400), 400, "engine_refused"
    ),
    "vLLM's long prompt": (
        answer({"error": {"message": "This model's maximum context length is 9", "code": 400}}, 400),
        400, "context_length_exceeded",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("script", "status", "code"), REFUSED.values(), ids=REFUSED)
def test_an_invalid_answer_has_a_documented_status(
    played: tuple[ScriptedUpstream, Service], script: Script, status: int, code: str
) -> None:
    server, service = played
    server.script = script
    hasty = {"x-llm-deadline-ms": "1000"} if code == "deadline_exceeded" else {}
    with service.client() as client:
        before = time.monotonic()
        refused = error(client.post(CHAT, json=asking(max_tokens=9), headers=hasty), status, code)
    assert time.monotonic() - before < PATIENCE
    assert "Traceback" not in refused["message"]
    assert "bad key" not in refused["message"]
    if code == "engine_refused":
        assert (refused["message"], refused["param"]) == ("tools: bad", "tools")
    assert 'llm_rejected_total{code="made_up_xyz"}' not in service.metrics()


def test_a_disconnected_client_disconnects_the_upstream(played: tuple[ScriptedUpstream, Service]) -> None:
    server, service = played
    server.hung_up.clear()
    server.script = stream(*[each for _ in range(2000) for each in (delta("word "), 0.05)])
    with service.client() as client, client.stream("POST", CHAT, json=asking(stream=True)) as got:
        next(got.iter_lines())
    assert server.hung_up.wait(PATIENCE)
    eventually("the slot is free", lambda: service.metrics()['llm_requests_running{model="m"}'] == 0)


@pytest.mark.parametrize("streaming", [True, False])
def test_a_disconnected_client_frees_the_upstreams_engine_too(
    upstream: Service, front: Service, streaming: bool
) -> None:
    body = {"model": "echo", "messages": [{"role": "user", "content": WORDS * 5}], "stream": streaming}
    running_now = 'llm_requests_running{model="echo"}'
    with front.client() as client:
        if streaming:
            with client.stream("POST", CHAT, json=body) as got:
                next(got.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(CHAT, json=body, timeout=0.3)
    eventually("the slot is free", lambda: front.metrics()[running_now] == 0, 3)
    eventually("the engine is idle", lambda: upstream.metrics()[running_now] == 0, 3)


def test_a_dead_upstream_is_a_503_and_is_found_again(tmp_path: Path) -> None:
    server = ScriptedUpstream(tmp_path / "upstream.sock")
    described = {"socket": str(tmp_path / "upstream.sock"), "revision": "7"}
    with running(tmp_path, {}, remotes={"m": described}) as service, service.client() as client:
        assert client.get("/v1/models/m").json()["context"] == 4096
        server.stop()
        eventually("it is noticed", lambda: client.get("/readyz").status_code == 503, 3)
        error(client.post(CHAT, json=asking()), 503, "engine_unavailable")
        (tmp_path / "upstream.sock").unlink()
        server = ScriptedUpstream(tmp_path / "upstream.sock")
        eventually("it is found", lambda: client.get("/readyz").status_code == 200, 5)
        server.script = stream(delta("word"), 30.0)
        with client.stream("POST", CHAT, json=asking(stream=True)) as got:
            lines = got.iter_lines()
            next(lines)
            server.stop()
            assert "engine_lost" in "".join(lines)


def test_an_upstream_with_another_model_or_no_revision_is_never_used(tmp_path: Path) -> None:
    server = ScriptedUpstream(tmp_path / "upstream.sock")
    remotes = {
        "other": {"socket": str(tmp_path / "upstream.sock"), "revision": "7"},
        "m": {"socket": str(tmp_path / "upstream.sock")},
    }
    with running(tmp_path, {}, remotes=remotes) as service, service.client() as client:
        error(client.post(CHAT, json=asking(model="other")), 503, "engine_unavailable")
        error(client.post(CHAT, json=asking()), 503, "engine_unavailable")
        assert "does not list the model 'other'" in service.logs()
        assert "set 'revision'" in service.logs()
    server.stop()


@pytest.mark.parametrize(("cache", "results"), [(True, ["miss", "hit"]), (False, ["bypass", "bypass"])])
def test_greedy_answers_of_an_upstream_are_cached_only_if_configured(
    tmp_path: Path, redis_server: RedisServer, cache: bool, results: list[str]
) -> None:
    server = ScriptedUpstream(tmp_path / "upstream.sock")
    described = {"socket": str(tmp_path / "upstream.sock"), "revision": str(tmp_path), "fields": ["tools"]}
    redis = {
        "url": f"unix://{redis_server.socket}",
        "user": "gateway-local",
        "password_credential": "redis.gateway",
    }
    options: dict[str, Any] = {
        "remotes": {"m": {**described, "cache": cache}},
        "redis": {**redis, "deadline_ms": 5000},
        "credentials": {"redis.gateway": PASSWORD},
    }
    with running(tmp_path, {}, **options) as service, service.client() as client:
        for result in results:
            server.script = stream(delta("hi"), delta(" you"), delta("", "stop"), USAGE, END)
            answer = client.post(CHAT, json=asking(temperature=0, stream=True))
            assert answer.headers["x-llm-cache"] == result
            chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
            assert "".join(each["choices"][0]["delta"].get("content", "") for each in chunks) == "hi you"
            assert answer.content.endswith(END)
        tools = client.post(CHAT, json=asking(temperature=0, tools=TOOLS, stream=True))
        assert tools.headers["x-llm-cache"] == "bypass"
    server.stop()


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CAs for servers and for clients, and a certificate of each."""
    folder = tmp_path_factory.mktemp("certificates")
    issue(authority(folder, "servers"), "server")
    issue(authority(folder, "clients"), "gateway")
    return folder


def tls_server(folder: Path) -> ssl.SSLContext:
    """A scripted server that requires a client certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem", folder / "server.key")
    context.load_verify_locations(folder / "clients.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    return context


def over_tls(server: ScriptedUpstream, folder: Path, **change: str) -> dict[str, Any]:
    """The configuration of a scripted server behind TLS."""
    names = {"ca": "servers.pem", "certificate": "gateway.pem", "key": "gateway.key", **change}
    tls = {name: str(folder / file) for name, file in names.items()}
    return {"url": f"https://localhost:{server.port}", "tls": tls, "revision": "7"}


def test_requests_and_answers_pass_over_mutual_tls(certificates: Path, tmp_path: Path) -> None:
    server = ScriptedUpstream(tls=tls_server(certificates))
    server.script = stream(delta("hello"), delta("", "stop"), USAGE, END)
    remotes = {"m": over_tls(server, certificates)}
    with running(tmp_path, {}, remotes=remotes) as service, service.client() as client:
        eventually("it is found", lambda: client.get("/readyz").status_code == 200, 5)
        assert client.post(CHAT, json=asking(stream=True)).content.endswith(END)
    server.stop()


@pytest.mark.parametrize("wrong", ["old protocol", "foreign server", "certificate of nobody"])
def test_an_upstream_with_old_or_foreign_tls_is_not_used(
    certificates: Path, tmp_path: Path, wrong: str
) -> None:
    context = tls_server(certificates)
    change = {}
    if wrong == "old protocol":
        context.maximum_version = ssl.TLSVersion.TLSv1_2
    elif wrong == "foreign server":
        change = {"ca": "clients.pem"}
    else:
        change = {"certificate": "server.pem", "key": "server.key"}
    server = ScriptedUpstream(tls=context)
    server.script = stream(delta("hello"), delta("", "stop"), USAGE, END)
    remotes = {"m": over_tls(server, certificates, **change)}
    with running(tmp_path, {}, remotes=remotes) as service, service.client() as client:
        error(client.post(CHAT, json=asking()), 503, "engine_unavailable")
    assert server.requests == []
    server.stop()


def test_an_upstream_whose_certificate_is_revoked_is_used_no_more(tmp_path: Path) -> None:
    ca = authority(tmp_path, "servers")
    issue(ca, "server")
    issue(authority(tmp_path, "clients"), "gateway")
    server = ScriptedUpstream(tls=tls_server(tmp_path))
    server.script = stream(delta("hello"), delta("", "stop"), USAGE, END)
    remotes = {"m": over_tls(server, tmp_path, crl=revoke(ca).name)}
    with running(tmp_path, {}, remotes=remotes) as service, service.client() as client:
        eventually("it is found", lambda: client.get("/readyz").status_code == 200, 5)
        revoke(ca, tmp_path / "server.pem")
        eventually("it is refused", lambda: "certificate revoked" in service.logs(), 30)
        error(client.post(CHAT, json=asking()), 503, "engine_unavailable")
    server.stop()


def test_no_upstream_is_used_by_a_revocation_list_that_has_expired(tmp_path: Path) -> None:
    ca = authority(tmp_path, "servers")
    issue(ca, "server")
    issue(authority(tmp_path, "clients"), "gateway")
    server = ScriptedUpstream(tls=tls_server(tmp_path))
    remotes = {"m": over_tls(server, tmp_path, crl=revoke(ca, days=-1).name)}
    with running(tmp_path, {}, remotes=remotes) as service, service.client() as client:
        error(client.post(CHAT, json=asking()), 503, "engine_unavailable")
        assert "CRL has expired" in service.logs()
    assert server.requests == []
    server.stop()


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ("{remote: {url: 'http://gpu1:8000'}}", "in clear"),
        ("{remote: {url: 'https://gpu1:8000'}}", "needs 'tls'"),
        ("{remote: {revision: x}}", "there is no instance"),
        ("{remote: {socket: /run/x, fields: [teleport]}}", "teleport"),
        ("{socket: /run/x, remote: {socket: /run/y}}", "either 'socket'"),
        ("{remote: {url: 'https://user:word@gpu1'}}", "match pattern"),
    ],
)
def test_an_upstream_in_clear_text_is_refused_before_anything_starts(
    tmp_path: Path, engine: str, message: str
) -> None:
    file = tmp_path / "gateway.yaml"
    file.write_text(f"listen: {{port: 0}}\nmetrics: {{port: 0}}\nkeys_file: /k\nengines: {{m: {engine}}}\n")
    with pytest.raises(ConfigError, match=message):
        load(file, GatewayConfig)


def test_the_fields_that_vllm_describes_are_those_that_it_is_sent(tmp_path: Path) -> None:
    bodies: dict[str, Any] = {
        "ChatCompletionRequest": {"properties": {"messages": {}, "tools": {}, "n": {}, "cache_salt": {}}},
        "CompletionRequest": {"properties": {"prompt": {}, "suffix": {}}},
    }
    server = ScriptedUpstream(tmp_path / "upstream.sock")
    server.described = answer({"openapi": "3.1.0", "components": {"schemas": bodies}})
    server.script = answer(ANSWERED)
    remotes = {"m": {"socket": str(tmp_path / "upstream.sock"), "revision": "7"}}
    with running(tmp_path, {}, remotes=remotes) as service, service.client() as client:
        assert client.post(CHAT, json=asking(n=2)).status_code == 200
        assert server.requests[-1]["n"] == 2
        refused = error(client.post(CHAT, json=asking(top_k=5)), 400, "unsupported_field")
        assert refused["message"] == "unsupported by the model 'm': 'top_k'; remove it from the request"
        error(client.post(CHAT, json=asking(cache_salt="x")), 400, "unsupported_field")
    server.stop()


SALTED = answer(
    {"components": {"schemas": {"ChatCompletionRequest": {"properties": {"cache_salt": {}, "n": {}}}}}}
)


@pytest.mark.parametrize("fields", [None, ["n"]])
def test_each_tenant_has_a_salt_of_its_own_in_the_cache_of_a_server(
    tmp_path: Path, fields: list[str] | None
) -> None:
    server = ScriptedUpstream(tmp_path / "upstream.sock")
    server.described, server.script = SALTED, answer(ANSWERED)
    remotes = {"m": {"socket": str(tmp_path / "upstream.sock"), "revision": "7", "fields": fields}}

    def salt(client: httpx.Client) -> str:
        assert client.post(CHAT, json=asking()).status_code == 200
        return str(server.requests[-1]["cache_salt"])

    with running(tmp_path, {}, remotes=remotes) as service, service.client() as client:
        salts = [salt(client) for _ in range(2)]
        with service.client(service.add_key("bob", "research")["key"]) as colleague:
            salts.append(salt(colleague))
        with service.client(service.add_key("eve", "sales")["key"]) as other:
            assert salt(other) not in salts
    assert len(set(salts)) == 1
    assert re.fullmatch("[0-9a-f]{64}", salts[0])
    server.stop()


def test_a_server_gets_no_prompt_before_it_said_whether_it_takes_a_salt(tmp_path: Path) -> None:
    server = ScriptedUpstream(tmp_path / "upstream.sock")
    server.described, server.script = answer({}, 500), answer(ANSWERED)
    remotes = {"m": {"socket": str(tmp_path / "upstream.sock"), "revision": "7"}}
    with running(tmp_path, {}, remotes=remotes) as service, service.client() as client:
        error(client.post(CHAT, json=asking()), 503, "engine_unavailable")
        server.described = SALTED
        eventually("it is asked again", lambda: client.post(CHAT, json=asking()).status_code == 200)
        assert [*filter(lambda request: "cache_salt" not in request, server.requests)] == []
    server.stop()


@pytest.mark.parametrize("described", [b"", b"[]", b'{"components": {"schemas": []}}', b"[" * 100_000, None])
def test_a_server_that_describes_nothing_is_sent_no_optional_field(
    tmp_path: Path, described: bytes | None
) -> None:
    server = ScriptedUpstream(tmp_path / "upstream.sock")
    server.described = answer({"detail": "Not Found"}, 404) if described is None else answer(described)
    server.script = answer(ANSWERED)
    remotes = {"m": {"socket": str(tmp_path / "upstream.sock"), "revision": "7"}}
    with running(tmp_path, {}, remotes=remotes) as service, service.client() as client:
        assert client.post(CHAT, json=asking()).status_code == 200
        error(client.post(CHAT, json=asking(n=2)), 400, "unsupported_field")
    server.stop()
