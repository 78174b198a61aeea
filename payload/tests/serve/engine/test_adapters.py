"""LoRA adapters: served exactly as models of their own, and refused at load if they would have no effect."""

import asyncio
import json
import logging
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from bare_gateway import Gateway
from questions import error
from saved_adapters import LATENT_LAYERS, latent_model, manifest_of, saved_adapter
from scripted_opa import ScriptedOpa, answer
from service import Service, eventually, running
from tiny import make_model

from llmcore.config import ConfigError, load
from llmcore.manifest import verify_model, write_manifest
from llmserve.cache.exact import key_material
from llmserve.cli import main
from llmserve.protocol import Beat, Failed, Generate, Hello, ProtocolError, decode
from llmserve.settings import ContinuousModel, EngineConfig, NaiveModel
from llmserve.upstream.admission import Queue
from llmserve.upstream.engine_client import EngineClient

torch = pytest.importorskip("torch", reason="Debian's python3-torch is not installed")
pytest.importorskip("peft", reason="the payload's extra 'adapters' is not installed")

from llmcore.adapters import logits  # noqa: E402 - needs torch and peft
from llmcore.uncompiled import uncompiled  # noqa: E402
from llmserve.engine.continuous import ContinuousDriver  # noqa: E402
from llmserve.engine.language_model import LanguageModel  # noqa: E402
from llmserve.engine.naive import NaiveDriver  # noqa: E402

CHAT = "/v1/chat/completions"
PROMPT = "what is the capital of France?"


def described(folder: Path) -> dict[str, str]:
    """A directory and its manifest in an engine's configuration."""
    return {"path": str(folder), "manifest": str(manifest_of(folder))}


def engine(model: Path, driver: str = "naive", **change: Any) -> dict[str, Any]:
    """A model in an engine's configuration, in fp32."""
    return {
        "driver": driver,
        **described(model),
        "threads": 1,
        "dtype": "float32",
        "temperature": 0,
        **change,
    }


def naive(model: Path, **change: Any) -> NaiveDriver:
    """The naive driver, in this process."""
    settings = NaiveModel(**engine(model, **change))
    return NaiveDriver(settings, "base", {name: f"of-{name}" for name in settings.adapters})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of models and adapters."""
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    """A random Llama."""
    make_model(folder / "base", torch.float32)
    write_manifest(folder / "base", manifest_of(folder / "base"))
    return folder / "base"


@pytest.fixture(scope="module")
def adapters(model: Path, folder: Path) -> dict[str, Path]:
    """Two adapters by the names that clients use."""
    return {name: saved_adapter(model, folder / name) for name in ("tiny/sql-1.0", "legal")}


def expected(model: Path, adapter: Path | None, prompt: str, tokens: int = 16) -> str:
    """The answer of peft and `generate`."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(str(model))
    reference: Any = AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.float32)
    if adapter:
        reference = PeftModel.from_pretrained(reference, str(adapter))
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    whole = reference.generate(input_ids=ids, do_sample=False, max_new_tokens=tokens)[0, ids.shape[1] :]
    return str(tokenizer.decode(whole, skip_special_tokens=True))


def test_peft_is_imported_without_the_compiler_that_torch_has_again_afterwards() -> None:
    compiler = torch.compile
    with uncompiled():
        assert torch.compile(len) is len
        assert torch.compile(dynamic=False)(len) is len
    assert torch.compile is compiler


def await_all(service: Service) -> None:
    """Wait until all models are available."""
    with service.client() as client:
        eventually("all models are available", lambda: client.get("/readyz").status_code == 200)


