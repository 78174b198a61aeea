"""DPO and KTO in our loop: the losses of the papers, whatever the packing, the processes and the interruptions."""

import hashlib
import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
from training_job import Bench, kill_a_rank, wait_for

from llmtrain import exits
from llmtrain.cli import main
from llmtrain.data.rows import Rows
from llmtrain.job import Preference

torch = pytest.importorskip("torch", reason="Debian's python3-torch is not installed")
from fsdp import FSDP  # noqa: E402 - needs torch

ROOT = Path(__file__).parents[4]
TRL = ROOT / "bench/.venv-trl/bin/python"
WORDS = ["what", "is", "the", "capital", "of", "France", "hello", "you"]
OPTIONS = Preference(beta=0.3, desirable_weight=1.5, undesirable_weight=0.5)


def examples(kind: str, number: int = 12) -> list[dict[str, Any]]:
    """Short conversations, each different; those of DPO prefer another word than they reject."""
    chance = numpy.random.default_rng(3)
    found: list[dict[str, Any]] = []
    for each in range(number):
        prompt = [{"role": "user", "content": " ".join(chance.choice(WORDS, 3 + each % 4))}]
        good, bad = (
            [{"role": "assistant", "content": f"{word} " * (2 + each % 3)}] for word in ("hello", "capital")
        )
        if each % 5 == 0:  # an answer before, which is not compared
            prompt = [prompt[0], {"role": "assistant", "content": "you"}, prompt[0]]
        if kind == "dpo":
            found.append({"id": f"t{each}", "prompt": prompt, "chosen": good, "rejected": bad})
        else:
            label = each % 2 == 0
            found.append(
                {"id": f"t{each}", "prompt": prompt, "completion": good if label else bad, "label": label}
            )
    return found


def exported(directory: Path, kind: str, lines: list[dict[str, Any]]) -> Path:
    """A folder as `llm-train feedback export` leaves it."""
    directory.mkdir()
    data = "".join(json.dumps(line) + "\n" for line in lines)
    (directory / f"{kind}.jsonl").write_text(data)
    report = {"kind": kind, "sha256": hashlib.sha256(data.encode()).hexdigest()}
    (directory / "export.json").write_text(json.dumps(report))
    return directory


def pack(directory: Path, model: Path, out: Path, seq_len: int = 160) -> int:
    command = [
        "--examples",
        str(directory),
        "--model",
        str(model),
        "--seq-len",
        str(seq_len),
        "--out",
        str(out),
    ]
    return main(["feedback", "pack", *command])


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A model, and rows for both losses."""
    bench = Bench(tmp_path_factory.mktemp("preferences"))
    for kind in "dpo", "kto":
        source = exported(bench.directory / f"{kind}-examples", kind, examples(kind))
        assert pack(source, bench.model, bench.directory / kind) == exits.DONE
    return bench


@pytest.fixture(scope="module")
def models(bench: Bench) -> tuple[Any, Any]:
    """The model before training, and one that has moved away from it."""
    from transformers import AutoModelForCausalLM

    before, after = (
        AutoModelForCausalLM.from_pretrained(bench.model, dtype=torch.float32).eval() for _ in range(2)
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for each in after.parameters():
            each.add_(0.05 * torch.randn_like(each))
    return before, after


def alone(bench: Bench, model: Any, prompt: list[dict[str, str]], said: list[dict[str, str]]) -> Any:
    """The log-probability of an answer that no other is packed with, by the chat template's own division."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bench.model)
    asked = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template([*prompt, *said], tokenize=False).removesuffix("\n")
    start = len(tokenizer(asked, add_special_tokens=False)["input_ids"])
    ids = torch.tensor(tokenizer(whole, add_special_tokens=False)["input_ids"])[None]
    with torch.no_grad():
        logits = model(ids).logits[0, :-1].log_softmax(-1)
    return logits.gather(1, ids[0, 1:, None])[start - 1 :].double().sum()


def ratio(bench: Bench, models: tuple[Any, Any], prompt: Any, said: Any) -> Any:
    before, after = models
    return alone(bench, after, prompt, said) - alone(bench, before, prompt, said)


