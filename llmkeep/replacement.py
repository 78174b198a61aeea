"""`llmkeep host replace NAME`: new hardware under the name of a dead host.

`llmkeep disk replace HOST VOLUME SERIAL`: a new disk for a volume whose disk died.

On the control node, the old machine's certificates are revoked, and its witnessed record is moved to
/var/lib/llmkeep/replaced. Recovery keys and headers of its volumes are moved there too, unless its disks are in the
new machine. The same is done for a single volume, which its host releases. `llmkeep site` then sets up the machine or
the volume.

Exit codes: 0 done, or planned; 1 refused, and nothing was changed; 3 done, but a host did not get the revocation: run
it again.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llmcore.files import flush
from llmkeep.durable import write
from llmkeep.errors import LlmkeepError, printable
from llmkeep.pki import revoking
from llmkeep.pki.edges import Edge
from llmkeep.pki.revocations import living_serials, revoked_serials
from llmkeep.places import Places
from llmkeep.playbooks import inventory_path, listed, play, verified_tree
from llmkeep.record import witness
from llmkeep.record.runs import recorded, who, whole_run
from llmproof import heads

INVENTORY = "/etc/llmkeep/inventory"
HOSTS_MISSING = 3
KNOWN_HOSTS = Path.home() / ".ssh/known_hosts"
FINGERPRINT = re.compile(r"SHA256:[A-Za-z0-9+/]{43}")


class ReplaceError(LlmkeepError):
    """A replacement was refused. The message says what is wrong, the value seen, and what to do."""


def plan(places: Places, name: str, keep_volumes: bool) -> Iterator[str]:
    """Lines on what is restored automatically, what is lost, and what is left to do."""
    yield f"{name}: `llmkeep site` restores packages, services, certificates, models, and keys between hosts"
    if last := witness.Kept(places.witness / name).seen():
        head = heads.stated(last)[1]
        yield f"lost, unless backed up: the record, {head.size} lines seen by the witness; a new one begins"
    yield "lost, unless backed up: unexported ratings, checkpoints, today's quotas"
    for volume in (path for path in volume_files(places, name) if path.suffix == ".json"):
        what = (
            "opened on the new machine"
            if keep_volumes
            else "created again on the disk that the inventory names"
        )
        yield f"volume {volume.stem.removeprefix(f'{name}-')}: {what}"
    if (edge := Edge.read(places, name)) and not edge.hsm:
        yield f"lost: the key for {', '.join(edge.names)}; `llmkeep site` hands out a request for a new one"
    yield "to do: import clients' API keys with identity_verb=import"
    yield "the HSM's keys are unaffected; if the machine was stolen, change the PIN"


def trust(address: str, port: int, fingerprint: str, known_hosts: Path) -> None:
    """Add the SSH key of ADDRESS to the known ones if it matches the one read at its console, else raise ReplaceError."""
    if not FINGERPRINT.fullmatch(fingerprint):
        raise ReplaceError(
            f"--host-key is {printable(fingerprint)}: give what `ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub` prints at the "
            "machine's console, SHA256:…"
        )
    scan = ["ssh-keyscan", "-T", "10", "-t", "ed25519", "-p", str(port), address]
    answer = subprocess.run(scan, capture_output=True, text=True, check=False, timeout=60).stdout
    with tempfile.NamedTemporaryFile("w", prefix="llmkeep-") as file:
        file.write(answer)
        file.flush()
        words = subprocess.run(
            ["ssh-keygen", "-lf", file.name], capture_output=True, text=True, check=False
        ).stdout.split()
    if fingerprint not in words:
        raise ReplaceError(
            f"{address} shows the SSH key {words[1] if len(words) > 1 else '(none: it does not answer)'}, but --host-key "
            f"says {fingerprint}: another machine has this address, or the key was misread"
        )
    where = address if port == 22 else f"[{address}]:{port}"
    if known_hosts.exists():
        forget = ["ssh-keygen", "-q", "-R", where, "-f", str(known_hosts)]
        subprocess.run(forget, capture_output=True, check=False)  # a file without this host is no failure
        known_hosts.with_name(f"{known_hosts.name}.old").unlink(missing_ok=True)
    others = known_hosts.read_text() if known_hosts.exists() else ""
    write(known_hosts, (others + answer).encode(), 0o600)


def volume_files(places: Places, name: str, volume: str = "[a-z0-9_]+") -> list[Path]:
    """Register, recovery key and header of a host's volumes, or of one.

    The register comes last, since a run finds remaining work by it.
    """
    files = re.compile(rf"{re.escape(name)}-{volume}\.(json|recovery\.cms|header\.cms)")
    there = [path for path in places.volumes.glob("*") if files.fullmatch(path.name)]
    return sorted(there, key=lambda path: (path.suffix == ".json", path.name))


def set_aside(places: Places, name: str, keep_volumes: bool, now: datetime) -> list[str]:
    """Move the control node's data on the old machine; returns the new paths."""
    paths = [places.witness / name] if (places.witness / name).exists() else []
    if not keep_volumes:
        paths += volume_files(places, name)
    return move_aside(places, name, paths, now)


