"""The contract of all drivers. A new one joins by a line in DRIVERS."""

import json
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import httpx2 as httpx
import openai
import pytest
from bare_gateway import Gateway
from pydantic import BaseModel
from questions import error
from service import Service, events, eventually, running
from tiny import make_deepseek, make_model, make_reciter
from vllm_server import PYTHON, VllmServer

from llmcore.manifest import write_manifest
from llmserve.fields import PASSED
from llmserve.protocol import Cancel, Delta, Done, Generate

torch = pytest.importorskip("torch", reason="Debian's python3-torch is not installed")
CHAT = "/v1/chat/completions"
RECITED = "東京😀!"
MESSAGES = [{"role": "user", "content": "Über 東京, what is the capital of France, and what of you?"}]
LONG = [{"role": "user", "content": "word " * 100}]  # echo repeats it, within a second
QUESTION = {"model": "random", "messages": MESSAGES, "temperature": 0, "max_tokens": 12}


def local(driver: str, model: Path) -> dict[str, Any]:
    """A local model in an engine's configuration, in fp32."""
    manifest = model.parent / f"{model.name}.sha256"
    write_manifest(model, manifest)
    return {"driver": driver, "path": str(model), "manifest": str(manifest), "threads": 1, "dtype": "float32"}


# Configuration of each driver for a model directory.
DRIVERS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "echo": lambda _: {"driver": "echo", "context": 2048, "token_seconds": 0.01},
    "naive": lambda model: local("naive", model),
    "continuous": lambda model: {**local("continuous", model), "slots": 4, "cache_tokens": 4096},
}
VLLM = pytest.param(
    "vllm",
    marks=pytest.mark.skipif(
        "STORM" not in os.environ or not PYTHON.exists(),
        reason="run by `make storm` if `make peers PEER=vllm` has installed vLLM",
    ),
)
RUN_MODELS = ["naive", "continuous", "remote", VLLM]  # drivers that run a model, unlike echo
OURS = [*DRIVERS]  # processes that speak llmserve.protocol, unlike a server of OpenAI's API


def vllm_servers(models: dict[str, Path], folder: Path, stack: ExitStack) -> dict[str, dict[str, Any]]:
    """Start a vLLM for each model until `stack` is closed; returns the gateway's configuration for them."""
    servers = {name: VllmServer(folder, path) for name, path in models.items()}
    for server in servers.values():
        stack.callback(server.stop)
    for server in servers.values():
        server.wait()
    return {name: {"socket": str(server.socket), "revision": "r"} for name, server in servers.items()}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random model, and one that recites."""
    folder = tmp_path_factory.mktemp("models")
    made = {"random": folder / "random", "reciter": folder / "reciter"}
    # 32 per head, the minimum of vLLM.
    make_model(made["random"], num_attention_heads=2, num_key_value_heads=1)
    make_reciter(made["reciter"], RECITED)
    return made


@pytest.fixture(scope="module", params=[*DRIVERS, "remote", VLLM])
def driver(request: pytest.FixtureRequest) -> str:
    """Name of the driver."""
    return str(request.param)


@pytest.fixture(scope="module")
def service(
    driver: str, models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    """A gateway in front of two engines of one driver; remote ones are behind a gateway of their own."""
    local = DRIVERS[driver if driver in OURS else "naive"]
    with ExitStack() as stack:

        def started(folder: str, *options: Any, **more: Any) -> Service:
            service = stack.enter_context(running(tmp_path_factory.mktemp(folder), *options, **more))
            client = stack.enter_context(service.client())
            eventually("the gateway has found both", lambda: client.get("/readyz").status_code == 200)
            return service

        if driver == "vllm":
            remotes = vllm_servers(models, tmp_path_factory.mktemp("vllm"), stack)
            yield started("front", {}, remotes=remotes)
            return
        service = started(driver, {name: local(path) for name, path in models.items()})
        if driver == "remote":
            upstream = {"socket": str(service.folder / "http.sock"), "key_credential": "upstream.key"}
            remotes = {name: {**upstream, "slots": 1} for name in models}
            service = started("front", {}, remotes=remotes, credentials={"upstream.key": service.key})
        yield service


@pytest.fixture
def client(service: Service) -> Iterator[httpx.Client]:
    with service.client() as client:
        yield client


def long(number: int, tokens: int = 900, temperature: float = 1.0) -> Generate:
    """A request that runs for a while. With sampling, each token is the end with a probability of 1/289."""
    return Generate(number, True, tokens, messages=LONG, temperature=temperature)


def answer_to(client: httpx.Client, **change: Any) -> Any:
    answer = client.post(CHAT, json={**QUESTION, **change})
    assert answer.status_code == 200, answer.text
    return answer.json()


def text_of(client: httpx.Client, **change: Any) -> str:
    """Text of the answer."""
    return str(answer_to(client, **change)["choices"][0]["message"]["content"])


def pieces(client: httpx.Client, **change: Any) -> list[str]:
    """Texts of a stream's events."""
    with client.stream("POST", CHAT, json={**QUESTION, **change, "stream": True}) as answer:
        chunks = events(answer)[:-1]
    return [text for chunk in chunks if (text := chunk["choices"][0]["delta"].get("content"))]


