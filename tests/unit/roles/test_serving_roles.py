"""What the roles that run models make of an inventory: sentences for what cannot be, files and units for the rest."""

import http.server
import socketserver
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml
from plugin_modules import ROOT, load
from rendered_role import absent, content, hardened, rendered

serving = load("filter.serving")
HOSTS = {"llm1.estate.internal": "10.0.0.1", "gpu1.estate.internal": "10.0.0.2"}
CODER: dict[str, Any] = {
    "name": "coder",
    "model": "coder",
    "gpus": [0, 1],
    "max_model_len": 16384,
    "quantization": "awq",
}
PROGRAM = ROOT / "payload/.venv/bin/llm-serve"
BATCH = {"context": 2048, "slots": 16, "cache_tokens": 8192, "batch_tokens": 512}
REMOTE = {
    "socket": ["/run/vllm/coder/api.sock"],
    "url": ["https://gpu1.estate.internal:8443"],
    "group": "vllm",
    "key_credential": "vllm.key",
    "revision": "1",
}
MODELS: list[dict[str, Any]] = [
    {"name": "small", "driver": "continuous", "model": "small", "memory": "3G", "instances": 2, **BATCH},
    {
        "name": "plain",
        "driver": "naive",
        "model": "plain",
        "quantization": "none",
        "context": 512,
        "threads": 1,
        "adapters": {"law": "plain-law", "sql": "plain-sql"},
        "instances": 2,
    },
    {"name": "legal", "driver": "continuous", "model": "small", "merged": "small-law", **BATCH},
    {"name": "1.5", "driver": "echo", "slots": 2},
    {"name": "vectors", "driver": "embed", "model": "minilm", "dtype": "float32"},
    {"name": "coder", "driver": "remote", "remote": REMOTE},
    {"name": "own", "driver": "naive", "release": "sql-2026-11"},
]
# What a play would know of the host.
FACTS = {
    "base_domain": "estate.internal",
    "llm_serving_gateways": 2,
    "llm_serving_policy": "server",
    "__llm_serving_release": {"id": "0123456789ab"},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What role llm_serving makes of MODELS."""
    wanted = {name: f"__llm_serving_{name}" for name in ("steps", "wrong", "sockets", "weights")}
    wanted |= {
        name: f"lookup('ansible.builtin.template', '{name}.j2')"
        for name in ("llm-gateway@.service", "llm-engine@.service", "output.nft")
    }
    folder = tmp_path_factory.mktemp("role")
    given = {**FACTS, "llm_serving_models": MODELS}
    return rendered(folder, "llm_serving", wanted, "llm1", HOSTS, given, {"gpu": ["llm1"]}, configured=True)


def test_these_models_can_be_served(made: Any) -> None:
    assert made["wrong"] == []


@pytest.mark.parametrize(
    "name",
    [
        "engine-small",
        "engine-small-2",
        "engine-plain",
        "engine-legal",
        "engine-1.5",
        "engine-vectors",
        "engine-own",
        "gateway-1",
    ],
)
def test_the_program_takes_each_file(made: Any, tmp_path: Path, name: str) -> None:
    path = tmp_path / f"{name}.yaml"
    path.write_text(content(made, f"/{name}.yaml"))
    checked = subprocess.run(
        [str(PROGRAM), "check", name.split("-")[0], str(path)], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stderr


def test_with_cuda_the_release_has_pypis_torch_and_naive_runs_on_the_gpu_and_the_unit_stays_hardened(
    tmp_path: Path,
) -> None:
    wanted = {name: f"__llm_serving_{name}" for name in ("environment", "cuda")}
    wanted["unit"] = "lookup('ansible.builtin.template', 'llm-engine@.service.j2')"
    given = {**FACTS, "llm_serving_models": MODELS, "llm_serving_accelerator": "cuda"}
    found = rendered(tmp_path, "llm_serving", wanted, "llm1", HOSTS, given, configured=True)
    assert found["environment"] == "serving-cuda"
    devices = {
        name: yaml.safe_load(content(found, f"/engine-{name}.yaml"))["model"].get("device")
        for name in ("plain", "small", "vectors")
    }
    assert devices == {"plain": "cuda", "small": None, "vectors": None}
    path = tmp_path / "engine-plain.yaml"
    path.write_text(content(found, "/engine-plain.yaml"))
    subprocess.run([str(PROGRAM), "check", "engine", str(path)], check=True)
    lines = found["unit"].splitlines()
    assert "DeviceAllow=char-nvidia* rw" in lines
    assert "PrivateDevices=yes" not in lines
    hardened(tmp_path, "llm-engine@.service", found["unit"])


def test_without_cuda_no_device_is_seen(made: Any) -> None:
    assert "PrivateDevices=yes" in made["llm-engine@.service"].splitlines()


def test_engines_of_one_model_have_sockets_of_their_own_and_its_name(made: Any) -> None:
    first, second = (yaml.safe_load(content(made, f"/engine-{name}.yaml")) for name in ("small", "small-2"))
    assert (first.get("name"), second["name"]) == (None, "small")
    sockets = [first["socket"], second["socket"]]
    assert sockets == ["/run/llm-engine/small.sock", "/run/llm-engine/small-2.sock"]
    assert yaml.safe_load(content(made, "/gateway-2.yaml"))["engines"]["small"] == {"socket": sockets}


def test_what_an_engine_may_take_is_told_to_it(made: Any) -> None:
    model = yaml.safe_load(content(made, "/engine-small.yaml"))["model"]
    assert {name: model[name] for name in BATCH} == BATCH


def test_adapters_lie_where_models_do_and_are_verified_as_they_are(made: Any) -> None:
    plain, legal = (
        yaml.safe_load(content(made, f"/engine-{name}.yaml"))["model"] for name in ("plain-2", "legal")
    )
    folders = {name: f"/srv/llmkeep/models/plain-{name}" for name in ("law", "sql")}
    assert plain["adapters"] == {
        name: {"path": folder, "manifest": f"{folder}/SHA256SUMS"} for name, folder in folders.items()
    }
    merged = "/srv/llmkeep/models/small-law"
    assert legal["merged"] == {"path": merged, "manifest": f"{merged}/SHA256SUMS"}
    assert made["weights"] == [
        "minilm",
        "plain",
        "plain-law",
        "plain-sql",
        "small",
        "small-law",
        "sql-2026-11",
    ]


def test_a_release_is_served_from_the_folder_of_its_name_and_is_none_of_the_bundle(made: Any) -> None:
    assert serving.release_names(MODELS) == ["sql-2026-11"]
    model = yaml.safe_load(content(made, "/engine-own.yaml"))["model"]
    folder = "/srv/llmkeep/models/sql-2026-11"
    assert model == {"driver": "naive", "path": folder, "manifest": f"{folder}/SHA256SUMS"}


def test_an_adapter_is_asked_for_as_a_model_at_the_engines_of_its_model(made: Any) -> None:
    engines = yaml.safe_load(content(made, "/gateway-1.yaml"))["engines"]
    assert engines["sql"] == engines["law"] == engines["plain"]
    assert list(engines) == ["small", "plain", "law", "sql", "legal", "1.5", "vectors", "coder", "own"]


def test_a_remote_model_has_no_engine_here_and_the_certificates_of_the_host(made: Any) -> None:
    engine = yaml.safe_load(content(made, "/gateway-1.yaml"))["engines"]["coder"]["remote"]
    assert engine["socket"] == REMOTE["socket"]
    assert engine["tls"]["key"] == "/etc/llmkeep/pki/host.key"
    assert "group" not in engine
    assert not any("coder" in step["name"] for step in made["steps"])


def test_a_gateway_may_reach_its_remote_models_and_nobody_else(made: Any) -> None:
    unit = made["llm-gateway@.service"].splitlines()
    assert [line for line in unit if line.startswith("IPAddress")] == [
        "IPAddressDeny=any",
        "IPAddressAllow=localhost",
        "IPAddressAllow=10.0.0.2",
    ]
    assert {
        "LoadCredentialEncrypted=vllm.key",
        "SupplementaryGroups=llm-engine llm-audit redis opa ssl-cert vllm",
    } <= {*unit}
    assert made["output.nft"] == "ip daddr 10.0.0.2 tcp dport 8443 meta skuid llm-gateway accept\n"


def test_without_a_remote_model_a_gateway_goes_nowhere(tmp_path: Path) -> None:
    wanted = {"unit": "lookup('ansible.builtin.template', 'llm-gateway@.service.j2')"}
    made = rendered(tmp_path, "llm_serving", wanted, "llm1", HOSTS, FACTS, configured=True)
    assert "IPAddressAllow=localhost\nRestrictAddressFamilies=AF_UNIX AF_INET\n" in made["unit"]
    assert absent(made) == [
        "/etc/systemd/system/llm-engine@smollm2-135m-instruct.service.d/memory.conf",
        "/etc/llmkeep/audit-hold",
        "/etc/nftables.d/output-llm-serving.nft",
    ]


def test_gateways_read_the_quarantine_of_gpus_on_hosts_with_gpus_only(made: Any, tmp_path: Path) -> None:
    assert "quarantine: /var/lib/llm-gpu/state.json\n" in content(made, "/gateway-1.yaml")
    without = rendered(tmp_path, "llm_serving", {}, "llm1", HOSTS, FACTS, {"gpu": ["gpu1"]}, configured=True)
    assert "quarantine" not in content(without, "/gateway-1.yaml")


def test_the_record_is_kept_as_long_as_declared_and_a_hold_is_a_file_with_its_reason(tmp_path: Path) -> None:
    wanted = {"unit": "lookup('ansible.builtin.template', 'llm-audit.service.j2')"}
    variables = FACTS | {"audit_keep_days": 400, "audit_hold": "case 2027-14"}
    made = rendered(tmp_path, "llm_serving", wanted, "llm1", HOSTS, variables, configured=True)
    assert content(made, "/audit-hold") == "case 2027-14\n"
    assert "LLM_AUDIT_KEEP_DAYS=400 LLM_AUDIT_HOLD=/etc/llmkeep/audit-hold\n" in made["unit"]
    assert "LLM_AUDIT_UNSIGNED_SECONDS=300 LLM_AUDIT_SEEN=/var/lib/llm-audit-seen/head\n" in made["unit"]


def test_a_bound_of_memory_is_the_unit_s_and_goes_with_the_declaration(made: Any) -> None:
    assert content(made, "/llm-engine@small-2.service.d/memory.conf") == "[Service]\nMemoryMax=3G\n"
    assert {"path": "/etc/systemd/system/llm-engine@small.service.d"} in made["tree"]["directories"]
    assert "/etc/systemd/system/llm-engine@plain.service.d/memory.conf" in absent(made)
    assert [serving.memory_max(model) for model in MODELS[:2]] == [str(3 * 2**30), "infinity"]


def test_record_and_engines_are_moved_one_after_the_other_with_time_to_be_found_again(made: Any) -> None:
    settle = {step["name"]: step["settle_seconds"] for step in made["steps"] if "socket" not in step}
    engines = ["small", "small-2", "plain", "plain-2", "legal", "1.5", "vectors", "own"]
    assert settle == {"llm-audit.service": 1} | {f"llm-engine@{name}.service": 2 for name in engines}


@pytest.mark.parametrize("name", ["llm-gateway@.service", "llm-engine@.service"])
def test_a_unit_is_given_more_time_to_stop_than_its_answers_are(made: Any, name: str) -> None:
    described = content(made, "/gateway-1.yaml" if "gateway" in name else "/engine-small.yaml")
    drain = yaml.safe_load(described)
    drain = drain.get("limits", drain)["drain_seconds"]
    assert f"TimeoutStopSec={drain + 10}" in made[name].splitlines()


@pytest.mark.parametrize("name", ["llm-gateway@.service", "llm-engine@.service"])
def test_a_unit_is_hardened(made: Any, tmp_path: Path, name: str) -> None:
    hardened(tmp_path, name, made[name])


@pytest.mark.parametrize(
    ("models", "sentence"),
    [
        ([], "name a model"),
        ([{"name": "A b", "driver": "echo"}], "a name has small letters"),
        ([{"name": "a", "driver": "turbo"}], "its driver is 'turbo': take one of echo, naive, continuous, embed, remote"),
        ([{"name": "a", "driver": "naive"}], "it needs `model`"),
        ([{"name": "a", "driver": "naive", "model": "b", "release": "c"}], "both the model b and the release c"),
        ([{"name": "a", "driver": "naive", "release": "../c"}], "its release is '../c'"),
        ([{"name": "a", "driver": "naive", "release": "c"}, {"name": "b", "driver": "naive", "model": "c"}], "c is a release"),
        ([{"name": "a", "driver": "echo", "release": "c"}], "driver echo takes no model, release"),
        ([{"name": "a", "driver": "echo"}, {"name": "a", "driver": "naive", "model": "b"}], "2 models or adapters are called a"),
        ([{"name": "a", "driver": "naive", "model": "b", "adapters": {"a": "c"}}], "2 models or adapters are called a"),
        ([{"name": "a", "driver": "naive", "model": "b", "adapters": {"C d": "c"}}], "an adapter is called 'C d'"),
        ([{"name": "a", "driver": "naive", "model": "b", "adapters": {"c": None}}], "its adapter c names no folder"),
        ([{"name": "a", "driver": "naive", "model": "b", "merged": "c", "quantization": "nf4"}], "do not go together"),
        ([{"name": "a", "driver": "continuous", "model": "b", "adapters": {"c": "d"}, **BATCH}], "c would not be applied"),
        ([{"name": "a", "driver": "embed", "model": "b", "adapters": {"c": "d"}}], "driver embed takes no adapters"),
        ([{"name": "a", "driver": "echo", "instances": 2}, {"name": "a-2", "driver": "echo"}], "two engines would be"),
        ([{"name": "a", "driver": "echo", "instances": 17}], "instances is 17: take 1 to 16"),
        ([{"name": "a", "driver": "echo", "memory": "lots"}], "memory is lots: write a size such as 24G"),
        ([{"name": "a", "driver": "embed", "model": "b", "quantization": "int8"}], "driver embed takes no quantization"),
        ([{"name": "a", "driver": "naive", "model": "b", "slots": 4}], "driver naive takes no slots"),
        ([{"name": "a", "driver": "naive", "model": "b", "context": 0}], "context is 0: take 1 or more"),
        ([{"name": "a", "driver": "continuous", "model": "b", "context": 9}], "needs batch_tokens, cache_tokens, slots"),
        ([{"name": "a", "driver": "continuous", "model": "b", **BATCH, "cache_tokens": 99}], "cache_tokens is 99 and context"),
        ([{"name": "a", "driver": "continuous", "model": "b", **BATCH, "batch_tokens": 9}], "batch_tokens is 9 and slots 16"),
        ([{"name": "a", "driver": "remote"}], "driver remote needs `remote`"),
        ([{"name": "a", "driver": "echo", "remote": {"socket": ["/s"]}}], "driver echo takes no remote"),
        ([{"name": "a", "driver": "remote", "remote": {"socket": ["s"]}}], "the socket s is no absolute path"),
        ([{"name": "a", "driver": "remote", "remote": {"url": ["http://10.0.0.2:80"]}}], "would carry prompts in clear"),
        ([{"name": "a", "driver": "remote", "remote": {"url": ["https://gpu9:1"]}}], "names no host of this inventory"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_told(models: list[dict[str, Any]], sentence: str) -> None:
    (told,) = serving.model_faults(models, HOSTS)
    assert sentence in told


def test_all_faults_are_told_at_once() -> None:
    wrong = [{"name": "A", "driver": "naive"}, {"name": "b", "driver": "remote"}]
    assert len(serving.model_faults(wrong, HOSTS)) == 3


def test_an_address_and_loopback_need_no_host_of_the_inventory() -> None:
    urls = ["https://10.9.9.9:8443", "http://127.0.0.1:8000"]
    model = {"name": "a", "driver": "remote", "remote": {"url": urls}}
    assert serving.model_faults([model], HOSTS) == []
    assert serving.upstreams([model], HOSTS) == [{"address": "10.9.9.9", "port": 8443}]


def test_an_engine_that_runs_keeps_its_name_when_more_come() -> None:
    names = [
        [each["name"] for each in serving.engines([{"name": "a", "instances": more}])] for more in (1, 3)
    ]
    assert names == [["a"], ["a", "a-2", "a-3"]]


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What role vllm makes of a model on two GPUs."""
    folder = tmp_path_factory.mktemp("vllm")
    wanted = {name: f"__vllm_{name}" for name in ("wrong", "sockets", "gpu_mib", "weights")}
    wanted["unit"] = "lookup('ansible.builtin.template', 'vllm@.service.j2')"
    own = {"name": "own", "release": "sql-2026-11", "gpus": [2], "max_model_len": 4096}
    given = {"vllm_models": [CODER, own], "vllm_gpu_memory": "24G", "__vllm_release": {"id": "0123456789ab"}}
    # As the tasks that fetch weights have registered it.
    given |= {
        "__common_weights": {"bytes": {"coder": 40 * 10**9}},
        "__common_released": {"results": [{"bytes": {"sql-2026-11": 10**9}}]},
    }
    wanted["steps"] = "__vllm_units | llmkeep.estate.named"  # as tasks/start.yml has it
    return rendered(folder, "vllm", wanted, "llm1", HOSTS, {**FACTS, **given}, configured=True)


def test_vllm_s_configuration_names_its_socket_and_no_key(vllm: Any) -> None:
    config = yaml.safe_load(content(vllm, "/coder.yaml"))
    assert (config["uds"], config["served-model-name"]) == ("/run/vllm/coder/api.sock", "coder")
    assert (config["tensor-parallel-size"], config["max-model-len"], config["quantization"]) == (
        2,
        16384,
        "awq",
    )
    assert config["no-enable-prefix-caching"] is True
    assert not {"api-key", "host", "port", "trust-remote-code"} & set(config)
    assert content(vllm, "/coder.env").splitlines()[0] == "CUDA_VISIBLE_DEVICES=0,1"


def test_a_start_may_take_as_long_as_its_weights_take_to_read(vllm: Any) -> None:
    given = [content(vllm, f"/{name}.env").splitlines()[1] for name in ("coder", "own")]
    assert given == ["LLMKEEP_START_SECONDS=800", "LLMKEEP_START_SECONDS=605"]
    assert serving.vllm_start_seconds({**CODER, "start_seconds": 90}, {"coder": 10**12}, 600, 200) == 90
    unit = vllm["unit"].splitlines()
    assert "TimeoutStartSec=infinity" in unit
    (waits,) = [line for line in unit if line.startswith("ExecStartPost=")]
    assert "vllm-ready ${LLMKEEP_START_SECONDS} 200 /health" in waits


def test_options_are_given_to_vllm_and_judged_by_its_own_parser_before_they_are_in_place(vllm: Any) -> None:
    config = serving.vllm_config({**CODER, "options": {"enforce_eager": True, "seed": 5}}, "/models", 25)
    assert (config["enforce-eager"], config["seed"]) == (True, 5)
    (coder,) = [entry for entry in vllm["tree"]["files"] if entry["dest"].endswith("/coder.yaml")]
    python = "/opt/vllm/releases/0123456789ab/bin/python"
    assert coder["validate"] == [python, "/usr/local/lib/llmkeep/vllm-check", "%s"]


@pytest.fixture
def judged(tmp_path: Path) -> Any:
    """What vllm-check says of options beside those of the role; tests/doubles/vllm stands in for vLLM."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text('{"num_attention_heads": 4, "num_hidden_layers": 2}')

    def check(**options: Any) -> tuple[int, str]:
        model = {**CODER, "model": "model", "quantization": None, **options}
        path = tmp_path / "coder.yaml"
        path.write_text(yaml.safe_dump(serving.vllm_config(model, str(tmp_path), 25)))
        run = subprocess.run(
            [sys.executable, str(ROOT / "roles/vllm/files/vllm_check.py"), str(path)],
            env={"PYTHONPATH": str(ROOT / "tests/doubles/vllm"), "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        return run.returncode, run.stderr

    return check


def test_what_vllm_s_parser_takes_is_taken(judged: Any) -> None:
    assert judged(options={"enforce-eager": True, "speculative_config": {"method": "ngram"}}) == (0, "")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"options": {"enforce-eagre": True}}, "enforce-eagre is no option of it, enforce-eager is"),
        ({"options": {"tool-call": "hermes"}}, "tool-call is no option of it"),  # argparse takes the beginning of a name
        ({"options": {"block-size": "many"}}, "argument --block-size: invalid int value: 'many'"),
        ({"options": {"block-size": True}}, "block-size is True: it takes a value"),
        ({"options": {"enforce-eager": "yes"}}, "enforce-eager is 'yes': it takes true or false"),
        ({"options": {"speculative-config": "nonsense"}}, "argument --speculative-config: invalid"),
        ({"options": {"enable-auto-tool-choice": True}}, "--enable-auto-tool-choice requires --tool-call-parser"),
        ({"options": {"help": True}}, "it would print something and end, instead of serving"),
        ({"gpus": [0, 1, 2]}, "tensor-parallel-size is 3, and its 4 attention heads are no multiple of it"),
        ({"gpus": [0, 1, 2], "pipeline_parallel": 3}, "pipeline-parallel-size is 3, and it has 2 layers"),
    ],
)  # fmt: skip
def test_what_vllm_s_parser_does_not_take_is_told_by_model_and_option(
    judged: Any, change: dict[str, Any], sentence: str
) -> None:
    code, told = judged(**change)
    assert (code, told.startswith("the model coder: vLLM 0 (stand-in) refuses its options: ")) == (1, True)
    assert sentence in told


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"max_num_seqs": 4}, "max_num_seqs, which the role sets: say it by max_num_seqs"),
        ({"no-enable-prefix-caching": True}, "say it by share_prefixes"),
        ({"trust-remote-code": True}, "trust-remote-code, which is refused"),
        ({"api_key": "k"}, "api_key, which is refused"),
        ({"port": 8000}, "port, which is refused"),
        ({"enable-log-requests": True}, "writes prompts down"),
        ({"chat-template": "--trust-remote-code"}, "a value does not start with a dash"),
        ({"middleware": ["a.b"]}, "middleware, which is refused"),
        ({"lora-target-modules": ["q", "--host"]}, "a value does not start with a dash"),
        ({"hf-overrides": {"text_config": {"trust_remote_code": True}}}, "trust_remote_code in hf-overrides"),
        ({"speculative-config": {"model": "/srv/x"}}, "model in speculative-config"),
        ({"speculative-config": ' {"model": "/srv/x"}'}, "for speculative-config: write the mapping or the list itself"),
        ({"speculative-config": ['{"model": "/srv/x"}']}, "write the mapping or the list itself"),
        ({"structured-outputs-config": {"reasoning_parser_plugin": "/srv/x.py"}}, "reasoning_parser_plugin in"),
        ({"ec-manager-config": {"encoder_cache_manager_cls": "a.B"}}, "encoder_cache_manager_cls in ec-manager-config"),
        ({"compilation-config": {"backend": "a.b"}}, "backend in compilation-config"),
        ({"compilation-config": {"inductor_passes": {"x": "a.b"}}}, "inductor_passes in compilation-config"),
        ({"enable-elastic-ep": True}, "enable-elastic-ep, which is refused"),
        ({"seed": None}, "seed without a value"),
        ({"Seed x": 1}, "write the name of a long option"),
    ],
)  # fmt: skip
def test_an_option_that_is_not_the_inventory_s_to_give_is_refused(
    options: dict[str, Any], sentence: str
) -> None:
    (told,) = serving.vllm_faults([{**CODER, "options": options}], "24G", [])
    assert told.startswith("coder: options has ")
    assert sentence in told


def test_ordinary_options_are_let_through() -> None:
    options = {
        "enforce-eager": True,
        "seed": -1,
        "hf-overrides": {"rope_scaling": {"factor": 4.0}},
        "portable": 1,
        "attention-config": {"backend": "FLASH_ATTN"},
        "chat-template": "{{ messages }}",
    }
    assert serving.vllm_faults([{**CODER, "options": options}], "24G", []) == []


def test_a_gpu_that_the_host_has_not_is_told() -> None:
    assert serving.vllm_faults([CODER], "24G", [], 2) == []
    assert serving.vllm_faults([CODER], "24G", [], 1) == [
        "GPU 1 is named, and gpu_health_expect says that there are 1, numbered from 0"
    ]


def test_vllm_serves_a_release_from_the_folder_of_its_name(vllm: Any) -> None:
    assert vllm["weights"] == ["coder", "sql-2026-11"]
    assert yaml.safe_load(content(vllm, "/own.yaml"))["model"] == "/srv/llmkeep/models/sql-2026-11"


def test_vllm_s_unit_is_hardened_and_tells_nobody(vllm: Any, tmp_path: Path) -> None:
    hardened(tmp_path, "vllm@.service", vllm["unit"], exposure=20)
    settings = " ".join(
        line.removeprefix("Environment=")
        for line in vllm["unit"].splitlines()
        if line.startswith("Environment=")
    )
    assert {"VLLM_NO_USAGE_STATS=1", "DO_NOT_TRACK=1", "HF_HUB_OFFLINE=1"} <= set(settings.split())
    lines = vllm["unit"].splitlines()
    assert {"PrivateNetwork=yes", "DeviceAllow=char-nvidia* rw"} <= set(lines)
    # vLLM's processes speak by ZeroMQ, which aborts without it; seen with the real one, under systemd.
    assert lines.index("SystemCallFilter=sched_setscheduler") > lines.index(
        "SystemCallFilter=~@privileged @resources"
    )


def test_vllm_is_moved_by_units_of_its_own(vllm: Any) -> None:
    assert vllm["steps"] == [{"name": "vllm@coder.service"}, {"name": "vllm@own.service"}]
    assert vllm["wrong"] == []


def test_a_gpu_s_memory_may_be_a_little_less_than_the_card_says(vllm: Any, tmp_path: Path) -> None:
    smi = tmp_path / "nvidia-smi"
    for seen, code in (("23028", 1), ("24564", 0)):
        smi.write_text(f"#!/bin/sh\necho {seen}\n")
        smi.chmod(0o755)
        path = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
        program = ROOT / "roles/vllm/files/gpu-memory.sh"
        argv = ["sh", str(program), str(vllm["gpu_mib"]), "24G", "0"]
        run = subprocess.run(argv, check=False, env=path, capture_output=True)
        assert run.returncode == code, run.stdout


def test_vllm_gets_its_key_in_the_environment_and_not_as_an_argument(tmp_path: Path) -> None:
    program = tmp_path / "releases/a/bin/vllm"  # a double that tells how it was started
    program.parent.mkdir(parents=True)
    program.write_text('#!/bin/sh\necho "$VLLM_API_KEY" "$0" "$@"\n')
    program.chmod(0o755)
    (tmp_path / "unit").symlink_to("releases/a")
    (tmp_path / "vllm.key").write_text("secret")
    command = ["sh", str(ROOT / "roles/vllm/files/vllm-serve.sh"), str(tmp_path / "unit"), "coder"]
    environment = {"PATH": "/usr/bin:/bin", "CREDENTIALS_DIRECTORY": str(tmp_path)}
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    release = tmp_path / "releases/a"
    assert run.stdout == f"secret {release}/bin/vllm serve --config {release}/etc/coder.yaml\n"
    (tmp_path / "vllm.key").unlink()
    assert subprocess.run(command, capture_output=True, check=False, env=environment).returncode == 1


def test_vllm_counts_as_started_once_it_answers(tmp_path: Path) -> None:
    place = str(tmp_path / "api.sock")
    ready = [sys.executable, str(ROOT / "roles/vllm/files/vllm_ready.py"), "0", "200", "/health", place]
    absent = subprocess.run(ready, capture_output=True, text=True, check=False)
    assert (absent.returncode, "FileNotFoundError" in absent.stdout) == (1, True)

    class Health(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/health" else 401)
            self.end_headers()

        def address_string(self) -> str:
            return "a test"

    with socketserver.UnixStreamServer(place, Health) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert subprocess.run(ready, check=False).returncode == 0
        ready[4] = "/v1/models"
        refused = subprocess.run(ready, capture_output=True, text=True, check=False)
        server.shutdown()
    assert (refused.returncode, "says 401 to GET /v1/models" in refused.stdout) == (1, True)


def test_nothing_is_waited_for_once_vllm_has_ended(tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    program = str(ROOT / "roles/vllm/files/vllm_ready.py")
    argv = [sys.executable, program, "600", "200", "/health", str(tmp_path / "api.sock")]
    ready = subprocess.run(
        argv, capture_output=True, text=True, check=False, timeout=30, env={"MAINPID": str(gone.pid)}
    )
    assert (ready.returncode, "its process has ended" in ready.stdout) == (1, True)


def test_fit_is_asked_for_the_share_of_the_memory_that_vllm_takes() -> None:
    asked = " ".join(serving.vllm_fit(CODER, "/models", "24G"))
    assert asked == "--model /models/coder --memory 22118M --gpus 2 --context 16384 --quantization nf4"


@pytest.mark.parametrize(
    ("change", "memory", "sentence"),
    [
        ({}, "", "vllm_gpu_memory is not set"),
        ({"gpus": []}, "24G", "gpus is empty"),
        ({"gpus": [1, 1]}, "24G", "GPU 1 is named 2 times"),
        ({"tensor_parallel": 4}, "24G", "tensor_parallel 4 times pipeline_parallel 1 is not its 2 GPUs"),
        ({"gpu_memory_utilization": 1.5}, "24G", "gpu_memory_utilization is 1.5"),
        ({"max_model_len": 0}, "24G", "max_model_len is 0: take 1 or more"),
        ({"name": "Coder"}, "24G", "a name has small letters"),
        ({"model": None}, "24G", "it needs `model`"),
        ({"release": "sql-1"}, "24G", "both the model coder and the release sql-1"),
        ({"model": None, "release": "../c"}, "24G", "its release is '../c'"),
    ],
)
def test_what_vllm_cannot_serve_is_told(change: dict[str, Any], memory: str, sentence: str) -> None:
    (told,) = serving.vllm_faults([{**CODER, **change}], memory, [])
    assert sentence in told


def test_vllm_takes_no_release_that_has_a_folder_of_the_bundle() -> None:
    released = {"name": "own", "release": "coder", "gpus": [2], "max_model_len": 1024}
    (told,) = serving.vllm_faults([CODER, released], "24G", [])
    assert "coder is a release and a folder of the bundle at once" in told


def test_vllm_takes_no_release_that_has_a_folder_of_an_engine_on_its_host() -> None:
    released = {"name": "own", "release": "small", "gpus": [2], "max_model_len": 1024}
    (told,) = serving.vllm_faults([released], "24G", [{"name": "chat", "driver": "naive", "model": "small"}])
    assert "small is a release and a folder of the bundle at once" in told


def test_two_models_share_no_gpu_and_no_name() -> None:
    told = serving.vllm_faults([CODER, CODER], "24G", [])
    assert [line.split(":")[0] for line in told] == [
        "2 models are called coder",
        "GPU 0 is named 2 times",
        "GPU 1 is named 2 times",
    ]
