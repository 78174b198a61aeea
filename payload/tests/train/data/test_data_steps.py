"""Each step by itself: what it changes, drops and annotates, in Chinese and in English."""

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
from data_set import sentence, write_lines

from llmcore.detectors import is_account, is_card, is_resident_id
from llmtrain.data import settings
from llmtrain.data.annotate import Annotate, language_of
from llmtrain.data.clean import Clean
from llmtrain.data.decontaminate import Decontaminate, index
from llmtrain.data.documents import Document, Rejects
from llmtrain.data.duplicates import Drop, Sign, exact_key, originals, same_keys
from llmtrain.data.minhash import minima_of, near_keys
from llmtrain.data.personal_data import Personal
from llmtrain.data.quality import Quality
from llmtrain.data.sources import shards_of
from llmtrain.data.words import words_of
from llmtrain.exits import Refusal


@pytest.fixture
def rejects(tmp_path: Path) -> Rejects:
    """Rejects in files of this test."""
    return Rejects(tmp_path / "rejects")


def rules(rejects: Rejects) -> list[str]:
    """The rules by which documents were rejected."""
    paths = sorted(rejects.directory.glob("*.jsonl"))
    return [json.loads(line)["rule"] for path in paths for line in path.read_text().splitlines()]


def document(text: str, **metadata: Any) -> Document:
    """A document with a unique id."""
    return Document(text, f"id-{abs(hash(text))}", {"source": "raw/a.jsonl", **metadata})


@pytest.mark.parametrize(
    ("rule", "raw", "clean"),
    [
        ("newlines", "a\r\nb\rc\u2028d", "a\nb\nc\nd"),
        ("control", "a\x00b\x1bc\td", "abc\td"),
        ("invisible", "\ufeffa\u200bb\xadc", "abc"),
        ("urls", "see https://a.example/x?y=1 and WWW.b.example now", "see  and  now"),
        ("urls", "见https://a.example/路，再看", "见路，再看"),
        ("whitespace", "a  b\t c \n    d\u3000e\xa0f", "a b c\n    d e f"),
        ("blank_lines", "a\n\n\n\nb", "a\n\nb"),
        ("html_tags", "a <b>c</b> 1 < 2", "a c 1 < 2"),
        ("chinese_blanks", "中 文 and 英 文", "中文 and 英文"),
        ("repeated_punctuation", "what?????????", "what???"),
    ],
)
def test_a_cleaning_rule_changes_what_it_says(rejects: Rejects, rule: str, raw: str, clean: str) -> None:
    step = Clean(settings.Clean(unicode="none", rules=(rule,)), rejects)
    assert step.text(raw) == clean


def test_a_rule_of_ones_own_comes_after_the_tables(rejects: Rejects) -> None:
    own = settings.OwnRule(name="draft", pattern=r"\[draft \d+\] ", replace="")
    assert Clean(settings.Clean(own=(own,)), rejects).text("[draft  7] text") == "text"


def test_unicode_forms_of_a_letter_become_one(rejects: Rejects) -> None:
    assert Clean(settings.Clean(), rejects).text("e\u0301 ，") == "é ，"
    assert Clean(settings.Clean(unicode="NFKC"), rejects).text("ＡＢ，①") == "AB,1"


def test_cleaning_leaves_the_turns_of_a_conversation_apart(rejects: Rejects) -> None:
    messages = [{"role": "user", "content": "a  b"}, {"role": "assistant", "content": "c\r\nd"}]
    [cleaned] = Clean(settings.Clean(), rejects)(iter([document("", messages=messages)]))
    assert [each["content"] for each in cleaned.metadata["messages"]] == ["a b", "c\nd"]
    assert cleaned.text == "a b\n\nc\nd"


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("The state of the river is that it was in the valley.", "en"),
        ("Delete cache. Restart server.", "en"),
        ("ALL OF IT IS SHOUTED", "en"),
        ("Read it line by line:\n\nfor line in open(path):\n    print(line.strip())", "en"),
        ("Der Fluss fließt durch das Tal und wir sehen ihn.", "de"),
        ("Hallo, hoe gaat het met jou vandaag?", "nl"),
        ("这条河流经山谷，我们用 Python 看到了它。", "zh"),
        ("這條河流經山谷。", "zh"),
        ("これは日本語の文章です。", "ja"),
        ("日本語見出し発表", "ja"),
        ("Река течёт через долину.", "ru"),
        ("Привіт, як справи?", "uk"),
        ("سلام حال شما چطور است", "fa"),
        ("x", "other"),
        ("12345 !!", "none"),
    ],
)
def test_a_language_is_told_from_its_neighbours(text: str, language: str) -> None:
    assert language_of(text) == language