@pytest.mark.parametrize("driver", OURS, indirect=True)
def test_the_engine_describes_itself_and_the_fields_it_supports(service: Service, driver: str) -> None:
    gateway = Gateway(service)
    gateway.close()
    hello = gateway.hello
    assert (hello.model, hello.driver, hello.context) == ("random", driver, 2048)
    assert hello.revision
    assert hello.slots >= 1
    assert set(hello.fields) <= PASSED.keys()


def test_a_stream_comes_in_pieces_that_add_up_to_the_answer(client: httpx.Client) -> None:
    streamed = pieces(client)
    assert "".join(streamed) == text_of(client)
    assert len(streamed) >= 3


@pytest.mark.parametrize("driver", RUN_MODELS, indirect=True)
def test_greedy_tokens_equal_those_of_generate_even_for_concurrent_requests(
    client: httpx.Client, models: dict[str, Path], driver: str
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = str(models["random"])
    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    reference: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    contents = [f"what is {'the ' * number}capital of {number}?" for number in range(8)]

    def expected(content: str) -> tuple[str, int]:
        message = [{"role": "user", "content": content}]
        prompt = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
        whole = reference.generate(ids, do_sample=False, max_new_tokens=32)[0, ids.shape[1] :]
        text = tokenizer.decode(whole, skip_special_tokens=True)
        if driver == "vllm":  # leaves out an incomplete character at the end
            text = text.rstrip("\N{REPLACEMENT CHARACTER}")
        return text, len(whole)

    def observed(content: str) -> tuple[str, int]:
        answer = answer_to(client, messages=[{"role": "user", "content": content}], max_tokens=32)
        return answer["choices"][0]["message"]["content"], answer["usage"]["completion_tokens"]

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(observed, contents))
    assert answers == [expected(content) for content in contents]


def test_a_stop_string_ends_the_answer_before_it_and_the_model_with_it(client: httpx.Client) -> None:
    whole = text_of(client)
    stop = whole[5:7]
    answer = answer_to(client, stop=stop)
    assert answer["choices"][0]["message"]["content"] == whole[: whole.index(stop)]
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] < 12
    assert "".join(pieces(client, stop=stop)) == whole[: whole.index(stop)]


def test_an_answer_respects_max_tokens(client: httpx.Client) -> None:
    answer = answer_to(client, max_tokens=5)
    assert answer["usage"]["completion_tokens"] == 5
    assert answer["choices"][0]["finish_reason"] == "length"


