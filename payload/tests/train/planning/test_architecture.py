"""`llm-train describe` on published models, compared with their authors' figures, and with the modules that PEFT adapts."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from models import (
    DEEPSEEK_7B,
    LLAMA_70B,
    TINY_LLAMA,
    TINY_V2,
    TINY_V2_LITE,
    TINY_V3,
    V2_LITE,
    V3,
    V25,
    write_config,
)

from llmcore.config import ConfigError
from llmserve.engine.memory_fit import model_of
from llmtrain.cli import main
from llmtrain.exits import Refusal

torch = pytest.importorskip("torch", reason="Debian's python3-torch is not installed")

from llmtrain.planning.architecture import (  # noqa: E402  only where torch is
    Architecture,
    adapter_parameters,
    as_json,
    describe,
    lora_targets,
    matching,
    outline,
)

REAL = {"7b": DEEPSEEK_7B, "v2-lite": V2_LITE, "v2.5": V25, "v3": V3, "70b": LLAMA_70B}


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Architecture]:
    """Published models."""
    directory = tmp_path_factory.mktemp("models")
    return {name: describe(write_config(directory / name, content)) for name, content in REAL.items()}


@pytest.fixture
def tiny(tmp_path: Path, request: pytest.FixtureRequest) -> Architecture:
    """A model defined by the test."""
    return describe(write_config(tmp_path / "tiny", request.param))


@pytest.mark.parametrize(
    ("name", "parameters", "active"), [("v2-lite", 15.7, 2.4), ("v2.5", 236, 21), ("v3", 671, 37)]
)
def test_parameters_are_those_that_deepseek_publishes(
    known: dict[str, Architecture], name: str, parameters: float, active: float
) -> None:
    assert known[name].parameters / 1e9 == pytest.approx(parameters, rel=0.003)
    # Its active ones are ours without the embedding, of which a token takes a row.
    computed = known[name].active_parameters - known[name].vocabulary * known[name].hidden_size
    assert computed / 1e9 == pytest.approx(active, rel=0.03)


def test_all_parameters_of_a_model_without_experts_are_active(known: dict[str, Architecture]) -> None:
    assert known["7b"].parameters == known["7b"].active_parameters == 6_910_365_696


@pytest.mark.parametrize("name", REAL)
def test_serving_and_training_count_the_same_parameters(known: dict[str, Architecture], name: str) -> None:
    assert known[name].parameters == model_of(REAL[name]).parameters


@pytest.mark.parametrize(
    ("name", "queries_and_values"),
    [
        ("7b", ["q_proj", "v_proj"]),
        ("70b", ["q_proj", "v_proj"]),
        ("v2-lite", ["q_proj", "kv_b_proj"]),
        ("v2.5", ["q_b_proj", "kv_b_proj"]),
        ("v3", ["q_b_proj", "kv_b_proj"]),
    ],
)
def test_queries_and_values_are_the_layers_that_compute_them(
    known: dict[str, Architecture], name: str, queries_and_values: list[str]
) -> None:
    assert lora_targets(known[name], "attention.qv") == queries_and_values


def test_all_attention_is_every_product_of_attention(known: dict[str, Architecture]) -> None:
    assert lora_targets(known["7b"], "attention.all") == ["k_proj", "o_proj", "q_proj", "v_proj"]
    latent = ["kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "q_a_proj", "q_b_proj"]
    assert lora_targets(known["v3"], "attention.all") == latent


def test_linear_is_all_but_the_head(known: dict[str, Architecture]) -> None:
    feed_forward = {"gate_proj", "up_proj", "down_proj"}
    assert set(lora_targets(known["7b"], "linear")) == {"q_proj", "k_proj", "v_proj", "o_proj", *feed_forward}


def test_linear_is_refused_beside_experts_in_one_sentence(known: dict[str, Architecture]) -> None:
    with pytest.raises(Refusal, match=r"fused experts, which do not support dropout; use attention\.all$"):
        lora_targets(known["v2.5"], "linear")


def test_the_guides_adapter_of_a_7b_model_has_its_published_size(known: dict[str, Architecture]) -> None:
    assert adapter_parameters(known["7b"], ["q_proj", "v_proj"], 16) == 7_864_320


def test_a_name_that_matches_nothing_is_named_and_the_one_beside_it_is_not(
    known: dict[str, Architecture],
) -> None:
    with pytest.raises(Refusal, match="no Linear layer is called v_proj; there are"):
        lora_targets(known["v2-lite"], ["q_proj", "v_proj"])


def test_names_that_all_match_nothing_are_all_named(known: dict[str, Architecture]) -> None:
    with pytest.raises(Refusal, match=r"no Linear layer is called q_proj or v_proj; .*attention\.qv"):
        lora_targets(known["v3"], ["q_proj", "v_proj"])


@pytest.mark.parametrize("names", [[], ["self_attn"], ["proj"], ["embed_tokens"], [""]])
def test_what_is_no_linear_layer_is_refused(known: dict[str, Architecture], names: list[str]) -> None:
    with pytest.raises(Refusal, match="no Linear layer is called"):
        lora_targets(known["7b"], names)


def test_names_that_all_match_are_taken_as_they_are(known: dict[str, Architecture]) -> None:
    names = ["model.layers.3.self_attn.q_proj", "o_proj"]
    assert lora_targets(known["7b"], names) == names
    assert len(matching(known["7b"], names)) == 31


@pytest.mark.parametrize("tiny", [TINY_LLAMA, TINY_V2, TINY_V2_LITE, TINY_V3], indirect=True)
@pytest.mark.parametrize("intent", ["attention.qv", "attention.all", "linear"])
def test_peft_adapts_the_layers_that_are_told_and_no_other(tiny: Architecture, intent: str) -> None:
    import peft

    if tiny.expert_parameters and intent == "linear":
        with pytest.raises(Refusal, match="expert"):
            lora_targets(tiny, intent)
        return
    targets = lora_targets(tiny, intent)
    config = peft.LoraConfig(r=4, lora_dropout=0.1, target_modules=targets)
    adapted = peft.get_peft_model(outline(tiny.config), config)
    ends = ".lora_A.default"
    got = {
        name.removeprefix("base_model.model.")[: -len(ends)]
        for name, _ in adapted.named_modules()
        if name.endswith(ends)
    }
    assert got == set(matching(tiny, targets))
    trained = sum(each.numel() for each in adapted.parameters() if each.requires_grad)
    assert trained == adapter_parameters(tiny, targets, 4)


def test_leaf_classes_are_classes_that_transformers_has(known: dict[str, Architecture]) -> None:
    from transformers.models.deepseek_v2 import modeling_deepseek_v2
    from transformers.models.deepseek_v3 import modeling_deepseek_v3

    assert known["7b"].leaf_classes == ()
    (second,), (third,) = known["v2.5"].leaf_classes, known["v3"].leaf_classes
    assert isinstance(getattr(modeling_deepseek_v2, second), type)
    assert isinstance(getattr(modeling_deepseek_v3, third), type)


def test_deepspeed_finds_the_leaf_classes_in_the_model(known: dict[str, Architecture]) -> None:
    from deepspeed import utils

    model = outline(known["v2-lite"].config)
    assert len(utils.set_z3_leaf_modules(model, list(known["v2-lite"].leaf_classes))) == 26


def test_bitsandbytes_would_leave_nearly_all_of_a_mixture_as_it_is(known: dict[str, Architecture]) -> None:
    assert known["7b"].quantizable_share > 0.85
    assert known["v2-lite"].quantizable_share < 0.08
    assert known["v2.5"].quantizable_share < 0.06


def test_an_adapter_on_the_decompression_of_keys_and_values_has_to_be_merged(
    known: dict[str, Architecture],
) -> None:
    assert known["7b"].served_unmerged(["q_proj", "v_proj"])
    assert not known["v2-lite"].served_unmerged(["q_proj", "kv_b_proj"])
    assert known["v2-lite"].served_unmerged(["q_proj", "kv_a_proj_with_mqa"])


def test_no_code_of_the_models_own_is_run(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    own = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
    directory = write_config(tmp_path / "model", {**TINY_V2, "auto_map": own})
    (directory / "mine.py").write_text(f"open({str(ran)!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    assert describe(directory).family == "deepseek_v2"
    assert not ran.exists()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ({**TINY_LLAMA, "model_type": "deepseek"}, "first-generation DeepSeek .* which is never run"),
        ({**TINY_LLAMA, "model_type": "mamba"}, "model_type 'mamba': llm-train supports llama"),
        ({}, "model_type None"),
        ({**TINY_LLAMA, "hidden_size": "big"}, "cannot build a model"),
    ],
)
def test_what_cannot_be_trained_is_refused(tmp_path: Path, content: dict[str, Any], complaint: str) -> None:
    with pytest.raises(Refusal, match=complaint):
        describe(write_config(tmp_path / "model", content))


def test_a_directory_without_a_model_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="specify a model directory"):
        describe(tmp_path)


def test_the_command_answers_people_and_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = str(write_config(tmp_path / "model", V2_LITE))
    assert main(["describe", directory]) == 0
    told = capsys.readouterr().out
    assert "LoRA attention.qv  q_proj, kv_b_proj: 4.20 M at rank 16; merge it before it is served" in told
    assert "ZeRO-3 leaf classes: DeepseekV2Moe" in told
    assert main(["describe", directory, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer == json.loads(json.dumps(as_json(describe(Path(directory)))))
    assert answer["lora"]["attention.qv"]["served_unmerged"] is False
    assert "fused experts" in answer["lora"]["linear"]["refused"]


def test_help_loads_no_torch() -> None:
    code = "import sys; from llmtrain.cli import parser; parser().format_help(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
