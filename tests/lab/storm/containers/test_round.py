"""A round of learning on three hosts made by `site.yml`: SmolLM2 answers, a script rates, the model learns by KTO, passes the
gate, answers 1 % of the users, and is promoted by their ratings (docs/use/loop.md, "Once in the lab"). Every step is an
operator's command, and the commands that llmkeep prints are run as they stand. `make storm` has it.
"""

import http.client
import json
import os
import re
import ssl
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice, product
from threading import local
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from estate import Client, Lab, fetch_sign_and_add, open_client, within

BASE, NEW = "smollm2-135m-instruct", "round-1"
HOSTS = {"ops1": "floor", "llm1": "installed", "train1": "floor"}  # and the snapshots from which they start
TRAINING = "/srv/llmkeep/training"
FORMS = (
    "What is the capital of {}?",
    "Which city is the capital of {}?",
    "Name the capital of {}.",
    "Tell me the capital of {}.",
)
RATED = (
    "France", "Germany", "Spain", "Italy", "Portugal", "Poland", "Austria", "Greece", "Sweden", "Norway", "Finland", "Denmark",
    "Ireland", "Hungary", "Romania", "Bulgaria", "Serbia", "Croatia", "Ukraine", "Russia", "Turkey", "Egypt", "Morocco", "Kenya",
    "Ghana", "Japan", "China", "India", "Thailand", "Vietnam",
)  # fmt: skip
# Of these the base model, by its likeliest words, mostly says what the country is. Users of the experiment ask about them.
AT_LENGTH = ("Spain", "Portugal", "Denmark", "Ireland", "Morocco", "Ghana")
HELD_OUT = """
    Albania Tirana, Armenia Yerevan, Azerbaijan Baku, Belarus Minsk, Belgium Brussels, Bosnia Sarajevo, Cyprus Nicosia,
    Estonia Tallinn, Georgia Tbilisi, Iceland Reykjavik, Latvia Riga, Lithuania Vilnius, Malta Valletta, Moldova
    Chisinau, Montenegro Podgorica, Netherlands Amsterdam, Slovakia Bratislava, Slovenia Ljubljana, Switzerland Bern,
    Afghanistan Kabul, Bangladesh Dhaka, Bhutan Thimphu, Indonesia Jakarta, Iran Tehran, Iraq Baghdad, Israel Jerusalem,
    Jordan Amman, Kazakhstan Astana, Laos Vientiane, Lebanon Beirut, Mongolia Ulaanbaatar, Nepal Kathmandu, Oman Muscat,
    Pakistan Islamabad, Qatar Doha, Syria Damascus, Yemen Sanaa, Algeria Algiers, Angola Luanda, Botswana Gaborone,
    Cameroon Yaounde, Gambia Banjul, Libya Tripoli, Mali Bamako, Namibia Windhoek, Nigeria Abuja, Rwanda Kigali, Senegal
    Dakar, Somalia Mogadishu, Sudan Khartoum, Tunisia Tunis, Uganda Kampala, Zambia Lusaka, Zimbabwe Harare, Bolivia
    Sucre, Brazil Brasilia, Chile Santiago, Colombia Bogota, Ecuador Quito, Paraguay Asuncion, Peru Lima, Uruguay
    Montevideo, Venezuela Caracas, Canada Ottawa, Cuba Havana, Jamaica Kingston, Australia Canberra, Fiji Suva
"""
# What only users would notice is not judged: `generate` beside another host's work has no steady time.
RULE = {
    "max_tokens": 24,
    "margins": {"exact": 0.1, "f1": 0.1},
    "speed": {"slower": None, "rounds": 4, "prompts": 1, "tokens": 4},
}
EXPERIMENT: dict[str, Any] = {
    "experiment": "short",
    "model": BASE,
    "control": BASE,
    "candidate": NEW,
    "unit": "subject",
    "tenants": ["demo"],
    "ladder": [1, 50],
    "days": 1,
    "minimum": 30,
    "metrics": [
        {"name": "thumb", "better": "higher", "difference": 0.5},
        {"name": "corrected", "better": "lower", "difference": 0.5},
    ],
    "guardrails": {"length": 3},  # it learned to be short
    "expects": {"subjects": 3600, "conversations": 3600, "requests": 3600, "ratings": 3600, "alike": 0},
}
SUBJECTS = 6000  # at most; 1 % of them have the candidate
KEYS = """
import json, sys
from llmserve.access.api_keys import edited, new_key
from llmserve.access.api_keys_cli import KEYS_FILE, gateway_pepper
pepper, made = gateway_pepper(None), {}
with edited(KEYS_FILE) as records:
    for subject in json.load(sys.stdin):
        made[subject], record = new_key(pepper, subject, "demo", ["developer"], None)
        records.append(record)
print(json.dumps(made))
"""
POLICY = """set -e
mkdir -p /etc/llmkeep/policy
cp -r /opt/llmkeep/tree/policy /etc/llmkeep/policy/source
echo 'demo: {keep_prompts: true}' > /etc/llmkeep/policy/source/llm/tenants/data.yaml
llmkeep policy build
"""


