"""The whole estate, as users, operators and auditors meet it; in this order, the last ones are rough."""

import contextlib
import functools
import http.client
import json
import math
import os
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import openai
import pytest
import sharded_deepseek
from estate import (
    ENCODER,
    HOSTS,
    QUESTION,
    ROOT,
    Client,
    Lab,
    answered,
    answers,
    changed,
    leaks,
    official_client,
    request,
    sign_and_add,
    verify,
)
from hub_standin import HubStandIn, serving

CANARY = "canary-4711-in-a-question"


def test_the_model_answers_the_question(client: Client) -> None:
    assert "Paris" in answers(client)


@pytest.fixture(scope="module")
def api(client: Client) -> Iterator[openai.OpenAI]:
    with official_client(client) as opened:
        yield opened


def test_the_official_client_gets_a_chat_answer_and_a_stream(api: openai.OpenAI) -> None:
    ask: Any = functools.partial(
        api.chat.completions.create,
        model=api.models.list().data[0].id,
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=16,
        temperature=0,
    )
    assert "Paris" in ask().choices[0].message.content
    pieces = [chunk.choices[0].delta.content or "" for chunk in ask(stream=True) if chunk.choices]
    assert len(pieces) > 3
    assert "Paris" in "".join(pieces)


def test_the_official_client_gets_vectors_by_which_the_answer_is_nearer_than_anything_else(
    api: openai.OpenAI,
) -> None:
    texts = [QUESTION, "Paris is the capital of France.", "Bread is baked in an oven."]
    question, answer, other = (
        each.embedding for each in api.embeddings.create(model=ENCODER, input=texts).data
    )
    assert len(question) == 384
    assert math.sumprod(question, answer) > math.sumprod(question, other) + 0.3


