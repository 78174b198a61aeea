"""`llm-train run` with tiny models: training, refusals, output files, and resuming a killed job."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tiny import make_deepseek, make_model
from training_job import END, SEQ_LEN, Bench, kill_a_rank, make_row, wait_for, write_rows

from llmcore.manifest import verify_model, write_manifest
from llmtrain.data.rows import Row, Rows, tokenizer_digest
from llmtrain.exits import ALTERED, DONE, UNHEALTHY, USAGE

torch = pytest.importorskip("torch", reason="Debian's python3-torch is not installed")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Model, data, key."""
    return Bench(tmp_path_factory.mktemp("training"))


LONG = {"optim": {"lr": 1e-2, "precision": "fp32", "epochs": 8}, "keep": {"every_steps": 24}}  # 96 steps


@pytest.fixture(scope="module")
def done(bench: Bench) -> Path:
    """An undisturbed LoRA job with the recipe's dropout, in two processes."""
    watch = {"metrics": str(bench.directory / "done.prom")}
    job = bench.job("done", **LONG, watch=watch, data={"eval": str(bench.directory / "held-out")})
    assert bench.run(job) == DONE, bench.said(job)
    return job


def refusal(bench: Bench, job: Path, capsys: pytest.CaptureFixture[str], code: int = USAGE) -> str:
    """The message of `llm-train run` for a job that it refuses."""
    from llmtrain.cli import main

    assert main(["run", str(job), "--key-file", str(bench.directory / "key")]) == code
    return capsys.readouterr().err


# What a model sees.


def llama(directory: Path) -> None:
    make_model(directory, torch.float32)


def deepseek_v2(directory: Path) -> None:
    make_deepseek(directory, 2)


def deepseek_v3(directory: Path) -> None:
    make_deepseek(directory, 3)


@pytest.mark.parametrize("make", [llama, deepseek_v2, deepseek_v3])
def test_packed_documents_have_the_logits_of_unpacked_ones(
    make: Callable[[Path], None], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    from llmtrain.run.batches import batch

    make(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    row = make_row(numpy.random.default_rng(1))
    packed = batch([(row, True)], "cpu")
    with torch.no_grad():
        together = model(
            input_ids=packed.input_ids, position_ids=packed.position_ids, use_cache=False
        ).logits[0]
        for document in 1, 2:
            own = torch.from_numpy(row.input_ids[row.document == document]).long()
            alone = model(input_ids=own[None]).logits[0]
            assert torch.allclose(together[row.document == document], alone, atol=2e-5)


def test_a_token_is_a_label_only_where_it_is_learned_and_follows_one_of_its_own_document() -> None:
    from llmtrain.run.batches import IGNORED, labels

    row = Row(
        numpy.array([5, 6, 7, 8, 9, 0], numpy.int32),
        numpy.array([1, 1, 0, 1, 1, 1], numpy.uint8),
        numpy.array([1, 1, 1, 2, 2, 0], numpy.int32),
    )
    # 5 and 8 begin a document, 7 is not learned, 0 is padding.
    assert labels(row).tolist() == [6, IGNORED, IGNORED, 9, IGNORED, IGNORED]


def test_the_loss_of_a_batch_is_the_sum_over_the_positions_that_count(bench: Bench) -> None:
    from transformers import AutoModelForCausalLM

    from llmtrain.run.batches import IGNORED, batch

    model = AutoModelForCausalLM.from_pretrained(bench.model, dtype=torch.float32).eval()
    rows = Rows(bench.directory / "data")
    both = batch([(rows[0], True), (rows[1], False)], "cpu")
    with torch.no_grad():
        logits = model(
            input_ids=both.input_ids[:1], position_ids=both.position_ids[:1], use_cache=False
        ).logits[0]
        wanted = both.labels[0] != IGNORED
        spoken = logits[wanted].log_softmax(-1).gather(1, both.labels[0, wanted][:, None])
        assert both.loss(model).item() == pytest.approx(-spoken.sum().item(), rel=1e-5)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 2), (3, 1, 4)])
def test_an_epoch_has_each_row_once_whatever_the_processes(bench: Bench, shape: tuple[int, int, int]) -> None:
    from llmtrain.run.batches import row_number, step_batches

    micro_batch, accumulation, world_size = shape
    rows = Rows(bench.directory / "data")
    seen = []
    for cursor in range(0, len(rows), micro_batch * accumulation * world_size):
        for rank in range(world_size):
            for each in step_batches(
                rows, 3, cursor, len(rows), micro_batch, accumulation, rank, world_size, "cpu"
            ):
                seen += [
                    ids
                    for ids, labels in zip(each.input_ids.tolist(), each.labels, strict=True)
                    if (labels >= 0).any()
                ]
    assert sorted(seen) == sorted(rows[number].input_ids.tolist() for number in range(len(rows)))
    assert [row_number(place, 96, 3) for place in range(96)] != [
        row_number(place, 96, 3) for place in range(96, 192)
    ]


