"""The gate: statistics that do not promote by chance, on scores that are what the models say."""

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
from tiny import make_model, make_reciter, make_tokenizer

from llmcore.manifest import write_manifest
from llmtrain import exits, held_out, verdict
from llmtrain.cli import main
from llmtrain.compare import alternating
from llmtrain.exits import Refusal
from llmtrain.rows import SOURCES
from llmtrain.scores import Subject, exact, f1, load
from llmtrain.verdict import Margins, Pace, Paired, Rule

torch = pytest.importorskip("torch", reason="Debian's python3-torch is not installed")
QUICK = Rule(resamples=1000)
Draw = Callable[[numpy.random.Generator], list[Paired]]
NO_PACE: dict[str, Any] = {}


# ---------------------------------------------------------------- statistics, on scores that are made up
def answers(random: numpy.random.Generator, rows: int, old: float, new: float, alike: float) -> list[Paired]:
    """Two models that are right with these probabilities, and give the same answer to so large a share of the rows."""
    luck = random.random(rows)
    own = numpy.where(random.random(rows) < alike, luck, random.random(rows))
    before, after = (luck < old).astype(float), (own < new).astype(float)
    partly = random.random(rows) * 0.5
    return [
        Paired("exact", before, after, 0.02),
        Paired("f1", numpy.maximum(before, partly), numpy.maximum(after, partly), 0.02),
    ]


def texts(random: numpy.random.Generator, rows: int, times: float) -> list[Paired]:
    """Documents of which NEW takes so many times the bits, and noise in both."""
    sizes = random.integers(200, 4000, rows).astype(float)
    bits = 4 * sizes * random.gamma(40, 1 / 40, rows)
    noise = random.normal(1, 0.03, (2, rows))
    return [
        Paired("bits_per_byte", bits * noise[0], bits * noise[1] * times, 0.01, sizes, lower_is_better=True)
    ]


def verdicts(draw: Draw, times: int, rule: Rule = QUICK) -> Counter[str]:
    """What so many sets come to, each drawn anew."""
    return Counter(
        verdict.judge(draw(numpy.random.default_rng(seed)), NO_PACE, rule, same=False)[0]
        for seed in range(times)
    )


@pytest.mark.parametrize(
    "draw",
    [
        lambda random: answers(random, 240, 0.6, 0.6, alike=0.0),
        lambda random: answers(random, 240, 0.6, 0.6, alike=0.97),
        lambda random: answers(random, 400, 0.05, 0.05, alike=0.9),
        lambda random: texts(random, 40, 1.0),
        lambda random: answers(random, 300, 0.5, 0.5, alike=0.5) + texts(random, 60, 1.0),
    ],
    ids=["nothing alike", "few rows differ", "both mostly wrong", "texts", "all metrics"],
)
def test_of_two_equal_models_at_most_one_in_twenty_is_promoted(draw: Draw) -> None:
    assert verdicts(draw, 300)["promote"] <= 15


def test_of_two_models_that_differ_in_few_rows_none_is_promoted_by_those_alone() -> None:
    """Five wins and no loss: the bootstrap's interval lies above 0, and chance does the same once in 32 times."""
    before, after = numpy.zeros(240), numpy.zeros(240)
    after[:5] = 1
    found = verdict.measure(Paired("exact", before, after, 0.02), QUICK, tail=0.0125)
    assert found.interval[0] > 0
    assert found.finding == "not worse"


@pytest.mark.parametrize(
    "draw",
    [
        lambda random: answers(random, 600, 0.6, 0.5, alike=0.9),
        lambda random: texts(random, 60, 1.05),
        lambda random: answers(random, 600, 0.6, 0.8, alike=0.9) + texts(random, 60, 1.05),
    ],
    ids=["answers", "texts", "better answers, worse texts"],
)
def test_a_planted_regression_is_rejected(draw: Draw) -> None:
    assert verdicts(draw, 60)["reject"] >= 57


def test_a_loss_that_is_certain_and_within_its_margin_is_no_reason_to_reject() -> None:
    before, after = numpy.zeros(8000), numpy.zeros(8000)
    before[:4000], after[:3960] = 1, 1
    found = verdict.measure(Paired("exact", before, after, 0.02), QUICK, tail=0.025)
    assert found.interval[1] < 0
    assert found.finding == "not worse"


def test_a_loss_that_is_certain_and_perhaps_within_its_margin_is_unclear() -> None:
    before, after = numpy.ones(600), numpy.ones(600)
    after[:15] = 0
    found = verdict.measure(Paired("exact", before, after, 0.02), QUICK, tail=0.025)
    assert found.interval[0] < -0.02 < found.interval[1] < 0
    assert found.finding == "unclear"


def test_a_planted_improvement_is_promoted() -> None:
    assert verdicts(lambda random: answers(random, 600, 0.6, 0.7, alike=0.9), 60)["promote"] >= 57