def test_the_domain_is_told_by_input_then_path_then_keywords(rejects: Rejects) -> None:
    domains = (
        settings.Domain(name="law", paths=("*/legal/*",), keywords=("contract", "合同")),
        settings.Domain(name="health", keywords=("patient",)),
    )
    docs = [
        document("the patient", domain="given"),
        document("the patient", source="raw/legal/a.txt"),
        document("the patient and the patient's contract"),
        document("双方签订合同。"),
        document("impatient subcontracts"),
    ]
    step = Annotate(settings.Annotate(domains=domains), rejects)
    assert [each.metadata["domain"] for each in step(iter(docs))] == ["given", "law", "health", "law", "none"]


def test_a_local_classifier_labels_what_no_rule_knows(rejects: Rejects, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="Debian's python3-torch is not installed")
    from tiny import make_tokenizer
    from transformers import LlamaConfig, LlamaForSequenceClassification

    tokenizer = make_tokenizer(tmp_path / "model")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        pad_token_id=1, id2label={0: "finance", 1: "other"}, label2id={"finance": 0, "other": 1},
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config)
    model.save_pretrained(tmp_path / "model")
    ids = tokenizer("some text", return_tensors="pt")["input_ids"]
    label = config.id2label[int(model.eval()(input_ids=ids).logits.argmax())]
    step = Annotate(settings.Annotate(classifier=tmp_path / "model"), rejects)
    [labelled] = step(iter([document("some text")]))
    assert (labelled.metadata["domain"], labelled.metadata["domain_by"]) == (label, "classifier")
    with pytest.raises(Refusal, match="cannot be loaded"):
        list(Annotate(settings.Annotate(classifier=tmp_path), rejects)(iter([document("some text")])))


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("short", "short"),
        ("x" * 101, "long_text"),
        ("=*=*" * 20 + " a", "symbols"),
        ("one and the same line\n" * 4, "repeated_lines"),
        ("again " * 16, "repetitive"),
        ("Это хороший и длинный текст.", "language"),
    ],
)
def test_quality_drops_by_the_rule_that_is_broken(rejects: Rejects, text: str, rule: str) -> None:
    options = settings.Quality(max_letters=100, languages=("en", "zh"), min_compressed=0.3)
    docs = [document(text, language="ru" if "Э" in text else "en")]
    assert not list(Quality(options, rejects)(iter(docs)))
    assert rules(rejects) == [rule]


@pytest.mark.parametrize(
    "text", [sentence(1), "这是一篇正常的文章，讲述了河流、桥梁和冬天的市场，没有任何问题。"]
)
def test_quality_lets_ordinary_text_go_on(rejects: Rejects, text: str) -> None:
    assert list(Quality(settings.Quality(), rejects)(iter([document(text)])))


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("mail zhang.san+x@corp.example.cn.", "mail <EMAIL>."),
        ("电话13812345678，或+86 139-1234-5678", "电话<PHONE>，或<PHONE>"),
        ("call +49 30 1234567 or (212) 555-0100", "call <PHONE> or <PHONE>"),
        ("from 8.8.8.8 and 2001:4860:4860::8888", "from <IP> and <IP>"),
        ("身份证11010519491231002X。", "身份证<RESIDENT_ID>。"),
        ("card 4111 1111 1111 1111", "card <CARD>"),
        ("pay to DE89 3704 0044 0532 0130 00 today", "pay to <ACCOUNT> today"),
        ("postgres://app:S3cr3tPass@db", "postgres://<CREDENTIAL>@db"),
        ("export KEY=AKIAIOSFODNN7EXAMPLE", "export KEY=<CREDENTIAL>"),
        (
            "sk-proj-abcdefGHIJKLmnopqrst and npm_abcdefghijklmnopqrstuvwxyz0123456789",
            "<CREDENTIAL> and <CREDENTIAL>",
        ),
        ("-----BEGIN PRIVATE KEY-----\nMIIB\n-----END PRIVATE KEY-----\nand on", "<CREDENTIAL>\nand on"),
        ("jwt eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOiJhIn0.c2lnbmF0dXJl", "jwt <CREDENTIAL>"),
    ],
)
def test_personal_data_is_replaced_by_its_kind(rejects: Rejects, text: str, left: str) -> None:
    [replaced] = Personal(settings.Personal(), rejects)(iter([document(text)]))
    assert replaced.text == left