def packed_loss(bench: Bench, models: tuple[Any, Any], kind: str, parts: int) -> float:
    """Our loss over all rows in as many batches, divided by what counts."""
    from llmtrain.run.preferences import Preferences, measured_drift, set_drift

    before, after = models
    rows = Rows(bench.directory / kind)
    preferences = Preferences(rows, OPTIONS)
    with torch.no_grad():
        preferences.measure_reference(
            lambda batch: batch.log_probabilities(before), lambda it: it, 2, 0, 1, "cpu"
        )
        taken = [(number, True) for number in range(len(rows))] + [(0, False)]
        batches = [preferences.batch(taken[part::parts], "cpu") for part in range(parts)]
        set_drift(
            batches, measured_drift(batches, lambda batch: batch.log_probabilities(after), lambda it: it)
        )
        total = sum(float(batch.loss(after)) for batch in batches)
    return total / sum(batch.learned for batch in batches)


def dpo_by_hand(bench: Bench, models: tuple[Any, Any]) -> float:
    losses = []
    for each in examples("dpo"):
        margin = ratio(bench, models, each["prompt"], each["chosen"]) - ratio(
            bench, models, each["prompt"], each["rejected"]
        )
        losses.append(-torch.nn.functional.logsigmoid(OPTIONS.beta * margin))
    return float(torch.stack(losses).mean())


def kto_by_hand(bench: Bench, models: tuple[Any, Any]) -> float:
    every = examples("kto")
    others = [
        ratio(bench, models, each["prompt"], every[number - 1]["completion"])
        for number, each in enumerate(every)
    ]
    moved = torch.stack(others).mean().clamp(min=0)
    losses = []
    for each in every:
        gained = OPTIONS.beta * (ratio(bench, models, each["prompt"], each["completion"]) - moved)
        weight = OPTIONS.desirable_weight if each["label"] else OPTIONS.undesirable_weight
        losses.append(weight * (1 - torch.sigmoid(gained if each["label"] else -gained)))
    return float(torch.stack(losses).mean())


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize(("kind", "by_hand"), [("dpo", dpo_by_hand), ("kto", kto_by_hand)])
def test_packed_answers_have_the_loss_that_the_paper_says_of_each_alone(
    bench: Bench, models: tuple[Any, Any], kind: str, by_hand: Callable[..., float], parts: int
) -> None:
    assert packed_loss(bench, models, kind, parts) == pytest.approx(by_hand(bench, models), rel=1e-4)


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_an_evaluation_by_kto_measures_the_drift_over_all_held_out_rows(
    bench: Bench, models: tuple[Any, Any], micro_batch: int
) -> None:
    from llmtrain.run.batches import evaluation_batches
    from llmtrain.run.preferences import Preferences, measured_drift, set_drift

    before, after = models
    rows = Rows(bench.directory / "kto")
    preferences = Preferences(rows, OPTIONS)
    with torch.no_grad():
        preferences.measure_reference(
            lambda batch: batch.log_probabilities(before), lambda it: it, 2, 0, 1, "cpu"
        )
        batches = list(evaluation_batches(rows, micro_batch, 0, 1, "cpu", preferences.batch))
        set_drift(
            batches, measured_drift(batches, lambda batch: batch.log_probabilities(after), lambda it: it)
        )
        loss = sum(float(batch.loss(after)) for batch in batches) / sum(batch.learned for batch in batches)
    assert loss == pytest.approx(kto_by_hand(bench, models), rel=1e-4)


def test_dropout_is_off_in_every_layer() -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from llmtrain.run.model import without_dropout

    config = Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, attention_dropout=0.5,
    )  # fmt: skip
    model = torch.nn.Sequential(torch.nn.Dropout(0.5), Qwen2ForCausalLM(config).train())
    without_dropout(model)
    assert model[0].p == 0.0
    ids = torch.arange(8)[None]
    assert torch.equal(model[1](ids).logits, model[1](ids).logits)


def test_several_comparisons_share_a_row(bench: Bench) -> None:
    for kind in "dpo", "kto":
        rows = Rows(bench.directory / kind)
        assert len(rows) < 12
        assert rows.index["documents_a_row"] >= 4


