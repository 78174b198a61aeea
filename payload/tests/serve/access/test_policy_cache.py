"""Decisions in this process: how they are parsed, how long they are cached, and what happens without one."""

import asyncio
import time
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import jwt
import pytest
from authority import KEY, PUBLIC_KEY, signed_bundle
from cryptography.hazmat.primitives.asymmetric import ec
from lost_power import Disk
from scripted_opa import ALLOWED, DENIED

from llmcore.config import ConfigError
from llmserve.access import policy as module
from llmserve.access.aliases import Alias
from llmserve.access.break_glass import AUDIENCE, RATE, BreakGlass
from llmserve.access.decision import Decision, PolicyUnavailable, Rate, parse_decision
from llmserve.access.identity import Identity
from llmserve.access.opa import OpaEmbedded
from llmserve.access.policy import Policy, denied, policy_unavailable, read_revision
from llmserve.api.errors import ApiError
from llmserve.metrics import Metrics

ADA = Identity("api_key", "a1", "ada", "research", ("analyst",))
GENERATE = "GET /generate"


class Engine:
    """Answers with `answer`, or raises it, and notes each query."""

    def __init__(self) -> None:
        self.answer: object = ALLOWED
        self.queries: list[dict[str, Any]] = []

    async def evaluate(self, query: dict[str, Any]) -> object:
        self.queries.append(query)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def close(self) -> None:
        """Nothing is open."""


class Case:
    """A policy with that engine; the test moves the monotonic clock."""

    def __init__(self, seen: Path | None = None, glass: BreakGlass | None = None) -> None:
        self.engine, self.metrics = Engine(), Metrics()
        self.policy = Policy(self.engine, self.metrics, seen, glass)

    def decide(self, identity: Identity = ADA, action: str = GENERATE) -> Decision:
        return asyncio.run(self.policy.decide(identity, action))

    def code(self) -> str:
        with pytest.raises(ApiError) as caught:
            self.decide()
        return caught.value.code

    def metric(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(name, labels)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def glass(folder: Path, key: ec.EllipticCurvePrivateKey = KEY, **changes: Any) -> BreakGlass:
    """A break-glass file for ada, with `changes`; None removes a claim."""
    now = datetime.now(UTC)
    claims = {
        "aud": AUDIENCE, "sub": "ada", "tenant": "research", "iat": now, "exp": now + timedelta(hours=4),
        "reason": "incident 4711", "actions": [GENERATE], **changes,
    }  # fmt: skip
    claims = {name: value for name, value in claims.items() if value is not None}
    path = folder / "glass.jwt"
    path.write_text(jwt.encode(claims, key, algorithm="ES256") + "\n")
    return BreakGlass(path, PUBLIC_KEY)


def test_a_decision_has_what_the_policy_said() -> None:
    decision = parse_decision(ALLOWED)
    assert (decision.allow, decision.reason, decision.rule) == (True, ALLOWED["reason"], "roles/analyst")
    assert (decision.revision, decision.models, decision.max_tokens) == (7, None, 256)
    assert decision.rate == Rate("standard", 10**6, 10**9, 10**12, 5)
    assert decision.log_prompt is False
    assert len(decision.id) == 16
    assert parse_decision(ALLOWED).id != decision.id
    assert parse_decision({**ALLOWED, "log_prompt": True}).log_prompt is True
    assert parse_decision({**ALLOWED, "revision": 0, "max_tokens": 0}).max_tokens == 0
    named = parse_decision({**ALLOWED, "models": ["echo"]})
    assert named.models == frozenset({"echo"})
    retired = {"model": "echo", "deprecated": "2026-11-01", "sunset": "2027-02-01"}
    aliases = parse_decision({**ALLOWED, "aliases": {"default": {"model": "echo"}, "old": retired}}).aliases
    assert aliases == {"default": Alias("echo"), "old": Alias("echo", date(2026, 11, 1), date(2027, 2, 1))}
    answering = {"model": "echo", "collections": ["handbook"]}
    [alias] = parse_decision({**ALLOWED, "aliases": {"ask": answering}}).aliases.values()
    assert alias == Alias("echo", collections=("handbook",))
    older = {name: value for name, value in ALLOWED.items() if name not in ("roles", "aliases")}
    assert (parse_decision(older).roles, parse_decision(older).aliases) == ((), {}), "an estate's own rules"
    assert (named.permits("echo"), named.permits("other"), decision.permits("other")) == (True, False, True)


def test_a_denial_permits_nothing_whatever_else_it_says() -> None:
    decision = parse_decision({**ALLOWED, **DENIED})
    assert (decision.allow, decision.reason, decision.rule, decision.revision) == (
        False,
        DENIED["reason"],
        "default_deny",
        7,
    )
    assert (decision.permits("echo"), decision.max_tokens) == (False, 0)
    assert decision.rate == Rate("none", 0, 0, 0)
    assert decision.rate.priority == 0


RATES: dict[str, Any] = ALLOWED["rate"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"allow": 1}, "not a decision"),
        ({"allow": None}, "not a decision"),
        ({"reason": ""}, "decision's reason is not a non-empty string: ''"),
        ({"reason": 7}, "decision's reason"),
        ({"rule": None}, "decision's rule is not a non-empty string: 'None'"),
        ({"revision": True}, "decision's revision is not a non-negative integer: 'True'"),
        ({"revision": -1}, "decision's revision"),
        ({"revision": 7.0}, "decision's revision"),
        ({"revision": "x" * 50}, f"integer: '{'x' * 40}'$"),
        ({"rule": ["x" * 50]}, r"string: \"\['x{38}\"$"),
        ({"models": "*"}, "models are not a list of names"),
        ({"models": ["echo", 5]}, "models are not a list of names"),
        ({"rate": [5]}, "lacks its rate or log_prompt"),
        ({"log_prompt": 0}, "lacks its rate or log_prompt"),
        ({"max_tokens": None}, "decision's max_tokens"),
        ({"rate_class": ""}, "decision's rate_class"),
        ({"rate": RATES | {"requests_per_minute": "5"}}, "decision's requests_per_minute"),
        ({"rate": RATES | {"tokens_per_minute": None}}, "decision's tokens_per_minute"),
        ({"rate": RATES | {"tokens_per_day": -1}}, "decision's tokens_per_day"),
        ({"rate": RATES | {"priority": 1.5}}, "decision's priority"),
    ],
)
def test_an_answer_that_is_no_whole_decision_is_none(change: dict[str, Any], said: str) -> None:
    with pytest.raises(PolicyUnavailable, match=said):
        parse_decision({**ALLOWED, **change})


