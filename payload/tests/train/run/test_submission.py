"""`llm-train submit`: a user's job file, the socket, and what behind it is handed to Slurm in the user's name."""

import getpass
import json
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmtrain.cli import main
from llmtrain.exits import DONE, FAILED, USAGE
from llmtrain.run import submission

ME = getpass.getuser()


@dataclass
class Node:
    """A node of Slurm's: a folder of the trainer's, who is the user of the tests, its socket, and what sbatch was asked."""

    folder: Path
    owners: dict[str, Any] = field(default_factory=lambda: {ME: {"nodes": 2}})

    @property
    def root(self) -> Path:
        return self.folder / "training"

    @property
    def job(self) -> dict[str, Any]:
        return {
            "name": "support",
            "model": str(self.root / "models/small"),
            "method": {"kind": "lora"},
            "data": {"train": str(self.root / "owners" / ME / "rows")},
            "output": str(self.root / "owners" / ME / "support"),
        }

    def submit(self, *options: str, **changes: Any) -> int:
        """The exit code of `llm-train submit` for the job with these changes."""
        settings = {"root": str(self.root), "traffic": "esp", "owners": self.owners}
        (self.folder / "owners.json").write_text(json.dumps(settings))
        (self.folder / "job.yaml").write_text(yaml.safe_dump(self.job | changes))
        return main(
            ["submit", str(self.folder / "job.yaml"), "--socket", str(self.folder / "socket"), *options]
        )

    @property
    def asked(self) -> list[str]:
        """The arguments of sbatch."""
        return (self.folder / "arguments").read_text().splitlines()

    @property
    def script(self) -> str:
        return (self.folder / "script").read_text()


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    tmp_path.chmod(0o700)
    node = Node(tmp_path)
    for folder in ("models/small", f"owners/{ME}/rows", "elsewhere"):
        (node.root / folder).mkdir(parents=True)
    sbatch = tmp_path / "bin/sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(
        f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/arguments\ncat > {tmp_path}/script\necho 17\n'
    )
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:{os.environ['PATH']}")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "socket"))
        listener.listen()

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                submission.accept(connection, tmp_path / "owners.json")

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield node
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_a_job_is_queued_in_the_name_of_the_user_who_submits_it(
    node: Node, capsys: pytest.CaptureFixture[str]
) -> None:
    assert node.submit("--hosts", "gpu1", "--gpus", "8", "--minutes", "90") == DONE
    out, err = capsys.readouterr()
    assert out == "17\n"
    assert f"{ME} (uid {os.getuid()}) submitted support, sha256 " in err
    assert {f"--account={ME}", "--nodelist=gpu1", "--gres=gpu:8", "--time=90", "--export=NIL"} < set(
        node.asked
    )


def test_slurm_gets_the_verified_job_and_its_owner_in_the_script(node: Node) -> None:
    node.submit()
    run, text = node.script.split(" <<'JOB'\n")
    assert "llm-train run /dev/stdin --launcher slurm --restarts 3" in run
    job = json.loads(text.partition("\nJOB\n")[0])
    assert (job["owner"], job["output"]) == (ME, node.job["output"])
    assert job["optim"]["precision"] == "auto"


def test_a_job_of_several_nodes_says_how_its_traffic_is_protected(node: Node) -> None:
    node.submit(scale={"nodes": 2})
    assert "--nodes=2" in node.asked
    assert "--traffic esp" in node.script


def changed(**changes: Any) -> Callable[[Node], dict[str, Any]]:
    return lambda _: changes


def outside(key: str, path: str) -> Callable[[Node], dict[str, Any]]:
    """A path below the trainer's folder in the place of the job's."""

    def change(node: Node) -> dict[str, Any]:
        value = str(node.root / path)
        section, _, name = key.partition(".")
        return {section: {**node.job.get(section, {}), name: value}} if name else {section: value}

    return change


def linked(node: Node) -> dict[str, Any]:
    """Data behind a link that leads to another's."""
    (node.root / "owners" / ME / "link").symlink_to(node.root / "elsewhere")
    return {"data": {"train": str(node.root / "owners" / ME / "link")}}