def test_a_gain_is_no_reason_where_it_is_not_clear_that_nothing_is_worse() -> None:
    random = numpy.random.default_rng(0)
    better = answers(random, 600, 0.6, 0.8, alike=0.9)
    unclear = texts(random, 30, 1.008)
    said, reasons, found = verdict.judge([*better, *unclear], NO_PACE, QUICK, same=False)
    assert found["bits_per_byte"]["finding"] == "unclear"
    assert found["bits_per_byte"]["margin"] == pytest.approx(0.01 * found["bits_per_byte"]["old"])
    assert found["bits_per_byte"]["old"] == pytest.approx(4, rel=0.2)
    assert (said, reasons[0]) == ("hold", "this set does not tell whether NEW is worse by bits_per_byte")
    assert f"about {found['bits_per_byte']['rows_to_tell']} rows would tell" in reasons[-1]


def test_so_many_rows_as_it_asks_for_do_tell() -> None:
    random = numpy.random.default_rng(1)
    few = answers(random, 150, 0.6, 0.6, alike=0.9)[0]
    found = verdict.measure(few, QUICK, tail=0.025)
    assert found.finding == "unclear"
    assert found.rows_to_tell is not None
    times = math.ceil(2 * found.rows_to_tell / 150)
    more = Paired("exact", numpy.tile(few.old, times), numpy.tile(few.new, times), 0.02)
    assert verdict.measure(more, QUICK, tail=0.025).finding != "unclear"


def test_a_model_that_gives_no_numbers_is_rejected() -> None:
    good = texts(numpy.random.default_rng(0), 40, 0.9)[0]
    after = good.new.copy()
    after[7] = math.nan
    said, reasons, found = verdict.judge(
        [Paired("bits_per_byte", good.old, after, 0.01, good.weights, lower_is_better=True)],
        NO_PACE,
        QUICK,
        same=False,
    )
    assert (said, reasons[1]) == ("reject", "bits_per_byte: NEW gives no numbers")
    json.dumps(found, allow_nan=False)


def test_the_same_bytes_are_never_promoted() -> None:
    better = answers(numpy.random.default_rng(0), 600, 0.2, 0.8, alike=0.9)
    assert verdict.judge(better, NO_PACE, QUICK, same=True)[0] == "hold"


def test_a_margin_of_null_is_told_and_not_judged() -> None:
    worse = answers(numpy.random.default_rng(0), 600, 0.8, 0.2, alike=0.9)
    told = [Paired(each.name, each.old, each.new, None) for each in worse]
    said, reasons, _ = verdict.judge(told, NO_PACE, QUICK, same=False)
    assert said == "hold"
    assert reasons[1].endswith(": not judged")


@pytest.mark.parametrize(("times", "finding"), [(1.0, "not worse"), (2.0, "worse"), (1.25, "unclear")])
def test_latency_is_judged_by_the_same_prompts_in_turn(times: float, finding: str) -> None:
    random = numpy.random.default_rng(1)
    rounds = random.normal(1, 0.05, (2, 8, 4))
    told = Pace(rounds[0], rounds[1] * times, 32).told(QUICK)
    assert told["finding"] == finding
    assert told["ratio"] == pytest.approx(times, rel=0.1)
    assert told["old"]["tokens_per_second"] == pytest.approx(32, rel=0.1)


def test_who_answers_first_changes_each_round_and_the_first_round_is_dropped() -> None:
    asked_of: list[str] = []

    class Clock:
        """Takes so many seconds for its n-th answer."""

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


def test_a_model_that_is_certainly_too_slow_is_rejected_and_the_rule_may_allow_it() -> None:
    better = answers(numpy.random.default_rng(0), 600, 0.5, 0.8, alike=0.9)
    pace = Pace(numpy.ones((8, 4)), numpy.full((8, 4), 3.0), 32)
    assert verdict.judge(better, pace.told(QUICK), QUICK, same=False)[0] == "reject"
    patient = QUICK.model_copy(update={"speed": verdict.Speed(slower=None)})
    assert verdict.judge(better, pace.told(patient), patient, same=False)[0] == "promote"


@pytest.mark.parametrize(
    ("rows", "needed"),
    [
        ({"exact": 216, "f1": 216}, 217),
        ({"exact": 5000, "f1": 5000, "bits_per_byte": 29}, 30),
        ({"choice": 29}, 30),
    ],
)
def test_a_set_that_is_too_small_is_told_how_many_rows_it_needs(rows: dict[str, int], needed: int) -> None:
    assert f"{needed} are needed at least" in verdict.too_small(Rule(), rows)
    assert verdict.too_small(Rule(), {name: max(count, needed) for name, count in rows.items()}) == ""


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
    """Where models lie."""
    return tmp_path_factory.mktemp("gate")


