"""The operator's steps in the demo: plug the medium in, compare one hash, start two commands, ask a question.

The lab's own control node does everything else, from the medium alone.
"""

import base64
import contextlib
import hashlib
import io
import os
import shlex
import sys
import tarfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lab import door
from lab.ask import ask
from lab.errors import AlreadyUp, LabError
from lab.instance import Instance, plug
from lab.machine import Machine
from lab.steps import RoleTimes, Steps

MOUNT = "/media/llmkeep"
SENT = "/root/lab"  # on the control node: inventories that the bundle lacks
QUESTION = "Name the capital of France."


def demo(instance: Instance, bundle: Path, question: str, steps: Steps) -> None:
    """Run all steps up to an answer; completed steps are skipped."""
    with instance.changing():
        start_hosts(instance, steps)
        bootstrap(instance, bundle, steps)
    site(instance, steps)
    with steps.step("open a port of this machine to the edge, and make a demo key"):
        opened = door.open_door(instance)
    steps.console.print(f"\n{question}")
    output = Console(highlight=False)
    answer = ask(opened, question, lambda piece: output.print(piece, end="", markup=False, style="bold cyan"))
    output.print()
    table = Table.grid(padding=(0, 2))
    pace = f"{answer.tokens_per_second:.1f} tokens/s" if answer.tokens_per_second else "too short to tell"
    control = door.on(instance, "control")
    for label, value in (
        ("time to first token", f"{answer.time_to_first_token * 1000:.0f} ms"),
        ("pace", f"{pace} ({answer.tokens} tokens)"),
        ("model", answer.model),
        ("TLS", f"{answer.tls_version}, key exchange {answer.key_exchange_group}"),
        ("host", f"{door.on(instance, 'serve')} (edge {door.on(instance, 'edge')}, {opened.url})"),
        ("bundle serial", door.output(instance, control, "cat", "/var/lib/llmkeep/serial").strip()),
        ("for your client", f"source {os.path.relpath(opened.env_file)}"),
        *pages(instance, opened),
    ):
        table.add_row(label, value)
    output.print(table)


def pages(instance: Instance, opened: door.Door) -> list[tuple[str, str]]:
    """Where a browser on this machine finds each page, a file with a key to sign in with, and the CA to trust."""
    rows = []
    if instance.lab.in_group("chat"):
        rows += [("chat page", f"{opened.url}/"), ("  its key", os.path.relpath(opened.key_file))]
    if opened.operator_key_file:
        key = os.path.relpath(opened.operator_key_file)
        rows += [("operator page", f"{opened.url}/operator/"), ("  its key", key)]
    return [*rows, ("CA to trust", os.path.relpath(opened.ca))] if rows else []


def start_hosts(instance: Instance, steps: Steps) -> None:
    """Start every host."""
    with contextlib.suppress(AlreadyUp), steps.series() as begin:
        instance.up(begin)


def bootstrap(instance: Instance, bundle: Path, steps: Steps) -> None:
    """Plug the medium in, compare its bootstrap program with the hash that the builder printed, and run it."""
    control = instance.machine(door.on(instance, "control"))
    name = control.host.name
    plug_bundle(instance, control, bundle, steps)
    with steps.step(f"compare the hash of bootstrap on {name} with the one that the builder printed"):
        compare_bootstrap(instance, control, bundle / "bootstrap")
    with steps.step(f"run bootstrap on {name}, from the medium alone") as now:
        domain = [instance.lab.domain] if instance.lab.domain else []
        steps.run(interactive(instance, control, "sh", f"{MOUNT}/bootstrap", *domain), "bootstrap", now)


def site(instance: Instance, steps: Steps, *words: str) -> None:
    """Have the control node provision every host."""
    control = instance.machine(door.on(instance, "control"))
    options = [part for path in absolute(instance) for part in ("-i", on_control(instance, path))]
    command = ("llmkeep", "site", *options, *words)
    with steps.step(f"run `llmkeep site` on {control.host.name}") as now:
        steps.run(interactive(instance, control, *command), "site", RoleTimes(steps, now))


