"""Quotas: what one subject may use per minute and day, by its rate class. They are counted only here.

Counters of all processes and hosts are in Redis, per calendar minute and UTC day. A process leases part of the
remaining quota and spends it locally, so that most requests do not need Redis; a lease that is unspent at the end of
the period is lost to the others (at most 1/LEASES of the limit per process). Without Redis each process counts on its
own, and allows AWAY_SHARE of the limit.
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
    """One counter of one subject in one period, as seen by this process."""

    name: str  # key in Redis
    kind: str  # for messages
    ends: float  # seconds since the epoch
    limit: int
    leased: int = 0
    used: int = 0
    # One lease at a time serves all waiting requests.
    fetching: asyncio.Lock = field(default_factory=asyncio.Lock)


class Account:
    """The three windows of one subject; each is replaced when its period ends."""

    def __init__(self, owner: str) -> None:
        """`owner`: the subject's name in Redis keys."""
        self.owner = owner
        self.windows: dict[str, Window] = {}

    def window(self, kind: str, limit: int, seconds: int, now: float) -> Window:
        """The current window; a limit that the policy has changed applies at once."""
        window = self.windows.get(kind)
        if window is None or now >= window.ends:
            period = int(now // seconds)
            name = f"llm:quota:{self.owner}:{kind}:{period}"
            window = self.windows[kind] = Window(name, kind.replace("_", " "), (period + 1) * seconds, limit)
        window.limit, window.leased = limit, min(window.leased, limit)
        return window

    def requests(self, rate: Rate, now: float) -> Window:
        """The window of requests per minute."""
        return self.window("requests_a_minute", rate.requests_per_minute, MINUTE, now)

    def tokens(self, rate: Rate, now: float) -> tuple[Window, Window]:
        """The windows of tokens per minute and per day."""
        return (
            self.window("tokens_a_minute", rate.tokens_per_minute, MINUTE, now),
            self.window("tokens_a_day", rate.tokens_per_day, DAY, now),
        )


@dataclass(slots=True)
class Reservation:
    """Tokens set aside for a request until its usage is known."""

    windows: tuple[Window, Window]
    tokens: int

    def settle(self, tokens: int) -> None:
        """The request used `tokens`: return the surplus, or charge the excess."""
        for window in self.windows:
            window.used = max(0, window.used + tokens - self.tokens)
        self.tokens = tokens


class Quotas:
    """The accounts of one process."""

    def __init__(self, redis: RedisClient | None, metrics: Metrics) -> None:
        self.redis = redis
        self.metrics = metrics
        self.accounts: dict[tuple[str, str], Account] = {}
        self.swept = time.time()

    def account(self, tenant: str, subject: str, now: float) -> Account:
        """The account of a subject; once a minute, accounts whose periods have all ended are dropped."""
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
        """Set aside `tokens` in the windows of minute and day; raises ApiError 429."""
        now = time.time()
        minute, day = self.account(tenant, subject, now).tokens(decision.rate, now)
        await self.take(day, tokens, decision.rate, now)
        try:
            await self.take(minute, tokens, decision.rate, now)
        except ApiError:
            day.used -= tokens
            raise
        return Reservation((minute, day), tokens)

    async def usage(self, tenant: str, subject: str, rate: Rate) -> list[tuple[Window, int]]:
        """The windows of requests per minute, tokens per minute and tokens per day, each with how much of it is used.

        Leases of other processes count as used, since this one cannot tell what they have left. Raises RedisUnavailable.
        """
        if self.redis is None:
            raise RedisUnavailable
        now = time.time()
        account = self.account(tenant, subject, now)
        windows = (account.requests(rate, now), *account.tokens(rate, now))
        totals = await self.redis.execute(*(("GET", window.name) for window in windows))
        return [
            (window, max(0, int(total or 0) - window.leased + window.used))
            for window, total in zip(windows, totals, strict=True)
        ]

    async def take(self, window: Window, count: int, rate: Rate, now: float) -> None:
        """Use `count` of a window; raises ApiError 429 if less remains."""
        window.used += count  # before the first await, so that no two requests use the same quota
        if window.used <= window.leased:
            return
        try:
            async with window.fetching:
                while window.used > window.leased:  # more requests may arrive while a lease is fetched
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
            f"your limit is {window.limit} {window.kind} (rate class {rate.name}), and this request needs {count} more: "
            f"retry in {wait} s, or request less",
            headers=[(b"retry-after", str(wait).encode())],
        )

    async def lease(self, window: Window) -> bool:
        """Lease what is missing, and some more for later, from the shared counter; returns whether that much
        remained.

        Raises RedisUnavailable.
        """
        if self.redis is None:
            raise RedisUnavailable
        wanted = max(window.used - window.leased, window.limit // LEASES)
        expires = int(window.ends) + MINUTE
        total, _ = await self.redis.execute(
            ("INCRBY", window.name, wanted), ("EXPIREAT", window.name, expires)
        )
        over = min(wanted, max(0, int(total) - window.limit))
        window.leased += wanted - over
        if over:
            await self.redis.execute(("INCRBY", window.name, -over))
        return over == 0
