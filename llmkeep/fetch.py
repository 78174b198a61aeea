"""`llmkeep release fetch HOST NAME`: copy a candidate from a training host to the control node, for signing.

NAME is the candidate's folder among the host's jobs, as `llm-train publish --into` or playbooks/improve.yml made it. The host is
not trusted with what it sends: only files of one model are taken, each as its manifest has it, into a folder that only root
reads. A refused candidate leaves nothing behind. The printed digest is computed here, from the bytes that arrived.

Exit codes: 0 done; 1 refused, with the reason; 130 interrupted.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from llmcore.files import flush
from llmkeep import durable
from llmkeep.bundle import manifest, release
from llmkeep.bundle.media import MARGIN
from llmkeep.bundle.release import ReleaseError
from llmkeep.models.contents import MOST as MOST_TEXT_BYTES
from llmkeep.places import Places
from llmkeep.playbooks import inventory_path, play, verified_tree
from llmkeep.record.runs import recorded, whole_run
from llmkeep.resumable import CHUNK, progress

INVENTORY = "/etc/llmkeep/inventory"
CONNECTION = "Print the connection of the host"  # task of playbooks/candidate.yml
USER = "llm-train"  # reads its jobs there; root would read what a link of theirs leads to
WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
MOST_BYTES = 2 << 40
MOST_MEMBERS = 4096
MOST_NAME_BYTES = 4096
MOST_COMPLAINT_BYTES = 2000
MOST_SECONDS = 24 * 3600  # 2 TiB at 25 MB/s
MEMBER = re.compile(rf"models/{release.NAME.pattern}(/.+|\.sha256)")


def exactly(stream: BinaryIO, size: int) -> bytes:
    """The next SIZE bytes; tarfile.ReadError where there are fewer."""
    if len(data := stream.read(size)) < size:
        raise tarfile.ReadError("unexpected end of data")
    return data


def members(stream: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The headers of an archive up to its end, each of a plain file or a folder; the caller reads a file's bytes and padding.

    Others are refused before anything of them is read: tarfile itself reads extended headers into memory, whatever their size.
    Raises ReleaseError, and tarfile.TarError for an invalid archive.
    """
    longer = ""
    for _ in range(MOST_MEMBERS):
        block = exactly(stream, tarfile.BLOCKSIZE)
        if not block.strip(b"\0"):
            return
        member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        if member.type == tarfile.GNUTYPE_LONGNAME and 0 < member.size <= MOST_NAME_BYTES:
            longer = (
                exactly(stream, padded(member.size))[: member.size]
                .rstrip(b"\0")
                .decode("utf-8", "surrogateescape")
            )
            continue
        if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE) or member.size < 0:
            raise ReleaseError(
                f"{member.name[:120]!r} is of type {member.type!r} with {member.size} bytes: only files and folders are taken"
            )
        member.name, longer = (longer or member.name).rstrip("/"), ""
        yield member
    raise ReleaseError(f"it has more than {MOST_MEMBERS} files and folders: it is not a candidate")


def padded(size: int) -> int:
    """Bytes that SIZE bytes take in an archive."""
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def unpack(stream: BinaryIO, folder: Path, room: int) -> None:
    """Unpack an archive of a candidate into the empty FOLDER; ROOM: the bytes that fit there.

    Raises ReleaseError for a member that does not belong in a candidate, and tarfile.TarError for an invalid archive.
    `release.candidate` detects missing files.
    """
    for member in members(stream):
        path, kind = member.name, Path(member.name).suffix.lower()
        if member.isdir() and member.size == 0 and (path == "models" or MEMBER.fullmatch(f"{path}/.")):
            continue
        if member.isdir() or not manifest.safe(path) or not (parts := MEMBER.fullmatch(path)):
            raise ReleaseError(
                f"{path[:120]!r} does not belong in a candidate, which has only models/NAME and models/NAME.sha256"
            )
        if parts[1] != ".sha256" and kind not in release.KINDS:
            raise ReleaseError(f"{path[:120]!r} is not a model file: only safetensors and text are accepted")
        if kind != ".safetensors" and member.size > MOST_TEXT_BYTES:
            raise ReleaseError(
                f"{path!r} has {member.size} bytes, but such a file may have at most {MOST_TEXT_BYTES}"
            )
        if (room := room - member.size) < 0:
            raise ReleaseError(
                f"{path!r} has {member.size} bytes, {-room} more than fit: make room on the disk of {folder.parent}"
            )
        tarfile.data_filter(member, str(folder))
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        with progress(stream, member.size, path) as shown, (folder / path).open("xb") as file:
            for start in range(0, member.size, CHUNK):
                file.write(exactly(shown, min(CHUNK, member.size - start)))
        exactly(stream, padded(member.size) - member.size)


