"""A round of learning from ratings, by the programs that hosts run, which are killed by SIGKILL at random moments.

A tiny model answers with the wrong town more often than with the right one. A script rates; examples, rows, a job by KTO, the
gate and a release candidate come of it; the candidate answers half of the subjects of an experiment, is better, and then answers
all. 5 kills; `make storm` has 50, ten a round. SEED gives the moments.
"""

import json
import os
import random
import secrets
import shutil
import socket
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import authority
import httpx2 as httpx
import pytest
import yaml
from bulk_index import SHIP, Index, indexing
from killed_round import PATIENCE, Killer, planned
from questions import CHAT, ready
from service import PEPPER, Service, eventually
from tiny import make_undecided

from llmcore.manifest import verified, verify_model, write_manifest
from llmcore.ratings import ANSWERED, ASSIGNED, FIELD, RATED, TIME, TRANSACTION, files, read
from llmproof.heads import Signer
from llmserve.access.api_keys import edited, new_key
from llmserve.access.experiments import Experiment
from llmserve.access.identity import Identity
from llmserve.feedback.documents import HISTORY, LATEST
from llmserve.feedback.response_ids import ResponseIds

KILLS, MOST = int(os.environ.get("STORM", "5")), 10  # of all rounds, and of one
SEED = int(os.environ.get("SEED", "5"))
STEPS = ("answers", "ship", "export", "pack", "train", "compare", "publish", "rung", "promoted")
SIGNER = f"llm-audit/{socket.gethostname()}", bytes.fromhex("5e" * 32)  # of the service's audit writer
ARM = "llmkeep.experiment.arm", "gen_ai.request.model"
RIGHT, WRONG = "Paris", "Lyon"
IDS = ResponseIds((PEPPER,))
EXPERIMENT: dict[str, Any] = {
    "experiment": "support-12",
    "model": "support",
    "control": "support-7",
    "candidate": "support-8",
    "unit": "subject",
    "tenants": ["research"],
    "ladder": [50, 100],
    "days": 1,
    "minimum": 30,
    "metrics": [
        {"name": "thumb", "better": "higher", "difference": 0.1},
        {"name": "corrected", "better": "lower", "difference": 0.1},
    ],
    "expects": {"subjects": 100, "conversations": 100, "requests": 100, "ratings": 100, "alike": 0.2},
}
RULE = {"max_tokens": 8, "alpha": 0.2, "resamples": 1000, "margins": {"exact": 0.1, "f1": 0.1},
        "speed": {"slower": None, "rounds": 4, "prompts": 1, "tokens": 4}}  # fmt: skip


def who(subject: str) -> Identity:
    return Identity("api_key", "1", subject, "research", ("developer",))


@dataclass
class Answer:
    """What a client was told, and what it said about it. `lasted`: one gateway answered and took all ratings."""

    step: str
    subject: str
    question: str
    text: str
    thumbs: list[str] = field(default_factory=list)
    lasted: bool = False


