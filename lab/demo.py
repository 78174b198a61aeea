"""The hands of an operator: plug the stick in, compare one hash, start two commands, ask a question.

Everything else is done by the lab's own control node, from the stick alone.
"""

import contextlib
import hashlib
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lab import door
from lab.ask import ask
from lab.errors import AlreadyUp, LabError
from lab.host import Machine
from lab.instance import Instance, plug

STICK = "/dev/disk/by-label/LLMKEEP"
MOUNT = "/media/llmkeep"
QUESTION = "What is the capital of France?"


@contextmanager
def step(terminal: Console, text: str) -> Iterator[None]:
    """Say what is done, and how long it took."""
    terminal.print(f"[bold]→[/] {text}")
    started = time.monotonic()
    yield
    terminal.print(f"  [green]done[/] in {time.monotonic() - started:.1f} s")


def demo(instance: Instance, bundle: Path, question: str, terminal: Console) -> None:
    """From nothing to an answer; what is done already is not done again."""
    with instance.changing():
        start_hosts(instance, terminal)
        bootstrap(instance, bundle, terminal)
    site(instance, terminal)
    with step(terminal, "open a port of this machine to the edge, and make a demo key"):
        opened = door.open_door(instance)
    terminal.print(f"[bold]→[/] {question}")
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
        ("for your client", f"source {opened.env_file}"),
    ):
        table.add_row(label, value)
    output.print(table)


def start_hosts(instance: Instance, terminal: Console) -> None:
    """Every host up."""
    with (
        step(terminal, "start the hosts"),
        terminal.status("starting") as progress,
        contextlib.suppress(AlreadyUp),
    ):
        instance.up(progress.update)


def bootstrap(instance: Instance, bundle: Path, terminal: Console) -> None:
    """The stick goes in, its bootstrap is compared with what the builder printed, and run."""
    control = instance.machine(door.on(instance, "control"))
    name = control.host.name
    plug_bundle(instance, control, bundle, terminal)
    with step(terminal, f"compare the hash of bootstrap on {name} with the one that the builder printed"):
        compare_bootstrap(instance, control, bundle / "bootstrap")
    with step(terminal, f"run bootstrap on {name}, from the stick alone"):
        domain = [instance.lab.domain] if instance.lab.domain else []
        interactive(instance, control, "sh", f"{MOUNT}/bootstrap", *domain)


def site(instance: Instance, terminal: Console, *words: str) -> None:
    """The control node provisions every host."""
    control = instance.machine(door.on(instance, "control"))
    inventories = [f"/opt/llmkeep/tree/{path.relative_to(instance.checkout)}" for path in absolute(instance)]
    options = [part for path in inventories for part in ("-i", path)]
    command = ("llmkeep", "site", *options, *words)
    with step(terminal, f"{shlex.join(command)} on {control.host.name}"):
        interactive(instance, control, *command)


def absolute(instance: Instance) -> list[Path]:
    """The inventories, all of them inside the checkout (the control node has the same tree)."""
    paths = [path.resolve() for path in instance.inventories]
    for path in paths:
        if not path.is_relative_to(instance.checkout):
            raise LabError(f"{path} is not in this tree, so the control node does not have it: move it there")
    return paths


def plug_bundle(instance: Instance, control: Machine, bundle: Path, terminal: Console) -> None:
    """Make the bundle the stick of the control node, unless it is."""
    digest = bundle_digest(bundle)
    plugged = control.folder / "stick.sha256"
    current = plugged.read_text(encoding="ascii") if plugged.exists() and control.stick.exists() else ""
    if current != digest:
        with step(terminal, f"copy the bundle to a stick and plug it into {control.host.name}"):
            unmount_stick(instance)
            with terminal.status("writing the stick"):
                plug(control, bundle)
            plugged.write_text(digest, encoding="ascii")
    mount = (
        f"mkdir -p {MOUNT}; n=0; "
        f"until [ -e {STICK} ]; do n=$((n + 1)); [ $n -lt 100 ] || exit 9; sleep 0.1; done; "
        f"mountpoint -q {MOUNT} || mount -o ro {STICK} {MOUNT}"
    )
    door.output(instance, control.host.name, "sh", "-c", mount)


def bundle_digest(bundle: Path) -> str:
    """What identifies a bundle: the sha256 of its manifest."""
    manifest = bundle / "MANIFEST.json"
    if not manifest.exists():
        raise LabError(f"there is no bundle in {bundle}: `make bundle` builds it")
    return hashlib.sha256(manifest.read_bytes()).hexdigest()


def unmount_stick(instance: Instance) -> None:
    """The stick may be taken out of the control node."""
    command = f"! mountpoint -q {MOUNT} || umount {MOUNT}"
    door.output(instance, door.on(instance, "control"), "sh", "-c", command)


def compare_bootstrap(instance: Instance, control: Machine, printed: Path) -> None:
    """What an operator does with the paper in hand."""
    expected = hashlib.sha256(printed.read_bytes()).hexdigest()
    seen = door.output(instance, control.host.name, "sha256sum", f"{MOUNT}/bootstrap").split()[0]
    if seen != expected:
        raise LabError(f"bootstrap on the stick has sha256 {seen}, {expected} was printed: do not run it")


def interactive(instance: Instance, machine: Machine, *command: str) -> None:
    """Run a command on a host as if sitting there: if this process ends, so does it."""
    colours = sys.stdout.isatty()
    remote = ["env", *([] if colours else ["TERM=dumb", "NO_COLOR=1", "ANSIBLE_NOCOLOR=1"]), *command]
    local = instance.ssh(machine, shlex.join(remote))
    local.insert(local.index("ssh") + 1, "-tt")
    with subprocess.Popen(local, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as running:
        try:
            for line in running.stdout or ():
                sys.stdout.buffer.write(line if colours else line.replace(b"\r\n", b"\n"))
                sys.stdout.buffer.flush()
        except BaseException:
            running.send_signal(signal.SIGTERM)
            raise
    if running.returncode:
        what = shlex.join(command)
        raise LabError(
            f"`{what}` ended with {running.returncode} on {machine.host.name}: see above; run this again"
        )
