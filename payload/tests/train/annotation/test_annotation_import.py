"""`llm-train annotate import`: what comes back is examples, or refused with its reason."""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from annotation_bench import Bench, annotation, result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmtrain import exits
from llmtrain.annotation import judgements, tasks
from llmtrain.cli import main
from llmtrain.feedback.export import held_out, read_export

Change = Callable[[dict[str, Any]], object]


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
        ({"t0": [5], "t1": [1]}, "undefined, because there are none"),
        ({"t0": [5, 5], "t1": [5, 5]}, "undefined, because all have the same value"),
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
        ('{"annotations": []}', "is not a list of tasks"),
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
    assert "annotations by rating only yield kto or sft" in capsys.readouterr().err


def test_an_export_that_was_altered_is_refused(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    found = bench.answered("rating", {"t0": [5]})
    items = bench.folder / "tasks/items.jsonl"
    items.write_text(items.read_text().replace("Left", "Right"))
    assert bench.take(found, gives="kto") == exits.ALTERED
    assert "use the unchanged export" in capsys.readouterr().err
