"""POST /v1/embeddings with a tiny random BERT, compared with calling the model directly."""

import json
import shutil
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
from authority import bundled_model
from encoder import TEXTS, described, make_encoder
from questions import error
from scripted_upstream import ScriptedUpstream, answer
from service import Service, eventually, running

from llmserve.documents.embedding import connected

torch = pytest.importorskip("torch", reason="Debian's python3-torch is not installed")
EMBED = "/v1/embeddings"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("encoder")
    make_encoder(directory)
    return directory


@pytest.fixture(scope="module")
def service(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A gateway in front of an engine for text and one for embeddings."""
    models = {"echo": {"driver": "echo"}, "tiny": described(encoder)}
    with running(tmp_path_factory.mktemp("embed"), models) as service, service.client("") as anonymous:
        eventually("the gateway has found both", lambda: anonymous.get("/readyz").status_code == 200)
        yield service


@pytest.fixture
def client(service: Service) -> Iterator[httpx.Client]:
    with service.client() as client:
        yield client


def vectors(client: httpx.Client, **change: Any) -> Any:
    """As a tensor, in the order of the texts."""
    answer = client.post(EMBED, json={"model": "tiny", "input": TEXTS, **change})
    assert answer.status_code == 200, answer.text
    data = answer.json()["data"]
    assert [each["index"] for each in data] == list(range(len(data)))
    return torch.tensor([each["embedding"] for each in data])


def by_hand(directory: Path, text: str) -> Any:
    """Mean of the last layer's states, normalized to length 1, with transformers only."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(str(directory))
    model: Any = AutoModel.from_pretrained(str(directory)).eval()
    with torch.inference_mode():
        states = model(
            **tokenizer(text, truncation=False, padding=False, return_tensors="pt")
        ).last_hidden_state[0]
    return states.mean(0) / states.mean(0).norm()


def test_a_text_has_the_same_vector_alone_and_in_a_batch(client: httpx.Client, encoder: Path) -> None:
    batch = vectors(client)
    for text, vector in zip(TEXTS, batch, strict=True):
        assert torch.allclose(vector, by_hand(encoder, text), atol=1e-5)
        assert torch.allclose(vector, vectors(client, input=text)[0], atol=1e-5)
        assert abs(vector.norm() - 1) < 1e-5


def test_texts_keep_their_order_over_several_passes(client: httpx.Client) -> None:
    texts = [TEXTS[number % 3] for number in range(100)]
    many, few = vectors(client, input=texts), vectors(client)
    for number, vector in enumerate(many):
        assert torch.allclose(vector, few[number % 3], atol=1e-5)


def test_base64_is_little_endian_float32(client: httpx.Client) -> None:
    answer = client.post(EMBED, json={"model": "tiny", "input": TEXTS, "encoding_format": "base64"}).json()
    raw = b"".join(b64decode(each["embedding"]) for each in answer["data"])
    assert (
        torch.frombuffer(bytearray(raw), dtype=torch.float32).tolist() == vectors(client).flatten().tolist()
    )
    assert answer["object"] == "list"
    assert answer["model"] == "tiny"
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] > 10


def test_the_official_client_gets_embeddings(service: Service, client: httpx.Client) -> None:
    transport = httpx.HTTPTransport(uds=str(service.folder / "http.sock"))
    with openai.OpenAI(
        api_key=service.key,
        base_url="http://llm/v1",
        http_client=openai.DefaultHttpxClient(transport=transport),
    ) as official:
        got = official.embeddings.create(model="tiny", input=TEXTS, dimensions=32)
        assert [each.embedding for each in got.data] == vectors(client).tolist()
        assert [model.id for model in official.models.list()] == ["echo", "tiny"]
        with pytest.raises(openai.NotFoundError, match="use /v1/embeddings"):
            official.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hello"}])


REFUSED: list[tuple[dict[str, Any], str, str | None]] = [
    ({"dimensions": 16}, "invalid_value", "dimensions"),
    ({"input": []}, "invalid_value", "input"),
    ({"input": ""}, "invalid_value", "input"),
    ({"input": [[1, 2, 3]]}, "invalid_value", "input.0"),
    ({"input": ["x"] * 257}, "invalid_value", "input"),
    ({"encoding_format": "int8"}, "invalid_value", "encoding_format"),
    ({"truncate": True}, "unsupported_field", "truncate"),
    ({"input": ["short", "word " * 100]}, "context_length_exceeded", "input"),
    ({"model": "echo"}, "wrong_endpoint", "model"),
]


@pytest.mark.parametrize(("change", "code", "param"), REFUSED)
def test_options_that_would_change_the_vectors_are_refused(
    client: httpx.Client, change: dict[str, Any], code: str, param: str | None
) -> None:
    answer = client.post(EMBED, json={"model": "tiny", "input": "hello", **change})
    assert error(answer, 404 if code == "wrong_endpoint" else 400, code)["param"] == param


