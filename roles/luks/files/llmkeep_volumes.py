#!/usr/bin/python3
"""The encrypted volumes of this host: `llmkeep-volumes status | verify ESCROW | shut | ready NAME | swap NAME`.

status   the state of each volume for an auditor, as JSON
verify   the same as named findings, each with its observation. ESCROW: what the control node stores, as JSON by volume
shut     the negative proof, as a finding: the HSM opens each volume, and without access to it nothing on this host does
ready    whether the HSM would open the volume now; run before each opening, so that a wrong PIN is tried only once
swap     whether the disk of a swap is still the one that was marked for it; run before each boot writes to it
"""

import contextlib
import fcntl
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

SETTINGS: dict[str, Any] = {}  # of /etc/llmkeep/volumes.json
HSM = "/usr/local/sbin/llmkeep-hsm"
LIBRARY = "/usr/local/lib/llmkeep/volumes"  # the rule against formatting, shared with the role's modules
HSM_AWAY, PIN_HELD_BACK, PIN_WRONG, NO_PIN = (10, 11), 15, 16, 21
DROPINS = "/usr/local/lib/systemd/system"
BY_UUID = Path("/dev/disk/by-uuid")
CREDENTIALS = Path("/etc/credstore.encrypted")
CRYPTTAB = {"luks", "_netdev", "nofail", "pkcs11-uri=auto", "tries=1"}
SWAP = {"plain", "swap", "cipher=aes-xts-plain64", "size=512", "nofail"}

Volume = dict[str, Any]  # of SETTINGS["volumes"]
Line = tuple[bool, str]  # whether it holds, and the observation


def output(*argv: str) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)
    return done.stdout.strip()


def state(name: str) -> Path:
    return Path(SETTINGS["state"], name)


def record(name: str) -> dict[str, Any]:
    path = state(f"{name}.json")
    content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return content


@functools.cache
def header(name: str) -> dict[str, Any]:
    uuid = record(name).get("uuid", "")
    text = output("cryptsetup", "luksDump", "--dump-json-metadata", str(BY_UUID / uuid)) if uuid else ""
    content: dict[str, Any] = json.loads(text) if text else {"keyslots": {}, "tokens": {}, "segments": {}}
    return content


