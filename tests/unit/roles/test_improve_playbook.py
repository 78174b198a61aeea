"""playbooks/improve.yml against hosts of this machine: journals, examples, gates and the way on after each stop.

The real `llm-train feedback export` makes the examples. A program of a few lines stands in for its other verbs, whose words the
real parser reads, tasks for the roles, a file for systemd's state of the job, programs started here for what SSH starts there.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hosts_here
import pytest
import yaml
from plugin_modules import LINK, ROOT, load

load("filter.estate")  # puts the collection where Ansible finds it

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="runs programs as other users, which only root may")
SERVING, TRAINING = (
    "nobody",
    "daemon",
)  # accounts that every Debian has; they stand in for llm-gateway and llm-train
LLM_TRAIN = """#!{python}
import json, os, pathlib, sys
sys.path.insert(0, "{payload}")
from llmtrain.cli import main, parser
words = sys.argv[1:]
options = parser().parse_args(words)
with open("{folder}/verbs", "a") as verbs:
    print(*words, file=verbs)
with open("{folder}/threads", "a") as threads:
    print(words[0], os.environ.get("OMP_NUM_THREADS"), file=threads)
if words[:2] == ["feedback", "export"]:
    sys.exit(main(words))
os.setgid(1), os.setuid(1)
if words[:2] == ["feedback", "pack"]:
    options.out.mkdir()
    (options.out / "rows.json").write_text("{{}}")
elif words[0] == "compare":
    said = pathlib.Path("{folder}/verdict").read_text()
    options.out.write_text(json.dumps({{"verdict": said, "reasons": ["NEW is what the test says"]}}))
    sys.exit(0 if said == "promote" else 8)
else:
    (options.into / "models").mkdir(parents=True)
    (options.into / "models" / (options.name + ".sha256")).write_text("")
