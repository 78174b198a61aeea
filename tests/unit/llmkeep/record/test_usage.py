"""`llmkeep usage`: what it sums of records that their own writer wrote, and which records it refuses."""

import json
import shutil
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from audit_records import put

from llmkeep.cli import main
from llmkeep.errors import LlmkeepError
from llmkeep.record import usage, witness
from llmproof import chain, heads
from llmproof.chain import Chain, files

HOSTS = {"llm1": bytes(range(32)), "llm2": bytes(range(1, 33))}
NOVEMBER = ["--from", "2026-11-01", "--to", "2026-11-30"]
Event = dict[str, object]


def exchange(
    number: int, subject: str, tenant: str, model: str, tokens: tuple[int, int] | None, **more: object
) -> tuple[Event, Event]:
    """Intent and outcome, as the gateway hands them in; the outcome does not name the model."""
    both: Event = {
        "event.kind": "event",
        "event.category": ["api"],
        "event.action": "POST /v1/chat/completions",
        "transaction.id": f"{number:016x}",
        "user.id": subject,
        "organization.id": tenant,
    }
    both |= more
    used: Event = {}
    if tokens:
        used = {"gen_ai.usage.input_tokens": tokens[0], "gen_ai.usage.output_tokens": tokens[1]}
    return (
        both | {"llmkeep.audit.phase": "intent", "gen_ai.request.model": model},
        both | {"llmkeep.audit.phase": "outcome"} | used,
    )


