"""Several instances of one model: a conversation stays where its prefix is cached, within bounds, and survives the
loss of one.
"""

import asyncio
import itertools
import math
import random
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from scripted_upstream import END, USAGE, ScriptedUpstream, delta, stream
from service import eventually, running

from llmserve.api.errors import ApiError
from llmserve.protocol import Beat, Done, Generate, Hello, encode
from llmserve.upstream.admission import Place, Queue
from llmserve.upstream.engine_client import RETURN_SECONDS, EngineClient
from llmserve.upstream.instances import (
    LOAD_BOUND,
    PACE_REQUESTS,
    PACE_SECONDS,
    PREFIXES,
    SLOW,
    Instances,
    Prefix,
)

CHAT = "/v1/chat/completions"


def instances_of(size: int, first: int = 0) -> Instances:
    """Available instances, named by their number."""
    engines = [
        EngineClient("m", Path(f"/run/{number}.sock"), Queue(64, 10**6))
        for number in range(first, first + size)
    ]
    for engine in engines:
        engine.hello = Hello("m", "r", "echo", 4096, 8)
        engine.admission.slots = 10_000
    return Instances("m", engines, Queue(64, 10**6))


def conversation(number: int, turns: int = 1, system: str = "be kind") -> Generate:
    """A request after some turns."""
    messages = [{"role": "system", "content": system}]
    for turn in range(turns):
        messages.append({"role": "user", "content": f"question {number}.{turn}"})
        messages.append({"role": "assistant", "content": f"answer {number}.{turn}"})
    return Generate(0, True, 16, messages=messages[:-1])


def chosen(instances: Instances, request: Generate, tenant: str = "t") -> EngineClient:
    """The instance chosen for it."""
    return instances.route(tenant, request).choose()


def test_a_conversation_stays_on_its_instance_while_it_grows() -> None:
    five = instances_of(5)
    for number in range(50):
        homes = {chosen(five, conversation(number, turns)).socket for turns in (1, 2, 5)}
        assert len(homes) == 1


def test_conversations_and_tenants_spread_over_all_instances() -> None:
    five = instances_of(5)
    counts = [0] * 5
    for number in range(1000):
        counts[five.engines.index(chosen(five, conversation(number)))] += 1
    assert min(counts) > 140
    assert max(counts) < 260
    homes = {chosen(five, conversation(1), f"tenant {number}").socket for number in range(50)}
    assert len(homes) == 5


def test_removing_an_instance_moves_only_its_own_conversations() -> None:
    five = instances_of(5)
    before = {number: chosen(five, conversation(number)).socket for number in range(500)}
    gone = five.engines[2]
    gone.hello = None
    for number, home in before.items():
        after = chosen(five, conversation(number)).socket
        assert after == home or home == gone.socket
        assert after != gone.socket


@pytest.mark.parametrize("seed", range(20))
def test_no_instance_exceeds_its_load_bound(seed: int) -> None:
    chance = random.Random(seed)  # noqa: S311 - test data
    size = chance.randint(2, 9)
    some = instances_of(size)
    for engine in some.engines:
        engine.admission.slots = 1  # one with a free slot is not overloaded, whatever the average
    running_now: list[EngineClient] = []
    for _ in range(600):
        if running_now and chance.random() < 0.4:
            running_now.pop(chance.randrange(len(running_now))).admission.running.total.requests -= 1
            continue
        engine = chosen(some, conversation(chance.choice([1, 1, 1, chance.randint(0, 40)])))
        engine.admission.running.total.requests += 1
        running_now.append(engine)
        assert engine.load <= math.ceil(LOAD_BOUND * len(running_now) / size)


def test_a_hot_conversation_overflows_to_other_instances_and_returns() -> None:
    three = instances_of(3)
    home = chosen(three, conversation(1))
    for _ in range(30):
        chosen(three, conversation(1)).admission.running.total.requests += 1
    assert sorted(engine.load for engine in three.engines)[0] > 0
    for engine in three.engines:
        engine.admission.running.total.requests = 0
    assert chosen(three, conversation(1)) is home


def long_chat(system: str, turns: int, first: str = "question") -> Generate:
    """A conversation with a long first question."""
    messages = [
        {"role": "system", "content": system},
        {"role": "user", "content": f"{first} {'word ' * 2000}"},
    ]
    for turn in range(1, turns):
        messages += [{"role": "assistant", "content": "yes"}, {"role": "user", "content": f"more {turn}"}]
    return Generate(0, True, 16, messages=messages)


