"""The control node's state goes to a repository of restic's, and comes back on a blank machine with the escrow key alone."""

import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import policies
import pytest
import sealing_double
from power_cut import losing_power
from small_authority import DOMAIN
from trained_candidate import NAME, candidate

from llmkeep.backup import commands, contents, restore
from llmkeep.backup.contents import Description
from llmkeep.backup.repository import BackupError, Repository
from llmkeep.bundle import release, signing
from llmkeep.pki import authority as pki
from llmkeep.places import Places
from llmkeep.policy import bundle as policy
from llmkeep.record import commands as audit
from llmkeep.record import runs
from llmkeep.sealing import SealError
from llmproof.heads import Verifier
from llmproof.verify import verify as verified


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What both machines were made from: whose bundles count, and the escrow certificate with its key beside it."""
    folder = tmp_path_factory.mktemp("bundle")
    signing.init(folder, None)
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:3072", "-noenc", "-subj", "/CN=escrow",
         "-keyout", folder / "escrow.key", "-out", folder / "escrow.pem"],
        check=True, capture_output=True,
    )  # fmt: skip
    return folder


def blank(root: Path, bundle: Path, serial: int = 3) -> Places:
    """A machine after `bootstrap --restore`."""
    places = Places(root)
    for path in (places.bundle_keyring, places.bundle_serial, places.escrow_certificate):
        path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(bundle / "keyring.pgp", places.bundle_keyring)
    shutil.copy(bundle / "escrow.pem", places.escrow_certificate)
    places.bundle_serial.write_text(f"{serial}\n")
    return places


def recording(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its record is the one that runs are written to."""
    monkeypatch.setattr(runs, "FOLDER", places.root / "var/log/llmkeep-audit")
    monkeypatch.setattr(runs, "SEALED_SEED", places.sealed(runs.CREDENTIAL))


@pytest.fixture(scope="session")
def lost(tmp_path_factory: pytest.TempPathFactory, bundle: Path) -> Iterator[Places]:
    """A control node with an authority, a policy, a record, an inventory, and a release on its mirror, beside its repository."""
    with pytest.MonkeyPatch.context() as patch:
        for opener, sealer in (
            (pki, pki), (policy, policy), (release, release), (runs, audit), (contents, contents), (commands, commands)
        ):  # fmt: skip
            sealing_double.use(patch, sealer, opener)
        folder = tmp_path_factory.mktemp("estate")
        places = blank(folder / "lost", bundle)
        recording(places, patch)
        pki.init(places, DOMAIN, bundle / "escrow.pem", list(pki.NETWORKS))
        policy.init(places)
        policy.build(places, policies.SOURCE, places.policy_bundle, 90)
        audit.init()
        runs.append({"event.action": "run site.yml"})
        release.init(places, None)
        release.sign(places, candidate(folder / "release"))
        release.add(places, folder / "release", places.publish_public)
        inventory = places.root / "etc/llmkeep/inventory/hosts.yml"
        inventory.parent.mkdir()
        inventory.write_text("all: {}\n")
        set_up(places)
        commands.create(places)
        yield places


def set_up(places: Places) -> None:
    """As role backup does, with the repository beside the machine's files."""
    settings = {"repository": str(places.root.parent / "repository"), "keep": {"daily": 2}}
    places.backup_settings.write_text(json.dumps(settings))


def copied(lost: Places, folder: Path) -> Places:
    """The estate's control node and its repository once more, for one test."""
    shutil.copytree(lost.root.parent, folder, symlinks=True, dirs_exist_ok=True)
    places = Places(folder / "lost")
    places.backup_begun.write_text(str(folder / "repository"))
    set_up(places)
    return places


@pytest.fixture
def node(tmp_path: Path, lost: Places, monkeypatch: pytest.MonkeyPatch) -> Places:
    """A control node that is backed up."""
    places = copied(lost, tmp_path)
    recording(places, monkeypatch)
    return places


@pytest.fixture
def machine(tmp_path: Path, bundle: Path, lost: Places, monkeypatch: pytest.MonkeyPatch) -> Places:
    """A blank machine, and the repository of a control node that was lost."""
    copied(lost, tmp_path)
    places = blank(tmp_path / "new", bundle)
    recording(places, monkeypatch)
    return places


def restored(places: Places, bundle: Path, snapshot: str = "latest") -> str:
    repository = Repository(str(places.root.parent / "repository"))
    return restore.restore(places, repository, bundle / "escrow.key", None, snapshot)


def files(root: Path) -> dict[str, bytes]:
    """What a control node cannot make again."""
    changing = (
        "etc/llmkeep/backup.json",
        "var/lib/llmkeep/backup/repository",
        "var/lib/llmkeep/policy/revision.json",
        "var/lib/llmkeep/publish/serial",
        "var/log",
        "srv",
    )
    return {
        name: path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and not (name := str(path.relative_to(root))).startswith(changing)
    }


