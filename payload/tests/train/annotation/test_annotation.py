"""`llm-train annotate`: examples go to Label Studio blind, and what comes back is examples, or refused with its reason."""

import json
import os
import subprocess
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmtrain import exits
from llmtrain.annotation import judgements, tasks
from llmtrain.cli import main
from llmtrain.feedback.export import held_out, read_export

ROOT = Path(__file__).parents[4]
MEDICINES = ROOT / "docs/examples/medicines"
RECORDED = Path(__file__).parent / "recorded"  # annotator 1 in its pages (but labels), 2 by its API
STUDIO = ROOT / "bench/.venv-label-studio/bin/python"
KEY = b"the key of tests, of 32 letters."
QUESTION = "Where is the station?\n<b>Please</b> & $thanks"
LINES: dict[str, list[dict[str, Any]]] = {
    "better": [
        {"id": f"t{n}", "prompt": f"{QUESTION} {n}", "chosen": f"Left {n}", "rejected": f"Right {n}"}
        for n in range(6)
    ],
    "rating": [
        {"id": f"t{n}", "prompt": f"{QUESTION} {n}", "completion": [{"role": "assistant", "content": f"Left {n}\n"}]}
        for n in range(6)
    ],
    "correction": [
        {"id": f"t{n}", "prompt": f"车站在哪里？{n}", "completion": f"左边 {n}"}
        for n in range(6)
    ],
}  # fmt: skip
# The control's name, its object, the type of its results, and the key of a result's value.
RESULTS = {
    "better": ("better", "prompt", "choices", "choices"),
    "rating": ("rating", "answer", "rating", "rating"),
    "correction": ("correction", "answer", "textarea", "text"),
    "labels": ("label", "text", "choices", "choices"),
}
Change = Callable[[dict[str, Any]], object]


def result(kind: str, value: object) -> dict[str, Any]:
    """A result as Label Studio makes it."""
    name, of, type_, key = RESULTS[kind]
    content = value if kind == "rating" else [value]
    return {
        "from_name": name,
        "to_name": of,
        "type": type_,
        "value": {key: content},
        "id": "x7",
        "origin": "manual",
    }


def annotation(kind: str, value: object, by: int = 1, at: int = 0, **more: Any) -> dict[str, Any]:
    """An annotation as Label Studio exports it; `at` is a second."""
    time = f"2026-11-28T08:00:{at:02d}.000000Z"
    return {
        "id": 7, "completed_by": by, "result": [result(kind, value)], "was_cancelled": False, "created_at": time,
        "updated_at": time, "task": 9, "project": 3, **more,
    }  # fmt: skip


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "Bench":
    monkeypatch.setattr("llmtrain.annotation.tasks.secrets.token_bytes", lambda size: KEY[:size])
    return Bench(tmp_path)


class Bench:
    """Exports and imports in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.kind = ""

    def export(
        self, kind: str, lines: list[dict[str, Any]] | None = None, *more: str
    ) -> list[dict[str, Any]]:
        """The tasks of an export."""
        self.kind = kind
        source = MEDICINES / "answers.jsonl"
        if kind == "labels":
            more = ("--labels", str(MEDICINES / "labels.yaml"), *more)
        if lines or kind != "labels":
            source = self.folder / "lines.jsonl"
            source.write_text("".join(json.dumps(each) + "\n" for each in lines or LINES[kind]))
        command = ["--examples", str(source), "--kind", kind, "--out", str(self.folder / "tasks"), *more]
        assert main(["annotate", "export", *command]) == exits.DONE
        found: list[dict[str, Any]] = self.read("label-studio/tasks.json")
        return found

    def read(self, name: str) -> Any:
        return json.loads((self.folder / "tasks" / name).read_text())

    def ids(self) -> dict[str, str]:
        """Our id of each example."""
        lines = (self.folder / "tasks/items.jsonl").read_text().splitlines()
        return {each["id"]: each["task"] for each in map(json.loads, lines)}

    def take(
        self, *files: list[dict[str, Any]], gives: str, more: tuple[str, ...] = ("--least-alpha", "none")
    ) -> int:
        """Import Label Studio's exports, and return the exit code."""
        names = []
        for number, content in enumerate(files):
            path = self.folder / f"exported-{number}.json"
            path.write_text(json.dumps(content))
            names.append(str(path))
        command = ["--tasks", str(self.folder / "tasks"), "--annotations", *names, "--kind", gives, *more]
        return main(["annotate", "import", *command, "--out", str(self.folder / gives)])

    def taken(self, gives: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, Any]]:
        """Examples, rejects and report of an import."""
        out = self.folder / gives
        examples, rejects = (
            [json.loads(line) for line in (out / name).read_text().splitlines()]
            for name in (f"{gives}.jsonl", "rejects.jsonl")
        )
        return examples, rejects, json.loads((out / "export.json").read_text())

    def answered(self, kind: str, values: dict[str, list[Any]]) -> list[dict[str, Any]]:
        """An export of Label Studio in which each example has these values, of annotators 1, 2 and so on."""
        found = self.export(kind)
        ids = self.ids()
        by_task = {ids[name]: given for name, given in values.items()}
        for task in found:
            own = by_task.get(task["data"]["llmkeep_id"], [])
            task["annotations"] = [annotation(kind, value, by=who) for who, value in enumerate(own, 1)]
        return found