# ---------------------------------------------------------------- before a volume is opened
def ready(name: str) -> int:
    """One volume at a time, so that two do not try a wrong PIN at once."""
    with state("ready.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return asked(name)


def asked(name: str) -> int:
    answer = subprocess.run([HSM], capture_output=True, text=True, timeout=80, check=False)
    if answer.returncode == 0:
        return 0
    print(answer.stdout.strip() or answer.stderr.strip())
    if answer.returncode in (*HSM_AWAY, PIN_HELD_BACK, PIN_WRONG, NO_PIN):
        return answer.returncode
    # One token or key is faulty. The other may open it if the PIN is right: again one login.
    pin = Path(os.environ["CREDENTIALS_DIRECTORY"], "cryptsetup.pkcs11-pin").read_bytes()
    argv = ["cryptsetup", "open", "--test-passphrase", "--token-only", str(BY_UUID / record(name)["uuid"])]
    tried = subprocess.run(argv, input=pin, capture_output=True, timeout=60, check=False)
    if tried.returncode != 0:
        print(tried.stderr.decode(errors="replace").strip())
        if b"is incorrect" in tried.stderr:
            subprocess.run([HSM, "refused"], timeout=80, check=True)
    return answer.returncode if tried.returncode != 0 else 0


# ---------------------------------------------------------------- before a swap is opened
def swap(name: str) -> int:
    """Each boot sets a new key, stored nowhere, and a new file system: on any but the marked disk they would destroy data."""
    sys.path.insert(0, LIBRARY)
    import disks  # type: ignore[import-not-found]  # beside the program on the host

    known = record(f"{name}.swap")
    (entry,) = [each for each in SETTINGS["swap"] if each["name"] == name]
    try:
        disk = disks.disk_at(BY_UUID / known["uuid"])
        against = [*disks.identity(disk, entry["serial"], entry["size"]), *disks.users(disk)]
        against += [finding for finding in disks.signatures(disk) if known["uuid"] not in finding.observation]
    except (disks.Unusable, KeyError) as problem:
        against = [problem]
    print("\n".join(map(str, against)))
    return 1 if against else 0


# ---------------------------------------------------------------- questions; each reports its observations and what does not hold
def mounted(volume: Volume) -> Iterator[Line]:
    source = output("findmnt", "--noheadings", "--output", "SOURCE", "--mountpoint", volume["mount"])
    wrong = source != f"/dev/mapper/llm_{volume['name']}"
    yield not wrong, f"{volume['mount']} is {source or 'not mounted'}"


def cipher(volume: Volume) -> Iterator[Line]:
    content = header(volume["name"])
    ciphers = {segment["encryption"] for segment in content["segments"].values()}
    bits = {slot["key_size"] * 8 for slot in content["keyslots"].values()}
    sectors = {segment["sector_size"] for segment in content["segments"].values()}
    kdf = {slot["kdf"]["type"] for slot in content["keyslots"].values()}
    state = f"{listed(ciphers)} with {listed(bits)} bits, sectors of {listed(sectors)} bytes, key derivation {listed(kdf)}"
    yield (ciphers, bits) == ({"aes-xts-plain64"}, {512}), f"{volume['name']} has {state}"


def listed(values: Iterable[Any]) -> str:
    return ", ".join(map(str, sorted(values))) or "none"


def slots(volume: Volume) -> Iterator[Line]:
    content, owned = header(volume["name"]), record(volume["name"]).get("slots", {})
    if set(content["keyslots"]) != set(owned):
        yield (
            False,
            f"{volume['name']} has the slots {listed(content['keyslots'])}, and owners of {listed(owned)}",
        )
    owners = {owner["owner"] for owner in owned.values()}
    if not {"hsm", "recovery"} <= owners:
        yield False, f"{volume['name']} opens only by {listed(owners)}"
    uris: dict[str, str] = {}
    for token in content["tokens"].values():
        uri = token.get("pkcs11-uri", "")
        uris |= {slot: re.sub(";type=[a-z]+", "", uri) for slot in token["keyslots"]}
        if re.search("pin-(value|source)=", uri):
            yield False, f"{volume['name']} has a PIN in its header"
    lines = [
        f"{slot} {owner['owner']} {uris.get(slot, '')} of {owner['enrolled']}"
        for slot, owner in sorted(owned.items())
    ]
    yield True, f"{volume['name']} has the slots {'; '.join(lines)}"


def bootstrap(volume: Volume) -> Iterator[Line]:
    if state(f"{volume['name']}.bootstrap").exists():
        yield False, f"{volume['name']} still has the key that it began with"
    content = header(volume["name"])
    named = {slot for token in content["tokens"].values() for slot in token["keyslots"]}
    if passwords := set(content["keyslots"]) - named:
        yield False, f"{volume['name']} has slots of passwords: {listed(passwords)}"
    yield (
        True,
        f"{volume['name']} has no key on this host, and no slot of a password among {listed(content['keyslots'])}",
    )


def kept_of(volume: Volume) -> dict[str, Any] | None:
    """What the control node stores for a volume; None if it was not asked."""
    if "escrow" not in SETTINGS:
        return None
    answer: dict[str, Any] = SETTINGS["escrow"].get(volume["name"], {})
    return answer


def escrow(volume: Volume) -> Iterator[Line]:
    known, copy = record(volume["name"]), kept_of(volume)
    phase = known.get("phase", "absent")
    if phase != "done":
        yield False, f"{volume['name']} is in phase {phase}: recovery key or header backup may not be stored"
    if copy is not None:
        for kind in ("recovery", "header"):
            if copy.get(kind) != known.get(f"{kind}_sha256"):
                yield (
                    False,
                    f"the {kind} that the control node has of {volume['name']} is not the volume's of today",
                )
        yield (
            True,
            f"{volume['name']}: recovery key stored {copy.get('recovery_stored')}, header {copy.get('header_stored')}",
        )


def drill(volume: Volume) -> Iterator[Line]:
    """A drill proves the recovery key of its time. A new key has some days until its first drill."""
    known, copy = record(volume["name"]), kept_of(volume)
    if copy is None:
        return
    done = copy.get("drilled", "")
    made = max(
        (slot["enrolled"] for slot in known.get("slots", {}).values() if slot["owner"] == "recovery"),
        default="",
    )
    now = datetime.now(UTC)
    if not made:
        yield False, f"{volume['name']} has no recovery key to try"
    elif done and datetime.fromisoformat(done) >= datetime.fromisoformat(made):
        due = datetime.fromisoformat(done) + timedelta(days=SETTINGS["drill_days"])
        yield now <= due, f"{volume['name']}: last drill {done}, the next one is due {due.date()}"
    else:
        due = datetime.fromisoformat(made) + timedelta(days=SETTINGS["drill_grace_days"])
        last = f"last drill {done}, before that" if done else "no drill yet"
        yield now <= due, f"{volume['name']}: recovery key of {made}, {last}; a drill is due {due.date()}"


def crypttab(volume: Volume) -> Iterator[Line]:
    yield opened_by_systemd(volume["name"], record(volume["name"]).get("uuid"), "-", CRYPTTAB)


def opened_by_systemd(name: str, uuid: str | None, key: str, options: set[str]) -> Line:
    """How systemd opens the device: its loaded unit, which it generated from /etc/crypttab."""
    unit = f"systemd-cryptsetup@llm_{name}.service"
    shown = output("systemctl", "show", "--property=ExecStart", "--value", unit)
    attached = re.search(rf" attach llm_{re.escape(name)} (\S+) (\S+) (\S+) ;", shown)
    if attached is None:
        return False, f"{unit} opens no llm_{name}: {shown!r}"
    lacking = options - set(attached[3].split(","))
    wrong = bool(lacking) or attached.groups()[:2] != (str(BY_UUID / f"{uuid}"), key) or "pin-" in attached[3]
    return not wrong, f"{attached[0].strip(' ;')!r}" + (f" lacks {listed(lacking)}" if lacking else "")


def bare(volume: Volume) -> Iterator[Line]:
    script = (
        'set -e; parent=$(dirname "$0"); root=$(findmnt --noheadings --output TARGET --target "$parent");'
        ' mount --bind "$root" /mnt; lsattr -d "/mnt/${0#"$root"}"'
    )
    flags = output("unshare", "--mount", "sh", "-c", script, volume["mount"])
    safe = "i" in flags.split(" ")[0]
    yield (
        safe,
        f"{volume['mount']} {'is immutable' if safe else 'can be written to'} where nothing is mounted",
    )


def units(volume: Volume) -> Iterator[Line]:
    for unit in volume.get("units", []):
        one = unit.replace("@.", "@verify.")
        shown = output("systemctl", "show", "--property=RequiresMountsFor,LoadState", one)
        properties = dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)
        waits = properties.get("RequiresMountsFor", "").split()
        if properties.get("LoadState") == "not-found":
            # A later role installs the unit; the drop-in that makes it wait must exist already.
            dropin = Path(DROPINS, f"{unit}.d", "llmkeep-volumes.conf")
            waits = re.findall(
                "^RequiresMountsFor=(.+)$", dropin.read_text() if dropin.exists() else "", re.MULTILINE
            )
        held = volume["mount"] in waits
        yield held, f"{unit} {'waits' if held else 'does not wait'} for {volume['mount']}"


