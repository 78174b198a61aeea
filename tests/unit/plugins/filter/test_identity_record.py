"""The record of a new key, made on the control node, and what it takes to replace a key that the hosts list."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from plugin_modules import ROOT, load

identities = load("filter.identities")
REQUEST = {
    "verb": "add", "subject": "ada", "tenant": "corp", "roles": ["analyst"], "expires": "", "id": "", "overlap": "24h",
    "certificate": "",
}  # fmt: skip
ROTATE = REQUEST | {"verb": "rotate", "subject": "", "tenant": "", "roles": [], "id": "0123456789ab"}
OLD = {
    "id": "0123456789ab", "kind": "api_key", "fingerprint": None, "state": "live", "subject": "ada", "tenant": "corp",
    "roles": ["analyst"], "created": "2026-01-01T00:00:00Z", "expires": "2098-12-31T00:00:00Z", "replaces": None,
}  # fmt: skip
SERVING = ["llm1", "llm2"]


def time(text: str) -> datetime:
    return datetime.fromisoformat(text)


def test_a_record_has_what_was_asked_for_and_nothing_else() -> None:
    record = identities.identity_record(REQUEST | {"expires": "90d"}, {}, SERVING)
    assert time(record["expires"]) - time(record["created"]) == timedelta(days=90)
    assert len(record["id"]) == 12
    assert {name: record[name] for name in ("kind", "subject", "tenant", "roles")} == {
        "kind": "api_key", "subject": "ada", "tenant": "corp", "roles": ["analyst"],
    }  # fmt: skip
    assert set(record) == {"id", "kind", "subject", "tenant", "roles", "created", "expires"}
    assert identities.identity_record(REQUEST, {}, SERVING)["expires"] is None
    one, two = (identities.with_new_key(record)["key"] for _ in range(2))
    assert one[:18] == two[:18] == f"llmk_{record['id']}_"
    assert (len(one), one == two) == (66, False)


def test_a_certificate_gets_no_key() -> None:
    record = identities.identity_record(REQUEST | {"certificate": "PEM"}, {}, SERVING)
    assert (record["kind"], record["certificate"]) == ("certificate", "PEM")
    assert identities.with_new_key(record) == record


def successor(request: dict[str, Any], **changes: object) -> dict[str, Any]:
    """The record that replaces OLD with these changes."""
    record: dict[str, Any] = identities.identity_record(
        ROTATE | request, {host: [OLD | changes] for host in SERVING}, SERVING
    )
    return record


def test_a_successor_has_the_holder_and_the_lifetime_of_the_old_key() -> None:
    record = successor({})
    holder = record["replaces"], record["subject"], record["tenant"], record["roles"]
    assert holder == (OLD["id"], "ada", "corp", ["analyst"])
    lifetime = time("2098-12-31T00:00:00Z") - time("2026-01-01T00:00:00Z")
    assert time(record["expires"]) - time(record["created"]) == lifetime
    assert successor({}, expires=None)["expires"] is None
    shorter = successor({"expires": "12h"})
    assert time(shorter["expires"]) - time(shorter["created"]) == timedelta(hours=12)


def test_the_old_key_ends_after_the_overlap_or_as_before() -> None:
    for ends in "2098-12-31T00:00:00Z", None:
        record = successor({"overlap": "2h"}, expires=ends)
        assert time(record["replaced_expires"]) - time(record["created"]) == timedelta(hours=2)
    soon = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    assert successor({"overlap": "2h"}, expires=soon)["replaced_expires"] == soon


@pytest.mark.parametrize(
    ("request_changes", "llm1", "llm2", "fault"),
    [
        ({}, [], [], "there is no key '0123456789ab' on llm1, llm2"),
        ({}, [OLD], [], "0123456789ab is missing on llm2"),
        ({}, [OLD | {"subject": "cfo"}], [OLD], "subject of 0123456789ab is cfo on llm1, ada on llm2"),
        ({}, [OLD], [OLD | {"roles": "['analyst']"}], "roles of 0123456789ab is ['analyst'] on llm1, "),
        ({}, [OLD], [OLD | {"created": "2020-01-01T00:00:00Z"}], "created of 0123456789ab is 2026-01-01"),
        (
            {},
            [OLD | {"state": "revoked"}] * 2,
            [OLD | {"state": "revoked"}],
            "state of 0123456789ab is revoked on",
        ),
        ({}, [OLD | {"kind": "certificate"}], [OLD | {"kind": "certificate"}], "and expected api_key"),
        ({"subject": "eve"}, [OLD], [OLD], "subject of 0123456789ab is ada on llm1, llm2, and expected eve"),
        (
            {},
            [OLD],
            [OLD, OLD | {"id": "ab" * 6, "replaces": OLD["id"]}],
            "has been replaced by abababababab on llm2",
        ),
        ({"overlap": "soon"}, [OLD], [OLD], "'soon' is not a lifetime"),
    ],
)
def test_a_key_that_cannot_be_rotated_is_named_with_host_value_and_expectation(
    request_changes: dict[str, Any], llm1: list[dict[str, Any]], llm2: list[dict[str, Any]], fault: str
) -> None:
    hosts = {"llm1": llm1, "llm2": llm2}
    assert fault in identities.identity_fault(ROTATE | request_changes, hosts, SERVING)


def test_a_host_that_lists_two_keys_of_one_id_names_no_other_holder() -> None:
    hosts = {"llm1": [OLD | {"subject": "cfo"}, OLD], "llm2": [OLD]}
    assert identities.identity_record(ROTATE, hosts, SERVING)["subject"] == "ada"


def test_a_single_host_of_several_needs_the_holder_stated() -> None:
    hosts, stated = {"llm1": [OLD]}, ROTATE | {"subject": "ada", "tenant": "corp", "roles": ["analyst"]}
    assert "only llm1 of llm1, llm2 says whose" in identities.identity_fault(ROTATE, hosts, SERVING)
    assert identities.identity_fault(ROTATE, hosts, ["llm1"]) == ""
    assert identities.identity_fault(stated, hosts, SERVING) == ""


@pytest.mark.parametrize(("file", "name"), [("api_keys.py", "NAME"), ("api_keys_cli.py", "LIFETIME")])
def test_names_and_lifetimes_have_the_form_that_the_hosts_take(file: str, name: str) -> None:
    source = (ROOT / "payload/llmserve/access" / file).read_text()
    assert f'{name} = re.compile(r"{getattr(identities, name).pattern}")' in source