# Export.


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
        (["--kind", "labels"], "needs a file of labels"),
        (["--labels", "x"], "needs a file of labels"),
        (["--out", "."], "which is there"),
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
        ("[{name: safe}, {name: safe}]", "'safe' is there twice"),
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


# Import.


def test_the_better_answer_is_chosen_in_whatever_order_it_was_shown(bench: Bench) -> None:
    found = bench.export("better")
    for task in found:
        left = "A" if task["data"]["a"].startswith("Left") else "B"
        task["annotations"] = [annotation("better", left)]
    assert {task["annotations"][0]["result"][0]["value"]["choices"][0] for task in found} == {"A", "B"}
    assert bench.take(found, gives="dpo") == exits.DONE
    examples, rejects, _ = bench.taken("dpo")
    assert not rejects
    assert {
        (each["id"], each["chosen"][0]["content"], each["rejected"][0]["content"]) for each in examples
    } == {(f"t{n}", f"Left {n}", f"Right {n}") for n in range(6)}


def test_a_preferred_answer_that_was_rejected_before_is_chosen_now(bench: Bench) -> None:
    found = bench.export("better")
    [task] = [each for each in found if each["data"]["llmkeep_id"] == bench.ids()["t0"]]
    task["annotations"] = [annotation("better", "A" if task["data"]["a"].startswith("Right") else "B")]
    other = next(each for each in found if each is not task)
    other["annotations"] = [annotation("better", "equal")]
    assert bench.take([task, other], gives="dpo") == exits.DONE
    [example], [reject], _ = bench.taken("dpo")
    assert (example["chosen"][0]["content"], example["rejected"][0]["content"]) == ("Right 0", "Left 0")
    assert reject["rule"] == "tie"


def test_ratings_are_labels_and_five_stars_conversations(bench: Bench) -> None:
    values = {"t0": [5], "t1": [4], "t2": [3], "t3": [2], "t4": [1]}
    found = bench.answered("rating", values)
    assert bench.take(found, gives="kto") == exits.DONE
    examples, rejects, report = bench.taken("kto")
    assert {each["id"]: each["label"] for each in examples} == {
        "t0": True,
        "t1": True,
        "t3": False,
        "t4": False,
    }
    assert [(each["id"], each["rule"]) for each in rejects] == [("t2", "neutral")]
    assert report["tasks"]["number"] - report["annotated"] == 1
    assert bench.take(found, gives="sft") == exits.DONE
    assert [each["messages"][-1]["content"] for each in bench.taken("sft")[0]] == ["Left 0\n"]


def test_a_correction_is_chosen_and_an_answer_that_needs_none_is_no_pair(bench: Bench) -> None:
    found = bench.answered("correction", {"t0": ["右边"], "t1": ["左边 1"]})
    assert bench.take(found, gives="dpo") == exits.DONE
    [example], [reject], report = bench.taken("dpo")
    assert (example["chosen"][0]["content"], example["rejected"][0]["content"]) == ("右边", "左边 0")
    assert (reject["id"], reject["rule"]) == ("t1", "same")
    assert report["values"] == {"corrected": 1, "unchanged": 1}
    assert bench.take(found, gives="sft") == exits.DONE
    assert {each["messages"][-1]["content"] for each in bench.taken("sft")[0]} == {"右边", "左边 1"}


def test_a_text_without_an_answer_teaches_its_label(bench: Bench) -> None:
    [task] = bench.export(
        "labels", [{"text": "The tenant shall pay the rent on the third day of each month."}]
    )
    task["annotations"] = [annotation("labels", "safe")]
    assert bench.take([task], gives="sft") == exits.DONE
    [example], _, _ = bench.taken("sft")
    [asked, said] = example["messages"]
    assert asked["content"].endswith("The tenant shall pay the rent on the third day of each month.")
    assert said == {"role": "assistant", "content": "safe"}