def received(command: list[str], folder: Path, room: int) -> None:
    """Unpack what COMMAND prints; raises ReleaseError unless it is one archive, in time, and the command's exit code is 0."""
    problem, padding, end = "", 2 * tarfile.RECORDSIZE, time.monotonic() + MOST_SECONDS
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as sender:
        output, complaints = cast(BinaryIO, sender.stdout), cast(BinaryIO, sender.stderr)
        (deadline := threading.Timer(MOST_SECONDS, sender.kill)).start()
        try:
            try:
                unpack(output, folder, room)
            except (tarfile.TarError, FileExistsError, NotADirectoryError) as error:
                problem = f"it is not an archive of a candidate ({error})"
            rest = output.read(padding + 1)
            if len(rest) > padding or rest.strip(b"\0"):
                raise ReleaseError(problem or "there is data after the end of the archive")
            complaint = complaints.read(MOST_COMPLAINT_BYTES).decode(errors="replace").strip()
            complaints.close()
            if code := sender.wait():
                if time.monotonic() >= end:
                    raise ReleaseError(f"the host did not finish within {MOST_SECONDS} s: examine it")
                raise ReleaseError(f"{shlex.join(command[:1])} ended with {code}: {complaint or problem}")
            if problem:
                raise ReleaseError(problem)
        finally:
            deadline.cancel()
            sender.kill()


def ssh(connection: dict[str, Any], remote: list[str]) -> list[str]:
    """The command that runs REMOTE on a host as Ansible would, over a connection of its own that ends with this process."""
    command = [str(connection["ssh_executable"]), "-T", "-o", "ControlMaster=no", "-o", "ControlPath=none"]
    command += ["-o", "BatchMode=yes", "-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=4"]
    for name in ("ssh_args", "ssh_common_args", "ssh_extra_args"):
        command += shlex.split(connection[name] or "")
    for option, name in (("-i", "private_key_file"), ("-p", "port"), ("-l", "remote_user")):
        command += [option, str(connection[name])] if connection[name] else []
    return [*command, "--", str(connection["host"]), shlex.join(remote)]


def fetch(places: Places, connection: dict[str, Any], host: str, name: str) -> str:
    """Fetch the candidate NAME from HOST; returns a message with the commands that sign and add it."""
    target = places.candidates / name
    places.candidates.mkdir(mode=0o700, parents=True, exist_ok=True)
    with durable.alone(places.candidates):
        places.candidates.chmod(0o700)
        for left in places.candidates.glob(".*"):  # of a run that was killed
            shutil.rmtree(left)
        if os.path.lexists(target):
            raise ReleaseError(f"{target} exists: sign and add it, or remove it with rm -r")
        aside = Path(tempfile.mkdtemp(prefix=".", dir=places.candidates))
        try:
            room = min(MOST_BYTES, shutil.disk_usage(aside).free - MARGIN)
            tar = ["tar", "--create", "--format=gnu", "--hard-dereference", "--directory"]
            remote = ["runuser", "-u", USER, "--", *tar, f"{connection['jobs']}/{name}", "models"]
            try:
                received(ssh(connection, remote), aside, room)
                candidate = release.candidate(aside)
                if not (aside / "models" / candidate.name / release.TRAINING).exists():
                    raise ReleaseError(
                        f"it has no {release.TRAINING}, but hosts have only models that they trained"
                    )
            except ReleaseError as refusal:
                text = str(refusal).replace(f"{aside}/", "").replace(str(aside), name)
                raise ReleaseError(f"{name} of {host} was refused, and nothing was kept: {text}") from refusal
            durable.sync_all(aside)
            aside.rename(target)
            flush(places.candidates)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    digest = candidate.digests[f"models/{candidate.name}.sha256"]
    size = sum((target / path).stat().st_size for path in candidate.digests)
    return (
        f"{target}: model {candidate.name} from {host}, {len(candidate.digests)} files, {size / 1e6:.1f} MB\n"
        f"sign it, and put it on the mirror:\n"
        f"  llmkeep release sign {target} --sha256 {digest}\n"
        f"  llmkeep release add {target}"
    )


def _fetch(arguments: argparse.Namespace) -> int:
    for what, word in (("HOST", arguments.host), ("NAME", arguments.name)):
        if not WORD.fullmatch(word):
            raise ReleaseError(
                f"{what} is {word[:120]!r}: use letters, digits and . _ - after the first character"
            )
    tree = verified_tree()
    playbook = (tree / "playbooks/candidate.yml").resolve()
    inventories = [inventory_path(place, tree) for place in arguments.inventory or [INVENTORY]]
    event: dict[str, object] = {
        "event.action": f"release fetch {arguments.name} from {arguments.host}",
        "event.type": ["info"],
    }
    with recorded(tree, playbook, inventories, arguments, event) as outcome:
        code, results = play(playbook, inventories, [], quiet=True, asked=frozenset({CONNECTION}))
        connections = {host: json.loads(text) for (_, host), text in results.outputs.items()}
        if code or arguments.host not in connections:
            listed = (
                ", ".join(sorted(connections)) or "; ".join(results.failures + results.complaints) or "none"
            )
            raise ReleaseError(
                f"{arguments.host} is not a host in [train] of {', '.join(map(str, inventories))}, which has: {listed}"
            )
        message = fetch(arguments.places, connections[arguments.host], arguments.host, arguments.name)
        outcome.code = 0
    print(message)
    return 0


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """`llmkeep release …` with its verb that contacts a host."""
    verbs = release.register(subparsers)
    verb = verbs.add_parser(
        "fetch",
        help="copy a candidate from a training host",
        description=__doc__,
        parents=[whole_run(INVENTORY)],
    )
    verb.add_argument("host", metavar="HOST", help="its name in the inventory, in [train]")
    verb.add_argument("name", metavar="NAME", help="the candidate's folder, below jobs/ of llm_training_dir")
    verb.set_defaults(run=_fetch)