def move_aside(places: Places, name: str, paths: list[Path], now: datetime) -> list[str]:
    """Move files and folders below a folder for NAME and the present time; returns its path if anything was moved."""
    target = places.replaced / f"{name}-{now:%Y-%m-%dT%H%M%SZ}"
    for path in paths:
        to = target / path.parent.name / path.name
        to.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.rename(to)
        flush(to.parent)
        flush(path.parent)
    return [str(target)] if paths else []


def replace(places: Places, name: str, reason: str, by: str, keep_volumes: bool) -> str:
    """Prepare the control node for a new machine called NAME; returns a message. Idempotent."""
    steps = []
    known = revoked_serials(places)
    if any(int(serial, 16) not in known for serial in living_serials(places, name, datetime.now(UTC), True)):
        revoking.revoke(places, name, reason, by, with_host=True)
        steps.append("the old certificates are revoked")
    # Also what a run that was killed here left.
    revoking.reinstate(places, name, reason, by)
    with witness.alone():
        aside = set_aside(places, name, keep_volumes, datetime.now(UTC))
    steps += [f"the old machine's records are in {path}" for path in aside]
    return f"{name}: {'; '.join(steps) or 'nothing was left to do'}"


def variables(name: str, groups: dict[str, Any]) -> dict[str, Any]:
    """The host's variables; ReplaceError if it cannot be replaced."""
    hosts = groups["_meta"]["hostvars"]
    if name not in hosts:
        raise ReplaceError(f"the inventory has no host {printable(name)}, only {', '.join(sorted(hosts))}")
    if name in groups.get("control", {}).get("hosts", []):
        raise ReplaceError(f"{name} is the control node: restore it from its backup (docs/operate/backup.md)")
    return dict(hosts[name])


def _replace(arguments: argparse.Namespace) -> int:
    tree = verified_tree()
    places = [inventory_path(place, tree) for place in arguments.inventory or [INVENTORY]]
    hostvars = variables(arguments.name, listed(places, tree))
    for line in plan(arguments.places, arguments.name, arguments.keep_volumes):
        print(line)
    if arguments.plan:
        return 0
    if arguments.host_key:
        trust(
            str(hostvars.get("ansible_host", arguments.name)),
            int(hostvars.get("ansible_port", 22)),
            arguments.host_key,
            KNOWN_HOSTS,
        )
    event: dict[str, object] = {
        "event.action": f"host replace {arguments.name}",
        "event.reason": arguments.reason,
    }
    playbook = (tree / "playbooks/replace-host.yml").resolve()
    with recorded(tree, playbook, places, arguments, event) as outcome:
        outcome.code, report = play(playbook, places, ["--limit", arguments.name], quiet=True)
        outcome.hosts = report.hosts
        if outcome.code:
            raise ReplaceError(
                "; ".join(map(printable, report.failures)) or f"{arguments.name} could not be asked"
            )
        print(
            replace(arguments.places, arguments.name, arguments.reason, who(), arguments.keep_volumes),
            flush=True,
        )
        outcome.code, report = play(
            (tree / "playbooks/revoke.yml").resolve(), places, ["--limit", f"all:!{arguments.name}"]
        )
        outcome.hosts = report.hosts
    if outcome.code == 0:
        print("next: llmkeep site -i INVENTORY")
    return outcome.code and (130 if outcome.code == 130 else HOSTS_MISSING)


