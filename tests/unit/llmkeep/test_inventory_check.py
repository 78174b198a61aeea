"""`llmkeep inventory check`, with Ansible's own reading of the inventory."""

import json
from pathlib import Path
from typing import Any

import pytest

from llmkeep import cli
from llmkeep.inventory import check
from llmkeep.policy import source

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
    mirror: {hosts: {depot1: {ansible_host: 10.0.0.4}, ops1: }}
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
    shown = capsys.readouterr().out
    assert "no fault found; no host was contacted" in shown
    assert "rate class standard (analyst, developer): " in shown
    assert "warning" not in shown


def test_each_fault_is_printed_once_with_its_hosts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hosts.yml").write_text(FAULTY)
    assert cli.main(["inventory", "check", "-i", str(tmp_path)]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "- the group vlm belongs to no role; did you mean vllm?",
        "- ops1, llm1, llm2: no role reads llmserving_models; did you mean llm_serving_models?",
    ]


def test_several_mirrors_and_an_edge_on_a_host_of_its_own_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hosts.yml").write_text(SHAPE)
    assert cli.main(["inventory", "check", "-i", str(tmp_path)]) == 1
    mirrors, edge = capsys.readouterr().out.splitlines()
    assert mirrors.startswith("- ops1, depot1: depot1, ops1 are in mirror, ")
    assert mirrors.endswith("leave one there, the control node or another host")
    assert edge.startswith("- edge1: it is in edge and not in serve, ")
    assert edge.endswith("add it to serve too")


def test_a_driver_too_old_for_the_locks_cuda_is_refused_by_host_and_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hosts.yml").write_text(DRIVERS)
    assert cli.main(["inventory", "check", "-i", str(tmp_path)]) == 1
    (fault,) = capsys.readouterr().out.splitlines()
    assert fault.startswith(
        "- llm1: gpu_set is debian-550 (driver 550.163.01, CUDA from 12.0 and below 13.0), but "
    )
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


ROLE = {"models": ["*"], "max_tokens": 100}
POLICY: dict[str, Any] = {
    "llm/roles": {
        "clerk": {**ROLE, "rate_class": "small"},
        "author": {**ROLE, "rate_class": "large", "models": ["short"]},
        "auditor": {**ROLE, "max_tokens": 0, "rate_class": "unused"},
    },
    "llm/rates": {
        "small": {"tokens_per_minute": 100_000, "tokens_per_day": 1_000_000},
        "large": {"tokens_per_minute": 1_000_000, "tokens_per_day": 10_000},
        "unused": {},
    },
}


def test_a_rate_class_is_printed_in_pages_with_a_warning_where_a_full_context_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hosts.yml").write_text("all: {}\n")
    models = [{"name": "long", "remote": {"context": 131072}}, {"name": "short", "context": 8192}]
    monkeypatch.setattr(check, "faults", lambda *_: [])
    monkeypatch.setattr(
        check, "listed", lambda *_: {"_meta": {"hostvars": {"a": {"llm_serving_models": models}}}}
    )
    monkeypatch.setattr(source, "read", lambda _: source.Source({}, {}, POLICY))
    assert cli.main(["inventory", "check", "-i", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        (
            "rate class large (author): 1,000,000 tokens a minute, about 1,500 pages of 500 English words, prompts and answers "
            "together; 15 pages a day"
        ),
        (
            "rate class small (clerk): 100,000 tokens a minute, about 150 pages of 500 English words, prompts and answers "
            "together; 1,500 pages a day"
        ),
        (
            "warning: a prompt that fills the 131072 tokens of long is refused for clerk: the rate class small has "
            "100000 tokens a minute and 1000000 a day; raise them in llm/rates/data.yaml, or lower the model's context"
        ),
    ]
    assert cli.main(["inventory", "check", "--json", "-i", str(tmp_path)]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [row["pages_per_minute"] for row in shown["rate_classes"]] == [1500, 150]
    assert len(shown["warnings"]) == 1


@pytest.mark.parametrize(
    "rate", [None, {}, {"tokens_per_minute": 0, "tokens_per_day": 1}, {"tokens_per_minute": "9"}]
)
def test_a_rate_class_without_tokens_is_named(rate: object) -> None:
    classes, warnings = check.rate_classes(
        {**POLICY, "llm/rates": {**POLICY["llm/rates"], "small": rate}}, {"m": 1}
    )
    assert [row["class"] for row in classes] == ["large"]
    assert len(warnings) == 1
    assert warnings[0].startswith("the rate class small has ")


def test_contexts_come_from_either_role_and_impossible_ones_are_named() -> None:
    adapted = {"name": "b", "context": 2048, "adapters": {"sql": "sql"}}
    of_hosts: dict[str, dict[str, Any]] = {
        "a": {"llm_serving_models": [{"name": "v", "remote": {"socket": ["x"]}}, adapted, {"name": "none"}]},
        "b": {"vllm_models": [{"name": "v", "max_model_len": 32768}], "llm_serving_models": "{{ models }}"},
        "c": {"llm_serving_models": [{"name": "z", "context": 0}, {"name": "t", "context": "{{ n }}"}]},
        "d": {
            "vllm_models": [{"name": "v", "max_model_len": 8192}, {"name": "huge", "max_model_len": 10**9}]
        },
    }
    models = check.contexts(of_hosts)
    expected = {"v": 32768, "b": 2048, "sql": 2048, "none": None, "z": 0, "t": None, "huge": 10**9}
    assert models == expected
    assert check.rate_classes(POLICY, models)[1] == [
        "the context of z is 0 tokens: give 1 to 16777216",
        "the context of huge is 1000000000 tokens: give 1 to 16777216",
    ]


def test_an_alias_of_what_no_host_serves_or_with_the_name_of_a_model_is_named() -> None:
    policy = {
        "llm/experiments": {"support-12": {"model": "support"}},
        "llm/aliases": {
            "default": {"model": "a"},
            "help": {"model": "support"},
            "lost": {"model": "nowhere"},
            "b": {"model": "a"},
        },
    }
    assert check.alias_warnings(policy, {"a": None, "b": 8192}) == [
        (
            "the alias lost leads to nowhere, which no host serves, so requests for it are refused: name one of a, b, support "
            "in llm/aliases/data.yaml"
        ),
        "the alias b has the name of a model that is served, so it has no effect: take out one of the two",
    ]
    for nothing in (None, "b", 7):
        assert check.alias_warnings({"llm/aliases": {"b": nothing}}, {"a": None}) == []
        assert check.alias_warnings({"llm/aliases": nothing}, {}) == []


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
