"""The gate: scores match the models' answers, and the command reports its verdict."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny import make_model, make_reciter, make_tokenizer

from llmcore.manifest import write_manifest
from llmtrain import exits
from llmtrain.cli import main
from llmtrain.data.rows import SOURCES
from llmtrain.exits import Refusal
from llmtrain.gate import held_out, verdict
from llmtrain.gate.compare import alternating
from llmtrain.gate.scores import Subject, exact, f1, load
from llmtrain.gate.verdict import Margins, Rule

torch = pytest.importorskip("torch", reason="Debian's python3-torch is not installed")


# ---------------------------------------------------------------- scores
@pytest.mark.parametrize(
    ("said", "wanted", "same", "overlap"),
    [
        ("Paris ", "Paris", 1, 1),
        ("paris", "Paris", 0, 1),
        ("It is Paris.", "Paris", 0, 0.5),
        ("a < b", "a > b", 0, 1),
        ("北京", "北京市", 0, 0.8),
        ("ＡＢＣ　1", "ABC 1", 1, 1),
        ("", "Paris", 0, 0),
        ("!", "?", 0, 0),
    ],
)
def test_answers_are_compared_as_text_and_as_words(
    said: str, wanted: str, same: float, overlap: float
) -> None:
    assert exact(said, wanted) == same
    assert f1(said, wanted) == pytest.approx(overlap)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of models."""
    return tmp_path_factory.mktemp("gate")


def with_manifest(directory: Path) -> Path:
    """Save the model with its manifest."""
    write_manifest(directory, directory.parent / f"{directory.name}.sha256")
    return directory


@pytest.fixture(scope="module")
def right(folder: Path) -> Path:
    """A model that answers every prompt with "Paris"."""
    make_reciter(folder / "right", "Paris")
    return with_manifest(folder / "right")


@pytest.fixture(scope="module")
def wrong(folder: Path) -> Path:
    """A model that answers every prompt with "Lyon"."""
    make_reciter(folder / "wrong", "Lyon")
    return with_manifest(folder / "wrong")


@pytest.fixture(scope="module")
def random_model(folder: Path) -> Path:
    """A random Llama, in float32."""
    make_model(folder / "random", torch.float32)
    return with_manifest(folder / "random")


@pytest.fixture(scope="module")
def subject(random_model: Path) -> Subject:
    """The loaded model."""
    torch.set_num_threads(1)
    return load("OLD", random_model, None, "auto")


def asked(*questions: str, choices: list[str] | None = None) -> list[held_out.Asked]:
    """Write rows as JSONL."""
    return [
        held_out.Asked(number, question, [{"role": "user", "content": question}], "", choices or [])
        for number, question in enumerate(questions, 1)
    ]


def test_who_answers_first_changes_each_round_and_the_first_round_is_dropped() -> None:
    asked_of: list[str] = []

    class Clock:
        """Takes the given number of seconds for its n-th answer."""

        def __init__(self, side: str) -> None:
            self.side, self.answers = side, 0

        def prompt(self, _: held_out.Asked) -> list[int]:
            return [1]

        def seconds(self, _: list[int], tokens: int) -> float:
            asked_of.append(self.side)
            self.answers += 1
            return float(self.answers)

    rule = Rule(speed=verdict.Speed(rounds=4, prompts=1, tokens=8))
    data = held_out.HeldOut("", asked("a"), [], [])
    sides: list[Any] = [Clock("old"), Clock("new")]
    pace = alternating(sides, data, rule)
    assert asked_of == ["new", "old", "old", "new", "new", "old", "old", "new"]
    assert pace.old.tolist() == pace.new.tolist() == [[2.0], [3.0], [4.0]]


def test_answers_in_a_batch_are_those_that_each_question_gets_alone(subject: Subject) -> None:
    rows = asked(
        "what is the capital?", "a", "Über 東京, what is the capital of France, and why is it that one?"
    )
    together = subject.answers(rows, 16, batch=3, progress=lambda _: None)
    assert together == [subject.answers([row], 16, batch=1, progress=lambda _: None)[0] for row in rows]
    assert len(set(together)) > 1


