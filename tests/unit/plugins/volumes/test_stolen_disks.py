"""All disks of a host are stolen: what they give away where the HSM cannot be reached, and what the escrow key opens.

The thief has the data disk, the root disk's folder of records and its sealed credentials, and an HSM of his own with
tokens, keys and a PIN of the same names. Two root disks are looked at: one whose `credential.secret` did not come along
(with a TPM it opens nothing by itself), and one without a TPM, where it is on the disk, and what is sealed can be read.
Not modelled: TPM2 itself, the journal and TLS key on the root disk, what is in memory, a thief who reaches the HSM.
"""

import base64
import contextlib
import functools
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import luks_estate
import pytest
from luks_estate import MIB, SOFTHSM, Estate, forms, luks, sealing, tool
from plugin_modules import load

hsm, hsm_key = load("module_utils.hsm.token_keys"), load("modules.hsm_key")
DATA = os.urandom(MIB)
PIN = "27182818284590"  # so long that it is in no encrypted file by chance
PIN_NAME = "hsm-pin"


@dataclass
class Stolen:
    """A host's disks, copied to a machine that has another HSM and another `credential.secret`."""

    disk: Path
    root_disk: Path

    def everything(self) -> dict[str, bytes]:
        """Each file's bytes; where it is base64, those inside too."""
        files = [self.disk, *(path for path in self.root_disk.rglob("*") if path.is_file())]
        found = {path.name: path.read_bytes() for path in files}
        for name in [name for name in found if name != self.disk.name]:
            lines = [line for line in found[name].splitlines() if not line.startswith(b"-----")]
            with contextlib.suppress(ValueError):
                found[f"{name}, decoded"] = base64.b64decode(b"".join(lines), validate=True)
        return found

    def opened_by_tokens(self, pin: bytes) -> list[int]:
        """Each token that leads to a key slot is tried by itself."""
        header = luks.read(self.disk)
        found = []
        for number in header.tokens:
            try:
                luks.prove(self.disk, number, pin, 20)
            except luks.Failed:
                continue
            found.append(number)
        return found


def unsealed(path: Path, name: str, credential_secret: Path) -> bytes | None:
    argv = ["systemd-creds", "decrypt", f"--name={name}", str(path), "-"]
    environment = os.environ | {"SYSTEMD_CREDENTIAL_SECRET": str(credential_secret)}
    done = subprocess.run(argv, env=environment, capture_output=True, check=False)
    return done.stdout if done.returncode == 0 else None


@dataclass
class Theft:
    """Twice from one host: when its volume waited for its escrow, and when it was finished."""

    estate: Estate
    early: Stolen
    late: Stolen
    bootstrap_key: bytes
    own_hsm: Path
    own_secret: Path


def only_reach(monkeypatch: pytest.MonkeyPatch, tokens: Path) -> None:
    """From here on programs see the tokens of this configuration of SoftHSM and no others."""
    monkeypatch.setenv("SOFTHSM2_CONF", str(tokens))


def stolen(estate: Estate, folder: Path) -> Stolen:
    root_disk = folder / "root-disk"
    shutil.copytree(estate.state, root_disk / "luks")
    shutil.copy(estate.root / PIN_NAME, root_disk)
    shutil.copy(estate.root / "escrow.pem", root_disk)
    shutil.copy(estate.disk, folder / "data-disk")
    return Stolen(folder / "data-disk", root_disk)


