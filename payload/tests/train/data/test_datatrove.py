"""The steps, unchanged, inside datatrove's own executor."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from data_set import made, sentence, write_lines
from datatrove import executor

from llmtrain.data import settings
from llmtrain.data.annotate import Annotate
from llmtrain.data.clean import Clean
from llmtrain.data.documents import Docs, Rejects
from llmtrain.data.personal_data import Personal
from llmtrain.data.quality import Quality


def theirs(raw: Path, docs: Any, rank: int, world_size: int) -> Iterator[Any]:
    """Documents of datatrove's class, without its readers, which need orjson."""
    from datatrove.data import Document

    for number, line in enumerate((raw / f"{rank}.jsonl").read_text().splitlines()):
        yield Document(json.loads(line)["text"], f"{rank}/{number}")


def written(path: Path, docs: Docs, rank: int, world_size: int) -> Docs:
    """Records the documents that reach the end of the pipeline."""
    with path.with_name(f"{path.name}-{rank}").open("w") as file:
        for document in docs:
            file.write(json.dumps({"text": document.text}) + "\n")
            yield document


def test_steps_run_in_datatroves_local_executor_and_drop_what_ours_drops(tmp_path: Path) -> None:

    texts = [f"{sentence(number)}  see http://a.example and mail a{number}@b.example" for number in range(20)]
    for file in range(2):
        records = [{"text": text} for text in [*texts[file::2], "short"]]
        write_lines(tmp_path / f"raw/{file}.jsonl", records)
    rejects = Rejects(tmp_path / "rejects")
    steps = [
        Clean(settings.Clean(), rejects),
        Annotate(settings.Annotate(), rejects),
        Quality(settings.Quality(), rejects),
        Personal(settings.Personal(), rejects),
    ]
    executor.LocalPipelineExecutor(
        pipeline=[partial(theirs, tmp_path / "raw"), *steps, partial(written, tmp_path / "theirs")],
        tasks=2,
        workers=1,
        logging_dir=str(tmp_path / "logs"),
        skip_completed=False,
    ).run()
    said = sorted(
        json.loads(line)["text"]
        for path in tmp_path.glob("theirs-*")
        for line in path.read_text().splitlines()
    )
    assert said == sorted(f"{sentence(number)} see and mail <EMAIL>" for number in range(20))
    rules = [
        json.loads(line)["rule"]
        for path in sorted((tmp_path / "rejects").glob("quality-*"))
        for line in path.read_text().splitlines()
    ]
    assert rules == ["short", "short"]
    assert made(tmp_path, duplicates={"near": None})["dropped"] == {"short": 2}