def shared(node: Node) -> dict[str, Any]:
    """Data that a group may exchange after it was looked at."""
    (node.root / "owners" / ME / "rows").chmod(0o770)
    return {}


REFUSED = {
    "another user's name": (changed(owner="somebody"), "owner is somebody, but you are"),
    "more nodes than it may": (changed(scale={"nodes": 3}), "scale.nodes is 3, but .* may use 2"),
    "an output of another user's": (
        outside("output", "owners/somebody/x"),
        "output is .*may only write below",
    ),
    "an output that leads out": (
        outside("output", f"owners/{ME}/../somebody/x"),
        "output is .*may only write below",
    ),
    "an output that is the folder": (outside("output", f"owners/{ME}"), "output is .*may only write below"),
    "metrics in a folder of the host's": (changed(watch={"metrics": "/var/lib/x.prom"}), "watch.metrics is"),
    "data of another user's": (
        outside("data.train", "elsewhere"),
        "data.train is .* may only use paths below",
    ),
    "held-out data that leads out": (outside("data.eval", "models/../elsewhere"), "data.eval is"),
    "a model of another user's": (outside("model", "elsewhere"), "model is .* may only use paths below"),
    "a manifest elsewhere": (outside("manifest", "elsewhere/m"), "manifest is"),
    "data that is not there": (outside("data.train", f"owners/{ME}/nowhere"), "nowhere: No such file"),
    "a link": (linked, "link is a link, or users other than"),
    "data that others may change": (shared, "rows is a link, or users other than"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_job_is_refused_and_nothing_is_queued_that_names(
    node: Node, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change, message = REFUSED[what]
    assert node.submit(**change(node)) == USAGE
    noted, told = capsys.readouterr().err.splitlines()
    assert f"{ME} (uid {os.getuid()}) was refused" in noted
    assert re.search(message, told), told
    assert not (node.folder / "script").exists()


def test_a_user_who_is_no_owner_is_refused(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    node.owners = {"ada": {}}
    assert node.submit() == USAGE
    assert f"{ME} may not submit jobs here" in capsys.readouterr().err
    assert not (node.folder / "script").exists()


def test_a_folder_that_an_operator_gave_to_a_user_may_be_named(node: Node) -> None:
    node.owners = {ME: {"folders": [str(node.root / "elsewhere")]}}
    (node.root / "elsewhere/rows").mkdir()
    assert node.submit(data={"train": str(node.root / "elsewhere/rows")}) == DONE


def test_a_text_that_is_no_request_is_refused(node: Node) -> None:
    for content in (
        b"",
        b"\xff",
        b"[1]",
        b'{"job": "x: ["}',
        b'{"job": "", "hosts": "a b"}',
        b"x" * (submission.MOST + 1),
    ):
        (node.folder / "owners.json").write_text(
            json.dumps({"root": "/", "traffic": "esp", "owners": {ME: {}}})
        )
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.connect(str(node.folder / "socket"))
            connection.sendall(content)
            connection.shutdown(socket.SHUT_WR)
            assert json.loads(submission.received(connection))["code"] == USAGE
    assert not (node.folder / "script").exists()


def test_where_slurm_takes_no_job_its_reason_is_told(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    (node.folder / "bin/sbatch").write_text("#!/bin/sh\necho 'invalid account' >&2\nexit 1\n")
    assert node.submit() == FAILED
    assert "Slurm did not accept support: invalid account" in capsys.readouterr().err


def test_a_host_without_the_socket_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = Node(tmp_path).job
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    assert main(["submit", str(tmp_path / "job.yaml"), "--socket", str(tmp_path / "none")]) == FAILED
    assert "submit on a Slurm node" in capsys.readouterr().err


def test_a_mistake_in_the_job_file_is_told_before_anything_is_sent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "job.yaml").write_text("name: Support\n")
    assert main(["submit", str(tmp_path / "job.yaml"), "--socket", str(tmp_path / "none")]) == USAGE
    assert "key 'name' is 'Support'" in capsys.readouterr().err
