"""A driver set against the cards that sysfs shows (a folder stands in for it), the next kernel, and Secure Boot."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator
from called_module import called
from plugin_modules import ROOT, load

cards = load("module_utils.gpu.cards")
driver_set = load("module_utils.gpu.driver_set")
driver_fit = load("modules.driver_fit")

SETS = {
    one["name"]: one for one in yaml.safe_load((ROOT / "roles/gpu/defaults/main.yml").read_text())["gpu_sets"]
}
OPTION = yaml.safe_load((ROOT / "roles/gpu/meta/argument_specs.yml").read_text())["argument_specs"]["main"][
    "options"
]["gpu_sets"]
SPECIFIED = {"gpu_sets": {key: OPTION[key] for key in ("type", "elements", "options")}}
KERNEL = "6.12.118+deb13-amd64"
A100, H100, B200, RTX_4090, V100, K80 = 0x20B2, 0x2330, 0x2901, 0x2684, 0x1DB5, 0x102D
A100_SWITCH, H100_SWITCH = 0x1AF1, 0x22A3


def bus(folder: Path, *devices: tuple[int, int, int]) -> Path:
    """PCI devices as sysfs shows them: vendor, device, class."""
    for number, (vendor, device, kind) in enumerate(devices):
        place = folder / f"0000:{number:02x}:00.0"
        place.mkdir(parents=True)
        for name, value in (("vendor", vendor), ("device", device), ("class", kind)):
            (place / name).write_text(f"0x{value:x}\n")
    return folder


def gpu(device: int) -> tuple[int, int, int]:
    return cards.NVIDIA, device, 0x030200


def wrong(
    devices: Path, name: str, kernel: str = KERNEL, secure_boot: bool = False, signs: bool = True
) -> str:
    found, switches = cards.inventory(devices)
    return " | ".join(driver_set.misfits(SETS[name], found, switches, kernel, secure_boot, signs))


def test_cards_are_told_from_other_devices(tmp_path: Path) -> None:
    audio, other, switch = (
        (cards.NVIDIA, 0x22BA, 0x040300),
        (0x8086, 0x56C0, 0x030000),
        (cards.NVIDIA, A100_SWITCH, 0x068000),
    )
    found, switches = cards.inventory(bus(tmp_path, gpu(A100), audio, other, switch, switch, gpu(A100)))
    assert ([card.address for card in found], switches) == (["0000:00:00.0", "0000:05:00.0"], 2)


@pytest.mark.parametrize(
    ("device", "generation"),
    [(V100, "volta"), (0x1EB8, "turing"), (A100, "ampere"), (0x2236, "ampere"), (RTX_4090, "ada"), (H100, "hopper"),
     (0x2335, "hopper"), (B200, "blackwell"), (0x2BB5, "blackwell"), (0x3182, "blackwell"), (K80, ""), (0x15F8, "")],
)  # fmt: skip
def test_a_device_id_has_its_generation(device: int, generation: str) -> None:
    assert cards.generation(device) == generation


@pytest.mark.parametrize("name", SETS)
def test_eight_a100_are_served_by_every_set(tmp_path: Path, name: str) -> None:
    assert not wrong(bus(tmp_path, *[gpu(A100)] * 8), name)


@pytest.mark.parametrize(
    ("devices", "name", "told"),
    [
        ([], "nvidia-580-open", "it has no NVIDIA GPU on its PCI bus"),
        ([gpu(K80)], "debian-550", "the GPU 0000:00:00.0 (PCI id 10de:102d) is of no generation"),
        ([gpu(V100)], "nvidia-580-open", "is volta, and the set nvidia-580-open (open) serves turing, ampere,"),
        ([gpu(A100), gpu(B200)], "debian-550", "the GPU 0000:01:00.0 (PCI id 10de:2901) is blackwell"),
        ([gpu(H100), (cards.NVIDIA, H100_SWITCH, 0x068000)], "debian-550", "it has 1 NVSwitches, but the set debian-550 has no"),
    ],
)  # fmt: skip
def test_cards_that_the_set_does_not_serve_are_named(
    tmp_path: Path, devices: list[tuple[int, int, int]], name: str, told: str
) -> None:
    assert told in wrong(bus(tmp_path, *devices), name)


@pytest.mark.parametrize(
    "kernel", ["6.11.9-amd64", "6.13.0-amd64", "7.2.12+deb14-amd64", "", "6.1.0-40-amd64"]
)
def test_a_driver_for_another_kernel_is_refused(tmp_path: Path, kernel: str) -> None:
    told = wrong(bus(tmp_path, gpu(A100)), "nvidia-580-open", kernel)
    assert (
        f"boots next is {kernel}, and the set nvidia-580-open is for kernels from 6.12 and below 6.13" in told
    )


@pytest.mark.parametrize("kernel", ["6.12.0-amd64", "6.12.118+deb13-cloud-amd64", "6.12-rc1"])
def test_a_kernel_in_the_range_is_taken(tmp_path: Path, kernel: str) -> None:
    assert not wrong(bus(tmp_path, gpu(A100)), "nvidia-580-open", kernel)


def test_secure_boot_refuses_modules_that_are_not_signed(tmp_path: Path) -> None:
    devices = bus(tmp_path, gpu(A100))
    assert "Secure Boot is on and modules are not signed" in wrong(
        devices, "debian-550", secure_boot=True, signs=False
    )
    assert not wrong(devices, "debian-550", secure_boot=True, signs=True)
    assert not wrong(devices, "debian-550", secure_boot=False, signs=False)


@pytest.mark.parametrize(
    ("content", "on"), [(b"\6\0\0\0\1", True), (b"\6\0\0\0\0", False), (b"", False), (None, False)]
)
def test_secure_boot_is_read_from_the_firmware_s_variable(
    tmp_path: Path, content: bytes | None, on: bool
) -> None:
    if content is not None:
        (tmp_path / "variable").write_bytes(content)
    assert driver_set.secure_boot_is_on(tmp_path / "variable") is on


def test_sets_keep_to_what_nvidia_s_two_flavours_serve() -> None:
    for one in SETS.values():
        assert "volta" not in one["generations"] or one["flavour"] == "proprietary", one["name"]
        assert "blackwell" not in one["generations"] or one["flavour"] == "open", one["name"]


@pytest.mark.parametrize(
    "mixed",
    [
        {"fabric_manager_version": "570.1"},
        {"driver": None},
        {"flavour": "both"},
        {"generations": ["kepler"]},
        {"kernel": {"from": "6.12"}},
    ],
)  # fmt: skip
def test_a_mixed_set_cannot_be_expressed(mixed: dict[str, Any]) -> None:
    good = SETS["nvidia-580-open"]
    assert not ArgumentSpecValidator(SPECIFIED).validate({"gpu_sets": list(SETS.values())}).error_messages
    changed = {key: value for key, value in {**good, **mixed}.items() if value is not None}
    assert ArgumentSpecValidator(SPECIFIED).validate({"gpu_sets": [changed]}).error_messages


def test_the_module_fails_with_every_misfit_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(driver_fit.dkms, "next_kernel", lambda _flavour: "7.2.12-amd64")
    devices = str(bus(tmp_path, gpu(V100)))
    given = {"driver_set": SETS["nvidia-580-open"], "flavour": "amd64", "signs": True, "devices": devices}
    result = called(driver_fit, given, capsys)
    assert result["failed"]
    assert "nothing was changed. the GPU 0000:00:00.0" in result["msg"]
    assert "boots next is 7.2.12-amd64" in result["msg"]