@pytest.fixture(scope="module")
def service(
    model: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    """A gateway in front of one engine with both adapters."""
    beside = {name: described(path) for name, path in adapters.items()}
    served = dict.fromkeys(adapters, "base")
    engines = {"base": engine(model, adapters=beside)}
    with running(tmp_path_factory.mktemp("service"), engines, adapters=served) as service:
        await_all(service)
        yield service


@pytest.fixture
def client(service: Service) -> Iterator[httpx.Client]:
    with service.client() as client:
        yield client


def text_of(client: httpx.Client, model: str, prompt: str = PROMPT) -> str:
    """Text of the greedy answer."""
    body = {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": 16}
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == model
    return str(answer.json()["choices"][0]["text"])


def test_an_adapter_answers_under_its_own_name_and_leaves_the_model_unchanged(
    client: httpx.Client, model: Path, adapters: dict[str, Path]
) -> None:
    answers = {name: text_of(client, name) for name in ["base", *adapters]}
    assert answers == {name: expected(model, adapters.get(name), PROMPT) for name in answers}
    assert len(set(answers.values())) == 3


def test_concurrent_requests_to_adapters_and_model_get_their_own_answers(
    client: httpx.Client, model: Path, adapters: dict[str, Path]
) -> None:
    names = ["base", *adapters] * 4
    with ThreadPoolExecutor(len(names)) as pool:
        answers = list(pool.map(lambda name: text_of(client, name), names))
    assert answers == [expected(model, adapters.get(name), PROMPT) for name in names]


def test_an_engine_with_adapters_logs_nothing_but_json_lines(service: Service) -> None:
    messages = [
        json.loads(line)["message"] for line in (service.folder / "engine-base.log").read_text().splitlines()
    ]
    assert "ready" in messages


def test_the_list_of_models_names_an_adapter_with_its_parent_and_a_revision_of_both(
    client: httpx.Client,
) -> None:
    listed = {each["id"]: each for each in client.get("/v1/models").json()["data"]}
    assert {name: each["parent"] for name, each in listed.items()} == {
        "base": None,
        "tiny/sql-1.0": "base",
        "legal": "base",
    }
    revision = listed["base"]["revision"]
    assert listed["legal"]["revision"].startswith(f"{revision}+")
    assert len({each["revision"] for each in listed.values()}) == 3


def test_an_adapter_of_a_remote_engine_passes_through_with_its_parent(
    service: Service, client: httpx.Client, tmp_path: Path
) -> None:
    remote = {"socket": str(service.folder / "http.sock"), "key_credential": "upstream.key"}
    credentials = {"upstream.key": service.key}
    with (
        running(tmp_path, {}, remotes={"legal": remote}, credentials=credentials) as front,
        front.client() as there,
    ):
        await_all(front)
        assert there.get("/v1/models/legal").json()["parent"] == "base"
        assert text_of(there, "legal") == text_of(client, "legal")


def test_a_policy_that_permits_the_model_does_not_permit_its_adapter(
    model: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    opa = ScriptedOpa(tmp_path / "opa.sock")
    opa.server.reply = answer(models=["base"])
    policy = {"engine": "server", "socket": str(tmp_path / "opa.sock")}
    engines = {"base": engine(model, adapters={"legal": described(adapters["legal"])})}
    options: dict[str, Any] = {"adapters": {"legal": "base"}, "policy": policy}
    try:
        with running(tmp_path, engines, **options) as service, service.client() as client:
            await_all(service)
            assert text_of(client, "base")
            body = {"model": "legal", "prompt": PROMPT}
            assert (
                "legal"
                not in error(client.post("/v1/completions", json=body), 404, "model_not_found")["param"]
            )
            assert [each["id"] for each in client.get("/v1/models").json()["data"]] == ["base"]
    finally:
        opa.stop()


def engine_client(name: str) -> EngineClient:
    """A client for this model name."""
    return EngineClient(name, Path("/run/m.sock"), Queue(64, 10**6))


HELLO = Hello("m", "r", "naive", 64, 1, adapters={"a": "r+1", "b": "r+2"})


def test_the_cache_keeps_answers_of_model_and_adapters_apart() -> None:
    request = Generate(0, False, 16, prompt="p")
    keys = {key_material("t", 1, engine_client(name).introduced(HELLO), request) for name in ("m", "a", "b")}
    assert len(keys) == 3


def test_an_engine_without_the_configured_adapter_is_unavailable() -> None:
    with pytest.raises(ProtocolError, match="serves 'm', 'a', 'b', not 'c'"):
        engine_client("c").introduced(HELLO)


def test_an_engine_never_answers_for_a_missing_adapter_with_the_model(
    service: Service,
) -> None:
    gateway = Gateway(service, "base")
    gateway.say(Generate(1, False, 4, prompt=PROMPT, adapter="nothing"))
    while isinstance(frame := decode(gateway.lines.readline()), Beat):
        pass
    gateway.close()
    assert isinstance(frame, Failed)
    assert (frame.status, frame.message) == (
        503,
        "this engine has no adapter 'nothing': GET /v1/models lists what is served",
    )


def test_an_adapter_for_layers_that_the_model_lacks_is_refused(model: Path, folder: Path) -> None:
    other = latent_model(folder / "latent", "deepseek_v2")
    adapter = saved_adapter(other, folder / "foreign", LATENT_LAYERS)
    for how in {"adapters": {"legal": described(adapter)}}, {"merged": described(adapter)}:
        with pytest.raises(
            ConfigError, match=r"does not fit this model \(.*kv_b_proj.*it was trained for .*latent"
        ):
            naive(model, **how)


def test_an_adapter_for_a_wider_model_is_refused_by_its_shapes(model: Path, folder: Path) -> None:
    make_model(folder / "wide", torch.float32, hidden_size=128)
    adapter = saved_adapter(folder / "wide", folder / "wide-adapter")
    with pytest.raises(
        ConfigError, match=r"does not fit this model \(size mismatch.*it was trained for .*wide"
    ):
        naive(model, adapters={"legal": described(adapter)})


def test_an_adapter_for_a_deeper_model_is_refused_though_half_of_it_fits(model: Path, folder: Path) -> None:
    make_model(folder / "deep", torch.float32, num_hidden_layers=3)
    adapter = saved_adapter(folder / "deep", folder / "deep-adapter")
    with pytest.raises(
        ConfigError, match=r"4 have no place in this model and 0 are missing, such as .*layers\.2"
    ):
        naive(model, adapters={"legal": described(adapter)})


def test_an_adapter_whose_rank_differs_from_its_config_is_refused(
    adapters: dict[str, Path], model: Path, folder: Path
) -> None:
    adapter = folder / "rank"
    shutil.copytree(adapters["legal"], adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "r": 8}))
    with pytest.raises(ConfigError, match="size mismatch"):
        naive(model, adapters={"legal": described(adapter)})


@pytest.mark.parametrize("how", ["adapters", "merged"])
def test_an_untrained_adapter_has_no_effect_and_is_refused(model: Path, folder: Path, how: str) -> None:
    adapter = saved_adapter(model, folder / f"untrained-{how}", init_lora_weights=True)
    setting = described(adapter) if how == "merged" else {"legal": described(adapter)}
    with pytest.raises(ConfigError, match=r"untrained-.* does nothing here: the logits"):
        naive(model, **{how: setting})


def test_an_adapter_that_makes_logits_nan_is_refused(
    model: Path, folder: Path, adapters: dict[str, Path]
) -> None:
    from safetensors.torch import load_file, save_file

    adapter = folder / "nan"
    shutil.copytree(adapters["legal"], adapter)
    weights = {
        name: weight * float("nan")
        for name, weight in load_file(adapter / "adapter_model.safetensors").items()
    }
    save_file(weights, adapter / "adapter_model.safetensors")
    for how in {"adapters": {"legal": described(adapter)}}, {"merged": described(adapter)}:
        with pytest.raises(ConfigError, match="logits are NaN"):
            naive(model, **how)


def test_an_adapter_that_changes_the_model_while_inactive_must_be_merged(folder: Path) -> None:
    make_model(folder / "biased", torch.float32, attention_bias=True)
    adapter = saved_adapter(folder / "biased", folder / "biases", bias="all")
    with pytest.raises(ConfigError, match="changes the model even while it is inactive"):
        naive(folder / "biased", adapters={"legal": described(adapter)})
    assert naive(folder / "biased", merged=described(adapter)).adapters == {}


def test_a_directory_without_safetensors_is_no_adapter(model: Path) -> None:
    with pytest.raises(ConfigError, match="is not an adapter"):
        naive(model, adapters={"legal": described(model)})


@pytest.fixture
def as_a_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Restore the logging of a command that configures it: its stream is closed after the test."""
    level = logging.root.level
    for name in "_srcfile", "logThreads", "logProcesses", "logMultiprocessing", "logAsyncioTasks":
        monkeypatch.setattr(logging, name, getattr(logging, name))
    monkeypatch.setattr(logging.root, "handlers", [])
    yield
    logging.root.setLevel(level)


@pytest.mark.usefixtures("as_a_process")
def test_pickled_or_changed_weights_are_refused_before_anything_is_read(
    model: Path, folder: Path, adapters: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    pickled, changed = folder / "pickled", folder / "changed"
    for copy in pickled, changed:
        shutil.copytree(adapters["legal"], copy)
    torch.save({}, pickled / "adapter_model.bin")
    for copy in pickled, changed:
        write_manifest(copy, manifest_of(copy))
    with (changed / "adapter_model.safetensors").open("ab") as file:
        file.write(b"x")
    for copy, complaint in (pickled, "only safetensors are accepted"), (changed, "its manifest says"):
        for how in {"adapters": {"legal": described(copy)}}, {"merged": described(copy)}:
            file_of = folder / "engine.yaml"
            file_of.write_text(json.dumps({"socket": str(folder / "e.sock"), "model": engine(model, **how)}))
            assert main(["engine", "--name", "base", "--config", str(file_of)]) == 4
            assert complaint in capsys.readouterr().err


@pytest.mark.usefixtures("as_a_process")
def test_an_adapter_named_as_its_model_is_refused(
    model: Path, adapters: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "engine.yaml"
    same = {"legal": described(adapters["legal"])}
    file.write_text(json.dumps({"socket": "/run/e.sock", "model": engine(model, adapters=same)}))
    assert main(["engine", "--name", "legal", "--config", str(file)]) == 2
    assert "both named 'legal'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("driver", "change", "complaint"),
    [
        (
            "continuous",
            {"adapters": {"legal": {"path": "/a", "manifest": "/b"}}},
            "legal would not be applied",
        ),
        ("naive", {"merged": {"path": "/a", "manifest": "/b"}, "quantization": "nf4"}, "llm-serve merge"),
    ],
)
def test_settings_that_would_ignore_an_adapter_are_refused(
    tmp_path: Path, driver: str, change: dict[str, Any], complaint: str
) -> None:
    file = tmp_path / "engine.yaml"
    file.write_text(json.dumps({"socket": "/run/e.sock", "model": engine(tmp_path, driver, **change)}))
    with pytest.raises(ConfigError, match=complaint):
        load(file, EngineConfig)


def test_without_peft_the_error_names_the_missing_packages(
    model: Path, adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in "llmserve.engine.adapters", "llmcore.adapters":
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"need peft and accelerate.*\[adapters\]"):
        naive(model, adapters={"legal": described(adapters["legal"])})


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_a_merged_adapter_of_a_model_with_mla_has_the_same_effect_as_one_beside_it(
    folder: Path, family: str
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = latent_model(folder / family, family)
    adapter = saved_adapter(base, folder / f"{family}-adapter", LATENT_LAYERS)
    with pytest.raises(ConfigError, match=f"'{family}' model .*'merged'"):
        naive(base, adapters={"legal": described(adapter)})
    beside: Any = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32).eval()
    before = logits(beside)
    whole = logits(naive(base, merged=described(adapter)).language.model)
    both = logits(PeftModel.from_pretrained(beside, str(adapter)).base_model.model)
    assert (whole - both).abs().max() < 1e-4 * both.abs().max()
    assert (before - both).abs().max() > 0.1 * both.abs().max()


def test_a_merged_model_is_saved_with_its_manifest_and_answers_alike(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = latent_model(folder / "to-merge", "deepseek_v2")
    adapter = saved_adapter(base, folder / "to-merge-adapter", LATENT_LAYERS)
    which = ["--model", str(base), "--manifest", str(manifest_of(base)), "--adapter", str(adapter)]
    command = ["merge", *which, "--adapter-manifest", str(manifest_of(adapter)), "--dtype", "float32"]
    command += ["--into", str(folder / "one")]
    assert main(command) == 0
    manifest = Path(capsys.readouterr().out.strip())
    assert verify_model(folder / "one", manifest)
    merged = naive(base, merged=described(adapter)).language
    written = LanguageModel(NaiveModel(**engine(folder / "one")), "r")
    assert torch.equal(logits(written.model), logits(merged.model))
    assert written.encode(Generate(0, False, 1, messages=[{"role": "user", "content": "x"}]))
    assert main(command) == 2
    assert "already exists" in capsys.readouterr().err


def test_the_batching_engine_serves_a_merged_adapter(model: Path, adapters: dict[str, Path]) -> None:
    settings = engine(model, "continuous", merged=described(adapters["legal"]), context=256)
    continuous = ContinuousDriver(ContinuousModel(**settings), "r")

    async def answered() -> str:
        pieces: list[str] = []
        await continuous.generate(Generate(0, False, 16, prompt=PROMPT, temperature=0), pieces.append)
        return "".join(pieces)

    try:
        assert asyncio.run(answered()) == expected(model, adapters["legal"], PROMPT)
    finally:
        continuous.stop()
