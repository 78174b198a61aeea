"""How a process is told to stop."""

import asyncio
import signal


class StopSignals:
    """SIGTERM or SIGINT asks to stop; the second one means now."""

    def __init__(self) -> None:
        """Listen for the signals from here on."""
        self.requested = asyncio.Event()
        self.now = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self.signal)

    def signal(self) -> None:
        """One came."""
        (self.now if self.requested.is_set() else self.requested).set()