def test_what_was_lost_comes_back_and_works(machine: Places, lost: Places, bundle: Path) -> None:
    message = restored(machine, bundle)
    assert files(machine.root) == files(lost.root)
    assert pki.issuing_pair(machine)[0] == pki.issuing_pair(lost)[0]
    assert policy.signing_key(machine).public_key() == policy.signing_key(lost).public_key()
    assert f"{NAME} 1: llmkeep release add FOLDER" in message
    folder = runs.FOLDER
    assert verified(folder, Verifier((folder / "verifier").read_text())).ok
    assert (folder / "records-000000000001.jsonl").read_text().count("restore backup") == 1


def test_a_release_needs_its_files_and_no_other_signature(
    machine: Places, bundle: Path, tmp_path: Path
) -> None:
    restored(machine, bundle)
    before = (machine.releases / NAME / "MANIFEST.json").read_bytes()
    release.add(machine, candidate(tmp_path / "medium"), machine.publish_public)
    assert (machine.releases / NAME / "MANIFEST.json").read_bytes() == before
    assert release.verify(machine, machine.releases / NAME, machine.publish_public).serial == 1


def test_numbers_that_were_issued_after_the_backup_are_not_issued_again(
    machine: Places, bundle: Path, tmp_path: Path
) -> None:
    restored(machine, bundle)
    assert "serial 1002," in release.sign(machine, candidate(tmp_path / "next", name="next"))
    before = machine.policy_bundle.read_bytes()
    assert "revision 1 already has" in policy.renew(machine, machine.policy_bundle)
    assert machine.policy_bundle.read_bytes() == before
    assert "revision 1002," in policy.build(machine, policies.SOURCE, machine.policy_bundle, 90)
    assert "revision 1002 already has" in policy.build(machine, policies.SOURCE, machine.policy_bundle, 90)


def unseal(path: Path) -> bytes:
    """What the double of systemd-creds sealed under the file's name."""
    return path.read_bytes().removeprefix(f"sealed {path.name}:".encode())


def as_restic(node: Places, *words: str) -> None:
    """By who has the repository's password."""
    password = unseal(node.backup_password).decode()
    argv = ["restic", "--no-cache", "--repo", str(node.root.parent / "repository"), *words]
    environment = {"PATH": os.environ["PATH"], "RESTIC_PASSWORD": password}
    subprocess.run(argv, env=environment, check=True, capture_output=True)


def test_no_sealed_secret_is_there_in_clear_even_for_who_has_the_repositorys_password(
    node: Places, tmp_path: Path
) -> None:
    as_restic(node, "restore", "latest", "--target", str(tmp_path / "seen"))
    assert not (tmp_path / "seen/etc/credstore.encrypted").exists()
    secret = unseal(node.issuing_key)
    assert not any(secret in path.read_bytes() for path in (tmp_path / "seen").rglob("*") if path.is_file())


def test_the_newest_backup_is_verified_where_it_lies(node: Places) -> None:
    commands.verify(node)
    note = json.loads(node.backup_verified.read_bytes())
    assert f"{note['snapshot'][:8]}  " in commands.overview(node)
    assert commands.overview(node).endswith("verified")