def test_an_answer_is_part_of_the_next_question(client: httpx.Client) -> None:
    message = answer_to(client)["choices"][0]["message"] | {"refusal": None, "tool_calls": []}
    turns = [*MESSAGES, message, {"role": "user", "content": "And of you?", "name": "ada"}]
    assert answer_to(client, messages=turns)["usage"]["prompt_tokens"] > len(MESSAGES[0]["content"].split())


@pytest.mark.parametrize("driver", RUN_MODELS, indirect=True)
def test_an_answer_ends_at_the_end_token_of_the_model(client: httpx.Client) -> None:
    answer = answer_to(client, model="reciter", max_tokens=100)
    assert answer["choices"][0]["message"]["content"] == RECITED
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == len(RECITED.encode()) + 1


def test_a_prompt_longer_than_the_context_is_a_400_before_the_model_runs(client: httpx.Client) -> None:
    body = {**QUESTION, "messages": [{"role": "user", "content": "z q " * 3000}]}
    assert "2048" in error(client.post(CHAT, json=body), 400, "context_length_exceeded")["message"]


@pytest.mark.parametrize("driver", RUN_MODELS, indirect=True)
def test_messages_that_the_chat_template_refuses_are_a_400(client: httpx.Client, driver: str) -> None:
    body = {**QUESTION, "messages": [{"role": "assistant", "content": "x"}]}
    code = "engine_refused" if driver == "vllm" else "invalid_value"  # vLLM has no specific code for it
    assert "the user speaks first" in error(client.post(CHAT, json=body), 400, code)["message"]


def test_a_field_that_the_engine_has_not_declared_is_a_400_that_names_it(
    service: Service, client: httpx.Client, driver: str
) -> None:
    declared: list[str] = []
    if driver in OURS:
        gateway = Gateway(service)
        gateway.close()
        declared = gateway.hello.fields
    tool = {"type": "function", "function": {"name": "now"}}
    values: dict[str, object] = {"seed": 5, "logprobs": True, "n": 2, "tools": [tool]}
    for name, value in values.items():
        answer = client.post(CHAT, json={**QUESTION, name: value})
        if name in declared:
            assert answer.status_code == 200
        else:
            assert error(answer, 400, "unsupported_field")["param"] == name


@pytest.mark.parametrize("driver", RUN_MODELS, indirect=True)
def test_a_stream_never_splits_a_character(client: httpx.Client, driver: str) -> None:
    whole = pieces(client, model="reciter", max_tokens=100)
    cut = pieces(client, model="reciter", max_tokens=7)  # 東京 and one byte of the next character
    # vLLM merges pieces that arrive together, and leaves out an incomplete character at the end.
    if driver == "vllm":
        assert ("".join(whole), "".join(cut)) == (RECITED, "東京")
    else:
        assert (whole, cut) == ([*RECITED], ["東", "京", "\N{REPLACEMENT CHARACTER}"])


@pytest.mark.parametrize("driver", OURS, indirect=True)
def test_cancelled_requests_send_nothing_and_free_their_slots(service: Service) -> None:
    gateway = Gateway(service)
    slots = min(gateway.hello.slots, 4)
    for start in 100, 200:
        numbers = range(start, start + slots)
        gateway.say(*(long(number) for number in numbers))
        gateway.read()
        gateway.say(*(Cancel(number) for number in numbers))
    short = long(300, tokens=1)
    short.stream = False
    gateway.say(short)
    while (frame := gateway.read()).id != 300:
        assert frame.id < 300  # already sent before the cancellation arrived
    assert isinstance(frame, Done)
    gateway.say(long(301, tokens=3))
    while not isinstance(frame := gateway.read(), Done):
        assert frame.id == 301  # nothing more arrives for the cancelled requests
    gateway.close()


@pytest.mark.parametrize("driver", OURS, indirect=True)
def test_the_slots_of_a_vanished_gateway_are_freed(service: Service) -> None:
    dead = Gateway(service)
    dead.say(*(long(number) for number in range(min(dead.hello.slots, 4))))
    dead.read()
    dead.close()
    alive = Gateway(service)
    alive.say(long(1, tokens=2))
    while not isinstance(alive.read(), Done):
        pass
    alive.close()