def test_an_example_says_who_annotated_it_without_naming_them(bench: Bench) -> None:
    found = bench.answered("rating", {"t0": [5, 5]})
    for task in found:
        for each in task["annotations"]:
            each["completed_by"] = {"id": each["completed_by"], "email": "ada@example.org"}
    assert bench.take(found, gives="kto") == exits.DONE
    [example], _, _ = bench.taken("kto")
    assert len(set(example["annotation"]["annotators"])) == 2
    assert example["annotation"]["task"] == bench.ids()["t0"]
    assert "ada" not in json.dumps(example)


# Several annotators.


def test_annotators_that_differ_teach_nothing_and_are_listed(bench: Bench) -> None:
    found = bench.answered("rating", {"t0": [5, 1], "t1": [5, 4], "t2": [1, 1], "t3": [2]})
    assert bench.take(found, gives="kto") == exits.DONE
    examples, rejects, report = bench.taken("kto")
    assert {each["id"]: each["label"] for each in examples} == {"t1": True, "t2": False, "t3": False}
    assert [(each["id"], each["rule"]) for each in rejects] == [("t0", "disagreement")] * 2
    lines = (bench.folder / "kto/disagreements.jsonl").read_text().splitlines()
    assert {each["id"]: sorted(each["values"].values()) for each in map(json.loads, lines)} == {
        "t0": [1, 5],
        "t1": [4, 5],
    }
    assert report["disagreements"] == 2
    assert report["agreement"]["tasks"] == 3


def test_two_corrections_of_one_answer_are_two_examples(bench: Bench) -> None:
    assert (
        bench.take(
            bench.answered("correction", {"t0": ["右边", "前面"], "t1": ["后面", "左边 1"]}), gives="dpo"
        )
        == exits.DONE
    )
    examples, rejects, _ = bench.taken("dpo")
    assert sorted(each["chosen"][0]["content"] for each in examples) == ["前面", "右边"]
    assert {(each["id"], each["rule"]) for each in rejects} == {("t1", "disagreement")}


def test_a_second_project_has_the_same_tasks_under_other_ids_of_label_studio(bench: Bench) -> None:
    found = bench.answered("rating", {f"t{n}": [5] for n in range(6)})
    again = deepcopy(
        [task for task in found if task["data"]["llmkeep_id"] in {bench.ids()["t0"], bench.ids()["t1"]}]
    )
    for number, task in enumerate(again, 900):
        task["id"] = number
        task["annotations"] = [annotation("rating", 5, by=2)]
    assert bench.take(found, again, gives="kto") == exits.DONE
    assert bench.taken("kto")[2]["agreement"]["tasks"] == 2
    assert len(bench.taken("kto")[0]) == 6


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"t0": [5, 1], "t1": [4, 1], "t2": [1, 5]}, "is -0."),
        ({"t0": [5], "t1": [1]}, "not defined, since there are none"),
        ({"t0": [5, 5], "t1": [5, 5]}, "not defined, since all have the same value"),
    ],
)
def test_an_import_is_refused_unless_annotators_agree_or_it_is_told_to_take_it(
    bench: Bench, capsys: pytest.CaptureFixture[str], values: dict[str, list[int]], says: str
) -> None:
    found = bench.answered("rating", values)
    capsys.readouterr()
    assert bench.take(found, gives="kto", more=()) == exits.USAGE
    told = capsys.readouterr()
    assert says in told.err
    differing = sum(len(set(each)) > 1 for each in values.values())
    assert len(told.out.splitlines()) == differing
    assert not (bench.folder / "kto").exists()
    assert bench.take(found, gives="kto", more=("--least-alpha", "none")) == (
        exits.USAGE if "-0" in says else exits.DONE
    )


def test_annotators_that_agree_enough_are_taken(bench: Bench) -> None:
    assert (
        bench.take(bench.answered("rating", {"t0": [5, 5], "t1": [1, 1], "t2": [4, 5]}), gives="kto", more=())
        == exits.DONE
    )
    assert bench.taken("kto")[2]["agreement"]["alpha"] == pytest.approx(7 / 9)


