"""The witness keeps what hosts signed, whatever becomes of those hosts; the real playbook, on hosts that are all here."""

import base64
import getpass
import hashlib
import json
import os
import shutil
import subprocess
import syslog
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from audit_records import NAME, SEED, checked, event, record, whole

from llmkeep import cli
from llmkeep.playbooks import RunResults
from llmkeep.record import runs, witness
from llmkeep.record.witness import Altered, Kept
from llmproof import heads
from llmproof.chain import Chain, ChainError, files
from llmproof.heads import Head, Signer

ALL = """
all:
  vars: {ansible_connection: local, ansible_python_interpreter: /usr/bin/python3}
  children:
    control: {hosts: {ops1: {}}}
    serve: {hosts: {llm1: {}}}
"""


@dataclass
class Estate:
    """Its folders, and what the journal got."""

    root: Path
    journal: list[str]

    @property
    def record(self) -> Path:
        return self.root / "llm1/record"

    @property
    def kept(self) -> Path:
        return self.root / "witness/llm1"

    @property
    def copy(self) -> Path:
        return self.root / "copy/ops1"

    def collect(self) -> int:
        """llmkeep audit collect."""
        return cli.main(["audit", "collect", "-i", str(self.root / "hosts.yml")])


@pytest.fixture
def estate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Estate]:
    """ops1 and llm1 with a record each."""
    made = Estate(tmp_path, [])
    (tmp_path / "hosts.yml").write_text(ALL)
    monkeypatch.setattr(witness, "KEPT", tmp_path / "witness")
    monkeypatch.setattr(witness, "RECORD", made.record)
    monkeypatch.setattr(witness, "COPY", tmp_path / "copy")
    monkeypatch.setattr(witness, "SEEN", tmp_path / "seen")
    monkeypatch.setattr(witness, "USER", getpass.getuser())
    monkeypatch.setattr(runs, "FOLDER", tmp_path / "own")
    monkeypatch.setattr(runs, "SEALED_SEED", tmp_path / "seed")
    monkeypatch.setattr(runs, "unseal", lambda sealed, _name: sealed)
    monkeypatch.setattr(syslog, "syslog", lambda _level, text: made.journal.append(text))
    (tmp_path / "seed").write_text(SEED.hex())
    record(made.record, 20)
    record(tmp_path / "own", 5, head_each=5)
    with tempfile.TemporaryDirectory(prefix="run-", dir="/tmp") as memory:
        monkeypatch.setenv("TMPDIR", memory)
        yield made


def test_heads_are_collected_as_they_grow_and_given_to_the_other_host(
    estate: Estate, capfd: pytest.CaptureFixture[str]
) -> None:
    assert estate.collect() == 0
    assert (estate.kept / "heads").read_bytes() == (estate.record / "heads").read_bytes()
    assert (estate.kept / "verifier").read_text() == (estate.record / "verifier").read_text()
    assert (estate.copy / "heads").read_bytes() == (estate.root / "own/heads").read_bytes()
    record(estate.record, 30)
    record(estate.root / "own", 5, head_each=5)
    (estate.record / "heads").open("ab").write(
        b"llm-audit/test\n60\nhalf a he"
    )  # the host is just writing it
    assert estate.collect() == 0
    notes, torn = heads.read(estate.kept / "heads")
    assert (len(notes), torn) == (5, b"")
    assert (estate.copy / "heads").read_bytes() == (estate.root / "own/heads").read_bytes()
    assert estate.collect() == 0
    assert estate.copy.stat().st_mode & 0o777 == 0o700
    assert capfd.readouterr().out == "", "it runs each minute: what is well is quiet"
    assert estate.journal == []


def test_a_backlog_of_days_is_collected_in_several_looks_and_is_no_finding(estate: Estate) -> None:
    (estate.record / "heads").write_bytes(signed(*range(1, 1501)))
    looks = 0
    while not estate.kept.exists() or Kept(estate.kept).data() != (estate.record / "heads").read_bytes():
        assert estate.collect() == 0
        assert (looks := looks + 1) < 5, "each look takes a part of it"
    assert estate.journal == []


@pytest.fixture
def blocks(estate: Estate) -> Path:
    """Of two blocks of heads that are kept and a part of a third, after a look."""
    (estate.record / "heads").write_bytes(signed(20) * 50_000)
    estate.kept.mkdir(parents=True)
    shutil.copy(estate.record / "heads", estate.kept)
    assert estate.collect() == 0
    assert (estate.kept / "blocks").read_bytes().count(b"\n") == 2
    return estate.kept / "blocks"


def alter_first_byte(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"x")


