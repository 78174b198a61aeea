"""The steps, unchanged, inside datatrove's own executor; tests/lab/storm/containers/test_slurm.py has its Slurm executor."""

import json
from pathlib import Path

from data_set import made, sentence, write_lines
from datatrove import executor
from datatrove_pipeline import pipeline


def test_steps_run_in_datatroves_local_executor_and_drop_what_ours_drops(tmp_path: Path) -> None:

    texts = [f"{sentence(number)}  see http://a.example and mail a{number}@b.example" for number in range(20)]
    for file in range(2):
        records = [{"text": text} for text in [*texts[file::2], "short"]]
        write_lines(tmp_path / f"raw/{file}.jsonl", records)
    executor.LocalPipelineExecutor(
        pipeline=pipeline(tmp_path),
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
