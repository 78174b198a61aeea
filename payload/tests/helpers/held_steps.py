"""In a training process: once HELD's number of steps is reported, wait at the next one until SIGTERM or its file is gone."""

import os
import signal
import time
from typing import Any

asked_to_stop: list[int] = []
read_clock, handle = time.process_time, signal.signal


def steps_in(path: str) -> int:
    try:
        with open(path) as lines:  # noqa: PTH123 - in a process that starts
            return sum('"lr"' in line for line in lines)
    except FileNotFoundError:
        return 0


def wait() -> float:
    after, held, *metrics = os.environ["HELD"].split(":")
    while sum(map(steps_in, metrics)) >= int(after) and os.path.exists(held) and not asked_to_stop:  # noqa: PTH110
        time.sleep(0.01)
    return read_clock()


def noting(number: int, handler: Any) -> Any:
    if number != signal.SIGTERM or not callable(handler):
        return handle(number, handler)

    def noted(*given: Any) -> Any:
        asked_to_stop.append(number)
        return handler(*given)

    return handle(number, noted)


# The loop looks at this clock at each step.
time.process_time, signal.signal = wait, noting  # type: ignore[assignment]
