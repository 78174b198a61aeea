"""Why declared operators are refused, and which commands a verb is."""

import base64
from datetime import date
from typing import Any

import pytest
from plugin_modules import load

operators = load("filter.operators")
TODAY = date(2026, 12, 2)


def public(kind: str, seed: int = 1, inner: str = "") -> str:
    strings = [(inner or kind).encode(), bytes([seed]) * 32, b"ssh:"]
    blob = b"".join(len(each).to_bytes(4, "big") + each for each in strings)
    return f"{kind} {base64.b64encode(blob).decode()}"


TOKEN = public("sk-ssh-ed25519@openssh.com")
PLAIN = public("ssh-ed25519")
ALICE: dict[str, Any] = {"name": "alice", "keys": [TOKEN], "verbs": ["status"], "units": ["nginx.service"]}


def faults(*accounts: dict[str, Any], breakglass: tuple[str, ...] = (), plain: bool = False) -> list[str]:
    refused: list[str] = operators.operator_faults(list(accounts), list(breakglass), plain, TODAY)
    return refused


def test_an_operator_with_a_token_is_taken() -> None:
    assert faults(ALICE | {"keys": [f"{TOKEN} alice@laptop"], "until": "2026-12-02"}) == []
    assert faults(ALICE | {"keys": [public("sk-ecdsa-sha2-nistp256@openssh.com")]}) == []
    assert faults({"name": "bob", "keys": [TOKEN]}) == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"name": "Alice"}, "'Alice' is not a valid account name"),
        ({"name": "a;reboot"}, "'a;reboot' is not a valid account name"),
        ({"name": "a\nroot"}, "is not a valid account name"),
        ({"name": "../alice"}, "is not a valid account name"),
        ({"name": "%sudo"}, "is not a valid account name"),
        ({"name": "ALL"}, "is not a valid account name"),
        ({"name": "root"}, "root is a name of the system"),
        ({"name": "llm-gateway"}, "llm-gateway is a name of the system"),
        ({"name": "breakglass"}, "breakglass is a name of the system"),
        ({"keys": []}, "alice has no key"),
        ({"keys": [PLAIN]}, "or set operators_plain_keys_allowed"),
        ({"keys": ["ssh-rsa AAAA"]}, "begins with none of"),
        ({"keys": [f'command="sh" {TOKEN}']}, "begins with none of"),
        ({"keys": ["sk-ssh-ed25519@openssh.com !"]}, "has no base64"),
        (
            {"keys": [public("sk-ssh-ed25519@openssh.com", inner="ssh-ed25519")]},
            "not of the type that it names",
        ),
        ({"keys": [f"{TOKEN} a\n{PLAIN}"]}, "has a comment with other characters"),
        (
            {"verbs": ["status", "shell"]},
            "'shell', which is none of status, restart, logs, site, verify, audit",
        ),
        ({"units": ["*"]}, "the unit '*'"),
        ({"units": ["nginx"]}, "the unit 'nginx'"),
        ({"units": ["a.service, ALL"]}, "the unit 'a.service, ALL'"),
        ({"units": ["--state.service"]}, "the unit '--state.service'"),
        ({"units": []}, "alice has status and no units"),
        ({"until": "2026-12-01"}, "until 2026-12-01, which is past: remove the entry"),
        ({"until": "soon"}, "until 'soon', which is not a day"),
    ],
)
def test_a_bad_value_is_refused_by_name(change: dict[str, Any], reason: str) -> None:
    (refused,) = faults(ALICE | change)
    assert reason in refused


def test_a_name_and_a_key_are_there_once() -> None:
    assert (
        "alice is declared 2 times"
        in faults(ALICE, ALICE | {"keys": [public("sk-ssh-ed25519@openssh.com", 2)]})[0]
    )
    assert "is there 2 times" in faults(ALICE, ALICE | {"name": "bob", "keys": [f"{TOKEN} bob"]})[0]
    assert "is there 2 times" in faults(ALICE, breakglass=(TOKEN,))[0]


def test_the_sealed_key_may_be_a_plain_one_and_an_operators_where_it_is_allowed() -> None:
    assert faults(ALICE, breakglass=(PLAIN,)) == []
    assert faults(ALICE | {"keys": [PLAIN]}, plain=True) == []
    assert faults(breakglass=("ssh-rsa AAAA",))[0].startswith("breakglass: the key 'ssh-rsa AAAA'")


def test_a_command_is_exact_to_the_last_argument() -> None:
    account = ALICE | {"verbs": ["restart", "site"], "units": ["a@1.service"]}
    restart = "/usr/bin/systemctl --no-ask-password --no-pager restart a@1.service"
    assert operators.operator_commands(account, False) == [restart]
    assert operators.operator_commands(account, True) == [
        restart,
        "/usr/local/bin/llmkeep site -i /etc/llmkeep/inventory",
        "/usr/local/bin/llmkeep site -i /etc/llmkeep/inventory --check --diff",
    ]


def test_an_account_ends_on_the_day_after_its_last_one() -> None:
    declared = operators.operator_accounts([ALICE | {"until": "2026-12-31"}, {"name": "bob"}], [PLAIN])
    assert [(each["name"], each["expires"]) for each in declared] == [
        ("alice", "2027-01-01"),
        ("bob", ""),
        ("breakglass", ""),
    ]
