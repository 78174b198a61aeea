"""What role llm_training makes of an inventory: sentences for what cannot be, files and units for the rest."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from plugin_modules import ROOT, load
from rendered_role import absent, content, hardened, rendered

training = load("filter.training")
HOSTS = {"train1.estate.internal": "10.0.0.21", "train2.estate.internal": "10.0.0.22"}
JOB: dict[str, Any] = {
    "name": "sql",
    "model": "base",
    "method": {"kind": "lora"},
    "data": {"train": "/srv/llmkeep/training/rows/sql"},
    "prepare": {"seq_len": 512},
    "scale": {"strategy": "zero2"},
    "memory": "64G",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the role makes of JOB on the second of two hosts."""
    wanted = {name: f"__llm_training_{name}" for name in ("wrong", "units", "let_in")}
    wanted["unit"] = "lookup('ansible.builtin.template', 'llm-train@.service.j2')"
    wanted |= {way: f"lookup('ansible.builtin.template', '{way}.nft.j2')" for way in ("input", "output")}
    given = {
        "llm_training_jobs": [JOB],
        "llm_training_models": ["base"],
        "llm_training_hosts": ["train1", "train2"],
        "llm_training_environment": {"NCCL_IB_HCA": "mlx5"},
        "__llm_training_release": {"id": "0123456789ab"},
    }
    folder = tmp_path_factory.mktemp("role")
    return rendered(folder, "llm_training", wanted, "train2", HOSTS, given, configured=True)


def test_the_job_file_names_model_output_and_hosts_and_leaves_out_what_is_the_role_s(made: Any) -> None:
    assert made["wrong"] == []
    assert yaml.safe_load(content(made, "/sql.yaml")) == {
        "name": "sql",
        "model": "/srv/llmkeep/training/models/base",
        "manifest": "/srv/llmkeep/training/models/base/SHA256SUMS",
        "output": "/srv/llmkeep/training/jobs/sql",
        "method": {"kind": "lora"},
        "data": {"train": "/srv/llmkeep/training/rows/sql"},
        "scale": {"strategy": "zero2", "nodes": 2},
    }
    assert yaml.safe_load(content(made, "/sql.data.yaml")) == {"seq_len": 512}
    assert content(made, "/memory.conf") == "[Service]\nMemoryMax=64G\n"
    assert made["tree"]["directories"][-1] == {"path": "/etc/systemd/system/llm-train@sql.service.d"}
    assert absent(made) == []
    assert content(made, "/sql.env").splitlines() == [
        "PREPARE=--prepare /opt/llmtrain/units/llm-train@sql.service/etc/sql.data.yaml",
        "NCCL_IB_HCA=mlx5",
    ]


def test_a_host_without_a_volume_gets_the_folder_that_one_would_be_mounted_at(tmp_path: Path) -> None:
    given = {
        "llm_training_plain_disk_allowed": True,
        "llm_training_hosts": ["train1"],
        "__llm_training_release": {"id": "0123456789ab"},
    }
    made = rendered(tmp_path, "llm_training", {}, "train1", HOSTS, given, configured=True)
    places = [each["path"] for each in made["tree"]["directories"]]
    assert places.index("/srv/llmkeep") + 1 == places.index("/srv/llmkeep/training")


def test_its_packages_are_those_that_the_scenarios_snapshot_was_installed_with() -> None:
    training, serving = (
        yaml.safe_load((ROOT / f"roles/{role}/vars/main.yml").read_text())[f"__{role}_os"]
        for role in ("llm_training", "llm_serving")
    )
    assert training["packages"] == serving["packages"]


def test_the_unit_meets_at_the_first_host_as_the_second_one(made: Any) -> None:
    (start,) = [line for line in made["unit"].splitlines() if line.startswith("ExecStart=")]
    assert start.endswith("--nodes 2 --node-rank 1 --rendezvous 10.0.0.21:29400 --traffic esp")
    assert "IPAddressAllow=localhost 10.0.0.21 10.0.0.22" in made["unit"].splitlines()


def test_the_unit_is_hardened(made: Any, tmp_path: Path) -> None:
    hardened(tmp_path, "llm-train@.service", made["unit"])


def test_a_release_is_fetched_as_the_estates_own_and_a_job_trains_from_it(tmp_path: Path) -> None:
    given = {
        "llm_training_jobs": [{**JOB, "model": "deepseek-tiny"}],
        "llm_training_models": ["base"],
        "llm_training_releases": ["deepseek-tiny"],
        "llm_training_hosts": ["train1"],
        "__llm_training_release": {"id": "0123456789ab"},
    }
    wanted = {"wrong": "__llm_training_wrong", "weights": "__llm_training_weights"}
    found = rendered(tmp_path, "llm_training", wanted, "train1", HOSTS, given, configured=True)
    assert found["wrong"] == []
    assert found["weights"] == [
        {"name": "base", "model": "base"},
        {"name": "deepseek-tiny", "release": "deepseek-tiny"},
    ]
    model = "/srv/llmkeep/training/models/deepseek-tiny"
    job = yaml.safe_load(content(found, "/sql.yaml"))
    assert (job["model"], job["manifest"]) == (model, f"{model}/SHA256SUMS")


@pytest.mark.parametrize(("gpus", "environment"), [(False, "training"), (True, "training-cuda")])
def test_gpus_come_with_an_environment_that_computes_on_them(
    tmp_path: Path, gpus: bool, environment: str
) -> None:
    given = {"llm_training_gpus": gpus, "llm_training_hosts": ["train1"]}
    wanted = {"environment": "__llm_training_environment"}
    found = rendered(tmp_path, "llm_training", wanted, "train1", HOSTS, given)
    assert found["environment"] == environment


def test_only_the_other_host_is_let_in_and_only_the_trainer_goes_out(made: Any) -> None:
    rule = "tcp dport { 29400, 32768-60999 }"
    assert made["input"] == f"ip saddr 10.0.0.21 {rule} meta ipsec exists accept\n"
    assert made["output"] == f"ip daddr 10.0.0.21 {rule} rt ipsec exists meta skuid llm-train accept\n"
    assert made["let_in"] == [f"saddr 10.0.0.21 {rule} meta ipsec exists accept"]


@pytest.mark.parametrize(
    ("jobs", "said"),
    [
        ([JOB, JOB], "sql is the name of 2 jobs"),
        ([{**JOB, "name": "SQL"}], "'SQL' is not a valid job name"),
        (
            [{**JOB, "model": "other"}],
            "sql trains other, which is neither in llm_training_models nor in llm_training_releases",
        ),
        ([{**JOB, "scale": {"nodes": 3}}], "sql says scale.nodes 3, and 2 hosts train"),
    ],
)
def test_a_job_that_cannot_run_is_told_in_one_sentence(jobs: list[dict[str, Any]], said: str) -> None:
    (sentence,) = training.job_faults(jobs, ["base"], "train2", ["train1", "train2"])
    assert sentence.startswith(said)


def test_a_host_that_does_not_train_with_the_others_is_told() -> None:
    (sentence,) = training.job_faults([], [], "llm1", ["train1", "train2"])
    assert sentence.startswith("llm1 is not in llm_training_hosts")
