"""What role llm_serving makes of an inventory: sentences for what cannot be, files and units for the rest."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from plugin_modules import ROOT, load
from rendered_role import absent, content, hardened, played, rendered

serving = load("filter.serving")
HOSTS = {"llm1.estate.internal": "10.0.0.1", "gpu1.estate.internal": "10.0.0.2"}
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
SERVES = {"serve": ["llm1"]}
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
    return rendered(
        folder, "llm_serving", wanted, "llm1", HOSTS, given, SERVES | {"gpu": ["llm1"]}, configured=True
    )


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
    found = rendered(tmp_path, "llm_serving", wanted, "llm1", HOSTS, given, SERVES, configured=True)
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
    made = rendered(tmp_path, "llm_serving", wanted, "llm1", HOSTS, FACTS, SERVES, configured=True)
    assert "IPAddressAllow=localhost\nRestrictAddressFamilies=AF_UNIX AF_INET\n" in made["unit"]
    assert absent(made) == [
        "/opt/llmkeep/releases/0123456789ab/etc/documents.yaml",
        "/etc/systemd/system/llm-documents.service",
        "/etc/systemd/system/llm-engine@smollm2-135m-instruct.service.d/memory.conf",
        "/etc/llmkeep/audit-hold",
        "/etc/nftables.d/output-llm-serving.nft",
    ]


def test_gateways_read_the_quarantine_of_gpus_on_hosts_with_gpus_only(made: Any, tmp_path: Path) -> None:
    assert "quarantine: /var/lib/llm-gpu/state.json\n" in content(made, "/gateway-1.yaml")
    without = rendered(
        tmp_path, "llm_serving", {}, "llm1", HOSTS, FACTS, SERVES | {"gpu": ["gpu1"]}, configured=True
    )
    assert "quarantine" not in content(without, "/gateway-1.yaml")


def test_the_record_is_kept_as_long_as_declared_and_a_hold_is_a_file_with_its_reason(tmp_path: Path) -> None:
    wanted = {"unit": "lookup('ansible.builtin.template', 'llm-audit.service.j2')"}
    variables = FACTS | {"audit_keep_days": 400, "audit_hold": "case 2027-14"}
    made = rendered(tmp_path, "llm_serving", wanted, "llm1", HOSTS, variables, SERVES, configured=True)
    assert content(made, "/audit-hold") == "case 2027-14\n"
    assert "\nConditionPathExists=!/etc/llmkeep/audit-hold\n" in content(made, "/llm-feedback-expire.service")
    assert "LLM_AUDIT_KEEP_DAYS=400 LLM_AUDIT_HOLD=/etc/llmkeep/audit-hold\n" in made["unit"]
    assert "LLM_AUDIT_UNSIGNED_SECONDS=120 LLM_AUDIT_SEEN=/var/lib/llm-audit-seen/head\n" in made["unit"]


@pytest.mark.parametrize(
    ("name", "days", "refused"),
    [
        ("llm_serving_feedback_days", 0, True),
        ("llm_serving_feedback_days", 1, False),
        ("audit_keep_days", 179, True),
        ("audit_keep_days", 180, False),
    ],
)
def test_ratings_are_kept_for_a_day_and_records_for_180_or_more(
    name: str, days: int, refused: bool, tmp_path: Path
) -> None:
    tasks = yaml.safe_load((ROOT / "roles/llm_serving/tasks/preflight.yml").read_text())
    task = [each for each in tasks if name in str(each.get("when"))]
    play = {"hosts": "llm1", "connection": "local", "gather_facts": False, "tasks": task}
    estate = {"hosts": {"llm1": {name: days}}}
    done = played(tmp_path, play, estate)
    assert (done.returncode != 0) == refused, done.stdout
    assert (f"{name} of llm1 is {days}" in done.stdout) == refused


def test_experiments_are_watched_by_the_release_that_gateways_run(made: Any, tmp_path: Path) -> None:
    unit = content(made, "/llm-experiment-guard.service")
    assert "\nX-Release=0123456789ab\n" in unit, "another release is another unit file"
    assert "\nPrivateNetwork=yes\n" in unit
    hardened(tmp_path, "llm-experiment-guard.service", unit)
    assert yaml.safe_load(content(made, "/gateway-1.yaml"))["feedback"]["guarded"] is True


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


@pytest.mark.parametrize(
    ("models", "sentence"),
    [
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
        ([{"name": "a", "driver": "remote", "remote": {"socket": ["s"]}}], "the socket s is not an absolute path"),
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


# ---------------------------------------------------------------- engines on other hosts
SHARED: dict[str, dict[str, Any]] = {
    "edge1": {"inventory_hostname": "edge1", "llm_serving_models": []},
    "llm1": {
        "inventory_hostname": "llm1",
        "llm_serving_models": [
            {"name": "a", "driver": "echo", "instances": 2},
            {"name": "coder", "driver": "remote", "remote": REMOTE},
        ],
    },
    "llm2": {
        "inventory_hostname": "llm2",
        "engine_access_port": 9000,
        "llm_serving_models": [{"name": "a", "driver": "echo"}],
    },
}
APART = {"serve": ["edge1"], "engines": ["llm1", "llm2"]}


def test_a_gateway_without_models_answers_for_those_of_all_hosts_with_engines() -> None:
    a, coder = serving.gateway_models([], SHARED, APART | {"gpu": ["llm1"]}, "edge1", 8444)
    assert (a["sockets"], a["remote"]) == ([], {})
    assert [(each["host"], each["port"], each["name"], each["gpus"]) for each in a["offered"]] == [
        ("llm1.estate.internal", 8444, "a", True),
        ("llm1.estate.internal", 8444, "a-2", True),
        ("llm2.estate.internal", 9000, "a", False),
    ]
    assert coder["remote"] == {"key_credential": "vllm.key", "revision": "1"}
    assert coder["offered"] == [
        {
            "host": "llm1.estate.internal",
            "port": 8444,
            "name": "coder",
            "socket": "/run/vllm/coder/api.sock",
            "gpus": True,
        }
    ]


def test_engines_that_are_offered_are_asked_at_their_sockets() -> None:
    asked = [{"name": "a", "driver": "echo"}, MODELS[4], MODELS[5]]
    assert serving.canary_engines(asked) == [
        {
            "name": name,
            "embeds": name == "vectors",
            "socket": socket,
            "http": name == "coder",
            "credential": "vllm.key" if name == "coder" else "",
        }
        for name, socket in [
            ("a", "/run/llm-engine/a.sock"),
            ("vectors", "/run/llm-engine/vectors.sock"),
            ("coder", "/run/vllm/coder/api.sock"),
        ]
    ]


def test_a_host_uses_its_own_engines_beside_those_of_others() -> None:
    models = [{"name": "a", "driver": "echo"}]
    groups = {"serve": ["llm2"], "engines": ["llm1", "llm2"]}
    a, _ = serving.gateway_models(models, SHARED, groups, "llm2", 8444)
    assert a["sockets"] == ["/run/llm-engine/a.sock"]
    assert [each["host"] for each in a["offered"]] == ["llm1.estate.internal"] * 2


def test_a_model_and_its_adapters_are_answered_by_the_same_engines_of_another_host() -> None:
    there = {"llm1": {"llm_serving_models": [MODELS[1]]}}
    answers = serving.gateway_models([], there, {"engines": ["llm1"]}, "edge1", 8444)
    assert {each["name"]: [engine["name"] for engine in each["offered"]] for each in answers} == {
        name: ["plain", "plain-2"] for name in ("plain", "law", "sql")
    }


@pytest.mark.parametrize(
    ("host", "models", "groups", "fault"),
    [
        ("edge1", [], {"serve": ["edge1"]}, "its gateways have no model"),
        ("llm1", [], {"engines": ["llm1"]}, "it is in engines, but has no engine"),
        (
            "edge1",
            [{"name": "coder", "driver": "echo"}],
            APART,
            "coder is a model of driver remote on one host",
        ),
    ],
)
def test_models_that_hosts_cannot_share_are_refused(
    host: str, models: list[dict[str, Any]], groups: dict[str, list[str]], fault: str
) -> None:
    (refusal,) = serving.sharing_faults(models, SHARED, groups, host)
    assert refusal.startswith(fault)


def of_host(tmp_path: Path, host: str) -> Any:
    """What the role makes of a host of an estate whose edge has gateways alone, and whose other host engines alone."""
    addresses = {"edge1.estate.internal": "10.0.0.1", "llm1.estate.internal": "10.0.0.2"}
    models = [
        {"name": "a", "driver": "echo", "instances": 2},
        {
            "name": "coder",
            "driver": "remote",
            "remote": {"socket": ["/run/vllm/coder/api.sock"], "revision": "1"},
        },
    ]
    wanted = {name: f"__llm_serving_{name}" for name in ("wrong", "units", "outward", "answered")}
    wanted["output.nft"] = "lookup('ansible.builtin.template', 'output.nft.j2')"
    given = FACTS | {"llm_serving_models": [] if host == "edge1" else models}
    return rendered(
        tmp_path,
        "llm_serving",
        wanted,
        host,
        addresses,
        given,
        {"serve": ["edge1"], "engines": ["llm1"]},
        configured=True,
        host_vars={"edge1": {"llm_serving_models": []}, "llm1": {"llm_serving_models": models}},
    )


def test_the_program_takes_the_configuration_of_gateways_without_engines(tmp_path: Path) -> None:
    made = of_host(tmp_path, "edge1")
    assert made["wrong"] == []
    path = tmp_path / "gateway.yaml"
    path.write_text(content(made, "/gateway-1.yaml"))
    done = subprocess.run([PROGRAM, "check", "gateway", path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    engines = yaml.safe_load(path.read_text())["engines"]
    assert [each["name"] for each in engines["a"]["offered"]] == ["a", "a-2"]
    assert engines["coder"]["remote"] == {"revision": "1"}
    assert "ip daddr 10.0.0.2 tcp dport 8444 meta skuid llm-gateway accept" in made["output.nft"]


def test_a_host_with_engines_alone_gets_no_gateway_and_no_record(tmp_path: Path) -> None:
    made = of_host(tmp_path, "llm1")
    assert made["wrong"] == []
    assert made["units"] == ["llm-engine@a.service", "llm-engine@a-2.service"]
    assert not [
        entry["dest"]
        for entry in made["tree"]["files"]
        if "gateway" in entry["dest"] or "audit.service" in entry["dest"]
    ]


# ---------------------------------------------------------------- uploads of documents
SEARCHES = SERVES | {"rag": ["llm1"], "search": ["gpu1"]}


@pytest.fixture(scope="module")
def uploading(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of a host whose gateways search documents in the Elasticsearch of another."""
    wanted = {
        name: f"lookup('ansible.builtin.template', '{name}.j2')"
        for name in ("llm-gateway@.service", "output.nft", "sysusers.conf")
    }
    given = {**FACTS, "llm_serving_models": MODELS, "elasticsearch_port": 9200}
    folder = tmp_path_factory.mktemp("role")
    return rendered(folder, "llm_serving", wanted, "llm1", HOSTS, given, SEARCHES, configured=True)


