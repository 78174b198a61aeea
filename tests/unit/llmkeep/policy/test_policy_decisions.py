"""Three engines decide alike: OPA as a library, a second Rego engine, and the real opa with the signed bundle.

The inputs are generated from a fixed seed; about half of them are hostile: wrong types, unknown roles, nothing at all.
"""

import copy
import json
import random
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import policies
import pytest
from opa_bindings import OpaEngine
from regopy import Interpreter

from llmkeep.policy import bundle as policy
from llmkeep.policy import source as policy_source

SEED, NUMBER, SAMPLE = 20261125, 10_000, 400
LONG = 1_000_000
NOW = datetime.now(UTC)
SOURCE = policy_source.read(policies.SOURCE)
ROLES = sorted(SOURCE.data["llm/roles"])
ACTIONS = sorted({action for role in SOURCE.data["llm/roles"].values() for action in role["actions"]})
ODD: list[Any] = [
    None, True, False, 0, -1, 1.5, 2**53, "", " ", "*", [], {}, [[]], [{}], {"allow": True}, "analyst", ["analyst", 1],
    {"0": "analyst"}, "ｇｅｔ /generate", "GET /generate\n", "get /generate", "GET /Generate", "GET /generate?x=1",
    "Ünïcode", "анал", "管理员", "👩‍🚀", "a\u202eb", "\u2028", "é", "e\u0301", '"', "\\", "\\u0000", "../roles", "x" * 5000,
]  # fmt: skip


def question(chance: random.Random) -> Any:
    """One input: mostly of the right shape, else with one thing or everything wrong."""
    asked: dict[str, Any] = {
        "subject": chance.choice(["alice@corp", "bob", "Ünïcode", "管理员"]),
        "tenant": chance.choice(["corp", "lab", "ò"]),
        "roles": chance.choices(ROLES, k=chance.choice([0, 1, 1, 1, 2, 2, 3, 6])),
        "action": chance.choice(ACTIONS),
    }
    if chance.random() < 0.3:
        asked["groups"] = chance.choices(["staff", "Ünïcode", "analyst"], k=chance.choice([0, 1, 2]))
    for _ in range(chance.choice([0, 0, 1, 1, 2])):
        key = chance.choice(list(asked) or ["roles"])
        match chance.randrange(5):
            case 0:
                asked.pop(key, None)
            case 1:
                asked[key] = chance.choice(ODD)
            case 2 if isinstance(asked.get("roles"), list):
                asked["roles"].insert(
                    chance.randrange(3), chance.choice([*ODD, "root", "Analyst", "analyst "])
                )
            case 3:
                asked[chance.choice(["more", "model", "__proto__", ""])] = chance.choice(ODD)
            case _:
                asked["action"] = chance.choice(
                    [*ODD, "POST /v1/embeddings", "GET /v1/models/small", "DELETE /"]
                )
    return asked if chance.random() < 0.98 else chance.choice(ODD)


QUESTIONS = [question(chance) for chance in [random.Random(SEED)] for _ in range(NUMBER)]  # noqa: S311 -- a seed


def document() -> dict[str, Any]:
    """The data that a bundle of revision 1 has."""
    found = copy.deepcopy(SOURCE.document)
    found["llm"]["meta"] = {"revision": 1, "expires": f"{NOW + timedelta(days=90):%Y-%m-%dT%H:%M:%SZ}"}
    return found


@pytest.fixture(scope="module")
def decisions() -> list[dict[str, Any]]:
    """What OPA as a library says to each question."""
    engine: OpaEngine = policy_source.engine(SOURCE.modules, document())
    return [engine.eval_document("llm.authz.decision", asked) for asked in QUESTIONS]


def test_the_questions_reach_every_rule(decisions: list[dict[str, Any]]) -> None:
    rules = [decision["rule"] for decision in decisions]
    for rule in ("default_deny", "unknown_role", "separation_of_duties", "roles/developer+roles/trainer"):
        assert rules.count(rule) > 20, rule
    allowed = sum(decision["allow"] for decision in decisions)
    assert NUMBER / 10 < allowed < NUMBER * 9 / 10
    assert len({json.dumps(asked) for asked in QUESTIONS}) > NUMBER / 3


def test_a_second_rego_engine_decides_alike(decisions: list[dict[str, Any]]) -> None:
    """It needs three crutches, none of which touches a rule.

    It has no time.parse_rfc3339_ns; it does not escape what it prints, as a reason with the name of an odd role; its
    max compares numbers as text, so here they are of one length.
    """
    second, data = Interpreter(), document()
    for role in data["llm"]["roles"].values():
        role["max_tokens"] += LONG
    second.add_module("authz", SOURCE.modules["llm/authz/authz.rego"])
    second.add_data(data)
    bundle = second.build(
        'd = object.remove(data.llm.authz.decision, ["reason"]) '
        "with time.parse_rfc3339_ns as 4102444800000000000"
    )
    for asked, decision in zip(QUESTIONS, decisions, strict=True):
        second.set_input(asked)
        said = str(second.query_bundle(bundle))  # nothing decided reads `undefined`, which is a no
        found = {} if said == "undefined" else json.loads(said)["bindings"]["d"]
        if "max_tokens" in found:
            found["max_tokens"] -= LONG
        assert found == {key: value for key, value in decision.items() if key != "reason"}, asked


def test_the_real_opa_with_the_signed_bundle_decides_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decisions: list[dict[str, Any]]
) -> None:
    places = policies.control_node(tmp_path, monkeypatch)
    policy.build(places, policies.SOURCE, places.policy_bundle, 90)
    with policies.serving(places.policy_bundle, places.policy_public, tmp_path) as address:
        connection = policies.Connection(address)
        for number in random.Random(SEED).sample(range(NUMBER), SAMPLE):  # noqa: S311 -- a seed
            answer = connection.ask("/v1/data/llm/authz/decision", {"input": QUESTIONS[number]})
            assert answer["result"] == decisions[number], QUESTIONS[number]
        assert connection.ask("/v1/data/llm/authz/decision", {})["result"]["rule"] == "default_deny"
