"""A process that leaves its job: no thread of gloo is left to wait for the interpreter, which waits for that thread."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Ends as a job does, while gloo's threads still have tensors of Python's to free: for that they need the GIL.
LEAVES = """
import sys, types
import torch, torch.distributed as distributed
from llmtrain.exits import DONE, Refusal
from llmtrain.run import train

def learn(*_):
    sys.setswitchinterval(1000)
    for _ in range(10_000):
        distributed.all_reduce(torch.ones(8), async_op=True)
    if sys.argv[1] == "done":
        return DONE
    raise {"refused": Refusal, "failed": RuntimeError}[sys.argv[1]]("as asked")

train.learn = learn
print("imported", flush=True)
sys.exit(train.train(None, types.SimpleNamespace(deepspeed=None), b""))
"""


@pytest.mark.parametrize("ending", ["done", "refused", "failed"])
def test_a_process_leaves_while_gloo_still_frees_its_tensors(ending: str) -> None:
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[3]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "USE_LIBUV": "0",
    }
    command = [sys.executable, "-c", LEAVES, ending]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        process.stdout.readline()  # imports take as long as the machine needs
        try:
            _, errors = process.communicate(timeout=30)
        finally:
            process.kill()
    assert (process.returncode == 0) is (ending == "done"), errors
    assert "as asked" in errors or ending == "done"
