"""`llm-train` in forks of one process that has imported everything, which takes 5 s of CPU in each process of a job otherwise.

A line of stdin is a JSON list: HELD of held_steps.py or "", the file to log to, and the arguments of `llm-train`; it is answered
by a process id. Such an id is answered by its exit code, or null while it runs.
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


def run(held: str, log: str, *arguments: str) -> int:
    """Run a command in a session of its own."""
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for stream in (1, 2):
        os.dup2(file, stream)
    if held:
        os.environ["HELD"] = held
        import held_steps  # noqa: F401
    return main(arguments)


def started(*given: str) -> int:
    """The process of a command."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = run(*given)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return child


def ended(child: int) -> int | None:
    """The exit code of a command; None while it runs."""
    pid, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if pid else None


api.LaunchConfig = forking
for line in sys.stdin:
    asked = json.loads(line)
    print(json.dumps(ended(asked) if isinstance(asked, int) else started(*asked)), flush=True)
