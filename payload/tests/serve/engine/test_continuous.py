"""The continuous driver in this process, with a test for each pitfall of transformers' manager."""

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import make_model

from llmcore.config import ConfigError
from llmserve.api.errors import ApiError
from llmserve.engine.server import serve
from llmserve.protocol import Failed, Generate, Hello, decode, encode
from llmserve.settings import ContinuousModel

torch = pytest.importorskip("torch", reason="Debian's python3-torch is not installed")

from llmserve.engine.continuous import Batch, ContinuousDriver  # noqa: E402 - needs torch


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    make_model(directory)
    return directory


def settings(model: Path, **change: Any) -> ContinuousModel:
    """A model in an engine's configuration."""
    common = {"driver": "continuous", "path": model, "manifest": model, "threads": 1, "dtype": "float32"}
    return ContinuousModel(**{**common, "slots": 8, "context": 1024, "cache_tokens": 4096, **change})


def endless(driver: ContinuousDriver) -> ContinuousDriver:
    """Answers end only at their last token: a random model may generate anything, including the end token."""
    driver.language.ends = [-1]
    return driver


@pytest.fixture(scope="module")
def shared(model: Path) -> Iterator[ContinuousDriver]:
    """A driver for tests that leave it intact."""
    driver = endless(ContinuousDriver(settings(model), "r"))
    yield driver
    driver.stop()


@pytest.fixture
def driver(model: Path) -> Iterator[ContinuousDriver]:
    """A driver that the test may break."""
    driver = endless(ContinuousDriver(settings(model), "r"))
    yield driver
    driver.stop()


def request(tokens: int = 900, **change: Any) -> Generate:
    """A request that runs for a while unless it is stopped."""
    return Generate(0, True, tokens, **{"prompt": "what is the capital", "temperature": 0.0, **change})


def nothing(_: str) -> None:
    """Ignore a piece."""


def left_behind(batch: Batch) -> tuple[int, ...]:
    """What a manager still holds of requests: our handlers and its own, undelivered outputs, active, waiting."""
    manager = batch.manager
    router, scheduler = manager.output_router, manager.batch_processor.scheduler
    return (
        len(batch.waiting),
        len(router.result_handlers),
        router.output_queue.qsize(),
        len(scheduler.active_requests),
        len(scheduler.waiting_requests),
    )


async def idle(batch: Batch, seconds: float = 5.0) -> None:
    """Wait until it holds nothing."""
    end = time.monotonic() + seconds
    while any(left_behind(batch)):
        assert time.monotonic() < end, left_behind(batch)
        await asyncio.sleep(0.01)


