"""`llm-train feedback export`: what users said becomes examples, and what does not is told with its reason."""

import json
from pathlib import Path
from typing import Any

import pytest

from llmcore.ratings import ANSWERED, FIELD, RATED, REVIEWED
from llmtrain import exits
from llmtrain.cli import main

QUESTION = "What is the capital of France, and how many people live in it today, roughly speaking?"


@pytest.fixture
def journal(tmp_path: Path) -> "Journal":
    return Journal(tmp_path / "journal")


class Journal:
    """A journal as gateways write it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def add(
        self, number: int, kept: bool = True, subject: str = "ada", question: str = "", **said: Any
    ) -> None:
        """An exchange, unless its tenant did not consent, and its rating."""
        head = {"@timestamp": f"2026-11-27T08:00:{number:02d}.000+00:00", "transaction.id": f"t{number}"}
        who = {"user.id": subject, "organization.id": "research"}
        rating = head | who | {FIELD + name: value for name, value in said.items()}
        self.write(RATED, rating)
        if kept:
            prompt = [{"role": "user", "content": question or f"{QUESTION} {number}"}]
            self.write(
                ANSWERED, head | who | {FIELD + "prompt": prompt, FIELD + "answer": f"answer {number}"}
            )

    def write(self, kind: str, record: dict[str, Any]) -> None:
        with (self.folder / f"{kind}-20261127T08.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")

    def review(
        self, number: int, correction: str = "", time: str = "2026-11-27", subject: str = "ada"
    ) -> None:
        """An expert's review, which dismisses without a correction."""
        told = {FIELD + "correction": correction} if correction else {}
        self.write(REVIEWED, {"@timestamp": f"{time}T08:30:00.000+00:00", "transaction.id": f"t{number}", "user.id": subject,
                              "organization.id": "research", FIELD + "reviewer": "eve", FIELD + "tags": ["factual"],
                              FIELD + "verdict": "corrected" if correction else "dismissed"} | told)  # fmt: skip

    def export(self, kind: str, *more: str) -> tuple[list[dict[str, Any]], dict[str, str], dict[str, Any]]:
        """Examples, the rule of each reject, and the report."""
        out = self.folder.parent / kind
        command = ["--journal", str(self.folder), "--since", "2026-11-01", "--kind", kind, "--out", str(out)]
        assert main(["feedback", "export", *command, *more]) == exits.DONE
        lines = (out / f"{kind}.jsonl").read_bytes().splitlines()
        rejects = map(json.loads, (out / "rejects.jsonl").read_text().splitlines())
        report = json.loads((out / "export.json").read_text())
        return [json.loads(line) for line in lines], {each["id"]: each["rule"] for each in rejects}, report


def test_thumbs_and_stars_are_labels(journal: Journal) -> None:
    journal.add(0, thumb="up")
    journal.add(1, thumb="down")
    journal.add(2, stars=5)
    journal.add(3, stars=1)
    journal.add(4, stars=3)
    journal.add(5, correction="Paris")
    examples, rejects, _ = journal.export("kto")
    assert [(each["id"], each["label"]) for each in examples] == [
        ("t0", True), ("t1", False), ("t2", True), ("t3", False)
    ]  # fmt: skip
    assert examples[0]["prompt"] == [{"role": "user", "content": f"{QUESTION} 0"}]
    assert examples[0]["completion"] == [{"role": "assistant", "content": "answer 0"}]
    assert rejects == {"t4": "neutral", "t5": "neutral"}


def test_a_correction_is_chosen_and_the_answer_rejected(journal: Journal) -> None:
    journal.add(0, thumb="down", correction="Paris")
    journal.add(1, thumb="down")
    journal.add(2, thumb="down", correction=" answer 2 ")
    [example], rejects, _ = journal.export("dpo")
    assert example["chosen"] == [{"role": "assistant", "content": "Paris"}]
    assert example["rejected"] == [{"role": "assistant", "content": "answer 0"}]
    assert rejects == {"t1": "no_correction", "t2": "same"}