class Estate:
    """Two hosts with a record each, copied to the control node, whose witness keeps the heads of both."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.monkeypatch = root, monkeypatch

    def folder(self, host: str) -> Path:
        return self.root / "copies" / host

    def write(self, host: str, moment: str, *events: Event, rotate: int = 1 << 26, sign: bool = True) -> None:
        """Append to a record at this moment, and sign it."""

        class Clock(datetime):
            @classmethod
            def now(cls, tz: Any = None) -> Any:
                return datetime.fromisoformat(moment).replace(tzinfo=tz)

        with self.monkeypatch.context() as patch:
            patch.setattr(chain, "datetime", Clock)
            with Chain(self.folder(host), HOSTS[host], f"llm-audit/{host}", rotate=rotate) as record:
                for event in events:
                    record.append([event])
                if sign:
                    record.sign()

    def look(self) -> None:
        """The witness keeps the heads that there are."""
        for host in HOSTS:
            kept = self.root / "witness" / host
            kept.mkdir(parents=True, exist_ok=True)
            for name in "verifier", "heads":
                shutil.copy(self.folder(host) / name, kept / name)

    def usage(self, *words: str, hosts: tuple[str, ...] = ("llm1", "llm2")) -> int:
        records = [word for host in hosts for word in ("--record", str(self.folder(host)))]
        return main(["usage", *NOVEMBER, *records, *words])


@pytest.fixture
def estate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Estate:
    """Alice and Bob on two hosts, two models, two days of November; both records go on in December."""
    monkeypatch.setattr(witness, "KEPT", tmp_path / "witness")
    monkeypatch.setattr(witness, "KEPT_OF_PODS", tmp_path / "witness-pods")
    made = Estate(tmp_path, monkeypatch)
    made.write("llm1", "2026-10-31T23:59:59", *exchange(1, "alice", "corp", "small", (1000, 1000)))
    made.write(
        "llm1",
        "2026-11-01T08:00:00",
        *exchange(2, "alice", "corp", "small", (10, 20)),
        *exchange(3, "bob", "corp", "large", (100, 200)),
        {"event.kind": "event", "event.category": ["process"], "event.action": "gpu.drained"},
        rotate=100,
    )
    made.write("llm1", "2026-11-30T23:59:59", *exchange(4, "alice", "corp", "small", (1, 2)), rotate=100)
    made.write("llm2", "2026-11-01T09:00:00", *exchange(5, "carol", "lab", "large", (1000, 0)))
    for host, number in ("llm1", 6), ("llm2", 7):
        made.write(host, "2026-12-01T00:00:00", *exchange(number, "alice", "corp", "small", (5000, 5000)))
    made.look()
    return made


def rows(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["rows"]
    return found


def test_requests_and_tokens_are_summed_by_tenant_model_and_day(
    estate: Estate, capsys: pytest.CaptureFixture[str]
) -> None:
    assert estate.usage("--by", "tenant,model,day", "--csv") == 0
    assert capsys.readouterr().out.splitlines() == [
        "tenant,model,day,requests,input_tokens,output_tokens",
        "corp,large,2026-11-01,1,100,200",
        "corp,small,2026-11-01,1,10,20",
        "corp,small,2026-11-30,1,1,2",
        "lab,large,2026-11-01,1,1000,0",
    ]


@pytest.mark.parametrize(
    ("by", "expected"),
    [
        ("subject", {"alice": 2, "bob": 1, "carol": 1}),
        ("host", {"llm1": 3, "llm2": 1}),
        ("action", {"POST /v1/chat/completions": 4}),
        ("day", {"2026-11-01": 3, "2026-11-30": 1}),
    ],
)
def test_any_of_the_dimensions_can_be_asked_for(
    estate: Estate, capsys: pytest.CaptureFixture[str], by: str, expected: dict[str, int]
) -> None:
    assert estate.usage("--by", by, "--json") == 0
    assert {row[by]: row["requests"] for row in rows(capsys)} == expected


def test_people_get_a_table_with_a_total(estate: Estate, capsys: pytest.CaptureFixture[str]) -> None:
    assert estate.usage("--by", "tenant") == 0
    said = capsys.readouterr()
    assert said.out.splitlines() == [
        "tenant  requests  input tokens  output tokens",
        "corp           3           111            222",
        "lab            1         1,000              0",
        "total          4         1,111            222",
    ]
    assert "verifying the record of llm1" in said.err


def test_a_subject_cannot_redraw_the_terminal(estate: Estate, capsys: pytest.CaptureFixture[str]) -> None:
    estate.write("llm2", "2026-12-01T00:01:00", *exchange(8, "\x1b[2Jmallory", "lab", "large", (1, 1)))
    assert estate.usage("--to", "2026-12-01", "--by", "subject") == 4
    out = capsys.readouterr().out
    assert "mallory" in out
    assert "\x1b" not in out


def test_shadow_copies_and_outcomes_that_were_sent_twice_are_not_counted_again(
    estate: Estate, capsys: pytest.CaptureFixture[str]
) -> None:
    once = exchange(9, "dave", "corp", "small", (7, 7))
    copy = exchange(10, "dave", "corp", "large", (9, 9), **{"llmkeep.experiment.shadow": "x"})
    estate.write("llm2", "2026-12-01T00:01:00", *once, *copy, *once)
    estate.write("llm2", "2026-12-02T00:00:00", *exchange(11, "eve", "corp", "small", (1, 1)))
    assert estate.usage("--to", "2026-12-01", "--by", "subject", "--json", hosts=("llm2",)) == 4
    dave = next(row for row in rows(capsys) if row["subject"] == "dave")
    assert dave == {"subject": "dave", "requests": 1, "input_tokens": 7, "output_tokens": 7}


def test_requests_without_an_outcome_are_named_and_not_counted(
    estate: Estate, capsys: pytest.CaptureFixture[str]
) -> None:
    begun, _ = exchange(12, "dave", "corp", "small", None)
    estate.write("llm2", "2026-12-01T00:01:00", begun)
    estate.write("llm2", "2026-12-02T00:00:00", *exchange(13, "eve", "corp", "small", (1, 1)))
    assert estate.usage("--to", "2026-12-01", "--json") == 4
    said = json.loads(capsys.readouterr().out)
    assert "llm2: 1 requests have no outcome" in said["notes"][0]


def test_a_host_whose_record_is_missing_is_named(estate: Estate, capsys: pytest.CaptureFixture[str]) -> None:
    assert estate.usage("--json", hosts=("llm1",)) == 4
    said = json.loads(capsys.readouterr().out)
    assert [line.partition(":")[0] for line in said["incomplete"]] == ["llm2"]
    assert "no record of it was given" in said["incomplete"][0]
    assert list(said["hosts"]) == ["llm1"]


def test_a_record_that_ends_before_the_last_day_is_named(
    estate: Estate, capsys: pytest.CaptureFixture[str]
) -> None:
    assert estate.usage("--to", "2026-12-01") == 4
    said = capsys.readouterr().err
    assert "llm1: its signed record ends at 2026-12-01T00:00:00.000000Z" in said
    assert "llm2: its signed record ends at 2026-12-01T00:00:00.000000Z" in said


def test_records_behind_the_last_signed_head_are_not_counted(
    estate: Estate, capsys: pytest.CaptureFixture[str]
) -> None:
    unsigned = exchange(14, "mallory", "corp", "small", (10**6, 10**6))
    estate.write("llm2", "2026-12-01T00:00:30", *unsigned, sign=False)
    assert estate.usage("--to", "2026-12-01", "--by", "subject", "--json") == 4
    assert "mallory" not in {row["subject"] for row in rows(capsys)}


def test_an_older_copy_than_the_witness_has_seen_is_verified_as_far_as_it_goes(
    estate: Estate, capsys: pytest.CaptureFixture[str]
) -> None:
    old = shutil.copytree(estate.folder("llm2"), estate.root / "old")
    estate.write("llm2", "2026-12-01T00:05:00", *exchange(15, "eve", "corp", "small", (1, 1)))
    estate.look()
    assert main(["usage", *NOVEMBER, "--record", str(estate.folder("llm1")), str(old), "--csv"]) == 0
    assert "lab,large,1,1000,0" in capsys.readouterr().out


def tampered(folder: Path) -> str:
    path = files(folder)[0]
    first, *others = path.read_bytes().splitlines()
    put(path, [first.replace(b"alice", b"clara"), *others])
    return f"{path}:1: record 1: changed"


def without_a_segment(folder: Path) -> str:
    path = files(folder)[1]
    path.unlink()
    return f"{files(folder)[1]}: record"


def without_a_head(folder: Path) -> str:
    notes, _ = heads.read(folder / "heads")
    (folder / "heads").write_bytes(b"".join(note + b"\n" for note in notes[1:]))
    return f"{folder / 'heads'}: its heads differ from those that the witness keeps of llm1"


def with_a_foreign_signature(folder: Path) -> str:
    text = (folder / "heads").read_text()
    (folder / "heads").write_text(text.replace("2026-12-01T00", "2026-12-01T01"))
    return f"{folder / 'heads'}: its heads"


@pytest.mark.parametrize("damage", [tampered, without_a_segment, without_a_head, with_a_foreign_signature])
def test_a_record_that_does_not_verify_is_refused_by_file_and_reason_and_nothing_is_summed(
    estate: Estate, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], str]
) -> None:
    reason = damage(estate.folder("llm1"))
    assert estate.usage() == 3
    said = capsys.readouterr()
    assert reason in said.err
    assert said.out == ""


def test_a_record_that_was_signed_anew_with_the_hosts_own_key_is_refused(
    estate: Estate, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(estate.folder("llm2"))
    estate.write("llm2", "2026-12-01T00:00:00", *exchange(16, "carol", "lab", "large", (1, 0)))
    assert estate.usage() == 3
    assert "its heads differ from those that the witness keeps of llm2" in capsys.readouterr().err


def test_an_empty_record_is_named(estate: Estate, capsys: pytest.CaptureFixture[str]) -> None:
    empty = estate.root / "empty"
    empty.mkdir()
    shutil.copy(estate.folder("llm2") / "verifier", empty)
    assert main(["usage", *NOVEMBER, "--record", str(estate.folder("llm1")), str(empty)]) == 4
    assert f"llm2: there is no signed record in {empty}" in capsys.readouterr().err


def test_a_folder_without_a_record_is_refused(estate: Estate, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["usage", *NOVEMBER, "--record", str(estate.root)]) == 1
    assert f"{estate.root} is not a copy of a record" in capsys.readouterr().err


def test_a_host_that_the_witness_does_not_know_is_refused(
    estate: Estate, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(estate.root / "witness/llm2")
    assert estate.usage() == 1
    said = capsys.readouterr().err
    assert "llm-audit/llm2" in said
    assert "the witness knows only llm1" in said


def test_a_record_that_is_given_twice_is_refused(estate: Estate, capsys: pytest.CaptureFixture[str]) -> None:
    assert estate.usage(hosts=("llm1", "llm1")) == 1
    assert "both records of llm1" in capsys.readouterr().err


def test_without_a_record_it_says_how_to_copy_one(estate: Estate, capsys: pytest.CaptureFixture[str]) -> None:
    assert estate.usage(hosts=()) == 1
    assert "ssh root@llm1 tar" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--from", "2026-11-31"], "'2026-11-31' is not a day"),
        (["--from", "yesterday"], "'yesterday' is not a day"),
        (["--by", "tenant,colour"], "'colour' is not one of tenant, subject, model, day, host, action"),
        (["--csv", "--json"], "not allowed with"),
    ],
)
def test_wrong_usage_is_exit_code_2(
    estate: Estate, capsys: pytest.CaptureFixture[str], words: list[str], complaint: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        estate.usage(*words)
    assert ended.value.code == 2
    assert complaint in capsys.readouterr().err


def test_days_in_the_wrong_order_are_refused(estate: Estate, capsys: pytest.CaptureFixture[str]) -> None:
    assert estate.usage("--to", "2026-10-01") == 1
    assert "2026-10-01 is before 2026-11-01" in capsys.readouterr().err


def inventory(estate: Estate, prices: object) -> list[str]:
    path = estate.root / "hosts.yml"
    serve: dict[str, object] = {"hosts": {"llm1": {}, "llm2": {}, "llm3": {}}}
    path.write_text(json.dumps({"all": {"vars": {"prices": prices}, "children": {"serve": serve}}}))
    return ["-i", str(path)]


SMALL = {"input": 0.5, "output": 1.5, "currency": "EUR"}


def test_a_price_list_adds_costs_and_models_without_a_price_have_none(
    estate: Estate, capsys: pytest.CaptureFixture[str]
) -> None:
    assert estate.usage("--by", "model", "--json", *inventory(estate, {"small": SMALL})) == 4
    said = json.loads(capsys.readouterr().out)
    assert {row["model"]: row["cost"] for row in said["rows"]} == {"small": "0.0000385", "large": None}
    assert said["currency"] == "EUR"
    assert said["notes"] == ["no price is listed for large: rows with it have no cost"]
    assert [line.partition(":")[0] for line in said["incomplete"]] == ["llm3"]


@pytest.mark.parametrize(
    ("listed", "complaint"),
    [
        ({"small": 3}, "prices of small"),
        ({"small": SMALL | {"input": "cheap"}}, "prices of small"),
        ({"small": SMALL | {"output": -1}}, "prices of small"),
        ({"small": SMALL | {"output": True}}, "prices of small"),
        ({"small": SMALL, "large": SMALL | {"currency": "USD"}}, "EUR, USD"),
        ([SMALL], "differs between hosts:"),
    ],
)
def test_a_price_list_that_cannot_be_used_is_refused(listed: object, complaint: str) -> None:
    with pytest.raises(LlmkeepError, match=complaint):
        usage.prices({"llm1": {"prices": listed}})


def test_two_price_lists_are_refused() -> None:
    with pytest.raises(LlmkeepError, match="differs between hosts:"):
        usage.prices({"llm1": {"prices": {"small": SMALL}}, "llm2": {"prices": {}}})


def test_days_that_retention_removed_are_named() -> None:
    ledger = usage.Ledger("llm1", ["day"], "2026-05-01", "2026-05-31")
    ledger.records, ledger.first, ledger.last = 9, "2026-05-01T12", "2026-06-01T00"
    assert "it begins at 2026-05-01T12" in usage.lacking("llm1", Path("records/llm1"), ledger, removed=5)
    assert usage.lacking("llm1", Path("records/llm1"), ledger, removed=0) == ""