@pytest.mark.parametrize("answer", [None, True, [], "allow", 5])
def test_an_answer_that_is_no_object_is_no_decision(answer: object) -> None:
    with pytest.raises(PolicyUnavailable, match="not a decision"):
        parse_decision(answer)


def test_the_engine_is_asked_once_in_five_seconds_for_an_allowance_and_each_second_for_a_denial(
    clock: list[float],
) -> None:
    case = Case()
    for answer, seconds in (ALLOWED, 5.0), (DENIED, 1.0):
        case.engine.answer = answer
        case.policy.decisions.clear()
        case.engine.queries.clear()
        first = case.decide()
        clock[0] += seconds - 0.01
        assert case.decide() is first
        clock[0] += 0.01
        assert case.decide() is not first
        asked = {
            "subject": "ada",
            "tenant": "research",
            "roles": ["analyst"],
            "groups": [],
            "action": GENERATE,
        }
        assert case.engine.queries == [asked] * 2
    assert case.metric("llm_policy_decisions_total", result="allow") == 2
    assert case.metric("llm_policy_decisions_total", result="deny") == 2


def test_each_subject_tenant_role_group_and_action_has_a_decision_of_its_own(clock: list[float]) -> None:
    case = Case()
    others = [
        Identity("api_key", "a1", "eve", "research", ("analyst",)),
        Identity("api_key", "a1", "ada", "sales", ("analyst",)),
        Identity("api_key", "a1", "ada", "research", ("admin",)),
        Identity("api_key", "a1", "ada", "research", ("analyst",), groups=("staff",)),
    ]
    for identity in ADA, *others:
        case.decide(identity)
    case.decide(ADA, "POST /generate")
    assert len(case.engine.queries) == 6
    case.decide(Identity("oidc", "another", "ada", "research", ("analyst",)))
    assert len(case.engine.queries) == 6, "the same person by another means"


