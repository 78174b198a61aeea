"""`lab open`: a port of this machine, keys and three shell variables, for browsers and any OpenAI client."""

import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from lab.errors import LabError, NotUp
from lab.instance import Instance

EDGE_PORT = 443
KEY_DAYS = 30
ROLE = "developer"  # asks, by the API and on the chat page
OPERATOR = "operator"  # sees the operator page


@dataclass(frozen=True)
class Door:
    """What a client needs: base URL without /v1, the CA's certificate, a file with the key, variables.

    `operator_key_file`: a key for the operator page, where the lab has one.
    """

    url: str
    ca: Path
    key_file: Path
    env_file: Path
    operator_key_file: Path | None = None


def open_door(instance: Instance) -> Door:
    """Forward a port to the edge, fetch the CA's certificate, create the keys; what exists already is reused."""
    instance.require_up()
    operator_key_file = instance.folder / "demo-operator-key"
    door = Door(
        url=f"https://localhost:{forward(instance)}",
        ca=instance.folder / "ca.pem",
        key_file=instance.folder / "demo-key",
        env_file=instance.env_file,
        operator_key_file=operator_key_file if instance.lab.in_group("prometheus") else None,
    )
    edge = on(instance, "edge")
    door.ca.write_text(output(instance, edge, "cat", "/etc/llmkeep/pki/root.pem"), encoding="ascii")
    live = live_keys(instance) if door.key_file.exists() else set()
    for key_file, role in ((door.key_file, ROLE), (door.operator_key_file, OPERATOR)):
        if key_file and key_id(key_file) not in live:
            make_key(instance, key_file, role)
    assignments = {"LLMKEEP_URL": door.url, "LLMKEEP_CA": door.ca, "LLMKEEP_API_KEY_FILE": door.key_file}
    lines = [f"export {name}={shlex.quote(str(value))}\n" for name, value in assignments.items()]
    staged = door.env_file.with_suffix(".new")
    staged.write_text("".join(lines), encoding="utf-8")
    staged.replace(door.env_file)
    return door


def close_door(instance: Instance) -> None:
    """Stop forwarding. The key remains valid until it expires or is revoked."""
    instance.forwarder.kill()


def forward(instance: Instance) -> int:
    """The forwarded port, opened if necessary."""
    port_file = instance.folder / "forward.port"
    if instance.forwarder.pid() is None:
        instance.forwarder.kill()
        port_file.unlink(missing_ok=True)
        address = instance.machine(on(instance, "edge")).host.address
        command = [sys.executable, "-m", "lab.forward", "--namespace", str(instance.namespace.path)]
        command += ["--address", address, "--port", str(EDGE_PORT), "--port-file", str(port_file)]
        log = instance.folder / "forward.log"
        instance.forwarder.start(command, cwd=instance.checkout, log=log)
        deadline = time.monotonic() + 10
        while not port_file.exists():
            if instance.forwarder.pid() is None or time.monotonic() > deadline:
                raise LabError(f"no port of 127.0.0.1 could be opened: see {log}")
            time.sleep(0.05)
    return int(port_file.read_text(encoding="ascii"))


def on(instance: Instance, group: str) -> str:
    """Name of the first host of a group."""
    hosts = instance.lab.in_group(group)
    if not hosts:
        raise LabError(f"no host of this lab is in [{group}], which the demo needs")
    return hosts[0].name


def output(instance: Instance, host: str, *command: str) -> str:
    """Output of a command on a host; LabError with its error output if it fails."""
    machine = instance.machine(host)
    if not machine.running():
        raise NotUp(f"{host} has no power: `lab up` starts it")
    done = subprocess.run(
        instance.ssh(machine, shlex.join(command)),
        check=False,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        reason = done.stderr.strip() or f"exit code {done.returncode}"
        raise LabError(f"`{shlex.join(command)}` failed on {host}: {reason}")
    return done.stdout


def live_keys(instance: Instance) -> set[str]:
    """Ids of the keys that the gateway accepts."""
    records = json.loads(output(instance, on(instance, "serve"), "llm-serve", "keys", "list", "--json"))
    return {record["id"] for record in records if record["state"] == "live"}


def key_id(key_file: Path) -> str:
    """Id of the key that was created before; empty if there is none."""
    return key_file.read_text(encoding="ascii").split("_")[1] if key_file.exists() else ""


def make_key(instance: Instance, key_file: Path, role: str) -> None:
    """Create a key on the serve host; its file is readable by its owner only, and it appears in no command line."""
    subject = "demo@lab" if role == ROLE else f"{role}@lab"
    command = ["llm-serve", "keys", "add", "--subject", subject, "--tenant", "demo", "--role", role]
    printed = output(instance, on(instance, "serve"), *command, "--expires", f"{KEY_DAYS}d")
    key = next((word for word in printed.split() if word.startswith("llmk_")), None)
    if key is None:
        raise LabError("`llm-serve keys add` printed no key that begins with llmk_")
    staged = key_file.with_suffix(".new")
    staged.unlink(missing_ok=True)
    descriptor = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as handle:
        handle.write(key + "\n")
    staged.replace(key_file)