def swaps() -> Iterator[Line]:
    """All swap of the host is in memory or on dm-crypt, and the declared swap is active, with a key that is stored nowhere."""
    used = [Path(line.split()[0]) for line in Path("/proc/swaps").read_text().splitlines()[1:]]
    for path in used:
        # LVM devices are named /dev/dm-N too.
        mapping = Path("/sys/class/block", path.name, "dm/uuid")
        crypt = mapping.exists() and mapping.read_text().startswith("CRYPT-")
        yield (
            crypt or path.name.startswith("zram"),
            f"{path} is {'encrypted' if crypt else 'in memory or in clear'}",
        )
    for entry in SETTINGS["swap"]:
        name = entry["name"]
        state = output("cryptsetup", "status", f"llm_{name}")
        fits = all(
            re.search(f"{what}$", state, re.MULTILINE)
            for what in (r"type:\s+PLAIN", r"cipher:\s+aes-xts-plain64")
        )
        active = Path("/dev/mapper", f"llm_{name}").resolve() in used
        yield (
            fits and active,
            f"{name} is {'swapped to' if active else 'not swapped to'}, {' '.join(state.split()) or 'shut'}",
        )
        yield opened_by_systemd(name, record(f"{name}.swap").get("uuid"), "/dev/urandom", SWAP)
    yield True, f"{len(used)} swaps"