@pytest.mark.parametrize("driver", OURS, indirect=True)
def test_an_engine_logs_json_lines_without_prompts(service: Service, client: httpx.Client) -> None:
    text_of(client, messages=[{"role": "user", "content": "a secret question"}])
    log = (service.folder / "engine-random.log").read_text()
    messages = [json.loads(line)["message"] for line in log.splitlines()]
    assert "ready" in messages
    assert "secret" not in log


def test_a_disconnected_client_frees_its_slot(service: Service, client: httpx.Client) -> None:
    body = {**QUESTION, "messages": LONG, "temperature": 1.0, "max_tokens": 900}
    with client.stream("POST", CHAT, json={**body, "stream": True}) as answer:
        next(answer.iter_lines())
    eventually("the slot is free", lambda: service.metrics()['llm_requests_running{model="random"}'] == 0, 3)
    assert text_of(client, max_tokens=1)


@pytest.mark.parametrize("driver", OURS, indirect=True)
def test_a_stopping_engine_finishes_its_requests(
    driver: str, models: dict[str, Path], tmp_path: Path
) -> None:
    with running(tmp_path, {"random": DRIVERS[driver](models["random"])}) as service:
        gateway = Gateway(service)
        gateway.say(long(1, tokens=60, temperature=0.0))
        assert isinstance(gateway.read(), Delta)
        service.engines["random"].process.terminate()
        while not isinstance(frame := gateway.read(), Done):
            pass
        assert frame.completion_tokens == 60
        gateway.close()
        assert service.engines["random"].ended() == 0


@pytest.mark.parametrize("driver", [VLLM])
def test_a_deepseek_v2_answers_like_generate(driver: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # The only sizes that vLLM supports.
    make_deepseek(tmp_path / "latent", kv_lora_rank=512, qk_rope_head_dim=64)
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "latent")
    reference: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "latent", dtype=torch.float32)
    ids = tokenizer.apply_chat_template(
        MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    whole = reference.generate(**ids, do_sample=False, max_new_tokens=12)[0, ids["input_ids"].shape[1] :]
    with ExitStack() as stack:
        remotes = vllm_servers({"latent": tmp_path / "latent"}, tmp_path, stack)
        (tmp_path / "front").mkdir()
        service = stack.enter_context(running(tmp_path / "front", {}, remotes=remotes))
        client = stack.enter_context(service.client())
        eventually("the gateway has found it", lambda: client.get("/readyz").status_code == 200)
        text = tokenizer.decode(whole, skip_special_tokens=True)
        assert text_of(client, model="latent") == text.rstrip("\N{REPLACEMENT CHARACTER}")


@pytest.mark.parametrize("driver", [VLLM], indirect=True)
def test_vllm_s_cache_of_prefixes_serves_a_tenant_s_own_prompts_alone(
    service: Service,
) -> None:
    socket = Path(service.remotes["random"]["socket"])
    words = [{"role": "user", "content": "what is the capital of France? " * 20}]

    def cached(key: str) -> float:
        """Tokens of the prompt that the cache had."""
        before = prefix_hits(socket)
        with service.client(key) as client:
            answer_to(client, messages=words, max_tokens=1)
        return prefix_hits(socket) - before

    eve = service.add_key("eve", "sales")["key"]
    assert cached(service.key) == 0
    assert cached(service.key) > 100
    assert cached(eve) == 0
    assert cached(eve) > 100


def prefix_hits(socket: Path) -> float:
    """Tokens that a vLLM took from its cache of prefixes so far."""
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(socket)), base_url="http://vllm") as client:
        told = client.get("/metrics").text
    return sum(
        float(line.split()[-1])
        for line in told.splitlines()
        if line.startswith("vllm:prefix_cache_hits_total")
    )


