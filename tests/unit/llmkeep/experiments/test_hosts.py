"""`llmkeep experiment show -i`: outcomes of hosts of this machine, told by the real `llm-serve` from journals written here."""

import gzip
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hosts_here
import policies
import pytest
import yaml
from declared_experiment import EXPERIMENT
from plugin_modules import ROOT

from llmcore.experiments import identifier
from llmkeep import playbooks
from llmkeep.cli import main
from llmkeep.errors import LlmkeepError
from llmkeep.experiments import definition, hosts
from llmkeep.experiments.ladder import Evidence, for_good
from llmkeep.places import Places
from llmkeep.policy import source as policy_source
from llmkeep.record import runs

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="runs programs as other users, which only root may")
GATEWAY = "daemon"  # an account that Debian has, in place of llm-gateway
NAME = "support-12"
GIVEN = EXPERIMENT | {"ladder": [50, 100], "minimum": 30}
MODELS = [
    {"name": "support-7", "driver": "naive", "model": "smollm2"},
    {"name": "support-8", "driver": "naive", "release": "support-8", "memory": "24G"},
]
WHY = ["--reason", "release 8"]


@dataclass
class Estate:
    """A folder with one folder a host, and with what the control node has."""

    folder: Path
    hosts: list[str] = field(default_factory=list)

    def run(self) -> str:
        """The id of the run that policy has."""
        entry = policy_source.read(self.folder / "source").data["llm/experiments"][NAME]
        return identifier(NAME, entry["salt"])

    def rate(self, host: str, arm: str, numbers: range, thumb: str, run: str = "") -> None:
        """Units of an arm that met it on this host and rated."""
        journal = self.folder / host / "feedback"
        with (journal / "assigned-20261127T08.jsonl").open("a") as met, \
                (journal / "rated-20261127T08.jsonl").open("a") as rated:  # fmt: skip
            for number in numbers:
                head = {"@timestamp": "2026-11-27T08:00:00+00:00", "transaction.id": f"{host}-{arm}-{number}"}
                head |= {"user.id": f"{arm}{number}", "organization.id": "research"}
                told = {"name": NAME, "id": run or self.run(), "arm": arm, "percent": 50}
                told["unit"] = f"{arm}-{number}"
                line = head | {f"llmkeep.experiment.{name}": value for name, value in told.items()}
                met.write(json.dumps(line) + "\n")
                rated.write(json.dumps(head | {"llmkeep.feedback.thumb": thumb}) + "\n")
        for path in journal.iterdir():
            shutil.chown(path, GATEWAY)
            path.chmod(0o600)

    def rate_on_both(self) -> None:
        """The candidate is liked by all, the control by half, of a hundred units each; half of them met it on llm2."""
        for host, first in (("llm1", 0), ("llm2", 50)):
            self.rate(host, "candidate", range(first, first + 50), "up")
            self.rate(host, "control", range(first, first + 25), "up")
            self.rate(host, "control", range(first + 25, first + 50), "down")

    def add(self, host: str, program: str = "") -> None:
        """Another host that serves, whose llm-serve may be another program."""
        journal = self.folder / host / "feedback"
        journal.mkdir(parents=True, mode=0o700)
        journal.parent.chmod(0o755)
        shutil.chown(journal, GATEWAY)
        path = self.folder / host / "llm-serve"
        if program:
            path.write_text(program)
            path.chmod(0o755)
        else:
            path.symlink_to(ROOT / "payload/.venv/bin/llm-serve")
        self.hosts.append(host)
        told = {
            "ansible_connection": "here",
            "ansible_python_interpreter": str(self.folder / "python-of-hosts"),
            "llm_serving_models": MODELS,
        }
        serve = {"hosts": {host: {} for host in self.hosts}, "vars": told}
        (self.folder / "hosts.yml").write_text(yaml.safe_dump({"all": {"children": {"serve": serve}}}))

    def acted(self, verb: str, *options: str) -> int:
        file = self.folder / "support-12.yml"
        file.write_text(yaml.safe_dump(GIVEN))
        return main(["experiment", verb, str(file), "--source", str(self.folder / "source"), *options])

    def collected(self, verb: str, *options: str) -> int:
        """Exit code of a verb that asks all hosts, on which nothing is left."""
        code = self.acted(verb, "-i", str(self.folder / "hosts.yml"), *options)
        assert list((self.folder / "run").iterdir()) == [], "nothing that was carried stays on a host"
        assert list((self.folder / "memory").iterdir()) == [], "nor here"
        return code

    def on_record(self) -> list[dict[str, Any]]:
        paths = sorted((self.folder / "record").glob("records-*.jsonl"))
        return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