def test_the_best_answers_and_corrections_are_conversations(journal: Journal) -> None:
    journal.add(0, thumb="up")
    journal.add(1, stars=4)
    journal.add(2, stars=1, correction="Paris")
    examples, rejects, _ = journal.export("sft")
    assert [each["messages"][-1]["content"] for each in examples] == ["answer 0", "Paris"]
    assert rejects == {"t1": "not_best"}


def test_an_experts_correction_is_chosen_before_the_subjects_own(journal: Journal) -> None:
    journal.add(0, thumb="down", correction="London")
    journal.add(1, thumb="down")
    journal.review(0, "Paris")
    journal.review(1, "Rome")
    journal.review(1, "Lutetia")
    examples, rejects, _ = journal.export("dpo")
    chosen = [(each["chosen"][0]["content"], each["rejected"][0]["content"]) for each in examples]
    assert chosen == [("Paris", "answer 0"), ("Lutetia", "answer 1")]
    assert rejects == {}


def test_experts_corrections_come_first(journal: Journal) -> None:
    journal.add(0, thumb="up")
    journal.add(1, stars=1)
    journal.add(2, thumb="up")
    journal.review(1, "Paris")
    examples, rejects, _ = journal.export("sft", "--per-subject", "2")
    assert [each["messages"][-1]["content"] for each in examples] == ["Paris", "answer 0"]
    assert rejects == {"t2": "cap"}


@pytest.mark.parametrize("kind", ["kto", "dpo", "sft"])
def test_what_an_expert_dismissed_is_no_example(journal: Journal, kind: str) -> None:
    journal.add(0, thumb="down", correction="London")
    journal.add(1, thumb="down", correction="Rome")
    journal.review(0)
    examples, rejects, _ = journal.export(kind)
    assert ([each["id"] for each in examples], rejects) == (["t1"], {"t0": "dismissed"})


def test_a_review_counts_at_its_own_time_and_not_yet_before(journal: Journal) -> None:
    journal.add(0, thumb="down", correction="London")
    journal.review(0, "Paris", time="2026-11-30")
    [before], _, _ = journal.export("dpo", "--until", "2026-11-29")
    assert before["chosen"][0]["content"] == "London"
    [later], _, _ = journal.export("sft", "--since", "2026-11-29", "--until", "2026-12-01")
    assert later["messages"][-1]["content"] == "Paris", "its rating is of a round that is over"


def test_of_a_later_rating_an_expert_has_said_nothing(journal: Journal) -> None:
    journal.add(0, thumb="down")
    journal.review(0)
    journal.add(1, thumb="down")
    journal.review(1, "Rome", time="2026-11-26")
    journal.write(RATED, {"@timestamp": "2026-11-27T09:00:00.000+00:00", "transaction.id": "t0", "user.id": "ada",
                          "organization.id": "research", FIELD + "correction": "Paris"})  # fmt: skip
    examples, rejects, _ = journal.export("dpo")
    assert [each["chosen"][0]["content"] for each in examples] == ["Paris"]
    assert rejects == {"t1": "no_correction"}


def test_an_example_that_a_review_leaves_as_it_was_is_not_learned_once_more(journal: Journal) -> None:
    journal.add(0, thumb="down")
    journal.review(0, "Paris", time="2026-11-28")
    journal.add(1, thumb="down")
    journal.write(RATED, {"@timestamp": "2026-11-28T09:00:00.000+00:00", "transaction.id": "t1", "user.id": "ada",
                          "organization.id": "research", FIELD + "thumb": "up"})  # fmt: skip
    [example], _, _ = journal.export("kto", "--since", "2026-11-28", "--until", "2026-12-01")
    assert (example["id"], example["label"]) == ("t1", True)


def test_a_review_of_another_subjects_answer_is_no_example(journal: Journal) -> None:
    journal.add(0, thumb="down")
    journal.add(1, thumb="down", correction="Rome")
    journal.review(0, "Paris", subject="bob")
    _, rejects, _ = journal.export("dpo")
    assert rejects == {"t0": "foreign"}


def test_the_last_rating_counts(journal: Journal) -> None:
    journal.add(0, thumb="up")
    journal.add(0, thumb="down")
    [example], _, _ = journal.export("kto")
    assert example["label"] is False