TRAINED = {"optim": {"lr": 1e-2, "epochs": 4}, "preference": {"beta": 0.3}}


def job(bench: Bench, name: str, kind: str, strategy: str = "ddp", **more: Any) -> Path:
    """A job on two processes."""
    held_out = {"train": str(bench.directory / kind), "eval": str(bench.directory / kind)}
    scale = {"strategy": strategy, "processes": 2, "micro_batch": 1, "tokens_per_step": 2 * 160}
    return bench.job(name, **TRAINED, data=held_out, scale=scale, **more)


@pytest.fixture(scope="module")
def preferred(bench: Bench) -> Path:
    """An undisturbed job by DPO, in two processes."""
    done = job(bench, "preferred", "dpo")
    assert bench.run(done) == exits.DONE, bench.said(done)
    return done


def test_a_job_by_dpo_begins_where_nothing_is_preferred_and_learns_what_is(
    bench: Bench, preferred: Path
) -> None:
    losses = bench.losses(preferred)
    assert losses[1] == pytest.approx(numpy.log(2), rel=1e-4), (
        "no answer is more probable than before training"
    )
    record = bench.record(preferred)
    evaluations = list(record["evaluations"].values())
    assert evaluations[-1] < 0.5 * numpy.log(2)
    assert record["setup"]["verified"]["objective"] == "dpo"
    adapter = json.loads((bench.directory / "preferred/adapter/adapter_config.json").read_text())
    assert adapter["lora_dropout"] == 0.0


def stop_and_go_on(bench: Bench, stopped: Path) -> None:
    """Stop the job by SIGTERM at its third step, and start it again."""
    _, given = bench.hold(3, stopped)
    agent = bench.fork(stopped, held=given)
    wait_for(lambda: len(bench.losses(stopped)) >= 3, agent)
    agent.send_signal(signal.SIGTERM)
    assert agent.wait(timeout=300) == exits.STOPPED, bench.said(stopped)
    assert bench.run(stopped) == exits.DONE, bench.said(stopped)


def test_a_job_by_dpo_that_was_stopped_goes_on_with_the_same_reference(bench: Bench, preferred: Path) -> None:
    stopped = job(bench, "stopped", "dpo")
    stop_and_go_on(bench, stopped)
    assert bench.losses(stopped) == bench.losses(preferred)


@pytest.fixture(scope="module")
def thumbs(bench: Bench) -> Path:
    """An undisturbed job by KTO, in two processes."""
    done = job(bench, "thumbs", "kto")
    assert bench.run(done) == exits.DONE, bench.said(done)
    return done


def test_a_job_by_kto_raises_good_answers_above_bad_ones(bench: Bench, thumbs: Path) -> None:
    assert bench.losses(thumbs)[1] == pytest.approx(0.5, rel=1e-3)
    assert list(bench.record(thumbs)["evaluations"].values())[-1] < 0.45


def test_a_job_by_kto_whose_process_was_killed_goes_on_with_the_same_losses(
    bench: Bench, thumbs: Path
) -> None:
    """The reference is asked anew, of a model that has not learned, and the drift is that of the restored one."""
    killed = job(bench, "killed", "kto", keep={"every_steps": 2})
    held, given = bench.hold(3, killed)
    agent = bench.fork(killed, held=given)
    wait_for(lambda: len(bench.losses(killed)) >= 3, agent)
    kill_a_rank(agent)
    held.unlink()
    assert agent.wait(timeout=300) == exits.DONE, bench.said(killed)
    assert [each["step"] for each in bench.record(killed)["resumed"]] == [2]
    assert bench.losses(killed) == bench.losses(thumbs)


@pytest.mark.skipif("STORM" not in os.environ, reason="six more jobs: `make storm` has them")
@pytest.mark.parametrize("kind", ["dpo", "kto"])
@pytest.mark.parametrize("strategy", ["zero2", "zero3", pytest.param("fsdp", marks=FSDP)])
def test_every_strategy_has_the_losses_of_ddp(
    bench: Bench, preferred: Path, thumbs: Path, strategy: str, kind: str
) -> None:
    done = job(bench, f"{strategy}-{kind}", kind, strategy)
    assert bench.run(done) == exits.DONE, bench.said(done)
    assert bench.record(done)["ran"]["strategy"] == strategy
    assert bench.losses(done) == pytest.approx(bench.losses(preferred if kind == "dpo" else thumbs), rel=2e-3)