def test_the_oldest_decision_leaves_a_full_cache(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT", 2)
    case = Case()

    def asked(action: str) -> int:
        case.decide(ADA, action)
        return len(case.engine.queries)

    assert [asked("a"), asked("b"), asked("a")] == [1, 2, 2]
    clock[0] += 5
    assert [asked("a"), asked("c"), asked("a"), asked("c"), asked("b")] == [3, 4, 4, 4, 5]
    assert len(case.policy.decisions) == 2


def test_an_older_and_an_expired_policy_decide_nothing(clock: list[float]) -> None:
    case = Case()
    assert (case.policy.ready, case.policy.trouble) == (False, "not probed yet")
    case.decide()
    assert (case.policy.ready, case.policy.trouble, case.policy.revision) == (True, "", 7)
    clock[0] += 5
    for change in {"revision": 6}, {"revision": 0}, {"rule": "policy_expired"}:
        case.engine.answer = {**ALLOWED, **change}
        assert case.code() == "policy_unavailable"
        assert not case.policy.ready
    assert case.policy.trouble == "policy revision 7 has expired"
    assert case.metric("llm_policy_decisions_total", result="unavailable") == 3
    fresh = Case()
    fresh.engine.answer = {**ALLOWED, "revision": 0}
    assert fresh.code() == "policy_unavailable"
    assert fresh.policy.trouble == "revision 0 is older than 1, the highest seen"
    fresh.engine.answer = {**ALLOWED, "revision": 1}
    assert fresh.decide().revision == 1


def test_a_new_revision_is_stored_drops_older_decisions_and_is_told(
    tmp_path: Path, clock: list[float]
) -> None:
    case, told = Case(tmp_path / "revision"), list[int]()
    case.policy.changed = lambda: told.append(case.policy.revision)
    case.decide()
    case.decide(ADA, "other")
    assert ((tmp_path / "revision").read_text(), told, len(case.policy.decisions)) == ("7\n", [7], 2)
    case.engine.answer = {**ALLOWED, "revision": 8}
    case.decide(ADA, "third")
    assert (read_revision(tmp_path / "revision"), told, len(case.policy.decisions)) == (8, [7, 8], 1)
    assert case.metric("llm_policy_revision") == 8
    again = Case(tmp_path / "revision")
    assert again.policy.revision == 8
    assert again.code() == "policy_unavailable", "revision 7 is older"
    clock[0] += 5
    case.decide()
    assert told == [7, 8]


def test_a_revision_that_cannot_be_stored_decides_nothing(tmp_path: Path) -> None:
    case = Case(tmp_path / "none" / "revision")
    assert case.code() == "policy_unavailable"
    assert "revision 7 cannot be stored" in case.policy.trouble
    assert "No such file" in case.policy.trouble
    assert (case.policy.revision, case.policy.ready) == (0, False)


def test_a_power_cut_leaves_the_old_revision_or_the_new_one_and_afterwards_only_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "state").mkdir()
    case = Case(tmp_path / "state" / "revision.seen")
    case.policy.advance(11)
    disk = Disk(tmp_path / "state", monkeypatch)
    case.policy.advance(12)
    disk.saved()
    for cut in disk.cuts:
        cut.restore(tmp_path / "after", None)
        revision = read_revision(tmp_path / "after" / "revision.seen")
        assert revision in {11, 12}
        assert revision == 12 or not cut.returned
    disk.close()
    assert [each.name for each in (tmp_path / "state").iterdir()] == ["revision.seen"]


def test_a_revision_file_with_anything_but_a_number_is_refused(tmp_path: Path) -> None:
    seen = tmp_path / "revision.seen"
    assert (read_revision(None), read_revision(seen)) == (0, 0)
    for wrong in "", "-1", "7 8", "x" * 50, "\xff":
        seen.write_bytes(wrong.encode("latin-1"))
        with pytest.raises(ConfigError, match=r"revision.seen contains '.{0,40}' instead of the highest"):
            read_revision(seen)


