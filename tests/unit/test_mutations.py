"""The mutation test of the roles' checks tests itself here: it has to notice a check that cannot fail."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase

PLUGIN = Path(__file__).resolve().parents[2] / "molecule/shared/action_plugins/mutations.py"
spec = importlib.util.spec_from_file_location("mutations", PLUGIN)
assert spec
assert spec.loader
mutations = importlib.util.module_from_spec(spec)
spec.loader.exec_module(mutations)

CHECKS = [{"id": "role.one"}, {"id": "role.two"}]
BREAK = {
    "fails": ["role.one"],
    "break": ["rm", "a b"],
    "file": "/etc/a b",
    "then": ["systemctl", "reload", "x"],
}


def run(
    monkeypatch: pytest.MonkeyPatch,
    wanted: list[dict[str, Any]],
    failing: list[str] | None,
    host: str = "llm1",
) -> tuple[dict[str, Any], list[str]]:
    """The result and the scripts that were run, where the checks FAILING fail (None: the module crashes)."""
    scripts: list[str] = []
    results = {
        "checks": [{"id": c["id"], "ok": c["id"] not in (failing or []), "observed": "seen"} for c in CHECKS]
    }
    monkeypatch.setattr(ActionBase, "run", lambda *_: {})
    monkeypatch.setattr(mutations.ActionModule, "_hands", lambda _, script: scripts.append(script))
    monkeypatch.setattr(
        mutations.ActionModule,
        "_execute_module",
        lambda *_, **__: {"failed": True, "msg": "crashed"} if failing is None else results,
    )
    plugin = mutations.ActionModule.__new__(mutations.ActionModule)
    plugin._task = SimpleNamespace(args={"checks": CHECKS, "mutations": wanted})
    variables = {"inventory_hostname": host, "groups": {"all": ["llm1", "ops1"], "control": ["ops1"]}}
    return plugin.run(None, variables), scripts


def test_exactly_the_named_check_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    result, scripts = run(monkeypatch, [BREAK], ["role.one"])
    assert not result.get("failed")
    assert scripts == [
        "cp --archive '/etc/a b' /run/mutation.keep\nrm 'a b'\nsystemctl reload x",
        "mv --no-target-directory /run/mutation.keep '/etc/a b'\nsystemctl reload x",
    ]


@pytest.mark.parametrize("failing", [[], ["role.two"], ["role.one", "role.two"]])
def test_any_other_outcome_fails(monkeypatch: pytest.MonkeyPatch, failing: list[str]) -> None:
    result, scripts = run(monkeypatch, [BREAK], failing)
    assert result["failed"]
    assert "rm 'a b'" in result["msg"]
    assert len(scripts) == 2, "what was broken is repaired all the same"


def test_checks_that_did_not_run_are_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AnsibleActionFail, match="crashed"):
        run(monkeypatch, [BREAK], None)


def test_a_check_that_the_role_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AnsibleActionFail, match=r"role\.gone"):
        run(monkeypatch, [{**BREAK, "fails": ["role.gone"]}], [])


def test_a_mutation_for_other_hosts_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    result, scripts = run(monkeypatch, [{**BREAK, "on": "control"}], [])
    assert not result.get("failed")
    assert scripts == []