def test_what_goes_on_record_meanwhile_is_in_the_backup_whole_or_not_at_all(
    node: Places, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    over = threading.Event()

    def running() -> None:
        while not over.is_set():
            runs.append({"event.action": "run site.yml"})

    with ThreadPoolExecutor(1) as pool:
        written = pool.submit(running)
        commands.create(node)
        over.set()
        written.result()
    machine = blank(tmp_path / "new", bundle)
    recording(machine, monkeypatch)
    restored(machine, bundle)
    record = verified(runs.FOLDER, Verifier((runs.FOLDER / "verifier").read_text()))
    assert record.ok
    assert record.records > 3


def test_a_secret_that_does_not_open_under_its_own_name_is_named(
    node: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unseal(_: bytes, name: str) -> bytes:
        raise SealError(f"`systemd-creds decrypt` exited 1: {name}")

    monkeypatch.setattr(contents, "unseal", unseal)
    with pytest.raises(BackupError, match="cannot be unsealed on this host under its own name"):
        contents.keep_secrets(node, node.escrow_certificate)


def test_what_a_program_remembers_beside_a_secret_is_no_secret(node: Places) -> None:
    node.sealed(".llmkeep.hsm-pin.refused").write_text("no credential")
    contents.keep_secrets(node, node.escrow_certificate)


def test_a_damaged_repository_is_not_verified(node: Places, tmp_path: Path) -> None:
    largest = max(
        (tmp_path / "repository/data").rglob("*"), key=lambda path: path.stat().st_size * path.is_file()
    )
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.chmod(0o600)
    largest.write_bytes(content)
    with pytest.raises(BackupError, match="restic check ended with 1"):
        commands.verify(node)
    assert not node.backup_verified.exists()


def test_a_truncated_repository_restores_nothing_in_silence(
    machine: Places, bundle: Path, tmp_path: Path
) -> None:
    for path in (tmp_path / "repository/data").rglob("*"):
        if path.is_file():
            path.chmod(0o600)
            os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(BackupError, match="restic"):
        restored(machine, bundle)
    assert not machine.root_certificate.exists()


def test_only_as_many_backups_stay_as_are_to(node: Places) -> None:
    for _ in range(2):
        commands.create(node)
    assert len(commands.overview(node).splitlines()) == 2  # of one day the oldest and the newest


def test_a_repository_that_vanished_is_not_begun_anew(node: Places, tmp_path: Path) -> None:
    (tmp_path / "repository").rename(tmp_path / "unmounted")
    with pytest.raises(BackupError, match="mount its disk"):
        commands.create(node)
    assert not (tmp_path / "repository").exists()


def test_to_ask_for_backups_begins_no_repository(node: Places, tmp_path: Path) -> None:
    node.backup_settings.write_text(json.dumps({"repository": str(tmp_path / "another")}))
    with pytest.raises(BackupError, match="there is no repository"):
        commands.overview(node)
    assert not (tmp_path / "another").exists()


def test_a_repository_of_another_estate_is_refused(node: Places, tmp_path: Path) -> None:
    subprocess.run(
        ["restic", "--no-cache", "init", "--repo", tmp_path / "another"],
        env={"PATH": os.environ["PATH"], "RESTIC_PASSWORD": "another estate's"}, check=True, capture_output=True,
    )  # fmt: skip
    node.backup_settings.write_text(json.dumps({"repository": str(tmp_path / "another")}))
    with pytest.raises(BackupError, match="belongs to another estate"):
        commands.create(node)


def test_two_operators_do_not_work_in_it_at_once(node: Places) -> None:
    with commands.standing(node), pytest.raises(Exception, match="another llmkeep is using"):
        commands.create(node)


def test_a_backup_from_the_future_is_pointed_at(node: Places, tmp_path: Path) -> None:
    as_restic(node, "backup", "--tag", "llmkeep", "--time", "2040-01-31 10:00:00", str(tmp_path / "lost/etc"))
    with pytest.raises(BackupError, match=r"2040-01-31T10:00:00.* restic forget"):
        commands.create(node)


def test_another_escrow_key_opens_nothing(machine: Places, tmp_path: Path) -> None:
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:3072", "-noenc", "-subj", "/CN=escrow",
         "-keyout", tmp_path / "escrow.key", "-out", tmp_path / "escrow.pem"], check=True, capture_output=True,
    )  # fmt: skip
    with pytest.raises(BackupError, match="use the escrow key of its estate"):
        restored(machine, tmp_path)
    assert not machine.root_certificate.exists()


def test_a_machine_with_an_authority_of_its_own_is_left_alone(machine: Places, bundle: Path) -> None:
    pki.init(machine, DOMAIN, bundle / "escrow.pem", list(pki.NETWORKS))
    before = machine.root_certificate.read_bytes()
    with pytest.raises(BackupError, match="already has a certificate authority"):
        restored(machine, bundle)
    assert machine.root_certificate.read_bytes() == before


def test_a_machine_from_another_estates_bundle_is_refused(
    machine: Places, bundle: Path, tmp_path: Path
) -> None:
    signing.init(tmp_path / "other", None)
    shutil.copy(tmp_path / "other/keyring.pgp", machine.bundle_keyring)
    with pytest.raises(BackupError, match="an estate whose bundles"):
        restored(machine, bundle)


def test_a_machine_from_an_older_bundle_is_refused(machine: Places, bundle: Path) -> None:
    machine.bundle_serial.write_text("2\n")
    with pytest.raises(BackupError, match="bundle serial 3, but this machine has 2"):
        restored(machine, bundle)


def test_a_newer_format_is_refused_with_what_wrote_it(
    node: Places, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = Description.of(node)
    monkeypatch.setattr(Description, "of", lambda _: replace(now, format=2, serial=9))
    commands.create(node)
    with pytest.raises(
        BackupError, match="format 2, and this llmkeep reads 1: it was written by bundle serial 9"
    ):
        restored(blank(tmp_path / "new", bundle), bundle)


@pytest.mark.parametrize("after", [0, 1, 4, 7])
def test_a_restore_that_was_cut_off_goes_on(
    after: int, machine: Places, lost: Places, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = losing_power(after)
    with monkeypatch.context() as patch:
        patch.setattr(restore, "write", cut)
        patch.setattr(contents, "write", cut)
        with pytest.raises(KeyboardInterrupt):
            restored(machine, bundle)
    restored(machine, bundle)
    assert files(machine.root) == files(lost.root)
    assert json.loads((machine.root / "var/lib/llmkeep/policy/revision.json").read_bytes())["floor"] == 1001


def test_a_restore_that_was_cut_off_is_not_mixed_with_another_snapshot(machine: Places, bundle: Path) -> None:
    machine.restoring.write_text('{"snapshot": "0123456789abcdef"}')
    with pytest.raises(BackupError, match="--snapshot 01234567"):
        restored(machine, bundle)


@pytest.mark.parametrize(
    "place", ["backup", "sftp:host:/x", "sftp:-oProxyCommand=x@h:/f", "rest:http://h/", "/a b", "/a\n"]
)
def test_no_place_but_a_folder_or_sftp_is_taken(place: str) -> None:
    with pytest.raises(BackupError, match="is not a backup location"):
        Repository(place)