def test_the_learning_rate_climbs_for_a_tenth_and_falls_to_nothing() -> None:
    from llmtrain.job import Optim
    from llmtrain.run.train import learning_rate

    rates = [learning_rate(Optim(), step / 1000, (step + 1) / 1000) for step in range(1000)]
    assert rates.index(max(rates)) in (99, 100)
    assert max(rates) == pytest.approx(3e-5, rel=1e-3)
    assert rates[0] == pytest.approx(3e-7)
    assert rates[550] == pytest.approx(1.5e-5, rel=1e-3)
    assert rates[999] < 1e-9


# What is refused before anything starts.


def test_refuses_a_key_that_no_job_has(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    job = bench.job("typo", optim={"learning_rate": 1e-3})
    assert "unknown key 'optim.learning_rate'" in refusal(bench, job, capsys)


def test_refuses_a_step_that_cannot_be_divided(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    job = bench.job("arithmetic", scale={"tokens_per_step": 3 * SEQ_LEN})
    assert "scale.tokens_per_step is 192" in refusal(bench, job, capsys)


def test_refuses_data_that_is_not_there(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    job = bench.job("no-data", data={"train": str(bench.directory / "nowhere")})
    assert "llm-train data run" in refusal(bench, job, capsys)


def test_refuses_data_that_was_altered(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [make_row(numpy.random.default_rng(1))]
    shard = write_rows(tmp_path / "data", tokenizer_digest(bench.model), rows) / "rows-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\1")
    job = bench.job("altered-data", data={"train": str(tmp_path / "data")})
    assert "its index says" in refusal(bench, job, capsys, ALTERED)


def test_refuses_data_of_another_tokenizer(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path / "data", "0" * 64, [make_row(numpy.random.default_rng(1))])
    job = bench.job("tokenizer", data={"train": str(tmp_path / "data")})
    assert "was packed for the tokenizer 0000" in refusal(bench, job, capsys)


def test_refuses_data_that_never_ends_an_answer(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [make_row(numpy.random.default_rng(1), stops=False)]
    write_rows(tmp_path / "data", tokenizer_digest(bench.model), rows)
    job = bench.job("no-end", data={"train": str(tmp_path / "data")})
    assert f"stop tokens [{END}] is learned" in refusal(bench, job, capsys)


def test_refuses_a_model_without_a_manifest(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = bench.job("no-manifest", manifest=str(tmp_path / "none.sha256"))
    assert "cannot read the manifest" in refusal(bench, job, capsys, ALTERED)


def test_refuses_a_model_that_was_altered(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_model(tmp_path / "model")
    write_manifest(tmp_path / "model", tmp_path / "model.sha256")
    (tmp_path / "model" / "config.json").write_text((tmp_path / "model" / "config.json").read_text() + " ")
    assert "its manifest says" in refusal(
        bench, bench.job("altered", model=str(tmp_path / "model")), capsys, ALTERED
    )


def test_refuses_several_nodes_that_do_not_say_how_their_traffic_is_protected(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    from llmtrain.cli import main

    job = bench.job("unprotected")
    command = ["run", str(job), "--nodes", "2", "--rendezvous", "192.0.2.1:29400", "--dry-run"]
    assert main(command) == USAGE
    assert "--traffic esp" in capsys.readouterr().err
    assert main([*command, "--traffic", "esp"]) == DONE


def test_refuses_several_nodes_without_a_rendezvous(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--rendezvous HOST:PORT" in refusal(bench, bench.job("nodes", scale={"nodes": 2}), capsys)


def test_refuses_fp16_with_fsdp_which_has_no_loss_scaling(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    job = bench.job("fp16", scale={"strategy": "fsdp"}, optim={"precision": "fp16"})
    assert "no loss scaling for fp16" in refusal(bench, job, capsys)


def test_a_dry_run_prints_the_plan_and_deepspeeds_configuration(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    from llmtrain.cli import main

    job = bench.job("dry", scale={"strategy": "zero3"})
    assert main(["run", str(job), "--dry-run", "--json"]) == DONE
    told = json.loads(capsys.readouterr().out)
    assert told["plan"]["strategy"] == "zero3"
    assert told["deepspeed"]["zero_optimization"]["stage"] == 3
    assert told["deepspeed"]["train_batch_size"] == 8
    assert told["lora_targets"] == ["q_proj", "v_proj"]
    assert not (bench.directory / "dry").exists()


# What a model becomes.


def setup_of(job: Path) -> tuple[Any, Any]:
    """The settings of a job as it would run here."""
    from llmcore.config import load
    from llmtrain.job import Job
    from llmtrain.planning.hardware import detect
    from llmtrain.run.input_checks import verify
    from llmtrain.run.setup import set_up

    read = load(job, Job)
    return read, set_up(read, detect(1, read.scale.processes), verify(read))[1]


def deepseek_bench(directory: Path, **size: Any) -> Bench:
    """A workshop with a mixture of experts as its model and the same tokenizer."""
    bench = Bench(directory)
    make_deepseek(directory / "mixture", 2, **size)
    write_manifest(directory / "mixture", directory / "mixture.sha256")
    return bench


def test_full_training_leaves_the_router_of_a_mixture_alone(tmp_path: Path) -> None:
    from llmtrain.run.model import load

    bench = deepseek_bench(tmp_path)
    kept = load(
        *setup_of(bench.job("frozen", model=str(tmp_path / "mixture"), method={"kind": "full"})),
        torch.device("cpu"),
    )
    frozen = [name for name, each in kept.named_parameters() if not each.requires_grad]
    assert frozen == ["model.layers.1.mlp.gate.weight"]
    method = {"kind": "full", "train_router": True}
    learning = load(
        *setup_of(bench.job("router", model=str(tmp_path / "mixture"), method=method)), torch.device("cpu")
    )
    assert all(each.requires_grad for each in learning.parameters())


def test_lora_adapts_the_layers_that_are_meant(tmp_path: Path) -> None:
    from llmtrain.run.model import load

    bench = deepseek_bench(tmp_path)
    model = load(*setup_of(bench.job("latent", model=str(tmp_path / "mixture"))), torch.device("cpu"))
    adapted = {name.split(".")[-3] for name, _ in model.named_modules() if name.endswith("lora_A.default")}
    assert adapted == {"q_b_proj", "kv_b_proj"}
    assert model.peft_config["default"].lora_dropout == 0.1


def test_qlora_learns_beside_weights_of_four_bits(tmp_path: Path) -> None:
    from llmtrain.run.batches import batch
    from llmtrain.run.model import load

    bench = Bench(tmp_path)
    make_model(tmp_path / "wide", torch.float32, hidden_size=256, intermediate_size=512)
    write_manifest(tmp_path / "wide", tmp_path / "wide.sha256")
    method = {"kind": "lora", "quantize": "nf4"}
    model = load(
        *setup_of(bench.job("four", model=str(tmp_path / "wide"), method=method)), torch.device("cpu")
    )
    assert {
        each.dtype for name, each in model.named_parameters() if name.endswith("q_proj.base_layer.weight")
    } == {torch.uint8}
    batch([(Rows(bench.directory / "data")[0], True)], "cpu").loss(model).backward()
    assert all(each.grad is not None for each in model.parameters() if each.requires_grad)


def test_refuses_to_quantize_a_mixture_whose_experts_would_stay_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from llmcore.config import ConfigError
    from llmtrain.run.model import load

    bench = deepseek_bench(tmp_path, n_routed_experts=32)
    job, setup = setup_of(bench.job("mixture", model=str(tmp_path / "mixture")))
    quantized = job.method.model_copy(update={"quantize": "int8"})
    with pytest.raises(ConfigError, match=r"leaves .* % of the weights"):
        load(job.model_copy(update={"method": quantized}), setup, torch.device("cpu"))


# What a job leaves.


def test_a_job_learns(bench: Bench, done: Path) -> None:
    losses = bench.losses(done)
    assert len(losses) == 96
    assert losses[96] < losses[1] - 0.1


def test_its_adapter_is_one_that_is_loaded_and_changes_the_model(bench: Bench, done: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter = bench.directory / "done" / "adapter"
    verify_model(adapter, bench.directory / "done" / "adapter.sha256")
    model = AutoModelForCausalLM.from_pretrained(bench.model, dtype=torch.float32)
    ids = torch.from_numpy(Rows(bench.directory / "data")[0].input_ids[:32]).long()[None]
    before = model(ids).logits
    assert not torch.allclose(PeftModel.from_pretrained(model, adapter)(ids).logits, before, atol=1e-2)


def test_its_record_tells_data_base_job_and_what_ran(bench: Bench, done: Path) -> None:
    record = bench.record(done)
    assert record["data"] == [Rows(bench.directory / each).digest for each in ("data", "held-out")]
    assert record["base_model"]["revision"] == verify_model(bench.model, bench.directory / "tiny.sha256")
    assert record["job"]["method"]["r"] == 16
    assert record["ran"]["strategy"] == "ddp"
    assert [each["engine"] for each in record["ran"]["ranks"]] == ["DistributedDataParallel"] * 2
    assert record["losses"]["96"] == bench.losses(done)[96]
    assert set(record["evaluations"]) == {"24", "48", "72", "96"}
    assert tokenizer_digest(bench.directory / "done" / "adapter") == record["tokenizer"]


def test_its_numbers_are_there_for_prometheus(bench: Bench, done: Path) -> None:
    families = text_string_to_metric_families((bench.directory / "done.prom").read_text())
    found = {sample.name: sample for family in families for sample in family.samples}
    assert found["llm_train_loss"].value == pytest.approx(bench.losses(done)[96])
    assert found["llm_train_step"].labels == {"job": "done"}


def test_a_job_that_is_done_is_not_done_again(bench: Bench, done: Path) -> None:
    lines = len(bench.metrics(done))
    assert bench.run(done) == DONE
    assert len(bench.metrics(done)) == lines


def test_a_job_goes_on_when_one_of_its_processes_is_killed_and_nothing_is_lost(
    bench: Bench, done: Path
) -> None:
    job = bench.job("killed", **LONG, data={"eval": str(bench.directory / "held-out")})
    held, given = bench.hold(30, job)
    agent = bench.start(job, held=given)
    wait_for(lambda: len(bench.losses(job)) >= 30, agent)
    kill_a_rank(agent)
    held.unlink()
    assert agent.wait(timeout=300) == DONE, bench.said(job)
    resumed = [line["step"] for line in bench.metrics(job) if line.get("event") == "resumed"]
    assert len(resumed) == 1
    assert resumed[0] >= 24
    assert bench.losses(job) == bench.losses(done)


SIGTERM_AT_THE_END = """
import ctypes, os, signal, sys
if any("spawn_main" in each for each in sys.orig_argv):
    os.setsid()  # kill(0, ...) means this process alone
    libc = ctypes.CDLL(None)
    libc.on_exit(libc.kill, ctypes.c_void_p(signal.SIGTERM.value))  # as kill(exit status, SIGTERM)
"""


def test_a_sigterm_that_meets_a_process_after_its_last_line_is_no_crash(bench: Bench, tmp_path: Path) -> None:
    """libc sends it after Python has ended, so nothing in the process can run later."""
    (tmp_path / "sitecustomize.py").write_text(SIGTERM_AT_THE_END)
    job = bench.job("late", scale={"processes": 1})
    agent = bench.start(job, "--restarts", "0", modules=str(tmp_path))
    assert agent.wait(timeout=300) == DONE, bench.said(job)


def test_early_stopping_leaves_the_best_of_what_was_held_out(bench: Bench) -> None:
    """With a learning rate that is far too high, the first evaluation is the best."""
    optim = {"lr": 3.0, "precision": "fp32", "epochs": 4, "warmup": 0, "schedule": "constant", "patience": 2}
    scale = {"processes": 1, "micro_batch": 8}
    held_out = {"eval": str(bench.directory / "held-out")}
    job = bench.job("early", optim=optim, scale=scale, data=held_out, watch={"eval_every": 2})
    assert bench.run(job) == DONE, bench.said(job)
    record = bench.record(job)
    losses = {line["step"]: line["loss"] for line in bench.metrics(job) if line.get("event") == "evaluation"}
    assert record["step"] == min(losses, key=lambda step: losses[step])
    assert max(losses) == record["step"] + 4
    assert max(losses) < 48


def test_a_loss_scale_that_collapses_ends_the_job_by_its_name(bench: Bench) -> None:
    """An alpha that is far too large: gradients overflow fp16 at any loss scale."""
    optim = {"precision": "fp16", "epochs": 4}
    job = bench.job("collapse", method={"alpha": 10**9}, optim=optim, scale={"processes": 1})
    assert bench.run(job) == UNHEALTHY, bench.said(job)
    assert "scale collapsed" in bench.said(job)
    assert not (bench.directory / "collapse" / "adapter").exists()
