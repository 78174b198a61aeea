"""The queue of badly rated answers, and what experts write about them, in a journal as gateways write it."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from scripted_opa import ALLOWED

from llmcore.ratings import ANSWERED, FIELD, RATED, REVIEWED, Record, files, liked, read
from llmserve.access.decision import PolicyUnavailable, parse_decision
from llmserve.access.identity import Identity
from llmserve.api.errors import ApiError
from llmserve.cli import main
from llmserve.feedback import journal, reviews
from llmserve.feedback.ratings import now

EVE = Identity("api_key", "1", "eve", "quality", ("expert",))
DOWN: Record = {"thumb": "down"}


def add(
    folder: Path, number: int, tenant: str = "research", *, kept: bool = True, hour: int = 8, **said: object
) -> str:
    """A rated exchange; its transaction."""
    transaction = f"{number:016x}"
    head = {
        "@timestamp": f"2025-11-27T{hour:02d}:00:{number:02d}.000+00:00",
        "transaction.id": transaction,
        "user.id": "ada",
        "organization.id": tenant,
    }
    answer = {FIELD + "prompt": [{"role": "user", "content": f"question {number}"}], FIELD + "answer": "no"}
    rating = {FIELD + name: value for name, value in said.items()}
    journal.append(folder, [(RATED, head | rating), *([(ANSWERED, head | answer)] if kept else [])])
    return transaction


def waiting(folder: Path, *tenants: str) -> list[str]:
    return [each.transaction for each in reviews.queue(folder, tenants or ["research"], 20)[0]]


def review(folder: Path, transaction: str, correction: str = "yes", reviewer: Identity = EVE) -> bool:
    found = reviews.item(folder, ["research"], transaction)
    assert found
    return reviews.keep(folder, found, reviews.written(found, reviewer, correction, ["factual"]))


def reviewed(folder: Path) -> list[Record]:
    return [record for path in files(folder, REVIEWED) for record in read(path)]


def test_what_is_badly_rated_waits_the_oldest_first(tmp_path: Path) -> None:
    late = add(tmp_path, 3, hour=9, **DOWN)
    early = add(tmp_path, 2, stars=2, reason="wrong", comment="no")
    others: list[Record] = [{"thumb": "up"}, {"stars": 3}, {"stars": 5}, {"correction": "x"}]
    for number, said in enumerate(others, 4):
        add(tmp_path, number, **said)
    assert waiting(tmp_path) == [early, late]
    [first, _], count, _ = reviews.queue(tmp_path, ["research"], 20)
    assert count == 2
    assert (first.rating[FIELD + "comment"], first.answer[FIELD + "answer"], first.review) == (
        "no",
        "no",
        None,
    )
    [only], count, _ = reviews.queue(tmp_path, ["research"], 1)
    assert (only.transaction, count) == (early, 2)


def test_the_last_rating_decides_whether_it_is_bad(tmp_path: Path) -> None:
    add(tmp_path, 1, **DOWN)
    add(tmp_path, 1, kept=False, thumb="up")
    again = add(tmp_path, 2, thumb="up")
    add(tmp_path, 2, kept=False, **DOWN)
    assert waiting(tmp_path) == [again]
    assert reviews.queue(tmp_path, ["research"], 20)[1] == 1


def test_a_later_rating_waits_again_and_the_same_review_is_kept_of_it(tmp_path: Path) -> None:
    transaction = add(tmp_path, 1, **DOWN)
    assert review(tmp_path, transaction)
    assert waiting(tmp_path) == []
    [answered] = [record for path in files(tmp_path, RATED) for record in read(path)]
    while (moment := now()) <= reviewed(tmp_path)[-1]["@timestamp"]:
        pass
    later = answered | {"@timestamp": moment, FIELD + "comment": "still wrong"}
    journal.append(tmp_path, [(RATED, later)])
    assert waiting(tmp_path) == [transaction]
    for _ in range(2):
        assert review(tmp_path, transaction)
        assert waiting(tmp_path) == []
    assert len(reviewed(tmp_path)) == 2


def test_answers_of_other_tenants_and_those_without_text_are_not_shown(tmp_path: Path) -> None:
    foreign = add(tmp_path, 1, "other", **DOWN)
    unkept = add(tmp_path, 2, kept=False, **DOWN)
    assert waiting(tmp_path) == []
    assert waiting(tmp_path, "other") == [foreign]
    assert waiting(tmp_path, "research", "other") == [foreign]
    for transaction in foreign, unkept, "0" * 16, "../rated", "":
        assert reviews.item(tmp_path, ["research"], transaction) is None
    assert reviews.queue(tmp_path, [], 20) == ([], 0, 0)


def test_bad_ratings_whose_answer_is_on_another_host_are_counted(tmp_path: Path) -> None:
    add(tmp_path, 1, kept=False, **DOWN)
    add(tmp_path, 2, kept=False, thumb="up")
    add(tmp_path, 3, "other", kept=False, **DOWN)
    assert reviews.queue(tmp_path, ["research"], 20) == ([], 0, 1)


def test_an_answer_of_another_subject_with_the_same_id_is_not_shown(tmp_path: Path) -> None:
    transaction = add(tmp_path, 1, kept=False, **DOWN)
    forged = {
        "transaction.id": transaction,
        "user.id": "bob",
        "organization.id": "other",
        FIELD + "answer": "secret",
    }
    journal.append(tmp_path, [(ANSWERED, forged)])
    assert waiting(tmp_path) == []
    assert reviews.item(tmp_path, ["research"], transaction) is None


def test_an_id_in_a_prompt_is_no_id(tmp_path: Path) -> None:
    prompt = {FIELD + "prompt": '"transaction.id":"0000000000000001"', FIELD + "answer": "no"}
    journal.append(
        tmp_path, [(ANSWERED, {"user.id": "bob", "organization.id": "other", "transaction.id": "2"} | prompt)]
    )
    assert reviews.places(tmp_path, ["0000000000000001"]) == {}
    assert list(reviews.places(tmp_path, ["2"])) == ["2"]


def test_a_review_takes_an_answer_out_of_the_queue_and_is_found_with_it(tmp_path: Path) -> None:
    transaction = add(tmp_path, 1, **DOWN)
    assert review(tmp_path, transaction, "Paris, as sk-0123456789abcdef0123 says")
    assert waiting(tmp_path) == []
    [kept] = reviewed(tmp_path)
    assert kept == {
        "@timestamp": kept["@timestamp"],
        "transaction.id": transaction,
        "user.id": "ada",
        "organization.id": "research",
        FIELD + "reviewer": "eve",
        FIELD + "reviewer_tenant": "quality",
        FIELD + "verdict": "corrected",
        FIELD + "tags": ["factual"],
        FIELD + "correction": "Paris, as [key] says",
    }
    found = reviews.item(tmp_path, ["research"], transaction)
    assert found
    assert found.review == kept


def test_the_last_review_counts_and_the_same_one_is_written_once(tmp_path: Path) -> None:
    transaction = add(tmp_path, 1, **DOWN)
    for correction in "Rome", "Paris", "Paris", "", "":
        assert review(tmp_path, transaction, correction)
    assert [each.get(FIELD + "correction") for each in reviewed(tmp_path)] == ["Rome", "Paris", None]
    found = reviews.item(tmp_path, ["research"], transaction)
    assert found
    assert found.review
    assert found.review[FIELD + "verdict"] == "dismissed"


def test_what_is_forgotten_of_the_subject_takes_the_review_along(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    transaction = add(tmp_path, 1, **DOWN)
    found = reviews.item(tmp_path, ["research"], transaction)
    assert found
    assert review(tmp_path, transaction)
    forget = ["feedback", "forget", "--tenant", "research", "--subject", "ada", "--folder", str(tmp_path)]
    assert main(forget) == 0
    assert "removed 3 records of ada in research on this host; 0 are left" in capsys.readouterr().out
    assert list(tmp_path.glob("*.jsonl")) == []
    late = reviews.written(found, EVE, "written meanwhile", [])
    assert not reviews.keep(tmp_path, found, late), "an expert who had it open"
    assert list(tmp_path.glob("*.jsonl")) == []


def test_what_is_forgotten_of_an_expert_are_the_reviews_by_it(tmp_path: Path) -> None:
    transaction = add(tmp_path, 1, **DOWN)
    assert review(tmp_path, transaction)
    namesake = ["feedback", "forget", "--tenant", "research", "--subject", "eve", "--folder", str(tmp_path)]
    assert main(namesake) == 0
    assert len(reviewed(tmp_path)) == 1
    assert main([*namesake, "--tenant", "quality"]) == 0
    assert reviewed(tmp_path) == []
    assert waiting(tmp_path) == [transaction], "it waits again"


def test_reviews_written_while_the_subject_is_forgotten_leave_nothing(tmp_path: Path) -> None:
    transactions = [add(tmp_path, number, **DOWN) for number in range(20)]
    found = [reviews.item(tmp_path, ["research"], transaction) for transaction in transactions]

    def write() -> None:
        for each in found:
            assert each
            reviews.keep(tmp_path, each, reviews.written(each, EVE, "x", []))

    with ThreadPoolExecutor(1) as threads:
        done = threads.submit(write)
        journal.forget(tmp_path, lambda record: record["user.id"] == "ada")
        done.result()
    journal.forget(tmp_path, lambda record: record["user.id"] == "ada")
    assert list(tmp_path.glob("*.jsonl")) == []


def test_a_correction_that_is_too_long_and_a_tag_of_ones_own_are_refused(tmp_path: Path) -> None:
    found = reviews.item(tmp_path, ["research"], add(tmp_path, 1, **DOWN))
    assert found
    with pytest.raises(ApiError, match="20001 characters: write 20000 or fewer"):
        reviews.written(found, EVE, "x" * 20_001, [])
    with pytest.raises(ApiError, match="'<b>' is not a tag"):
        reviews.written(found, EVE, "x", ["<b>"])


def test_a_torn_line_hides_no_other(tmp_path: Path) -> None:
    add(tmp_path, 1, **DOWN)
    for path in files(tmp_path):
        with path.open("ab") as file:
            file.write(b'{"transaction.id":"0000000000000001","organ')
    again = add(tmp_path, 2, **DOWN)
    assert again in waiting(tmp_path)


@pytest.mark.parametrize("tenants", ["research", {"research": True}, [1], None])
def test_a_decision_with_other_reviews_than_tenants_is_none(tenants: object) -> None:
    with pytest.raises(PolicyUnavailable, match="reviews are not a list"):
        parse_decision(ALLOWED | {"reviews": tenants})


def test_two_stars_are_bad_and_three_are_not() -> None:
    assert [liked({FIELD + "stars": stars}) for stars in range(1, 6)] == [False, False, None, True, True]