def on_control(instance: Instance, inventory: Path) -> str:
    """Path of an inventory on the control node. It is sent there unless the bundle has it."""
    name = inventory.relative_to(instance.checkout)
    if name.parts[0] == "inventory":
        return f"/opt/llmkeep/tree/{name}"
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        tar.add(inventory, str(name))
    unpack = 'mkdir -p "$1" && printf %s "$2" | base64 -d | tar -xz -C "$1" --no-same-owner'
    text = base64.b64encode(archive.getvalue()).decode()
    door.output(instance, door.on(instance, "control"), "sh", "-c", unpack, "unpack", SENT, text)
    return f"{SENT}/{name}"


def playbook(instance: Instance, name: str, *arguments: str) -> list[str]:
    """The command that runs a playbook of this tree from outside, in the lab's network."""
    beside = Path(sys.executable).with_name("ansible-playbook")
    program = str(beside) if beside.exists() else "ansible-playbook"
    inventories = [part for path in instance.inventories for part in ("-i", str(path))]
    return instance.namespace.command(program, *inventories, str(instance.checkout / name), *arguments)


def absolute(instance: Instance) -> list[Path]:
    """The inventories as absolute paths, all inside the checkout."""
    paths = [path.resolve() for path in instance.inventories]
    for path in paths:
        if not path.is_relative_to(instance.checkout):
            raise LabError(f"{path} is not in this tree, so the control node does not have it: move it there")
    return paths


def plug_bundle(instance: Instance, control: Machine, bundle: Path, steps: Steps) -> None:
    """Plug the bundle into the control node as a medium, unless it is plugged in already."""
    digest = bundle_digest(bundle)
    plugged = control.folder / "stick.sha256"
    current = plugged.read_text(encoding="ascii") if plugged.exists() and control.has_stick() else ""
    if current != digest:
        with steps.step(f"copy the bundle to a medium and plug it into {control.host.name}"):
            unmount_stick(instance)
            plug(control, bundle)
            plugged.write_text(digest, encoding="ascii")
    source, options = control.stick_source
    mount = (
        f"mkdir -p {MOUNT}; n=0; "
        f"until [ -e {source} ]; do n=$((n + 1)); [ $n -lt 100 ] || exit 9; sleep 0.1; done; "
        f"mountpoint -q {MOUNT} || mount -o {options} {source} {MOUNT}"
    )
    door.output(instance, control.host.name, "sh", "-c", mount)


def bundle_digest(bundle: Path) -> str:
    """Identity of a bundle: the sha256 of its manifest."""
    manifest = bundle / "MANIFEST.json"
    if not manifest.exists():
        raise LabError(f"there is no bundle in {bundle}: `make bundle` builds it")
    return hashlib.sha256(manifest.read_bytes()).hexdigest()


def unmount_stick(instance: Instance) -> None:
    """Unmount the medium on the control node, so that it can be unplugged."""
    command = f"! mountpoint -q {MOUNT} || umount {MOUNT}"
    door.output(instance, door.on(instance, "control"), "sh", "-c", command)


def compare_bootstrap(instance: Instance, control: Machine, printed: Path) -> None:
    """Compare the medium's bootstrap program with the hash that the builder printed."""
    expected = hashlib.sha256(printed.read_bytes()).hexdigest()
    actual = door.output(instance, control.host.name, "sha256sum", f"{MOUNT}/bootstrap").split()[0]
    if actual != expected:
        raise LabError(f"bootstrap on the medium has sha256 {actual}, {expected} was printed: do not run it")


def interactive(instance: Instance, machine: Machine, *command: str) -> list[str]:
    """Command line that runs a command on a host and ends it when this process ends."""
    plain = ["TERM=dumb", "NO_COLOR=1", "ANSIBLE_NOCOLOR=1"]
    local = instance.ssh(machine, shlex.join(["env", *plain, *command]))
    local.insert(local.index("ssh") + 1, "-tt")
    return local
