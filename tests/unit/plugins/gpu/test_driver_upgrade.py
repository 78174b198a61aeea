"""One host's steps to another driver and back, with the real dkms; recorded outputs stand in for apt and GRUB."""

import json
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from plugin_modules import load
from standin_driver import HEADERS_MAKEFILE, dkms_conf

dkms = load("module_utils.gpu.dkms")
kernels = load("module_utils.gpu.kernels")
previous = load("module_utils.gpu.previous")
rollout = load("module_utils.config.rollout")
upgrade = load("module_utils.gpu.upgrade")

KERNEL = "6.12.999-standin"
SETS = [{"name": "old", "driver": "1.0", "dkms": {"name": "standin"}}]
MENU = """set default="${saved_entry}"
submenu 'Advanced options' $menuentry_id_option 'advanced' {
	menuentry 'OLD' $menuentry_id_option 'gnulinux-OLD-advanced-1' {
	}
	menuentry 'NEW' $menuentry_id_option 'gnulinux-NEW-advanced-1' {
	}
}
"""


class Host:
    """dkms and the compiler are real; apt, dpkg and GRUB keep what they are told."""

    def __init__(self, folder: Path) -> None:
        self.places = dkms.Places(*(folder / name for name in ("modules", "src", "tree", "kept")))
        self.archives, self.boot = folder / "archives", folder / "boot"
        self.versions = {
            "libcuda1": "1:1.0-1",
            "unrelated": "1.0-1",
            "bash": "5.2-1",
            f"linux-image-{KERNEL}": "1.0-9",
        }
        self.held = ["libcuda1", f"linux-image-{KERNEL}"]
        self.removed: set[str] = set()  # their configuration is left
        self.configured = False
        self.grub = {
            "saved_entry": "advanced>gnulinux-NEW-advanced-1",
            "next_entry": "advanced>gnulinux-NEW-advanced-1",
        }
        headers = self.places.modules / KERNEL / "build"
        headers.mkdir(parents=True)
        (headers / "Makefile").write_text(HEADERS_MAKEFILE)
        (headers / ".config").write_text("CONFIG_MODULES=y\n")
        (headers / "include").mkdir()
        for place in (self.places.tree, self.archives, self.boot / "grub"):
            place.mkdir(parents=True)
        (self.archives / "libcuda1_1%3a1.0-1_amd64.deb").write_text("package")
        (self.archives / "unrelated_1.0-1_all.deb").write_text("package")
        for version in ("1.0", "2.0"):
            source = self.places.sources / f"standin-{version}"
            source.mkdir(parents=True)
            (source / "dkms.conf").write_text(dkms_conf(version))
            (source / "standin.c").write_text(f'const char *version(void) {{ return "{version}"; }}\n')
        self.install("1.0")

    def install(self, version: str) -> None:
        driver = dkms.Driver("standin", version, KERNEL)
        dkms.prove(driver, None, self.places)
        dkms.install(driver, None, self.places)

    def upgrade(self) -> None:
        """As role gpu and the packages' own scripts leave the host."""
        self.install("2.0")
        subprocess.run(
            ["dkms", "remove", *self.places.options(), "-m", "standin", "-v", "1.0", "--all"],
            check=True,
            capture_output=True,
        )
        self.versions["libcuda1"] = "1:2.0-1"
        self.held = ["libcuda2"]

    def call(self, argv: list[str]) -> str:
        match argv:
            case ["apt-mark", "showhold"]:
                return "\n".join(self.held)
            case ["apt-mark", "hold", *packages]:
                self.held += packages
            case ["apt-mark", "unhold", *packages]:
                self.held = [each for each in self.held if each not in packages]
            case ["dpkg", *_]:
                self.configured = True
            case ["dpkg-query", *_]:
                status = dict.fromkeys(self.removed, "rc")
                return "".join(
                    f"{status.get(name, 'ii')} \t{name}\t{version}\n"
                    for name, version in self.versions.items()
                )
            case ["apt-get", *words]:
                debs = [Path(word) for word in words if word.endswith(".deb")]
                assert all(deb.read_text() == "package" for deb in debs)
                assert self.configured, "dpkg was interrupted before"
                self.removed = set()
                self.versions |= {
                    deb.name.split("_")[0]: deb.name.split("_")[1].replace("%3a", ":") for deb in debs
                }
            case ["sh", "-c", *_]:
                raise dkms.Failed("apt-get download: the mirror does not have it")
            case ["grub-editenv", "list"]:
                return "".join(f"{name}={entry}\n" for name, entry in self.grub.items())
            case ["grub-editenv", "-", "unset", name]:
                del self.grub[name]
            case ["grub-set-default", entry]:
                self.grub["saved_entry"] = entry
            case _:
                told: str = previous.run(argv)
                return told
        return ""

    def before(self) -> Any:
        return previous.current(KERNEL, SETS, self.places, self.call)

    def keep(self, before: Any) -> None:
        previous.keep(before, self.places, self.call, self.archives)

    def restore(self, before: Any, running: str = KERNEL) -> bool:
        changed: bool = previous.restore(before, running, self.places, self.call, self.boot)
        return changed

    def module(self) -> bytes:
        path: Path = self.places.modules / KERNEL / "updates/dkms/standin.ko"
        return path.read_bytes()


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_what_runs_is_the_driver_of_that_kernel_and_all_packages_of_its_version(host: Host) -> None:
    found = host.before()
    assert (found.name, found.driver, found.version, found.kernel) == ("old", "standin", "1.0", KERNEL)
    assert found.packages == {"libcuda1": "1:1.0-1", "unrelated": "1.0-1"}
    assert str(found) == f"old (standin 1.0 on {KERNEL})"