@pytest.mark.parametrize("order", [1, -1])
def test_the_last_rating_counts_on_whatever_host(journal: Journal, tmp_path: Path, order: int) -> None:
    journal.add(0, thumb="up")
    other = Journal(tmp_path / "other")
    other.write(RATED, {"@timestamp": "2026-11-27T09:00:00.000+00:00", "transaction.id": "t0", "user.id": "ada",
                        "organization.id": "research", FIELD + "thumb": "down"})  # fmt: skip
    folders = [str(each.folder) for each in (journal, other)][::order]
    given = ["--journal", *folders, "--since", "2026-11-01", "--kind", "kto", "--out", str(tmp_path / "kto")]
    assert main(["feedback", "export", *given]) == exits.DONE
    assert json.loads((tmp_path / "kto/kto.jsonl").read_text())["label"] is False


def test_an_export_that_was_killed_is_done_by_the_same_command(
    journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal.add(1, thumb="up")
    whole = Path.write_text

    def cut_off(path: Path, text: str, **more: str) -> int:
        if "rejects" in path.name:
            raise KeyboardInterrupt
        return whole(path, text, **more)

    with monkeypatch.context() as killed:
        killed.setattr(Path, "write_text", cut_off)
        with pytest.raises(KeyboardInterrupt):
            journal.export("kto")
    assert len(journal.export("kto")[0]) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["journal", "kto"]


def test_a_prompt_without_the_chat_template_is_no_example(journal: Journal) -> None:
    journal.add(0, thumb="up")
    journal.add(1, thumb="up")
    journal.write(ANSWERED, {"transaction.id": "t1", "user.id": "ada", "organization.id": "research",
                             "event.action": "POST /v1/completions", FIELD + "prompt": "x", FIELD + "answer": "y"})  # fmt: skip
    _, rejects, _ = journal.export("kto")
    assert rejects == {"t1": "no_chat"}


def test_without_consent_there_is_no_example(journal: Journal) -> None:
    journal.add(0, kept=False, thumb="up")
    journal.add(1, thumb="up")
    examples, rejects, _ = journal.export("kto")
    assert [each["id"] for each in examples] == ["t1"]
    assert rejects == {"t0": "no_text"}


def test_one_subject_teaches_no_more_than_its_cap(journal: Journal) -> None:
    for number in range(5):
        journal.add(number, thumb="up")
    journal.add(5, subject="bob", thumb="up")
    examples, rejects, report = journal.export("kto", "--per-subject", "2")
    assert [each["id"] for each in examples] == ["t0", "t1", "t5"]
    assert set(rejects.values()) == {"cap"}
    assert (report["examples"], report["rejected"]) == (3, {"cap": 3})


def test_the_same_example_counts_once(journal: Journal) -> None:
    for number, subject in enumerate(["ada", "bob"]):
        journal.add(number, subject=subject, question=QUESTION, thumb="down", correction="Paris")
    for record in "t0", "t1":  # the same answer to both
        journal.write(
            ANSWERED,
            {
                "transaction.id": record,
                "user.id": "ada" if record == "t0" else "bob",
                "organization.id": "research",
                FIELD + "prompt": [{"role": "user", "content": QUESTION}],
                FIELD + "answer": "London",
            },
        )
    _, rejects, _ = journal.export("dpo")
    assert rejects == {"t1": "duplicate"}


def test_what_is_held_out_is_not_learned(journal: Journal, tmp_path: Path) -> None:
    journal.add(0, thumb="up")
    journal.add(1, thumb="up", question="Who wrote Faust?")
    journal.add(2, thumb="up", question="And who wrote Faust? I forgot")
    held = tmp_path / "held.jsonl"
    separated = f"Please:\u2028{QUESTION}"  # which JSON need not escape, and which ends no line of the file
    lines = {"messages": [{"role": "user", "content": separated}]}, {"prompt": "who wrote faust"}
    held.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    examples, rejects, _ = journal.export("kto", "--held-out", str(held))
    assert [each["id"] for each in examples] == ["t2"]
    assert rejects == {"t0": "held_out", "t1": "held_out"}


def test_a_rating_that_is_another_subjects_is_no_example(journal: Journal) -> None:
    journal.add(0, thumb="up")
    journal.add(1, thumb="up")
    journal.write(RATED, {"@timestamp": "2026-11-27T09", "transaction.id": "t1", "user.id": "eve",
                          "organization.id": "research", FIELD + "thumb": "down"})  # fmt: skip
    _, rejects, _ = journal.export("kto")
    assert rejects == {"t1": "foreign"}


def test_the_same_journal_gives_the_same_digest(journal: Journal, tmp_path: Path) -> None:
    journal.add(0, thumb="up")
    journal.add(1, thumb="down")
    _, _, first = journal.export("kto", "--until", "2026-11-28")
    (tmp_path / "kto").rename(tmp_path / "first")
    assert journal.export("kto", "--until", "2026-11-28")[2] == first


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--since", "2027-01-01"], "there are none"),
        (["--kind", "dpo"], "{'no_correction': 1}"),
        (["--out", "."], "which exists"),
        (["--journal", "nowhere"], "which is not a folder"),
        (["--held-out", "nowhere"], "cannot be read as UTF-8"),
    ],
)
def test_an_export_that_would_be_empty_or_nowhere_is_refused(
    journal: Journal, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], says: str
) -> None:
    journal.add(0, thumb="up")
    given = [
        "--journal",
        str(journal.folder),
        "--since",
        "2026-11-01",
        "--kind",
        "kto",
        "--out",
        str(tmp_path / "x"),
    ]
    assert main(["feedback", "export", *given, *more]) == exits.USAGE
    assert says in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_what_was_forgotten_is_taken_out_of_an_export_as_if_it_had_never_been_there(
    journal: Journal, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, subject in enumerate(["ada", "bob", "ada", "bob"]):
        journal.add(number, subject=subject, **({"thumb": "up"} if number < 2 else {"stars": 3}))
    journal.export("kto")
    ids = tmp_path / "ids"
    ids.write_text("t0\nt2\nt99\n")
    capsys.readouterr()
    assert main(["feedback", "remove", "--ids", str(ids), str(tmp_path / "kto")]) == exits.DONE
    assert capsys.readouterr().out == f"removed 2 lines from {tmp_path / 'kto'}; 0 are left\n"
    left = {path.name: path.read_text() for path in (tmp_path / "kto").iterdir()}
    for path in journal.folder.iterdir():
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if '"ada"' not in line))
    (tmp_path / "kto").rename(tmp_path / "before")
    until = json.loads(left["export.json"])["until"]
    journal.export("kto", "--until", until)
    assert left == {path.name: path.read_text() for path in (tmp_path / "kto").iterdir()}


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_a_text_may_have_what_other_programs_take_for_the_end_of_a_line(
    journal: Journal, tmp_path: Path, separator: str, capsys: pytest.CaptureFixture[str]
) -> None:
    journal.add(0, thumb="up", question=f"first{separator}second")
    journal.add(1, thumb="up")
    journal.export("kto")
    ids = tmp_path / "ids"
    ids.write_text("t1\n")
    assert main(["feedback", "remove", "--ids", str(ids), str(tmp_path / "kto")]) == exits.DONE
    assert "removed 1 lines" in capsys.readouterr().out
    assert json.loads((tmp_path / "kto/kto.jsonl").read_text())["id"] == "t0"


def test_removing_from_what_is_no_export_is_refused_and_changes_none(
    journal: Journal, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    journal.add(0, thumb="up")
    journal.export("kto")
    ids = tmp_path / "ids"
    remove = ["feedback", "remove", "--ids", str(ids), str(tmp_path / "kto")]
    assert main(remove) == exits.USAGE
    assert "specify the file written by `llm-serve feedback forget --ids`" in capsys.readouterr().err
    ids.write_text("t0\n")
    assert main([*remove, str(journal.folder)]) == exits.USAGE
    assert "has no export.json" in capsys.readouterr().err
    report = tmp_path / "kto/export.json"
    report.write_text(report.read_text().replace('"kto"', '"../kto/kto"'))
    assert main(remove) == exits.USAGE
    assert "its kind is '../kto/kto'" in capsys.readouterr().err
    assert (tmp_path / "kto/kto.jsonl").read_text()
