"""What dpkg had begun when the power went is completed: real packages, and a real dpkg with a root of its own that is killed."""

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from ansible.playbook.task import Task
from plugin_modules import ROOT, load

packages = load("action.packages")
SCRIPT = ROOT / "roles/_common/files/complete-dpkg.sh"
BAN = "#!/bin/sh\nexit 101\n"

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="dpkg installs as root only")


class Host:
    """A root of dpkg's own, with nothing in it but packages without dependencies whose scripts run outside of it."""

    def __init__(self, folder: Path) -> None:
        self.root, self.debs = folder / "root", folder / "debs"
        self.debs.mkdir()
        for name in ("var/lib/dpkg/updates", "var/lib/dpkg/info", "usr/sbin"):
            (self.root / name).mkdir(parents=True)
        for name in ("status", "available"):
            (self.root / "var/lib/dpkg" / name).touch()
        self.ban = self.root / "usr/sbin/policy-rc.d"
        # A mirror of apt is not here: this one unpacks again, by dpkg, what is kept in a folder.
        self.programs = folder / "bin"
        self.programs.mkdir()
        apt = self.programs / "apt-get"
        apt.write_text(
            f'#!/bin/sh\necho "$@" >> {folder}/apt.log\n'
            f'case "$*" in *--fix-broken*) exec dpkg --install {self.debs}/*.deb;; esac\n'
        )
        apt.chmod(0o755)
        self.asked = folder / "apt.log"
        self.environment = {
            "PATH": f"{self.programs}:/usr/sbin:/usr/bin:/sbin:/bin",
            "DPKG_ROOT": str(self.root),
            "DPKG_ADMINDIR": str(self.root / "var/lib/dpkg"),
        }

    def package(self, name: str, script: str = "postinst", does: str = ":") -> Path:
        """A package with a file and one maintainer script."""
        tree = self.debs.parent / f"tree-{name}"
        (tree / "DEBIAN").mkdir(parents=True)
        (tree / "usr/share" / name).mkdir(parents=True)
        (tree / "usr/share" / name / "file").write_text(name)
        (tree / "DEBIAN/control").write_text(
            f"Package: {name}\nVersion: 1\nArchitecture: all\nMaintainer: Test <test@example>\nDescription: test\n"
        )
        (tree / "DEBIAN" / script).write_text(f"#!/bin/sh\n{does}\n")
        (tree / "DEBIAN" / script).chmod(0o755)
        deb = self.debs / f"{name}.deb"
        subprocess.run(["dpkg-deb", "--build", tree, deb], check=True, capture_output=True)
        return deb

    def dpkg(self, *words: str | Path) -> "subprocess.Popen[bytes]":
        """Maintainer scripts see DPKG_ROOT and run outside of it."""
        return subprocess.Popen(
            ["dpkg", "--force-script-chrootless", *words],
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def cut(self, *words: str | Path, when: Path) -> None:
        """The power goes while dpkg is at work and the file has come."""
        process = self.dpkg(*words)
        for _ in range(600):
            if when.exists():
                break
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        when.unlink()

    def ask(self, function: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["/bin/sh", "-euc", f"{SCRIPT.read_text()}\n{function}"],  # as install-python.sh has it
            # dpkg reads the configuration of its user, too.
            env=self.environment | {"HOME": str(self.home())},
            capture_output=True,
            text=True,
            check=False,
        )

    def home(self) -> Path:
        home = self.root.parent / "home"
        home.mkdir(exist_ok=True)
        (home / ".dpkg.cfg").write_text("force-script-chrootless\n")
        return home

    def states(self) -> dict[str, str]:
        told = subprocess.run(
            ["dpkg-query", "--show", "--showformat=${Package} ${db:Status-Status}\n"],
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        return dict(line.split() for line in told.stdout.splitlines())


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def once(mark: Path) -> str:
    """A script that hangs the first time and says so."""
    return f'[ -e "{mark}.done" ] || {{ touch "{mark}.done" "{mark}"; sleep 600; }}'


def test_a_host_with_nothing_half_done_says_nothing_and_asks_no_apt(host: Host) -> None:
    assert host.dpkg("--install", host.package("whole")).wait() == 0
    for function in ("half_done", "complete"):
        told = host.ask(function)
        assert (told.returncode, told.stdout, told.stderr) == (0, "", "")
    assert not host.asked.exists()
    assert not host.ban.exists()


def test_what_was_cut_while_it_was_configured_is_configured(host: Host, tmp_path: Path) -> None:
    seen = tmp_path / "ban-seen"
    mark = tmp_path / "mark"
    first = host.package("first")
    second = host.package("second", does=f"{once(mark)}; cp {host.ban} {seen}")
    host.cut("--install", first, second, when=mark)
    assert list((host.root / "var/lib/dpkg/updates").glob("[0-9]*")), "apt refuses for these"
    looked = host.ask("half_done")
    assert "entries in dpkg's journal: " in looked.stdout
    assert "second is half-configured" in looked.stdout
    assert host.states()["second"] == "half-configured", "who only looks changes nothing"
    done = host.ask("complete")
    assert (done.returncode, done.stdout) == (0, looked.stdout)
    assert host.states() == {"first": "installed", "second": "installed"}
    assert seen.read_text() == BAN, "no service starts while packages are configured"
    assert not host.ban.exists()
    assert not host.asked.exists(), "no archive was wanted"
    assert host.ask("half_done").stdout == ""


def test_what_was_cut_while_it_was_unpacked_is_unpacked_again(host: Host, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    host.cut("--install", host.package("torn", "preinst", once(mark)), when=mark)
    assert host.states() == {"torn": "half-installed"}
    host.ban.write_text(BAN)  # of the apt that was cut
    done = host.ask("complete -o Dir::Etc::sourceparts=/dev/null")
    assert "torn is half-installed" in done.stdout
    assert "policy-rc.d lets no service start" in done.stdout
    assert (done.returncode, host.states()) == (0, {"torn": "installed"})
    update, mend = host.asked.read_text().splitlines()
    assert update.endswith("-o Dir::Etc::sourceparts=/dev/null update")
    assert mend.endswith("-o Dir::Etc::sourceparts=/dev/null install --fix-broken")
    assert not host.ban.exists()


def test_a_journal_alone_is_closed(host: Host) -> None:
    assert host.dpkg("--install", host.package("whole")).wait() == 0
    status = (host.root / "var/lib/dpkg/status").read_text()
    (host.root / "var/lib/dpkg/updates/0000").write_text(status)
    assert host.ask("complete").stdout == "entries in dpkg's journal: 1\n"
    assert host.ask("half_done").stdout == ""


def test_a_ban_on_services_that_is_the_operators_own_stays(host: Host) -> None:
    host.ban.write_text("#!/bin/sh\n# Ours.\nexit 101\n")
    assert (host.ask("complete").stdout, host.ban.exists()) == ("", True)


def test_what_cannot_be_completed_is_told_with_dpkgs_own_words(host: Host, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    broken = f'[ -e "{mark}.done" ] && {{ echo "the disk is full" >&2; exit 3; }}; touch "{mark}.done" "{mark}"; sleep 600'
    host.cut("--install", host.package("bad", does=broken), when=mark)
    told = host.ask("complete")
    assert told.returncode == 1
    assert "bad is half-configured" in told.stdout
    assert "the disk is full" in told.stdout
    assert not host.ban.exists()


@pytest.mark.parametrize("seconds", [0.02, 0.05, 0.1, 0.15, 0.2, 0.3])
def test_goes_on_after_it_was_cut_anywhere(host: Host, seconds: float) -> None:
    debs = [host.package(f"part-{number}", does="sleep 0.02") for number in range(8)]
    process = host.dpkg("--install", *debs)
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert host.ask("complete").returncode == 0
    assert host.ask("half_done").stdout == ""
    assert host.dpkg("--install", *debs).wait() == 0
    assert set(host.states().values()) == {"installed"}


def test_there_is_what_dpkg_has_whole_and_apt_would_keep(tmp_path: Path) -> None:
    host = Host(tmp_path)
    whole, half = host.package("whole"), host.package("half", does="exit 1")
    assert host.dpkg("--install", whole).wait() == 0
    host.dpkg("--install", half).wait()
    mark = host.programs / "apt-mark"
    for brought_by_others, wanted, there in (
        ("", "whole", 0),
        ("", "whole half", 1),
        ("", "whole stranger", 1),
        ("echo whole", "whole", 1),
        ("exit 100", "whole", 1),
    ):
        mark.write_text(f"#!/bin/sh\n{brought_by_others}\n")
        mark.chmod(0o755)
        assert bool(host.ask(f"all_there {wanted}").returncode) is bool(there), (brought_by_others, wanted)


class Action(packages.ActionModule):  # type: ignore[misc, name-defined]
    """The action plugin with a host that answers as it is told."""

    def __init__(self, check: bool, answer: dict[str, Any], **arguments: object) -> None:
        self._task = Task()
        self._task.args = arguments
        self._task.check_mode = check
        self.answer = answer
        self.ran: list[str] = []
        self.installed: list[tuple[str, dict[str, Any]]] = []

    def run(self, tmp: None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        super_run = packages.ActionBase.run
        packages.ActionBase.run = lambda *_: {}
        try:
            result: dict[str, Any] = super().run(tmp, task_vars)
            return result
        finally:
            packages.ActionBase.run = super_run

    def _low_level_execute_command(self, command: str, executable: str) -> dict[str, Any]:
        assert executable == "/bin/sh"
        self.ran += command.removeprefix(SCRIPT.read_text()).strip().splitlines()
        return {"rc": 0, "stdout": "", "stderr": ""} | self.answer

    def _execute_module(
        self, name: str, module_args: dict[str, Any], task_vars: dict[str, Any]
    ) -> dict[str, Any]:
        assert task_vars is not None
        self.installed.append((name, module_args))
        return {"changed": False}


ALL_THERE = f"all_there redis || exit {packages.MISSING}"
SOURCE_IS_THERE = f"test -e {packages.SOURCE} || all_there redis || exit {packages.NO_SOURCE}"


def test_packages_are_installed_as_all_roles_do_and_the_host_is_looked_at_once_a_run() -> None:
    action = Action(False, {"rc": packages.MISSING}, name=["redis"])
    result = action.run(task_vars={"ansible_facts": {}})
    assert action.ran == ["complete || exit 1", ALL_THERE]
    assert action.installed == [
        ("ansible.builtin.apt", {"name": ["redis"], "install_recommends": False, "policy_rc_d": 101, "lock_timeout": 300})
    ]  # fmt: skip
    assert (result["changed"], result["completed"]) == (False, [])
    again = Action(False, {"rc": packages.MISSING}, name=["redis"])
    again.run(task_vars={"ansible_facts": result["ansible_facts"]})
    assert (again.ran, len(again.installed)) == ([ALL_THERE], 1)


def test_what_is_there_is_no_question_for_apt() -> None:
    action = Action(False, {}, name=["redis"])
    result = action.run(task_vars={"ansible_facts": {}})
    assert (action.installed, result["changed"]) == ([], False)


def test_lists_are_read_anew_though_all_is_there_and_not_in_check_mode() -> None:
    update = f"{packages.UPDATE} || exit {packages.MISSING}"
    for check, ran in ((False, [update, ALL_THERE]), (True, [SOURCE_IS_THERE, ALL_THERE])):
        action = Action(check, {}, name=["redis"], update_cache=True)
        action.run(task_vars={"ansible_facts": {packages.WHOLE: True}})
        assert (action.ran, action.installed) == (ran, [])


def test_whether_packages_are_to_go_is_for_apt_to_say() -> None:
    action = Action(False, {}, name=["redis"], state="absent")
    action.run(task_vars={"ansible_facts": {packages.WHOLE: True}})
    assert (action.ran, len(action.installed)) == ([], 1)


def test_what_was_completed_is_a_change() -> None:
    action = Action(False, {"stdout": "redis is unpacked\r\n"}, name=["redis"])
    result = action.run(task_vars={"ansible_facts": {}})
    assert (result["changed"], result["completed"]) == (True, ["redis is unpacked"])


def test_check_mode_says_what_is_half_done_and_changes_nothing() -> None:
    action = Action(True, {"stdout": "redis is unpacked\n"}, name=["redis"])
    result = action.run(task_vars={"ansible_facts": {}})
    assert (action.ran, action.installed) == (["half_done", SOURCE_IS_THERE, ALL_THERE], [])
    assert (result["changed"], result["completed"]) == (True, ["redis is unpacked"])


def test_check_mode_does_not_ask_the_apt_of_a_host_that_has_no_source_of_the_estate_yet() -> None:
    action = Action(True, {"rc": packages.NO_SOURCE}, name=["redis"], state="present", purge=True)
    result = action.run(task_vars={"ansible_facts": {}})
    assert action.ran == ["half_done", SOURCE_IS_THERE]
    assert (action.installed, result["changed"]) == ([], True)
    assert "from the estate's mirror: redis" in result["diff"]["prepared"]


def test_check_mode_has_apt_write_no_ban_on_services() -> None:
    action = Action(True, {"rc": packages.MISSING}, name=["redis"])
    action.run(task_vars={"ansible_facts": {}})
    [(_, arguments)] = action.installed
    assert "policy_rc_d" not in arguments


def test_what_cannot_be_completed_fails_with_a_way_out() -> None:
    action = Action(False, {"rc": 1, "stdout": "redis is unpacked\nE: no space\n"}, name=["redis"])
    result = action.run(task_vars={"ansible_facts": {}})
    assert result["failed"]
    assert "redis is unpacked; E: no space" in result["msg"]
    assert "apt-get install --fix-broken" in result["msg"]
    assert not action.installed
