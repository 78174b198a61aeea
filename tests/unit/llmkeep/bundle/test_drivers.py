"""Driver sets of a profile: their packages, the CUDA of the wheels beside them, and what contradicts itself."""

from typing import Any

import pytest

from llmkeep.bundle import drivers, lock
from llmkeep.errors import LlmkeepError

WANTED = lock.catalogue()
CUDA_12 = {"vllm": ["torch==2.10.0", "nvidia-cuda-runtime-cu12==12.8.90", "nvidia-cublas-cu12==12.8.4.1"]}
CUDA_13 = {"vllm": ["torch==2.14.0", "nvidia-cuda-runtime==13.0.96", "nvidia-nccl-cu13==2.30.7"]}
PACKAGES = [f"{name}=550.163.01-4~bpo13+1" for name in ("nvidia-kernel-dkms", "libcuda1", "nvidia-smi")]


def profiles(**changed: Any) -> dict[str, Any]:
    """Profile gpu-debian with its set debian-550 alone, and changes."""
    return {"ours": {**WANTED["profiles"]["gpu-debian"], "driver_sets": ["debian-550"], **changed}}


def faults(
    environments: dict[str, list[str]] | None = None,
    debs: list[str] | None = None,
    **changed: Any,
) -> list[str]:
    return list(drivers.faults(profiles(**changed), "ours", environments or {}, debs or PACKAGES))


def test_a_driver_with_wheels_of_its_cuda_is_taken() -> None:
    assert faults(CUDA_12) == []


def test_wheels_of_cuda_13_are_refused_with_driver_550() -> None:
    (fault,) = faults(CUDA_13)
    assert (
        "vllm of profile ours has CUDA 13.0, but its set debian-550 supports driver 550.163.01, CUDA from"
        in fault
    )
    assert "choose wheels for that CUDA version under environments, as profile gpu-debian does" in fault


def test_wheels_of_two_cudas_are_refused() -> None:
    (fault,) = faults({"vllm": CUDA_12["vllm"] + CUDA_13["vllm"]})
    assert "the environment vllm of profile ours mixes wheels for CUDA 12 and 13" in fault


def test_a_set_whose_packages_have_two_versions_is_refused() -> None:
    (fault,) = faults(CUDA_12, [*PACKAGES[:2], "nvidia-smi=1:560.35-1"])
    assert "the set debian-550 needs driver 550.163.01, but its source has nvidia-smi 1:560.35-1" in fault


def test_wheels_of_another_python_are_refused() -> None:
    good = ["torch-2.10.0-cp313-cp313-manylinux_2_28_x86_64.whl", "vllm-0.19.1-cp38-abi3-linux_x86_64.whl"]
    assert list(drivers.wheel_faults([*good, "six-1-py2.py3-none-any.whl"], "3.13")) == []
    (fault,) = drivers.wheel_faults([*good, "torch-2.10.0-cp312-cp312-manylinux_2_28_x86_64.whl"], "3.13")
    assert fault.startswith("torch-2.10.0-cp312-cp312-manylinux_2_28_x86_64.whl are not for Python 3.13")


def test_a_bundle_without_a_sets_driver_names_set_packages_and_what_to_do() -> None:
    (sentence,) = drivers.absent(WANTED["profiles"], "gpu")
    assert sentence.startswith("WITHOUT the driver of set nvidia-580-open (nvidia-kernel-open-dkms, ")
    assert "profile gpu lacks the source nvidia. Add it in artifacts.d" in sentence
    assert not list(drivers.absent(WANTED["profiles"], "gpu-debian"))


def test_a_set_that_does_not_exist_is_refused_with_those_that_do() -> None:
    with pytest.raises(
        LlmkeepError, match="names the driver sets nvidia-510, but roles/gpu has only nvidia-5"
    ):
        drivers.chosen(profiles(driver_sets=["nvidia-510"]), "ours")


def test_packages_of_a_set_join_the_profile_that_has_its_source() -> None:
    roles = lock.packages(WANTED, "gpu-debian")["roles"]
    assert roles["debian-550"][:2] == ["nvidia-kernel-dkms", "libcuda1"]
    assert "nvidia-580-open" not in lock.packages(WANTED, "gpu")["roles"]