def test_the_official_client_raises_its_own_error_for_a_model_that_is_not_there(api: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        api.chat.completions.create(model="gpt-4", messages=[{"role": "user", "content": QUESTION}])
    assert refused.value.code == "model_not_found"
    assert ENCODER in refused.value.message


def test_the_headers_of_the_api_go_through_the_edge(api: openai.OpenAI) -> None:
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    asked = {"traceparent": f"00-{trace}-00f067aa0ba902b7-01", "cache-control": "no-store"}
    body: Any = {"model": ENCODER, "input": QUESTION}
    answer = api.embeddings.with_raw_response.create(**body, extra_headers=asked)
    assert trace in answer.headers["traceparent"]
    assert answer.headers["x-llm-cache"] == "bypass"
    with pytest.raises(openai.BadRequestError, match="x-llm-deadline-ms"):
        api.embeddings.create(**body, extra_headers={"x-llm-deadline-ms": "soon"})


def test_tls_1_2_is_refused(estate: Lab) -> None:
    done = estate.outside(
        "openssl", "s_client", "-connect", "10.77.0.12:443", "-tls1_2", "-brief", check=False
    )
    assert done.returncode
    assert "alert protocol version" in done.stderr


@pytest.fixture(scope="module")
def second_run(estate: Lab) -> str:
    """What a run over the finished estate says, as loud as Ansible can be."""
    return estate.site("-D", "-vvvv")


def test_a_second_run_changes_nothing(second_run: str) -> None:
    assert changed(second_run) == {"ops1": 0, "llm1": 0}


def test_a_question_in_a_query_is_in_no_log(estate: Lab, client: Client) -> None:
    path = f"/generate?prompt={quote(CANARY)}&max_tokens=1"
    assert request(client, "GET", path)[0] == 200
    codes = [request(client, "GET", path, key="llmk_wrong_key")[0] for _ in range(5)]
    assert set(codes) == {401}
    estate.on("llm1", "systemctl stop 'llm-gateway@*.service'")
    status, body = request(client, "GET", path)
    estate.on("llm1", "systemctl start llm-gateway@1.service llm-gateway@2.service")
    assert (status, json.loads(body)["error"]["code"]) == (503, "unavailable")
    logs = estate.on("llm1", "journalctl --no-pager --quiet; cat /var/log/nginx/* 2>/dev/null; true")
    assert "llmkeep_edge" in logs, "the edge logs nothing at all, so that this test would prove nothing"
    assert CANARY not in logs


def test_a_revoked_key_is_dead_within_five_seconds(estate: Lab, client: Client) -> None:
    key = estate.on("llm1", "llm-serve keys add --subject gone@lab --tenant t --role developer").strip()
    assert request(client, "GET", "/v1/models", key=key)[0] == 200
    estate.on("llm1", f"llm-serve keys revoke {key.split('_')[1]}")
    time.sleep(5)
    assert request(client, "GET", "/v1/models", key=key)[0] == 401


def test_an_answer_is_ratable_after_one_rotation_of_the_estates_keys_and_not_after_two(
    estate: Lab, client: Client
) -> None:
    rotate = "run playbooks/rotate-estate-keys.yml"
    identifier = answered(client, "/generate", {"prompt": QUESTION, "max_tokens": 1}, 60)["id"]

    def status() -> int:
        return request(client, "POST", "/v1/feedback", {"id": identifier, "thumb": "up"})[0]

    estate.operate(rotate)
    assert status() == 200
    assert "--limit is llm1; nothing was changed" in estate.operate(rotate, "--limit llm1", check=False)
    estate.operate(rotate)
    assert status() == 404


def test_an_engine_killed_while_it_streams_is_an_error_event_and_the_next_request_is_answered(
    estate: Lab, client: Client
) -> None:
    target = urlsplit(client.url)
    context = ssl.create_default_context(cafile=str(client.ca))
    link = http.client.HTTPSConnection(str(target.hostname), target.port, context=context, timeout=120)
    body = {"prompt": "Tell me a long story about a lighthouse.", "max_tokens": 400, "stream": True}
    link.request("POST", "/generate", json.dumps(body), {"authorization": f"Bearer {client.key}"})
    answer = link.getresponse()
    assert answer.readline().startswith(b"data:")
    estate.on("llm1", "systemctl kill --signal=KILL 'llm-engine@*.service'")
    rest = answer.read().decode()
    link.close()
    assert '"error"' in rest, rest[-500:]
    assert "Paris" in answers(client)


def test_nobody_tried_to_leave_and_whoever_does_is_seen(estate: Lab) -> None:
    refused = "nft list counter inet llmkeep refused_out | grep -o 'packets [0-9]*'"
    assert estate.sink() == []
    assert {host: estate.on(host, refused).strip() for host in HOSTS} == dict.fromkeys(HOSTS, "packets 0")
    connect = 'import socket; socket.create_connection(("192.0.2.7", 443), 1)'
    leave = f"timeout 60 python3 -c '{connect}' 2>/dev/null || :"
    estate.on("llm1", leave)
    assert estate.on("llm1", refused).strip() != "packets 0"
    assert estate.sink() == [], "the firewall let a packet out"
    estate.on("llm1", f"nft flush ruleset; {leave}; systemctl restart nftables.service")
    end = time.monotonic() + 60  # the sink is a process of its own
    while not any("192.0.2.7" in json.dumps(packet) for packet in estate.sink()):
        assert time.monotonic() < end, "the sink saw nothing"
        time.sleep(0.5)
    estate.run("sink", "--clear")


def test_no_secret_is_in_any_output_log_command_line_environment_or_cache(
    estate: Lab, client: Client, second_run: str
) -> None:
    sealed = [
        ("llm1", name)
        for name in ("llm-gateway.pepper", "redis.gateway", "llm-audit.seed", "llmkeep-edge.pin")
    ]
    sealed += [
        ("ops1", name)
        for name in ("llmkeep.issuing-key", "llmkeep.policy-key", "llmkeep-audit.seed", "softhsm.so-pin")
    ]
    assert not leaks(estate, client, sealed, second_run)


def test_a_reboot_of_both_brings_the_service_back_unattended(estate: Lab, client: Client) -> None:
    boot = "cat /proc/sys/kernel/random/boot_id"
    before = {host: estate.on(host, boot) for host in HOSTS}
    for host in HOSTS:
        estate.on(
            host, "systemd-run --quiet --on-active=1 --timer-property=AccuracySec=10ms systemctl reboot"
        )

    def booted(host: str) -> str:
        """Which boot it is; nothing while it does not answer."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return estate.on(host, boot, check=False, timeout=60)
        return ""

    end = time.monotonic() + 180
    for host in HOSTS:
        while booted(host) in ("", before[host]):
            assert time.monotonic() < end, f"{host} did not come back"
            time.sleep(1)
    assert "Paris" in answers(client, seconds=240)
    answered(client, "/v1/embeddings", {"model": ENCODER, "input": QUESTION}, seconds=120)
    report, broken = verify(estate)
    assert (report["ok"], broken) == (True, {})
    assert set(report["hosts"]) == set(HOSTS)
    assert report["checks"] > 60


NF4 = {
    "name": "smollm2-nf4",
    "driver": "naive",
    "model": "smollm2-135m-instruct",
    "quantization": "nf4",
    "memory": "1G",
}


def test_a_sharded_deepseek_from_a_hub_and_over_two_media_is_signed_installed_and_answers_beside_a_model_in_nf4(
    estate: Lab, client: Client, tmp_path: Path
) -> None:
    repository = sharded_deepseek.write(tmp_path / "repository")

    def llmkeep(*words: object, **environment: str) -> str:
        return subprocess.run(
            [str(ROOT / ".venv/bin/llmkeep"), *map(str, words)],
            env=os.environ | environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    def add(source: object, into: Path, *words: str, **environment: str) -> str:
        """Take the model in; its digest."""
        command = ["model", "add", source, "--into", into, "--accept-licence", "deepseek", *words]
        return llmkeep(*command, **environment).split("--sha256 ")[1].strip()

    with serving(HubStandIn("deepseek-ai/DeepSeek-Tiny", repository)) as hub:
        digest = add(hub.source, tmp_path / "candidate", HF_ENDPOINT=hub.endpoint, NO_PROXY="127.0.0.1")
    estate.send("ops1", "/root", {"candidate": tmp_path / "candidate"})
    said = sign_and_add(estate, "/root/candidate", f"--sha256 {digest}")
    assert f"from {hub.source}, licence deepseek accepted by" in said
    digest = add(repository, tmp_path / "second", "--name", "deepseek-over-media")
    llmkeep("bundle", "split", tmp_path / "second", "--size", "150K", "--out", tmp_path / "media")
    estate.send("ops1", "/root", {"media": tmp_path / "media"})
    assert estate.on("ops1", "ls /root/media").split() == ["1", "2"]
    estate.on("ops1", "! llmkeep bundle join /root/media/2 --into /root/second && test ! -e /root/second")
    estate.on("ops1", "llmkeep bundle join /root/media/1 --into /root/second")
    sign_and_add(estate, "/root/second", f"--sha256 {digest}")
    served = {"deepseek": "deepseek-tiny", "second": "deepseek-over-media"}
    small = {"context": 512, "threads": 1}
    common = {"driver": "naive", "memory": "1G"} | small
    models = [{"name": name, "release": release, **common} for name, release in served.items()] + [
        NF4 | small
    ]
    estate.on(
        "ops1",
        "cat > /root/models.json",
        given=json.dumps({"serve": {"vars": {"llm_serving_models": models}}}),
    )
    estate.site("-i /root/models.json", "-t llm_serving")
    for name, release in served.items():
        body = {"model": name, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 8}
        found = answered(client, "/v1/chat/completions", body, seconds=240)
        assert found["usage"]["completion_tokens"] in range(1, 9)
        installed = estate.on(
            "llm1", f"cd /srv/llmkeep/models/{release} && sha256sum --check SHA256SUMS && ls"
        )
        assert installed.count("-of-00003.safetensors: OK") == 3
        assert ".py" not in installed
    body = {"model": "smollm2-nf4", "temperature": 0, "messages": [{"role": "user", "content": QUESTION}]}
    found = answered(client, "/v1/chat/completions", body | {"max_tokens": 8}, seconds=240)
    assert "Paris" in found["choices"][0]["message"]["content"]
    loaded = estate.on(
        "llm1", "journalctl --quiet --no-pager --unit llm-engine@smollm2-nf4 | grep 'weights loaded'"
    )
    assert '"quantization":"nf4"' in loaded.replace(" ", "")
    shards = "cd /srv/llmkeep/models && cmp {}/{} {}/{}"
    for number in (1, 2, 3):
        shard = f"model-0000{number}-of-00003.safetensors"
        estate.on("llm1", shards.format(served["deepseek"], shard, served["second"], shard))