FIELDS = pytest.mark.parametrize("driver", ["naive", "continuous"], indirect=True)
TOWN = {
    "type": "object",
    "properties": {"town": {"type": "string", "maxLength": 4}, "size": {"enum": [1, 2, 3]}},
    "required": ["town", "size"],
    "additionalProperties": False,
}


# Without a limit it is compiled for ever: each level doubles the work.
EXPONENTIAL: dict[str, Any] = {"type": "object"}
for _ in range(20):
    EXPONENTIAL = {"properties": {"a": EXPONENTIAL}, "anyOf": [{"type": "object"}, {"required": ["a"]}]}


def token(models: dict[str, Path], text: str) -> int:
    """The id of a token of the random model."""
    from transformers import AutoTokenizer

    (found,) = AutoTokenizer.from_pretrained(models["random"], trust_remote_code=False)(text).input_ids
    return int(found)


@FIELDS
@pytest.mark.parametrize("temperature", [0, 1])
def test_a_biased_token_is_the_whole_answer(
    client: httpx.Client, models: dict[str, Path], temperature: int
) -> None:
    bias = {str(token(models, "x")): 100}
    assert text_of(client, logit_bias=bias, temperature=temperature, max_tokens=5) == "xxxxx"
    assert "".join(pieces(client, logit_bias=bias, temperature=temperature, max_tokens=5)) == "xxxxx"


@FIELDS
def test_each_request_of_a_batch_has_its_own_fields(client: httpx.Client, models: dict[str, Path]) -> None:
    plain = text_of(client)
    wanted: dict[str, dict[str, Any]] = {
        letter * 12: {"logit_bias": {str(token(models, letter)): 100}} for letter in "xyz"
    }
    wanted[plain] = {}
    with ThreadPoolExecutor(4) as pool:
        told = pool.map(lambda fields: text_of(client, **fields), [*wanted.values()] * 3)
        assert list(told) == [*wanted] * 3


@FIELDS
def test_penalties_are_those_of_transformers(client: httpx.Client, models: dict[str, Path]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models["random"], trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(
        models["random"], dtype=torch.float32, trust_remote_code=False
    )
    ids = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt")[
        "input_ids"
    ]
    made = model.generate(ids, do_sample=False, max_new_tokens=12, repetition_penalty=1.5)
    expected = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    assert text_of(client, repetition_penalty=1.5) == expected != text_of(client)
    # A frequency that outweighs all logits: no token comes twice, whatever the prompt has.
    for penalty in "frequency_penalty", "presence_penalty":
        bias = {str(token(models, letter)): 99 - number / 2 for number, letter in enumerate("xyz")}
        assert text_of(client, logit_bias=bias, max_tokens=3, **{penalty: 2}) == "xyz"


@FIELDS
@pytest.mark.parametrize("temperature", [0, 1])
def test_an_answer_follows_a_json_schema(client: httpx.Client, temperature: int) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "town", "schema": TOWN}}
    answer = answer_to(client, response_format=wanted, max_tokens=100, temperature=temperature)["choices"][0]
    told = json.loads(answer["message"]["content"])
    assert told.keys() == {"town", "size"}
    assert len(told["town"]) <= 4
    assert told["size"] in (1, 2, 3)
    assert answer["finish_reason"] == "stop"


@FIELDS
@pytest.mark.parametrize(
    ("name", "given", "pattern"),
    [
        ("response_format", {"type": "json_object"}, r"\{.*"),
        ("structured_outputs", {"choice": ["yes", "no", 'a "quote"']}, 'yes|no|a "quote"'),
        ("structured_outputs", {"regex": "[0-9]{2}-[a-c]"}, "[0-9]{2}-[a-c]"),
        ("structured_outputs", {"json": {"type": "boolean"}}, "true|false"),
    ],
)
def test_an_answer_follows_a_grammar(
    client: httpx.Client, name: str, given: dict[str, Any], pattern: str
) -> None:
    assert re.fullmatch(pattern, text_of(client, **{name: given}, temperature=1), re.DOTALL)


