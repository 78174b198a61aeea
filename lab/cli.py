"""The command line of the lab."""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lab import demo, door, floor, sink
from lab.errors import AlreadyUp, LabError, NotUp
from lab.instance import CHECKOUT, KINDS, Instance, plug
from lab.machine import Machine
from lab.requirements import require_programs, require_root
from lab.steps import Steps

EXIT_CODES = """exit codes:
  0   done                              6   not enough disk space
  1   failed, the message says why      7   the lab is up already (up)
  2   wrong usage                       8   the lab, or the host, is not up
  3   not root                          9   the inventory describes no lab
  4   a Debian package is missing      10   another lab command is changing this lab
  5   not enough memory                11   this machine can have no host of that kind
ssh, exec, netns and site end with the exit code of what they ran."""

terminal = Console(stderr=True, highlight=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    known = parser()
    options, more = known.parse_known_args(arguments)
    if more and options.verb != "site":
        known.error(f"unrecognized arguments: {' '.join(more)}")
    options.more = more
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends what it started, like Ctrl-C
    os.environ["PATH"] = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"  # root's, after a plain `su`
    try:
        return run(options)
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("lab: interrupted; the same command goes on from here", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    top = argparse.ArgumentParser(
        prog="lab",
        description="Disposable hosts on this machine, in a network without an uplink.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    instance = os.environ.get("LAB_INSTANCE", "lab")
    top.add_argument("--instance", default=instance, help="which lab of this checkout (or LAB_INSTANCE)")
    top.add_argument(
        "-i",
        "--inventory",
        action="append",
        default=[],
        type=Path,
        metavar="PATH",
        help="hosts to build, may be repeated; kept from the last up (default inventory/lab)",
    )
    verbs = top.add_subparsers(dest="verb", required=True, metavar="COMMAND")

    up = verbs.add_parser("up", help="start every host that is not running; repairs a partial lab")
    up.add_argument("--ok-if-up", action="store_true", help="exit 0 if it is up already")
    verbs.add_parser("down", help="stop everything; disks and snapshots are kept")
    verbs.add_parser("destroy", help="stop everything and delete it")
    prepare = verbs.add_parser("prepare", help="build the base image for a kind of host, once for all labs")
    prepare.add_argument("kind", choices=KINDS)
    status = verbs.add_parser("status", help="state of the hosts")
    status.add_argument("--json", action="store_true")
    for name, text in (
        ("ssh", "a shell on a host"),
        ("power-off", "cut a host's power (no shutdown)"),
        ("power-on", "power a host on, and wait until it answers"),
        ("cut", "unplug a host's network cable"),
        ("join", "plug it back in"),
    ):
        verbs.add_parser(name, help=text).add_argument("host")
    execute = verbs.add_parser(
        "exec", help="run a command on a host: lab exec HOST -- CMD (one word: a shell's)"
    )
    execute.add_argument("host")
    execute.add_argument("command", nargs=argparse.REMAINDER)
    for name, text in (
        ("snapshot", "take a snapshot of a host's disks"),
        ("restore", "restore a snapshot, power on"),
    ):
        verb = verbs.add_parser(name, help=text)
        verb.add_argument("host")
        verb.add_argument("name")
        if name == "snapshot":
            verb.add_argument("--of", metavar="INSTANCE", help="copy it from another lab of this checkout")
    recorded = verbs.add_parser("sink", help="packets to other networks, and DNS queries")
    recorded.add_argument("--json", action="store_true", help="print a JSON list")
    recorded.add_argument("--clear", action="store_true", help="clear the record")
    netns = verbs.add_parser("netns", help="run a command inside the lab's network: lab netns -- CMD")
    netns.add_argument("command", nargs=argparse.REMAINDER)
    stick = verbs.add_parser("plug", help="plug a folder or ext4 image into a host as a read-only disk")
    stick.add_argument("host")
    stick.add_argument("source", type=Path, help="folder, or ext4 image")
    enrol = verbs.add_parser(
        "enrol", help="from its next power-on a kernel trusts a certificate (DER) for modules"
    )
    enrol.add_argument("host")
    enrol.add_argument("certificate", type=Path)
    start = verbs.add_parser(
        "floor",
        help="the snapshots `bare`, `floor` (base, mirror, pki) and `installed` (of llm_serving) of hosts",
    )
    start.add_argument("--restore", action="store_true", help="restore every host to `floor`")
    start.add_argument("--like", metavar="INSTANCE", help="copy them from another lab of this checkout")
    start.add_argument("--bundle", type=Path, default=CHECKOUT / ".lab" / "bundle", metavar="DIR")
    opened = verbs.add_parser("open", help="a port of 127.0.0.1 to the edge, demo keys, and .lab/env")
    opened.add_argument("--close", action="store_true", help="stop forwarding")
    shown = verbs.add_parser(
        "demo", help="bundle, medium, bootstrap, site.yml, a question: what `make lab` does"
    )
    shown.add_argument("--bundle", type=Path, default=CHECKOUT / ".lab" / "bundle", metavar="DIR")
    shown.add_argument("--question", default=demo.QUESTION)
    verbs.add_parser(
        "site", help="the working tree's site.yml, run from outside: lab site [ANSIBLE'S ARGUMENTS]"
    )
    return top


def run(arguments: argparse.Namespace) -> int:
    """Run the chosen command; returns its exit code."""
    if arguments.verb == "prepare":
        require_root()
        require_programs([arguments.kind])
        with Steps(terminal, CHECKOUT / ".lab" / "logs").series() as begin:
            KINDS[arguments.kind].base(begin)
        return 0
    instance = Instance(arguments.instance, arguments.inventory)
    match arguments.verb:
        case "up":
            return up(instance, arguments.ok_if_up)
        case "down" | "destroy":
            return stop(instance, arguments.verb)
        case "status":
            return show_status(instance, arguments.json)
        case "sink":
            return show_sink(instance, arguments.json, arguments.clear)
        case "open":
            return open_or_close(instance, arguments.close)
        case "floor":
            like = Instance(arguments.like) if arguments.like else None
            for line in floor.floor(
                instance, arguments.bundle, steps(instance), restore=arguments.restore, like=like
            ):
                print(line)
            return 0
        case "demo":
            demo.demo(instance, arguments.bundle, arguments.question, steps(instance))
            return 0
        case "netns":
            instance.require_up()
            return subprocess.call(
                instance.namespace.command(*after_dashes(arguments.command)), env=instance.environment()
            )
        case "site":
            instance.require_up()
            return subprocess.call(
                demo.playbook(instance, "site.yml", *after_dashes(arguments.more, needed=False)),
                env=instance.environment(),
                cwd=CHECKOUT,
            )
    machine = instance.machine(arguments.host)
    match arguments.verb:
        case "ssh":
            require_power(machine)
            return subprocess.call(instance.ssh(machine))
        case "exec":
            require_power(machine)
            words = after_dashes(arguments.command)
            return subprocess.call(instance.ssh(machine, words[0] if len(words) == 1 else shlex.join(words)))
    with instance.changing():
        change(instance, machine, arguments)
    return 0


def change(instance: Instance, machine: Machine, arguments: argparse.Namespace) -> None:
    """The commands that change one host."""
    if arguments.verb != "plug":
        instance.require_up()
    match arguments.verb:
        case "power-off":
            instance.power_off(machine)
        case "power-on":
            power_on(machine)
        case "cut":
            instance.cut(machine)
        case "join":
            machine.join()
        case "snapshot":
            if arguments.of:
                with terminal.status(f"copying {arguments.name} of {machine.host.name}"):
                    machine.take_over(Instance(arguments.of).machine(arguments.host), arguments.name)
                return
            if machine.running():
                instance.settle(machine)
            with terminal.status(f"copying the disks of {machine.host.name}"):
                machine.snapshot(arguments.name)
        case "restore":
            machine.require_snapshot(arguments.name)
            instance.power_off(machine)
            with terminal.status(f"putting back the disks of {machine.host.name}"):
                machine.restore(arguments.name)
            power_on(machine)
        case "enrol":
            machine.enrol(arguments.certificate)
        case "plug":
            with terminal.status(f"writing the medium of {machine.host.name}"):
                plug(machine, arguments.source)


def power_on(machine: Machine) -> None:
    """Power a host on and wait until it answers."""
    if not machine.exists():
        raise NotUp(f"{machine.host.name} was never unpacked: `lab up` does")
    machine.power_on()
    with terminal.status(f"waiting for {machine.host.name}"):
        machine.wait_for_ssh()


def up(instance: Instance, fine_if_up: bool) -> int:
    """Start the lab, with progress."""
    with instance.changing():
        try:
            with steps(instance).series() as begin:
                instance.up(begin)
        except AlreadyUp:
            if not fine_if_up:
                raise
    return 0


def steps(instance: Instance) -> Steps:
    """Progress output of a command; its logs are stored beside the instances."""
    return Steps(terminal, instance.checkout / ".lab" / "logs" / instance.name)


def open_or_close(instance: Instance, close: bool) -> int:
    """Open or close the forwarded port to the edge."""
    with instance.changing():
        if close:
            door.close_door(instance)
            return 0
        opened = door.open_door(instance)
    print(f"{opened.url} leads to the edge; for a client:  source {opened.env_file}")
    for label, value in demo.pages(instance, opened):
        print(f"{label:13}  {value}")
    return 0


def stop(instance: Instance, verb: str) -> int:
    """Stop the lab (`down`) or delete it (`destroy`)."""
    with instance.changing():
        if verb == "destroy":
            if not instance.destroy():
                print("nothing to destroy")
        else:
            instance.down()
    return 0


def show_status(instance: Instance, as_json: bool) -> int:
    """Print the state of all hosts."""
    status = instance.status()
    if as_json:
        print(json.dumps(status, indent=2))
        return 0
    table = Table(title=f"lab {status['instance']} ({status['namespace'] or 'down'})", title_justify="left")
    for column in (
        "host",
        "kind",
        "address",
        "groups",
        "memory",
        "power",
        "cable",
        "ssh",
        "stick",
        "disks",
        "snapshots",
    ):
        table.add_column(column)
    words = {True: "yes", False: "no"}
    for name, host in status["hosts"].items():
        table.add_row(
            name,
            host["kind"],
            host["address"],
            " ".join(host["groups"]),
            f"{host['memory'] >> 20} MiB",
            words[host["power"]],
            words[host["cable"]],
            words[host["ssh"]],
            words[host["stick"]],
            f"{host['disk_bytes'] >> 20} MiB",
            " ".join(host["snapshots"]),
        )
    output = Console() if sys.stdout.isatty() else Console(width=160)
    output.print(table)
    output.print(f"sink: {'records' if status['sink'] else 'down'}; open: {words[status['open']]}")
    for kind, answer in status["machine"]["kinds"].items():
        output.print(
            f"{kind}: "
            + (", ".join(answer["gives"]) if answer["possible"] else f"not here, {answer['reason']}")
        )
    held = [name for name, holds in status["machine"]["limits"].items() if holds]
    output.print(
        f"limits on a container's services: {', '.join(held) or 'none, cgroup2 has no controllers here'}"
    )
    return 0


def show_sink(instance: Instance, as_json: bool, clear: bool) -> int:
    """Print or clear the packets that the sink recorded."""
    if clear:
        if instance.sink_file.exists():
            os.truncate(instance.sink_file, 0)
        return 0
    recorded = sink.records(instance.sink_file)
    if as_json:
        print(json.dumps(recorded, indent=2))
        return 0
    for record in recorded:
        port = f" port {record['port']}" if "port" in record else ""
        question = f" asks for {record['question']}" if record.get("question") else ""
        print(f"{record['time']:.3f} {record['source']} -> {record['destination']}", end=" ")
        print(f"{record['protocol']}{port}, {record['bytes']} bytes{question}")
    return 0


def after_dashes(words: list[str], needed: bool = True) -> list[str]:
    """The command after `--`."""
    command = words[1:] if words[:1] == ["--"] else words
    if needed and not command:
        raise LabError("no command was given: write it after --, such as: lab exec llm1 -- uptime")
    return command


def require_power(machine: Machine) -> None:
    """NotUp if a host has no power."""
    if not machine.running():
        raise NotUp(f"{machine.host.name} has no power: `lab power-on {machine.host.name}`, or `lab up`")
