"""A new machine takes the name of one that died: what the control node had of that one is revoked, or set aside, and kept."""

import os
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest
import sealing_double
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from other_authority import request_for
from small_authority import DOMAIN, NAMES

from llmkeep import replacement
from llmkeep.pki import authority as pki
from llmkeep.pki import edges, revoking
from llmkeep.pki.revocations import living_serials, revoked_names, revoked_serials
from llmkeep.places import Places
from llmkeep.record import witness
from llmkeep.replacement import ReplaceError


def issued(places: Places, in_hsm: bool = False) -> None:
    """A certificate for llm1."""
    key = ec.generate_private_key(ec.SECP256R1())
    asked = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "llm1")]))
        .add_extension(x509.SubjectAlternativeName(pki.general_names(NAMES)), critical=False)
        .sign(key, hashes.SHA256())
    )
    pki.sign(places, asked.public_bytes(serialization.Encoding.PEM), NAMES, "llm1", in_hsm=in_hsm)


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Places:
    """A control node that knows llm1: its certificate, its record, a volume."""
    sealing_double.use(monkeypatch, pki, pki)
    monkeypatch.setattr(pki, "encrypt_to", lambda *_: b"")
    found = Places(tmp_path)
    pki.init(found, DOMAIN, tmp_path / "escrow.pem", list(pki.NETWORKS))
    issued(found)
    (found.witness / "llm1").mkdir(parents=True)
    (found.witness / "llm1/verifier").write_text("key\n")
    found.volumes.mkdir(parents=True)
    for name in "llm1-data.json", "llm1-data.recovery.cms", "llm10-data.json", "llm1-b-data.json":
        (found.volumes / name).write_text(name)
    monkeypatch.setattr(witness, "KEPT", found.witness)
    return found


def replaced(places: Places, keep_volumes: bool = False) -> str:
    return replacement.replace(places, "llm1", "its board is dead", "ada", keep_volumes)


def test_certificates_of_before_are_revoked_and_the_name_gets_new_ones(places: Places) -> None:
    (before,) = living_serials(places, "llm1", datetime.now(UTC))
    replaced(places)
    assert int(before, 16) in revoked_serials(places)
    assert revoked_names(places) == {}
    issued(places)
    assert len(living_serials(places, "llm1", datetime.now(UTC))) == 2


def test_a_certificate_whose_key_is_in_the_hsm_outlives_the_machine(places: Places) -> None:
    issued(places, in_hsm=True)
    on_disk, in_hsm = living_serials(places, "llm1", datetime.now(UTC))
    replaced(places)
    assert int(on_disk, 16) in revoked_serials(places)
    assert int(in_hsm, 16) not in revoked_serials(places)
    before = places.revoked.read_bytes()
    replaced(places)
    assert places.revoked.read_bytes() == before


def test_what_was_kept_of_it_is_set_aside_and_of_no_other_host(places: Places) -> None:
    replaced(places)
    (aside,) = places.replaced.iterdir()
    assert sorted(str(path.relative_to(aside)) for path in aside.rglob("*") if path.is_file()) == [
        "storage/llm1-data.json",
        "storage/llm1-data.recovery.cms",
        "witness/llm1/verifier",
    ]
    assert sorted(path.name for path in places.volumes.iterdir()) == ["llm1-b-data.json", "llm10-data.json"]


def test_the_plan_names_a_key_that_another_ca_certified(places: Places) -> None:
    names = ["llm.example.org"]
    edges.accept(places, "llm1", names, request_for(names))
    lost = "lost: the key for llm.example.org; `llmkeep site` hands out a request for a new one"
    assert lost in replacement.plan(places, "llm1", False)
    edges.accept(places, "llm1", names, request_for(names), in_hsm=True)
    assert lost not in replacement.plan(places, "llm1", False)


def test_volumes_whose_disks_are_in_the_new_machine_stay(places: Places) -> None:
    replaced(places, keep_volumes=True)
    assert len(list(places.volumes.iterdir())) == 4
    assert not (places.witness / "llm1").exists()


def test_a_second_time_nothing_is_left_to_do(places: Places) -> None:
    replaced(places)
    before = places.revoked.read_bytes()
    assert replaced(places) == "llm1: nothing was left to do"
    assert places.revoked.read_bytes() == before