@FIELDS
def test_an_answer_ends_where_the_request_says(client: httpx.Client, models: dict[str, Path]) -> None:
    letter, end = token(models, "x"), token(models, "<|im_end|>")

    def ended(**fields: Any) -> tuple[str, str, int]:
        answer = answer_to(client, **fields)
        choice = answer["choices"][0]
        return choice["message"]["content"], choice["finish_reason"], answer["usage"]["completion_tokens"]

    assert ended(logit_bias={str(letter): 100}, stop_token_ids=[letter]) == ("", "stop", 1)
    assert ended(logit_bias={str(end): 100}) == ("", "stop", 1)
    assert ended(logit_bias={str(end): 100}, ignore_eos=True, max_tokens=4) == ("", "length", 4)
    assert ended(logit_bias={str(end): 100, str(letter): 99}, min_tokens=3) == ("xxx", "stop", 4)
    assert ended(allowed_token_ids=[letter], max_tokens=2) == ("xx", "length", 2)


@FIELDS
def test_sampling_is_bounded(client: httpx.Client, models: dict[str, Path]) -> None:
    letters = {str(token(models, letter)): 60 - 2 * number for number, letter in enumerate("xyz")}
    for bound in {"top_k": 1}, {"min_p": 0.9}:
        assert text_of(client, logit_bias=letters, temperature=2, **bound) == "x" * 12
    several = text_of(client, logit_bias=letters, temperature=2, top_k=2, max_tokens=100)
    assert set(several) == {"x", "y"}


@FIELDS
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logit_bias": {"100000000": 1}}, "logit_bias"),
        ({"stop_token_ids": [10**8]}, "stop_token_ids"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "town"}}}}, "response_format"),
        ({"structured_outputs": {"json": EXPONENTIAL}}, "structured_outputs"),
        ({"structured_outputs": {"json": {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}}}, None),
        ({"structured_outputs": {"regex": "(a?){200}a{200}"}}, None),
        ({"structured_outputs": {"regex": "[0-9]+"}, "allowed_token_ids": [2], "ignore_eos": True, "temperature": 1}, None),
        ({"structured_outputs": {"json": {"$ref": "https://example.org/schema.json"}}}, "structured_outputs"),
    ],
)  # fmt: skip
def test_what_an_engine_cannot_follow_is_refused_by_name(
    client: httpx.Client, fields: dict[str, Any], param: str | None
) -> None:
    refused = error(client.post(CHAT, json={**QUESTION, **fields}), 400, "invalid_value")
    assert refused["param"] == param
    assert text_of(client, max_tokens=1), "it goes on"


class Town(BaseModel):
    """An answer, as a client declares it."""

    size: Literal["village", "town", "city"]
    capital: bool


@FIELDS
def test_the_official_client_parses_an_answer_into_its_own_class(service: Service) -> None:
    client = openai.OpenAI(
        base_url="http://llm/v1", api_key=service.key, http_client=service.client(), max_retries=0
    )
    with client:
        answer = client.chat.completions.parse(
            model="random",
            messages=[{"role": "user", "content": "Paris?"}],
            response_format=Town,
            max_tokens=60,
        )
    assert isinstance(answer.choices[0].message.parsed, Town)


def official(service: Service) -> openai.OpenAI:
    return openai.OpenAI(
        api_key=service.key, base_url="http://llm/v1", http_client=service.client(), max_retries=0
    )


WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Of a town",
        "parameters": {
            "type": "object",
            "properties": {"town": {"$ref": "#/$defs/town"}, "day": {"enum": ["today", "tomorrow"]}},
            "required": ["town", "day"],
            "additionalProperties": False,
            "$defs": {"town": {"type": "string", "maxLength": 4}},
        },
    },
}
NOW: Any = {"type": "function", "function": {"name": "now"}}
ONE = {"type": "function", "function": {"name": "weather"}}


