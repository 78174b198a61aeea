"""The policy's key and the bundles that it signs, on the control node: what is made, kept, refused and told."""

import json
import re
import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import jwt
import policies
import pytest
from power_cut import losing_power

from llmkeep import cli, durable
from llmkeep.errors import LlmkeepError
from llmkeep.places import Places
from llmkeep.policy import bundle as policy
from llmkeep.policy import source as policy_source
from llmkeep.policy.bundle import PolicyError
from llmproof import policy_bundle
from llmproof.policy_bundle import DAMAGED, EXPIRED, REPLAYED, UNSIGNED

NOW = datetime(2026, 11, 25, 12, tzinfo=UTC)


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Places:
    """A control node with a key and, as its own source, a copy of the tree's policy."""
    found = policies.control_node(tmp_path / "control", monkeypatch)
    shutil.copytree(policies.SOURCE, found.policy_source)
    return found


def changed(places: Places, old: str, new: str, file: str = "roles/data.yaml") -> None:
    """Edit the estate's own source."""
    path = places.policy_source / "llm" / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def build(places: Places, now: datetime = NOW, days: int = 90) -> str:
    return policy.build(places, places.policy_source, places.policy_bundle, days, now)


def revision(places: Places) -> int:
    start = datetime(1970, 1, 1, tzinfo=UTC)
    return policy_bundle.judged(
        places.policy_bundle.read_bytes(), places.policy_public.read_bytes(), now=start
    ).revision


# ---------------------------------------------------------------- the key
def test_the_key_is_kept_sealed_under_a_name_of_its_own_and_nowhere_else(places: Places) -> None:
    assert places.policy_key.name == "llmkeep.policy-key"
    assert places.policy_key.stat().st_mode & 0o777 == 0o400
    sealed = places.policy_key.read_bytes()
    assert sealed.startswith(b"sealed llmkeep.policy-key:-----BEGIN PRIVATE KEY-----")
    assert places.policy_public.stat().st_mode & 0o777 == 0o644
    build(places)
    for path in (path for path in places.root.rglob("*") if path.is_file() and path != places.policy_key):
        assert sealed.splitlines()[1] not in path.read_bytes(), path


def test_init_again_changes_nothing(places: Places) -> None:
    before = places.policy_public.read_bytes(), places.policy_key.read_bytes()
    assert "already exists" in policy.init(places)
    assert (places.policy_public.read_bytes(), places.policy_key.read_bytes()) == before


@pytest.mark.parametrize("cut", range(2))
def test_init_that_lost_power_at_any_write_is_made_whole_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    monkeypatch.setattr(policy, "write", losing_power(cut))
    with pytest.raises(KeyboardInterrupt):
        policies.control_node(tmp_path, monkeypatch)
    monkeypatch.setattr(policy, "write", durable.write)
    places = policies.control_node(tmp_path, monkeypatch)
    policy.build(places, policies.SOURCE, places.policy_bundle, 90)
    assert revision(places) == 1


def test_a_lost_key_is_told_and_not_made_anew(places: Places) -> None:
    places.policy_key.unlink()
    for verb in (policy.init, build):
        with pytest.raises(PolicyError, match="is missing"):
            verb(places)
    assert not places.policy_key.exists()


