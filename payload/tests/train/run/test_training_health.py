"""Health: faults planted in small, real training runs are detected and named; a healthy run raises none."""

import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="Debian's python3-torch is not installed")
from llama import batch, llama  # noqa: E402

from llmtrain import exits  # noqa: E402
from llmtrain.job import Job  # noqa: E402
from llmtrain.run.health import Health, Norms, Verdict, gradient_norms, kind_of  # noqa: E402

RANK = Path(__file__).parents[2] / "helpers/zero_norms.py"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """One thread is faster for such a small model."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def job(kind: str = "full", lr: float = 3e-3) -> Job:
    return Job.model_validate(
        {"name": "j", "model": "m", "method": {"kind": kind}, "data": {"train": "d"}, "output": "o", "optim": {"lr": lr}}
    )  # fmt: skip


def health(kind: str = "full", lr: float = 3e-3) -> Health:
    return Health(job(kind, lr), parameters=1000, world_size=1)


def train(
    watched: Health, steps: int, lr: float = 3e-3, plant: Callable[[Any, int], None] = lambda *_: None
) -> list[Verdict]:
    """Train with AdamW until a stop; calls `plant(model, step)` before each step. Clipping, which hides faults, is off."""
    model, verdicts = llama(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for step in range(1, steps + 1):
        plant(model, step)
        ids = batch(step)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        norms = gradient_norms(model)
        optimizer.step()
        optimizer.zero_grad()
        verdicts.append(watched.step(step, float(loss), norms.total, cursor=2 * (step - 1), norms=norms))
        if verdicts[-1].level == "stop":
            break
    return verdicts


def rules(verdicts: list[Verdict]) -> list[str]:
    return [finding.rule for verdict in verdicts for finding in verdict.news]


# -- Norms.


def test_the_norms_of_all_kinds_make_up_what_torch_clips_by() -> None:
    model = llama()
    model(input_ids=batch(), labels=batch()).loss.backward()
    norms = gradient_norms(model)
    total = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
    assert norms.total == pytest.approx(total, rel=1e-5)
    assert sorted(norms.kinds) == ["attention", "embedding", "head", "mlp", "norm"]
    assert norms.facts()["grad_norm_attention"] == pytest.approx(
        math.sqrt(sum(float(each.grad.norm()) ** 2 / scaled(total) for each in attention(model))), rel=1e-5
    )


def scaled(total: float) -> float:
    """Squared norms after clipping to a norm of 1."""
    return 1 / total**2


def attention(model: Any) -> list[Any]:
    return [each for name, each in model.named_parameters() if "self_attn" in name]


def test_what_fp16_scaled_is_scaled_back() -> None:
    model = llama()
    (model(input_ids=batch(), labels=batch()).loss * 1024).backward()
    scaled_up = gradient_norms(model)
    assert gradient_norms(model, scale=1024).total == pytest.approx(scaled_up.total / 1024)


@pytest.mark.parametrize("family", ["DeepseekV2", "DeepseekV3", "Qwen2"])
def test_every_parameter_of_a_family_has_its_kind(family: str) -> None:
    import transformers

    experts = (
        {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
         "moe_intermediate_size": 16, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
         "v_head_dim": 8}
        if family != "Qwen2" else {}
    )  # fmt: skip
    config = getattr(transformers, f"{family}Config")(
        vocab_size=101, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, **experts,
    )  # fmt: skip
    with torch.device("meta"):
        model = getattr(transformers, f"{family}ForCausalLM")(config)
    kinds = {name: kind_of(name) for name, _ in model.named_parameters()}
    assert "other" not in kinds.values(), kinds
    wanted = {"embedding", "attention", "mlp", "norm", "head"} | ({"experts"} if experts else set())
    assert set(kinds.values()) == wanted
    for name, kind in kinds.items():
        assert kind != "experts" or "experts" in name or "mlp.gate." in name, name
        assert kind != "norm" or "norm" in name, name


def test_an_adapters_parameters_are_the_adapters() -> None:
    import peft

    model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    model(input_ids=batch(), labels=batch()).loss.backward()
    norms = gradient_norms(model)
    assert list(norms.kinds) == ["adapter"]
    assert len(norms.cells) == 3, "one in each block"
    assert norms.vanishing() == [], "half of an adapter has no gradient at first, and that is right"


def test_two_ranks_of_zero_have_the_norms_of_one_process(tmp_path: Path) -> None:
    model, stages = llama(), ["0", "2", "3"]
    model(input_ids=batch(), labels=batch()).loss.backward()
    wanted = {f"{kind} {block}": norm for (kind, block), norm in gradient_norms(model).cells.items()}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(RANK), str(tmp_path / "meeting"), str(rank), *stages],
            env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    for rank in ranks:
        out, errors = rank.communicate()
        seen = [json.loads(line[6:]) for line in out.splitlines() if line.startswith("norms ")]
        assert [str(stage) for stage, _ in seen] == stages, errors[-3000:]
        for stage, norms in seen:
            assert norms == pytest.approx(wanted, rel=1e-4), f"stage {stage}"


# -- Planted faults.


def test_a_training_that_is_well_is_left_alone() -> None:
    verdicts = train(health(), 80)
    assert rules(verdicts) == []
    assert {verdict.level for verdict in verdicts} == {"ok"}


def test_a_layer_that_is_scaled_to_nothing_is_named() -> None:
    def plant(model: Any, step: int) -> None:
        model.model.layers[1].input_layernorm.weight.data.zero_()

    first, *_ = train(health(), 1, plant=plant)
    assert first.level == "warn"
    [finding] = first.findings
    assert finding.rule == "vanishing"
    assert "attention of block 1 of 3:" in finding.message


def test_a_learning_rate_far_too_high_is_stopped_and_named() -> None:
    verdicts = train(health(lr=3.0), 120, lr=3.0)
    with pytest.raises(exits.Refusal, match=r"lower optim.lr \(3 now\)") as refusal:
        verdicts[-1].refuse()
    assert refusal.value.code == exits.UNHEALTHY
    assert "diverging" in rules(verdicts)


def test_a_spike_is_told_and_lived_through() -> None:
    watched = health()

    def plant(model: Any, step: int) -> None:
        if step == 40:
            model.lm_head.weight.data.mul_(-20)
        if step == 41:
            model.lm_head.weight.data.div_(-20)

    verdicts = train(watched, 45, plant=plant)
    assert rules(verdicts)[0] == "exploding"
    assert verdicts[39].level == "warn"
    assert "times the median" in verdicts[39].findings[0].message


def test_gradients_that_stay_exploded_stop_the_training() -> None:
    watched = health()
    levels = [
        watched.step(step, 2.0, 1.0 if step <= 30 else 50.0, cursor=step).level for step in range(1, 42)
    ]
    assert levels[:30] == ["ok"] * 30
    assert levels[30:39] == ["warn"] * 9
    assert levels[39] == "stop"


def test_an_infinite_weight_stops_the_training_at_once_and_says_which_rows() -> None:
    def plant(model: Any, step: int) -> None:
        if step == 4:
            model.model.layers[2].mlp.up_proj.weight.data[3, 3] = math.inf

    verdicts = train(health(), 10, plant=plant)
    assert len(verdicts) == 4
    with pytest.raises(
        exits.Refusal, match=r"at step 4 \(rows from 6 on, in the job's order\) the loss is nan"
    ):
        verdicts[-1].refuse()


def test_gradients_that_are_no_number_stop_a_training_in_bf16_and_not_one_in_fp16() -> None:
    assert health().step(1, 2.0, math.nan, cursor=0).level == "stop"
    assert health().step(1, 2.0, math.inf, cursor=0, scale=65536.0).level == "ok"


def test_a_scale_that_collapses_is_told_with_its_trace_and_stopped() -> None:
    watched = health()
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4096.0)
    verdicts = []
    for step in range(1, 20):
        scaler.scale((parameter * math.inf).sum()).backward()  # overflows whatever the scale
        scaler.unscale_(optimizer)
        norm = float(parameter.grad.norm()) if parameter.grad is not None else 0.0
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        verdicts.append(watched.step(step, 2.0, norm, cursor=step, scale=scaler.get_scale()))
    assert rules(verdicts)[:2] == ["scale_falling", "scale_collapsed"]
    assert verdicts[7].level == "warn", "8 steps skipped"
    with pytest.raises(
        exits.Refusal, match=r"scale collapsed: at step 12 .*4 at step 10, 2 at step 11, 1 at step 12"
    ):
        verdicts[11].refuse()


def test_a_loss_that_gains_nothing_is_told_once() -> None:
    watched, chance = health(), random.Random(5)  # noqa: S311
    verdicts = [watched.step(step, 2 + chance.gauss(0, 0.1), 1.0, cursor=step) for step in range(1, 280)]
    assert rules(verdicts) == ["plateau"]
    assert "no gain beyond its noise" in verdicts[-1].findings[0].message


def test_a_loss_that_falls_slowly_under_noise_is_no_plateau() -> None:
    watched, chance = health(), random.Random(5)  # noqa: S311
    verdicts = [
        watched.step(step, 2 - step / 1000 + chance.gauss(0, 0.1), 1.0, cursor=step) for step in range(1, 400)
    ]
    assert rules(verdicts) == []


def test_no_gradient_at_all_is_told() -> None:
    verdict = health().step(1, 2.0, 0.0, cursor=0, norms=Norms({("mlp", 0): 0.0}))
    assert [finding.rule for finding in verdict.findings] == ["no_gradient"]


def test_the_same_is_said_again_after_a_hundred_steps() -> None:
    watched = health()
    norms = Norms({("mlp", 0): 1.0, ("mlp", 1): 1.0, ("mlp", 2): 0.0})
    said = [step for step in range(1, 250) if watched.step(step, 2.0, 1.0, cursor=0, norms=norms).news]
    assert said == [1, 101, 201]


# -- Speed.


@pytest.mark.parametrize(("kind", "factor"), [("full", 6), ("lora", 4)])
def test_utilisation_is_six_or_four_operations_a_parameter_and_token(kind: str, factor: int) -> None:
    watched = Health(job(kind), parameters=7_000_000_000, world_size=8, peak_flops=312e12)
    speed = watched.speed(tokens=80_000, seconds=2.5)
    assert speed["tokens_per_second"] == 32_000
    assert speed["tokens_per_second_gpu"] == 4_000
    assert speed["mfu"] == pytest.approx(4_000 * factor * 7e9 / 312e12)


def test_utilisation_is_unknown_where_no_data_sheet_is() -> None:
    assert health().speed(tokens=100, seconds=1)["mfu"] is None
