"""The suite's starting points: snapshots of each host, made once per bundle.

`bare` is the host as it was created; `floor` has the roles that every other role requires: base, mirror and pki. `installed`
is the floor of a container that serves, with what role llm_serving installs and before it is configured: most of its time.
"""

import shutil
from pathlib import Path

from lab import demo, door
from lab.container import Container
from lab.errors import LabError
from lab.instance import Instance
from lab.steps import RoleTimes, Steps

BARE, FLOOR, INSTALLED = "bare", "floor", "installed"
PLAYBOOK = "molecule/default/installed.yml"
ROLES = "base,mirror,pki"
RECORD = "floor.sha256"  # of the bundle that `floor` was made from


def floor(
    instance: Instance,
    bundle: Path,
    steps: Steps,
    *,
    restore: bool = False,
    like: Instance | None = None,
) -> list[str]:
    """Make the snapshots that are missing or older than the bundle. Returns a line for each new snapshot.

    With `restore`, all hosts are at `floor` afterwards. With `like`, an instance without hosts begins as a copy of
    that instance, which may be running.
    """
    digest = demo.bundle_digest(bundle)
    record = instance.folder / RECORD
    made: list[str] = []
    with instance.changing():
        if like is not None and not (instance.folder / "hosts").exists():
            with steps.step(f"copy the snapshots of {like.name}"):
                instance.copy_from(like, FLOOR)
                shutil.copy2(like.folder / RECORD, instance.folder / RECORD)
        demo.start_hosts(instance, steps)
        names = {machine.host.name: set(machine.snapshot_names()) for machine in instance.machines}
        for machine in instance.machines:
            if BARE not in names[machine.host.name]:
                require_bare(instance, machine.host.name)
                instance.settle(machine)
                machine.snapshot(BARE)
                made.append(f"made snapshot {BARE} of {machine.host.name}")
        have_floor = all(FLOOR in of_host for of_host in names.values())
        if have_floor and record.exists() and record.read_text(encoding="ascii") == digest:
            if restore:
                instance.restore_all(FLOOR, steps)
            return made
        if have_floor:
            instance.restore_all(FLOOR, steps)  # an older bundle's: the newer one is put on top
        elif len(made) < len(instance.machines):
            instance.restore_all(BARE, steps)
        record.unlink(missing_ok=True)
        demo.bootstrap(instance, bundle, steps)
        demo.site(instance, steps, "--tags", ROLES)
        demo.unmount_stick(instance)
        for machine in instance.machines:
            with steps.step(f"snapshot {FLOOR} of {machine.host.name}"):
                instance.settle(machine)
                machine.snapshot(FLOOR)
            made.append(f"made snapshot {FLOOR} of {machine.host.name}")
        made += installed(instance, steps)
        record.write_text(digest, encoding="ascii")
    return made


def installed(instance: Instance, steps: Steps) -> list[str]:
    """Make the snapshot of each container that serves; returns a line for each. The hosts are at the floor afterwards."""
    serving = [
        each for each in instance.machines if isinstance(each, Container) and "serve" in each.host.groups
    ]
    if not serving:
        return []
    with steps.step("install what serves") as now:
        environment = instance.environment() | {"ANSIBLE_CONFIG": str(instance.checkout / "ansible.cfg")}
        steps.run(demo.playbook(instance, PLAYBOOK), "installed", RoleTimes(steps, now), environment)
    for machine in serving:
        with steps.step(f"snapshot {INSTALLED} of {machine.host.name}"):
            instance.settle(machine)
            instance.power_off(machine)
            machine.snapshot(INSTALLED)
    instance.restore_all(FLOOR, steps)
    return [f"made snapshot {INSTALLED} of {machine.host.name}" for machine in serving]


def require_bare(instance: Instance, host: str) -> None:
    """LabError if something was installed on a host already."""
    packages = door.output(
        instance, host, "sh", "-c", "ls -d /opt/llmkeep /etc/llmkeep 2>/dev/null || true"
    ).split()
    if packages:
        raise LabError(
            f"{host} has {', '.join(packages)} and no snapshot {BARE!r}: it is not fresh; `lab destroy` first"
        )
