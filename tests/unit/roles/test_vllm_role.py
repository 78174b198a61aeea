"""What role vllm makes of an inventory: sentences for what cannot be, files and units for the rest."""

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
from rendered_role import content, hardened, rendered

vllm_filters = load("filter.vllm")
HOSTS = {"llm1.estate.internal": "10.0.0.1"}
CODER: dict[str, Any] = {
    "name": "coder",
    "model": "coder",
    "gpus": [0, 1],
    "max_model_len": 16384,
    "quantization": "awq",
}


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
    return rendered(folder, "vllm", wanted, "llm1", HOSTS, given, configured=True)


def test_vllm_s_configuration_names_its_socket_and_no_key(vllm: Any) -> None:
    config = yaml.safe_load(content(vllm, "/coder.yaml"))
    assert (config["uds"], config["served-model-name"]) == ("/run/vllm/coder/api.sock", "coder")
    assert (config["tensor-parallel-size"], config["max-model-len"], config["quantization"]) == (
        2,
        16384,
        "awq",
    )
    assert not [name for name in config if "prefix" in name], "vLLM's default: they are cached, by tenant"
    assert not {"api-key", "host", "port", "trust-remote-code"} & set(config)
    assert content(vllm, "/coder.env").splitlines()[0] == "CUDA_VISIBLE_DEVICES=0,1"


def test_a_start_may_take_as_long_as_its_weights_take_to_read(vllm: Any) -> None:
    given = [content(vllm, f"/{name}.env").splitlines()[1] for name in ("coder", "own")]
    assert given == ["LLMKEEP_START_SECONDS=800", "LLMKEEP_START_SECONDS=605"]
    assert vllm_filters.vllm_start_seconds({**CODER, "start_seconds": 90}, {"coder": 10**12}, 600, 200) == 90
    unit = vllm["unit"].splitlines()
    assert "TimeoutStartSec=infinity" in unit
    (waits,) = [line for line in unit if line.startswith("ExecStartPost=")]
    assert "vllm-ready ${LLMKEEP_START_SECONDS} 200 /health" in waits


def test_options_are_given_to_vllm_and_judged_by_its_own_parser_before_they_are_in_place(vllm: Any) -> None:
    config = vllm_filters.vllm_config({**CODER, "options": {"enforce_eager": True, "seed": 5}}, "/models", 25)
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
        path.write_text(yaml.safe_dump(vllm_filters.vllm_config(model, str(tmp_path), 25)))
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
        ({"disable-fastapi-docs": True}, "hides vLLM's API from the gateways"),
        ({"trust-remote-code": True}, "trust-remote-code, which is refused"),
        ({"api_key": "k"}, "api_key, which is refused"),
        ({"port": 8000}, "port, which is refused"),
        ({"enable-log-requests": True}, "logs prompts"),
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
    (told,) = vllm_filters.vllm_faults([{**CODER, "options": options}], "24G", [])
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
    assert vllm_filters.vllm_faults([{**CODER, "options": options}], "24G", []) == []


def test_a_gpu_that_the_host_has_not_is_told() -> None:
    assert vllm_filters.vllm_faults([CODER], "24G", [], 2) == []
    assert vllm_filters.vllm_faults([CODER], "24G", [], 1) == [
        "GPU 1 is named, but according to gpu_health_expect there are 1, numbered from 0"
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
    asked = " ".join(vllm_filters.vllm_fit(CODER, "/models", "24G"))
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
    (told,) = vllm_filters.vllm_faults([{**CODER, **change}], memory, [])
    assert sentence in told


def test_vllm_takes_no_release_that_has_a_folder_of_the_bundle() -> None:
    released = {"name": "own", "release": "coder", "gpus": [2], "max_model_len": 1024}
    (told,) = vllm_filters.vllm_faults([CODER, released], "24G", [])
    assert "coder is a release and a folder of the bundle at once" in told


def test_vllm_takes_no_release_that_has_a_folder_of_an_engine_on_its_host() -> None:
    released = {"name": "own", "release": "small", "gpus": [2], "max_model_len": 1024}
    (told,) = vllm_filters.vllm_faults(
        [released], "24G", [{"name": "chat", "driver": "naive", "model": "small"}]
    )
    assert "small is a release and a folder of the bundle at once" in told


def test_two_models_share_no_gpu_and_no_name() -> None:
    told = vllm_filters.vllm_faults([CODER, CODER], "24G", [])
    assert [line.split(":")[0] for line in told] == [
        "2 models are called coder",
        "GPU 0 is named 2 times",
        "GPU 1 is named 2 times",
    ]