def test_what_was_forgotten_is_taken_out_of_an_import(bench: Bench) -> None:
    values = {"t0": [5, 1], "t1": [5, 5], "t2": [1, 4]}
    assert bench.take(bench.answered("rating", values), gives="kto") == exits.DONE
    ids = bench.folder / "ids"
    ids.write_text("t0\nt1\n")
    assert main(["feedback", "remove", "--ids", str(ids), str(bench.folder / "kto")]) == exits.DONE
    for path in (bench.folder / "kto").glob("*.jsonl"):
        assert {json.loads(line)["id"] for line in path.read_text().splitlines()} <= {"t2"}
    assert read_export(bench.folder / "kto") == ("kto", [], bench.taken("kto")[2]["sha256"])


# What is not annotations of this export.


def changed(**values: Any) -> Change:
    return lambda found: found["annotations"][0].update(values)


def in_result(**values: Any) -> Change:
    return lambda found: found["annotations"][0]["result"][0].update(values)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (in_result(from_name="mood"), "unknown_control"),
        (in_result(to_name="prompt"), "unknown_control"),
        (in_result(type="choices"), "unknown_control"),
        (lambda task: task["annotations"][0]["result"].append({"from_name": "comment"}), "unknown_control"),
        (lambda task: task["annotations"][0]["result"].append(result("rating", 5)), "several_values"),
        (in_result(value={"rating": 9}), "value"),
        (in_result(value={"rating": 0}), "value"),
        (in_result(value={"rating": True}), "value"),
        (in_result(value={"rating": "5"}), "value"),
        (in_result(value={"rating": 5, "number": 1}), "malformed"),
        (in_result(value=[5]), "malformed"),
        (changed(result=[]), "empty"),
        (changed(result="5"), "malformed"),
        (changed(completed_by=None), "malformed"),
        (changed(completed_by=True), "malformed"),
        (changed(updated_at="yesterday"), "malformed"),
        (changed(updated_at="0001-01-01T00:00:00+23:00"), "malformed"),
        (changed(was_cancelled=True), "skipped"),
        (lambda task: task["annotations"].__setitem__(0, "x"), "malformed"),
        (lambda task: task["data"].update(llmkeep_id="0" * 32), "foreign_task"),
        (lambda task: task["data"].pop("llmkeep_id"), "foreign_task"),
        (lambda task: task.update(data=[]), "foreign_task"),
        (lambda task: task["data"].update(answer="Another answer"), "altered_task"),
        (lambda task: task["data"].update(more="x"), "altered_task"),
    ],
)
def test_what_is_refused_says_why_and_the_rest_is_taken(bench: Bench, change: Change, rule: str) -> None:
    found = bench.answered("rating", {"t0": [5], "t1": [1]})
    [task] = [each for each in found if each["data"]["llmkeep_id"] == bench.ids()["t0"]]
    change(task)
    assert bench.take(found, gives="kto") == exits.DONE
    [example], [reject], report = bench.taken("kto")
    assert example["id"] == "t1"
    assert (reject["rule"], bool(reject["reason"])) == (rule, True)
    assert found[reject["task"]] is task
    assert report["rejected"] == {rule: 1}


@pytest.mark.parametrize(("value", "rule"), [("\ud800", "malformed"), (" \n", "empty"), (7, "malformed")])
def test_a_correction_that_is_no_text_is_refused(bench: Bench, value: object, rule: str) -> None:
    found = bench.answered("correction", {"t0": [value], "t1": ["右边"]})
    assert bench.take(found, gives="dpo") == exits.DONE
    assert [each["rule"] for each in bench.taken("dpo")[1]] == [rule]


def test_a_task_that_is_twice_in_a_file_counts_once(bench: Bench) -> None:
    found = bench.answered("rating", {"t0": [5], "t1": [1]})
    [twice] = [each for each in found if each["data"]["llmkeep_id"] == bench.ids()["t0"]]
    copy = deepcopy(twice) | {"annotations": [annotation("rating", 1, by=2), annotation("rating", 1, by=3)]}
    assert bench.take([*found, copy], gives="kto") == exits.DONE
    examples, rejects, _ = bench.taken("kto")
    assert {each["id"]: each["label"] for each in examples} == {"t0": True, "t1": False}
    assert [(each["id"], each["rule"], each["annotation"]) for each in rejects] == [
        ("t0", "duplicate_id", 0), ("t0", "duplicate_id", 1)
    ]  # fmt: skip