def answered_by(instances: Instances, request: Generate, tenant: str = "t") -> EngineClient:
    """The instance that answers a request, which ends at once."""

    async def scenario() -> EngineClient:
        routed = instances.route(tenant, request)
        asking = asyncio.create_task(routed.begin(request, Place(5)))
        while not asking.done():
            await asyncio.sleep(0)
            for number in list(routed.engine.answers):
                if answer := routed.engine.end(number):
                    answer.put(Done(number, "", "stop", 1, 1))
        return routed.engine

    return asyncio.run(scenario())


def test_a_conversation_returns_to_where_it_was_sent_rather_than_home() -> None:
    three = instances_of(3)
    home = chosen(three, long_chat("", 1))
    home.admission.running.total.requests = 200
    other = answered_by(three, long_chat("", 1))
    home.admission.running.total.requests = 0
    assert other is not home
    assert chosen(three, long_chat("", 2)) is other


def test_conversations_with_a_long_system_message_share_its_instance_until_that_is_busy() -> None:
    four = instances_of(4)
    system = "rule " * 4000
    home = answered_by(four, long_chat(system, 1))
    assert {chosen(four, long_chat(system, 1, str(number))) for number in range(20)} == {home}
    home.admission.running.total.requests = 200
    assert chosen(four, long_chat(system, 1, "another")) is not home


def test_a_conversation_leaves_only_where_the_wait_costs_more_than_its_prefix() -> None:
    two = instances_of(2)
    home = answered_by(two, long_chat("", 1))
    home.admission.running.total.requests = 10
    assert chosen(two, long_chat("", 2)) is home
    two.pending[home] = 1_000_000
    assert chosen(two, long_chat("", 2)) is not home


def test_requests_do_not_queue_for_a_slot_while_another_instance_is_idle() -> None:
    two = instances_of(2)
    for engine in two.engines:
        engine.admission.slots = 1
    home = answered_by(two, long_chat("", 1))
    home.admission.running.total.requests = 2
    assert chosen(two, long_chat("", 2)) is not home


def test_a_slow_instance_gets_no_new_conversations_until_it_is_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    three = instances_of(3)
    clock = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    home = chosen(three, long_chat("", 1))
    for engine, _ in itertools.product(three.engines, range(PACE_REQUESTS)):
        three.paces[engine].observe(0.1 * (2 * SLOW if engine is home else 1), 1000)
    assert chosen(three, long_chat("", 1)) is not home
    clock += 2 * PACE_SECONDS
    for engine in three.engines:
        if engine is not home:
            three.paces[engine].observe(0.1, 1000)
    assert chosen(three, long_chat("", 1)) is home


def test_a_single_slow_answer_makes_no_instance_slow() -> None:
    two = instances_of(2)
    home = chosen(two, long_chat("", 1))
    two.paces[home].observe(60.0, 1000)
    for _ in range(PACE_REQUESTS):
        two.paces[next(each for each in two.engines if each is not home)].observe(0.1, 1000)
    assert chosen(two, long_chat("", 1)) is home