class Users:
    """Subjects with a key each, who ask and rate over a few connections. `thumbs` are the acknowledged ratings."""

    def __init__(self, client: Client) -> None:
        self.target = urlsplit(client.url)
        self.context = ssl.create_default_context(cafile=str(client.ca))
        self.own = local()
        self.thumbs: Counter[str] = Counter()

    def post(self, key: str, path: str, body: object) -> Any:
        """What the edge answers, as soon as it does, within two minutes."""
        end, told = time.monotonic() + 120, ""
        while time.monotonic() < end:
            try:
                if not hasattr(self.own, "link"):
                    self.own.link = http.client.HTTPSConnection(
                        str(self.target.hostname), self.target.port, context=self.context, timeout=120
                    )
                self.own.link.request("POST", path, json.dumps(body), {
                    "authorization": f"Bearer {key}", "content-type": "application/json"
                })  # fmt: skip
                answer = self.own.link.getresponse()
                content = answer.read()
                if answer.status == 200:
                    return json.loads(content)
                told = f"{answer.status} {content[:300]!r}"
            except (OSError, http.client.HTTPException) as error:
                told = repr(error)
                del self.own.link
            time.sleep(0.5)
        raise AssertionError(f"no answer within two minutes; the last one: {told}")

    def talk(self, key: str, question: str, **how: Any) -> tuple[str, str]:
        """Ask, and rate: a whole answer of at most 8 words is good. Returns the answer and the thumb."""
        turns = [{"role": "user", "content": question}]
        told = self.post(
            key, "/v1/chat/completions", {"model": BASE, "messages": turns, "max_tokens": 40} | how
        )
        [choice] = told["choices"]
        text = choice["message"]["content"]
        thumb = "up" if choice["finish_reason"] == "stop" and len(text.split()) <= 8 else "down"
        self.post(key, "/v1/feedback", {"id": told["id"], "thumb": thumb})
        return text, thumb

    def all_talk(self, asked: list[tuple[str, str]], **how: Any) -> None:
        """Let each (key, question) be asked and rated, a few at a time."""
        with ThreadPoolExecutor(3) as pool:
            self.thumbs.update(thumb for _, thumb in pool.map(lambda each: self.talk(*each, **how), asked))


def new_keys(lab: Lab, subjects: list[str]) -> dict[str, str]:
    """As `llm-serve keys add` makes them, in one process."""
    python = "/opt/llmkeep/current/bin/python3"
    keys: dict[str, str] = json.loads(
        lab.run("exec", "llm1", "--", python, "-c", KEYS, given=json.dumps(subjects)).stdout
    )
    return keys


def held_out() -> list[dict[str, str]]:
    """Of other countries what an expert would have answered, and texts that the model should go on to know."""
    pairs = [pair.split() for pair in HELD_OUT.split(",")]
    rows = [
        {"question": form.format(country), "answer": f"The capital of {country} is {city}."}
        for (country, city), form in zip(pairs, FORMS * len(pairs), strict=False)
    ]
    more = "It is the largest city of the country, and the seat of its government."
    return rows + [{"text": f"The capital of {country} is {city}. {more}"} for country, city in pairs[:40]]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """Three hosts with the estate, whose policy has tenant demo consent, and what the gate asks on the host that trains."""
    lab = Lab("round", ("inventory/lab", "inventory/lab-round"))
    lab.floor()
    for host, snapshot in HOSTS.items():
        lab.run("restore", host, snapshot)
    lab.on("ops1", POLICY)
    lab.site()
    lines = "".join(json.dumps(row) + "\n" for row in held_out())
    for name, content in (("held-out.jsonl", lines), ("gate.yaml", json.dumps(RULE))):
        lab.on("train1", f"cat > {TRAINING}/{name}", given=content)
    yield lab
    if "LAB_KEEP" not in os.environ:
        lab.run("destroy")


def improve(lab: Lab, *options: str) -> str:
    """What a step of the round says, on one line: Ansible folds long ones."""
    said = lab.on("ops1", lab.command("run playbooks/improve.yml", *options), timeout=1800)
    return " ".join(said.split())


def learn(lab: Lab) -> str:
    """From ratings to a release on the mirror, confirming each gate; returns what the gate says."""
    assert f"{NEW} is exported and not trained" in improve(lab)
    said = improve(lab, "-e improve_confirm=train", "-e improve_wait_seconds=1200")
    [verdict] = re.findall(r"The gate says (promote: .*?) To make", said)
    said = improve(lab, "-e improve_confirm=publish")
    [fetch] = re.findall(rf"(llmkeep release fetch train1 {NEW}-candidate(?: -i [\w/.-]+)+)", said)
    fetch_sign_and_add(lab, fetch)
    return str(verdict)


def site_with(lab: Lab, models: list[dict[str, Any]]) -> None:
    """Give hosts these models, and the policy as it was built last."""
    given = json.dumps({"serve": {"vars": {"llm_serving_models": models}}})
    lab.on("ops1", "llmkeep policy build && cat > /root/models.json", given=given)
    lab.site("-i /root/models.json", "--tags opa,llm_serving")