def of_all(question: Callable[[Volume], Iterable[Line]]) -> list[Line]:
    return [line for volume in SETTINGS["volumes"] for line in question(volume)]


def finding(lines: list[Line]) -> dict[str, Any]:
    """What does not hold; if everything does, all observations."""
    wrong = [words for ok, words in lines if not ok]
    return {"ok": not wrong, "observed": " | ".join(wrong or [words for _, words in lines])}


def verify() -> int:
    checks = {name: finding(of_all(question)) for name, question in QUESTIONS.items()}
    checks["swap"] = finding(list(swaps()))
    print(json.dumps({"checks": checks}, indent=1))
    return 0


# ---------------------------------------------------------------- the negative proof
def shut() -> int:
    """Each volume opens with the HSM now; without access to it, nothing on this host opens one."""
    answer = subprocess.run([HSM], capture_output=True, text=True, timeout=80, check=False)
    if answer.returncode != 0:
        lines = [
            (
                False,
                f"the HSM opens nothing now, so that nothing opens without it is no proof: {answer.stdout.strip()}",
            )
        ]
    else:
        secrets = {
            path.name: unsealed(path) for path in (*CREDENTIALS.glob("[!.]*"), *state("").glob("*.bootstrap"))
        }
        lines = of_all(lambda volume: without_the_hsm(volume, secrets))
    print(json.dumps({"checks": {"shut": finding(lines)}}, indent=1))
    return 0


def unsealed(path: Path) -> bytes:
    argv = ["systemd-creds", "decrypt", f"--name={path.name}", str(path), "-"]
    return subprocess.run(argv, capture_output=True, timeout=60, check=False).stdout


def opens(path: Path, *way: str, secret: bytes) -> bool:
    argv = ["cryptsetup", "open", "--test-passphrase", *way, str(path)]
    return subprocess.run(argv, input=secret, capture_output=True, timeout=60, check=False).returncode == 0


def without_the_hsm(volume: Volume, secrets: dict[str, bytes]) -> Iterator[Line]:
    """Tried on a copy of the header, by a process without network, sockets and devices; the volume itself is not touched."""
    name, pin = volume["name"], secrets[Path(SETTINGS["pin"]).name]
    device = BY_UUID / record(name).get("uuid", "none")
    if not opens(device, "--token-only", secret=pin):
        yield False, f"{name} does not open by the HSM, so that it stays shut without it is no proof"
        return
    with tempfile.TemporaryDirectory(prefix="llmkeep-", dir="/var/tmp") as folder:
        copy = Path(folder, "header")
        subprocess.run(
            ["cryptsetup", "luksHeaderBackup", device, "--header-backup-file", copy], timeout=60, check=True
        )
        copy.chmod(0o600)
        os.truncate(copy, copy.stat().st_size + (1 << 20))
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                os.write(writer, json.dumps(alone(copy, pin, secrets)).encode())
            os._exit(0)
        os.close(writer)
        os.waitpid(child, 0)
        with os.fdopen(reader, "rb") as stream:
            answer = stream.read()
    opened = json.loads(answer) if answer else ["nothing was tried: the process that was to try ended"]
    yield (
        not opened,
        (
            f"{name} opens without the HSM: {listed(opened)}"
            if opened
            else f"{name} opens by the HSM; without a way to it neither its tokens with the PIN"
            f" nor {len(secrets)} secrets of this host open it"
        ),
    )