def test_a_choice_is_as_likely_as_its_tokens_one_after_the_other(subject: Subject) -> None:
    (row,) = asked("which?", choices=["Paris", "the capital of Lyon", "x"])
    prompt = subject.prompt(row)
    for choice, found in zip(row.choices, subject.choices(row), strict=True):
        ids, nats = list(prompt), 0.0
        for token in subject.tokenizer(choice, add_special_tokens=False).input_ids:
            with torch.inference_mode():
                said = subject.model(torch.tensor([ids])).logits[0, -1]
            nats += float(torch.log_softmax(said, -1)[token])
            ids.append(token)
        assert found == pytest.approx(nats, rel=1e-4)


@pytest.mark.parametrize("context", [1024, 7])
def test_the_bits_of_a_text_are_those_of_each_token_after_what_was_seen(
    subject: Subject, context: int
) -> None:
    text = "The quick brown fox, Über 東京."
    ids = subject.tokenizer(text).input_ids
    nats = 0.0
    for place in range(1, len(ids)):
        begin = (place - 1) // (context - 1) * (context - 1)
        with torch.inference_mode():
            said = subject.model(torch.tensor([ids[begin:place]])).logits[0, -1]
        nats -= float(torch.log_softmax(said, -1)[ids[place]])
    bits, predicted = subject.bits(text, context)
    assert bits == pytest.approx(nats / math.log(2), rel=1e-4)
    assert predicted == len(ids) - 1


def test_the_longer_choice_is_not_at_a_disadvantage_where_length_is_taken_out() -> None:
    from llmtrain.gate.scores import chosen

    row = held_out.Asked(1, "", [], choices=["no", "certainly"], right=1)
    assert chosen([-4.0, -9.0], row) == (0.0, 1.0)
    assert all(map(math.isnan, chosen([-4.0, math.nan], row)))


# ---------------------------------------------------------------- the command
EASY = {
    "alpha": 0.2,
    "resamples": 1000,
    "max_tokens": 8,
    "margins": {"exact": 0.1, "f1": 0.1, "choice_normalised": 0.1},
    "speed": {"slower": None, "rounds": 4, "prompts": 1, "tokens": 4},
}
QUESTIONS: list[dict[str, Any]] = [
    {"question": f"what is the capital of France, asked {number} times?", "answer": "Paris"}
    for number in range(33)
]
TEXTS: list[dict[str, Any]] = [
    {"text": f"The capital of France, written {number} times."} for number in range(33)
]


