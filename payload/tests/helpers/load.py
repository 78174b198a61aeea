"""Load on a gateway, and what remains afterwards."""

import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Event

import httpx2 as httpx
from service import Service


@dataclass
class Load:
    """Results of the requests of several threads; `outcomes` counts by status and code."""

    outcomes: Counter[str] = field(default_factory=Counter)
    refused_us: list[int] = field(default_factory=list)  # overhead of refusals
    stop: Event = field(default_factory=Event)

    def answered(self, times: int) -> bool:
        return self.outcomes["200"] >= times


@contextmanager
def load(service: Service, threads: int, words: int) -> Iterator[Load]:
    """Send requests continuously within the block. Each answer has `words` words."""
    made = Load()

    def ask() -> None:
        with service.client() as client:
            while not made.stop.is_set():
                try:
                    answer = client.get("/generate", params={"prompt": "w " * words})
                except httpx.TransportError as error:
                    made.outcomes[type(error).__name__] += 1
                    time.sleep(0.05)
                    continue
                code = "" if answer.status_code == 200 else answer.json()["error"]["code"]
                made.outcomes[f"{answer.status_code} {code}".strip()] += 1
                if code:
                    assert answer.status_code != 503 or int(answer.headers["retry-after"]) >= 1
                    made.refused_us.append(int(answer.headers["x-llm-overhead-us"]))
                    time.sleep(0.02)

    with ThreadPoolExecutor(threads) as pool:
        asking = [pool.submit(ask) for _ in range(threads)]
        try:
            yield made
        finally:
            made.stop.set()
        for each in asking:
            each.result()


def left_over(service: Service) -> dict[str, float]:
    """Gauges that must return to zero when idle; `tasks` returns to those of the gateway itself."""
    scrape = service.metrics()
    with service.client("") as client:
        in_flight = client.get("/drainz").json()["in_flight"]
    gauges = ("llm_requests_running", "llm_tokens_running", "llm_requests_waiting", "llm_tokens_waiting")
    return {
        "tasks": scrape["llm_event_loop_tasks"],
        "in_flight": in_flight,
        **{name: scrape[f'{name}{{model="echo"}}'] for name in gauges},
    }