def test_a_key_that_is_not_the_public_halfs_is_told(
    places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = policies.control_node(tmp_path / "other", monkeypatch)
    durable.write(places.policy_key, other.policy_key.read_bytes(), 0o400)
    with pytest.raises(PolicyError, match="is not the key of"):
        build(places)


# ---------------------------------------------------------------- build
def test_a_second_build_changes_nothing(places: Places) -> None:
    assert re.search(r"revision 1, \d+ tests passed", build(places))
    before = [
        (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(places.policy_bundle.parent.iterdir())
    ]
    assert "kept" in build(places, NOW + timedelta(days=59))
    assert [
        (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(places.policy_bundle.parent.iterdir())
    ] == before


def test_what_was_signed_is_signed_anew_before_it_expires_and_not_what_is_being_edited(
    places: Places,
) -> None:
    build(places)
    before = policy_bundle.judged(
        places.policy_bundle.read_bytes(), places.policy_public.read_bytes(), now=NOW
    )
    assert "kept" in policy.renew(places, places.policy_bundle, NOW + timedelta(days=59))
    changed(places, "max_tokens: 256", "max_tokens: 128")
    for number, day in enumerate((61, 130, 200), 2):
        moment = NOW + timedelta(days=day)
        assert f"revision {number}, valid until" in policy.renew(places, places.policy_bundle, moment)
        after = policy_bundle.judged(
            places.policy_bundle.read_bytes(), places.policy_public.read_bytes(), now=moment
        )
        assert after.modules == before.modules
        assert after.data["llm"]["roles"] == before.data["llm"]["roles"]
        assert after.expires - moment == timedelta(days=90)


def test_nothing_is_signed_anew_where_nothing_of_this_estate_was_signed(places: Places) -> None:
    with pytest.raises(PolicyError, match="is not a policy of this estate"):
        policy.renew(places, places.policy_bundle, NOW)


def test_the_revision_rises_with_the_content_and_never_falls(places: Places) -> None:
    build(places)
    changed(places, "max_tokens: 256", "max_tokens: 128")
    build(places)
    assert revision(places) == 2
    changed(places, "max_tokens: 128", "max_tokens: 256")
    build(places)
    assert revision(places) == 3


def test_a_comment_is_no_change_of_the_data_and_a_test_is_none_of_the_bundle(places: Places) -> None:
    build(places)
    changed(places, "analyst:\n", "# who looks\nanalyst:\n")
    changed(places, "package llm.roles_test\n", "package llm.roles_test\n\n# more\n", "roles/roles_test.rego")
    assert "kept" in build(places)


def test_one_that_holds_fewer_than_thirty_days_is_signed_anew(places: Places) -> None:
    build(places)
    assert "kept" in build(places, NOW + timedelta(days=60))
    assert "revision 2" in build(places, NOW + timedelta(days=60, seconds=1))
    assert "kept" in build(places, NOW + timedelta(days=61))


def test_one_that_is_made_for_a_few_days_is_kept_for_most_of_them(places: Places) -> None:
    build(places, days=3)
    assert "kept" in build(places, NOW + timedelta(days=2), days=3)
    assert "revision 2" in build(places, NOW + timedelta(days=2, seconds=1), days=3)


def test_a_build_that_lost_power_gives_no_revision_to_two_contents(
    places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(places)

    def write(path: Path, data: bytes, mode: int) -> None:
        if path == places.policy_bundle:
            raise KeyboardInterrupt
        durable.write(path, data, mode)

    changed(places, "max_tokens: 256", "max_tokens: 128")
    monkeypatch.setattr(policy, "write", write)
    with pytest.raises(KeyboardInterrupt):
        build(places)
    monkeypatch.setattr(policy, "write", durable.write)
    assert revision(places) == 1
    again = Places(places.root.with_name("again"))
    shutil.copytree(places.root, again.root)
    build(again)
    assert revision(again) == 2  # the same content has the number that it was given
    changed(places, "max_tokens: 128", "max_tokens: 64")
    build(places)
    assert revision(places) == 3


def test_a_lost_record_of_the_revision_does_not_take_it_back(places: Places) -> None:
    build(places)
    changed(places, "max_tokens: 256", "max_tokens: 128")
    build(places)
    places.policy_bundle.with_name("revision.json").unlink()
    build(places)
    assert revision(places) == 3


def test_a_record_of_the_revision_from_an_old_backup_does_not_take_it_back(places: Places) -> None:
    build(places)
    given = places.policy_bundle.with_name("revision.json")
    old = given.read_bytes()
    changed(places, "max_tokens: 256", "max_tokens: 128")
    build(places)
    given.write_bytes(old)
    changed(places, "max_tokens: 128", "max_tokens: 256")
    build(places)
    assert revision(places) == 3


def test_a_lost_or_damaged_bundle_is_made_anew(places: Places) -> None:
    build(places)
    places.policy_bundle.write_bytes(places.policy_bundle.read_bytes()[:-9])
    build(places)
    assert revision(places) == 1
    places.policy_bundle.unlink()
    build(places)
    assert revision(places) == 1


FAULTS: dict[str, tuple[str, str, str, str]] = {
    "Rego that does not parse": ("current if {", "current if {{", "authz/authz.rego", "rego_parse_error"),
    "Rego that does not compile": ("time.now_ns()", "time.now_nonsense()", "authz/authz.rego", "undefined function"),
    "a decision that is gone": ("package llm.authz\n", "package llm.other\n", "authz/authz.rego", "undefined"),
    "a decision that is open": (
        'denied("default_deny", "the request does', 'granted_all("", "the request does', "authz/authz.rego",
        "undefined function",
    ),
    "a role with both duties": (
        "duties: [audit:read]", "duties: [audit:read, policy:change]", "roles/data.yaml", "auditor: one role may not hold",
    ),
    "an unknown rate class": ("rate_class: batch", "rate_class: turbo", "roles/data.yaml", "has no class turbo"),
    "a limit of the wrong kind": ("max_tokens: 256", "max_tokens: many", "roles/data.yaml", "analyst.max_tokens"),
    "an unknown action": ("[GET /generate]", "[GET /v2]", "roles/data.yaml", "analyst.actions"),
    "a role that is a duplicate": ("developer:\n", "analyst:\n", "roles/data.yaml", "'analyst' is a duplicate"),
    "YAML that does not parse": ("analyst:\n", "analyst: [\n", "roles/data.yaml", "cannot be read"),
    "a circle of aliases": (
        "{}", "{a: {model: b}, b: {model: a}}", "aliases/data.yaml", "llm/aliases: a leads to b, an alias: name a model",
    ),
    "an alias with a day that there is not": (
        "{}", "{a: {model: b, deprecated: 2026-02-30}}", "aliases/data.yaml", "llm/aliases: a.deprecated: ",
    ),
    "an alias that is a duplicate": ("{}", "{a: {model: b}, a: {model: c}}", "aliases/data.yaml", "'a' is a duplicate"),
    "a group with a role that there is not": ("{}", "{staff: [root]}", "groups/data.yaml", "staff: llm/roles has no role root"),
    "a group whose roles are no list": ("{}", "{staff: analyst}", "groups/data.yaml", "llm/groups: staff: "),
    "a test that fails": (
        "max_tokens: 8192", "max_tokens: 1", "roles/data.yaml",
        "test_a_trainer_generates_with_higher_limits_and_its_prompts_are_kept fails",
    ),
    "the guide's rule": (
        "[GET /generate]", "[GET /generate, POST /generate]", "roles/data.yaml",
        "test_an_analyst_may_get_generate_and_nothing_else fails",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_source_with_a_fault_is_not_signed_and_the_fault_is_named(places: Places, fault: str) -> None:
    build(places)
    old, new, file, said = FAULTS[fault]
    changed(places, old, new, file)
    with pytest.raises(LlmkeepError, match=r"cannot be signed|cannot be read") as refused:
        build(places)
    assert said in str(refused.value)
    assert revision(places) == 1


def test_a_decision_that_allows_a_request_which_says_nothing_is_not_signed(places: Places) -> None:
    rego = 'package llm.authz\n\nduties_apart := {"a"}\n\ndecision := {"allow": true}\n'
    for test in places.policy_source.rglob("*_test.rego"):
        test.unlink()
    (places.policy_source / "llm/authz/authz.rego").write_text(rego)
    with pytest.raises(PolicyError, match="does not deny an empty request"):
        build(places)


@pytest.mark.parametrize("days", [0, -1, 367])
def test_a_policy_holds_a_day_to_a_year(places: Places, days: int) -> None:
    with pytest.raises(PolicyError, match=f"--days is {days}"):
        build(places, days=days)


# ---------------------------------------------------------------- the command line
@pytest.fixture
def llmkeep(places: Places, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The command, on that control node."""
    monkeypatch.setattr(policy, "Places", lambda: places)
    return lambda *words: cli.main(["policy", *map(str, words)])


def test_the_estates_own_source_goes_before_the_trees(
    places: Places, llmkeep: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert llmkeep("check") == 0
    assert str(places.policy_source) in capsys.readouterr().out
    shutil.rmtree(places.policy_source)
    assert llmkeep("build") == 0
    assert llmkeep("build") == 0
    assert f"revision 1 already has the content of {policies.SOURCE}, kept" in capsys.readouterr().out


def test_verify_tells_its_refusals_apart(
    places: Places, llmkeep: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = places.policy_bundle, tmp_path / "bad.tar.gz"
    assert llmkeep("build") == 0
    files = policy_bundle.unpacked(good.read_bytes())
    assert llmkeep("verify", good, "--key", places.policy_public, "--minimum", 1) == 0
    assert llmkeep("verify", good, "--key", places.policy_public, "--minimum", 2) == REPLAYED
    bad.write_bytes(policy_source.packed({name: files[name] for name in files if name != ".signatures.json"}))
    assert llmkeep("verify", bad, "--key", places.policy_public) == UNSIGNED
    bad.write_bytes(policy_source.packed(files | {"llm/more/data.json": b"{}"}))
    assert llmkeep("verify", bad, "--key", places.policy_public) == DAMAGED
    policy.build(places, places.policy_source, bad, 1, datetime.now(UTC) - timedelta(days=2))
    assert llmkeep("verify", bad, "--key", places.policy_public) == EXPIRED
    assert llmkeep("verify", tmp_path / "nowhere", "--key", places.policy_public) == 1
    assert llmkeep("verify", good, "--key", good) == UNSIGNED
    assert "Traceback" not in capsys.readouterr().err


def test_diff_names_each_set_of_roles_and_action_that_is_decided_in_another_way(
    places: Places, llmkeep: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert llmkeep("build") == 0
    changed(places, "[GET /generate]", "[POST /generate]")
    changed(places, "max_tokens: 2048", "max_tokens: 4096")
    capsys.readouterr()
    assert llmkeep("diff", places.policy_bundle, places.policy_source, "--json") == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    alone = {(change["roles"][0], change["action"]) for change in found if len(change["roles"]) == 1}
    assert {pair for pair in alone if pair[0] != "developer"} == {
        ("analyst", "GET /generate"),
        ("analyst", "POST /generate"),
    }
    assert ["analyst", "operator"] in [change["roles"] for change in found]
    assert ["operator"] not in [change["roles"] for change in found]
    assert llmkeep("diff", places.policy_bundle, places.policy_source) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "analyst: GET /generate: allow → deny (default_deny)" in lines
    assert "analyst: POST /generate: deny (default_deny) → allow" in lines
    assert "developer: POST /generate: max_tokens 2048 → 4096" in lines
    assert len(lines) == len(found)


def test_diff_of_the_same_says_so_whatever_the_revision_and_the_date(
    places: Places, llmkeep: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy.build(places, places.policy_source, tmp_path / "expired.tar.gz", 1, NOW - timedelta(days=900))
    assert llmkeep("diff", tmp_path / "expired.tar.gz", places.policy_source) == 0
    assert capsys.readouterr().out == "no difference in decisions\n"
    assert llmkeep("diff", tmp_path / "nowhere", places.policy_source) == 1
    assert "cannot compare these two" in capsys.readouterr().err


def test_a_role_that_is_new_is_a_difference(
    places: Places, llmkeep: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert llmkeep("build") == 0
    path = places.policy_source / "llm/roles/data.yaml"
    text = path.read_text()
    path.write_text(
        text + text[text.index("analyst:\n") : text.index("developer:\n")].replace("analyst", "guest")
    )
    capsys.readouterr()
    assert llmkeep("diff", places.policy_bundle, places.policy_source) == 0
    assert "guest: GET /generate: deny (unknown_role) → allow" in capsys.readouterr().out.splitlines()


def test_a_group_or_an_alias_that_is_new_is_a_difference(
    places: Places, llmkeep: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    changed(places, "{}", "{staff: [auditor]}", "groups/data.yaml")
    assert llmkeep("build") == 0
    changed(places, "{staff: [auditor]}", "{staff: [auditor, analyst]}", "groups/data.yaml")
    capsys.readouterr()
    assert llmkeep("diff", places.policy_bundle, places.policy_source) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "group staff: GET /generate: deny (default_deny) → allow" in lines
    assert not [line for line in lines if not line.startswith("group staff: ")]
    changed(places, "{}", "{default: {model: large, deprecated: 2026-11-01}}", "aliases/data.yaml")
    assert llmkeep("diff", places.policy_bundle, places.policy_source) == 0
    alias = {"default": {"deprecated": "2026-11-01", "model": "large"}}
    assert f"analyst: GET /generate: aliases {{}} → {alias}" in capsys.readouterr().out.splitlines()


# ---------------------------------------------------------------- break-glass
WORDS = (
    "break-glass",
    "--tenant",
    "corp",
    "--subject",
    "alice@corp",
    "--action",
    "POST /generate",
    "--action",
    "GET /generate",
)


def test_break_glass_prints_a_token_that_the_policys_key_signed_and_records_it(
    places: Places, llmkeep: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert llmkeep(*WORDS, "--hours", 4, "--reason", "opa is down, ticket 7") == 0
    token = capsys.readouterr().out.strip()
    assert jwt.get_unverified_header(token)["kid"] == "policy"
    claims = jwt.decode(
        token, places.policy_public.read_bytes(), algorithms=["ES256"], audience="llmkeep-break-glass"
    )
    assert claims["exp"] - claims["iat"] == 4 * 3600
    assert (claims["tenant"], claims["sub"], claims["reason"]) == (
        "corp",
        "alice@corp",
        "opa is down, ticket 7",
    )
    assert "models" not in claims
    assert claims["actions"] == ["GET /generate", "POST /generate"]
    (line,) = places.break_glass.read_text().splitlines()
    assert json.loads(line)["sub"] == "alice@corp"
    assert token not in line


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--hours", "4.01", "--reason", "x"], "at most 4 hours"),
        (["--hours", "0", "--reason", "x"], "at most 4 hours"),
        (["--hours", "-1", "--reason", "x"], "at most 4 hours"),
        (["--hours", "nan", "--reason", "x"], "at most 4 hours"),
        (["--hours", "1", "--reason", " "], "is empty"),
        (
            ["--hours", "1", "--reason", "x", "--action", "POST /everything"],
            "'POST /everything' is not an action of the gateway",
        ),
    ],
)
def test_break_glass_refuses_too_long_a_time_no_reason_and_an_unknown_action(
    places: Places,
    llmkeep: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    said: str,
) -> None:
    assert llmkeep(*WORDS, *more) == 1
    out, err = capsys.readouterr()
    assert (out, said in err) == ("", True)
    assert not places.break_glass.exists()


def test_a_break_glass_token_is_no_signature_of_a_policy(places: Places) -> None:
    build(places)
    token = policy.break_glass(places, "corp", "alice", ["GET /generate"], 1, "a test")
    files = policy_bundle.unpacked(places.policy_bundle.read_bytes())
    files[".signatures.json"] = json.dumps({"signatures": [token]}).encode()
    with pytest.raises(policy_bundle.PolicyRefused) as refused:
        policy_bundle.judged(policy_source.packed(files), places.policy_public.read_bytes())
    assert refused.value.code == UNSIGNED