def alone(copy: Path, pin: bytes, secrets: dict[str, bytes]) -> list[str]:
    """What opens the copy without access to the HSM. A volume with a known key shows that opening works there."""
    os.unshare(os.CLONE_NEWNS | os.CLONE_NEWNET)
    script = (
        'mount --make-rprivate /; mkdir "$0/dev"; mount -t tmpfs none "$0/dev";'
        ' for node in null zero random urandom; do : > "$0/dev/$node"; mount --bind "/dev/$node" "$0/dev/$node"; done;'
        ' mount --rbind "$0/dev" /dev; mount -t tmpfs none /run'
    )
    subprocess.run(["sh", "-ec", script, str(copy.parent)], timeout=30, check=True)
    own, key = copy.with_name("own"), os.urandom(32)
    with own.open("wb") as stream:
        stream.truncate(20 << 20)
    argv = ["cryptsetup", "luksFormat", "--batch-mode", "--pbkdf=pbkdf2", "--pbkdf-force-iterations=1000"]
    subprocess.run([*argv, "--key-file=-", own], input=key, timeout=60, check=True)
    if not opens(own, "--key-file=-", secret=key):
        return ["nothing was proven: there, not even a volume with a known key opens"]
    ways = ["a token with the PIN"] if opens(copy, "--token-only", secret=pin) else []
    return ways + [
        name for name, secret in secrets.items() if secret and opens(copy, "--key-file=-", secret=secret)
    ]


# ---------------------------------------------------------------- for the auditor
def status() -> int:
    volumes = []
    for volume in SETTINGS["volumes"]:
        metadata, known = header(volume["name"]), record(volume["name"])
        volumes.append(
            {
                "volume": volume["name"],
                "mount": volume["mount"],
                "uuid": known.get("uuid"),
                "serial": known.get("serial"),
                "state": known.get("phase", "absent"),
                "cipher": sorted(segment["encryption"] for segment in metadata["segments"].values()),
                "sector": sorted(segment["sector_size"] for segment in metadata["segments"].values()),
                "key_bits": sorted({slot["key_size"] * 8 for slot in metadata["keyslots"].values()}),
                "slots": [
                    {
                        "slot": int(slot),
                        "kdf": content["kdf"]["type"],
                        **known.get("slots", {}).get(slot, {"owner": "unknown", "enrolled": None}),
                    }
                    for slot, content in sorted(metadata["keyslots"].items())
                ],
                "recovery_sha256": known.get("recovery_sha256"),
                "header_sha256": known.get("header_sha256"),
                "problems": [
                    words for question in QUESTIONS.values() for ok, words in question(volume) if not ok
                ],
            }
        )
    print(json.dumps({"volumes": volumes}, indent=1))
    return 0


QUESTIONS: dict[str, Callable[[Volume], Iterator[Line]]] = {
    question.__name__: question
    for question in (mounted, cipher, slots, bootstrap, escrow, drill, crypttab, bare, units)
}


def main() -> int:
    SETTINGS.update(json.loads(Path("/etc/llmkeep/volumes.json").read_text()))
    match sys.argv[1:]:
        case ["status"]:
            return status()
        case ["verify", escrow]:
            SETTINGS["escrow"] = json.loads(escrow)
            return verify()
        case ["shut"]:
            return shut()
        case ["ready", name]:
            return ready(name)
        case ["swap", name]:
            return swap(name)
    print(__doc__, file=sys.stderr)
    return 64


if __name__ == "__main__":
    sys.exit(main())
