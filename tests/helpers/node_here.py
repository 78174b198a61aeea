"""node_here.py SPECIFICATION: what a node of Kubernetes runs, in namespaces of its own.

By root, as the first process of `unshare --mount --pid --uts --ipc`, in the node's network namespace. It makes control
groups of its own below this machine's, starts the node's programs, and ends with any of them; everything it has started
ends with it.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from waiting import listens, until

# What kubelet wants to have of the kernel, which is this machine's: it sees files that say so.
TUNED = {
    "vm/overcommit_memory": "1",
    "vm/panic_on_oom": "0",
    "kernel/panic": "10",
    "kernel/panic_on_oops": "1",
}


def mount(*words: str | Path) -> None:
    subprocess.run(["mount", *map(str, words)], check=True)


def enter(groups: dict[str, str]) -> None:
    """Control groups of this node alone, which are the only ones that it sees."""
    for controller, path in groups.items():
        group = Path(path)
        group.mkdir()
        if controller == "cpuset":
            for key in "cpuset.cpus", "cpuset.mems":
                (group / key).write_text((group.parent / key).read_text())
            (group / "cgroup.clone_children").write_text("1")
        (group / "cgroup.procs").write_text("0")
    os.unshare(os.CLONE_NEWCGROUP)
    mount("-t", "tmpfs", "groups", "/sys/fs/cgroup")
    for controller in groups:
        folder = Path("/sys/fs/cgroup", controller)
        folder.mkdir()
        mount(
            "-t",
            "cgroup",
            "-o",
            "none,name=systemd" if controller == "systemd" else controller,
            controller,
            folder,
        )


def main() -> int:
    specification = json.loads(Path(sys.argv[1]).read_text())
    folder = Path(specification["folder"])
    socket.sethostname(specification["name"])
    enter(specification["groups"])
    for name, value in TUNED.items():
        file = folder / name.replace("/", "-")
        file.write_text(value)
        mount("--bind", file, f"/proc/sys/{name}")
    for each in "/run", "/var/log":
        mount("-t", "tmpfs", "own", each)
    processes = {}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    for name, argv in specification["programs"].items():
        with (folder / f"{name}.log").open("wb") as log:
            processes[subprocess.Popen(argv, stdout=log, stderr=log).pid] = name
        if name == "containerd":  # kubelet ends without it
            until(lambda: listens(Path(specification["socket"])))
    while True:  # orphans, too, are this process's to bury
        pid, _ = os.wait()
        if pid in processes:
            print(f"{processes[pid]} has ended", flush=True)
            return 1


if __name__ == "__main__":
    sys.exit(main())