def test_what_a_gateway_remembers_is_bounded_and_nothing_stays_pending() -> None:
    two = instances_of(2)
    for number in range(PREFIXES // 2 + 10):
        two.prefixes.add(Prefix.of_request("t", conversation(number, 1, f"rules {number}")), two.engines[0])
    assert len(two.prefixes.lengths) == PREFIXES
    answered_by(two, long_chat("", 1))
    assert set(two.pending.values()) == {0}


def test_tenants_share_no_prefix() -> None:
    four = instances_of(4)
    system = "rule " * 4000
    homes = {answered_by(four, long_chat(system, 1), f"tenant {number}") for number in range(40)}
    assert homes == set(four.engines)


def test_a_request_never_moves_to_another_revision_of_the_model() -> None:
    two = instances_of(2)
    routed = two.route("t", conversation(1))
    other = next(engine for engine in two.engines if engine is not routed.engine)
    other.hello = Hello("m", "r2", "echo", 4096, 8)
    for _ in range(20):
        routed.choose().admission.running.total.requests += 1
    assert other.load == 0
    assert not routed.may_go_elsewhere("engine_lost")
    routed.engine.hello = None
    with pytest.raises(ApiError) as refused:
        routed.choose()
    assert refused.value.code == "engine_unavailable"


def leaves(engine: EngineClient) -> None:
    """The engine announces that it leaves."""
    assert engine.hello
    engine.last_frame = time.monotonic()
    engine.say_goodbye(engine.hello)


def comes_back(engine: EngineClient, revision: str = "r") -> None:
    """The engine is back."""
    engine.hello, engine.last_hello = Hello("m", revision, "echo", 4096, 8), None
    engine.on_return()


def order_of_answers(two: Instances, places: list[Place], revision: str = "r") -> list[int | str]:
    """Send requests for `places` while both instances are away, until the first one is back; returns the order of
    sending.
    """

    async def scenario() -> list[int | str]:
        order: list[int | str] = []

        async def ask(number: int, place: Place) -> None:
            try:
                await two.route("t", conversation(number)).begin(conversation(number), place)
                order.append(number)
            except ApiError as refused:
                order.append(f"{number} {refused.code}")

        asking = [asyncio.create_task(ask(number, place)) for number, place in enumerate(places)]
        await asyncio.sleep(0)
        first = two.engines[0]
        comes_back(first, revision)
        while not all(task.done() for task in asking):
            await asyncio.sleep(0)
            for number in list(first.answers):
                if answer := first.end(number):
                    answer.put(Done(number, "", "stop", 1, 1))
        return order

    return asyncio.run(scenario())


def test_waiting_requests_go_to_the_first_instance_that_is_back_by_priority() -> None:
    two = instances_of(2)
    for engine in two.engines:
        engine.admission.slots = 1
        leaves(engine)
    assert order_of_answers(two, [Place(5), Place(5, priority=1), Place(5)]) == [1, 0, 2]
    assert [engine.load for engine in two.engines] == [0, 0]
    assert two.state().waiting == 0


def test_waiting_requests_are_refused_if_the_engine_returns_with_another_revision() -> None:
    one = instances_of(1)
    leaves(one.engines[0])
    assert order_of_answers(one, [Place(5)], "r2") == ["0 engine_unavailable"]


def test_a_gateway_disconnects_from_a_leaving_engine_once_it_has_its_answers() -> None:
    async def scenario() -> None:
        (engine,) = instances_of(1).engines
        reader = asyncio.StreamReader()
        reader.feed_data(encode(Hello("m", "r", "echo", 4096, 8)) + encode(Beat(False, leaving=True)))
        engine.writer = writer = Mock()
        await asyncio.wait_for(engine.read(reader, writer), 5)
        assert (engine.hello, engine.up) == (None, False)
        assert engine.returning

    asyncio.run(scenario())


def test_requests_do_not_wait_for_an_engine_that_died_or_left_long_ago() -> None:
    one = instances_of(1)
    (engine,) = one.engines
    leaves(engine)
    assert one.route("t", conversation(1)).awaited
    engine.last_frame -= RETURN_SECONDS
    with pytest.raises(ApiError, match="is unavailable"):
        one.route("t", conversation(1))
    comes_back(engine)
    engine.hello = None
    with pytest.raises(ApiError, match="is unavailable"):
        one.route("t", conversation(1))


def asking(number: int, **change: Any) -> dict[str, Any]:
    """A request of conversation `number`."""
    return {"model": "m", "messages": [{"role": "user", "content": f"hello {number}"}], **change}


def test_requests_survive_an_instance_that_dies_before_its_first_byte(tmp_path: Path) -> None:
    sockets = [tmp_path / "a.sock", tmp_path / "b.sock"]
    servers = [ScriptedUpstream(path) for path in sockets]
    remote = {"socket": [str(path) for path in sockets], "revision": "7"}
    # Each has a random preferred instance; that all have the same one has a probability of 2**-39.
    some = range(40)
    with running(tmp_path, {}, remotes={"m": remote}) as service, service.client() as client:
        series = service.metrics()
        assert series['llm_engine_up{model="m"}'] == 2
        for server in servers:
            server.script = stream(delta("hello"), delta("", "stop"), USAGE, END)
        for number in some:
            assert client.post(CHAT, json=asking(number, stream=True)).content.endswith(END)
        assert all(server.requests for server in servers)
        servers[0].script = []  # reads the request and disconnects
        sent = len(servers[0].requests)
        for number in some:
            assert client.post(CHAT, json=asking(number, stream=True)).content.endswith(END)
        assert len(servers[0].requests) > sent
        servers[0].stop()
        eventually("it is noticed", lambda: service.metrics()['llm_engine_up{model="m"}'] == 1)
        assert client.get("/readyz").status_code == 200
        for number in some:
            assert client.post(CHAT, json=asking(number, stream=True)).content.endswith(END)
        servers[1].script = []
        refused = client.post(CHAT, json=asking(1, stream=True))
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_lost")
    servers[1].stop()


def test_several_engines_serve_one_model_and_several_models_are_listed(
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


def test_what_an_instance_had_cached_is_forgotten_when_it_comes_back() -> None:
    two = instances_of(2)
    request = conversation(1, turns=3)
    prefix = Prefix.of_request("t", request)
    for engine in two.engines:
        two.prefixes.add(prefix, engine)
    first, second = two.engines
    first.on_return()
    assert first not in two.prefixes.lengths[prefix.conversation]
    assert second in two.prefixes.lengths[prefix.conversation]