def test_the_unit_for_uploads_has_its_own_key_and_the_gateways_one_that_reads(
    uploading: Any, tmp_path: Path
) -> None:
    paths = {kind: tmp_path / f"{kind}.yaml" for kind in ("documents", "gateway")}
    for kind, end in (("documents", "/documents.yaml"), ("gateway", "/gateway-1.yaml")):
        paths[kind].write_text(content(uploading, end))
        subprocess.run([str(PROGRAM), "check", kind, str(paths[kind])], check=True)
    documents, gateway = (yaml.safe_load(path.read_text()) for path in paths.values())
    assert documents["documents"]["key_credential"] == "elasticsearch.documents-intake"
    assert gateway["documents"]["key_credential"] == "elasticsearch.documents-reader"
    assert documents["socket"] == gateway["documents"]["intake"]
    assert documents["engine"] == gateway["engines"]["vectors"]["socket"][0]
    shared = {"url", "tls", "model"}
    assert {key: documents["documents"][key] for key in shared} == {
        key: gateway["documents"][key] for key in shared
    }


def test_the_unit_for_uploads_is_hardened_and_reaches_elasticsearch_alone(
    uploading: Any, tmp_path: Path
) -> None:
    unit = content(uploading, "/llm-documents.service")
    hardened(tmp_path, "llm-documents.service", unit)
    lines = unit.splitlines()
    assert [line for line in lines if line.startswith(("IPAddress", "RestrictAddress"))] == [
        "IPAddressDeny=any",
        "IPAddressAllow=localhost",
        "IPAddressAllow=10.0.0.2",
        "RestrictAddressFamilies=AF_UNIX AF_INET",
    ]
    assert [line for line in lines if line.startswith("PrivateUsers")][-1] == "PrivateUsers=no"
    assert "ip daddr 10.0.0.2 tcp dport 9200 meta skuid llm-documents accept" in uploading["output.nft"]
    assert "\nu llm-documents - " in uploading["sysusers.conf"]
    [groups] = [
        line for line in uploading["llm-gateway@.service"].splitlines() if "SupplementaryGroups" in line
    ]
    assert "llm-documents" in groups


def test_without_documents_there_is_no_unit_for_uploads(tmp_path: Path) -> None:
    wanted = {"sysusers": "lookup('ansible.builtin.template', 'sysusers.conf.j2')"}
    made = rendered(tmp_path, "llm_serving", wanted, "llm1", HOSTS, FACTS, SERVES, configured=True)
    assert "/etc/systemd/system/llm-documents.service" in absent(made)
    assert "llm-documents" not in made["sysusers"]
