"""All disks of llm1 on a machine that does not reach the HSM: this one, which is outside the lab's network."""

import base64
import json
import os
import subprocess
from pathlib import Path
from typing import IO

import pytest
from estate import ROOT, Lab
from luks_estate import forms

pytestmark = pytest.mark.leaves_it_whole
SEALED, STORE = "/etc/credstore.encrypted", "/var/lib/llmkeep/storage"


def sealed_secrets(estate: Lab) -> dict[str, bytes]:
    """What systemd-creds keeps on llm1: the PIN, the gateway's pepper and whatever roles seal."""
    each = f"for at in {SEALED}/*; do echo $(basename $at) $(systemd-creds decrypt $at - | base64 -w0); done"
    lines = [line.split() for line in estate.on("llm1", each).splitlines()]
    return {name: base64.b64decode(content) for name, content in lines}


def recovery_key(estate: Lab, volume: str) -> bytes:
    sealed = estate.on("ops1", f"cat {STORE}/llm1-{volume}.recovery.cms").encode()
    argv = [
        "openssl",
        "cms",
        "-decrypt",
        "-inform",
        "PEM",
        "-binary",
        "-inkey",
        str(ROOT / ".lab/escrow/escrow.key"),
    ]
    argv += ["-passin", f"file:{ROOT / '.lab/passphrase'}"]
    opened = subprocess.run(argv, input=sealed, capture_output=True, check=True).stdout
    return str(json.loads(opened)["recovery_key"]).encode()


def written(disk: Path, out: IO[bytes]) -> None:
    """All of a disk but its holes."""
    with disk.open("rb") as stream:
        end = 0
        while True:
            try:
                start = os.lseek(stream.fileno(), end, os.SEEK_DATA)
            except OSError:
                return
            end = os.lseek(stream.fileno(), start, os.SEEK_HOLE)
            stream.seek(start)
            for at in range(start, end, 1 << 20):
                out.write(stream.read(min(1 << 20, end - at)))


def found_in_clear(needles: dict[str, set[bytes]], disks: list[Path]) -> list[str]:
    """Which of them lie on which disk."""
    # grep takes no needle with these, and ends its lines at zeros, of which disks are full.
    wanted = {form: name for name, each in needles.items() for form in each if not {0, 10} & set(form)}
    hits = set()
    for disk in disks:
        ours, theirs = os.pipe()  # a secret is in no argument
        os.write(theirs, b"\n".join(wanted))
        os.close(theirs)
        grep = subprocess.Popen(
            ["grep", "--null-data", "--text", "--only-matching", "--fixed-strings", f"--file=/dev/fd/{ours}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=(ours,),
            env={**os.environ, "LC_ALL": "C"},
        )
        os.close(ours)
        assert grep.stdin
        with grep.stdin as pipe:
            written(disk, pipe)
        grep.stdin = None
        said, _ = grep.communicate()
        assert grep.returncode in (0, 1)
        hits |= {f"{wanted[hit]} on {disk.name}" for hit in said.split(b"\0") if hit}
    return sorted(hits)


def opens(copy: Path, *how: str, given: bytes) -> bool:
    argv = ["cryptsetup", "open", "--test-passphrase", *how, str(copy)]
    return subprocess.run(argv, input=given, capture_output=True, timeout=60, check=False).returncode == 0


def test_no_secret_lies_in_clear_on_any_disk_and_only_the_recovery_key_opens(
    estate: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    volumes = [each["volume"] for each in json.loads(estate.on("llm1", "llmkeep-volumes status"))["volumes"]]
    register = [json.loads(estate.on("ops1", f"cat {STORE}/llm1-{volume}.json")) for volume in volumes]
    secrets = sealed_secrets(estate)
    assert "cryptsetup.pkcs11-pin" in secrets
    keys = {volume: recovery_key(estate, volume) for volume in volumes}
    folder = ROOT / ".lab/instances" / estate.instance / "hosts/llm1"
    canary = f"canary {os.urandom(8).hex()}"
    # In many blocks: some of those that are free again may be another file's by now.
    write = f"for _ in $(seq 256); do printf '%-4096s' '{canary}'; done > /root/canary"
    estate.on("llm1", f"{write}; sync; rm /root/canary; sync")
    disks = [folder / "root.img", *(folder / f"{entry['serial']}.img" for entry in register)]
    needles = {name: forms(secret) for name, secret in secrets.items()}
    needles |= {f"recovery key of {name}": forms(key) for name, key in keys.items()}
    needles["canary"] = {canary.encode()}
    assert found_in_clear(needles, disks) == ["canary on root.img"]

    (tmp_path / "tokens").mkdir()
    conf = tmp_path / "softhsm2.conf"  # whatever HSM this machine has otherwise
    conf.write_text(f"directories.tokendir = {tmp_path}/tokens\nobjectstore.backend = file\n")
    monkeypatch.setenv("SOFTHSM2_CONF", str(conf))
    for volume, disk in zip(volumes, disks[1:], strict=True):
        copy = tmp_path / disk.name
        subprocess.run(["cp", "--sparse=always", disk, copy], check=True)
        assert not opens(copy, "--token-only", given=secrets["cryptsetup.pkcs11-pin"])
        assert not opens(copy, "--key-file=-", given=secrets["cryptsetup.pkcs11-pin"])
        assert opens(copy, "--key-file=-", given=keys[volume]), f"{volume}: the recovery key does not open it"
        copy.unlink()