@FIELDS
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("choice", ["required", ONE])
def test_a_tool_loop_runs_to_its_end(
    service: Service, models: dict[str, Path], streaming: bool, choice: Any
) -> None:
    said = saying_xxx(models)
    with official(service) as client:
        messages: list[Any] = [{"role": "user", "content": "How is the weather?"}]
        asked: dict[str, Any] = {
            "model": "random",
            "tools": [WEATHER, NOW],
            "temperature": 1,
            "max_tokens": 100,
        }
        for _ in range(2):
            called = completed(client, streaming, messages=messages, tool_choice=choice, **asked)
            assert called.finish_reason == "tool_calls"
            assert called.message.content is None
            (call,) = called.message.tool_calls
            given = json.loads(call.function.arguments)
            assert given.keys() == ({"town", "day"} if call.function.name == "weather" else set())
            messages += [called.message, {"role": "tool", "tool_call_id": call.id, "content": "12 degrees"}]
        told = completed(client, streaming, messages=messages, **asked, **said)
        assert told.message.content == "xxx"
        assert told.message.tool_calls is None


@FIELDS
@pytest.mark.parametrize("streaming", [False, True])
def test_the_responses_api_has_calls_and_log_probabilities(service: Service, streaming: bool) -> None:
    tool: Any = {**WEATHER["function"], "type": "function", "strict": False}
    items: list[Any] = [{"role": "user", "content": "How is the weather?"}]
    with official(service) as client:

        def responded(**request: Any) -> Any:
            asked = {"model": "random", "input": items, "temperature": 1, **request}
            if not streaming:
                return client.responses.create(**asked)
            with client.responses.stream(**asked) as events:
                return [*events][-1].response

        called = responded(tools=[tool], tool_choice="required", max_output_tokens=100)
        (call,) = called.output
        assert (call.type, call.name, called.status) == ("function_call", "weather", "completed")
        assert json.loads(call.arguments).keys() == {"town", "day"}
        items += [call, {"type": "function_call_output", "call_id": call.call_id, "output": "12 degrees"}]
        include = ["message.output_text.logprobs"]
        told = responded(include=include, top_logprobs=2, max_output_tokens=4, extra_body={"min_tokens": 4})
        (message,) = told.output
        assert (message.type, told.status) == ("message", "incomplete")
        (part,) = message.content
        assert [len(each.top_logprobs) for each in part.logprobs] == [2] * told.usage.output_tokens


def saying_xxx(models: dict[str, Path]) -> dict[str, Any]:
    """Fields by which the random model answers xxx, and ends."""
    bias = {str(token(models, "x")): 70, str(token(models, "<|im_end|>")): 100}
    return {"logit_bias": bias, "extra_body": {"min_tokens": 3}}


def completed(client: openai.OpenAI, streaming: bool, **request: Any) -> Any:
    """The answer's choice, as the client makes it."""
    if not streaming:
        return client.chat.completions.create(**request).choices[0]
    with client.chat.completions.stream(**request) as events:
        return events.get_final_completion().choices[0]


@FIELDS
def test_a_call_that_has_no_room_is_cut_and_says_so(client: httpx.Client) -> None:
    asked = {"tools": [WEATHER], "tool_choice": "required"}
    message = answer_to(client, **asked, max_tokens=40)["choices"][0]
    assert message["finish_reason"] == "length"


@FIELDS
@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tools": [{"type": "function", "function": {"name": "no spaces"}}]}, "tools.0.function.name"),
        ({"tools": [NOW], "tool_choice": ONE}, "tool_choice"),
        ({"tools": [NOW], "tool_choice": "any"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        (
            {"tools": [NOW], "tool_choice": "required", "response_format": {"type": "json_object"}},
            "response_format",
        ),
        ({"top_logprobs": 2}, "logprobs"),
        ({"n": 10_000}, "n"),
    ],
)
def test_fields_that_contradict_are_refused_by_name(
    client: httpx.Client, fields: dict[str, Any], named: str
) -> None:
    answer = client.post(CHAT, json={**QUESTION, **fields})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == named


