"""`llm-train run --launcher slurm`: what is handed to Slurm, and a node's place in a job that Slurm started."""

import subprocess
from pathlib import Path

import pytest
import yaml

from llmtrain.cli import main
from llmtrain.exits import DONE, USAGE


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A job of two nodes."""
    path = tmp_path / "job.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "name": "support",
                "model": str(tmp_path / "model"),
                "method": {"kind": "full"},
                "data": {"train": str(tmp_path / "rows")},
                "output": str(tmp_path / "jobs/support"),
                "scale": {"nodes": 2, "strategy": "zero3"},
            }
        )
    )
    return path


@pytest.fixture(autouse=True)
def outside_of_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_STEP_ID", "SLURM_NODEID", "SLURM_NNODES"):
        monkeypatch.delenv(name, raising=False)


def handed_over(job: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[str, str]:
    """The command line of sbatch, and the script that it reads."""
    assert main(["run", str(job), "--launcher", "slurm", "--traffic", "esp", "--dry-run", *more]) == DONE
    command, script = capsys.readouterr().out.split(" <<'END'\n")
    return command, script.removesuffix("END\n")


def test_a_lost_node_queues_the_job_again_and_its_time_limit_lets_it_save(
    job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, _ = handed_over(job, capsys, "--grace", "120", "--gpus", "8", "--hosts", "train1,train2")
    words = command.split()
    assert {"--requeue", "--signal=TERM@120", "--gres=gpu:8", "--nodes=2", "--nodelist=train1,train2"} < set(
        words
    )


def test_the_submitters_environment_is_not_handed_over(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command, _ = handed_over(job, capsys)
    assert "--export=NIL" in command


@pytest.mark.parametrize(
    ("code", "queued"), [(0, False), (1, True), (2, False), (4, False), (5, True), (6, False), (137, True)]
)
def test_the_script_queues_again_what_another_start_can_mend(
    job: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, code: int, queued: bool
) -> None:
    _, script = handed_over(job, capsys)
    # In the place of Slurm's programs: srun ends as the nodes' processes would, scontrol says what it was asked.
    programs = f'srun() {{ return {code}; }}\nscontrol() {{ echo "$@"; }}\n'
    done = subprocess.run(
        ["/bin/sh", "-c", script.replace("#!/bin/sh\n", programs)],
        env={"SLURM_JOB_ID": "7", "SLURMD_NODENAME": "train1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (code, "requeue 7\n" if queued else "")


def test_the_script_starts_the_same_run_on_each_node(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, script = handed_over(job, capsys)
    run = f'llm-train run {job} --launcher slurm --traffic esp --restarts 3 --rendezvous "$SLURMD_NODENAME:29400"\n'
    assert run in script


def test_a_node_takes_the_place_that_slurm_gives_it(
    job: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"SLURM_STEP_ID": "0", "SLURM_NODEID": "2", "SLURM_NNODES": "2"}.items():
        monkeypatch.setenv(name, value)
    assert main(["run", str(job), "--launcher", "slurm", "--rendezvous", "train1:29400"]) == USAGE
    assert "--node-rank is 2, but there are 2 node(s)" in capsys.readouterr().err


def test_refuses_to_submit_what_does_not_say_how_its_traffic_is_protected(
    job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(job), "--launcher", "slurm"]) == USAGE
    assert "--traffic esp" in capsys.readouterr().err


def test_refuses_to_submit_where_there_is_no_slurm(
    job: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["run", str(job), "--launcher", "slurm", "--traffic", "clear"]) == USAGE
    assert "submit on a Slurm node" in capsys.readouterr().err