def test_what_was_cut_off_goes_on(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(*_: object) -> None:
        raise KeyboardInterrupt

    for owner, name in ((revoking, "reinstate"), (replacement, "set_aside")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, cut)
            with pytest.raises(KeyboardInterrupt):
                replaced(places)
    replaced(places)
    assert revoked_names(places) == {}
    assert not (places.witness / "llm1").exists()


def test_a_host_that_the_inventory_has_not_and_the_control_node_are_refused() -> None:
    groups = {"_meta": {"hostvars": {"ops1": {}, "llm1": {}}}, "control": {"hosts": ["ops1"]}}
    with pytest.raises(ReplaceError, match="no host llm2, only llm1, ops1"):
        replacement.variables("llm2", groups)
    with pytest.raises(ReplaceError, match="restore it from its backup"):
        replacement.variables("ops1", groups)


def test_a_volume_of_a_dead_disk_is_set_aside_and_one_of_the_new_disk_is_not(places: Places) -> None:
    entry = places.volumes / "llm1-data.json"
    entry.write_text('{"serial": "OLD"}')
    (places.volumes / "llm1-data2.json").write_text("another volume")
    replacement.replace_disk(places, "llm1", "data", "NEW")
    assert not [path.name for path in places.volumes.iterdir() if path.name.startswith("llm1-data.")]
    assert (places.volumes / "llm1-data2.json").exists()
    entry.write_text('{"serial": "NEW"}')
    assert "nothing was left" in replacement.replace_disk(places, "llm1", "data", "NEW")
    assert entry.exists()


def test_a_disks_replacement_that_was_cut_off_leaves_no_recovery_key_behind(
    places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    (places.volumes / "llm1-data.json").write_text('{"serial": "OLD"}')
    rename = Path.rename

    def cut(path: Path, target: Path) -> Path:
        if path.suffix == ".json":
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", cut)
        with pytest.raises(KeyboardInterrupt):
            replacement.replace_disk(places, "llm1", "data", "NEW")
    replacement.replace_disk(places, "llm1", "data", "NEW")
    assert not [path.name for path in places.volumes.iterdir() if path.name.startswith("llm1-data.")]
    kept = [path.name for path in places.replaced.rglob("*") if path.is_file()]
    assert sorted(kept) == ["llm1-data.json", "llm1-data.recovery.cms"]


def test_a_disk_that_the_inventory_does_not_name_is_refused() -> None:
    groups = {"_meta": {"hostvars": {"llm1": {"luks_volumes": [{"name": "data", "serial": "OLD"}]}}}}
    with pytest.raises(ReplaceError, match="has data on OLD: first name the new disk there"):
        replacement.require_declared("llm1", "data", "NEW", groups)
    with pytest.raises(ReplaceError, match="has the volumes data: first name the new disk"):
        replacement.require_declared("llm1", "audit", "NEW", groups)


@pytest.fixture
def console(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The fingerprint that its console shows. No server is here: ssh-keyscan prints what one would show."""
    key = tmp_path / "host_key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    words = key.with_suffix(".pub").read_text().split()[:2]
    scan = tmp_path / "bin/ssh-keyscan"
    scan.parent.mkdir()
    scan.write_text(f"#!/bin/sh\necho '[192.0.2.7]:2222 {' '.join(words)}'\n")
    scan.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scan.parent}:{os.environ['PATH']}")
    shown = subprocess.run(["ssh-keygen", "-lf", key], capture_output=True, text=True, check=True).stdout
    return shown.split()[1]


def test_its_ssh_key_is_known_once_it_is_the_one_that_its_console_shows(console: str, tmp_path: Path) -> None:
    known = tmp_path / "known_hosts"
    (tmp_path / "host_key.pub").rename(tmp_path / "new.pub")
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "old"], check=True)
    old = " ".join((tmp_path / "old.pub").read_text().split()[:2])
    known.write_text(f"[192.0.2.7]:2222 {old}\nother {old}\n")
    with pytest.raises(ReplaceError, match="another machine has this address"):
        replacement.trust("192.0.2.7", 2222, "SHA256:" + "A" * 43, known)
    assert f"[192.0.2.7]:2222 {old}\n" in known.read_text()
    replacement.trust("192.0.2.7", 2222, console, known)
    first, second = known.read_text().splitlines()
    assert first == f"other {old}"
    assert second == f"[192.0.2.7]:2222 {' '.join((tmp_path / 'new.pub').read_text().split()[:2])}"


def test_a_fingerprint_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReplaceError, match="ssh-keygen -lf"):
        replacement.trust("192.0.2.7", 22, "ab:cd", tmp_path / "known_hosts")