@pytest.fixture
def estate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Estate]:
    """Two hosts that serve, and a control node with a record, where the experiment was started."""
    with tempfile.TemporaryDirectory(
        prefix="est-", dir="/tmp"
    ) as made:  # a short path, for Ansible's sockets
        folder = Path(made)
        folder.chmod(0o755)
        for name in ("run", "memory", "record"):
            (folder / name).mkdir(mode=0o700)
        shutil.copytree(policies.SOURCE, folder / "source")
        (folder / "seed").write_text("5e" * 32)
        monkeypatch.setattr(runs, "FOLDER", folder / "record")
        monkeypatch.setattr(runs, "SEALED_SEED", folder / "seed")
        monkeypatch.setattr(runs, "unseal", lambda sealed, _name: sealed)
        monkeypatch.setattr(hosts, "USER", GATEWAY)
        monkeypatch.setattr(hosts, "MEMORY", str(folder / "run"))
        for name, at in (("JOURNAL", "feedback"), ("PROGRAM", "llm-serve")):
            monkeypatch.setattr(hosts, name, f"{folder}/{{{{ inventory_hostname }}}}/{at}")
        monkeypatch.setenv("TMPDIR", str(folder / "memory"))
        monkeypatch.setattr(tempfile, "tempdir", None)
        for name, value in hosts_here.made(folder).items():
            monkeypatch.setenv(name, value)
        found = Estate(folder)
        for host in ("llm1", "llm2"):
            found.add(host)
        assert found.acted("start", *WHY) == 0
        yield found


def test_a_verdict_is_of_all_hosts_and_of_policys_run_and_asking_is_on_record(
    estate: Estate, capsys: pytest.CaptureFixture[str]
) -> None:
    estate.rate_on_both()
    estate.rate("llm2", "control", range(100, 200), "up", run="the one before")
    capsys.readouterr()
    assert estate.collected("show", "--json") == 0
    [rung] = json.loads(capsys.readouterr().out)
    assert rung["units"] == [100, 100], (
        "of the run before on llm2 nothing counts, although it is the newest there"
    )
    thumb = rung["metrics"][0]
    assert (thumb["verdict"], thumb["control"]["values"], thumb["candidate"]["mean"]) == ("better", 100, 1.0)
    asked = [
        event for event in estate.on_record() if event["event.action"] == "experiment outcomes support-12"
    ]
    assert [each["llmkeep.audit.phase"] for each in asked] == ["intent", "outcome"]
    assert asked[-1]["event.type"] == ["info"]


def test_without_all_hosts_there_is_no_verdict(estate: Estate, capsys: pytest.CaptureFixture[str]) -> None:
    """One is away, one keeps no journal, and one's journal is a link to what root alone may read."""
    estate.rate_on_both()
    (estate.folder / "away-llm1").touch()
    estate.add("llm3")
    shutil.rmtree(estate.folder / "llm3/feedback")
    estate.add("llm4")
    secret = estate.folder / "of-root.jsonl"
    secret.write_text("root's\n")
    secret.chmod(0o600)
    (estate.folder / "llm4/feedback/assigned-20261127T08.jsonl").symlink_to(secret)
    assert estate.collected("show") == 1
    said = capsys.readouterr().err
    assert "there is no verdict on support-12, since not all serving hosts delivered their outcomes" in said
    assert re.search("- llm1: .*No route to host", said)
    assert re.search("- llm3 returned an incomplete answer; its last line is .*not a folder", said)
    assert re.search("- llm4 returned an incomplete answer; its last line is .*Permission denied", said)
    assert "root's" not in said
    assert "llm2" not in said
    assert "remove a permanently lost host from [serve]" in said