def test_a_failure_is_logged_once_for_each_reason(caplog: pytest.LogCaptureFixture) -> None:
    case = Case()
    for reason in "down", "down", "slow":
        case.engine.answer = PolicyUnavailable(reason)
        assert case.code() == "policy_unavailable"
    assert len(caplog.records) == 2
    assert case.policy.trouble == "slow"


def test_a_probe_finds_a_dead_engine_and_drops_what_it_decided(tmp_path: Path, clock: list[float]) -> None:
    case = Case(None, glass(tmp_path))
    asyncio.run(case.policy.probe())
    assert case.policy.ready
    assert case.engine.queries == [{"subject": "llm-gateway", "tenant": "", "roles": [], "action": "PROBE"}]
    assert case.metric("llm_break_glass_armed") == 1
    case.decide()
    case.engine.answer = PolicyUnavailable("down")
    (tmp_path / "glass.jwt").unlink()
    asyncio.run(case.policy.probe())
    assert (case.policy.ready, case.policy.trouble, len(case.policy.decisions)) == (False, "down", 0)
    assert case.metric("llm_break_glass_armed") == 0
    assert case.code() == "policy_unavailable"
    asyncio.run(Case().policy.probe())


def test_the_engine_is_probed_until_the_watch_ends() -> None:
    case = Case()

    async def scenario() -> None:
        watching = asyncio.create_task(case.policy.watch(0.005))
        async with asyncio.timeout(30):
            while len(case.engine.queries) < 3:
                await asyncio.sleep(0.005)
        watching.cancel()

    asyncio.run(scenario())


def test_a_denial_and_an_unavailable_policy_are_403_and_503() -> None:
    refusal = denied(parse_decision(DENIED))
    assert (refusal.status, refusal.code) == (403, "denied")
    for part in str(DENIED["reason"]), "rule default_deny", "revision 7":
        assert part in refusal.message
    without = policy_unavailable()
    assert (without.status, without.code, without.headers) == (
        503,
        "policy_unavailable",
        [(b"retry-after", b"2")],
    )


def test_break_glass_decides_while_the_engine_is_down_and_is_never_cached(tmp_path: Path) -> None:
    case = Case(None, glass(tmp_path))
    case.engine.answer = DENIED
    assert case.decide().rule == "default_deny", "it does not override a denial"
    case.policy.decisions.clear()
    case.engine.answer = PolicyUnavailable("down")
    decision = case.decide()
    assert (decision.allow, decision.rule, decision.revision) == (True, "break_glass", 0)
    assert (decision.reason, decision.models, decision.log_prompt) == (
        "break-glass: incident 4711",
        None,
        True,
    )
    assert (decision.max_tokens, decision.rate) == (1024, RATE)
    assert case.metric("llm_break_glass_total") == 1
    (tmp_path / "glass.jwt").unlink()
    assert case.code() == "policy_unavailable"


def test_break_glass_is_for_one_subject_of_one_tenant_and_the_named_actions(tmp_path: Path) -> None:
    file = glass(tmp_path, models=["echo"], reason="r" * 300)
    granted = file.grant(ADA, GENERATE)
    assert granted
    assert (granted.models, granted.reason) == (frozenset({"echo"}), f"break-glass: {'r' * 200}")
    assert file.grant(ADA, "POST /generate") is None
    assert file.grant(Identity("api_key", "a", "eve", "research", ()), GENERATE) is None
    assert file.grant(Identity("api_key", "a", "ada", "sales", ()), GENERATE) is None


def test_break_glass_is_logged_as_an_error_with_subject_action_and_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = glass(tmp_path)
    assert file.active()
    assert file.active()
    file.grant(ADA, GENERATE)
    armed, used = caplog.records
    assert getattr(armed, "fields") == {"user.id": "ada"}  # noqa: B009 - `extra` of the log
    assert (armed.levelname, used.levelname) == ("ERROR", "ERROR")
    assert getattr(used, "fields") == {  # noqa: B009 - as above
        "user.id": "ada",
        "organization.id": "research",
        "event.action": GENERATE,
        "event.reason": "incident 4711",
    }


