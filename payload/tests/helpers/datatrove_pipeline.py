"""Our steps, unchanged, as a pipeline of datatrove's. As a program it submits the pipeline to Slurm."""

import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

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


def pipeline(folder: Path) -> list[Any]:
    """From the files 0.jsonl, 1.jsonl … in FOLDER/raw, one a task, to FOLDER/theirs-TASK and FOLDER/rejects."""
    rejects = Rejects(folder / "rejects")
    return [
        partial(theirs, folder / "raw"),
        Clean(settings.Clean(), rejects),
        Annotate(settings.Annotate(), rejects),
        Quality(settings.Quality(), rejects),
        Personal(settings.Personal(), rejects),
        partial(written, folder / "theirs"),
    ]


def submit(folder: Path) -> None:
    """Submit two tasks, held until each node has FOLDER: nodes read from it what they run."""
    from datatrove.executor import SlurmPipelineExecutor

    SlurmPipelineExecutor(
        pipeline=pipeline(folder),
        tasks=2,
        time="10:00",
        partition="train",
        qos=None,
        logging_dir=str(folder / "logs"),
        sbatch_args={"hold": "", "chdir": str(folder)},
    ).run()


if __name__ == "__main__":
    # By its name, not as __main__, so that nodes load it from PYTHONPATH.
    import datatrove_pipeline

    datatrove_pipeline.submit(Path(sys.argv[1]))
