"""Logstash's pipeline as role logstash renders it: parsed, and run by the scenario's stand-in. No registry has Logstash."""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from logstash_pipeline import Event, Running, Unknown
from logstash_pipeline_parser import Pipeline
from logstash_pipeline_parser.tree import ParseError
from plugin_modules import ROOT
from rendered_role import absent, content, hardened, rendered

HOSTS = {"ops1": "10.77.0.11", "llm-1": "10.77.0.12", "llm2": "10.77.0.13"}
GROUPS = {"logstash": ["ops1"], "search": ["ops1"], "logs": ["llm-1", "llm2"]}
GIVEN = {
    "role_path": str(ROOT / "roles/logstash"),
    "__logstash_os": {"home": "/usr/share/logstash"},
    "__logstash_held": {"holder": {"sha256": "0" * 64}},
}
Read = Callable[[str], str]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Read:
    """The content of the file that the role makes whose path ends with the word."""
    made = rendered(
        tmp_path_factory.mktemp("logstash"), "logstash", {}, "ops1", HOSTS, GIVEN, GROUPS, configured=True
    )
    return lambda end: content(made, end)


@pytest.fixture(scope="module")
def source(files: Read) -> str:
    return files("/logs.conf")


def plugins(tree: list[Any], section: str, name: str) -> list[dict[str, Any]]:
    """The options of each plugin of this name in a section, outside conditions."""
    return [
        {key: values[0] for key, values in given}
        for plugin, given in dict(tree)[section]
        if plugin == name and plugin != "if"
    ]


def test_the_input_takes_beats_by_mutual_tls_1_3_and_adds_nothing(source: str) -> None:
    tree = Pipeline(source).parse()
    (beats,) = plugins(tree, "input", "beats")
    assert len(dict(tree)["input"]) == 1
    assert str(beats["host"]) == HOSTS["ops1"]
    assert beats["ssl_enabled"] is True
    assert beats["ssl_client_authentication"] == "required"
    assert beats["ssl_supported_protocols"] == ["TLSv1.3"]
    assert beats["ssl_certificate_authorities"] == ["/etc/llmkeep/pki/root.pem"]
    assert beats["enrich"] == ["ssl_peer_metadata"]
    assert beats["ecs_compatibility"] == "disabled"


def test_the_output_creates_in_the_documents_own_stream_by_mutual_tls_1_3(source: str) -> None:
    tree = Pipeline(source).parse()
    (streams,) = plugins(tree, "output", "elasticsearch")
    assert len(dict(tree)["output"]) == 1
    assert streams["hosts"] == ["https://ops1.estate.internal:9200"]
    assert (streams["action"], streams["data_stream"]) == ("create", "false")
    assert streams["index"] == "logs-%{[data_stream][dataset]}-%{[data_stream][namespace]}"
    assert streams["document_id"] == "%{[@metadata][_id]}"
    assert streams["api_key"] == "${API_KEY}"
    assert "pipeline" not in streams
    assert streams["ssl_enabled"] is True
    assert streams["ssl_verification_mode"] == "full"
    assert streams["ssl_supported_protocols"] == ["TLSv1.3"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"TLSv1.3"]\n', '"TLSv1.3"\n'),
        ("filter {", "filters {"),
        ("enrich =>", "enrich ="),
        (" or [data_stream]", " or or [data_stream]"),
        ('"required"', '"required'),
        ("output {", "output"),
    ],
)
def test_a_broken_pipeline_is_refused(source: str, old: str, new: str) -> None:
    assert old in source
    with pytest.raises(ParseError):
        Pipeline(source.replace(old, new, 1)).parse()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("uuid {", "fingerprint {"),
        ("refresh_interval => 0", "regex => true"),
        ('[@metadata][claimed] != ', "[@metadata][claimed] > "),
        ('"ssl_peer_metadata"]', '"all"]'),
        ('action => "create"', 'action => "index"'),
    ],
)  # fmt: skip
def test_the_stand_in_refuses_what_it_does_not_do(source: str, folder: Path, old: str, new: str) -> None:
    assert old in source
    with pytest.raises(Unknown):
        Running(source.replace(old, new, 1), folder)


@pytest.fixture
def folder(files: Read, tmp_path: Path) -> Path:
    """/etc/logstash with what the pipeline reads."""
    (tmp_path / "hosts.json").write_text(files("/hosts.json"))
    return tmp_path