"""
TRAINS = [
    {
        "ansible.builtin.command": {
            "argv": ["tee", "{{ round_dir }}/jobs.json"],
            "stdin": "{{ llm_training_jobs | to_json }}",
        }
    }
]


@dataclass
class Estate:
    """A folder with one folder a host."""

    folder: Path
    hosts: tuple[str, ...] = ("train1",)
    serving: tuple[str, ...] = ("llm1",)
    more: dict[str, dict[str, Any]] = field(default_factory=dict)  # variables of a host

    def journal(self, kind: str, hour: str = "20261127T08") -> Path:
        return self.folder / f"llm1/feedback/{kind}-{hour}.jsonl"

    def copied(self, host: str) -> dict[str, str]:
        """Names and contents of a training host's copy, each of which has to be private and the trainer's."""
        found = sorted((self.folder / host / "jobs/journals/llm1").iterdir())
        assert {(path.lstat().st_mode, path.owner()) for path in found} <= {(0o100600, TRAINING)}
        return {path.name: path.read_text() for path in found}

    def rate(self, *numbers: int) -> None:
        for number in numbers:
            head = {"@timestamp": f"2026-11-27T08:00:{number:02d}+00:00", "transaction.id": f"t{number}"}
            head |= {"user.id": "ada", "organization.id": "research"}
            rated = {"llmkeep.feedback.thumb": "up" if number % 2 else "down"}
            prompt = [{"role": "user", "content": f"question {number}"}]
            kept = {"llmkeep.feedback.prompt": prompt, "llmkeep.feedback.answer": "an answer"}
            for kind, record in ("rated", head | rated), ("answered", head | kept):
                with self.journal(kind).open("a") as file:
                    file.write(json.dumps(record) + "\n")
        self.own()

    def own(self) -> None:
        for path in (self.folder / "llm1/feedback").iterdir():
            if not path.is_symlink():
                shutil.chown(path, SERVING)
                path.chmod(0o600)

    def exported_by_first(self, until: str) -> None:
        """What the first training host has once it has exported; the journals stay to be brought."""
        journal = self.folder / "llm1/feedback"
        told = ["--since", "2026-11-01", "--until", until, "--kind", "kto", "--out", f"{journal}/out"]
        subprocess.run(
            [f"{self.folder}/llm-train", "feedback", "export", "--journal", journal, *told],
            check=True,
            capture_output=True,
        )
        out = (journal / "out").rename(self.folder / self.hosts[0] / "jobs/better-1-examples")
        settled = {"since": "2026-11-01", "model": "base", "seq_len": "2048"}
        (out / "round.json").write_text(json.dumps(json.loads((out / "export.json").read_text()) | settled))
        for path in (out, *out.iterdir()):
            shutil.chown(path, TRAINING, TRAINING)

    def trained(self) -> None:
        """What the job leaves."""
        for host in self.hosts:
            output = self.folder / host / "jobs/better-1"
            output.mkdir()
            (output / "training.json").write_text("{}")
            for path in (output, output / "training.json"):
                shutil.chown(path, TRAINING, TRAINING)
        (self.folder / "state").write_text("exited")

    def verbs(self) -> list[str]:
        """What llm-train was called for, on all hosts."""
        file = self.folder / "verbs"
        return (
            [re.sub(" -.*| /.*", "", line) for line in file.read_text().splitlines()] if file.exists() else []
        )

    def improve(self, **given: Any) -> tuple[int, str, int]:
        """Exit code, what was said, and what changed."""
        told = {
            "ansible_python_interpreter": str(self.folder / "python-of-hosts"),
            "round_users": {"serving": SERVING, "training": TRAINING},
            "round_journal": f"{self.folder}/{{{{ journal_host }}}}/feedback",
            "round_memory": str(self.folder / "run"),
            "round_dir": f"{self.folder}/{{{{ inventory_hostname }}}}",
            "round_llm_train": str(self.folder / "llm-train"),
        }
        settled = {
            "enabled": True,
            "name": "better-1",
            "kind": "kto",
            "model": "base",
            "since": "2026-11-01",
            "minimum": 4,
        }
        variables = {f"improve_{name}": value for name, value in settled.items()}
        groups: dict[str, dict[str, Any]] = {
            name: {
                "hosts": {host: {"ansible_connection": "here", **self.more.get(host, {})} for host in hosts}
            }
            for name, hosts in (("serve", self.serving), ("train", self.hosts))
        }
        groups["train"]["vars"] = variables
        (self.folder / "hosts.yml").write_text(yaml.safe_dump({"all": {"children": groups}}))
        command = [Path(sys.executable).with_name("ansible-playbook"), "-i", "hosts.yml"]
        extra = told | {f"improve_{name}": value for name, value in given.items()}
        done = subprocess.run(
            [*map(str, command), "playbooks/improve.yml", "-e", json.dumps(extra)],
            capture_output=True,
            text=True,
            check=False,
            cwd=self.folder,
            env={
                **os.environ,
                "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
                "ANSIBLE_COLLECTIONS_PATH": str(LINK.parents[2]),
                "ANSIBLE_ROLES_PATH": str(self.folder / "roles"),
                **hosts_here.made(self.folder),
                "ANSIBLE_NOCOLOR": "1",
                "PATH": f"{self.folder}:{os.environ['PATH']}",
            },
        )
        said = " ".join((done.stdout + done.stderr).split())
        assert list((self.folder / "run").iterdir()) == [], "nothing that was carried stays"
        return done.returncode, said, sum(map(int, re.findall(r"changed=(\d+)", said)))


@pytest.fixture
def estate(request: pytest.FixtureRequest) -> Iterator[Estate]:
    """An estate that may learn, in a folder that all may enter; by default one host trains."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        folder.chmod(0o755)
        made_of = Estate(folder, *getattr(request, "param", ()))
        (folder / "run").mkdir()
        for host in made_of.serving:
            (folder / host / "feedback").mkdir(parents=True)
            shutil.chown(folder / host / "feedback", SERVING)
        for host in made_of.hosts:
            (folder / host / "jobs").mkdir(parents=True)
            shutil.chown(folder / host / "jobs", TRAINING, TRAINING)
            (folder / host / "held-out.jsonl").write_text('{"text": "held out"}\n')
            (folder / host / "held-out.jsonl").chmod(0o600)
        (folder / "verdict").write_text("promote")
        (folder / "state").write_text("running")
        programs = {
            "llm-train": LLM_TRAIN.format(
                python=ROOT / "payload/.venv/bin/python", payload=ROOT / "payload", folder=folder
            ),
            "systemctl": f"#!/bin/sh\ncat {folder}/state\n",
        }
        for name, program in programs.items():
            (folder / name).write_text(program)
            (folder / name).chmod(0o755)
        shutil.copytree(ROOT / "playbooks", folder / "playbooks")
        [play] = [
            each for each in yaml.safe_load((ROOT / "playbooks/improve.yml").read_text()) if "hosts" in each
        ]
        play["gather_facts"] = False  # which the roles alone need
        (folder / "playbooks/improve.yml").write_text(yaml.safe_dump([play]))
        shutil.copytree(ROOT / "roles/llm_training/defaults", folder / "roles/llm_training/defaults")
        roles: tuple[tuple[str, list[Any]], ...] = (
            ("ipsec/tasks/main", []),
            ("llm_training/tasks/preflight", []),
            ("llm_training/tasks/main", TRAINS),
        )
        for file, tasks in roles:
            path = folder / f"roles/{file}.yml"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(yaml.safe_dump(tasks))
        yield made_of


