"""Which hosts may get an environment with CUDA: by the version that NVIDIA's driver states. The drivers here are files."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from plugin_modules import ROOT, load
from rendered_role import played, rendered

cuda = load("filter.cuda")
LOCK, DEBIAN_LOCK = (
    yaml.safe_load((ROOT / f"artifacts.lock.d/{name}.yml").read_text()) for name in ("gpu", "gpu-debian")
)
ROLE = yaml.safe_load((ROOT / "roles/gpu/defaults/main.yml").read_text())
CLOSED = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}  Sun Jul 27 07:05:32 UTC 2025\nGCC version: gcc 14.2.0\n"
OPEN = (
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build  (builder@host)  Tue Nov  4\n"
)


@pytest.mark.parametrize("environment", ["serving-cuda", "training-cuda", "vllm"])
def test_the_driver_that_a_locked_environment_needs_is_known(environment: str) -> None:
    assert int(cuda.cuda_version(LOCK, environment).split(".")[0]) in cuda.OLDEST_DRIVER


@pytest.mark.parametrize("environment", ["serving-cuda", "training-cuda", "vllm"])
def test_debians_drivers_run_the_wheels_of_profile_gpu_debian_and_no_others(environment: str) -> None:
    stated = CLOSED.format("550.163.01")
    assert cuda.cuda_driver_fault(DEBIAN_LOCK, environment, stated) == ""
    for name in ("debian-550", "debian-tesla-535", "nvidia-580-open"):
        assert cuda.cuda_set_fault(DEBIAN_LOCK, environment, name, ROLE["gpu_sets"]) == ""
        assert bool(cuda.cuda_set_fault(LOCK, environment, name, ROLE["gpu_sets"])) == name.startswith(
            "debian"
        )


@pytest.mark.parametrize("driver_set", ROLE["gpu_sets"], ids=lambda entry: str(entry["name"]))
def test_a_sets_cuda_range_is_that_of_its_driver(driver_set: dict[str, Any]) -> None:
    assert cuda.mixed_set_fault(driver_set) == ""


def test_the_bundle_has_to_carry_the_driver_packages_of_each_hosts_set() -> None:
    hosts = {"a": {"gpu_set": "debian-550"}, "b": {"gpu_set": "provided"}, "c": {}, "d": {}}
    purls = cuda.driver_purls({"gpu": ["a", "b", "c"], "all": list(hosts)}, hosts, ROLE)
    names = [purl.split("@")[0].removeprefix("pkg:deb/") for purl in purls]
    assert names == [
        "debian/libcuda1",
        "debian/nvidia-kernel-dkms",
        "debian/nvidia-persistenced",
        "debian/nvidia-smi",
        "nvidia/datacenter-gpu-manager-4-cuda13",
        "nvidia/nvidia-container-toolkit",
        "nvidia/nvidia-driver-cuda",
        "nvidia/nvidia-kernel-open-dkms",
    ]


def test_preflight_asks_the_bundle_for_the_driver_packages_of_the_inventory(tmp_path: Path) -> None:
    play = next(
        play
        for play in yaml.safe_load((ROOT / "playbooks/preflight.yml").read_text())
        if play.get("name") == "Verify the bundle"
    )
    (asked,) = (
        task["llmkeep.estate.mirrored_bundle"]
        for task in play["tasks"]
        if "register" in task and task["register"] == "mirrored"
    )
    expression = asked["wanted"].strip().removeprefix("{{").removesuffix("}}").strip()
    wanted = {"purls": expression.replace("playbook_dir", f"'{ROOT}/playbooks'")}
    hosts = {"gpu1.estate.internal": "10.0.0.1"}
    variables = {"gpu_set": "debian-tesla-535"}
    found = rendered(tmp_path, "vllm", wanted, "gpu1", hosts, {}, {"gpu": ["gpu1"]}, inventory=variables)
    assert "pkg:deb/debian/nvidia-tesla-535-kernel-dkms@535.274.02" in found["purls"]


@pytest.mark.parametrize("stated", [CLOSED.format("580.65.06"), OPEN.format("595.10"), OPEN.format("1000.1")])
def test_a_driver_of_the_branch_or_a_later_one_will_do(stated: str) -> None:
    assert cuda.cuda_driver_fault(LOCK, "vllm", stated) == ""


@pytest.mark.parametrize(
    ("expect", "by_cuda"),
    [
        ({}, True),
        ({"mig": False, "mig_layout": {}, "compute_mode": "default"}, True),
        ({"mig": True}, False),
        ({"mig_layout": {0: ["7g.80gb"]}}, False),
        ({"compute_mode": "exclusive_process"}, False),
    ],
)
def test_acceptance_uses_cuda_where_every_gpu_lets_every_process_in(
    expect: dict[str, Any], by_cuda: bool
) -> None:
    assert cuda.by_cuda(expect) is by_cuda


def test_an_environment_without_cuda_or_with_an_unknown_one_is_refused() -> None:
    lock = {"environments": {"old": ["torch==1"], "new": ["nvidia-cuda-runtime==99.1.0"]}}
    assert "has no CUDA for old" in cuda.cuda_driver_fault(lock, "old", CLOSED.format("580.1"))
    assert "has CUDA 99.1 for new" in cuda.cuda_driver_fault(lock, "new", CLOSED.format("580.1"))


@pytest.mark.parametrize(
    ("variables", "vllm", "environments"),
    [
        ({"llm_serving_accelerator": "cpu", "llm_training_gpus": False}, [], []),
        ({"llm_serving_accelerator": "{{ 'cuda' }}"}, [], ["serving-cuda"]),
        ({"llm_training_gpus": True}, ["gpu1"], ["training-cuda", "vllm"]),
    ],
)
def test_the_bundle_has_to_carry_what_the_hosts_of_the_inventory_compute_with(
    tmp_path: Path, variables: dict[str, Any], vllm: list[str], environments: list[str]
) -> None:
    lock = f"lookup('ansible.builtin.file', '{ROOT}/artifacts.lock.d/gpu.yml')"
    wanted = {"purls": f"{lock} | llmkeep.estate.cuda_purls(groups, hostvars)"}
    groups = {"serve": ["gpu1"], "train": ["gpu1"], "vllm": vllm}
    hosts = {"gpu1.estate.internal": "10.0.0.1"}
    found = rendered(tmp_path, "vllm", wanted, "gpu1", hosts, {}, groups, inventory=variables)
    keys = {key for environment in environments for key in LOCK["environments"][environment]}
    assert found["purls"] == sorted(LOCK["wheels"][key]["purl"] for key in keys)


def test_preflight_refuses_a_host_whose_driver_is_absent_or_too_old_and_names_both_versions(
    tmp_path: Path,
) -> None:
    drivers = {
        "none": None,
        "debian": CLOSED.format("550.163.01"),
        "odd": "no version\n",
        "new": OPEN.format("580.95"),
    }
    hosts = {}
    for name, stated in drivers.items():
        hosts[name] = {"_common_cuda_driver": str(tmp_path / name)}
        if stated:
            (tmp_path / name).write_text(stated)
    role = {"name": "llmkeep.estate._common", "tasks_from": "cuda_driver", "rolespec_validate": False}
    task = {"ansible.builtin.import_role": role, "vars": {"_common_cuda_environment": "serving-cuda"}}
    play = {"hosts": "all", "connection": "local", "gather_facts": False, "tasks": [task]}
    run = played(tmp_path, play, {"hosts": hosts})
    needs = "serving-cuda has CUDA 13.0, which needs NVIDIA's driver 580 or later"
    assert run.returncode == 2, run.stdout + run.stderr
    said = run.stdout.replace("\\'", "'").replace('\\"', '"')
    assert (
        f"none cannot run environment serving-cuda; nothing was changed. {needs}; the host has no /proc"
        in said
    )
    assert f"{needs}; the host has 550.163.01: install a newer driver" in said
    assert f"{needs}; the host has 'no version': install the driver" in said
    assert "new                        : ok=2" in said