@pytest.mark.parametrize("order", [1, -1])
def test_an_annotators_last_annotation_of_a_task_counts(bench: Bench, order: int) -> None:
    found = bench.answered("rating", {"t0": [5]})
    [task] = [each for each in found if each["annotations"]]
    task["annotations"] = [annotation("rating", 5, at=1), annotation("rating", 1, at=2)][::order]
    assert bench.take(found, gives="kto") == exits.DONE
    [example], [reject], _ = bench.taken("kto")
    assert example["label"] is False
    assert reject["rule"] == "superseded"


def test_drafts_are_told(bench: Bench) -> None:
    found = bench.answered("rating", {"t0": [5]})
    found[0]["drafts"] = [17]  # their ids, or objects, by Label Studio's version
    assert bench.take(found, gives="kto") == exits.DONE
    assert [each["rule"] for each in bench.taken("kto")[1]] == ["draft"]


def test_an_answer_that_the_gate_will_ask_for_is_not_learned(bench: Bench) -> None:
    held = bench.folder / "held.jsonl"
    held.write_text(json.dumps({"question": "x", "answer": "右边"}) + "\n")
    found = bench.answered("correction", {"t0": ["右边"], "t1": ["前面"]})
    assert (
        bench.take(found, gives="dpo", more=("--least-alpha", "none", "--held-out", str(held))) == exits.DONE
    )
    assert [(each["id"], each["rule"]) for each in bench.taken("dpo")[1]] == [("t0", "held_out")]


ANNOTATIONS = st.lists(
    st.tuples(
        st.integers(0, 6),
        st.integers(1, 3),
        st.sampled_from([1, 3, 4, 5, 9, None, "cancelled", "unknown", "malformed"]),
        st.integers(0, 3),
    ),
    max_size=25,
)


@given(said=ANNOTATIONS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_each_annotation_is_in_an_example_or_a_reject(bench: Bench, said: list[Any]) -> None:
    """Tasks 0 to 5 are ours, 6 is foreign."""
    if not (bench.folder / "tasks").exists():
        bench.export("rating")
    exported = judgements.read_exported(bench.folder / "tasks")
    found: list[dict[str, Any]] = [
        {"data": each["data"], "annotations": []} for each in bench.read(tasks.TASKS)
    ]
    found.append({"data": {"llmkeep_id": "x"}, "annotations": []})
    for task, by, value, at in said:
        each = annotation(
            "rating", 5 if isinstance(value, str) else value, by, at, was_cancelled=value == "cancelled"
        )
        if value == "unknown":
            each["result"][0]["from_name"] = "mood"
        found[task]["annotations"].append("x" if value == "malformed" else each)
    judged = judgements.Judged(exported, "kto", shares=held_out(None))
    judged.judge(judgements.found_in(Path("x"), found, exported))
    rejected = [each for each in judged.rejects if each["rule"] != "foreign_task" or found[6]["annotations"]]
    assert judged.used + len(rejected) == len(said)
    places = {(each["task"], each["annotation"]) for each in rejected}
    assert len(places) == len(rejected)
    assert judged.used == sum(len(each["annotation"]["annotators"]) for each in judged.examples)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ('{"annotations": []}', "is no list of tasks"),
        ('[{"id": 1, "prompt": "x", "rating": 5}]', "not as JSON-MIN"),
        ("[]", "there are none"),
    ],
)
def test_a_file_that_is_no_json_export_is_refused_and_nothing_is_written(
    bench: Bench, capsys: pytest.CaptureFixture[str], content: str, says: str
) -> None:
    bench.export("rating")
    path = bench.folder / "exported.json"
    path.write_text(content)
    command = [
        "--tasks",
        str(bench.folder / "tasks"),
        "--annotations",
        str(path),
        "--kind",
        "kto",
        "--least-alpha",
        "none",
    ]
    assert main(["annotate", "import", *command, "--out", str(bench.folder / "kto")]) == exits.USAGE
    assert says in capsys.readouterr().err
    assert not (bench.folder / "kto").exists()
    assert path.read_text() == content


def test_an_import_of_another_kind_is_refused(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.take(bench.answered("rating", {"t0": [5]}), gives="dpo") == exits.USAGE
    assert "annotations by rating give kto or sft" in capsys.readouterr().err


def test_an_export_that_was_altered_is_refused(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    found = bench.answered("rating", {"t0": [5]})
    items = bench.folder / "tasks/items.jsonl"
    items.write_text(items.read_text().replace("Left", "Right"))
    assert bench.take(found, gives="kto") == exits.ALTERED
    assert "take the export as it was written" in capsys.readouterr().err


# What Label Studio 1.23.2 made of our tasks, and Label Studio itself.


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
    """Questions about medicines, as docs/annotation.md walks through them."""
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