def with_manifest(directory: Path) -> Path:
    """The model, with what verifies it beside it."""
    write_manifest(directory, directory.parent / f"{directory.name}.sha256")
    return directory


@pytest.fixture(scope="module")
def right(folder: Path) -> Path:
    """A model that says "Paris" whatever it is asked."""
    make_reciter(folder / "right", "Paris")
    return with_manifest(folder / "right")


@pytest.fixture(scope="module")
def wrong(folder: Path) -> Path:
    """One that says "Lyon"."""
    make_reciter(folder / "wrong", "Lyon")
    return with_manifest(folder / "wrong")


@pytest.fixture(scope="module")
def random_model(folder: Path) -> Path:
    """A random Llama, in float32."""
    make_model(folder / "random", torch.float32)
    return with_manifest(folder / "random")


@pytest.fixture(scope="module")
def subject(random_model: Path) -> Subject:
    """It, loaded."""
    torch.set_num_threads(1)
    return load("OLD", random_model, None, "auto")


def asked(*questions: str, choices: list[str] | None = None) -> list[held_out.Asked]:
    """Rows."""
    return [
        held_out.Asked(number, question, [{"role": "user", "content": question}], "", choices or [])
        for number, question in enumerate(questions, 1)
    ]


def test_answers_in_a_batch_are_those_that_each_question_gets_alone(subject: Subject) -> None:
    rows = asked(
        "what is the capital?", "a", "Über 東京, what is the capital of France, and why is it that one?"
    )
    together = subject.answers(rows, 16, batch=3, told=lambda _: None)
    assert together == [subject.answers([row], 16, batch=1, told=lambda _: None)[0] for row in rows]
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
    from llmtrain.scores import chosen

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
    """Run `llm-train compare`; the verdict lies in folder/verdict.json."""
    rule = folder / "gate.yaml"
    rule.write_text(json.dumps(EASY))
    data = written(folder / "eval.jsonl", rows)
    argv = ["compare", str(old), str(new), "--data", str(data), "--rule", str(rule)]
    return main([*argv, "--out", str(folder / "verdict.json"), *more])


def told(folder: Path) -> dict[str, Any]:
    """The verdict that was written."""
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
    assert "promote: NEW is better by exact, f1, and worse by nothing" in out.out
    assert "tokens a second" in out.out
    assert "France" not in out.out + out.err + json.dumps(found)


def test_a_worse_model_is_rejected(tmp_path: Path, right: Path, wrong: Path) -> None:
    assert gate(tmp_path, right, wrong) == exits.NOT_BETTER
    assert told(tmp_path)["verdict"] == "reject"


def test_a_model_against_itself_is_held(tmp_path: Path, right: Path) -> None:
    assert gate(tmp_path, right, right) == exits.NOT_BETTER
    assert told(tmp_path)["reasons"][0] == "OLD and NEW are the same model, byte by byte"


def test_a_copy_of_a_model_with_another_name_makes_no_difference(tmp_path: Path, right: Path) -> None:
    shutil.copytree(right, tmp_path / "copy")
    (tmp_path / "copy" / "README.md").write_text("another one, it says\n")
    assert gate(tmp_path, right, with_manifest(tmp_path / "copy"), QUESTIONS + TEXTS) == exits.NOT_BETTER
    found = told(tmp_path)
    assert (found["verdict"], found["reasons"][0]) == ("hold", "no difference that this set can show")
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
    assert "NEW's logits are no numbers" in capsys.readouterr().err


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
        assert "is among the data that" in capsys.readouterr().err
    (rows / SOURCES).write_text("0" * 64)
    assert gate(tmp_path, wrong, tmp_path / "job" / "model") == exits.DONE
    assert "not known" not in capsys.readouterr().out
    (rows / SOURCES).unlink()
    assert gate(tmp_path, wrong, tmp_path / "job" / "model") == exits.DONE
    assert "which files NEW learned from is told nowhere" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (QUESTIONS[:29], "30 are needed at least"),
        ([*QUESTIONS, QUESTIONS[3]], "line 34 is the same row as line 4"),
        ([{"question": "SECRET"}], "line 1 cannot be used"),
        ([{"question": "SECRET", "answer": 3}], "an answer is a string"),
        ([{"question": "SECRET", "answer": 3, "choices": ["a", "b"]}], "none of the choices"),
        ([{"question": "SECRET", "answer": "a", "choices": ["a", "a"]}], "two choices are the same"),
        ([{"text": "SECRET", "answer": "a"}], "make two rows of it"),
        ([{"text": ""}], "line 1 cannot be used: text"),
        ([], "has no row"),
        ([{"question": "SECRET " * 3000, "answer": "a"}, *QUESTIONS], "row 1 comes to"),
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
