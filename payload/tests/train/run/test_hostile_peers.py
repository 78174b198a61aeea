"""A host of a job that fell to an attacker runs no code on the other hosts."""

import base64
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="Debian's python3-torch is not installed")
PAYLOAD = Path(__file__).parents[3]
START = """
import sys
from pathlib import Path
import torch.distributed as distributed
rank, store, victim = int(sys.argv[1]), *sys.argv[2:]
distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
"""
HONEST = """
from llmtrain.run.train import leave_process_groups, refuse_differences
refuse_differences(["job", {"rows": 7}])
leave_process_groups()  # or gloo's threads may outlive the interpreter, and abort it
"""
HOSTILE = """
class Hostile:
    def __reduce__(self):
        return Path.touch, (Path(victim),)
distributed.all_gather_object([None] * 2, Hostile())
"""
JOIN = """
import sys
from llmtrain.run.launch import Nodes, launch
launch("job", Nodes(2, 1, sys.argv[1], restarts=0), 1)
"""


class Hostile:
    """Makes a file when it is unpickled."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.victim,)


def program(text: str, *arguments: str) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(PAYLOAD),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    command = [sys.executable, "-c", text, *arguments]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def exchange(folder: Path, other: str) -> tuple[int, str, Path]:
    """Exit code and messages of an honest rank 0 whose peer runs `other`, and the file that a pickle would make."""
    arguments = str(folder / "store"), str(folder / "victim")
    peer = program(START + other, "1", *arguments)
    rank = program(START + HONEST, "0", *arguments)
    _, said = rank.communicate(timeout=120)
    peer.communicate(timeout=120)
    return rank.returncode, said, folder / "victim"


def test_ranks_that_agree_go_on(tmp_path: Path) -> None:
    code, said, _ = exchange(tmp_path, HONEST)
    assert code == 0, said


def test_what_a_rank_sends_is_not_unpickled(tmp_path: Path) -> None:
    code, said, victim = exchange(tmp_path, HOSTILE)
    assert not victim.exists(), "a pickle of the peer was loaded"
    assert code != 0
    assert "rank 1 sent invalid JSON" in said


def test_a_rank_that_announces_too_much_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    huge = "import torch; distributed.all_gather([torch.zeros(1, dtype=torch.long)] * 2, torch.tensor([1 << 60]))"
    code, said, _ = exchange(tmp_path, huge)
    assert code != 0
    assert f"rank 1 announces {1 << 60} bytes" in said


def test_the_meeting_point_runs_no_code_on_a_host_that_joins(tmp_path: Path) -> None:
    """torchrun's agent reads the state of the rendezvous from the first host, as a pickle."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False, use_libuv=False)
    store.set("torch.rendezvous.job", base64.b64encode(pickle.dumps(Hostile(tmp_path / "victim"))).decode())
    joining = program(JOIN, f"127.0.0.1:{store.port}")
    _, said = joining.communicate(timeout=120)
    assert not (tmp_path / "victim").exists(), "a pickle of the first host was loaded"
    assert "RendezvousStateError" in said
