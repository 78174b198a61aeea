"""`llm-train` in forks of one process that has imported everything, which takes 5 s of CPU in each process of a job otherwise.

A line of stdin is a JSON list: the file to log to, and the arguments of `llm-train`. A line of stdout is an exit code.
"""

import json
import logging
import os
import sys
from typing import Any

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # as `llm-train run` does before it imports them
os.environ["DS_ACCELERATOR"] = "cpu"
import deepspeed  # noqa: E402, F401
from torch.distributed.launcher import api  # noqa: E402

import llmcore.adapters  # noqa: E402, F401 - with peft
import llmtrain.run.train  # noqa: E402, F401
from llmtrain.cli import main  # noqa: E402

LaunchConfig = api.LaunchConfig


def forking(**given: Any) -> Any:
    """The configuration of torchrun's agent, whose processes are forks of it."""
    return LaunchConfig(**given | {"start_method": "fork"})


def run(log: str, *arguments: str) -> int:
    """Run a command in a session of its own."""
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for stream in (1, 2):
        os.dup2(file, stream)
    return main(arguments)


api.LaunchConfig = forking
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = run(*json.loads(line))
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