def written(path: Path, rows: list[Any]) -> Path:
    """A held-out set."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def gate(folder: Path, old: Path, new: Path | str, rows: list[Any] = QUESTIONS, *more: str) -> int:
    """Run `llm-train compare`; the verdict is in folder/verdict.json."""
    rule = folder / "gate.yaml"
    rule.write_text(json.dumps(EASY))
    data = written(folder / "eval.jsonl", rows)
    argv = ["compare", str(old), str(new), "--data", str(data), "--rule", str(rule)]
    return main([*argv, "--out", str(folder / "verdict.json"), *more])


def told(folder: Path) -> dict[str, Any]:
    """The written verdict."""
    content: dict[str, Any] = json.loads((folder / "verdict.json").read_text())
    return content


def test_a_better_model_is_promoted(
    tmp_path: Path, right: Path, wrong: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gate(tmp_path, wrong, right) == exits.DONE
    found = told(tmp_path)
    assert found["verdict"] == "promote"
    assert (found["metrics"]["exact"]["old"], found["metrics"]["exact"]["new"]) == (0, 1)
    out = capsys.readouterr()
    assert "promote: NEW is better by exact, f1, and not worse by any metric" in out.out
    assert "tokens/s" in out.out
    assert "France" not in out.out + out.err + json.dumps(found)


def test_a_worse_model_is_rejected(tmp_path: Path, right: Path, wrong: Path) -> None:
    assert gate(tmp_path, right, wrong) == exits.NOT_BETTER
    assert told(tmp_path)["verdict"] == "reject"


def test_a_model_against_itself_is_held(tmp_path: Path, right: Path) -> None:
    assert gate(tmp_path, right, right) == exits.NOT_BETTER
    assert told(tmp_path)["reasons"][0] == "OLD and NEW are the same model, byte for byte"


def test_a_copy_of_a_model_with_another_name_makes_no_difference(tmp_path: Path, right: Path) -> None:
    shutil.copytree(right, tmp_path / "copy")
    (tmp_path / "copy" / "README.md").write_text("another one, it says\n")
    assert gate(tmp_path, right, with_manifest(tmp_path / "copy"), QUESTIONS + TEXTS) == exits.NOT_BETTER
    found = told(tmp_path)
    assert (found["verdict"], found["reasons"][0]) == ("hold", "this set shows no difference")
    assert found["old"]["model"] != found["new"]["model"]


def test_choices_are_told_apart_by_their_likelihood(tmp_path: Path, right: Path, wrong: Path) -> None:
    rows = [
        {
            "question": f"which, for the {number}th time?",
            "choices": ["Lyon", "Paris"],
            "answer": 1 if number % 2 else "Paris",
        }
        for number in range(30)
    ]
    assert gate(tmp_path, wrong, right, rows) == exits.DONE
    assert told(tmp_path)["metrics"]["choice"]["new"] == 1


def test_the_verdict_names_both_models_the_data_and_the_rule_by_their_digests(
    tmp_path: Path, right: Path, wrong: Path
) -> None:
    import hashlib

    gate(tmp_path, wrong, right)
    found = told(tmp_path)
    for side, model in (("old", wrong), ("new", right)):
        manifest = model.parent / f"{model.name}.sha256"
        assert found[side]["model"] == hashlib.sha256(manifest.read_bytes()).hexdigest()
        assert found[side]["adapter"] is None
    assert found["data"]["sha256"] == hashlib.sha256((tmp_path / "eval.jsonl").read_bytes()).hexdigest()
    before = found["rule"]["sha256"]
    EASIER = {**EASY, "seed": 7}
    (tmp_path / "other.yaml").write_text(json.dumps(EASIER))
    gate(tmp_path, wrong, right, QUESTIONS, "--rule", str(tmp_path / "other.yaml"))
    assert told(tmp_path)["rule"]["sha256"] != before


def test_texts_of_models_with_other_tokenizers_are_judged_per_byte_alone(
    tmp_path: Path, random_model: Path, right: Path
) -> None:
    shutil.copytree(right, tmp_path / "other")
    make_tokenizer(tmp_path / "other")
    tokenizer = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = []
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(tokenizer))
    gate(tmp_path, random_model, with_manifest(tmp_path / "other"), TEXTS)
    found = told(tmp_path)
    assert found["perplexity_per_token"] is None
    assert any("tokenizers differ" in reason for reason in found["reasons"])
    assert found["metrics"]["bits_per_byte"]["old"] > 0
    gate(tmp_path, random_model, right, TEXTS)
    assert told(tmp_path)["perplexity_per_token"]["old"] > 1


def test_an_altered_model_is_not_loaded(
    tmp_path: Path, right: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(right, tmp_path / "altered")
    with_manifest(tmp_path / "altered")
    weights = tmp_path / "altered" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert gate(tmp_path, right, tmp_path / "altered") == exits.ALTERED
    assert "its manifest says" in capsys.readouterr().err


def test_a_model_without_a_manifest_is_not_loaded(tmp_path: Path, right: Path) -> None:
    shutil.copytree(right, tmp_path / "bare")
    assert gate(tmp_path, right, tmp_path / "bare") == exits.ALTERED


def test_a_model_whose_weights_are_no_numbers_is_told_so(
    tmp_path: Path, right: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(right, tmp_path / "broken")
    weights = load_file(tmp_path / "broken" / "model.safetensors")
    weights["model.norm.weight"].fill_(math.nan)
    save_file(weights, tmp_path / "broken" / "model.safetensors", {"format": "pt"})
    assert gate(tmp_path, right, with_manifest(tmp_path / "broken")) == exits.UNHEALTHY
    assert "NEW's logits are NaN" in capsys.readouterr().err


def test_a_set_that_the_model_learned_from_is_refused(
    tmp_path: Path, right: Path, wrong: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = written(tmp_path / "seen.jsonl", QUESTIONS)
    shutil.copytree(right, tmp_path / "job" / "model")
    with_manifest(tmp_path / "job" / "model")
    digest = held_out.read(data).sha256
    training, rows = tmp_path / "job" / "training.json", tmp_path / "rows"
    rows.mkdir()
    for file, content in (
        (training, {"job": {}, "sources": [{"sha256": digest}]}),
        (rows / SOURCES, digest),
    ):
        training.write_text(json.dumps({"job": {"data": {"train": str(rows), "eval": None}}}))
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        assert gate(tmp_path, wrong, tmp_path / "job" / "model") == exits.USAGE
        assert "is among the training data of" in capsys.readouterr().err
    (rows / SOURCES).write_text("0" * 64)
    assert gate(tmp_path, wrong, tmp_path / "job" / "model") == exits.DONE
    assert "not known" not in capsys.readouterr().out
    (rows / SOURCES).unlink()
    assert gate(tmp_path, wrong, tmp_path / "job" / "model") == exits.DONE
    assert "NEW's training files are not recorded" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (QUESTIONS[:29], "at least 30 are needed"),
        ([*QUESTIONS, QUESTIONS[3]], "line 34 is the same row as line 4"),
        ([{"question": "SECRET"}], "line 1 cannot be used"),
        ([{"question": "SECRET", "answer": 3}], "an answer is a string"),
        ([{"question": "SECRET", "answer": 3, "choices": ["a", "b"]}], "neither one of the choices"),
        ([{"question": "SECRET", "answer": "a", "choices": ["a", "a"]}], "two choices are the same"),
        ([{"text": "SECRET", "answer": "a"}], "make two rows of it"),
        ([{"text": ""}], "line 1 cannot be used: text"),
        ([], "has no row"),
        ([{"question": "SECRET " * 3000, "answer": "a"}, *QUESTIONS], "row 1 has"),
    ],
    ids=[
        "short",
        "twice",
        "no answer",
        "number",
        "choice",
        "same choices",
        "both",
        "empty",
        "nothing",
        "long",
    ],
)
def test_a_held_out_set_that_cannot_be_used_is_refused_by_line_and_never_quoted(
    rows: list[Any], words: str, tmp_path: Path, right: Path, wrong: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gate(tmp_path, wrong, right, rows) == exits.USAGE
    said = capsys.readouterr().err
    assert words in said
    assert "SECRET" not in said
    assert not (tmp_path / "verdict.json").exists()


def test_a_rule_with_a_typo_is_refused(
    tmp_path: Path, right: Path, wrong: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "typo.yaml").write_text("margin: {exact: 0.1}\n")
    assert gate(tmp_path, wrong, right, QUESTIONS, "--rule", str(tmp_path / "typo.yaml")) == exits.USAGE
    assert "unknown key 'margin'" in capsys.readouterr().err


def test_a_directory_that_is_not_there_is_told(tmp_path: Path, right: Path) -> None:
    assert gate(tmp_path, right, f"{right}+{tmp_path}/nothing") == exits.USAGE


def test_margins_name_the_metrics_that_there_are() -> None:
    assert set(Margins.model_fields) == {"exact", "f1", "choice", "choice_normalised", "bits_per_byte"}
    with pytest.raises(Refusal):
        held_out.read(Path("/nowhere"))