def test_a_host_without_a_driver_of_the_sets_has_no_way_back(host: Host) -> None:
    with pytest.raises(dkms.Failed, match=r"dkms has no driver of gpu_sets installed .* site --tags gpu"):
        previous.current(
            KERNEL, [{"name": "x", "driver": "1", "dkms": {"name": "nvidia"}}], host.places, host.call
        )


def test_a_package_that_cannot_be_had_again_is_named_before_anything_changes(host: Host) -> None:
    (host.archives / "libcuda1_1%3a1.0-1_amd64.deb").unlink()
    with pytest.raises(
        dkms.Failed, match=r"libcuda1 1:1\.0-1: installed, but neither in .* nothing was changed"
    ):
        host.keep(host.before())


def test_modules_packages_and_holds_come_back_without_a_build(host: Host) -> None:
    before, module = host.before(), host.module()
    host.keep(before)
    host.upgrade()
    assert host.module() != module
    (host.places.sources / "standin-1.0/standin.c").write_text("this builds no more\n")
    assert host.restore(before)
    assert host.module() == module
    assert host.before() == before
    assert not host.restore(before), "a second time changes nothing"


def test_a_package_of_which_the_configuration_is_left_is_installed_again(host: Host) -> None:
    before = host.before()
    host.keep(before)
    host.removed = {"unrelated"}
    assert host.restore(before)
    assert (host.removed, host.held) == (set(), before.held)


def test_grub_boots_the_kernel_of_before_and_no_other_one_once(host: Host) -> None:
    (host.boot / "grub/grub.cfg").write_text(MENU)
    (host.boot / "vmlinuz-NEW").touch()
    assert kernels.make_default("OLD", "NEW", host.boot, host.call)
    assert host.grub == {"saved_entry": "advanced>gnulinux-OLD-advanced-1"}
    assert not kernels.make_default("OLD", "NEW", host.boot, host.call)
    with pytest.raises(kernels.Failed, match="GRUB has no kernel GONE in its menu, only OLD, NEW"):
        kernels.make_default("GONE", "NEW", host.boot, host.call)


# ---------------------------------------------------------------- progress
@pytest.fixture
def writer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[dict[str, Any]]]]:
    """An audit writer that acknowledges, and the events that it took."""
    place, taken = tmp_path_factory.mktemp("audit") / "audit.sock", []
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(place))
    listening.listen()

    def serve() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            with connection, connection.makefile("rb") as lines:
                taken.append(json.loads(lines.readline())["event"])
                connection.sendall(b"1\n")

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield place, taken
    listening.shutdown(socket.SHUT_RDWR)
    listening.close()
    thread.join(5)


