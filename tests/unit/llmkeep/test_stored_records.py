"""Formats of what llmkeep stores on the control node and the builder: an earlier version's state is read, a newer one refused.

tests/unit/state_of_5b8e76ea was written by that commit's code: hosts, a control node and a builder have files like it.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from plugin_modules import ROOT

from llmkeep import durable
from llmkeep.bundle import build
from llmkeep.errors import LlmkeepError
from llmkeep.pki import issuing, revocations
from llmkeep.pki.issuing_key import HsmKey
from llmkeep.places import Places
from llmkeep.policy import bundle
from llmkeep.policy import source as policy_source
from llmkeep.policy.source import Source
from llmkeep.record import findings, pods
from llmkeep.record.runs import RecordError
from llmproof import policy_bundle

OLD = ROOT / "tests/unit/state_of_5b8e76ea"
RECORDS = (
    "control/var/lib/llmkeep/pki/issued.jsonl",
    "control/var/lib/llmkeep/pki/revoked.jsonl",
    "control/var/lib/llmkeep/policy/break-glass.jsonl",
    "control/var/lib/llmkeep/publish/signed.jsonl",
)
FINDINGS = "control/var/lib/llmkeep/witness/findings.json"
REVISION = "control/var/lib/llmkeep/policy/revision.json"
SETTINGS = "control/etc/llmkeep/pki/issuing-hsm.json"
ISSUED = "builder/serial.json"
APPLIED = "control/var/lib/llmkeep/kubernetes/main/applied.json"
REFUSAL = r"{} has format 2, and this llmkeep reads 1: bundle serial 9 wrote it\. .*bundle at least as new"


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A copy of what 5b8e76ea stored."""
    shutil.copytree(OLD, tmp_path / "state")
    return tmp_path / "state"


@pytest.fixture
def signing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Policy is signed without a key, and the bundle that comes of it is not looked at."""
    monkeypatch.setattr(bundle, "signing_key", lambda *_: None)
    monkeypatch.setattr(bundle, "_standing", lambda *_: None)
    monkeypatch.setattr(policy_source, "pack", lambda *_: b"bundle")
    monkeypatch.setattr(policy_bundle, "judged", lambda *_: None)
    monkeypatch.setattr(Places, "policy_public", property(lambda _: OLD / ISSUED))


def next_revision(path: Path) -> str:
    source = Source({}, {}, {})
    return bundle._sign(Places(path.parents[4]), source, "a test", path.with_name("bundle.tar.gz"), 30, None)


def next_serial(path: Path) -> int:
    keys: Any = SimpleNamespace(issued=path)
    return build._serial(keys, [])


def applied(path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    monkeypatch.setattr(pods, "APPLIED", path.parents[1])
    return pods._applied(path.parent.name)


def key_settings(path: Path) -> dict[str, Any]:
    public: Any = None
    return HsmKey.standing(path, public)._settings


READERS: dict[str, Callable[[Path], object]] = {
    **dict.fromkeys(RECORDS, durable.recorded),
    FINDINGS: lambda path: findings.load(path.parent),
    REVISION: next_revision,
    SETTINGS: key_settings,
    ISSUED: next_serial,
}


def newer(path: Path) -> bytes:
    """Let a bundle of serial 9 have written the document, or the record's last line."""
    text = path.read_text()
    *before, last = text.splitlines() if path.suffix == ".jsonl" else [text]
    document = json.loads(last)
    changed = (document if isinstance(document, dict) else {"objects": document}) | {
        "format": 2,
        "bundle": 9,
    }
    path.write_text("\n".join([*before, json.dumps(changed)]) + "\n")
    return path.read_bytes()


@pytest.mark.usefixtures("signing")
@pytest.mark.parametrize("name", READERS)
def test_a_document_of_a_newer_format_is_refused_and_stays_as_it_is(state: Path, name: str) -> None:
    path = state / name
    content = newer(path)
    with pytest.raises(LlmkeepError, match=REFUSAL.format(path)):
        READERS[name](path)
    assert path.read_bytes() == content