TRAIN3 = {"llm_training_hosts": ["train1", "train2", "train3"]}


@pytest.mark.parametrize("estate", [[("train1", "train2")]], indirect=True)
@pytest.mark.parametrize(
    ("more", "given", "reasons"),
    [
        (
            {"train2": {"improve_enabled": False}},
            {},
            ["improve_enabled of train2 is False; nothing was changed. A round trains on what users asked"],
        ),
        (
            {
                "train1": TRAIN3,
                "train2": {**TRAIN3, "improve_since": "2026-10-01", "llm_training_dir": "/elsewhere"},
            },
            {"minimun": 3, "kind": "sft", "confirm": "all"},
            [
                "Not known: improve_minimun. train2 and train1 have different improve_since, llm_training_dir: set them",
                "train3 trains too, and is not in this run: leave out --limit",
                "improve_kind is sft: take kto or dpo. improve_confirm is all",
            ],
        ),
    ],
)
def test_refuses_before_anything_is_read(
    estate: Estate, more: dict[str, dict[str, Any]], given: dict[str, Any], reasons: list[str]
) -> None:
    estate.rate(1)
    estate.more |= more
    code, said, changed = estate.improve(**given)
    assert (code, changed) == (2, 0), said
    assert [reason for reason in reasons if reason not in said] == [], said
    assert not (estate.folder / "train1/jobs/journals").exists()


