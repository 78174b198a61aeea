"""`llm-train submit JOB.yaml`: queue a job in the user's own name, without the rights of the trainer.

The command runs as the user and writes the file's text to a systemd socket. Behind it, `llm-train accept` runs as the trainer: it
asks the kernel for the user, reads from a file owned by root what that user may specify, and submits the job to Slurm. The user
gets no access to processes, files or the environment of the trainer.
"""

import argparse
import hashlib
import json
import os
import pwd
import socket
import stat
import struct
import sys
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from llmcore.config import ConfigError, Section, load, parse
from llmtrain.exits import DONE, FAILED, USAGE, Refusal
from llmtrain.job import Job
from llmtrain.run import slurm

SOCKET = Path("/run/llm-train-submit.sock")
OWNERS = Path("/etc/llmkeep/training-owners.json")
MOST = 256 << 10  # bytes of a request or an answer
SECONDS = 30
GRACE = 300  # seconds before the time limit, for the last save
LAUNCHED = {"job": Path(), "prepare": None, "key_file": None, "restarts": 3, "grace": GRACE}


class Owner(Section):
    """The values that a user may specify in a job."""

    # With models and data, beside the estate's models and the user's own outputs.
    folders: tuple[Path, ...] = ()
    nodes: PositiveInt = 1  # at most


class Owners(Section):
    """Who may submit jobs on this node; root writes it."""

    root: Path  # has models/, and owners/USER/ for what a job writes
    traffic: Literal["esp", "clear"]  # between nodes
    owners: dict[str, Owner]


class Request(Section):
    """The request from `submit` to `accept`."""

    job: str  # the file's text
    hosts: str = Field("", pattern=r"^[A-Za-z0-9.,\[\]-]{0,4096}$")
    gpus: NonNegativeInt = 0
    minutes: PositiveInt | None = None  # the time limit


def add_commands(commands: Any) -> None:
    submit = commands.add_parser(
        "submit", help="queue a job under Slurm in your own name", description=__doc__
    )
    submit.add_argument(
        "job", type=Path, help="job.yaml; for the values it may contain, see docs/operate/slurm.md"
    )
    submit.add_argument(
        "--hosts", metavar="NODE,NODE", default="", help="Slurm's nodes to run on; default: any that are free"
    )
    submit.add_argument(
        "--gpus", type=int, default=0, help="number of GPUs to request from Slurm on each node"
    )
    submit.add_argument(
        "--minutes", type=int, help="time limit; the job saves before it is reached, and is queued again"
    )
    submit.add_argument("--socket", type=Path, default=SOCKET, help=argparse.SUPPRESS)
    submit.set_defaults(run=submit_command)
    accept = commands.add_parser(
        "accept", help="accept one job from the socket on standard input; started by systemd"
    )
    accept.add_argument("--owners", type=Path, default=OWNERS, help=argparse.SUPPRESS)
    accept.set_defaults(run=accept_command)


def submit_command(options: argparse.Namespace) -> int:
    """Send the job and print its number, or why it is refused. Raises Refusal."""
    load(options.job, Job)  # mistakes are told here
    request = Request(
        job=options.job.read_text(), hosts=options.hosts, gpus=options.gpus, minutes=options.minutes
    )
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(2 * SECONDS)
            connection.connect(str(options.socket))
            connection.sendall(request.model_dump_json().encode())
            connection.shutdown(socket.SHUT_WR)
            answer = json.loads(received(connection))
    except (OSError, ValueError) as error:
        raise Refusal(
            f"{options.socket} does not answer ({error}): submit on a Slurm node whose slurm_node_owners lists you",
            FAILED,
        ) from error
    print(f"llm-train: {answer['message']}", file=sys.stderr)
    if answer["code"] == DONE:
        print(answer["number"])
    return int(answer["code"])


def accept_command(options: argparse.Namespace) -> int:
    """Answer the request on the socket that is standard input."""
    accept(socket.socket(fileno=os.dup(0)), options.owners)
    return DONE


