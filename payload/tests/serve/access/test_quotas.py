"""Quotas with a real Redis: one counter for all processes, and a lower limit without Redis."""

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
from redis_server import OTHER, PASSWORD, RedisServer

from llmserve.access.decision import Decision, Rate
from llmserve.access.quotas import ANSWER_TOKENS, AWAY_SHARE, LEASES, Quotas
from llmserve.api.errors import ApiError
from llmserve.metrics import Metrics
from llmserve.redis_client import RedisClient, RedisUnavailable
from llmserve.settings import Redis


@pytest.fixture(autouse=True)
def mid_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop the clock in the middle of a minute, so that no test crosses the end of one."""
    now = time.time() // 60 * 60 + 30
    monkeypatch.setattr(time, "time", lambda: now)


@asynccontextmanager
async def processes(
    server: RedisServer, number: int, hosts: Sequence[str] = ("local",)
) -> AsyncIterator[list[Quotas]]:
    """The quotas of several gateways of each host, each with its own connection."""
    clients = []
    for host in hosts:
        settings = Redis(
            url=f"unix://{server.socket}",
            user=f"gateway-{host}",
            host=host,
            others=tuple(each for each in hosts if each != host),
            deadline_ms=5000,
        )
        clients += [RedisClient(settings, PASSWORD) for _ in range(number)]
    yield [Quotas(client, Metrics()) for client in clients]
    for client in clients:
        await client.close()


def granting(requests: int = 10**6, minute: int = 10**6, day: int = 10**6) -> Decision:
    """A decision with this rate."""
    return Decision(True, "r", "rule", 1, None, 1000, Rate("standard", requests, minute, day))


async def count(times: int, ask: Callable[[], Awaitable[object]]) -> int:
    """How many of so many calls are allowed; checks that the others carry retry-after, unless no wait helps."""
    passed = 0
    for _ in range(times):
        (result,) = await asyncio.gather(ask(), return_exceptions=True)
        if isinstance(result, ApiError):
            assert (result.status, result.code) == (429, "rate_limited")
            assert ("this request alone needs" in result.message) != (
                result.headers == [(b"retry-after", b"31")]
            )
        else:
            passed += 1
    return passed


def test_two_processes_share_one_limit(redis_server: RedisServer) -> None:
    async def scenario() -> None:
        async with processes(redis_server, 2) as (first, second):
            limit = granting(requests=40)
            mine = await count(30, lambda: first.request("t", "shared", limit))
            others = await count(30, lambda: second.request("t", "shared", limit))
            assert mine == 30
            assert 40 - 40 // LEASES <= mine + others <= 40

    asyncio.run(scenario())


def test_concurrent_requests_do_not_exceed_the_limit(redis_server: RedisServer) -> None:
    async def scenario() -> None:
        async with processes(redis_server, 1) as (quotas,):
            requests = [quotas.request("t", "burst", granting(requests=20)) for _ in range(100)]
            results = await asyncio.gather(*requests, return_exceptions=True)
            assert sum(result is None for result in results) == 20

    asyncio.run(scenario())


def test_concurrent_requests_share_one_lease(redis_server: RedisServer) -> None:
    async def scenario() -> None:
        async with processes(redis_server, 2) as (first, second):
            limit = granting(requests=100)
            await asyncio.gather(*(first.request("t", "crowd", limit) for _ in range(30)))
            others = await count(100, lambda: second.request("t", "crowd", limit))
            assert others >= 100 - 30 - 100 // LEASES

    asyncio.run(scenario())


def test_most_requests_need_no_call_to_redis(redis_server: RedisServer) -> None:
    async def scenario() -> None:
        async with processes(redis_server, 1) as (quotas,):
            limit = granting(requests=1000)
            await quotas.request("t", "cheap", limit)
            redis_server.stop()
            try:
                assert await count(1000 // LEASES - 1, lambda: quotas.request("t", "cheap", limit)) == 49
            finally:
                redis_server.start()

    asyncio.run(scenario())


def test_reserved_tokens_that_are_not_used_are_returned(redis_server: RedisServer) -> None:
    async def scenario() -> None:
        async with processes(redis_server, 1) as (quotas,):
            limit = granting(minute=100, day=1000)
            first = await quotas.reserve("t", "tokens", limit, 80)
            assert await count(1, lambda: quotas.reserve("t", "tokens", limit, 80)) == 0
            first.settle(10)
            assert await count(1, lambda: quotas.reserve("t", "tokens", limit, 80)) == 1

    asyncio.run(scenario())


def test_tokens_beyond_the_reservation_are_charged(redis_server: RedisServer) -> None:
    async def scenario() -> None:
        async with processes(redis_server, 1) as (quotas,):
            limit = granting(minute=100)
            (await quotas.reserve("t", "long-prompt", limit, 10)).settle(95)
            assert await count(1, lambda: quotas.reserve("t", "long-prompt", limit, 10)) == 0

    asyncio.run(scenario())


def test_a_refusal_by_one_window_costs_the_other_nothing(
    redis_server: RedisServer,
) -> None:
    async def scenario() -> None:
        async with processes(redis_server, 1) as (quotas,):
            tight, wide = granting(minute=50, day=1000), granting(minute=1000, day=1000)
            assert await count(1, lambda: quotas.reserve("t", "day", tight, 60)) == 0
            assert await count(10, lambda: quotas.reserve("t", "day", wide, 100)) == 10

    asyncio.run(scenario())


def test_two_tenants_with_the_same_subject_have_two_accounts(redis_server: RedisServer) -> None:
    async def scenario() -> None:
        async with processes(redis_server, 1) as (quotas,):
            limit = granting(requests=3)
            assert await count(5, lambda: quotas.request("one", "ada", limit)) == 3
            assert await count(5, lambda: quotas.request("two", "ada", limit)) == 3

    asyncio.run(scenario())


def test_without_redis_a_process_allows_a_quarter(tmp_path: Path) -> None:
    async def scenario() -> None:
        away = Quotas(RedisClient(Redis(url=f"unix://{tmp_path}/none.sock"), None), Metrics())
        assert await count(100, lambda: away.request("t", "s", granting(requests=40))) == 10

    asyncio.run(scenario())


def test_a_limit_of_zero_allows_nothing(redis_server: RedisServer) -> None:
    async def scenario() -> None:
        async with processes(redis_server, 1) as (quotas,):
            assert await count(3, lambda: quotas.request("t", "none", granting(requests=0))) == 0

    asyncio.run(scenario())


def test_a_refusal_says_limit_need_and_wait_and_is_counted(redis_server: RedisServer) -> None:
    async def scenario() -> None:
        async with processes(redis_server, 1) as (quotas,):
            await quotas.reserve("t", "told", granting(minute=50), 30)
            with pytest.raises(ApiError) as caught:
                await quotas.reserve("t", "told", granting(minute=50), 30)
            assert caught.value.message == (
                "your limit is 50 tokens a minute (rate class standard), and this request needs 30 more: "
                "retry in 31 s, or request less"
            )
            with pytest.raises(ApiError) as caught:
                await quotas.reserve("t", "told", granting(day=5), 60)
            assert caught.value.message == (
                "your limit is 5 tokens a day (rate class standard), and this request alone needs 60: "
                "request less, or ask for a role with a larger rate class"
            )
            assert caught.value.headers == []
            registry = quotas.metrics.registry
            for quota in "tokens a minute", "tokens a day":
                assert registry.get_sample_value("llm_quota_refused_total", {"quota": quota}) == 1

    asyncio.run(scenario())


def test_counters_are_named_by_a_hash_and_expire_a_minute_after_their_period(
    redis_server: RedisServer,
) -> None:
    async def scenario() -> None:
        async with processes(redis_server, 1) as (quotas,):
            await quotas.request("t", "named", granting(requests=100))
            await quotas.reserve("t", "named", granting(), 1)

    asyncio.run(scenario())
    owner, now = hashlib.sha256(b"t\0named").hexdigest()[:32], int(time.time())
    with redis_server.client() as redis:
        counted = {
            kind: (int(redis.get(name) or 0), redis.expiretime(name))
            for kind, seconds in (("requests_a_minute", 60), ("tokens_a_minute", 60), ("tokens_a_day", 86400))
            for name in [f"llm:local:quota:{owner}:{kind}:{now // seconds}"]
        }
    minute = now // 60 * 60 + 120
    assert counted == {
        "requests_a_minute": (5, minute),
        "tokens_a_minute": (10**6 // LEASES, minute),
        "tokens_a_day": (10**6 // LEASES, now // 86400 * 86400 + 86460),
    }


BOTH = "local", OTHER


def test_two_hosts_that_share_a_redis_share_one_limit(redis_server: RedisServer) -> None:
    async def scenario() -> None:
        async with processes(redis_server, 1, BOTH) as (one, other):
            limit = granting(requests=100)
            for _ in range(50):
                await one.request("t", "of both", limit)
            passed = await count(60, lambda: other.request("t", "of both", limit))
            assert 45 <= passed <= 50
            [requests, _, _] = await other.usage("t", "of both", limit.rate)
            assert requests[1] >= 95

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "value", [None, b"-1000000", b"no number", b"9" * 10**6], ids=["gone", "negative", "text", "long"]
)
def test_a_host_that_writes_its_counters_anew_frees_nothing_that_another_counted(
    redis_server: RedisServer, value: bytes | None
) -> None:
    async def scenario() -> None:
        async with processes(redis_server, 1, BOTH) as (honest, hostile):
            limit, subject = granting(requests=100), f"of {value and value[:9]!r}"
            assert await count(100, lambda: honest.request("t", subject, limit)) == 100
            await count(1, lambda: hostile.request("t", subject, limit))
            name = hostile.account("t", subject, time.time()).requests(limit.rate, time.time()).name
            assert hostile.redis
            own = hostile.redis.key(name)
            await hostile.redis.execute(("DEL", own) if value is None else ("SET", own, value))
            assert await count(5, lambda: honest.request("t", subject, limit)) == 0

    asyncio.run(scenario())


def test_a_host_can_write_no_key_of_another_and_read_none_but_its_counters(redis_server: RedisServer) -> None:
    async def scenario() -> None:
        async with processes(redis_server, 1, BOTH) as (one, hostile):
            assert one.redis
            assert hostile.redis
            mine = one.redis.key("exact:answer"), one.redis.key("quota:counter")
            for key in mine:
                await one.redis.execute(("SET", key, "1"))
            assert await hostile.redis.execute(("GETRANGE", mine[1], 0, 9)) == [b"1"]
            for command in (
                ("DEL", mine[1]),
                ("SET", mine[1], "0"),
                ("INCRBY", mine[1], -1),
                ("SET", mine[0], "x"),
                ("GET", mine[0]),
            ):
                with pytest.raises(RedisUnavailable):
                    await hostile.redis.execute(command)
                hostile.redis.failures = 0
            assert await one.redis.execute(*(("GET", key) for key in mine)) == [b"1", b"1"]

    asyncio.run(scenario())


def test_what_a_lease_exceeds_the_limit_by_is_given_back(redis_server: RedisServer) -> None:
    async def scenario() -> None:
        async with processes(redis_server, 2) as (first, second):
            limit = granting(minute=100)
            await first.reserve("t", "back", limit, 90)
            assert await count(1, lambda: second.reserve("t", "back", limit, 20)) == 0
            assert await count(1, lambda: second.reserve("t", "back", limit, 10)) == 1
            assert await count(1, lambda: first.reserve("t", "back", limit, 1)) == 0

    asyncio.run(scenario())


def test_a_minute_ends_with_its_last_second_and_the_next_one_counts_anew(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    minute = time.time() // 60 * 60

    async def scenario() -> None:
        async with processes(redis_server, 1) as (quotas,):
            await quotas.request("t", "edge", granting(requests=1))
            monkeypatch.setattr(time, "time", lambda: minute + 59.9)
            with pytest.raises(ApiError) as caught:
                await quotas.request("t", "edge", granting(requests=1))
            assert caught.value.headers == [(b"retry-after", b"1")]
            monkeypatch.setattr(time, "time", lambda: minute + 60)
            await quotas.request("t", "edge", granting(requests=1))

    asyncio.run(scenario())


def test_a_limit_that_the_policy_changed_applies_at_once(redis_server: RedisServer) -> None:
    async def scenario() -> None:
        async with processes(redis_server, 1) as (quotas,):
            assert await count(5, lambda: quotas.request("t", "raised", granting(requests=2))) == 2
            assert await count(5, lambda: quotas.request("t", "raised", granting(requests=4))) == 2
            assert await count(5, lambda: quotas.request("t", "lowered", granting(requests=1000))) == 5
            assert await count(5, lambda: quotas.request("t", "lowered", granting(requests=7))) == 2, (
                "although 50 were leased"
            )

    asyncio.run(scenario())


def test_usage_beyond_the_reservation_counts_in_minute_and_day_and_never_below_zero() -> None:
    async def scenario() -> None:
        quotas = Quotas(None, Metrics())
        reserved = await quotas.reserve("t", "s", granting(), 10)
        assert [window.used for window in reserved.windows] == [10, 10]
        reserved.settle(25)
        assert ([window.used for window in reserved.windows], reserved.tokens) == ([25, 25], 25)
        reserved.settle(5)
        assert [window.used for window in reserved.windows] == [5, 5]
        reserved.windows[0].used = 0
        reserved.settle(0)
        assert [window.used for window in reserved.windows] == [0, 0]

    asyncio.run(scenario())


def test_without_redis_each_process_allows_one_request_at_least() -> None:
    async def scenario() -> None:
        away = Quotas(None, Metrics())
        assert await count(5, lambda: away.request("t", "little", granting(requests=3))) == 1

    asyncio.run(scenario())


def test_accounts_are_kept_while_a_period_of_theirs_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        quotas = Quotas(None, Metrics())
        await quotas.request("t", "minute", granting())
        await quotas.reserve("t", "day", granting(), 10)
        (await quotas.reserve("t", "unused", granting(), 10)).settle(0)
        now = time.time()
        for later, kept in (60, 4), (61, 2), (121, 2):
            monkeypatch.setattr(time, "time", lambda: now + later)  # noqa: B023 - read before the next round
            await quotas.request("t", "another", granting())
            assert len(quotas.accounts) == kept, later

    asyncio.run(scenario())


def test_accounts_are_dropped_when_their_periods_end(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        quotas = Quotas(None, Metrics())
        for number in range(100):
            await quotas.request("t", f"user{number}", granting(requests=40))
        later = time.time() + 90
        monkeypatch.setattr(time, "time", lambda: later)
        await quotas.request("t", "one more", granting(requests=40))
        assert len(quotas.accounts) == 1

    asyncio.run(scenario())


def test_an_answer_reserves_what_is_probable_and_not_the_most_that_it_may_use(
    redis_server: RedisServer,
) -> None:
    """Ten requests of 100 + 4096 tokens that use 50: the class holds what they use, and a seventh of their most."""

    async def scenario() -> None:
        async with processes(redis_server, 1) as (quotas,):
            limit = granting(minute=6000)
            at_once = [await quotas.reserve("t", "short", limit, 100, 4096) for _ in range(10)]
            for reserved in at_once:
                reserved.settle(150, 50)
            minute = quotas.account("t", "short", time.time()).tokens(limit.rate, time.time())[0]
            assert minute.used == 10 * 150

    asyncio.run(scenario())


def minutes(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The middle of one minute after another, by the clock that quotas read. None is of two days."""
    first = (time.time() // 86400 + 1) * 86400 + 30  # Redis drops at once what has expired
    for number in range(1, 1000):
        now = first + 60 * number
        monkeypatch.setattr(time, "time", lambda now=now: now)
        yield number


@pytest.mark.parametrize("server", [True, False], ids=["Redis", "alone"])
def test_who_always_uses_the_most_exceeds_a_minute_by_the_stated_bound_and_the_average_never(
    server: bool, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All requests of a minute arrive at once, and each answer is as long as allowed."""
    requests, tokens, longest = 20, 10_000, 4096
    share = 1.0 if server else AWAY_SHARE

    async def scenario() -> None:
        async with processes(redis_server, 1) as (shared,):
            quotas, limit, used = (
                shared if server else Quotas(None, Metrics()),
                granting(requests, tokens),
                [],
            )
            for _ in zip(range(60), minutes(monkeypatch), strict=False):
                begun = []
                for _ in range(requests):
                    with suppress(ApiError):
                        await quotas.request("t", "greedy", limit)
                        begun.append(await quotas.reserve("t", "greedy", limit, 10, longest))
                for reserved in begun:
                    reserved.settle(10 + longest, longest)
                used.append(len(begun) * (10 + longest))
            assert used[0] > tokens, "the first minute knows nothing of its answers"
            assert max(used) <= tokens + requests * (longest - ANSWER_TOKENS)
            assert sum(used) <= tokens * len(used) + requests * (longest - ANSWER_TOKENS)
            assert sum(used[10:]) >= share * tokens * len(used[10:]) * 0.5, "it is not shut out either"

    asyncio.run(scenario())


def test_an_answer_that_ends_in_a_later_minute_is_charged_there(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        quotas, limit, clock = Quotas(None, Metrics()), granting(minute=1000), minutes(monkeypatch)
        next(clock)
        longer = await quotas.reserve("t", "s", limit, 100)
        shorter = await quotas.reserve("t", "s", limit, 100)
        next(clock)
        longer.settle(250)
        shorter.settle(10)
        minute, day = quotas.account("t", "s", time.time()).tokens(limit.rate, time.time())
        assert (minute.used, day.used) == (150, 260)

    asyncio.run(scenario())


def test_a_debt_is_paid_by_the_next_minutes_also_by_those_without_requests(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with processes(redis_server, 2) as (first, second):
            limit, clock = granting(minute=1000), minutes(monkeypatch)
            next(clock)
            (await first.reserve("t", "debtor", limit, 100)).settle(3500)
            next(clock)
            assert await count(1, lambda: first.reserve("t", "debtor", limit, 100)) == 0
            assert await count(1, lambda: second.reserve("t", "debtor", limit, 100)) == 0, (
                "all processes know it then"
            )
            for _ in range(3):  # nothing is asked in the first two
                next(clock)
            assert await count(1, lambda: first.reserve("t", "debtor", limit, 601)) == 0
            assert await count(1, lambda: first.reserve("t", "debtor", limit, 600)) == 1

    asyncio.run(scenario())


def test_tokens_that_a_killed_process_had_reserved_are_free_when_their_period_ends(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with processes(redis_server, 2) as (killed, other):
            limit, clock = granting(minute=1000, day=10_000), minutes(monkeypatch)
            next(clock)
            await killed.reserve("t", "left", limit, 990)
            assert await count(1, lambda: other.reserve("t", "left", limit, 100)) == 0
            next(clock)
            assert await count(1, lambda: other.reserve("t", "left", limit, 1000)) == 1
            with redis_server.client() as redis:
                names = redis.keys(f"llm:local:quota:{hashlib.sha256(b't\0left').hexdigest()[:32]}:*")
                assert len(names) == 3
                assert all(redis.expiretime(name) > 0 for name in names), "the day's ends, too"

    asyncio.run(scenario())


def test_without_redis_the_first_request_may_use_the_whole_limit() -> None:
    async def scenario() -> None:
        away = Quotas(None, Metrics())
        assert await count(3, lambda: away.reserve("t", "s", granting(minute=1000), 900)) == 1
        assert await count(1, lambda: away.reserve("t", "more", granting(minute=1000), 1001)) == 0

    asyncio.run(scenario())
