"""The Redis of llm1's gateways is on ops1: what they keep and count goes there by mutual TLS 1.3."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from estate import QUESTION, Lab, changed, official_client, open_client, within

MODEL = "smollm2-135m-instruct"
SITE = "llmkeep site -i inventory/lab -i inventory/lab-redis --tags redis,llm_serving"
KEYS = """
password=$(systemd-creds decrypt /etc/credstore.encrypted/redis.gateway)
printf 'AUTH gateway %s\\nINFO keyspace\\n' "$password" | redis-cli -s /run/redis/redis.sock
"""
STRANGER = "runuser -u llm-engine -- timeout 5 bash -c 'exec 3<>/dev/tcp/10.77.0.11/6379' && echo reached || echo refused"


@pytest.fixture(scope="module")
def sharing(estate: Lab) -> Lab:
    """The estate, whose Redis has moved to ops1."""
    estate.on("ops1", SITE)
    estate.on("llm1", "systemctl disable --now redis-server.service")
    return estate


@pytest.fixture(scope="module")
def ask(sharing: Lab) -> Iterator[Callable[[], str]]:
    """Ask the same question again; returns `hit`, `miss` or `bypass`."""
    with official_client(open_client(sharing)) as api:
        question: Any = {
            "model": MODEL,
            "messages": [{"role": "user", "content": QUESTION}],
            "temperature": 0,
        }
        yield lambda: str(api.chat.completions.with_raw_response.create(**question).headers["x-llm-cache"])


def test_an_answer_is_cached_on_the_other_host(sharing: Lab, ask: Callable[[], str]) -> None:
    within(60, "a cached answer", lambda: ask() == "hit")
    assert "db0:keys=" in sharing.on("ops1", KEYS)


def test_no_other_process_of_the_host_reaches_it(sharing: Lab) -> None:
    assert sharing.on("llm1", STRANGER).strip() == "refused"


def test_without_it_gateways_still_answer(sharing: Lab, ask: Callable[[], str]) -> None:
    sharing.on("ops1", "systemctl stop redis-server.service")
    assert ask() == "miss"
    sharing.on("ops1", "systemctl start redis-server.service")
    within(60, "a cached answer again", lambda: ask() == "hit")


def test_a_second_run_changes_nothing(sharing: Lab) -> None:
    assert changed(sharing.on("ops1", SITE)) == {"llm1": 0, "ops1": 0}