class Round:
    """A round in one folder: its services, and the ledger of what clients were told and said."""

    def __init__(self, folder: Path, kills: int, seed: int) -> None:
        self.folder = folder
        self.chance = random.Random(seed)  # noqa: S311 - moments to repeat
        self.model = folder / "support-7"
        make_undecided(self.model, WRONG, RIGHT)
        write_manifest(self.model, folder / "support-7.sha256")
        self.journal = folder / "journal"
        self.journal.mkdir(mode=0o700)
        self.source = folder / "policy"
        shutil.copytree(authority.ROOT / "policy", self.source)
        self.revision = 0
        bundle = {"engine": "embedded", "bundle": str(folder / "bundle.tar.gz")}
        self.service = Service(
            folder, {"support-7": engine(self.model)}, feedback={"folder": str(self.journal)}, policy=bundle
        )
        self.install_policy()
        self.killer = Killer(self.service, planned(kills, STEPS, self.chance))
        self.ledger: dict[str, Answer] = {}
        self.keys: dict[str, str] = {}

    def install_policy(self) -> None:
        """Sign and install the policy with the experiments of its source."""
        self.revision += 1
        experiments = authority.ladder.entries(authority.policy_source.read(self.source))
        bundle = authority.signed_bundle(
            self.revision, tenants={"research": {"keep_prompts": True}}, experiments=experiments
        )
        aside = self.folder / "bundle.partial"
        aside.write_bytes(bundle)
        aside.replace(self.folder / "bundle.tar.gz")

    def admit(self, subjects: list[str]) -> list[str]:
        """Give each a key."""
        with edited(self.folder / "keys.json") as records:
            for subject in subjects:
                self.keys[subject], record = new_key(PEPPER, subject, "research", ["developer"], None)
                records.append(record)
        return subjects

    def send(self, client: httpx.Client, path: str, body: dict[str, Any]) -> httpx.Response:
        """Send a request until it is acknowledged."""
        end = monotonic() + PATIENCE
        told = ""
        while monotonic() < end:
            try:
                answer = client.post(path, json=body)
                if answer.status_code == 200:
                    return answer
                assert answer.status_code >= 500, answer.text
                told = answer.text
            except httpx.TransportError as error:
                told = repr(error)
            sleep(0.05)
        raise AssertionError(f"not within {PATIENCE:g} s: {told}")

    def talk(self, step: str, asked: tuple[str, str], **more: Any) -> None:
        """Ask, and rate the answer by whether it is right: some change their mind first, some say it twice, some say nothing."""
        subject, question = asked
        chance = random.Random(f"{SEED} {subject} {question}")  # noqa: S311 - to repeat
        gateway = self.service.gateway
        with self.service.client(self.keys[subject]) as client:
            turns = [{"role": "user", "content": question}]
            told = self.send(client, CHAT, {"messages": turns, "max_tokens": 12} | more)
            text = told.json()["choices"][0]["message"]["content"]
            assert text in (RIGHT, WRONG)
            answer = Answer(step, subject, question, text)
            identifier = told.headers["x-llm-response-id"]
            self.ledger[IDS.verify(identifier, who(subject)).transaction] = answer
            last, other = ("up", "down") if text == RIGHT else ("down", "up")
            for thumb in chance.choice([[other, last], [last, last], [last], [last], [last], []]):
                answer.thumbs.append(thumb)
                self.send(client, "/v1/feedback", {"id": identifier, "thumb": thumb})
            answer.lasted = self.service.gateway is gateway

    def ratings(self, *steps: str) -> dict[str, str]:
        """The last word about each answer of these steps that was rated, by transaction."""
        return {
            transaction: answer.thumbs[-1]
            for transaction, answer in self.ledger.items()
            if answer.thumbs and answer.step in (steps or STEPS)
        }

    def ship(self, index: Index) -> None:
        """Send ratings to Elasticsearch's stand-in."""
        before = index.requests
        arguments = ["-c", SHIP, "feedback", "ship", "--folder", str(self.journal), "--url", index.url]
        self.killer.carry_out("ship", arguments, 0.8, self.folder / "never", lambda: index.requests > before)

    def train(
        self, step: str, cpu_seconds: float, product: str, *arguments: object, writes: str = ""
    ) -> Path:
        """A command of llm-train, whose product is in this round's folder."""
        done = self.folder / product
        pattern = writes or f"*{done.name}*"
        self.killer.carry_out(
            step,
            ["-m", "llmtrain", *map(str, arguments)],
            cpu_seconds,
            done,
            lambda: any(done.parent.glob(pattern)),
        )
        assert done.exists()
        return done

    def answers(self, index: Index) -> None:
        """Subjects ask and rate, while ratings go to Elasticsearch."""
        people = self.admit([f"subject{number}" for number in range(12)])
        asked = [(each, f"which town, asked {nth} by {each}?") for nth in range(4) for each in people]
        first, more = asked[:16], asked[16:]
        talk = partial(self.talk, "answers", model="support-7")
        for one in first:
            talk(one)
        self.killer.converse("answers", lambda one: talk(one) if one else self.ship(index), [None, *more])

    def learn(self) -> Path:
        """From the journal to a release candidate; returns the model."""
        held_out = self.folder / "held-out.jsonl"
        held_out.write_text("".join(
            json.dumps({"question": f"what is the capital, asked {number} times?", "answer": RIGHT}) + "\n"
            for number in range(33)
        ))  # fmt: skip
        key, rule, job = (self.folder / name for name in ("key", "gate.yaml", "job.yaml"))
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(32))
        rule.write_text(json.dumps(RULE))
        (self.folder / "round").mkdir()
        told = {
            "name": "round", "model": str(self.model), "method": {"kind": "lora", "target": "linear"},
            "data": {"train": str(self.folder / "rows")}, "output": str(self.folder / "round"),
            "optim": {"lr": 1.5e-4, "precision": "fp32", "epochs": 3}, "keep": {"every_steps": 1}, "watch": {"log_every": 1},
            "preference": {"beta": 0.3},
            "scale": {"strategy": "ddp", "processes": 1, "micro_batch": 1, "tokens_per_step": 8 * 256},
        }  # fmt: skip
        job.write_text(json.dumps(told))
        examples, rows = self.folder / "examples", self.folder / "rows"
        # Without the held-out set, which has one of the two answers.
        rated = ["--journal", self.journal, "--kind", "kto", "--since", "2026-01-01", "--out", examples]
        self.train("export", 0.6, "examples", "feedback", "export", *rated)
        packing = ["--examples", examples, "--model", self.model, "--seq-len", 256, "--out", rows]
        self.train("pack", 2.5, "rows", "feedback", "pack", *packing)
        done = self.train(
            "train", 8, "round/training.json", "run", job, "--key-file", key, writes="metrics.jsonl"
        )
        new = f"{self.model}+{done.parent / 'adapter'}"
        judged = ["--data", held_out, "--rule", rule, "--out", done.parent / "verdict.json"]
        self.train("compare", 4, "round/verdict.json", "compare", self.model, new, *judged)
        into = ["--into", self.folder / "candidate", "--name", "support-8", "--licence", "MIT"]
        return self.train("publish", 4, "candidate", "publish", done.parent, *into) / "models/support-8"

    def serve(self, candidate: Path) -> None:
        """Serve the candidate beside the model that it was made of."""
        self.service.engine_models["support-8"] = engine(candidate)
        self.service.start_engine("support-8")
        assert self.service.gateway
        self.service.gateway.stop()
        self.service.start_gateway()
        eventually("both models are there", lambda: ready(self.service), PATIENCE)

    def experiment(self) -> None:
        """Start it, have half of the subjects meet the candidate until that is known to be better, and promote it."""
        file = self.folder / "support-12.yml"
        file.write_text(yaml.safe_dump(EXPERIMENT))
        declared = authority.definition.read(file)
        authority.ladder.start(self.source, declared, "release 8")
        self.install_policy()
        salt = authority.ladder.entries(authority.policy_source.read(self.source))["support-12"]["salt"]
        assigning = Experiment(
            declared.name, declared.model, declared.control, declared.candidate, "subject", 50, salt
        )
        arms: dict[str, list[str]] = {"control": [], "candidate": []}
        for number in range(1000):
            subject = f"other{number}"
            arms[assigning.assign(who(subject), "").arm].append(subject)
        talk = partial(self.talk, "rung", model="support", temperature=0)
        outcomes = self.folder / "outcomes.jsonl"
        while True:
            subjects = [arms[arm].pop(0) for _ in range(37) for arm in arms]
            self.killer.converse("rung", talk, [(each, "which town is it?") for each in self.admit(subjects)])
            done = self.service.cli(
                "feedback", "outcomes", "--experiment", "support-12", "--folder", str(self.journal)
            )
            assert done.returncode == 0, done.stderr
            outcomes.write_text(done.stdout)
            if min(rated(outcomes).values()) >= EXPERIMENT["minimum"]:
                break
        told = authority.ladder.Evidence(authority.outcomes.read(outcomes, declared))
        authority.ladder.promote(self.source, declared, told, "better", None)
        self.install_policy()

    def promoted(self) -> None:
        """All subjects are answered by the candidate. Here are the kills that came too late for their command."""
        self.killer.plan["promoted"] += self.killer.late
        talk = partial(self.talk, "promoted", model="support", temperature=0)
        asked = [
            (f"subject{number}", f"and which town is it now, {turn}?") for number in range(8) for turn in "ab"
        ]
        self.killer.converse("promoted", talk, asked[:-1])
        talk(asked[-1])


