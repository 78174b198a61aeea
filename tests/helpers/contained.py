"""contained.py SPECIFICATION: a program as a container runtime starts it, on this machine's own files.

By root, under `unshare --mount`. It sees a root file system of its own that it cannot write to, with the volumes of
its container and no others, and has the container's user, the pod's groups and no capability. What a container has
beside this is not there: processes of its own, limits, seccomp.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

SYSTEM = [
    "/usr",
    "/bin",
    "/sbin",
    "/lib",
    "/lib64",
    "/etc/nginx",
    "/etc/alternatives",
    "/etc/ld.so.cache",
    "/proc",
    "/dev",
]


def mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True)


def bind(source: Path, target: Path, read_only: bool) -> None:
    """SOURCE at TARGET, which is made."""
    if source.is_dir():
        target.mkdir(parents=True, exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()
    mount("--rbind" if str(source) in ("/proc", "/dev") else "--bind", str(source), str(target))
    if read_only:
        mount("-o", "remount,bind,ro", str(target))


def show(root: Path, paths: list[str]) -> None:
    """This machine's paths in ROOT, read-only."""
    for each in map(Path, paths):
        target = root / each.relative_to("/")
        if each.is_symlink():
            target.symlink_to(each.readlink())
        else:
            bind(each, target, str(each) not in ("/proc", "/dev"))


def main() -> None:
    specification = json.loads(Path(sys.argv[1]).read_text())
    root = Path(specification["root"])
    root.mkdir()
    mount("-t", "tmpfs", "root", str(root))
    show(root, SYSTEM)
    local = root / "usr/local"
    mount("-t", "tmpfs", "local", str(local))
    for target, source in specification["programs"].items():
        path = root / target.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(Path(source).read_bytes())
        path.chmod(0o555)
    for each in specification["volumes"]:
        bind(Path(each["source"]), root / each["target"].lstrip("/"), each["read_only"])
    show(root, specification["system"])  # last, since they may lie below a volume's path, such as /tmp
    for path in local, root:
        mount("-o", "remount,ro", str(path))
    os.chroot(root)
    os.chdir("/")
    argv = [*specification["user"], *specification["command"]]
    os.execve(argv[0], argv, specification["environment"])  # noqa: S606 -- no shell is wanted


if __name__ == "__main__":
    main()