def require_declared(name: str, volume: str, serial: str, groups: dict[str, Any]) -> None:
    """Raise ReplaceError unless the inventory has the volume on the disk with this serial."""
    volumes = {
        each["name"]: str(each["serial"]) for each in variables(name, groups).get("luks_volumes") or []
    }
    if volumes.get(volume) != serial:
        inventory = (
            f"{volume} on {volumes[volume]}"
            if volume in volumes
            else f"the volumes {', '.join(volumes) or 'none'}"
        )
        raise ReplaceError(
            f"luks_volumes of {name} in the inventory has {printable(inventory)}: first name the new disk there, {volume} "
            f"with the serial {printable(serial)} (lsblk --output NAME,SIZE,SERIAL)"
        )


def registered_serial(places: Places, host: str, volume: str) -> str | None:
    """Serial of the volume's disk in the register."""
    entry = places.volumes / f"{host}-{volume}.json"
    return str(json.loads(entry.read_bytes())["serial"]) if entry.exists() else None


def replace_disk(places: Places, host: str, volume: str, serial: str) -> str:
    """Move away the control node's data on a volume unless its disk is SERIAL; returns a message. Idempotent."""
    if registered_serial(places, host, volume) in {None, serial}:
        return f"{host}/{volume}: nothing was left to do"
    (path,) = move_aside(places, host, volume_files(places, host, volume), datetime.now(UTC))
    return f"{host}/{volume}: recovery key and header of the dead disk are in {path}"


def _replace_disk(arguments: argparse.Namespace) -> int:
    tree = verified_tree()
    places = [inventory_path(place, tree) for place in arguments.inventory or [INVENTORY]]
    require_declared(arguments.host, arguments.volume, arguments.serial, listed(places, tree))
    volume = f"{arguments.host}/{arguments.volume}"
    print(f"{volume}: created empty on {arguments.serial}. `llmkeep site` restores only models and releases")
    if arguments.plan:
        return 0
    if registered_serial(arguments.places, arguments.host, arguments.volume) == arguments.serial:
        print(f"{volume} is already on {arguments.serial}: nothing was left to do")
        return 0
    event: dict[str, object] = {"event.action": f"disk replace {volume}", "event.reason": arguments.reason}
    playbook = (tree / "playbooks/replace-disk.yml").resolve()
    with recorded(tree, playbook, places, arguments, event) as outcome:
        outcome.code, report = play(playbook, places, ["--extra-vars", json.dumps({"volume": volume})])
        outcome.hosts = report.hosts
        if outcome.code == 0:
            print(
                replace_disk(arguments.places, arguments.host, arguments.volume, arguments.serial), flush=True
            )
            print("next: llmkeep site -i INVENTORY")
    return outcome.code


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """`llmkeep host replace` and `llmkeep disk replace`."""
    verbs = subparsers.add_parser("host", help="replace a dead host", description=__doc__).add_subparsers(
        required=True, metavar="VERB"
    )
    parser = verbs.add_parser(
        "replace",
        parents=[whole_run(INVENTORY)],
        help="prepare for new hardware under a host's name",
        description=__doc__,
    )
    parser.add_argument("name", help="name of the host in the inventory")
    parser.add_argument("--reason", required=True, help="for the readers of the record")
    parser.add_argument(
        "--plan", action="store_true", help="print the steps and the data that is lost; change nothing"
    )
    parser.add_argument(
        "--keep-volumes", action="store_true", help="the old machine's disks are in the new one"
    )
    parser.add_argument(
        "--host-key",
        metavar="SHA256:…",
        help="the new machine's SSH key, as read at its console (default: the known one)",
    )
    parser.set_defaults(run=_replace, places=Places())
    verbs = subparsers.add_parser("disk", help="replace a dead disk", description=__doc__).add_subparsers(
        required=True, metavar="VERB"
    )
    parser = verbs.add_parser(
        "replace",
        parents=[whole_run(INVENTORY)],
        help="prepare for a new disk for a volume",
        description=__doc__,
    )
    parser.add_argument("host", help="its name in the inventory")
    parser.add_argument("volume", help="its name in luks_volumes")
    parser.add_argument("serial", help="serial of the new disk, as in luks_volumes")
    parser.add_argument("--reason", required=True, help="for the readers of the record")
    parser.add_argument("--plan", action="store_true", help="print the data that is lost; change nothing")
    parser.set_defaults(run=_replace_disk, places=Places())
