"""Which kernel boots next: outputs of GRUB and mokutil stand in for firmware. They were recorded on Debian 13 with Secure Boot
(tests/lab/firmware, which runs the same code there).
"""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from plugin_modules import ROOT, load
from rendered_role import rendered

kernels = load("module_utils.gpu.kernels")
secure_boot = load("module_utils.gpu.secure_boot")

OLD, NEW = "6.12.107+deb13-amd64", "6.12.118+deb13-amd64"
# As update-grub wrote it, without what menus do not need.
MENU = """if [ "${next_entry}" ] ; then
   set default="${next_entry}"
   set next_entry=
   save_env next_entry
   set boot_once=true
else
   set default="${saved_entry}"
fi
function savedefault {
  if [ -z "${boot_once}" ]; then
    saved_entry="${chosen}"
    save_env saved_entry
  fi
}
menuentry 'Debian GNU/Linux' --class debian --class gnu-linux --class gnu --class os $menuentry_id_option 'gnulinux-simple-1234' {
	if [ x$grub_platform = xxen ]; then insmod xzio; insmod lzopio; fi
	linux	/boot/vmlinuz-NEW root=UUID=1234 ro quiet
}
submenu 'Advanced options for Debian GNU/Linux' $menuentry_id_option 'gnulinux-advanced-1234' {
	menuentry 'Debian GNU/Linux, with Linux NEW' --class debian --class os $menuentry_id_option 'gnulinux-NEW-advanced-1234' {
		if [ x$grub_platform = xxen ]; then insmod xzio; insmod lzopio; fi
	}
	menuentry 'Debian GNU/Linux, with Linux NEW (recovery mode)' $menuentry_id_option 'gnulinux-NEW-recovery-1234' {
	}
	menuentry 'Debian GNU/Linux, with Linux OLD' --class debian --class os $menuentry_id_option 'gnulinux-OLD-advanced-1234' {
	}
	menuentry 'Debian GNU/Linux, with Linux OLD (recovery mode)' $menuentry_id_option 'gnulinux-OLD-recovery-1234' {
	}
}
if [ "$grub_platform" = "efi" ]; then
	fwsetup --is-supported
	if [ "$?" = 0 ]; then
		menuentry 'UEFI Firmware Settings' $menuentry_id_option 'uefi-firmware' {
			fwsetup
		}
	fi
fi
"""
ENTRY = {kernel: f"gnulinux-advanced-1234>gnulinux-{kernel}-advanced-1234" for kernel in (OLD, NEW)}
CERTIFICATE = Path("/etc/llmkeep/modules/modules.der")


class Grub:
    """What GRUB's programs would do; `environment` is grubenv."""

    def __init__(self) -> None:
        self.environment: dict[str, str] = {}
        self.called: list[str] = []

    def __call__(self, argv: list[str]) -> str:
        match argv:
            case ["grub-editenv", "list"]:
                return "".join(f"{name}={value}\n" for name, value in self.environment.items())
            case ["grub-set-default", entry]:
                self.environment["saved_entry"] = entry
            case ["grub-reboot", entry]:
                self.environment["next_entry"] = entry
        self.called.append(argv[0])
        return ""


@pytest.fixture
def boot(tmp_path: Path) -> Path:
    """/boot of a host with two kernels."""
    (tmp_path / "grub").mkdir()
    (tmp_path / "grub/grub.cfg").write_text(MENU.replace("NEW", NEW).replace("OLD", OLD))
    for kernel in (OLD, NEW):
        (tmp_path / f"vmlinuz-{kernel}").touch()
    return tmp_path


def test_the_menu_names_each_kernel_once_and_no_recovery() -> None:
    assert kernels.menu(MENU.replace("NEW", NEW).replace("OLD", OLD)) == ENTRY


def test_the_running_kernel_is_kept_before_a_newer_one_is_installed(boot: Path) -> None:
    grub = Grub()
    assert kernels.choose(NEW, OLD, keep=True, boot=boot, call=grub)
    assert grub.environment == {"saved_entry": ENTRY[OLD]}
    assert not kernels.choose(NEW, OLD, keep=True, boot=boot, call=grub)


def test_a_new_kernel_boots_once_and_the_old_one_stays_the_default(boot: Path) -> None:
    grub = Grub()
    grub.environment = {"saved_entry": ENTRY[OLD]}
    assert kernels.choose(NEW, OLD, boot=boot, call=grub)
    assert grub.environment == {"saved_entry": ENTRY[OLD], "next_entry": ENTRY[NEW]}
    assert not kernels.choose(NEW, OLD, boot=boot, call=grub)


def test_a_kernel_that_was_left_by_a_reset_is_chosen_again(boot: Path) -> None:
    grub = Grub()
    grub.environment = {"saved_entry": ENTRY[OLD], "next_entry": ""}  # what GRUB leaves of it
    assert kernels.choose(NEW, OLD, boot=boot, call=grub)
    assert grub.environment["next_entry"] == ENTRY[NEW]


def test_a_kernel_becomes_the_default_only_once_it_was_accepted(boot: Path) -> None:
    grub = Grub()
    grub.environment = {"saved_entry": ENTRY[OLD]}
    assert not kernels.choose(NEW, NEW, accepted=False, boot=boot, call=grub)
    assert grub.environment["saved_entry"] == ENTRY[OLD]
    assert kernels.choose(NEW, NEW, accepted=True, boot=boot, call=grub)
    assert grub.environment["saved_entry"] == ENTRY[NEW]