@pytest.mark.skipif("STORM" not in os.environ, reason="three more jobs: `make storm` has them")
@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_a_job_by_zero3_that_was_stopped_goes_on_with_the_same_losses(bench: Bench, kind: str) -> None:
    whole, stopped = (job(bench, f"{name}-{kind}", kind, "zero3") for name in ("whole3", "stopped3"))
    assert bench.run(whole) == exits.DONE, bench.said(whole)
    stop_and_go_on(bench, stopped)
    assert bench.losses(stopped) == bench.losses(whole)


def test_rows_of_two_kinds_are_refused(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    data = {"train": str(bench.directory / "dpo"), "eval": str(bench.directory / "kto")}
    assert (
        main(["run", str(bench.job("mixed", data=data)), "--key-file", str(bench.directory / "key")])
        == exits.USAGE
    )
    assert "data.train has rows for dpo, but data.eval has rows for kto" in capsys.readouterr().err


# Bad input.


def altered(folder: Path) -> None:
    (folder / "dpo.jsonl").write_text((folder / "dpo.jsonl").read_text().replace("hello", "hallo", 1))


def without_report(folder: Path) -> None:
    (folder / "export.json").unlink()


def for_sft(folder: Path) -> None:
    (folder / "sft.jsonl").touch()
    report = {"kind": "sft", "sha256": hashlib.sha256(b"").hexdigest()}
    (folder / "export.json").write_text(json.dumps(report))


@pytest.mark.parametrize(
    ("spoil", "says", "code"),
    [
        (altered, "export.json says", exits.ALTERED),
        (without_report, "does not contain a complete export", exits.USAGE),
        (for_sft, "`llm-train data run`", exits.USAGE),
    ],
)
def test_an_export_that_is_not_whole_is_refused(
    bench: Bench,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Path], None],
    says: str,
    code: int,
) -> None:
    source = exported(tmp_path / "examples", "dpo", examples("dpo", 2))
    spoil(source)
    assert pack(source, bench.model, tmp_path / "rows") == code
    assert says in capsys.readouterr().err
    assert not (tmp_path / "rows").exists()


def test_what_does_not_fit_into_a_row_is_told(bench: Bench, tmp_path: Path) -> None:
    lines = examples("dpo", 3)
    lines[1]["chosen"] = [{"role": "assistant", "content": "hello " * 200}]
    assert pack(exported(tmp_path / "examples", "dpo", lines), bench.model, tmp_path / "rows") == exits.DONE
    [reject] = map(json.loads, (tmp_path / "rows/rejects.jsonl").read_text().splitlines())
    assert (reject["id"], reject["rule"]) == ("t1", "long")


# TRL.


@pytest.mark.skipif(not TRL.exists(), reason="without `make peers PEER=trl`: TRL's own losses")
@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_losses_are_those_of_trls_trainer(
    bench: Bench, models: tuple[Any, Any], tmp_path: Path, kind: str
) -> None:
    """TRL's estimate of KTO's divergence is of a micro-batch, so all examples are in one."""
    for name, model in zip(("before", "after"), models, strict=True):
        model.save_pretrained(tmp_path / name)
    lines = [{name: value for name, value in each.items() if name != "id"} for each in examples(kind)]
    given = {
        "kind": kind, "before": str(tmp_path / "before"), "after": str(tmp_path / "after"), "tokenizer": str(bench.model),
        "examples": lines, **OPTIONS.model_dump(),
    }  # fmt: skip
    program = Path(__file__).parents[2] / "helpers/trl_losses.py"
    ran = subprocess.run(
        [TRL, program], input=json.dumps(given), capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    theirs = json.loads(ran.stdout.splitlines()[-1])
    assert packed_loss(bench, models, kind, 1) == pytest.approx(theirs, rel=1e-3)
