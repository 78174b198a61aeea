"""Quotas: what one subject may use in a minute and a day, by its rate class. The only place that counts them.

Counters of all processes and instances stand in Redis, in calendar minutes and UTC days. A process leases a share
of what is left and spends it by itself, so that most requests ask Redis nothing; what it has leased and not spent
when the period ends is lost to the others (at most 1/LEASES of the limit a process). Without Redis each process
counts for itself, and allows AWAY_SHARE of the limit.
"""

import asyncio
import hashlib
import time
from dataclasses import dataclass, field

from llmserve.access.decision import Decision, Rate
from llmserve.api.errors import ApiError
from llmserve.metrics import Metrics
from llmserve.redis_client import RedisClient, RedisUnavailable

LEASES = 20
AWAY_SHARE = 0.25
MINUTE, DAY = 60, 86400


@dataclass(slots=True)
class Window:
    """One counter of one subject in one period, as this process sees it."""

    name: str  # in Redis
    kind: str  # for people
    ends: float  # seconds since the epoch
    limit: int
    leased: int = 0
    used: int = 0
    fetching: asyncio.Lock = field(default_factory=asyncio.Lock)  # one lease at a time serves all who wait


class Account:
    """The three windows of one subject; each is replaced when its period is over."""

    def __init__(self, owner: str) -> None:
        """`owner` is the subject's name in Redis' keys."""
        self.owner = owner
        self.windows: dict[str, Window] = {}

    def window(self, kind: str, limit: int, seconds: int, now: float) -> Window:
        """The current one; a limit that the policy has changed holds at once."""
        window = self.windows.get(kind)
        if window is None or now >= window.ends:
            period = int(now // seconds)
            name = f"llm:quota:{self.owner}:{kind}:{period}"
            window = self.windows[kind] = Window(name, kind.replace("_", " "), (period + 1) * seconds, limit)
        window.limit = limit
        return window

    def requests(self, rate: Rate, now: float) -> Window:
        """Requests a minute."""
        return self.window("requests_a_minute", rate.requests_per_minute, MINUTE, now)

    def tokens(self, rate: Rate, now: float) -> tuple[Window, Window]:
        """Tokens a minute, tokens a day."""
        return (
            self.window("tokens_a_minute", rate.tokens_per_minute, MINUTE, now),
            self.window("tokens_a_day", rate.tokens_per_day, DAY, now),
        )


@dataclass(slots=True)
class Reservation:
    """Tokens set aside for a request until it is known how many it took."""

    windows: tuple[Window, Window]
    tokens: int

    def settle(self, tokens: int) -> None:
        """It took `tokens`; what was set aside above that is free again, what is above counts."""
        for window in self.windows:
            window.used = max(0, window.used + tokens - self.tokens)
        self.tokens = tokens


class Quotas:
    """All accounts of one process."""

    def __init__(self, redis: RedisClient | None, metrics: Metrics) -> None:
        """Nothing is asked yet."""
        self.redis = redis
        self.metrics = metrics
        self.accounts: dict[tuple[str, str], Account] = {}
        self.swept = time.time()

    def account(self, tenant: str, subject: str, now: float) -> Account:
        """A subject's; those whose periods are all over are forgotten once a minute."""
        if now - self.swept > MINUTE:
            self.swept = now
            self.accounts = {
                key: account
                for key, account in self.accounts.items()
                if any(now < window.ends and window.used for window in account.windows.values())
            }
        account = self.accounts.get((tenant, subject))
        if account is None:
            owner = hashlib.sha256(f"{tenant}\0{subject}".encode()).hexdigest()[:32]
            account = self.accounts[tenant, subject] = Account(owner)
        return account

    async def request(self, tenant: str, subject: str, decision: Decision) -> None:
        """Count a request; raises ApiError 429."""
        now = time.time()
        requests = self.account(tenant, subject, now).requests(decision.rate, now)
        await self.take(requests, 1, decision.rate, now)

    async def reserve(self, tenant: str, subject: str, decision: Decision, tokens: int) -> Reservation:
        """Set aside `tokens`, of the minute and of the day; raises ApiError 429."""
        now = time.time()
        minute, day = self.account(tenant, subject, now).tokens(decision.rate, now)
        await self.take(day, tokens, decision.rate, now)
        try:
            await self.take(minute, tokens, decision.rate, now)
        except ApiError:
            day.used -= tokens
            raise
        return Reservation((minute, day), tokens)

    async def take(self, window: Window, count: int, rate: Rate, now: float) -> None:
        """Use `count` of a window; raises ApiError 429 where that is more than is left."""
        window.used += count  # before anything is awaited, so that no two requests use the same
        if window.used <= window.leased:
            return
        try:
            async with window.fetching:
                while window.used > window.leased:  # more requests may come while a lease is fetched
                    if not await self.lease(window):
                        break
                enough = window.used <= window.leased
        except RedisUnavailable:
            enough = window.used <= max(1, int(window.limit * AWAY_SHARE))
        if enough:
            return
        window.used -= count
        self.metrics.quota_refused.labels(window.kind).inc()
        wait = max(1, int(window.ends - now) + 1)
        raise ApiError(
            429,
            "rate_limited",
            f"{window.limit} {window.kind} is your limit (rate class {rate.name}) and this asks for {count} more: "
            f"ask again in {wait} s, or for less",
            headers=[(b"retry-after", str(wait).encode())],
        )

    async def lease(self, window: Window) -> bool:
        """Get what is lacking, and some more for later, from the counter that all share; whether it had so much.

        Raises RedisAway.
        """
        if self.redis is None:
            raise RedisUnavailable
        asked = max(window.used - window.leased, window.limit // LEASES)
        forgotten = int(window.ends) + MINUTE
        total, _ = await self.redis.execute(
            ("INCRBY", window.name, asked), ("EXPIREAT", window.name, forgotten)
        )
        over = min(asked, max(0, int(total) - window.limit))
        window.leased += asked - over
        if over:
            await self.redis.execute(("INCRBY", window.name, -over))
        return over == 0