def test_an_answer_that_completes_before_add_request_returns_is_not_lost(
    shared: ContinuousDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = shared.batches[0].manager
    add_request = manager.add_request

    def slow(*arguments: Any, **named: Any) -> Any:
        name = add_request(*arguments, **named)
        time.sleep(0.3)  # the model's thread completes it meanwhile
        return name

    monkeypatch.setattr(manager, "add_request", slow)
    finish = asyncio.run(asyncio.wait_for(shared.generate(request(tokens=2), nothing), 10))
    assert finish.completion_tokens == 2


def test_a_thousand_cancelled_requests_leave_nothing_behind(shared: ContinuousDriver) -> None:
    async def cancelled(number: int) -> None:
        task = asyncio.create_task(shared.generate(request(temperature=number % 2 * 1.0), nothing))
        await asyncio.sleep(number % 7 * 0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def scenario() -> None:
        for start in range(0, 1000, 50):
            await asyncio.gather(*(cancelled(number) for number in range(start, start + 50)))
        for temperature, batch in zip((0.0, 1.0), shared.batches, strict=True):
            await shared.generate(request(tokens=1, temperature=temperature), nothing)
            await idle(batch)

    asyncio.run(scenario())


def test_a_cancelled_request_leaves_the_batch_after_the_current_step(
    shared: ContinuousDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        batch = shared.batches[0]
        tokens = 0

        def count(_: str) -> None:
            nonlocal tokens
            tokens += 1

        task = asyncio.create_task(shared.generate(request(), count))
        while tokens < 5:
            await asyncio.sleep(0.001)
        cancel, steps = batch.cancel, list[int]()

        def noted(name: str) -> None:
            cancel(name)
            steps.append(batch.manager.current_batch)

        monkeypatch.setattr(batch, "cancel", noted)
        task.cancel()
        await asyncio.wait([task])
        while batch.manager.batch_processor.scheduler.active_requests:
            await asyncio.sleep(0.001)
        # The current step, and at most one more that had begun.
        assert batch.manager.current_batch - steps[0] <= 2

    asyncio.run(scenario())


def test_requests_share_steps(shared: ContinuousDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    model, all_are_there = shared.language.model, threading.Event()
    forward = model.forward

    def held(*arguments: Any, **named: Any) -> Any:
        all_are_there.wait()
        return forward(*arguments, **named)

    monkeypatch.setattr(model, "forward", held)

    async def scenario() -> None:
        manager = shared.batches[0].manager
        before = manager.current_batch
        answers = asyncio.gather(*(shared.generate(request(tokens=40), nothing) for _ in range(8)))
        while len(shared.batches[0].waiting) < 8:
            await asyncio.sleep(0.01)
        all_are_there.set()
        finishes = await answers
        tokens = sum(finish.completion_tokens for finish in finishes)
        assert manager.current_batch - before < tokens / 3

    asyncio.run(scenario())


def test_each_request_has_a_temperature_and_top_p_of_its_own(shared: ContinuousDriver) -> None:
    async def text(**how: float) -> str:
        pieces: list[str] = []
        await shared.generate(request(tokens=24, **how), pieces.append)
        return "".join(pieces)

    async def scenario() -> None:
        narrow, hot, again, greedy = await asyncio.gather(
            text(temperature=1.0, top_p=1e-6), text(temperature=2.0), text(temperature=2.0), text()
        )
        assert narrow == greedy
        assert len({hot, again, greedy}) == 3

    asyncio.run(scenario())


def test_a_manager_that_accepts_no_requests_is_an_immediate_503(driver: ContinuousDriver) -> None:
    driver.batches[0].stop()
    with pytest.raises(ApiError) as refused:
        asyncio.run(asyncio.wait_for(driver.generate(request(), nothing), 5))
    assert (refused.value.status, refused.value.code) == (503, "engine_unavailable")
    assert not driver.batches[0].waiting


def test_a_failed_step_ends_all_answers_and_breaks_the_driver(
    driver: ContinuousDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        broken = asyncio.create_task(driver.broken())
        answers = [asyncio.create_task(driver.generate(request(), nothing)) for _ in range(3)]
        await asyncio.sleep(0.2)
        assert not broken.done()

        def fail(*_: Any, **__: Any) -> None:
            raise MemoryError("no room")

        monkeypatch.setattr(driver.language.model, "forward", fail)
        results = await asyncio.wait_for(asyncio.gather(*answers, return_exceptions=True), 10)
        assert [type(result) for result in results] == [RuntimeError] * 3
        assert "MemoryError" in await asyncio.wait_for(broken, 10)
        with pytest.raises(ApiError) as refused:
            await driver.generate(request(), nothing)
        assert refused.value.status == 503

    asyncio.run(scenario())


def test_an_engine_with_a_broken_driver_exits_to_be_restarted(
    driver: ContinuousDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    async def scenario() -> int:
        path = tmp_path / "engine.sock"
        engine = asyncio.create_task(serve("tiny", driver, path, 0o600, 60.0, 0.0))
        while not path.exists():
            await asyncio.sleep(0.01)
        reader, writer = await asyncio.open_unix_connection(str(path))
        assert isinstance(decode(await reader.readline()), Hello)
        monkeypatch.setattr(driver.language.model, "forward", fail)
        writer.write(encode(request()))
        refused = decode(await reader.readline())
        assert isinstance(refused, Failed)
        assert (refused.status, refused.code) == (503, "engine_failed")
        code = await asyncio.wait_for(engine, 20)
        assert not path.exists()
        writer.close()
        return code

    assert asyncio.run(scenario()) == 1


def test_stopping_waits_for_short_answers_and_cuts_long_ones(
    driver: ContinuousDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmserve.engine.continuous.FLUSH_SECONDS", 8.0)
    model = driver.language.model
    forward = model.forward
    both_wait, short_is_answered = threading.Event(), threading.Event()

    def slow(*arguments: Any, **named: Any) -> Any:
        both_wait.wait(20)
        if short_is_answered.is_set():
            time.sleep(0.5)
        return forward(*arguments, **named)

    monkeypatch.setattr(model, "forward", slow)

    async def scenario() -> None:
        short = asyncio.create_task(driver.generate(request(tokens=4), nothing))
        long = asyncio.create_task(driver.generate(request(tokens=900), nothing))
        short.add_done_callback(lambda _: short_is_answered.set())
        while len(driver.batches[0].waiting) < 2:
            await asyncio.sleep(0.01)
        both_wait.set()
        before = time.monotonic()
        await driver.close()
        assert time.monotonic() - before < 20, "900 steps take minutes"
        assert (await short).completion_tokens == 4
        with pytest.raises(RuntimeError):
            await asyncio.wait_for(long, 5)

    asyncio.run(scenario())
    for batch in driver.batches:
        batch.manager.join(time.perf_counter(), timeout=20)  # on a machine too busy for HARD_SECONDS
        assert not batch.manager.is_running()


def test_the_size_of_the_cache_follows_the_configuration_and_not_the_host(shared: ContinuousDriver) -> None:
    config = shared.language.model.config
    pages = 4096 // 32
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4  # bytes, fp32
    for batch in shared.batches:
        cache = batch.manager.batch_processor.cache
        assert cache.num_blocks == pages
        assert cache.max_batch_tokens == 512
        assert pages * 32 * token <= cache.cache_tensor.numel() <= (pages + 4) * 32 * token
        assert batch.manager.batch_processor.scheduler.max_requests_per_batch == 8
        assert not cache.use_prefix_sharing


def test_more_requests_than_the_cache_holds_are_all_answered(model: Path) -> None:
    driver = endless(ContinuousDriver(settings(model, context=256, cache_tokens=256), "r"))
    try:

        async def scenario() -> list[int]:
            answers = [driver.generate(request(tokens=50), nothing) for _ in range(6)]
            return [finish.completion_tokens for finish in await asyncio.gather(*answers)]

        assert asyncio.run(scenario()) == [50] * 6
    finally:
        driver.stop()


def test_a_cache_smaller_than_one_request_is_refused(model: Path) -> None:
    with pytest.raises(ValueError, match=r"cache_tokens \(512\) is below context \(1024\)"):
        settings(model, cache_tokens=512)
    with pytest.raises(ValueError, match=r"batch_tokens \(4\) is below slots \(8\)"):
        settings(model, batch_tokens=4)


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_a_model_with_a_compressed_cache_is_refused_with_alternatives(tmp_path: Path, family: str) -> None:
    from transformers import AutoConfig

    AutoConfig.for_model(family).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=rf"'{family}'.*vLLM on a GPU.*'naive'"):
        ContinuousDriver(settings(tmp_path), "r")


def test_answers_that_together_outgrow_the_cache_are_those_of_each_alone(model: Path) -> None:
    """Admission reserves little for an answer without a length, so the manager has to suspend requests of its own accord."""
    driver = endless(ContinuousDriver(settings(model, context=512, cache_tokens=512), "r"))
    prompts = ["what is the capital", "hello you", "of France?", "is hello"]

    async def text_of(prompt: str) -> str:
        pieces: list[str] = []
        await driver.generate(request(tokens=300, prompt=prompt), pieces.append)
        return "".join(pieces)

    async def together() -> list[str]:
        return await asyncio.gather(*map(text_of, prompts))

    try:
        alone = [asyncio.run(text_of(prompt)) for prompt in prompts]
        assert asyncio.run(together()) == alone
    finally:
        driver.stop()