@pytest.mark.parametrize(
    "text",
    [
        "id 110105194912310021",  # wrong check digit
        "card 4111 1111 1111 1112",  # wrong sum
        "at 192.168.1.10 or 127.0.0.1, version 1.2.3.400",
        "std::vector at 12:30:45, years 1990-2000, 3.14159265358979",
        "@decorator, a@b",
        "GB28 NWBK 6016 1331 9268 19",  # wrong check digits
        "see https://example.org:8443/a and sk-learn-contrib-packages, risk-based-assessments-2026",
        "password: the user's password; the token is refused; basic training",
    ],
)
def test_what_only_looks_like_personal_data_stays(rejects: Rejects, text: str) -> None:
    [kept] = Personal(settings.Personal(), rejects)(iter([document(text)]))
    assert kept.text == text


def test_a_kind_may_drop_the_document_or_stay(rejects: Rejects) -> None:
    options = settings.Personal(resident_id="drop", email="keep")
    docs = [document("身份证11010519491231002X。"), document("mail a@b.example")]
    assert [each.text for each in Personal(options, rejects)(iter(docs))] == ["mail a@b.example"]
    assert rules(rejects) == ["personal"]


def test_checksums_are_those_of_the_standards() -> None:
    assert [is_resident_id(f"11010519491231002{last}") for last in "0123456789X"] == [False] * 10 + [True]
    assert [is_card(f"411111111111111{last}") for last in range(10)].index(True) == 1
    assert [is_account(f"DE893704004405320130{last:02d}") for last in range(97)].index(True) == 0


def test_words_are_the_same_whatever_stands_between_them() -> None:
    assert words_of("Über, the RIVER!").tolist() == words_of("über the\n(river)").tolist()
    assert len(words_of("中文and英文")) == 5
    assert words_of("ab").tolist() != words_of("ba").tolist()


def test_a_long_document_has_the_words_of_its_parts() -> None:
    words = [f"w{number}" for number in range(100_000)]  # more letters than one block
    parts = [words_of(" ".join(words[start : start + 1000])) for start in range(0, len(words), 1000)]
    assert words_of(" ".join(words)).tolist() == numpy.concatenate(parts).tolist()


@pytest.mark.parametrize("share", [0.5, 0.8, 0.95])
def test_the_share_of_equal_minima_is_the_likeness_of_the_texts(share: float) -> None:
    options = settings.Near(bands=64, rows=8, words=1)
    one = [f"a{number}" for number in range(2000)]
    common = round(2 * share / (1 + share) * len(one))
    other = one[:common] + [f"b{number}" for number in range(len(one) - common)]
    first, second = (minima_of(" ".join(words), options) for words in (one, other))
    # Three standard deviations of a mean over 512 draws.
    assert abs(float((first == second).mean()) - share) < 3 * (share * (1 - share) / 512) ** 0.5


def found(
    docs: list[list[Document]], directory: Path, options: settings.Near | None, parts: int
) -> list[str]:
    """The texts that pass, from several shards."""
    bands = options.bands if options else 1

    def keys(each: Document) -> Any:
        return near_keys(options, each) if options else exact_key(each)

    for rank, shard in enumerate(docs):
        assert len(list(Sign(keys, bands, directory / "keys")(iter(shard), rank))) == len(shard)
    signed = [directory / f"keys/{rank:05d}" for rank in range(len(docs))]
    same = []
    for band in range(bands):
        for part in range(parts):
            same.append(directory / f"same-{band}-{part}")
            same[-1].mkdir(parents=True)
            same_keys(same[-1], signed, band, part, parts)
    left = []
    for rank, shard in enumerate(docs):
        (directory / f"drops-{rank}").mkdir()
        originals(directory / f"drops-{rank}", signed, same, rank)
        step = Drop(
            "near" if options else "exact",
            {rank: directory / f"drops-{rank}"},
            Rejects(directory / "rejects"),
        )
        left += [each.text for each in step(iter(shard), rank, len(docs))]
    return left