def document(**other: Any) -> Event:
    return {
        "@timestamp": "2026-11-27T18:00:00.000Z",
        "message": "x",
        "host": {"name": "llm-1.estate.internal"},
        "data_stream": {"dataset": "llmkeep.system", "namespace": "llm_1"},
        "@metadata": {"beat": "filebeat", "version": "9.5.3"},
    } | other


PEER = "CN=llm-1"
FOREIGN: dict[str, tuple[str, Event]] = {
    "by the certificate of another host": ("CN=llm2", document()),
    "by the certificate of a host whose logs are not kept": ("CN=ops1", document()),
    "by a certificate with more in its subject": ("CN=llm-1,O=other", document()),
    "in the namespace of another": (
        PEER,
        document(data_stream={"dataset": "llmkeep.system", "namespace": "llm2"}),
    ),
    "in the name of another": (PEER, document(host={"name": "llm2.estate.internal"})),
    "without a host": (PEER, document(host=None)),
    "without a stream": (PEER, document(data_stream=None)),
    "in a stream that there is not": (
        PEER,
        document(data_stream={"dataset": "other", "namespace": "llm_1"}),
    ),
    "in several streams": (
        PEER,
        document(data_stream={"dataset": ["llmkeep.system"], "namespace": "llm_1"}),
    ),
    "with a peer of its own making": (
        "CN=llm2",
        document(**{"@metadata": {"tls_peer": {"status": "verified", "subject": PEER}}}),
    ),
    "with permission of its own making": (
        "CN=ops1",
        document(**{"@metadata": {"permitted": "llm-1.estate.internal llm_1"}}),
    ),
    "with permission and claim of its own making": (
        PEER,
        document(
            host={"name": "llm2.estate.internal"},
            **{"@metadata": {"permitted": "llm2.estate.internal llm_1", "claimed": "llm2.estate.internal llm_1"}},
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FOREIGN)
def test_a_foreign_document_is_dropped_and_counted(source: str, folder: Path, case: str) -> None:
    running = Running(source, folder)
    subject, event = FOREIGN[case]
    assert running.filtered(event, subject) is None
    assert running.dropped == {"foreign": 1}


def passes_with(source: str, folder: Path) -> set[str]:
    """The foreign documents that this pipeline lets through."""
    running = Running(source, folder)
    return {case for case, (subject, event) in FOREIGN.items() if running.filtered(event, subject)}


@pytest.mark.parametrize(
    "gone",
    [
        '  mutate { remove_field => ["[@metadata][permitted]", "[@metadata][claimed]"] }\n',
        "[@metadata][claimed] != [@metadata][permitted] or ",
        "%{[host][name]} ",
        " %{[data_stream][namespace]}",
        ' or [data_stream][dataset] not in ["llmkeep.auth", "llmkeep.edge", "llmkeep.service", "llmkeep.system"]',
        '    drop { id => "foreign" }\n',
    ],
)
def test_no_part_of_what_drops_them_can_go(source: str, folder: Path, gone: str) -> None:
    """Either a foreign document passes without it, or the host's own no longer does."""
    assert gone in source
    less = source.replace(gone, "", 1)
    own = Running(less, folder).filtered(document(), PEER)
    assert passes_with(less, folder) or own is None


def test_a_document_leaves_as_it_came_with_the_id_that_it_has(source: str, folder: Path) -> None:
    running = Running(source, folder)
    came = document(**{"@metadata": {"_id": "a-1", "pipeline": "other", "index": "other", "_index": "other"}})
    event = running.filtered(came, PEER)
    assert event
    action, left = running.action(event)
    assert action == {"create": {"_index": "logs-llmkeep.system-llm_1", "_id": "a-1"}}
    assert left == {key: value for key, value in came.items() if key != "@metadata"}


def test_a_document_without_an_id_gets_one_of_its_own(source: str, folder: Path) -> None:
    running = Running(source, folder)
    ids = set()
    for _ in range(2):
        event = running.filtered(document(), PEER)
        assert event
        ids.add(running.action(event)[0]["create"]["_id"])
    assert len(ids) == 2
    assert not any("%{" in each for each in ids)


def test_the_queue_is_on_disk_and_nothing_asks_elastic(files: Read) -> None:
    settings = yaml.safe_load(files("/logstash.yml"))
    assert settings["queue.type"] == "persisted"
    assert settings["queue.checkpoint.writes"] == 1
    assert settings["queue.max_bytes"] == "4096mb"
    assert (settings["dead_letter_queue.enable"], settings["dead_letter_queue.max_bytes"]) == (True, "256mb")
    assert settings["api.http.host"] == "127.0.0.1"
    assert settings["api.auth.basic.password"] == "${API_PASSWORD}"
    assert not any(
        settings[f"xpack.{name}.enabled"] for name in ("monitoring", "management", "geoip.downloader")
    )


def test_its_unit_is_hardened_and_reaches_hosts_that_it_serves_alone(files: Read, tmp_path: Path) -> None:
    unit = files("system/logstash.service")
    hardened(tmp_path, "logstash.service", unit)
    assert "IPAddressAllow=localhost 10.77.0.11 10.77.0.12 10.77.0.13\n" in unit
    assert files("/input-logstash.nft").split("\n") == [
        "ip saddr 10.77.0.12 tcp dport 5044 accept",
        "ip saddr 10.77.0.13 tcp dport 5044 accept",
        "",
    ]


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    long = "h" * 65
    given = {
        "__logstash_room_mb": "4351",
        "__logstash_has_program": False,
        "logstash_source": "lab",
        "__logstash_os": {"home": "/lab"},
    }
    groups = {"logstash": ["ops1", "llm2"], "logs": [long]}
    made = rendered(
        tmp_path, "logstash", {"faults": "__logstash_faults"}, "ops1", HOSTS | {long: "10.77.0.14"}, given, groups
    )  # fmt: skip
    assert [text.split(":")[0][:60] for text in made["faults"]] == [
        "the group logstash has 2 hosts, but hosts ship to one",
        "no host is in the group search, so there is no Elasticsearch",
        f"a certificate has the first 64 characters of a name, which do not tell {long} from another"[:60],
        "/var/lib/logstash has room for 4351 MiB, but logstash_queue_mb (4096) and"[:60],
        "logstash_source is lab, but /lab/bin/logstash is missing",
    ]


def test_the_key_creates_in_the_streams_of_hosts_in_logs_alone(tmp_path: Path) -> None:
    made = rendered(tmp_path, "logstash", {"role": "__logstash_role"}, "ops1", HOSTS, {}, GROUPS)
    (indices,) = made["role"]["logs"]["indices"]
    assert indices["privileges"] == ["create_doc", "auto_configure"]
    assert sorted(indices["names"]) == sorted(
        f"logs-llmkeep.{kind}-{host}" for kind in ("auth", "edge", "service", "system") for host in ("llm_1", "llm2")
    )  # fmt: skip


def test_what_the_queue_has_already_counts_as_room() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        queue = Path(folder, "not/yet")

        def more_than_free() -> int:
            program = ROOT / "roles/logstash/files/queue-room.sh"
            done = subprocess.run(["sh", program, queue], check=True, capture_output=True, text=True)
            return int(done.stdout) - (shutil.disk_usage(folder).free >> 20)

        assert abs(more_than_free()) < 8
        queue.mkdir(parents=True)
        with (queue / "page.0").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, 48 << 20)
        assert 40 < more_than_free() < 56


SETTINGS = ("logstash.yml", "logs.conf", "hosts.json", "jvm.options", "log4j2.properties")


def test_elastics_package_takes_the_settings_and_the_pipeline(files: Read, tmp_path: Path) -> None:
    """Where Elastic's package is installed (`make storm`): its own test of settings and pipeline."""
    program = Path("/usr/share/logstash/bin/logstash")
    if not program.exists():
        pytest.skip("Logstash is not installed here, and no registry has it: install Elastic's package 9.x")
    for name in SETTINGS:
        text = files(f"/{name}").replace("${API_KEY}", "id:key").replace("${API_PASSWORD}", "Aa1bbbbb")
        (tmp_path / name).write_text(text.replace("/var/l", f"{tmp_path}/l"))
    said = subprocess.run(
        [program, "--path.settings", tmp_path, "--path.config", tmp_path / "logs.conf", "--config.test_and_exit"],
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert said.returncode == 0, said.stdout + said.stderr


def test_hosts_json_is_by_subject(files: Read) -> None:
    assert json.loads(files("/hosts.json")) == {
        "CN=llm-1": "llm-1.estate.internal llm_1",
        "CN=llm2": "llm2.estate.internal llm2",
    }


@pytest.mark.parametrize("groups", [{"logstash": ["ops1"]}, {}], ids=["through Logstash", "directly"])
def test_hosts_ship_to_the_group_logstash_and_then_hold_no_key(
    tmp_path: Path, groups: dict[str, list[str]]
) -> None:
    given = {
        "role_path": str(ROOT / "roles/filebeat"),
        "__filebeat_os": {"program": "/filebeat"},
        "__filebeat_held": {"holder": {"sha256": "0" * 64}},
    }
    groups = groups | {"search": ["llm2"], "logs": ["llm-1"]}
    made = rendered(tmp_path, "filebeat", {}, "llm-1", HOSTS, given, groups, configured=True)
    output = {
        key: value["hosts"]
        for key, value in yaml.safe_load(content(made, "filebeat.yml")).items()
        if key.startswith("output.")
    }
    unit, rules = content(made, "system/filebeat.service"), content(made, ".nft")
    if "logstash" in groups:
        assert output == {"output.logstash": ["ops1.estate.internal:5044"]}
        assert rules == "ip daddr 10.77.0.11 tcp dport 5044 accept\n"
        assert "filebeat.key" not in unit
        assert "IPAddressAllow=10.77.0.11\n" in unit
    else:
        assert output == {"output.elasticsearch": ["https://llm2.estate.internal:9200"]}
        assert rules == "ip daddr 10.77.0.13 tcp dport 9200 accept\n"
        assert "LoadCredentialEncrypted=filebeat.key\n" in unit
        assert "IPAddressAllow=10.77.0.13\n" in unit


RATINGS_UNIT = "/etc/systemd/system/llmkeep-ratings-ship.timer"
LOGS, RATINGS = "filebeat.key", "elasticsearch.ratings"


@pytest.mark.parametrize(
    ("groups", "given", "keys", "way"),
    [
        ({"serve": ["llm-1"]}, {}, [LOGS, RATINGS], True),
        ({"serve": ["llm-1"]}, {"filebeat_ratings": False}, [LOGS], True),
        ({"serve": ["llm2"]}, {}, [LOGS], True),
        ({"serve": ["llm-1"], "logstash": ["ops1"]}, {}, [], False),
        ({"serve": ["llm-1"], "logstash": ["ops1"]}, {"filebeat_ratings": True}, [RATINGS], True),
    ],
    ids=["serves", "not wanted", "serves no more", "through Logstash", "through Logstash, and wanted"],
)
def test_a_host_has_keys_units_and_checks_of_what_it_sends_and_no_way_but_for_that(
    tmp_path: Path, groups: dict[str, list[str]], given: dict[str, bool], keys: list[str], way: bool
) -> None:
    variables: dict[str, Any] = {
        "role_path": str(ROOT / "roles/filebeat"),
        "__filebeat_os": {"program": "/filebeat"},
        "__filebeat_held": {"holder": {"sha256": "0" * 64}},
    }
    [verify] = yaml.safe_load((ROOT / "roles/filebeat/tasks/verify.yml").read_text())
    chosen = verify["vars"]["_common_checks"].strip().removeprefix("{{").removesuffix("}}")
    for name in ("__filebeat_key_checks", "__filebeat_sealed_checks"):
        variables[name] = [{"id": check["id"]} for check in verify["vars"][name]]
    variables["__filebeat_checks"] = []
    groups = groups | {"search": ["llm2"], "logs": ["llm-1"]}
    wanted = {"keys": "__filebeat_keys", "checks": chosen}
    made = rendered(tmp_path, "filebeat", wanted, "llm-1", HOSTS, variables | given, groups, configured=True)
    assert made["keys"] == keys
    assert (RATINGS_UNIT in absent(made)) == (RATINGS not in keys)
    assert ("10.77.0.13 tcp dport 9200 accept" in content(made, "output-filebeat.nft")) == way
    assert [check["id"] for check in made["checks"]] == [
        *(["filebeat.key_creates_documents_of_its_host_only"] if LOGS in keys else []),
        *(["filebeat.key_is_sealed"] if keys else []),
    ]


@pytest.mark.parametrize(
    ("given", "reached"), [({}, ["llm-1"]), ({"filebeat_ratings": True}, ["llm-1", "llm2"])]
)
def test_behind_logstash_serving_hosts_reach_elasticsearch_only_where_they_send_ratings(
    tmp_path: Path, given: dict[str, bool], reached: list[str]
) -> None:
    groups = {"logstash": ["llm-1"], "logs": ["llm-1", "llm2"], "serve": ["llm2"], "control": ["llm-1"]}
    wanted = {"clients": "elasticsearch_clients"}
    made = rendered(tmp_path, "elasticsearch", wanted, "ops1", HOSTS, given, groups)
    assert made["clients"] == reached