def test_a_step_is_on_record_and_then_on_disk_for_root_alone(tmp_path: Path, writer: Any) -> None:
    place, taken = writer
    file = tmp_path / "gpu/upgrade.json"
    progress = rollout.Progress(wanted="new (nvidia 2.0)", previous={"name": "old"})
    rollout.note(file, place, upgrade.KIND, "installed", progress, lambda _: None)
    assert rollout.load(file) == progress
    assert file.stat().st_mode & 0o777 == 0o600
    assert taken[0]["event.action"] == "gpu.driver_upgrade_installed"
    assert taken[0]["event.outcome"] == "success"
    progress.cause = "no answer"
    rollout.note(file, place, upgrade.KIND, "returned", progress, lambda _: None)
    assert (taken[1]["event.outcome"], taken[1]["event.reason"]) == ("failure", "no answer")


@pytest.mark.parametrize("step", ["begun", "booting", "done"])
def test_no_step_forward_is_taken_without_the_record_and_the_way_back_is(tmp_path: Path, step: str) -> None:
    file, gone = tmp_path / "upgrade.json", tmp_path / "audit.sock"
    said: list[str] = []
    with pytest.raises(
        rollout.Failed, match=rf"so {step} is not on the audit record: start llm-audit\.service"
    ):
        rollout.note(file, gone, upgrade.KIND, step, rollout.Progress(), said.append)
    assert not file.exists()
    rollout.note(file, gone, upgrade.KIND, "failed", rollout.Progress(), said.append)
    assert rollout.load(file).step == "failed"
    assert "not on the audit record" in said[0]


def test_a_file_that_cannot_be_read_is_no_fresh_start(tmp_path: Path) -> None:
    file = tmp_path / "upgrade.json"
    file.write_text("{")
    with pytest.raises(rollout.Failed, match="see on the host what runs"):
        rollout.load(file)


def watch(folder: Path, text: str) -> Path:
    """A stand-in for llm-gpu."""
    program = folder / "llm-gpu"
    program.write_text(f"#!/bin/sh\n{text}\n")
    program.chmod(0o755)
    return program


def test_a_watch_that_carries_out_no_order_is_named(tmp_path: Path) -> None:
    program = watch(tmp_path, "[ $1 != status ] || echo echo: in service")
    with pytest.raises(rollout.Failed, match=r"llm-gpu\.service did not drain echo within 0 s"):
        upgrade.order(program, "drain", "why", 0)


def test_an_engine_that_an_operator_drained_is_not_taken_over(tmp_path: Path) -> None:
    refusal = "llm-gpu: 'echo' was drained by ada (new cable): only they change that"
    program = watch(
        tmp_path, f'[ $1 = status ] && echo echo: in service || {{ echo "{refusal}" >&2; exit 3; }}'
    )
    with pytest.raises(rollout.Failed, match="was drained by ada"):
        upgrade.order(program, "drain", "why", 1)


def test_an_engine_that_is_sick_after_the_upgrade_is_not_said_to_be_in_service(tmp_path: Path) -> None:
    program = watch(
        tmp_path, "[ $1 != status ] || echo 'echo: quarantined since now by llm-gpu: GPU 3: lost'"
    )
    with pytest.raises(rollout.Failed, match="echo: by llm-gpu: GPU 3: lost"):
        upgrade.order(program, "undrain", "why", 1)


@pytest.mark.parametrize(
    ("report", "version", "loaded", "told"),
    [
        ({"findings": [], "driver": "2.0"}, "2.0", "2.0", ""),
        (
            {"findings": [], "driver": "2.0"},
            "2.0",
            "1.0",
            "the kernel has loaded the driver 1.0, and not 2.0",
        ),
        ({"findings": [], "driver": "2.0"}, "2.0", "", "the kernel has loaded the driver none, and not 2.0"),
        ({"findings": [], "driver": "1.0"}, "2.0", None, "NVML reports the driver 1.0, and not 2.0"),
        (
            {
                "findings": [{"text": "no CUDA", "gpu": None, "runbook": "no-cuda", "drains": True}],
                "driver": "2.0",
            },
            "2.0",
            None,
            "no CUDA (docs/operate/gpu-health.md#no-cuda)",
        ),
        (
            {
                "findings": [{"text": "hot", "gpu": 1, "runbook": "throttled", "drains": False}],
                "driver": "2.0",
            },
            "2.0",
            None,
            "",
        ),
    ],
)
def test_gpus_are_accepted_with_the_wanted_driver_alone(
    tmp_path: Path, report: Any, version: str, loaded: str | None, told: str
) -> None:
    program = watch(tmp_path, f"echo '{json.dumps(report)}'")
    assert upgrade.complaints(program, version, loaded, True) == told
