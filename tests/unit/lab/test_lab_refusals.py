"""What the lab refuses before it changes anything, each with its message and exit code."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from lab import cli, requirements
from lab.errors import LabError, NoMemory, NoSpace
from lab.instance import Instance
from lab.user_mode import UserModeKernel

TREE = Path(__file__).parents[3]


@pytest.fixture
def lab(tmp_path: Path) -> Instance:
    return Instance(
        "never", [TREE / "inventory/lab/hosts.yml", TREE / "inventory/lab-kernel"], checkout=tmp_path
    )


def test_two_checkouts_and_two_instances_share_no_name(tmp_path: Path) -> None:
    inventory = [TREE / "inventory/lab"]
    names = {
        Instance(name, inventory, checkout=tmp_path / checkout).namespace.name
        for name in ("lab", "suite")
        for checkout in ("a", "b")
    }
    assert len(names) == 4
    assert all(len(name) == len("llmkeep-") + 8 for name in names)


def test_a_container_has_no_kernel_that_could_trust_a_certificate(tmp_path: Path) -> None:
    lab = Instance("never", [TREE / "inventory/lab"], checkout=tmp_path)
    with pytest.raises(LabError, match=r"llm1 is a container, which has no kernel to trust modules\.der"):
        lab.machine("llm1").enrol(tmp_path / "modules.der")


def test_no_root(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert cli.main(["--instance", "never", "-i", str(TREE / "inventory/lab"), "up"]) == 3
    assert "run it as root (user id seen: 1000)" in capsys.readouterr().err


def test_no_memory(lab: Instance, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9 kB\nMemAvailable: 1048576 kB\n", encoding="ascii")
    monkeypatch.setattr(requirements, "MEMINFO", meminfo)
    with pytest.raises(NoMemory, match=r"ops1, llm1 need 4608 MiB of memory, 1024 MiB are available"):
        requirements.require_memory(lab.machines)


def test_no_space(lab: Instance, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1 << 30))
    with pytest.raises(NoSpace, match=r"needs 8192 MiB, 1024 MiB are free"):
        requirements.require_space(tmp_path, lab.machines)


def test_a_host_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--instance", "never", "-i", str(TREE / "inventory/lab"), "exec", "nobody", "--", "true"]
    assert cli.main(arguments) == 9
    assert "it has ops1, llm1" in capsys.readouterr().err


def test_a_command_needs_a_running_host(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--instance", "never", "-i", str(TREE / "inventory/lab"), "exec", "llm1", "--", "true"]
    assert cli.main(arguments) == 8
    assert "lab power-on llm1" in capsys.readouterr().err


def test_disks_of_a_machine_are_named_by_their_serials(lab: Instance) -> None:
    machine = lab.machine("llm1")
    assert isinstance(machine, UserModeKernel)
    assert [disk.name for disk in machine.disks()] == [
        "root.img",
        "LLM1-DATA-1.img",
        "LLM1-DATA-2.img",
        "LLM1-SWAP-1.img",
    ]