def test_a_volume_that_is_shut_is_no_empty_journal(
    estate: Estate, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A program stands in for systemd, whose unit for the volume is there and not active."""
    systemctl = estate.folder / "systemctl"
    systemctl.write_text('#!/bin/sh\n[ "$1" = cat ]\n')
    systemctl.chmod(0o755)
    monkeypatch.setenv("PATH", f"{estate.folder}:{os.environ['PATH']}")
    assert estate.collected("show") == 1
    assert (
        "llm1 returned an incomplete answer; its last line is b'its volume is shut: "
        in capsys.readouterr().err
    )


STRANGE = {
    "rubbish": ("echo rubbish", "returned an incomplete answer; its last line is b'rubbish'"),
    "silent": ("", "returned an incomplete answer; its last line is b''"),
    "other": ("""echo '{"unit": 7}'; echo '{"lines":1}'""", "line 1: KeyError('arm')"),
    "torn": ("""yes '[]' | head -n 10000; echo '{"lines":9999}'""", "returned an incomplete answer; its"),
    "endless": ("yes", "prints 1 MiB or more, which is too much to judge"),
    "wailing": ("yes >&2", "prints 1 MiB or more, which is too much to judge"),
}


def test_hosts_that_tell_something_else_are_named(
    estate: Estate, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hosts, "MOST_BYTES", 1 << 20)
    for host, (program, _) in STRANGE.items():
        estate.add(host, f"#!/bin/sh\n{program}\n")
    assert estate.collected("show") == 1
    said = capsys.readouterr().err
    assert "llm1" not in said
    for host, (_, told) in STRANGE.items():
        assert re.search(f"- {host},? {re.escape(told)}", said), said


def test_what_is_no_archive_is_refused_unpacked_no_further_than_it_may_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosts, "MOST_BYTES", 1000)
    for content in (
        b"",
        b"no archive",
        gzip.compress(b"x" * 10_000_000),
        gzip.compress(b'{"lines":0}\n')[:-8],
    ):
        (tmp_path / "llm1.gz").write_bytes(content)
        with pytest.raises(LlmkeepError, match=r"^llm1 "):
            hosts.whole(tmp_path / "llm1.gz")
    (tmp_path / "llm1.gz").write_bytes(gzip.compress(b'{}\n{"lines":1}\n'))
    assert hosts.whole(tmp_path / "llm1.gz") == [b"{}"]


def test_an_experiment_without_outcomes_or_without_entry_says_so(
    estate: Estate, capsys: pytest.CaptureFixture[str]
) -> None:
    assert estate.collected("show") == 0
    assert "support-12 has no outcome in this run" in capsys.readouterr().out
    assert (
        main(["experiment", "stop", NAME, "--source", str(estate.folder / "source"), "--remove", *WHY]) == 0
    )
    assert estate.collected("show") == 1
    assert "has no experiment 'support-12', so its run is unknown" in capsys.readouterr().err
    assert estate.acted("show", "--outcomes", "x", "--publish") == 1
    assert "--publish needs the outcomes of all hosts: give -i" in capsys.readouterr().err


def test_lines_for_the_inventory_name_hosts_in_order_whichever_answered_first(tmp_path: Path) -> None:
    path = tmp_path / "support-12.yml"
    path.write_text(yaml.safe_dump(GIVEN))
    told = for_good(definition.read(path), {"llm2": MODELS, "llm1": MODELS})
    assert "to llm_serving_models of llm1, llm2, in place of an entry support, add" in told


def test_a_candidate_is_promoted_by_what_all_hosts_tell_with_the_lines_for_the_inventory(
    estate: Estate, capsys: pytest.CaptureFixture[str]
) -> None:
    estate.rate_on_both()
    assert estate.collected("promote", *WHY) == 0
    said = capsys.readouterr().out
    assert "support-12: promote from 50 %, on record" in said
    [line] = [line for line in said.splitlines() if line.startswith("  - {")]
    assert yaml.safe_load(line) == [
        {"name": "support", "driver": "naive", "release": "support-8", "memory": "24G"}
    ]
    assert "to llm_serving_models of llm1, llm2, in place of an entry support, add" in said


def test_a_verdict_is_published_to_the_pages_by_a_run_on_record(
    estate: Estate, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run of role operator_page, which needs hosts, is left out: its words are kept."""
    played: list[list[str]] = []

    def play(playbook: Path, *given: Any, **named: Any) -> tuple[int, playbooks.RunResults]:
        if playbook.name != "site.yml":
            return playbooks.play(playbook, *given, **named)
        played.append(given[1])
        return len(played) - 1, playbooks.RunResults(
            failures=["edge1: Preflight: is away"] * (len(played) - 1)
        )

    monkeypatch.setattr(hosts, "play", play)
    monkeypatch.setattr(Places, "verdicts", property(lambda _: estate.folder / "verdicts"))
    estate.rate_on_both()
    capsys.readouterr()
    assert estate.collected("show", "--publish", "--json") == 0
    said = capsys.readouterr()
    assert "support-12.json is on the pages" in said.err
    assert json.loads((estate.folder / "verdicts/support-12.json").read_text()) == json.loads(said.out)
    assert estate.on_record()[-1]["process.args"] == ["--tags", "operator_page"]
    monkeypatch.setattr(hosts, "collect", lambda *_: Evidence({}))
    assert estate.collected("show", "--publish") == 1
    said = capsys.readouterr()
    assert "not on all pages: run `llmkeep site --tags operator_page`" in said.err
    assert "edge1: Preflight: is away" in said.err
    assert played == [["--tags", "operator_page"]] * 2