def test_of_exact_duplicates_the_first_goes_on_across_shards(tmp_path: Path) -> None:
    docs = [[document("one"), document("two")], [document("two"), document("three"), document("one")]]
    assert found(docs, tmp_path, None, 1) == ["one", "two", "three"]


def corpus() -> list[list[Document]]:
    """Three shards in which some documents differ from an earlier one by a few words."""
    shards: list[list[Document]] = [[], [], []]
    for number in range(90):
        text = sentence(number % 60, 200)
        if number >= 60:
            text = text.replace("river", "RIVER").replace(text.split()[100], "changed")
        shards[number % 3].append(Document(text, f"d{number}", {"source": "s"}))
    return shards


def test_near_duplicates_go_and_unlike_ones_stay(tmp_path: Path) -> None:
    left = found(corpus(), tmp_path, settings.Near(), 1)
    assert len(left) == 60
    reasons = [
        json.loads(line)
        for path in sorted((tmp_path / "rejects").glob("*"))
        for line in path.read_text().splitlines()
    ]
    assert {(line["id"], line["reason"]) for line in reasons} == {
        (f"d{number}", f"the same as d{number - 60}") for number in range(60, 90)
    }


def test_of_several_earlier_documents_the_earliest_is_named(tmp_path: Path) -> None:
    keys = {"a": [1, 10], "b": [2, 20], "c": [1, 20]}
    docs = [Document(name, name, {}) for name in keys]
    list(Sign(lambda each: numpy.array(keys[each.text], numpy.uint64), 2, tmp_path)(iter(docs)))
    same = [tmp_path / name for name in ("band-0", "band-1")]
    for band, directory in enumerate(same):
        directory.mkdir()
        same_keys(directory, [tmp_path / "00000"], band, 0, 1)
    originals(tmp_path, [tmp_path / "00000"], same, 0)
    assert json.loads((tmp_path / "drops.json").read_text()) == {"2": "a"}


def test_how_keys_are_cut_into_ranges_changes_nothing(tmp_path: Path) -> None:
    whole, cut = (found(corpus(), tmp_path / str(parts), settings.Near(), parts) for parts in (1, 7))
    assert cut == whole


def test_what_has_a_run_of_words_of_the_evaluation_set_goes(rejects: Rejects, tmp_path: Path) -> None:
    asked = sentence(5, 40)
    short = "what is the oldest bridge over this cold river"
    path = write_lines(tmp_path / "eval.jsonl", [{"text": asked}, {"text": short}, {"text": "too short"}])
    options = settings.Decontaminate(against=(settings.Input(path=str(path)),))
    [group] = shards_of(options.against, 64)
    result = index(tmp_path, options, settings.Reading(), group)
    assert (result["looked_for"], result["too_short"]) == (2, 1)
    middle = " ".join(asked.split()[10:23])
    docs = [
        document(f"before {middle.upper()}, after"),
        document(f"{sentence(9)}. What is the oldest bridge over this cold river?"),
        document(" ".join(asked.split()[10:22]) + " and else"),  # one word less
        document("too short"),
    ]
    step = Decontaminate(tmp_path, rejects)
    words = asked.split()
    assert [step.contaminated(" ".join(words[start : start + 13])) for start in range(28)] == [13] * 28
    left = list(step(iter(docs)))
    assert left == docs[2:]
    assert rules(rejects) == ["contaminated", "contaminated"]


def test_minima_do_not_depend_on_the_process() -> None:
    # Written down once: a change here makes every kept signature worthless, and must be meant.
    least = minima_of("the river runs through the valley in winter", settings.Near(bands=1, rows=4))
    assert least.dtype == numpy.uint32
    assert least.tolist() == MINIMA


MINIMA = [206040603, 875275244, 460518425, 298008744]