@pytest.fixture(scope="module")
def theft(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Theft]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        theirs = Estate(tmp_path_factory.mktemp("thief"))
        monkeypatch.setattr(luks_estate, "PIN", PIN)
        monkeypatch.setenv("SOFTHSM2_CONF", str(theirs.conf))
        theirs.make()  # leaves tokens of the same labels, keys of the same label, the same PIN
        secret = theirs.root / "credential.secret"
        setup = os.environ | {"SYSTEMD_CREDENTIAL_SECRET": str(secret)}
        subprocess.run(["systemd-creds", "setup"], env=setup, check=True, capture_output=True)

        estate = Estate(tmp_path_factory.mktemp("host"))
        estate.make()
        made = estate.call()
        assert made.known.phase == "escrow"
        bootstrap_key = sealing.unseal("data.bootstrap", (estate.state / "data.bootstrap").read_bytes())
        early = stolen(estate, tmp_path_factory.mktemp("early"))
        estate.keep(made)
        estate.run()
        estate.put_data(DATA)
        late = stolen(estate, tmp_path_factory.mktemp("late"))
        yield Theft(estate, early, late, bootstrap_key, theirs.conf, secret)


@pytest.fixture
def copy(theft: Theft, tmp_path: Path) -> Stolen:
    """Of the finished volume's disks, to write to."""
    shutil.copytree(theft.late.root_disk, tmp_path / "root-disk")
    return Stolen(Path(shutil.copy(theft.late.disk, tmp_path)), tmp_path / "root-disk")


def found_in_clear(secrets: dict[str, bytes], files: dict[str, bytes]) -> list[str]:
    return [
        f"{name} in {file}"
        for file, content in files.items()
        for name, secret in secrets.items()
        if any(form in content for form in forms(secret))
    ]


def secrets_of(theft: Theft) -> dict[str, bytes]:
    recovery_key = theft.estate.recovery_key()
    letters = recovery_key.replace(b"-", b"").decode()
    halves = [luks.MODHEX.index(letter) for letter in letters]
    bare = bytes(high << 4 | low for high, low in zip(halves[::2], halves[1::2], strict=True))
    return {
        "PIN": PIN.encode(),
        "bootstrap key": theft.bootstrap_key,
        "recovery key": recovery_key,
        "recovery key without hyphens": letters.encode(),
        "recovery key's 32 bytes": bare,
    }


