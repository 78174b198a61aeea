"""Publishing merges an adapter into a model with the same logits and a model card, and requires a promotion."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from saved_adapters import LATENT_LAYERS, latent_model, manifest_of, saved_adapter
from tiny import make_model

from llmcore.manifest import ManifestError, verified, verify_model, write_manifest
from llmtrain import exits
from llmtrain.cli import main
from llmtrain.exits import Refusal
from llmtrain.publish.job_output import JobOutput, judged, read_job_output
from llmtrain.publish.model_card import licence_of
from llmtrain.publish.release_candidate import publish

torch = pytest.importorskip("torch", reason="Debian's python3-torch is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of base models."""
    return tmp_path_factory.mktemp("publish")


@pytest.fixture(scope="module")
def base(folder: Path) -> Path:
    """A random Llama in bfloat16 with a licence in its card."""
    make_model(folder / "base")
    (folder / "base" / "LICENSE").write_text("do what you like\n")
    write_manifest(folder / "base", manifest_of(folder / "base"))
    return folder / "base"


def output(folder: Path, base: Path, **adapter: Any) -> Path:
    """A job's output as `llm-train run` leaves it: adapter, manifest, training.json."""
    folder.mkdir()
    saved_adapter(base, folder / "adapter", **adapter)
    told = {
        "job": {"name": "sql", "model": str(base), "method": {"kind": "lora", "r": 4}},
        "base_model": {"path": str(base), "revision": verified(base)[:16]},
        "data": ["1" * 64],
        "losses": {"1": 2.5, "2": 2.0, "30": 1.25},
        "evaluations": {"30": 1.375},
    }
    (folder / "training.json").write_text(json.dumps(told))
    return folder


@pytest.fixture
def job(tmp_path: Path, base: Path) -> Path:
    """An output with an adapter that changes the logits."""
    return output(tmp_path / "job", base)


def verdict(job: Path, **change: Any) -> None:
    """Write the gate's verdict of this output, unless `change` says otherwise."""
    done = read_job_output(job)
    metric = {"old": 0.5, "new": 0.75, "gain": 0.25, "interval": [0.2, 0.3], "finding": "better"}
    found = {
        "verdict": "promote",
        "reasons": ["NEW is better by exact, and worse by nothing"],
        "new": {"model": done.base_digest, "adapter": done.learned_digest},
        "data": {"sha256": "2" * 64},
        "rule": {"sha256": "3" * 64},
        "metrics": {"exact": metric},
        **change,
    }
    (job / "verdict.json").write_text(json.dumps(found))


def command(job: Path, into: Path, *more: str) -> int:
    """Run `llm-train publish`."""
    return main(["publish", str(job), "--into", str(into), "--name", "sql-2026-11", *more])


