"""Rules of sudo that role operators writes, as sudo's own parsers read them."""

import importlib.util
import json
import subprocess
from datetime import date
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from plugin_modules import ROOT
from rendered_role import content, rendered

ALICE: dict[str, Any] = {
    "name": "alice",
    "keys": ["sk-ssh-ed25519@openssh.com AAAA"],
    "verbs": ["restart", "logs", "verify"],
    "units": ["llm-gateway@1.service"],
    "until": date(2099, 12, 30),  # as YAML reads it
}
GROUP = "llm-operators"


@pytest.fixture
def findings() -> ModuleType:
    spec = importlib.util.spec_from_file_location("operators", ROOT / "roles/operators/files/operators.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Any:
    values = {
        "operators_accounts": [ALICE],
        "operators_breakglass_keys": ["ssh-ed25519 AAAA"],
        "role_path": str(ROOT / "roles/operators"),
    }
    hosts = {"ops1.estate.internal": "10.0.0.1"}
    folder = tmp_path_factory.mktemp("role")
    expected = {"expected": "__operators_expected"}
    return rendered(
        folder, "operators", expected, "ops1", hosts, values, {"control": ["ops1"]}, configured=True
    )


@pytest.fixture
def rules(host: Any, tmp_path: Path, findings: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sudoers file with the role's, which the findings are made of."""
    path = tmp_path / "sudoers"
    path.write_text(f"Defaults env_reset\n{content(host, '/sudoers.d/llmkeep-operators')}")

    def read() -> Any:
        argv = ["cvtsudoers", "--expand-aliases", "--output-format=json", str(path)]
        return json.loads(subprocess.run(argv, capture_output=True, text=True, check=True).stdout)

    monkeypatch.setattr(findings, "sudoers", read)
    return path


def test_sudo_takes_the_file(rules: Path) -> None:
    subprocess.run(["visudo", "--check", "--strict", "--file", rules], check=True, capture_output=True)


@pytest.mark.usefixtures("rules")
def test_an_operator_may_run_the_declared_commands_and_no_others(findings: ModuleType, host: Any) -> None:
    declared = host["expected"]["commands"]
    assert "/usr/bin/journalctl --no-pager --unit=llm-gateway@1.service --lines=1000" in declared["alice"]
    assert "/usr/local/bin/llmkeep verify -i /etc/llmkeep/inventory" in declared["alice"]
    assert findings.commands(declared, GROUP) == (True, f"{len(declared['alice'])} commands of 1 operators")


@pytest.mark.parametrize(
    ("line", "observed"),
    [
        ("alice ALL = (root) NOPASSWD: /usr/bin/journalctl", "alice may run /usr/bin/journalctl"),
        ("%llm-operators ALL = (ALL) ALL", "alice may run ALL"),
        ("User_Alias X = alice\nX ALL = (root) /bin/sh", "alice may run /bin/sh"),
        ("ALL ALL = (root) /bin/sh", "alice may run /bin/sh"),
        ("#1001 ALL = (root) /bin/sh", "alice may run /bin/sh"),
        ("Defaults:alice !noexec", "commands of alice may start others"),
        ("Defaults!/usr/bin/systemctl !noexec", "/usr/bin/systemctl may start others"),
        (
            "alice ALL = (root) EXEC: /usr/local/bin/llmkeep site -i /etc/llmkeep/inventory",
            "lets commands start others",
        ),
    ],
)
def test_another_rule_is_named(
    rules: Path, findings: ModuleType, host: Any, line: str, observed: str
) -> None:
    rules.write_text(f"{rules.read_text()}{line}\n")
    holds, text = findings.commands(host["expected"]["commands"], GROUP)
    assert not holds
    assert observed in text


def test_an_account_ends_after_its_last_day(host: Any) -> None:
    assert host["expected"]["accounts"][0] == {"name": "alice", "expires": "2099-12-31"}


def test_rules_of_others_are_theirs(rules: Path, findings: ModuleType, host: Any) -> None:
    rules.write_text(f"{rules.read_text()}root ALL = (ALL:ALL) ALL\n%root ALL = (ALL) ALL\n")
    assert findings.commands(host["expected"]["commands"], GROUP)[0]


def test_a_rule_that_is_lost_is_named(rules: Path, findings: ModuleType, host: Any) -> None:
    rules.write_text("Defaults noexec\n")
    assert (
        "alice may not run /usr/bin/journalctl" in findings.commands(host["expected"]["commands"], GROUP)[1]
    )


@pytest.mark.usefixtures("rules")
def test_input_is_not_kept_and_output_is(findings: ModuleType) -> None:
    options = findings.defaults(findings.sudoers(), "", GROUP)
    assert (options["log_output"], options["log_input"], options["requiretty"]) == (True, False, True)