def test_check_mode_chooses_nothing(boot: Path) -> None:
    grub = Grub()
    assert kernels.choose(NEW, OLD, boot=boot, check=True, call=grub)
    assert (grub.environment, grub.called) == ({}, [])


def test_a_container_boots_what_it_is_given(tmp_path: Path) -> None:
    assert not kernels.choose(NEW, OLD, boot=tmp_path, call=Grub())


def test_a_kernel_whose_certificate_is_not_enrolled_is_not_chosen(boot: Path) -> None:
    grub = Grub()
    with pytest.raises(kernels.Failed, match=rf"not enrolled\. {NEW.replace('+', '.')} was not chosen"):
        kernels.choose(NEW, OLD, refusal="not enrolled", boot=boot, call=grub)
    assert (grub.environment, grub.called) == ({}, [])


def test_a_host_without_grub_or_without_the_kernel_is_refused(boot: Path) -> None:
    with pytest.raises(kernels.Failed, match=r"GRUB's menu has no kernel 6\.12\.999, only"):
        kernels.choose("6.12.999", OLD, boot=boot, call=Grub())
    (boot / "grub/grub.cfg").unlink()
    with pytest.raises(kernels.Failed, match="chooses kernels by GRUB only"):
        kernels.choose(NEW, OLD, boot=boot, call=Grub())


def test_a_driver_is_accepted_by_the_version_that_is_loaded(tmp_path: Path) -> None:
    loaded = tmp_path / "version"
    assert not kernels.is_accepted("580.105.08", loaded)
    loaded.write_text("580.105.08\n")
    assert kernels.is_accepted("580.105.08", loaded)
    assert not kernels.is_accepted("550.163.01", loaded)


def test_what_moves_is_held_and_freed_together() -> None:
    calls: list[list[str]] = []

    def apt_mark(argv: list[str]) -> str:
        calls.append(argv)
        return "vim\nlinux-image-x\n" if argv[1] == "showhold" else ""

    assert kernels.hold(["linux-image-x", "nvidia-smi"], call=apt_mark) == ["nvidia-smi"]
    assert kernels.hold(["linux-image-x", "nvidia-smi"], free=True, call=apt_mark) == ["linux-image-x"]
    changes = [argv for argv in calls if argv[1] != "showhold"]
    assert changes == [["apt-mark", "hold", "nvidia-smi"], ["apt-mark", "unhold", "linux-image-x"]]


def test_the_packages_of_every_set_are_freed_before_one_moves(tmp_path: Path) -> None:
    given = {"gpu_set": "nvidia-580-open", "__gpu_fit": {"kernel": "6.12.1", "nvswitches": 0}}
    wanted = {"freed": "__gpu_freed_packages", "held": "__gpu_packages"}
    made = rendered(tmp_path, "gpu", wanted, "gpu1", {"gpu1.estate.internal": "10.0.0.1"}, given)
    assert set(made["held"]) < set(made["freed"])
    assert {"nvidia-kernel-dkms", "nvidia-tesla-535-smi", "nvidia-fabricmanager"} <= set(made["freed"])
    assert "" not in made["freed"]


# What mokutil 0.7.2 prints; its exit code for one answer has changed between versions.
ON, ASKED = "SecureBoot enabled", f"{CERTIFICATE} is "


@pytest.mark.parametrize(
    ("state", "tested", "told"),
    [
        ("EFI variables are not supported on this system", "", ""),
        ("SecureBoot disabled", "", ""),
        ("SecureBoot disabled\nPlatform is in Setup Mode", "", ""),
        ("SecureBoot enabled\nSecureBoot validation is disabled in shim", "", ""),
        (ON, f"{ASKED}already enrolled", ""),
        (ON, f"{ASKED}not enrolled", "is not enrolled: after a reboot the kernel would load no driver. Run `mokutil --import"),
        (ON, f"{ASKED}already in the enrollment request", "waits for its enrolment: reboot into the kernel that runs"),
        (ON, f"Failed to open {CERTIFICATE}", "(mokutil said 'Failed to open"),
        ("", f"{ASKED}not enrolled", "is not enrolled"),
        ('Failed to read "SecureBoot" variable: I/O error', "", "is not enrolled (mokutil said '')"),
    ],
)  # fmt: skip
def test_a_reboot_is_refused_until_the_certificate_is_enrolled(state: str, tested: str, told: str) -> None:
    refused = secure_boot.refusal(state, tested, CERTIFICATE)
    assert told in refused if told else not refused


def test_the_program_says_why_and_ends_with_1(tmp_path: Path, fake_mokutil: Callable[[str], Path]) -> None:
    program = ROOT / "plugins/module_utils/gpu/secure_boot.py"
    text = program.read_text().replace("/usr/local/sbin", str(fake_mokutil("SecureBoot enabled")))
    done = subprocess.run(
        ["python3.13", "-c", text, tmp_path / "modules.der"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "is not enrolled" in done.stdout


@pytest.fixture
def fake_mokutil(tmp_path: Path) -> Callable[[str], Path]:
    """A stand-in of mokutil that tells a state and knows no certificate."""

    def made(state: str) -> Path:
        program = tmp_path / "bin/mokutil"
        program.parent.mkdir()
        program.write_text(f'#!/bin/sh\n[ "$1" = --sb-state ] && echo {state} || echo "$2 is not enrolled"\n')
        program.chmod(0o755)
        return program.parent

    return made
