"""What Label Studio 1.23.2 made of our tasks, and Label Studio itself."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from annotation_bench import KEY, RESULTS, ROOT, Bench, result

from llmtrain import exits
from llmtrain.cli import main

RECORDED = Path(__file__).parent / "recorded"  # annotator 1 in its pages (but labels), 2 by its API
STUDIO = ROOT / "bench/.venv-label-studio/bin/python"


def recorded(kind: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((RECORDED / f"{kind}.json").read_text())
    return found


@pytest.mark.parametrize(
    ("kind", "gives", "learned", "rules"),
    [
        ("better", "dpo", {"t3": "Left 3", "t4": "Left 4"}, {"tie": 2, "skipped": 1}),
        ("rating", "kto", {"t0": True, "t3": True, "t4": False}, {}),
        ("correction", "dpo", {"t0": "一直走"}, {"same": 2, "disagreement": 2}),
    ],
)
def test_what_label_studio_exported_becomes_examples(
    bench: Bench, kind: str, gives: str, learned: dict[str, Any], rules: dict[str, int]
) -> None:
    bench.export(kind)
    assert bench.take(recorded(kind), gives=gives) == exits.DONE
    examples, rejects, report = bench.taken(gives)
    assert {
        each["id"]: each["label"] if gives == "kto" else each["chosen"][0]["content"] for each in examples
    } == learned
    assert report["rejected"] == rules
    assert report["used"] + len(rejects) == sum(len(task["annotations"]) for task in recorded(kind))


def test_the_example_of_a_domain_gives_answers_that_are_learned_as_good_and_bad(bench: Bench) -> None:
    """Questions about medicines, as docs/use/annotation.md walks through them."""
    from tiny import make_tokenizer  # which needs torch

    bench.export("labels")
    assert bench.take(recorded("labels"), gives="kto", more=()) == exits.DONE
    examples, rejects, report = bench.taken("kto")
    good, bad = ({each["id"][-2:] for each in examples if each["label"] is label} for label in (True, False))
    assert (good, bad) == ({"01", "04", "07", "08"}, {"02", "03", "05", "10"})
    assert {(each["id"][-2:], each["rule"]) for each in rejects} == {
        ("06", "neutral"),
        ("09", "disagreement"),
    }
    assert report["agreement"]["alpha"] == pytest.approx(104 / 123)
    make_tokenizer(bench.folder / "model")
    rows = bench.folder / "rows"
    command = [
        "--examples",
        str(bench.folder / "kto"),
        "--model",
        str(bench.folder / "model"),
        "--seq-len",
        "2048",
    ]
    assert main(["feedback", "pack", *command, "--out", str(rows)]) == exits.DONE
    assert json.loads((rows / "rows.json").read_text())["examples"] == 8


def studio(command: str, given: Any) -> Any:
    """Label Studio's SDK or server, as helpers/label_studio.py has it."""
    program = Path(__file__).parents[2] / "helpers/label_studio.py"
    ran = subprocess.run(
        [STUDIO, program, command], input=json.dumps(given), capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout.splitlines()[-1])


without_studio = pytest.mark.skipif(
    not STUDIO.exists() or "STORM" not in os.environ,
    reason="`make storm` asks Label Studio's SDK and server, with `make peers PEER=label-studio`",
)


@without_studio
@pytest.mark.parametrize("kind", RESULTS)
def test_label_studios_sdk_takes_configuration_tasks_and_recorded_annotations(
    bench: Bench, kind: str
) -> None:
    found = bench.export(kind)
    configuration = (bench.folder / "tasks/label-studio/labels.xml").read_text()
    given = [*recorded(kind), *({**task, "annotations": []} for task in found)]
    assert set(studio("validate", {"configuration": configuration, "tasks": given})) == {None}
    unknown = {**found[0], "annotations": [{"result": [{**result(kind, 1), "from_name": "mood"}]}]}
    assert studio("validate", {"configuration": configuration, "tasks": [unknown]})[-1] is not None


@without_studio
def test_label_studio_gives_back_what_was_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmtrain.annotation.tasks.secrets.token_bytes", lambda size: KEY[:size])
    projects = []
    for kind in RESULTS:
        (tmp_path / kind).mkdir()
        folder = Bench(tmp_path / kind)
        known = {task["data"]["llmkeep_id"]: task["annotations"] for task in recorded(kind)}
        made = [
            {**task, "annotations": known.get(task["data"]["llmkeep_id"], [])} for task in folder.export(kind)
        ]
        configuration = (folder.folder / "tasks/label-studio/labels.xml").read_text()
        projects.append({"configuration": configuration, "tasks": made})

    def seen(found: list[dict[str, Any]]) -> Any:
        """What does not differ between servers: our ids, data, results in the order of annotators."""
        return {
            task["data"]["llmkeep_id"]: [
                task["data"],
                *[(each["was_cancelled"], each["result"]) for each in task["annotations"]],
            ]
            for task in found
            if task["annotations"]
        }

    given_back = studio("serve", projects)
    for kind, found in zip(RESULTS, given_back, strict=True):
        assert json.loads(json.dumps(seen(found))) == json.loads(json.dumps(seen(recorded(kind))))