def test_a_new_head_is_kept_beside_full_blocks(estate: Estate, blocks: Path) -> None:
    with (estate.record / "heads").open("ab") as file:
        file.write(signed(30))
    assert estate.collect() == 0
    assert Kept(blocks.parent).data() == (estate.record / "heads").read_bytes()


def test_a_head_of_long_ago_is_compared_at_each_look(estate: Estate, blocks: Path) -> None:
    assert blocks.exists()
    alter_first_byte(estate.record / "heads")
    assert estate.collect() == 3
    assert "the heads on llm1 do not begin with" in estate.journal[0]


def test_kept_heads_that_were_altered_here_are_found_within_a_day(estate: Estate, blocks: Path) -> None:
    alter_first_byte(estate.kept / "heads")
    os.utime(blocks, (0, blocks.stat().st_mtime - 24 * 3600))
    assert estate.collect() == 3
    assert "the heads on llm1 do not begin with" in estate.journal[0]


def test_a_thousand_hosts_are_no_more_than_a_command_line_holds(estate: Estate) -> None:
    for number in range(1000):
        other = estate.root / f"witness/other{number}"
        other.mkdir(parents=True)
        (other / "heads").write_bytes(signed(10))
    assert estate.collect() == 0


def test_a_host_that_rewrote_and_signed_its_record_anew_is_found_told_and_on_record(
    estate: Estate, capfd: pytest.CaptureFixture[str]
) -> None:
    assert estate.collect() == 0
    before = (estate.kept / "heads").read_bytes()
    shutil.rmtree(estate.record)
    record(estate.record, 30)  # other times, so other lines; the same key
    assert estate.collect() == 3
    assert "the heads on llm1 do not begin with" in capfd.readouterr().err
    assert "THE AUDIT RECORD WAS ALTERED" in estate.journal[0]
    assert (estate.kept / "heads").read_bytes() == before
    said = json.loads(whole(estate.root / "own")[-1])
    assert (said["event.action"], said["event.kind"]) == ("witness", "alert")
    assert "llm1" in said["event.reason"][0]
    assert checked(estate.record).ok, "by itself it is good"
    assert not checked(estate.record, estate.kept / "heads").ok


def test_a_record_that_is_gone_is_no_host_without_one(estate: Estate) -> None:
    assert estate.collect() == 0
    shutil.rmtree(estate.record)
    assert estate.collect() == 3
    assert "llm1 lost its verifier, formerly" in estate.journal[0]


def findings(capfd: pytest.CaptureFixture[str], minutes: int = 0) -> tuple[int, list[str]]:
    """llmkeep audit findings: its exit code and lines."""
    capfd.readouterr()
    code = cli.main(["audit", "findings", "--minutes", str(minutes)])
    return code, capfd.readouterr().out.splitlines()


def rewritten(estate: Estate) -> None:
    """llm1's record, signed anew after the witness has seen it."""
    assert estate.collect() == 0
    shutil.rmtree(estate.record)
    record(estate.record, 30)


AWAY = ALL.replace("llm1: {}", "llm1: {ansible_connection: ssh, ansible_host: 127.0.0.1, ansible_port: 1}")


def test_an_altered_record_stays_a_finding_while_its_host_does_not_answer(
    estate: Estate, capfd: pytest.CaptureFixture[str]
) -> None:
    rewritten(estate)
    assert estate.collect() == 3
    (estate.root / "hosts.yml").write_text(AWAY)
    assert estate.collect() == 3
    code, told = findings(capfd)
    assert code == 3
    assert any("the heads on llm1 do not begin with" in line for line in told)


def test_an_altered_record_is_on_record_once_however_often_it_is_seen(estate: Estate) -> None:
    rewritten(estate)
    assert [estate.collect(), estate.collect()] == [3, 3]
    alerts = [line for line in whole(estate.root / "own") if b'"alert"' in line]
    assert len(alerts) == 1


