"""Who may run now: as many as the engine has slots; a bounded number waits; the rest is told to come back."""

import asyncio
from collections import deque

from llmserve.errors import unavailable


class Admission:
    """Slots of one engine, first come, first served."""

    def __init__(self, waiting_limit: int) -> None:
        """`slots` is set when the engine says how many it has."""
        self.slots = 0
        self.running = 0
        self.waiting_limit = waiting_limit
        self.waiting: deque[asyncio.Future[None]] = deque()

    async def enter(self, seconds: float) -> None:
        """Take a slot, waiting up to `seconds`; raises ApiError 503. Each enter needs one leave()."""
        if self.running < self.slots and not self.waiting:
            self.running += 1
            return
        if len(self.waiting) >= self.waiting_limit:
            raise unavailable(
                "overloaded",
                f"{self.running} requests run and {len(self.waiting)} wait already, which is the limit: "
                "ask again later",
                retry_after=2,
            )
        turn = asyncio.get_running_loop().create_future()
        self.waiting.append(turn)
        try:
            async with asyncio.timeout(seconds):
                await turn
        except BaseException as error:
            if turn in self.waiting:
                self.waiting.remove(turn)
            elif turn.done() and not turn.cancelled():
                self.leave()  # the slot came in the very moment in which we gave up
            if isinstance(error, TimeoutError):
                raise unavailable(
                    "queue_timeout",
                    f"no slot became free within {seconds:g} s: ask again later",
                    retry_after=5,
                ) from None
            raise

    def leave(self) -> None:
        """Give the slot to the next who waits."""
        self.running -= 1
        while self.waiting and self.running < self.slots:
            turn = self.waiting.popleft()
            if not turn.done():
                self.running += 1
                turn.set_result(None)