def rated(outcomes: Path) -> Counter[str]:
    """How many units of each arm have rated."""
    lines = map(json.loads, outcomes.read_text().splitlines())
    return Counter(control=0, candidate=0) + Counter(
        arm for arm, _ in {(each["arm"], each["unit"]) for each in lines if "metric" in each}
    )


def engine(model: Path) -> dict[str, Any]:
    """A model in an engine's configuration, in the precision that the gate compares in."""
    manifest = model.parent / f"{model.name}.sha256"
    described = {"driver": "naive", "path": str(model), "manifest": str(manifest), "threads": 1}
    return described | {"dtype": "float32", "temperature": 1}


def kept(folder: Path, kind: str) -> Iterator[dict[str, Any]]:
    return (record for path in files(folder, kind) for record in read(path))


def check_ratings(done: Round, index: Index) -> None:
    """Each acknowledged rating is there once, as the last word; none that was not sent."""
    told = done.service.cli("feedback", "list", "--folder", str(done.journal))
    listed = [json.loads(line) for line in told.stdout.splitlines()]
    assert len(listed) == len({each[TRANSACTION] for each in listed})
    assert {each[TRANSACTION]: each[FIELD + "thumb"] for each in listed} == done.ratings()
    sent = {(transaction, thumb) for transaction, answer in done.ledger.items() for thumb in answer.thumbs}
    history = {(each[TIME], each[TRANSACTION], each[FIELD + "thumb"]) for each in kept(done.journal, RATED)}
    assert {each[1:] for each in history} == sent
    latest, every = (index.of(name) for name in (LATEST, HISTORY))
    assert {name: each[FIELD + "thumb"] for name, each in latest.items()} == done.ratings()
    assert len(every) == len(history)
    assert {(each[TIME], each[TRANSACTION], each[FIELD + "thumb"]) for each in every.values()} == history


