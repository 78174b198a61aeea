"""The working directory: the result of each step for each shard, addressed by content.

A result is in `STEP/KEY/`, where the key is the hash of the step's code, its options and the content of its input. So an
existing result is never stale, only unused, and since an input is identified by its content, a changed rule that has no effect
re-runs no later step. Results are written aside, flushed and renamed.
"""

import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from llmcore.files import flush, write_aside
from llmtrain.exits import FAILED, Refusal

Result = dict[str, Any]
Found = list[tuple[Path, Result]]  # directories and results of tasks


class Task(NamedTuple):
    """`make(directory, *arguments)` writes files to the directory and returns facts about them as JSON.

    `weight` is in bytes of text, for progress; `key` identifies the result.
    """

    step: str
    key: str
    weight: int
    make: Callable[..., Result]
    arguments: tuple[Any, ...]


def key_of(*what: Any) -> str:
    """A short hash of values, in hex."""
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:32]


def code_of(*modules: ModuleType) -> str:
    """The hash of the source of modules, in hex: results of changed code are not reused."""
    digest = hashlib.sha256()
    for module in modules:
        digest.update(Path(str(module.__file__)).read_bytes())
    return digest.hexdigest()


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically."""
    write_aside(path, json.dumps(content, sort_keys=True, ensure_ascii=False) + "\n")


def result_of(root: Path, task: Task) -> tuple[Path, Result]:
    """The directory and result of a task, which is run if the result does not exist."""
    directory = root / task.step / task.key
    result_file = directory / "done.json"
    if result_file.exists():
        result: Result = json.loads(result_file.read_text())
        return directory, result
    aside = directory.with_name(task.key + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    result = task.make(aside, *task.arguments)
    for path in aside.rglob("*"):
        flush(path)
    write_json(aside / "done.json", result)
    aside.rename(directory)
    flush(directory.parent)
    return directory, result


class Progress:
    """A progress line on stderr: step, share, rate, time left."""

    def __init__(self, step: str, total: int, cached: int) -> None:
        self.step, self.total, self.position, self.begun = step, total, 0, time.monotonic()
        self.last_print = self.begun
        if not total:
            self.say(f"unchanged, {cached} shards")

    def advance(self, weight: int) -> None:
        """Add processed bytes; prints each second on a terminal, each 10 s in a log."""
        if not weight:
            return
        self.position += weight
        now = time.monotonic()
        if self.position < self.total and now - self.last_print < (1 if sys.stderr.isatty() else 10):
            return
        self.last_print = now
        rate = self.position / max(now - self.begun, 1e-3)
        remaining = (self.total - self.position) / max(rate, 1.0)
        share = 100 * self.position / self.total
        self.say(
            f"{share:3.0f} % of {self.total / 1e6:.1f} MB, {rate / 1e6:.2f} MB/s, {remaining:.0f} s left"
        )

    def say(self, words: str) -> None:
        """Print, overwriting the previous line on a terminal until the step is done."""
        again = sys.stderr.isatty() and self.position < self.total
        print(f"{self.step:<14} {words}", end="\r" if again else "\n", file=sys.stderr, flush=True)


class Work:
    """The working directory, and the processes that use it."""

    def __init__(self, root: Path, workers: int) -> None:
        self.root, self.workers = root, workers
        self.used: set[Path] = set()
        self.pool: ProcessPoolExecutor | None = None

    def results(self, tasks: list[Task]) -> Found:
        """The directories and results of tasks, in their order; missing ones are run in parallel."""
        open_tasks = [task for task in tasks if not (self.root / task.step / task.key / "done.json").exists()]
        if tasks:
            weight = sum(task.weight for task in open_tasks)
            progress = Progress(tasks[0].step, weight, len(tasks))
            if self.workers == 1 or len(open_tasks) == 1:
                for task in open_tasks:
                    result_of(self.root, task)
                    progress.advance(task.weight)
            elif open_tasks:
                self.in_pool(open_tasks, progress)
        results = [result_of(self.root, task) for task in tasks]
        self.used.update(directory for directory, _ in results)
        return results

    def in_pool(self, tasks: list[Task], progress: Progress) -> None:
        """Run tasks in the pool; the first error cancels the rest."""
        if self.pool is None:
            # Forking a process with threads, such as those of tokenizers, can hang.
            context = multiprocessing.get_context("forkserver")
            self.pool = ProcessPoolExecutor(self.workers, context, die_with_parent)
        waiting: dict[Future[Any], Task] = {
            self.pool.submit(result_of, self.root, task): task for task in tasks
        }
        try:
            for future in as_completed(waiting):
                future.result()
                progress.advance(waiting[future].weight)
        except BrokenProcessPool as error:
            self.pool = None
            raise Refusal(
                "a worker was killed, perhaps for lack of memory: run it again with fewer --workers; finished results are kept",
                FAILED,
            ) from error
        except BaseException:
            self.pool.shutdown(cancel_futures=True)
            self.pool = None
            raise

    def prune(self) -> int:
        """Delete the results that this run did not use; return their number."""
        count = 0
        for directory in self.root.glob("*/*"):
            if directory.is_dir() and directory not in self.used:
                shutil.rmtree(directory)
                count += 1
        return count


def die_with_parent() -> None:
    """Terminate this worker when its parent is killed; it would wait for work forever."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@contextmanager
def working(root: Path, workers: int) -> Iterator[Work]:
    """Yields the working directory for one run; raises Refusal while another run uses it."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise Refusal(
                f"{root} is in use by another `llm-train data run`: wait for it to finish"
            ) from error
        work = Work(root, workers)
        try:
            yield work
        finally:
            if work.pool is not None:
                work.pool.shutdown(cancel_futures=True)
