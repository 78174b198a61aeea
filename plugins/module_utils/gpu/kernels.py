"""Which kernel boots next: a new one once, by GRUB, and by default only after it was accepted.

A kernel that does not come up is left by switching the machine off and on: GRUB forgets `next_entry` before it boots it, so
the boot after it takes the kernel that is still the default.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

from ansible_collections.llmkeep.estate.plugins.module_utils.config import rollout

SECONDS = 120
ENTRY = re.compile(r"^\s*(?P<kind>menuentry|submenu)\b.*\$menuentry_id_option '(?P<id>[^']+)' \{\s*$")
KERNEL = re.compile(r"gnulinux-(?P<kernel>.+)-advanced-")
SAVED = 'set default="${saved_entry}"'


class Failed(rollout.Failed):  # type: ignore[misc]
    """The kernel cannot be chosen; the message says why and what to do."""


def run(argv: list[str]) -> str:
    """Output of a program; Failed with its words if it fails or is missing."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=SECONDS, check=False)
    except FileNotFoundError:
        raise Failed(
            f"{argv[0]} is not installed on this host, whose kernels are in /boot: install grub-efi-amd64"
        ) from None
    if done.returncode != 0:
        raise Failed(f"{' '.join(argv)} ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def menu(config: str) -> dict[str, str]:
    """GRUB's name of each kernel's entry (SUBMENU>ENTRY) by release, from grub.cfg; recovery entries are left out."""
    entries: dict[str, str] = {}
    submenus: list[str] = []
    depth: list[str] = []
    for line in config.splitlines():
        if entry := ENTRY.match(line):
            depth.append(entry["kind"])
            if entry["kind"] == "submenu":
                submenus.append(entry["id"])
            elif kernel := KERNEL.match(entry["id"]):
                entries.setdefault(kernel["kernel"], ">".join([*submenus, entry["id"]]))
        elif line.strip() == "}" and depth and depth.pop() == "submenu":
            submenus.pop()
    return entries


def chosen(environment: str) -> dict[str, str]:
    """`saved_entry` and `next_entry`, from what `grub-editenv list` prints."""
    return dict(line.split("=", 1) for line in environment.splitlines() if "=" in line)


def boots_itself(boot: Path, running: str) -> bool:
    """Whether the host has the kernel that runs. A container has not: it is given one."""
    return (boot / f"vmlinuz-{running}").exists()


def is_accepted(version: str, loaded: Path = Path("/sys/module/nvidia/version")) -> bool:
    """Whether the running kernel has loaded this version of the driver."""
    return loaded.exists() and loaded.read_text().strip() == version


def choose(
    kernel: str,
    running: str,
    *,
    keep: bool = False,
    accepted: bool = False,
    refusal: str = "",
    boot: Path = Path("/boot"),
    check: bool = False,
    call: Callable[[list[str]], str] = run,
) -> bool:
    """Have GRUB boot the right kernel; whether that takes a change.

    KEEP: the kernel that runs stays the default, whatever is installed next. Otherwise KERNEL boots once, unless it runs; then,
    if it was ACCEPTED, it becomes the default. REFUSAL: why KERNEL must not boot.
    """
    if not boots_itself(boot, running):
        return False
    config = boot / "grub/grub.cfg"
    if not config.exists():
        raise Failed(f"{config} is missing: llmkeep chooses kernels by GRUB only; install grub-efi-amd64")
    changed = SAVED not in config.read_text()
    if changed and not check:
        call(["update-grub"])
    entries = menu(config.read_text())
    once = not keep and kernel != running
    for version in [running, kernel] if once else [running]:
        if version not in entries:
            raise Failed(
                f"GRUB's menu has no kernel {version}, only {', '.join(entries) or 'none'}: install linux-image-{version}"
            )
    if once and refusal:
        raise Failed(f"{refusal}. {kernel} was not chosen; {running} boots")
    now = chosen(call(["grub-editenv", "list"]))
    if once:
        command, name, entry = "grub-reboot", "next_entry", entries[kernel]
    elif keep or accepted:
        command, name, entry = "grub-set-default", "saved_entry", entries[running]
    else:
        return changed
    if now.get(name) == entry:
        return changed
    if not check:
        call([command, entry])
    return True


def make_default(kernel: str, running: str, boot: Path, call: Callable[[list[str]], str]) -> bool:
    """Have GRUB boot a kernel by default, and no other one once; whether that took a change. Failed if GRUB does not know it."""
    if not boots_itself(boot, running):
        return False
    entries = menu((boot / "grub/grub.cfg").read_text())
    if kernel not in entries:
        raise Failed(
            f"GRUB has no kernel {kernel} in its menu, only {', '.join(entries) or 'none'}: install linux-image-{kernel}"
        )
    now = chosen(call(["grub-editenv", "list"]))
    if once := now.get("next_entry"):
        call(["grub-editenv", "-", "unset", "next_entry"])
    if wrong := now.get("saved_entry") != entries[kernel]:
        call(["grub-set-default", entries[kernel]])
    return bool(once) or wrong


def hold(
    packages: list[str], free: bool = False, check: bool = False, call: Callable[[list[str]], str] = run
) -> list[str]:
    """Have apt leave packages as they are, or FREE them for a move; the names that this concerned."""
    held = set(call(["apt-mark", "showhold"]).split())
    concerned = sorted(set(packages) & held if free else set(packages) - held)
    if concerned and not check:
        call(["apt-mark", "unhold" if free else "hold", *concerned])
    return concerned