INVALID: dict[str, dict[str, Any]] = {
    "an hour too long": {"exp": datetime.now(UTC) + timedelta(hours=5)},
    "expired": {"exp": datetime.now(UTC) - timedelta(seconds=1)},
    "another audience": {"aud": "llm"},
    "actions as text": {"actions": GENERATE},
    "models as text": {"models": "echo"},
    "an empty reason": {"reason": ""},
    **{f"no {name}": {name: None} for name in ("aud", "sub", "tenant", "iat", "exp", "reason", "actions")},
}


@pytest.mark.parametrize("changes", INVALID.values(), ids=INVALID)
def test_an_invalid_file_is_never_active(
    tmp_path: Path, changes: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    file = glass(tmp_path, **changes)
    assert not file.active()
    assert file.grant(ADA, GENERATE) is None
    assert [each.levelname for each in caplog.records] == ["ERROR"], "once"


def test_a_file_may_be_valid_for_exactly_four_hours_and_ends_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = int(time.time())
    assert not glass(tmp_path, iat=now, exp=now + 4 * 3600 + 1).active()
    file = glass(tmp_path, iat=now, exp=now + 4 * 3600)
    assert file.active()
    monkeypatch.setattr(time, "time", lambda: now + 4 * 3600)
    assert not file.active()
    assert file.grant(ADA, GENERATE) is None


def test_a_replaced_or_foreign_file_counts_from_the_next_look(tmp_path: Path) -> None:
    file = glass(tmp_path)
    assert file.active()
    glass(tmp_path, ec.generate_private_key(ec.SECP256R1()))
    assert not file.active()
    (tmp_path / "glass.jwt").write_bytes(b"\xff")
    assert not file.active()
    (tmp_path / "glass.jwt").unlink()
    (tmp_path / "glass.jwt").mkdir()
    assert not file.active()
    (tmp_path / "glass.jwt").rmdir()
    assert not file.active()
    glass(tmp_path)
    assert file.active()


QUERY = {"subject": "ada", "tenant": "research", "roles": ["analyst"], "groups": [], "action": GENERATE}


def evaluated(engine: OpaEmbedded) -> int:
    """The revision that decides."""
    return parse_decision(asyncio.run(engine.evaluate(QUERY))).revision


def test_the_embedded_engine_decides_by_the_newest_valid_bundle(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "bundle.tar.gz"
    engine = OpaEmbedded(path, PUBLIC_KEY)
    engine.close()
    with pytest.raises(PolicyUnavailable, match=r"bundle\.tar\.gz does not exist"):
        evaluated(engine)
    path.write_bytes(signed_bundle(5))
    assert evaluated(engine) == 5
    assert parse_decision(asyncio.run(engine.evaluate(QUERY))).allow
    loaded = engine.opa
    assert evaluated(engine) == 5
    assert engine.opa is loaded, "an unchanged bundle is loaded once"
    caplog.clear()
    for wrong, why in (signed_bundle(4), "older"), (b"", ""), (signed_bundle(6)[:500], ""):
        path.write_bytes(wrong)
        assert (evaluated(engine), engine.revision) == (5, 5)
        assert why in engine.trouble
    fields = [getattr(each, "fields") for each in caplog.records]  # noqa: B009 - `extra` of the log
    assert [each["active_revision"] for each in fields] == [5, 5, 5]
    path.unlink()
    assert evaluated(engine) == 5, "a bundle that is away changes nothing"
    path.write_bytes(signed_bundle(6))
    assert (evaluated(engine), engine.revision) == (6, 6)
    engine.close()


def test_a_first_bundle_that_is_refused_leaves_no_engine(tmp_path: Path) -> None:
    path = tmp_path / "bundle.tar.gz"
    path.write_bytes(signed_bundle(5, ec.generate_private_key(ec.SECP256R1())))
    engine = OpaEmbedded(path, PUBLIC_KEY)
    with pytest.raises(PolicyUnavailable, match="not signed by the key"):
        evaluated(engine)
    assert (engine.opa, engine.revision) == (None, 0)