@pytest.mark.parametrize("name", RECORDS)
def test_nothing_is_appended_to_a_record_with_a_line_of_a_newer_format(state: Path, name: str) -> None:
    path = state / name
    content = newer(path) + b'{"torn": '
    path.write_bytes(content)
    for read in (durable.broken_at, lambda path: durable.record(path, {"host": "llm9"})):
        with pytest.raises(LlmkeepError, match=REFUSAL.format(path)):
            read(path)
    assert path.read_bytes() == content


def test_a_newer_document_that_does_not_name_its_bundle_is_refused_too(state: Path) -> None:
    path = state / FINDINGS
    path.write_text('{"format": 3}')
    with pytest.raises(LlmkeepError, match="has format 3, and this llmkeep reads 1: a newer bundle wrote it"):
        findings.load(path.parent)


def test_what_a_newer_llmkeep_applied_to_a_cluster_is_a_finding_of_the_witness(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, clusters = state / APPLIED, tmp_path / "clusters.json"
    clusters.write_text('[{"name": "main", "kubeconfig": "/etc/kubeconfig"}]')
    content = newer(path)
    monkeypatch.setattr(pods, "APPLIED", path.parents[1])
    with pytest.raises(RecordError, match=REFUSAL.format(path)):
        pods.replicas(clusters)
    assert path.read_bytes() == content


@pytest.mark.usefixtures("signing")
def test_the_state_of_an_earlier_version_is_read_as_it_was_written(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = Places(state / "control")
    assert set(revocations.revoked_names(places)) == {"train1"}
    assert len(revocations.revoked_serials(places)) == 1
    for name in RECORDS:
        assert durable.recorded(state / name)
        assert durable.broken_at(state / name) is None
    found = findings.load((state / FINDINGS).parent)
    assert found
    assert [each.what for each in found.altered.values()] == ["llm1: record 3 is missing"]
    assert found.unheard["llm2"].what == "it did not answer"
    assert key_settings(state / SETTINGS)["token"] == "llmkeep-issuing"
    assert next_serial(state / ISSUED) == 1
    assert [each["kind"] for each in applied(state / APPLIED, monkeypatch)] == ["Namespace"]
    assert "revision 8" in next_revision(state / REVISION)


def test_a_record_goes_on_after_lines_of_an_earlier_version(state: Path) -> None:
    path = state / RECORDS[0]
    before = path.read_bytes()
    durable.record(path, {"host": "llm9"})
    assert path.read_bytes().startswith(before)
    assert durable.broken_at(path) is None
    assert [entry.get("format") for entry in durable.recorded(path)[-2:]] == [None, 1]


@pytest.mark.usefixtures("signing")
def test_what_is_written_names_its_format_and_is_read_again(state: Path) -> None:
    known = findings.load((state / FINDINGS).parent)
    assert known
    known.save((state / FINDINGS).parent)
    assert findings.load((state / FINDINGS).parent) == known
    next_revision(state / REVISION)
    (state / ISSUED).unlink()
    assert [next_serial(state / ISSUED) for _ in range(2)] == [1, 1]
    for name in (FINDINGS, REVISION, ISSUED):
        assert json.loads((state / name).read_bytes())["format"] == 1


def test_the_settings_of_the_issuing_key_name_their_format_and_the_hsm_is_not_told(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "estate.internal issuing")])
    monkeypatch.setattr(issuing, "load", lambda _: SimpleNamespace(subject=subject))
    monkeypatch.setattr(HsmKey, "made", lambda _: key)
    before = key_settings(state / SETTINGS)
    issuing.request(Places(state / "control"), before)
    coming = (state / SETTINGS).with_name("issuing-hsm.next.json")
    assert json.loads(coming.read_bytes()) == {"format": 1} | before
    assert key_settings(coming) == before
