"""`llmkeep inventory check`, with Ansible's own reading of the inventory."""

import json
from pathlib import Path

import pytest

from llmkeep import cli

TREE = Path(__file__).parents[3]
FAULTY = """\
all:
  vars: {llmserving_models: []}
  children:
    control: {hosts: {ops1: {ansible_host: 10.0.0.1}}}
    mirror: {hosts: {ops1: }}
    vlm: {hosts: {llm1: {ansible_host: 10.0.0.2}, llm2: {ansible_host: 10.0.0.3}}}
    serve: {hosts: {llm1: , llm2: }}
"""
DRIVERS = """\
all:
  children:
    control: {hosts: {ops1: {ansible_host: 10.0.0.1}}}
    mirror: {hosts: {ops1: }}
    serve: {hosts: {llm1: {ansible_host: 10.0.0.2}, llm2: {ansible_host: 10.0.0.3}}}
    vllm:
      hosts: {llm1: , llm2: }
      vars: {vllm_gpu_memory: 80G, vllm_models: [{name: m, release: m, gpus: [0], max_model_len: 8192}]}
    gpu:
      hosts: {llm1: , llm2: {gpu_set: nvidia-580-open}}
      vars: {gpu_set: debian-550, gpu_health_expect: {count: 8}}
"""
SHAPE = """\
all:
  children:
    control: {hosts: {ops1: {ansible_host: 10.0.0.1}}}
    mirror: {hosts: {depot1: {ansible_host: 10.0.0.4}}}
    serve: {hosts: {llm1: {ansible_host: 10.0.0.2}}}
    edge: {hosts: {edge1: {ansible_host: 10.0.0.3}, llm1: }}
"""


@pytest.mark.parametrize(
    "given",
    [
        ["inventory/example"],
        ["inventory/lab/hosts.yml", "inventory/lab-kernel", "inventory/lab-train"],
        [
            *(f"inventory/{name}" for name in ("lab", "lab-logs", "lab-candidate")),
            *(f"molecule/{role}/hosts.yml" for role in ("kibana", "logstash")),
        ],
        [
            *(f"inventory/{name}" for name in ("lab", "lab-edges", "lab-round")),
            *(f"molecule/{role}/hosts.yml" for role in ("redis", "kubernetes")),
        ],
    ],
)
def test_the_trees_own_inventories_have_no_fault(
    given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word for name in given for word in ("-i", str(TREE / name))]
    assert cli.main(["inventory", "check", *words]) == 0
    assert "no fault found; no host was contacted" in capsys.readouterr().out


def test_each_fault_is_printed_once_with_its_hosts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hosts.yml").write_text(FAULTY)
    assert cli.main(["inventory", "check", "-i", str(tmp_path)]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "- the group vlm belongs to no role; did you mean vllm?",
        "- ops1, llm1, llm2: no role reads llmserving_models; did you mean llm_serving_models?",
    ]


def test_a_mirror_and_an_edge_on_hosts_of_their_own_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hosts.yml").write_text(SHAPE)
    assert cli.main(["inventory", "check", "-i", str(tmp_path)]) == 1
    mirror, edge = capsys.readouterr().out.splitlines()
    assert mirror.startswith("- mirror has depot1, and the control node is ops1, ")
    assert mirror.endswith("Put ops1, and no other host, in mirror")
    assert edge.startswith("- edge1: it is in edge and not in serve, ")
    assert edge.endswith("add it to serve too")


def test_a_driver_too_old_for_the_locks_cuda_is_refused_by_host_and_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hosts.yml").write_text(DRIVERS)
    assert cli.main(["inventory", "check", "-i", str(tmp_path)]) == 1
    (fault,) = capsys.readouterr().out.splitlines()
    assert fault.startswith("- llm1: gpu_set is debian-550 (driver 550.163.01, CUDA 12.4), but ")
    assert "vllm has CUDA 13.0, which needs NVIDIA's driver 580 or later" in fault
    assert "take nvidia-580-open or nvidia-580-proprietary" in fault


def test_json_has_the_same_faults(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "hosts.yml").write_text(FAULTY)
    assert cli.main(["inventory", "check", "--json", "-i", str(tmp_path)]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is False
    assert len(told["faults"]) == 2


def test_what_ansible_cannot_read_is_told_in_its_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hosts.yml").write_text("all: {children: {control: {hosts: [ops1]}}}\n")
    assert cli.main(["inventory", "check", "-i", str(tmp_path)]) == 1
    assert 'Invalid "hosts" entry for "control" group' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("hosts.yml", "all:\n  hosts: {a: {b: 1}\n  c:\n", "hosts.yml:3:3 is not YAML"),
        ("hosts.ini", "[control]\nops1\n", "hosts.ini is an INI inventory"),
        ("hosts", "[control:vars]\na=1\n", "hosts is an INI inventory"),
    ],
)
@pytest.mark.parametrize("verb", [["inventory", "check"], ["site"]])
def test_a_file_that_is_not_yaml_is_refused_by_name(
    name: str, text: str, told: str, verb: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text(text)
    assert cli.main([*verb, "-i", str(tmp_path)]) == 1
    assert told in capsys.readouterr().err
