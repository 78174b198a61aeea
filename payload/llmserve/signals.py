"""SIGTERM and SIGINT as events."""

import asyncio
import signal


class StopSignals:
    """`requested` is set by the first SIGTERM or SIGINT, `now` by the second."""

    def __init__(self) -> None:
        """Installs the handlers in the running event loop."""
        self.requested = asyncio.Event()
        self.now = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self.signal)

    def signal(self) -> None:
        (self.now if self.requested.is_set() else self.requested).set()