@FIELDS
def test_a_hostile_schema_of_a_function_is_refused(client: httpx.Client) -> None:
    function = {"name": "hostile", "parameters": EXPONENTIAL}
    asked = {"tools": [{"type": "function", "function": function}], "tool_choice": "required"}
    refused = error(client.post(CHAT, json={**QUESTION, **asked}), 400, "invalid_value")
    assert refused["message"].startswith("'tools' cannot be followed")


@FIELDS
@pytest.mark.parametrize("streaming", [False, True])
def test_several_answers_are_choices_of_their_own(
    service: Service, models: dict[str, Path], streaming: bool
) -> None:
    with official(service) as client:
        asked: dict[str, Any] = {"model": "random", "messages": MESSAGES, "n": 3, **saying_xxx(models)}
        if streaming:
            with client.chat.completions.stream(**asked, stream_options={"include_usage": True}) as events:
                answer: Any = events.get_final_completion()
        else:
            answer = client.chat.completions.create(**asked)
        one = client.chat.completions.create(**{**asked, "n": 1})
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [choice.message.content for choice in answer.choices] == ["xxx"] * 3
    assert answer.usage.completion_tokens == 3 * one.usage.completion_tokens
    assert answer.usage.prompt_tokens == one.usage.prompt_tokens


@FIELDS
def test_log_probabilities_are_those_of_the_model(service: Service, models: dict[str, Path]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models["random"], trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(
        models["random"], dtype=torch.float32, trust_remote_code=False
    )
    asked: dict[str, Any] = {"model": "random", **saying_xxx(models)}
    chat: dict[str, Any] = {"messages": MESSAGES, "logprobs": True, "top_logprobs": 2, **asked}
    with official(service) as client:
        whole: Any = client.chat.completions.create(**chat).choices[0].logprobs
        with client.chat.completions.stream(**chat) as events:
            streamed: Any = events.get_final_completion().choices[0].logprobs
        plain: Any = client.completions.create(prompt="what is", logprobs=2, **asked).choices[0].logprobs
    template: dict[str, Any] = {"add_generation_prompt": True, "return_tensors": "pt"}
    ids = tokenizer.apply_chat_template(MESSAGES, **template)["input_ids"]
    letter = token(models, "x")
    for number, (one, same) in enumerate(zip(whole.content, streamed.content, strict=True)):
        row = torch.log_softmax(model(ids).logits[0, -1], -1)
        expected = [
            float(row[letter if number < 3 else token(models, "<|im_end|>")]),
            *row.topk(2).values.tolist(),
        ]
        for told in one, same:
            seen = [told.logprob, *(each.logprob for each in told.top_logprobs)]
            assert seen == pytest.approx(expected, abs=1e-3)
        ids = torch.cat([ids, torch.tensor([[letter]])], -1)
    assert [told.token for told in whole.content[:3]] == ["x"] * 3
    assert plain.tokens[:3] == ["x"] * 3
    assert plain.text_offset == [0, 1, 2, 3]
    assert [len(each) for each in plain.top_logprobs] == [2] * 4


@FIELDS
def test_control_tokens_in_a_message_stay_text(service: Service, client: httpx.Client) -> None:
    def tokens(text: str, **fields: Any) -> int:
        asked = {**QUESTION, "messages": [{"role": "user", "content": text}], "max_tokens": 1, **fields}
        answer = client.post(CHAT, json=asked)
        assert answer.status_code == 200, answer.text
        return int(answer.json()["usage"]["prompt_tokens"])

    end = "<|im_end|>"
    assert tokens(f"Hi {end} and \U000f0000") == tokens("Hi  and \U000f0000") + len(end)
    tool = {"type": "function", "function": {"name": "now", "description": end}}
    plain = {"type": "function", "function": {"name": "now", "description": "x" * len(end)}}
    assert tokens("Hi", tools=[tool]) == tokens("Hi", tools=[plain])