def said(model: Path, adapter: Path | None = None) -> Any:
    """The logits of a prompt, in float32, of a saved model with an optional adapter."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.float32)
    if adapter:
        loaded = PeftModel.from_pretrained(loaded, str(adapter))
    with torch.inference_mode():
        return loaded.eval()(torch.arange(5, 60)[None]).logits


def test_the_merged_model_says_what_base_and_adapter_say(tmp_path: Path, job: Path, base: Path) -> None:
    verdict(job)
    assert command(job, tmp_path / "candidate") == exits.DONE
    model = tmp_path / "candidate" / "models" / "sql-2026-11"
    wanted = said(base, job / "adapter")
    effect = (wanted - said(base)).abs().mean()
    assert (said(model) - wanted).abs().mean() < 0.1 * effect


def test_it_is_verified_as_every_model_is_and_keeps_the_dtype_of_its_base(tmp_path: Path, job: Path) -> None:
    from safetensors.torch import load_file

    verdict(job)
    command(job, tmp_path / "candidate")
    models = tmp_path / "candidate" / "models"
    verify_model(models / "sql-2026-11", models / "sql-2026-11.sha256")
    assert sorted(path.name for path in (tmp_path / "candidate").iterdir()) == ["models"]
    weights = load_file(models / "sql-2026-11" / "model.safetensors")
    assert {each.dtype for each in weights.values()} == {torch.bfloat16}
    assert {path.stat().st_mode & 0o777 for path in (models / "sql-2026-11").iterdir()} == {0o644}


def test_the_card_says_base_data_job_losses_verdict_and_licence(tmp_path: Path, job: Path) -> None:
    verdict(job)
    command(job, tmp_path / "candidate")
    model = tmp_path / "candidate" / "models" / "sql-2026-11"
    card = (model / "README.md").read_text()
    done = read_job_output(job)
    for part in (
        done.base_digest,
        done.learned_digest,
        "1" * 64,
        "2" * 64,
        "3" * 64,
        '"r": 4',
        '"30": 1.25',
        "1.375",
        "promote: NEW is",
    ):
        assert part in card
    assert "that of the base, see LICENSE" in card
    assert (model / "LICENSE").read_text() == "do what you like\n"
    told = json.loads((model / "training.json").read_text())
    assert (told["losses"]["30"], told["published"]["verdict"]) == (1.25, "promote")


def test_a_whole_model_that_a_job_trained_is_taken_as_it_is(tmp_path: Path, job: Path, base: Path) -> None:
    shutil.rmtree(job / "adapter")
    shutil.copytree(base, job / "model")
    write_manifest(job / "model", manifest_of(job / "model"))
    done = read_job_output(job)
    verdict(job, new={"model": done.learned_digest, "adapter": None})
    assert command(job, tmp_path / "candidate") == exits.DONE
    there = tmp_path / "candidate" / "models" / "sql-2026-11" / "model.safetensors"
    assert there.read_bytes() == (job / "model" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_a_model_with_mla_is_merged_too(tmp_path: Path, family: str) -> None:
    base = latent_model(tmp_path / "latent", family)
    job = output(tmp_path / "job", base, targets=LATENT_LAYERS)
    verdict(job)
    assert command(job, tmp_path / "candidate", "--licence", "MIT") == exits.DONE
    wanted = said(base, job / "adapter")
    torch.testing.assert_close(said(tmp_path / "candidate/models/sql-2026-11"), wanted, atol=1e-3, rtol=1e-3)


def test_an_adapter_that_rounding_swallows_is_not_exported(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = output(tmp_path / "job", base, lora_alpha=0.01)
    verdict(job)
    assert command(job, tmp_path / "candidate") == exits.FAILED
    assert "rounding to bfloat16 cancels it" in capsys.readouterr().err
    assert not (tmp_path / "candidate").exists()
    assert command(job, tmp_path / "candidate", "--dtype", "float32") == exits.DONE


def test_a_merge_that_is_not_what_the_adapter_does_is_not_exported(
    tmp_path: Path, job: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft import LoraModel

    honest = LoraModel.merge_and_unload

    def half(model: Any) -> Any:
        merged = honest(model)
        with torch.no_grad():
            next(iter(merged.model.layers)).self_attn.q_proj.weight.mul_(1.01)
        return merged

    monkeypatch.setattr(LoraModel, "merge_and_unload", half)
    verdict(job)
    assert command(job, tmp_path / "candidate") == exits.FAILED
    assert "differ by" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [job]


Change = Callable[[Path], object]


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (lambda job: (job / "verdict.json").unlink(), exits.USAGE, "run `llm-train compare`"),
        (lambda job: verdict(job, verdict="hold"), exits.NOT_BETTER, "is hold: NEW is better"),
        (lambda job: verdict(job, verdict="reject"), exits.NOT_BETTER, "is reject"),
        (
            lambda job: verdict(job, new={"model": "0" * 64, "adapter": None}),
            exits.NOT_BETTER,
            "about other weights",
        ),
        (
            lambda job: (job / "verdict.json").write_text('{"verdict": "promote"}'),
            exits.USAGE,
            "is not a verdict",
        ),
        (lambda job: (job / "training.json").unlink(), exits.USAGE, "give the output of a finished job"),
        (lambda job: (job / "training.json").write_text("{}"), exits.USAGE, "run the job again"),
        (lambda job: shutil.rmtree(job / "adapter"), exits.USAGE, "neither adapter nor model"),
        (lambda job: (job / "adapter" / "more").write_text("x"), exits.ALTERED, "is not in the manifest"),
    ],
    ids=[
        "no verdict",
        "hold",
        "reject",
        "other",
        "half",
        "no training",
        "bad training",
        "no adapter",
        "altered",
    ],
)
def test_without_a_promotion_of_these_very_bytes_nothing_is_published(
    change: Change, code: int, words: str, tmp_path: Path, job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verdict(job)
    change(job)
    assert command(job, tmp_path / "candidate") == code
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [job]


def test_an_adapter_that_was_trained_on_after_its_verdict_is_not_published(
    tmp_path: Path, job: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verdict(job)
    shutil.rmtree(job / "adapter")
    saved_adapter(base, job / "adapter", lora_alpha=16)
    assert command(job, tmp_path / "candidate") == exits.NOT_BETTER
    assert "about other weights" in capsys.readouterr().err


def test_a_base_that_is_not_the_one_of_the_job_is_refused(
    tmp_path: Path, job: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verdict(job)
    told = json.loads((job / "training.json").read_text())
    shutil.copytree(base, tmp_path / "other")
    (tmp_path / "other" / "more.json").write_text("{}")
    write_manifest(tmp_path / "other", manifest_of(tmp_path / "other"))
    told["job"]["model"] = str(tmp_path / "other")
    (job / "training.json").write_text(json.dumps(told))
    assert command(job, tmp_path / "candidate") == exits.ALTERED
    assert "is not the model that was trained" in capsys.readouterr().err


def test_who_publishes_without_a_promotion_says_why_and_the_card_repeats_it(
    tmp_path: Path, job: Path
) -> None:
    assert command(job, tmp_path / "a", "--unproved", " ") == exits.USAGE
    assert command(job, tmp_path / "b", "--unproved", "the pilot of tenant blue") == exits.DONE
    model = tmp_path / "b" / "models" / "sql-2026-11"
    assert "**Not proved better than its base.**" in (model / "README.md").read_text()
    assert "the pilot of tenant blue" in (model / "README.md").read_text()
    assert (
        json.loads((model / "training.json").read_text())["published"]["unproved"]
        == "the pilot of tenant blue"
    )
    assert not (model / "verdict.json").exists()


def test_a_licence_that_nobody_knows_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_model(tmp_path / "bare")
    write_manifest(tmp_path / "bare", manifest_of(tmp_path / "bare"))
    job = output(tmp_path / "job", tmp_path / "bare")
    verdict(job)
    assert command(job, tmp_path / "candidate") == exits.USAGE
    assert "specify it with --licence" in capsys.readouterr().err
    assert command(job, tmp_path / "candidate", "--licence", "Apache-2.0") == exits.DONE
    card = (tmp_path / "candidate/models/sql-2026-11/README.md").read_text()
    assert card.startswith("---\nbase_model: bare\nlibrary_name: transformers\nlicense: apache-2.0\n---\n")


def test_the_licence_of_a_base_is_read_from_the_head_of_its_card(tmp_path: Path) -> None:
    for head, licence in (
        ("license: mit", "mit"),
        ("license: other\nlicense_name: deepseek", "deepseek"),
        ("license: 'two words'", "two words"),
    ):
        (tmp_path / "README.md").write_text(f"---\n{head}\n---\nlicense: gpl\n")
        assert licence_of(tmp_path, None) == licence
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    with pytest.raises(Refusal, match="is not YAML"):
        licence_of(tmp_path, None)


def test_a_disk_without_room_is_told_before_anything_is_written(
    tmp_path: Path, job: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    verdict(job)
    full = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    assert command(job, tmp_path / "candidate") == exits.NO_SPACE
    assert "1 MiB free" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../x", "SQL", "", "a b", "-a"])
def test_a_name_that_is_none_is_refused(name: str, tmp_path: Path, job: Path) -> None:
    verdict(job)
    with pytest.raises(Refusal, match="use lower-case letters"):
        publish(job, tmp_path / "candidate", name, job / "verdict.json", None, "auto", None)


def test_what_stands_there_already_is_not_replaced(tmp_path: Path, job: Path) -> None:
    verdict(job)
    (tmp_path / "candidate").mkdir()
    assert command(job, tmp_path / "candidate") == exits.USAGE


def test_a_verdict_of_the_base_alone_is_none_of_the_adapter(job: Path) -> None:
    done: JobOutput = read_job_output(job)
    (job / "verdict.json").write_text(
        json.dumps({"verdict": "promote", "new": {"model": done.base_digest, "adapter": None}})
    )
    with pytest.raises(Refusal, match="about other weights"):
        judged(job / "verdict.json", done, None)


def test_a_model_without_any_manifest_has_none(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="has no manifest"):
        verified(tmp_path)