def test_a_finding_ends_by_an_acknowledgement_that_is_on_record(
    estate: Estate, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUDO_USER", "alice")
    rewritten(estate)
    assert estate.collect() == 3
    estate.kept.rename(estate.root / "evidence")
    assert estate.collect() == 3, "put right, and not acknowledged"
    number = findings(capfd)[1][0].split()[0]
    assert cli.main(["audit", "acknowledge", number, "--reason", "llm1 was reinstalled"]) == 0
    said = json.loads(whole(estate.root / "own")[-1])
    assert (said["event.action"], said["user.name"]) == ("acknowledge", "alice")
    assert (said["event.reason"], said["llmkeep.witness.id"]) == ("llm1 was reinstalled", number)
    assert "the heads on llm1 do not begin with" in said["llmkeep.witness.finding"]
    assert estate.collect() == 0
    assert findings(capfd) == (0, [])


def test_what_is_acknowledged_and_still_there_is_found_again(
    estate: Estate, capfd: pytest.CaptureFixture[str]
) -> None:
    rewritten(estate)
    assert estate.collect() == 3
    number = findings(capfd)[1][0].split()[0]
    assert cli.main(["audit", "acknowledge", number, "--reason", "too early"]) == 0
    assert estate.collect() == 3
    assert cli.main(["audit", "acknowledge", "00000000", "--reason", "a typing error"]) == 1
    assert "llmkeep audit findings" in capfd.readouterr().err


def test_an_acknowledgement_that_cannot_be_recorded_is_none(
    estate: Estate, capfd: pytest.CaptureFixture[str]
) -> None:
    rewritten(estate)
    assert estate.collect() == 3
    number = findings(capfd)[1][0].split()[0]
    (estate.root / "seed").unlink()
    assert cli.main(["audit", "acknowledge", number, "--reason", "no record"]) == 1
    assert findings(capfd)[0] == 3


def test_a_witness_that_learns_nothing_fails_once_that_lasts(
    estate: Estate, capfd: pytest.CaptureFixture[str]
) -> None:
    assert findings(capfd)[0] == 1, "it has never looked"
    (estate.root / "hosts.yml").write_text(AWAY)
    assert estate.collect() == 1
    assert findings(capfd, minutes=15) == (0, [])
    path = estate.root / "witness/findings.json"
    told = json.loads(path.read_text())
    for each in told["unheard"].values():
        each["since"] = "2020-01-31T08:00:00+00:00"
    path.write_text(json.dumps(told))
    assert estate.collect() == 1
    code, lines = findings(capfd, minutes=15)
    assert code == 1
    assert "since 2020-01-31" in lines[0]
    (estate.root / "hosts.yml").write_text(ALL)
    assert estate.collect() == 0
    assert findings(capfd) == (0, [])


def unsigned(estate: Estate, count: int) -> None:
    """COUNT more records of llm1, over which no head can be written."""
    (estate.record / "heads").rename(estate.root / "aside")
    with Chain(estate.record, SEED) as chain:
        (estate.record / "heads").mkdir()
        chain.append([event(number) for number in range(count)])
        with pytest.raises(OSError, match="directory"):
            chain.sign()
    (estate.record / "heads").rmdir()
    (estate.root / "aside").rename(estate.record / "heads")


def test_a_host_is_told_what_was_seen_of_its_record_and_does_not_sign_another_tail(estate: Estate) -> None:
    seen = estate.root / "seen/head"
    assert estate.collect() == 0
    unsigned(estate, 5)
    assert estate.collect() == 0
    assert heads.stated(seen.read_bytes())[1].size == 20, "what the look before had seen"
    assert estate.collect() == 0
    assert heads.stated(seen.read_bytes())[1].size == 25
    assert (seen.stat().st_mode & 0o777, seen.parent.stat().st_mode & 0o777) == (0o644, 0o755)
    (shutil.copytree(estate.record, estate.root / "forged") / "tree").unlink()
    path = files(estate.root / "forged")[0]
    path.write_bytes(b"".join(line + b"\n" for line in path.read_bytes().split(b"\n")[:20]))
    with Chain(estate.root / "forged", SEED) as chain:
        chain.append([event(number) for number in range(50, 60)])
    with pytest.raises(ChainError, match="the witness has seen other records"):
        Chain(estate.root / "forged", SEED, seen=seen)
    with Chain(estate.record, SEED, seen=seen) as chain:
        chain.sign()
    assert estate.collect() == 0
    assert checked(estate.record, estate.kept / "heads").ok
    assert (estate.kept / "tips").read_bytes().count(b"\n\n") == 1


SECRET = "root:$y$j9T$SECRETHASH:19000:0:99999:7:::"


def test_a_link_in_the_records_folder_shows_nothing_of_the_file_it_leads_to(
    estate: Estate, capfd: pytest.CaptureFixture[str]
) -> None:
    (estate.root / "shadow").write_text(f"{SECRET}\n\n{SECRET}\n\n")
    assert estate.collect() == 0
    for name in ("verifier", "heads", "tip"):
        (estate.record / name).unlink()
        (estate.record / name).symlink_to(estate.root / "shadow")
    assert estate.collect() == 3
    findings, own = (estate.root / "witness/findings.json").read_text(), b"".join(whole(estate.root / "own"))
    for text in [*capfd.readouterr(), *estate.journal, findings, own.decode()]:
        assert "SECRETHASH" not in text


def test_a_fifo_in_the_records_folder_holds_up_no_look(estate: Estate) -> None:
    assert estate.collect() == 0
    (estate.record / "heads").unlink()
    os.mkfifo(estate.record / "heads")
    assert estate.collect() == 3


SSH = """#!/bin/sh
# A stand-in: `llm1` is a hostile host, any other one runs the command.
for word; do host=$command command=$word; done
test "$host" != llm1 || {hostile}
exec sh -c "$command"
"""
TWO = """
all:
  vars: {ansible_connection: ssh, ansible_python_interpreter: /usr/bin/python3}
  children:
    control: {hosts: {ops1: {ansible_connection: local}}}
    serve: {hosts: {llm1: {}, llm2: {}}}
"""


@pytest.mark.parametrize(
    "hostile", ["exec sleep 60", "exec yes", "exec yes 1>&2"], ids=["silence", "output", "complaints"]
)
def test_a_host_that_does_not_end_its_answer_is_named_and_delays_no_other(
    hostile: str, estate: Estate, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (estate.root / "bin").mkdir()
    (estate.root / "bin/ssh").write_text(SSH.replace("{hostile}", hostile))
    (estate.root / "bin/ssh").chmod(0o755)
    (estate.root / "hosts.yml").write_text(TWO)
    monkeypatch.setenv("PATH", f"{estate.root}/bin:{os.environ['PATH']}")
    monkeypatch.setattr(witness, "SECONDS", 4)
    start = time.monotonic()
    assert estate.collect() == 1
    assert time.monotonic() - start < 30
    assert (estate.kept.with_name("llm2") / "heads").read_bytes() == (estate.record / "heads").read_bytes()
    error = capfd.readouterr().err
    assert "llm1" in error
    assert len(error) < 1000


def test_an_answer_that_is_no_base64_is_a_finding_and_ends_no_look(kept: Kept) -> None:
    with pytest.raises(Altered, match="llm1"):
        witness._keep(kept.folder, f"record\n{SIGNER.verifier.text}\n{kept.digest()}\nabc")


@pytest.mark.parametrize("place", [0, 2, 3])
@pytest.mark.parametrize("text", [SECRET, f"{SECRET}\n\n{SECRET}\n\n", f"{NAME}\n30\n{SECRET}\n"])
def test_a_finding_quotes_no_text_that_is_neither_verifier_nor_signed(
    place: int, text: str, kept: Kept
) -> None:
    answer = [SIGNER.verifier.text, kept.digest(), "", ""]
    answer[place] = base64.b64encode(text.encode()).decode() if place else text.partition("\n")[0]
    if not place or place == 3 or "\n\n" in text:
        with pytest.raises(Altered, match="llm1") as refusal:
            witness._keep(kept.folder, "\n".join(["record", *answer]))
        assert "SECRETHASH" not in str(refusal.value)


def test_what_a_hosts_shell_prints_by_itself_is_no_part_of_its_answer(
    estate: Estate, monkeypatch: pytest.MonkeyPatch
) -> None:
    shell = estate.root / "shell"
    shell.write_text('#!/bin/sh\necho welcome\nexec /bin/sh "$@"\n')
    shell.chmod(0o755)
    monkeypatch.setenv("ANSIBLE_EXECUTABLE", str(shell))  # the one of a local connection
    assert estate.collect() == 0
    assert (estate.kept / "heads").read_bytes() == (estate.record / "heads").read_bytes()


def test_a_copy_of_our_heads_that_ours_do_not_extend_is_not_written_over(estate: Estate) -> None:
    assert estate.collect() == 0
    (estate.copy / "heads").write_bytes(b"x" + (estate.copy / "heads").read_bytes()[1:])
    before = (estate.copy / "heads").read_bytes()
    record(estate.root / "own", 5, head_each=5)
    assert estate.collect() == 3
    assert (estate.copy / "heads").read_bytes() == before


def test_a_host_without_a_record_and_one_that_does_not_answer_are_told(
    estate: Estate, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(estate.record)
    assert estate.collect() == 1
    assert "llm1 keeps no audit record" in capfd.readouterr().err
    away = "llm1: {ansible_connection: ssh, ansible_host: 127.0.0.1, ansible_port: 1}"
    (estate.root / "hosts.yml").write_text(ALL.replace("llm1: {}", away))
    assert estate.collect() == 1
    assert "llm1: Read new heads" in capfd.readouterr().err
    assert estate.journal == []


def test_a_host_whose_volume_is_still_shut_is_asked_again_and_not_accused(
    estate: Estate, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert estate.collect() == 0
    kept = (estate.kept / "heads").read_bytes()
    # A stand-in: a record on a volume of its own, which this machine's systemd has not.
    systemctl = estate.root / "bin/systemctl"
    systemctl.parent.mkdir()
    systemctl.write_text('#!/bin/sh\ncase "$*" in *record.mount) test "$1" = cat ;; *) exit 4 ;; esac\n')
    systemctl.chmod(0o755)
    monkeypatch.setenv("PATH", f"{systemctl.parent}:{os.environ['PATH']}")
    shut = estate.record.with_name("shut")
    estate.record.rename(shut)
    estate.record.mkdir()
    assert estate.collect() == 1
    assert "llm1 is locked" in capfd.readouterr().err
    assert estate.journal == []
    estate.record.rmdir()
    shut.rename(estate.record)
    systemctl.unlink()
    assert estate.collect() == 0
    assert (estate.kept / "heads").read_bytes() == kept


def test_an_estate_of_one_host_is_told_that_no_other_keeps_its_heads_and_passes(
    estate: Estate, capfd: pytest.CaptureFixture[str]
) -> None:
    (estate.root / "hosts.yml").write_text(ALL.replace("llm1", "ops1"))
    assert estate.collect() == 0
    assert "no other host keeps this node's heads" in capfd.readouterr().err
    assert (estate.root / "witness/ops1/heads").exists()


@pytest.fixture
def kept(tmp_path: Path) -> Kept:
    """Two heads of a host."""
    (tmp_path / "llm1").mkdir()
    made = Kept(tmp_path / "llm1")
    made.extend(SIGNER.verifier.text + "\n", hashlib.sha256().hexdigest(), signed(10, 20))
    return made


SIGNER = Signer(NAME, SEED)


def signed(*sizes: int) -> bytes:
    """Heads over so many records."""
    return b"".join(SIGNER.sign(Head(size, bytes(32))) + b"\n" for size in sizes)


@pytest.mark.parametrize(
    "new", [signed(15), signed(30, 25), signed(20), signed(30).replace(b"30", b"31"), b"x\n\ny\n\n"]
)
def test_new_heads_that_shrink_or_do_not_hold_are_refused_whole(kept: Kept, new: bytes) -> None:
    before = kept.data()
    with pytest.raises(Altered, match="llm1"):
        kept.extend(SIGNER.verifier.text + "\n", kept.digest(), new)
    assert kept.data() == before


@pytest.mark.parametrize("there", [signed(20), signed(10), b"", signed(10)[:-1] + b"x" + signed(20)])
def test_a_host_whose_heads_do_not_begin_with_those_kept_is_refused(kept: Kept, there: bytes) -> None:
    before = kept.data()
    with pytest.raises(Altered, match="the heads on llm1 do not begin with"):
        kept.extend(
            SIGNER.verifier.text + "\n",
            hashlib.sha256(there[: len(before)]).hexdigest(),
            there[len(before) :],
        )
    assert kept.data() == before


def test_a_host_that_signs_with_another_key_is_refused(kept: Kept) -> None:
    other = Signer(NAME, bytes(32))
    with pytest.raises(Altered, match="llm1 now signs as"):
        kept.extend(other.verifier.text + "\n", kept.digest(), b"")


def test_what_a_power_cut_tore_of_the_kept_heads_is_fetched_again(kept: Kept) -> None:
    whole_file = kept.data()
    (kept.folder / "heads").write_bytes(whole_file + signed(30)[:50])
    assert kept.data() == whole_file
    assert kept.extend(SIGNER.verifier.text + "\n", kept.digest(), signed(30, 40)) == 2
    assert kept.data() == signed(10, 20, 30, 40)


def test_only_one_collects_at_a_time(estate: Estate, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one waits: an operator's run is not refused because the timer's has just begun."""
    witness.KEPT.mkdir()
    play = witness._play
    first_ended: list[bool] = []

    def playing(places: list[Path], tag: str, variables: dict[str, object]) -> RunResults:
        first_ended.append(first.poll() is not None)
        return play(places, tag, variables)

    monkeypatch.setattr(witness, "_play", playing)
    held = ["flock", str(witness.KEPT), "sh", "-c", "echo held; exec sleep 1"]
    with subprocess.Popen(held, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout
        assert first.stdout.readline() == "held\n"
        assert estate.collect() == 0
    assert first_ended
    assert all(first_ended)
    assert (estate.kept / "verifier").exists()