def accept(connected: socket.socket, owners: Path) -> None:
    """Answer one request, and log it to the journal through standard error."""
    with connected as connection:
        connection.settimeout(SECONDS)
        _, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        name = user_name(uid)
        answer: dict[str, Any] = {"code": DONE, "number": "", "message": ""}
        try:
            request = parse(received(connection).decode(), "the request", Request)
            job, answer["number"] = hand_over(request, name, load(owners, Owners))
            answer["message"] = slurm.message(job, answer["number"]).removeprefix("llm-train: ")
            digest = hashlib.sha256(request.job.encode()).hexdigest()
            print(
                f"{name} (uid {uid}) submitted {job.name}, sha256 {digest}: job {answer['number']}",
                file=sys.stderr,
            )
        except (Refusal, ConfigError, OSError, UnicodeDecodeError) as error:
            code = error.code if isinstance(error, Refusal) else USAGE
            answer |= {"code": code, "message": str(error)[:4096]}
            print(f"{name} (uid {uid}) was refused: {str(error)[:500]!r}", file=sys.stderr)
        connection.sendall(json.dumps(answer).encode())


def received(connection: socket.socket) -> bytes:
    """Everything that the peer sends; raises Refusal for more than MOST bytes."""
    content = b""
    while chunk := connection.recv(64 << 10):
        content += chunk
        if len(content) > MOST:
            raise Refusal(f"the request is longer than {MOST} bytes: a job file has a few hundred")
    return content


def user_name(uid: int) -> str:
    """The name of a user, or the number if there is no name; owners are never specified by number."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def hand_over(request: Request, name: str, settings: Owners) -> tuple[Job, str]:
    """Verify a job and submit it to Slurm; returns it and its number. Raises Refusal and ConfigError."""
    owner = settings.owners.get(name)
    if owner is None:
        raise Refusal(
            f"{name} may not submit jobs here: ask an operator to add the user to slurm_node_owners"
        )
    job = owned(parse(request.job, "the job file", Job), name, owner, settings)
    nodes = job.scale.nodes
    options = argparse.Namespace(
        **LAUNCHED, traffic=settings.traffic if nodes > 1 else None, hosts=request.hosts, gpus=request.gpus
    )
    command = [*slurm.sbatch(options, job, nodes), f"--account={name}"]
    if request.minutes:
        command.append(f"--time={request.minutes}")
    return job, slurm.hand_over(job, command, slurm.script(options, job.model_dump_json()))


def owned(job: Job, name: str, owner: Owner, settings: Owners) -> Job:
    """The job with its owner's name; raises Refusal for a path that the owner may not use, and for too many nodes."""
    if job.owner not in (None, name):
        raise Refusal(f"owner is {job.owner}, but you are {name}: omit it")
    if job.scale.nodes > owner.nodes:
        raise Refusal(
            f"scale.nodes is {job.scale.nodes}, but {name} may use {owner.nodes}: ask an operator for more"
        )
    own = settings.root / "owners" / name
    for key, path in (("output", job.output), ("watch.metrics", job.watch.metrics)):
        if path is not None and not below(path, [own]):
            raise Refusal(f"{key} is {path}: a job of {name} may only write below {own}")
    readable = [settings.root / "models", own, *owner.folders]
    reads = {
        "model": job.model,
        "manifest": job.manifest,
        "data.train": job.data.train,
        "data.eval": job.data.eval,
    }
    for key, path in reads.items():
        if path is None:
            continue
        if not below(path, readable):
            raise Refusal(f"{key} is {path}: {name} may only use paths below {', '.join(map(str, readable))}")
        refuse_changeable(key, path)
    return job.model_copy(update={"owner": name})


def below(path: Path, folders: list[Path]) -> bool:
    """Whether a path (without `..`) is in one of the folders."""
    return ".." not in path.parts and any(folder in path.parents for folder in folders)


def refuse_changeable(key: str, path: Path) -> None:
    """Raise Refusal for a path that users other than root and the trainer could redirect after this check."""
    for part in (*reversed(path.parents), path):
        try:
            status = part.lstat()
        except OSError as error:
            raise Refusal(f"{key} is {path}, and {part}: {error.strerror}") from error
        shared = status.st_mode & 0o022 and not (part != path and status.st_mode & stat.S_ISVTX)
        if stat.S_ISLNK(status.st_mode) or status.st_uid not in (0, os.geteuid()) or shared:
            raise Refusal(
                f"{key} is {path}, and {part} is a link, or users other than root and the trainer can change it: ask an operator "
                f"to secure models and data with `chown` and `chmod go-w`"
            )