@pytest.mark.parametrize("when", ["early", "late"])
def test_no_token_opens_the_volume_where_the_hsm_cannot_be_reached(
    theft: Theft, when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    haul = {"early": theft.early, "late": theft.late}[when]
    assert len(haul.opened_by_tokens(PIN.encode())) == 2, "the copy itself is good"
    nothing = tmp_path / "softhsm2.conf"
    (tmp_path / "tokens").mkdir()
    nothing.write_text(f"directories.tokendir = {tmp_path}/tokens\nobjectstore.backend = file\n")
    only_reach(monkeypatch, nothing)
    assert haul.opened_by_tokens(PIN.encode()) == []
    only_reach(monkeypatch, theft.own_hsm)
    assert haul.opened_by_tokens(PIN.encode()) == [], "an HSM with the same names and PIN"


@pytest.mark.parametrize("when", ["early", "late"])
def test_no_pin_and_no_key_is_in_clear_on_any_disk(theft: Theft, when: str) -> None:
    haul = {"early": theft.early, "late": theft.late}[when]
    files = haul.everything()
    assert {"data.json", PIN_NAME, f"{PIN_NAME}, decoded", "data-disk"} <= set(files)
    assert found_in_clear(secrets_of(theft), files) == []


@pytest.mark.parametrize("name", ["PIN", "bootstrap key", "recovery key", "recovery key's 32 bytes"])
def test_the_search_finds_each_secret_in_each_form(theft: Theft, name: str) -> None:
    sought = secrets_of(theft)
    value = sought[name]
    written = [value, value.hex().encode(), value.hex().upper().encode()]
    written += [base64.b64encode(b"-" * before + value + b"-") for before in range(3)]
    for form in written:
        record = b'{"left behind": "' + form + b'"}'
        assert f"{name} in data.json" in found_in_clear(sought, {"data.json": record})


def test_what_is_sealed_stays_shut_without_the_hosts_secret(theft: Theft, tmp_path: Path) -> None:
    late, early = theft.late.root_disk / PIN_NAME, theft.early.root_disk / "luks/data.bootstrap"
    for secret in (theft.own_secret, tmp_path / "none"):
        assert unsealed(late, PIN_NAME, secret) is None
        assert unsealed(early, "data.bootstrap", secret) is None
    assert not (theft.late.root_disk / "luks/data.bootstrap").exists()


def test_without_a_tpm_the_pin_can_be_read_and_still_opens_nothing(
    theft: Theft, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Path("/var/lib/systemd/credential.secret")
    pin = unsealed(theft.late.root_disk / PIN_NAME, PIN_NAME, here)
    assert pin == PIN.encode()
    only_reach(monkeypatch, theft.own_hsm)
    assert theft.late.opened_by_tokens(pin) == []
    assert luks.opens(theft.late.disk, pin) is None
    assert luks.opens(theft.late.disk, theft.bootstrap_key) is None, "the first key opens no more"
    # The exception that docs/operate/storage.md names: while keys are being made, the first one is on the root disk too.
    sealed = theft.early.root_disk / "luks/data.bootstrap"
    key = unsealed(sealed, "data.bootstrap", here)
    assert key is not None
    assert luks.opens(theft.early.disk, key) is not None


def test_the_owner_of_the_escrow_key_opens_the_copy_and_mends_its_header(
    theft: Theft, copy: Stolen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only_reach(monkeypatch, theft.own_hsm)
    said = json.loads(theft.estate.opened("recovery"))
    assert said["uuid"] == luks.read(copy.disk).uuid
    key = said["recovery_key"].encode()
    assert luks.opens(copy.disk, key) is not None
    with copy.disk.open("r+b") as stream:
        stream.write(os.urandom(luks.DATA_OFFSET * 512))
    assert luks.read(copy.disk) is None
    assert luks.opens(copy.disk, key) is None
    backup = tmp_path / "header"
    backup.write_bytes(theft.estate.opened("header"))
    tool("cryptsetup", "luksHeaderRestore", "--batch-mode", copy.disk, "--header-backup-file", backup)
    assert luks.opens(copy.disk, key) is not None
    assert copy.opened_by_tokens(PIN.encode()) == []
    with copy.disk.open("rb") as stream:
        stream.seek(luks.DATA_OFFSET * 512)
        assert stream.read(len(DATA)) == DATA


def test_a_header_from_before_a_rotation_opens_until_the_key_of_that_time_is_destroyed(
    theft: Theft, copy: Stolen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rotation changes who opens the volume's key, not the key: a copy is closed by the HSM alone."""
    estate = Estate(tmp_path / "host")
    shutil.copytree(theft.estate.root, estate.root)
    estate.conf.write_text(estate.conf.read_text().replace(str(theft.estate.root), str(estate.root)))
    only_reach(monkeypatch, estate.conf)
    old_recovery_key = estate.recovery_key()
    for token in ("main", "spare"):
        estate.new_key(token, "host1-v2")
    made = estate.call(key="host1-v2", rotate=["hsm", "spare", "recovery"])
    meanwhile = sealing.unseal("data.bootstrap", (estate.state / "data.bootstrap").read_bytes())
    assert luks.opens(estate.disk, meanwhile) is not None, "the same exception holds while keys rotate"
    estate.keep(made)
    estate.run(key="host1-v2")
    assert luks.opens(estate.disk, meanwhile) is None
    assert luks.opens(estate.disk, old_recovery_key) is None
    assert len(copy.opened_by_tokens(PIN.encode())) == 2
    for token in ("main", "spare"):
        old = hsm.Settings(module=SOFTHSM, tokens=[token], label="host1")
        hsm.bounded(functools.partial(hsm_key.destroy, old, ["host1"], PIN.encode(), False), 20)
    assert copy.opened_by_tokens(PIN.encode()) == []
    assert estate.ways_in() == {"hsm", "spare", "recovery"}
    # This one cannot be revoked: docs/operate/storage.md has copies of header and recovery key destroyed together.
    assert luks.opens(copy.disk, old_recovery_key) is not None
