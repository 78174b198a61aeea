"""Quotas: what one subject may use per minute and day, by its rate class. They are counted only here.

Counters are in Redis, per calendar minute and UTC day: each host that shares it writes its own counters and reads those of the
others, so a host can only free what it counted itself. A process leases part of the remaining quota and spends it locally, so
that most requests do not need Redis; a lease that is unspent at the end of the period is lost to the others (at most 1/LEASES of
the limit per process). Without Redis each process counts on its own, and allows AWAY_SHARE of the limit, or one request within
the whole limit.

Before an answer, its prompt and probable length are reserved; afterwards its actual usage is charged. Answers that turn out
longer than reserved can use more than a minute allows. The excess is bounded by the number of requests that the class allows. It
is a debt, which the following periods pay first; the average never exceeds the class.
"""

import asyncio
import hashlib
import time
from dataclasses import dataclass, field
from itertools import batched

from llmserve.access.decision import Decision, Rate
from llmserve.api.errors import ApiError
from llmserve.metrics import Metrics
from llmserve.redis_client import Command, RedisClient, RedisUnavailable

ANSWER_TOKENS = 256  # reserved at least for an answer that may be as long
LEARNING = 1 / 8  # weight of the last answer in the mean length of a subject's answers
LEASES = 20
AWAY_SHARE = 0.25
MINUTE, DAY = 60, 86400
MOST_DIGITS = 18


@dataclass(slots=True)
class Window:
    """One counter of one subject in one period, as seen by this process."""

    name: str  # of the counter of each host in Redis
    kind: str  # for messages
    ends: float  # seconds since the epoch
    limit: int
    used: int = 0
    leased: int = 0
    alone: int = 0  # allowed without Redis
    # One lease at a time serves all waiting requests.
    fetching: asyncio.Lock = field(default_factory=asyncio.Lock)

    def debt(self) -> int:
        """Usage beyond the limit, by answers that were longer than reserved. Requests that wait for a lease do not count."""
        return 0 if self.fetching.locked() else max(0, self.used - max(self.leased, self.alone))


class Account:
    """The three windows of one subject; each is replaced when its period ends. `answer`: mean tokens of the subject's
    answers.
    """

    def __init__(self, owner: str) -> None:
        """`owner`: the subject's name in Redis keys."""
        self.owner = owner
        self.windows: dict[str, Window] = {}
        self.answer = float(ANSWER_TOKENS)

    def window(self, kind: str, limit: int, seconds: int, now: float) -> Window:
        """The current window, which starts with the debt of the previous one; a limit changed by the policy applies at once."""
        window = self.windows.get(kind)
        if window is None or now >= window.ends:
            period = int(now // seconds)
            # A period without requests pays a whole limit.
            debt = max(0, window.debt() - int((now - window.ends) // seconds) * limit) if window else 0
            name = f"quota:{self.owner}:{kind}:{period}"
            ends = (period + 1) * seconds
            window = self.windows[kind] = Window(name, kind.replace("_", " "), ends, limit, used=debt)
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

    account: Account
    rate: Rate
    windows: tuple[Window, Window]
    tokens: int

    def settle(self, tokens: int, answer: int = 0) -> None:
        """The request used `tokens`: return the surplus to its windows, or charge the excess to the current ones.

        `answer`: tokens of each of its answers, 0 if there is none to learn from.
        """
        excess = tokens - self.tokens
        if excess > 0:
            self.windows = self.account.tokens(self.rate, time.time())
        for window in self.windows:
            window.used = max(0, window.used + excess)
        self.tokens = tokens
        if answer:
            self.account.answer += (answer - self.account.answer) * LEARNING


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

    async def reserve(
        self, tenant: str, subject: str, decision: Decision, prompt: int, longest: int = 0, answers: int = 1
    ) -> Reservation:
        """Set aside what a request probably uses, in the windows of minute and day; raises ApiError 429.

        `prompt`: its tokens. `longest`: most tokens of each of its `answers`.
        """
        now = time.time()
        account = self.account(tenant, subject, now)
        minute, day = account.tokens(decision.rate, now)
        tokens = prompt + answers * min(longest, max(ANSWER_TOKENS, round(account.answer)))
        await self.take(day, tokens, decision.rate, now)
        try:
            await self.take(minute, tokens, decision.rate, now)
        except ApiError:
            day.used -= tokens
            raise
        return Reservation(account, decision.rate, (minute, day), tokens)

    async def usage(self, tenant: str, subject: str, rate: Rate) -> list[tuple[Window, int]]:
        """The windows of requests per minute, tokens per minute and tokens per day, each with how much of it is used.

        Leases of other processes count as used, since this one cannot tell what they have left. Raises RedisUnavailable.
        """
        if self.redis is None:
            raise RedisUnavailable
        now = time.time()
        account = self.account(tenant, subject, now)
        windows = (account.requests(rate, now), *account.tokens(rate, now))
        hosts = [self.redis.host, *self.redis.others]
        read = [digits(self.redis.key(window.name, host)) for window in windows for host in hosts]
        counts = batched(await self.redis.execute(*read), len(hosts), strict=True)
        totals = [sum(map(counted, each)) for each in counts]
        return [
            (window, max(0, total - window.leased + window.used))
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
            allowed = min(window.limit, max(count, int(window.limit * AWAY_SHARE)))
            enough = window.used <= allowed
            window.alone = max(window.alone, min(window.used, allowed))
        if enough:
            return
        window.used -= count
        self.metrics.quota_refused.labels(window.kind).inc()
        if count > window.limit:  # no wait helps
            raise ApiError(
                429,
                "rate_limited",
                f"your limit is {window.limit} {window.kind} (rate class {rate.name}), and this request alone needs {count}: "
                "request less, or ask for a role with a larger rate class",
            )
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
        amount = max(window.used - window.leased, window.limit // LEASES)
        expires = int(window.ends) + MINUTE
        own = self.redis.key(window.name)
        # Counted before the others are read: of two hosts that lease at once, one sees both.
        total, _, *others = await self.redis.execute(
            ("INCRBY", own, amount),
            ("EXPIREAT", own, expires),
            *(digits(self.redis.key(window.name, host)) for host in self.redis.others),
        )
        over = min(amount, max(0, int(total) + sum(map(counted, others)) - window.limit))
        window.leased += amount - over
        if over:
            await self.redis.execute(("INCRBY", own, -over))
        return over == 0


def digits(key: str) -> Command:
    """Reads at most the length of a number from a counter, since another host wrote it."""
    return "GETRANGE", key, 0, MOST_DIGITS - 1


def counted(count: bytes) -> int:
    """A host's counter; 0 if it is not a number, or negative, which would free what others counted."""
    return int(count) if count.isdigit() else 0