def test_a_round_counts_stops_at_each_gate_and_goes_on_where_it_is(estate: Estate) -> None:
    estate.more["train1"] = {"llm_training_environment": {"OMP_NUM_THREADS": "3"}}
    estate.rate(1, 2, 3)
    secret = estate.folder / "run-of-root"
    secret.write_text("root's")
    secret.chmod(0o600)
    estate.journal("rated", "20261127T09").symlink_to(secret)
    for kind in "rated", "reviewed":
        estate.journal(kind, "20261127T10").write_text("forgotten later\n")
    estate.own()
    away = estate.folder / "away-llm1"
    away.touch()
    code, said, changed = estate.improve()
    assert (code, changed) == (2, 0), said
    assert "llm1 in [serve] cannot be reached, and better-1 has not been exported" in said

    away.unlink()
    code, said, changed = estate.improve()
    assert (code, changed) == (2, 1), said
    assert "3 examples for kto since 2026-11-01, and improve_minimum is 4: 1 are missing" in said
    hours = {
        "answered": ["20261127T08"],
        "rated": ["20261127T08", "20261127T10"],
        "reviewed": ["20261127T10"],
    }
    assert estate.copied("train1") == {
        f"{kind}-{hour}.jsonl": estate.journal(kind, hour).read_text()
        for kind in hours
        for hour in hours[kind]
    }
    (estate.folder / "run/llmkeep-journal-of-llm1.tar.gz").write_text("packed by an interrupted run")
    (estate.folder / "run/llmkeep-journals-for-train1").mkdir()
    code, said, changed = estate.improve()
    assert (code, changed) == (2, 0), said
    assert "when there are more ratings; none came since the last run" in said

    left = estate.folder / "train1/jobs/journals/llm0"
    left.mkdir()
    shutil.chown(left, TRAINING)
    for kind in "rated", "reviewed":
        estate.journal(kind, "20261127T10").unlink()
    estate.rate(4, 5)
    code, said, _ = estate.improve()
    assert code == 0, said
    assert "better-1: 5 examples for kto" in said
    assert "run this again with -e improve_confirm=train" in said
    assert sorted(estate.copied("train1")) == ["answered-20261127T08.jsonl", "rated-20261127T08.jsonl"]
    assert not left.exists(), "llm0 is not in [serve]"
    assert set(estate.verbs()) == {"feedback export"}

    code, said, changed = estate.improve(since="2026-10-01", seq_len=4096, confirm="train")
    assert (code, changed) == (2, 0), said
    assert (
        'better-1 was exported on train1 with {"seq_len": "2048", "since": "2026-11-01"}, and the inventory says '
        '{"seq_len": "4096", "since": "2026-10-01"}; nothing was changed'
    ) in said

    code, said, _ = estate.improve(confirm="train")
    assert code == 0, said
    assert "better-1 trains: `journalctl --follow --unit llm-train@better-1` on train1" in said
    [job] = json.loads((estate.folder / "train1/jobs.json").read_text())
    assert (job["model"], job["data"]) == ("base", {"train": f"{estate.folder}/train1/jobs/better-1-rows"})

    estate.trained()
    code, said, _ = estate.improve()
    assert code == 0, said
    assert "The gate says promote: NEW is what the test says. To make a release candidate" in said

    code, said, _ = estate.improve(confirm="publish")
    assert code == 0, said
    assert f"llmkeep release fetch train1 better-1-candidate -i {estate.folder}/hosts.yml" in said
    assert "--sha256" not in said, "a host's own word of what it made proves nothing"
    once = ["feedback export"] * 3 + ["feedback pack", "compare", "publish"]
    assert estate.verbs() == once
    assert (estate.folder / "threads").read_text().splitlines()[-2:] == ["compare 3", "publish 3"]

    away.touch()
    code, said, changed = estate.improve()
    assert (code, changed) == (0, 0), said
    assert "so the copies of its journal were not refreshed" in said
    assert "better-1 is a release candidate, as it was: nothing was changed" in said
    assert estate.verbs() == once


@pytest.mark.parametrize("estate", [[("train1", "train2"), ("llm1", "llm2")]], indirect=True)
def test_two_hosts_have_the_same_examples_and_what_is_not_better_is_not_published(estate: Estate) -> None:
    """The second serving host has no ratings yet. The second training host was away when the first one exported."""
    estate.rate(*range(1, 6))
    estate.exported_by_first("2026-11-27T08:00:06")
    estate.rate(6)
    estate.trained()
    (estate.folder / "train2/jobs/better-1/training.json").unlink()
    estate.more |= {host: {"llm_training_jobs": [{"name": f"of-{host}"}]} for host in estate.hosts}
    (estate.folder / "verdict").write_text("hold")
    code, said, _ = estate.improve(unattended=True)
    assert code == 2, said
    assert "better-1: 5 examples for kto" in said
    assert "The gate says hold: NEW is what the test says. better-1 ends here, nothing is published" in said
    assert "publish" not in estate.verbs()
    assert estate.copied("train1") == estate.copied("train2")
    for host in estate.hosts:
        jobs = json.loads((estate.folder / host / "jobs.json").read_text())
        assert [job["name"] for job in jobs] == [f"of-{host}", "better-1"]
