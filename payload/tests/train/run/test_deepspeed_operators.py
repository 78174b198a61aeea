"""DeepSpeed would compile operators at run time; hosts have neither nvcc nor a compiler, and no job needs one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

torch = pytest.importorskip("torch", reason="Debian's python3-torch is not installed")
from llama import llama  # noqa: E402

from llmtrain.job import Job, Scale  # noqa: E402
from llmtrain.planning.architecture import describe  # noqa: E402
from llmtrain.planning.hardware import hardware_of  # noqa: E402
from llmtrain.planning.plan import deepspeed_config, plan  # noqa: E402

TRAINS = [("zero2", "none"), ("zero2", "optimizer"), ("zero3", "none"), ("zero3", "all")]
STEPS = Path(__file__).parents[2] / "helpers/zero_without_compiler.py"


def configuration(folder: Path, strategy: str, offload: str) -> dict[str, Any]:
    """DeepSpeed's configuration of a job of one GPU, of which `STEPS` has none."""
    job = Job.model_validate(
        {
            "name": "j",
            "model": str(folder / "model"),
            "method": {"kind": "full"},
            "data": {"train": "d"},
            "output": "o",
            "scale": {"strategy": strategy, "offload": offload, "micro_batch": 2, "tokens_per_step": 64},
        }
    )
    return deepspeed_config(plan(job, hardware_of("a100", 1), 32, 100, describe(folder / "model")), job)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two steps of each case were, in one process that finds no program on PATH; and the folder of built operators."""
    folder = tmp_path_factory.mktemp("operators")
    llama().save_pretrained(folder / "model")
    cases = {f"{how} {offload}": configuration(folder, how, offload) for how, offload in TRAINS}
    assert [name for name, each in cases.items() if "offload_optimizer" in each["zero_optimization"]] == [
        "zero2 optimizer",
        "zero3 all",
    ]
    own = configuration(folder, "zero2", "optimizer")
    own["optimizer"]["params"] = {"torch_adam": False, "lr": 1e-3}
    cases |= {"cpu_adam": own, "pin_memory": cases["zero2 optimizer"]}
    environment = {"pin_memory": {"DS_PIN_MEMORY_BACKEND": "native"}}
    given_cases = [
        {"config": config, "environment": environment.get(name, {})} for name, config in cases.items()
    ]
    done = subprocess.run(
        [sys.executable, str(STEPS), str(folder / "meeting")],
        input=json.dumps(given_cases),
        capture_output=True,
        text=True,
        check=False,
        env={
            "PATH": str(folder / "empty"),
            "HOME": str(folder),
            "OMP_NUM_THREADS": "1",
            "TORCH_EXTENSIONS_DIR": str(folder / "built"),
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line[5:]) for line in done.stdout.splitlines() if line.startswith("case ")]
    return dict(zip(cases, lines, strict=True)) | {"built": (folder / "built").exists()}


@pytest.mark.parametrize(("strategy", "offload"), TRAINS)
def test_a_job_trains_by_torchs_adamw_where_there_is_no_compiler(
    ran: dict[str, Any], strategy: str, offload: str
) -> None:
    optimizer, losses = ran[f"{strategy} {offload}"]
    assert optimizer == "torch.optim.adamw.AdamW"
    assert losses[1] < losses[0]


@pytest.mark.parametrize("operator", ["cpu_adam", "pin_memory"])
def test_an_operator_that_would_be_compiled_is_refused_by_name_at_once(
    ran: dict[str, Any], operator: str
) -> None:
    assert ran[operator][0].startswith(
        f"DeepSpeed would compile its operator '{operator}', but hosts have neither"
    )


def test_nothing_was_compiled(ran: dict[str, Any]) -> None:
    assert not ran["built"]


def test_a_job_cannot_ask_for_what_needs_a_compiled_operator() -> None:
    with pytest.raises(ValidationError, match="'auto', 'none', 'optimizer' or 'all'"):
        Scale.model_validate({"offload": "nvme"})