def test_embeddings_are_recorded_counted_and_granted_by_the_policy(
    service: Service, client: httpx.Client
) -> None:
    before = service.metrics()['llm_tokens_total{kind="prompt",model="tiny"}']
    used = client.post(EMBED, json={"model": "tiny", "input": "hello"}).json()["usage"]["prompt_tokens"]
    assert service.metrics()['llm_tokens_total{kind="prompt",model="tiny"}'] == before + used

    def recorded() -> tuple[Any, Any]:
        last = service.records()[-1]
        return last["event.action"], last.get("gen_ai.usage.input_tokens")

    eventually("the outcome is in the record", lambda: recorded() == (f"POST {EMBED}", used))
    who = ["--subject", "eve", "--tenant", "research", "--role", "analyst", "--json"]
    added = service.cli("keys", "add", *who, "--keys-file", str(service.folder / "keys.json"))
    with service.client(json.loads(added.stdout)["key"]) as analyst:
        eventually("the key works", lambda: analyst.get("/generate?prompt=x").status_code == 200)
        error(analyst.post(EMBED, json={"model": "tiny", "input": "hello"}), 403, "denied")


def test_a_model_with_another_pooling_is_refused_at_load(tmp_path: Path) -> None:
    make_encoder(tmp_path / "cls", "cls")
    service = Service(tmp_path, {"cls": described(tmp_path / "cls")})
    service.start_engine("cls", wait=False)
    assert service.engines["cls"].process.wait(60) == 2
    service.engines["cls"].stop()
    assert "another pooling than the mean" in service.logs()


def test_a_passage_is_embedded_behind_the_prefix_that_the_model_states_and_a_callers_text_is_not(
    encoder: Path, tmp_path: Path
) -> None:
    shutil.copytree(encoder, tmp_path / "prefixed")
    beside = {"prompts": {"query": "query: ", "document": "the cat "}, "least_similarity": {"en": 0.5}}
    (tmp_path / "prefixed/config_sentence_transformers.json").write_text(json.dumps(beside))
    with running(tmp_path, {"tiny": described(tmp_path / "prefixed")}) as service, service.client() as client:
        eventually("the gateway has found it", lambda: client.get("/readyz").status_code == 200, 90)
        with connected(service.folder / "tiny.sock") as embedder:
            assert embedder.hello.prompts == beside["prompts"]
            assert embedder.hello.least_similarity == beside["least_similarity"]
            passage = torch.tensor(embedder.vectors(["sat"])[0])
        whole, bare = vectors(client, input=["the cat sat", "sat"])
        assert torch.allclose(passage, whole, atol=1e-5)
        assert not torch.allclose(passage, bare, atol=1e-2)


def test_a_model_whose_prefixes_are_no_texts_is_refused_at_load(encoder: Path, tmp_path: Path) -> None:
    shutil.copytree(encoder, tmp_path / "odd")
    (tmp_path / "odd/config_sentence_transformers.json").write_text('{"prompts": {"query": 1}}')
    service = Service(tmp_path, {"odd": described(tmp_path / "odd")})
    service.start_engine("odd", wait=False)
    assert service.engines["odd"].process.wait(60) == 2
    service.engines["odd"].stop()
    assert "'prompts.query' is invalid" in service.logs()


def test_the_answer_of_an_upstream_for_embeddings_passes_through(tmp_path: Path) -> None:
    server = ScriptedUpstream(tmp_path / "upstream.sock")
    data = [{"object": "embedding", "index": 0, "embedding": [0.6, 0.8]}]
    body = json.dumps(
        {"object": "list", "data": data, "usage": {"prompt_tokens": 2, "total_tokens": 2}, "odd": 1}
    )
    server.script = answer(body.encode())
    remote = {"socket": str(tmp_path / "upstream.sock"), "revision": "7", "dimensions": 2}
    with running(tmp_path, {}, remotes={"m": remote}) as service, service.client() as client:
        assert client.post(EMBED, json={"model": "m", "input": "x"}).text == body
    assert server.requests == [{"model": "m", "input": ["x"], "encoding_format": "float"}]
    server.stop()


def test_the_bundled_encoder_places_related_texts_close_together(tmp_path: Path) -> None:
    name = "all-minilm-l6-v2"
    directory = tmp_path / name
    if not bundled_model(name, directory):
        pytest.skip(f"{name} is not in the builder's cache: `make bundle` puts it there")
    texts = ["A man is eating food.", "Somebody has a meal.", "The stock market fell sharply today."]
    with running(tmp_path, {name: described(directory)}) as service, service.client() as client:
        eventually("the gateway has found it", lambda: client.get("/readyz").status_code == 200, 90)
        eating, meal, market = vectors(client, model=name, input=texts)
        assert len(eating) == 384
        assert eating @ meal > 0.4 > 0.2 > eating @ market
        long = client.post(EMBED, json={"model": name, "input": "word " * 300}).json()
        assert long["usage"]["prompt_tokens"] == 302  # its tokenizer's file would truncate at 128
