"""Several instances of one model: a conversation stays where its prefix is, within bounds, and outlives an instance."""

import math
import random
from pathlib import Path
from typing import Any

import pytest
from scripted_upstream import END, USAGE, ScriptedUpstream, said, stream
from service import eventually, running

from llmserve.admission import Queue
from llmserve.errors import ApiError
from llmserve.fleet import LOAD_BOUND, Fleet
from llmserve.link import EngineLink
from llmserve.protocol import Generate, Hello

CHAT = "/v1/chat/completions"


def fleet(size: int, first: int = 0) -> Fleet:
    """Instances that are all there, named by their number."""
    links = [
        EngineLink("m", Path(f"/run/{number}.sock"), Queue(64, 10**6))
        for number in range(first, first + size)
    ]
    for link in links:
        link.hello = Hello("m", "r", "echo", 4096, 8)
        link.admission.slots = 10_000
    return Fleet("m", links)


def conversation(number: int, turns: int = 1) -> Generate:
    """A question after some turns, with a system message that all conversations share."""
    messages = [{"role": "system", "content": "be kind"}]
    for turn in range(turns):
        messages.append({"role": "user", "content": f"question {number}.{turn}"})
        messages.append({"role": "assistant", "content": f"answer {number}.{turn}"})
    return Generate(0, True, 16, messages=messages[:-1])


def chosen(fleet: Fleet, request: Generate, tenant: str = "t") -> EngineLink:
    """The instance that it goes to."""
    return fleet.seat(tenant, request).choose()


def test_a_conversation_stays_on_its_instance_while_it_grows() -> None:
    five = fleet(5)
    for number in range(50):
        homes = {chosen(five, conversation(number, turns)).socket for turns in (1, 2, 5)}
        assert len(homes) == 1


def test_conversations_and_tenants_spread_over_all_instances() -> None:
    five = fleet(5)
    counts = [0] * 5
    for number in range(1000):
        counts[five.links.index(chosen(five, conversation(number)))] += 1
    assert min(counts) > 140
    assert max(counts) < 260
    homes = {chosen(five, conversation(1), f"tenant {number}").socket for number in range(50)}
    assert len(homes) == 5


def test_one_instance_less_moves_only_the_conversations_that_it_had() -> None:
    five = fleet(5)
    before = {number: chosen(five, conversation(number)).socket for number in range(500)}
    gone = five.links[2]
    gone.hello = None
    for number, home in before.items():
        after = chosen(five, conversation(number)).socket
        assert after == home or home == gone.socket
        assert after != gone.socket


@pytest.mark.parametrize("seed", range(20))
def test_no_instance_is_ever_given_more_than_its_bounded_share(seed: int) -> None:
    chance = random.Random(seed)  # noqa: S311 - test data
    size = chance.randint(2, 9)
    some = fleet(size)
    running_now: list[EngineLink] = []
    for _ in range(600):
        if running_now and chance.random() < 0.4:
            running_now.pop(chance.randrange(len(running_now))).admission.running -= 1
            continue
        link = chosen(some, conversation(chance.choice([1, 1, 1, chance.randint(0, 40)])))
        link.admission.running += 1
        running_now.append(link)
        assert link.load <= math.ceil(LOAD_BOUND * len(running_now) / size)


def test_a_conversation_that_all_hold_at_once_overflows_to_the_others_and_returns() -> None:
    three = fleet(3)
    home = chosen(three, conversation(1))
    for _ in range(30):
        chosen(three, conversation(1)).admission.running += 1
    assert sorted(link.load for link in three.links)[0] > 0
    for link in three.links:
        link.admission.running = 0
    assert chosen(three, conversation(1)) is home


def test_a_request_never_moves_to_another_revision_of_the_model() -> None:
    two = fleet(2)
    seat = two.seat("t", conversation(1))
    other = next(link for link in two.links if link is not seat.link)
    other.hello = Hello("m", "r2", "echo", 4096, 8)
    for _ in range(20):
        seat.choose().admission.running += 1
    assert other.load == 0
    assert not seat.may_go_elsewhere("engine_lost")
    seat.link.hello = None
    with pytest.raises(ApiError) as refused:
        seat.choose()
    assert refused.value.code == "engine_unavailable"


def asking(number: int, **change: Any) -> dict[str, Any]:
    """A question of conversation `number`."""
    return {"model": "m", "messages": [{"role": "user", "content": f"hello {number}"}], **change}


def test_requests_survive_an_instance_that_dies_before_its_first_byte(tmp_path: Path) -> None:
    sockets = [tmp_path / "a.sock", tmp_path / "b.sock"]
    servers = [ScriptedUpstream(path) for path in sockets]
    remote = {"socket": [str(path) for path in sockets], "revision": "7"}
    with running(tmp_path, {}, remotes={"m": remote}) as service, service.client() as client:
        series = service.metrics()
        assert series['llm_engine_up{model="m"}'] == 2
        for server in servers:
            server.script = stream(said("hello"), said("", "stop"), USAGE, END)
        for number in range(20):
            assert client.post(CHAT, json=asking(number, stream=True)).content.endswith(END)
        assert all(server.asked for server in servers)
        servers[0].script = []  # takes the question and hangs up
        asked = len(servers[0].asked)
        for number in range(20):
            assert client.post(CHAT, json=asking(number, stream=True)).content.endswith(END)
        assert len(servers[0].asked) > asked
        servers[0].stop()
        eventually("it is seen", lambda: service.metrics()['llm_engine_up{model="m"}'] == 1, 3)
        assert client.get("/readyz").status_code == 200
        for number in range(20):
            assert client.post(CHAT, json=asking(number, stream=True)).content.endswith(END)
        servers[1].script = []
        refused = client.post(CHAT, json=asking(1, stream=True))
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_lost")
    servers[1].stop()


def test_engines_of_ours_on_several_sockets_serve_one_model_and_several_models_are_listed(
    tmp_path: Path,
) -> None:
    models = {"first": {"driver": "echo"}, "m": {"driver": "echo"}}
    with running(tmp_path, models, instances={"m": 2}) as service, service.client() as client:
        assert [each["id"] for each in client.get("/v1/models").json()["data"]] == ["first", "m"]
        assert service.metrics()['llm_engine_up{model="m"}'] == 2
        service.engines["m"].kill()
        for number in range(10):
            answer = client.post(CHAT, json=asking(number))
            assert answer.json()["choices"][0]["message"]["content"] == f"hello {number}"