def check_examples(done: Round) -> None:
    """Each rating is an example once, or rejected as one whose text was lost with the gateway."""
    lines = [json.loads(line) for line in (done.folder / "examples/kto.jsonl").read_text().splitlines()]
    rejects = [json.loads(line) for line in (done.folder / "examples/rejects.jsonl").read_text().splitlines()]
    exported = [each["id"] for each in lines + rejects]
    assert sorted(exported) == sorted(done.ratings("answers"))
    for each in rejects:
        assert each["rule"] == "no_text"
        assert not done.ledger[each["id"]].lasted
    for each in lines:
        answer = done.ledger[each["id"]]
        assert each["prompt"] == [{"role": "user", "content": answer.question}]
        assert each["completion"] == [{"role": "assistant", "content": answer.text}]
        assert each["label"] == (answer.text == RIGHT)


def check_arms(done: Round) -> None:
    """Each answer has an intent on record, which names the arm and the model that have answered."""
    intents: dict[str, dict[str, Any]] = {}
    for event in done.service.records():
        if event.get("llmkeep.audit.phase") == "intent":
            first = intents.setdefault(event[TRANSACTION], event)
            # Twice where the writer was killed before it said that it is on disk.
            assert [event.get(name) for name in ARM] == [first.get(name) for name in ARM]
    arms = Counter[tuple[str, str]]()
    for transaction, answer in done.ledger.items():
        intent = intents[transaction]
        arm = intent.get("llmkeep.experiment.arm", "")
        arms[answer.step, arm] += 1
        if arm:
            answered = "support-8" if answer.text == RIGHT else "support-7"
            assert intent["gen_ai.request.model"] == answered
            assert answered == EXPERIMENT[arm] or "llmkeep.experiment.away" in intent
    assert {step for step, arm in arms if not arm} == {"answers"}
    assert arms["promoted", "control"] == 0
    for line in kept(done.journal, ASSIGNED):
        intent = intents[line[TRANSACTION]]
        assert intent["llmkeep.experiment.arm"] == line["llmkeep.experiment.arm"]
    for line in kept(done.journal, ANSWERED):
        intent = intents[line[TRANSACTION]]
        assert intent["gen_ai.request.model"] == line["llm.model"]
    told = done.service.cli(
        "audit", "verify", "--verifier", Signer(*SIGNER).verifier.text, str(done.folder / "audit")
    )
    assert told.returncode == 0, told.stdout + told.stderr


def check_candidate(done: Round) -> None:
    """It is there once, whole, and made of what the job has learned."""
    models = done.folder / "candidate/models"
    assert sorted(path.name for path in models.iterdir()) == ["support-8", "support-8.sha256"]
    assert [path.name for path in done.folder.glob("*candidate*")] == ["candidate"]
    verify_model(models / "support-8", models / "support-8.sha256")
    told = json.loads((models / "support-8/training.json").read_text())["published"]
    assert (told["verdict"], told["learned"]) == ("promote", verified(done.folder / "round/adapter"))


@pytest.mark.parametrize("number", range(-(-KILLS // MOST)))
def test_a_round_whose_programs_are_killed_loses_and_doubles_nothing(tmp_path: Path, number: int) -> None:
    kills = min(MOST, KILLS - number * MOST)
    done = Round(tmp_path, kills, SEED + number)
    print(f"SEED={SEED + number}: { ({step: len(each) for step, each in done.killer.plan.items()}) }")
    with indexing() as index:
        try:
            done.service.start()
            done.answers(index)
            done.serve(done.learn())
            done.experiment()
            done.promoted()
            done.ship(index)
        finally:
            print(f"killed: {', '.join(done.killer.killed)}")
            done.service.stop()
    assert len(done.killer.killed) == kills
    check_ratings(done, index)
    check_examples(done)
    check_arms(done)
    check_candidate(done)
