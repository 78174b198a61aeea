"""`llm-train annotate export`: examples go to Label Studio blind."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from annotation_bench import MEDICINES, Bench

from llmtrain import exits
from llmtrain.cli import main


def test_annotators_cannot_tell_which_answer_was_which(bench: Bench) -> None:
    found = bench.export(
        "better", [{"id": f"t{n}", "prompt": "x", "chosen": "good", "rejected": "bad"} for n in range(40)]
    )
    assert {task["data"]["a"] for task in found} == {"good", "bad"}
    assert all(task["data"].keys() == {"llmkeep_id", "prompt", "a", "b"} for task in found)
    shown = json.dumps(found)
    assert "chosen" not in shown
    assert "t1" not in shown
    assert [task["data"]["llmkeep_id"] for task in found] != [bench.ids()[f"t{n}"] for n in range(40)]


def test_another_export_has_another_order_and_other_ids(tmp_path: Path) -> None:
    """Without the tests' key."""
    found = []
    for name in "first", "second":
        (tmp_path / name).mkdir()
        found.append(Bench(tmp_path / name).export("better"))
    first, second = ({task["data"]["llmkeep_id"] for task in each} for each in found)
    assert not first & second


def test_only_a_share_is_for_a_second_annotator_and_nothing_in_a_task_says_so(bench: Bench) -> None:
    found = bench.export("rating", None, "--overlap", "0.4")
    again = bench.read("label-studio/overlap.json")
    assert len(again) == 3
    assert all(task in found for task in again)


def test_a_configuration_asks_one_thing_about_texts_that_tasks_have(bench: Bench) -> None:
    [task, *_] = bench.export("labels")
    view = ElementTree.fromstring((bench.folder / "tasks/label-studio/labels.xml").read_text())  # noqa: S314 - ours
    assert [each.get("value") for each in view.iter("Choice")] == [
        "safe",
        "harmless but of no help",
        "dangerous",
    ]
    assert [f"${name}" for name in task["data"] if name != "llmkeep_id"] == [
        each.get("value") for each in view.iter("Text")
    ]


def test_what_is_no_task_is_told_with_its_reason(bench: Bench) -> None:
    pair = {"prompt": "x", "chosen": "a", "rejected": "b"}
    lines: list[dict[str, Any]] = [
        {"id": "t0", **pair},
        {"id": "t0", **pair, "prompt": "y"},
        {"id": "t1", "prompt": "x", "completion": "a"},
        {"id": "t2", **pair, "rejected": " a "},
        {"id": "t3", **pair, "prompt": [{"role": "user", "content": [{"type": "image_url"}]}]},
        {"id": 4, **pair},
        {"id": "t5", **pair, "chosen": "\ud800"},
        {**pair, "id": "\ud800"},
        {"id": "\udfff", "prompt": "x"},
    ]
    assert len(bench.export("better", lines)) == 1
    rejects = [json.loads(line) for line in (bench.folder / "tasks/rejects.jsonl").read_text().splitlines()]
    assert [each["rule"] for each in rejects] == [
        "duplicate_id", "answers", "same", "no_plain_text", "malformed", "no_plain_text", "no_plain_text", "answers"
    ]  # fmt: skip
    assert rejects[-1]["id"] == r"\udfff"


def test_examples_of_an_import_can_be_annotated_again(bench: Bench) -> None:
    """An import is as `llm-train feedback export` writes it."""
    assert (
        bench.take(bench.answered("correction", {"t0": ["右边"], "t1": ["前面"]}), gives="dpo") == exits.DONE
    )
    command = [
        "--examples",
        str(bench.folder / "dpo"),
        "--kind",
        "better",
        "--out",
        str(bench.folder / "again"),
    ]
    assert main(["annotate", "export", *command]) == exits.DONE
    again = json.loads((bench.folder / "again/label-studio/tasks.json").read_text())
    assert {frozenset((task["data"]["a"], task["data"]["b"])) for task in again} == {
        frozenset(("右边", "左边 0")), frozenset(("前面", "左边 1"))
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["--kind", "labels"], "requires --labels"),
        (["--labels", "x"], "requires --labels"),
        (["--out", "."], "which exists"),
        (["--examples", "nowhere"], "cannot be read as JSON lines"),
        (["--kind", "better"], "{'answers': 6}"),
    ],
)
def test_an_export_that_cannot_be_is_refused(
    bench: Bench, capsys: pytest.CaptureFixture[str], change: list[str], says: str
) -> None:
    bench.export("rating")
    given = [
        "--examples",
        str(bench.folder / "lines.jsonl"),
        "--kind",
        "rating",
        "--out",
        str(bench.folder / "x"),
    ]
    assert main(["annotate", "export", *given, *change]) == exits.USAGE
    assert says in capsys.readouterr().err
    assert not (bench.folder / "x").exists()


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ("[{name: safe}]", "at least 2"),
        ("[{name: safe}, {name: safe}]", "'safe' occurs twice"),
        ("[{name: safe}, {name: ' other'}]", "labels.1.name"),
        ("[{name: safe}, {name: other, colour: red}]", "unknown key 'labels.1.colour'"),
    ],
)
def test_labels_that_label_studio_would_not_give_back_are_refused(
    bench: Bench, capsys: pytest.CaptureFixture[str], labels: str, says: str
) -> None:
    path = bench.folder / "labels.yaml"
    path.write_text(f"question: Safe?\nlabels: {labels}\n")
    given = ["--examples", str(MEDICINES / "answers.jsonl"), "--kind", "labels", "--labels", str(path)]
    assert main(["annotate", "export", *given, "--out", str(bench.folder / "x")]) == exits.USAGE
    assert says in capsys.readouterr().err