def experiment(lab: Lab, verb: str, *options: str) -> str:
    """What `llmkeep experiment VERB` says."""
    return lab.on("ops1", " ".join(["llmkeep experiment", verb, "/root/short.yml", *options]))


def outcomes(lab: Lab) -> Counter[str]:
    """How many users of each arm rated."""
    told = lab.on("llm1", "runuser -u llm-gateway -- llm-serve feedback outcomes --experiment short")
    return Counter(
        each["arm"] for each in map(json.loads, told.splitlines()) if each.get("metric") == "thumb"
    )


def start(lab: Lab, models: list[dict[str, Any]]) -> None:
    """Serve both models, and give the first step's users the candidate."""
    lab.on("ops1", "cat > /root/short.yml", given=yaml.safe_dump(EXPERIMENT))
    assert "candidate 36, control 3564" in experiment(lab, "check")
    assert "start at 1 %" in experiment(lab, "start", "--reason 'short answers'")
    site_with(lab, models)
    watched = "cat /var/lib/llm-feedback/guard/watched.json; true"
    within(120, "the experiment is watched", lambda: "short" in lab.on("llm1", watched))


def arms_on_record(lab: Lab) -> set[tuple[str, str]]:
    """Arms, and the models that were asked for them, of all intents."""
    intents = lab.on("llm1", "llm-audit show --json | grep '\"llmkeep.experiment.arm\"' | grep '\"intent\"'")
    return {
        (each["llmkeep.experiment.arm"], each["gen_ai.request.model"])
        for each in map(json.loads, intents.splitlines())
    }


def test_a_model_learns_from_ratings_and_is_promoted_by_the_users_of_its_first_step(lab: Lab) -> None:
    begun = time.monotonic()

    def told(what: str) -> None:
        print(f"{time.monotonic() - begun:5.0f} s  {what}")

    users = Users(open_client(lab))
    subjects = [f"rater{number}" for number in range(4)] + [f"user{number}" for number in range(SUBJECTS)]
    keys = list(new_keys(lab, subjects).values())
    raters, others = keys[:4], iter(keys[4:])
    questions = [form.format(country) for form, country in product(FORMS, RATED)]
    users.all_talk(list(zip(cycle(raters), questions, strict=False)))
    told(f"{len(questions)} answers rated: {users.thumbs}")

    told(learn(lab))

    base = {
        "name": BASE,
        "driver": "naive",
        "model": BASE,
        "memory": "1280M",
        "context": 2048,
        "threads": 1,
        "dtype": "float32",
    }
    new = {key: value for key, value in base.items() if key != "model"} | {"name": NEW, "release": NEW}
    start(lab, [base, new])
    told("the experiment runs at 1 %")
    asked = cycle(form.format(country) for form, country in product(FORMS, AT_LENGTH))
    hosts = [f"-i {each}" for each in (*lab.inventories, "/root/models.json")]
    # At temperature 0 most answers come out of the cache, which each arm has for itself.
    users.all_talk(list(zip(islice(others, 60), asked, strict=False)), temperature=0)
    early = " ".join(["llmkeep experiment promote /root/short.yml --reason early", *hosts])
    assert "refused, since" in lab.run("exec", "ops1", "--", "sh", "-c", early, check=False).stderr
    while (rated := outcomes(lab))["candidate"] < EXPERIMENT["minimum"]:
        more = list(zip(islice(others, 300), asked, strict=False))
        assert more, f"of {SUBJECTS} users too few have the candidate: {rated}"
        users.all_talk(more, temperature=0)
    told(f"rated at 1 %: {rated}")
    [rung] = json.loads(experiment(lab, "show", "--json", *hosts))
    told(json.dumps(rung))
    assert not rung["stopped"]
    assert {each["metric"]: each["verdict"] for each in rung["metrics"]} == {
        "thumb": "better",
        "corrected": "undecided",
    }
    assert arms_on_record(lab) == {("control", BASE), ("candidate", NEW)}

    said = experiment(lab, "promote", "--reason better", *hosts)
    [entry] = re.findall(r"^  - ([{].*[}])$", said, re.MULTILINE)
    promoted = yaml.safe_load(entry)
    assert promoted == new | {"name": BASE}
    site_with(lab, [promoted, new])
    for command in re.findall(r"^  (llmkeep .*)$", said, re.MULTILINE)[:-1]:
        lab.on("ops1", command)
    site_with(lab, [promoted])
    told("promoted")
    rated = users.thumbs.copy()
    users.all_talk(
        [(raters[0], form.format(country)) for form, country in product(FORMS, AT_LENGTH)], temperature=0
    )
    now = users.thumbs - rated
    told(f"all have the candidate: {now}")
    assert now["up"] > now["down"]  # the base model says 3 of these 24 in so few words
    listed = lab.on("llm1", "runuser -u llm-gateway -- llm-serve feedback list")
    assert Counter(json.loads(line)["llmkeep.feedback.thumb"] for line in listed.splitlines()) == users.thumbs
    lab.on("llm1", "llm-serve audit verify")
    told("the record verifies")
