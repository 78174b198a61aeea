"""Weights and AdamW's moments are the same, bit by bit, after another number of ranks has read and written them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="Debian's python3-torch is not installed")
from fsdp import FSDP  # noqa: E402 - needs torch
from llama import llama  # noqa: E402

from llmtrain.exits import FAILED, Refusal  # noqa: E402
from llmtrain.job import Job  # noqa: E402
from llmtrain.planning.architecture import describe  # noqa: E402
from llmtrain.planning.hardware import hardware_of  # noqa: E402
from llmtrain.planning.plan import deepspeed_config, plan  # noqa: E402
from llmtrain.run.strategies.shards import Shards, write_shard  # noqa: E402

PROGRAM = Path(__file__).parents[2] / "helpers/resharded.py"
TESTED = ["zero2", "zero3", pytest.param("fsdp", marks=FSDP)]


def configuration(model: Path, strategy: str, ranks: int) -> dict[str, Any]:
    """DeepSpeed's configuration of a job of so many processes."""
    scale = {"strategy": strategy, "offload": "none", "micro_batch": 1, "tokens_per_step": 32 * ranks}
    job = Job.model_validate(
        {
            "name": "j", "model": str(model), "method": {"kind": "full"}, "data": {"train": "d"}, "output": "o",
            "scale": scale, "optim": {"precision": "bf16"},
        }
    )  # fmt: skip
    return deepspeed_config(plan(job, hardware_of("a100", ranks), 32, 100, describe(model)), job)


@pytest.fixture(scope="module")
def saves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The saves of each strategy, by the names in resharded.py."""
    folder = tmp_path_factory.mktemp("resharded")
    llama().save_pretrained(folder / "model")
    cases: dict[str, Any] = {
        name: {ranks: configuration(folder / "model", name, ranks) for ranks in (1, 2, 3)}
        for name in ("zero2", "zero3")
    }
    if torch.__version__ >= "2.7":
        cases["fsdp"] = None
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(folder), json.dumps(cases)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def joined(folder: Path) -> dict[str, Any]:
    """The tensors of a save, whole and flat, and the number of its ranks."""
    shards = Shards(folder, len(list(folder.glob("shard-*"))))
    found = {}
    for name, parts in shards.parts.items():
        if parts[0][0] is None:
            found[name] = shards.whole(name).flatten()
        else:
            rows = max(start + file.get_slice(name).get_shape()[0] for start, file in parts)
            found[name] = shards.rows(name, 0, rows).flatten()
    return found


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ("zero2/2", "zero2/1"),
        ("zero3/2", "zero3/1"),
        ("zero3/2", "zero3/2-again"),
        ("zero2/2", "zero3/3-of-zero2"),
        pytest.param("fsdp/2", "fsdp/1", marks=FSDP),
        pytest.param("fsdp/2", "fsdp/2-again", marks=FSDP),
    ],
)
def test_another_number_of_ranks_takes_over_weights_and_moments(saves: Path, first: str, then: str) -> None:
    saved, again = joined(saves / first), joined(saves / then)
    assert saved.keys() == again.keys()
    for name, tensor in saved.items():
        assert torch.equal(tensor, again[name]), name


@pytest.mark.parametrize("strategy", TESTED)
def test_a_save_has_the_state_of_each_parameter_that_learns_once(saves: Path, strategy: str) -> None:
    saved = joined(saves / strategy / "2")
    for name, parameter in llama().named_parameters():
        for part in "weight", "exp_avg", "exp_avg_sq":
            frozen = name.startswith("model.layers.0.")
            assert saved.get(f"{name}/{part}", torch.empty(0)).numel() == (0 if frozen else parameter.numel())
    assert any(saved[name].abs().max() > 0 for name in saved if name.endswith("/exp_avg_sq"))


def test_refuses_a_save_whose_other_files_are_on_another_node(tmp_path: Path) -> None:
    write_shard(tmp_path, 1, {"a/weight": torch.arange(4.0)}, {"a/weight": 4})
    shards = Shards(tmp_path, 2)
    assert shards.rows("a/weight", 5, 2).tolist() == [1, 2]
    for start, length in (2, 4), (6, 4):
        with pytest.raises(Refusal, match="as many ranks as saved it") as refusal:
            shards.rows("a/weight", start, length)
        assert refusal.value.code == FAILED


def test_refuses_a_save_without_a_tensor(tmp_path: Path) -> None:
    write_shard(tmp_path, 0, {"a/weight": torch.arange(4.0)}, {"a/weight": 0})
    with pytest.raises(Refusal, match="no rows 0 to 0 of b/weight"):
        Shards(tmp_path, 1).rows("b/weight", 0, 0)
