"""Heads of the records of replicas in clusters, read by `kubectl exec` in the container that writes the record.

Replicas are those of StatefulSets that role kubernetes applied, and that have this container.
"""

import base64
import json
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from llmkeep import source_tree
from llmkeep.durable import require_format
from llmkeep.errors import LlmkeepError, printable
from llmkeep.record.runs import RecordError

APPLIED = Path("/var/lib/llmkeep/kubernetes")  # role kubernetes: CLUSTER/applied.json
CONTAINER = "audit"
RECORD, SEEN = "/var/log/llm-audit/record", "/var/log/llm-audit/seen"  # in a pod
AT_ONCE = 8
# For one replica, and before the last is asked: a cluster that is away delays no look for long.
SECONDS, ALL_SECONDS = 20, 240
LONGEST = (
    1 << 20
)  # bytes of an answer, in which a pod has its say: 192 KiB of heads in base64, and three short lines


class Unheard(Exception):
    """A replica's record could not be read. The message says why."""


@dataclass(frozen=True)
class Replica:
    """A pod with a record."""

    cluster: str
    kubeconfig: str
    namespace: str
    pod: str

    @property
    def name(self) -> str:
        return f"{self.cluster}.{self.pod}"


def replicas(clusters: Path | None) -> list[Replica]:
    """The expected replicas. CLUSTERS: role audit's list of clusters, each with `name` and `kubeconfig`. RecordError."""
    try:
        declared = json.loads(clusters.read_bytes()) if clusters else []
        return [
            Replica(cluster["name"], cluster["kubeconfig"], each["metadata"]["namespace"], pod)
            for cluster in declared
            for each in _applied(cluster["name"])
            if _has_record(each)
            for pod in _pods(each)
        ]
    except LlmkeepError as error:
        raise RecordError(str(error)) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecordError(
            f"{clusters}, or what {APPLIED} has of its clusters, was not written by the roles ({error!r}): run"
            " `llmkeep site --tags audit,kubernetes`"
        ) from error


def _applied(cluster: str) -> list[dict[str, Any]]:
    """The last healthy state of a cluster; empty before the first time."""
    try:
        path = APPLIED / cluster / "applied.json"
        manifests = json.loads(path.read_bytes())
        require_format(path, manifests)
        return list(manifests)
    except FileNotFoundError:
        return []


def _has_record(manifest: Mapping[str, Any]) -> bool:
    if manifest["kind"] != "StatefulSet":
        return False
    pod = manifest["spec"]["template"]["spec"]
    return any(each["name"] == CONTAINER for each in [*pod.get("initContainers", []), *pod["containers"]])


def _pods(workload: Mapping[str, Any]) -> Iterator[str]:
    first = workload["spec"].get("ordinals", {}).get("start", 0)
    for number in range(first, first + workload["spec"].get("replicas", 1)):
        yield f"{workload['metadata']['name']}-{number}"


def ask(
    asked: list[Replica], lengths: Mapping[str, int], states: Mapping[str, bytes]
) -> Iterator[tuple[str, str | Unheard]]:
    """Each replica's report on its record, in the format of playbooks/files/record_heads.py, by name.

    `lengths`: bytes of its heads that are kept here; `states`: the last seen state of its record.
    """
    end = time.monotonic() + ALL_SECONDS
    with tempfile.TemporaryDirectory(prefix="llmkeep-kubectl-") as cache, ThreadPoolExecutor(AT_ONCE) as pool:

        def reply(replica: Replica) -> str | Unheard:
            if time.monotonic() > end:
                return Unheard(f"{replica.name} was not asked: the others took {ALL_SECONDS} s")
            command = look(lengths.get(replica.name, 0), states.get(replica.name, b""))
            try:
                return _executed(replica, cache, command)
            except Unheard as problem:
                return problem

        yield from zip((each.name for each in asked), pool.map(reply, asked), strict=True)


def look(length: int, state_file: bytes) -> list[str]:
    """The command that reads a record in its container, as the record's user."""
    program = (source_tree.located() / "playbooks/files/record_heads.py").read_text()
    state = base64.b64encode(state_file).decode()
    return ["/usr/bin/python3", "-I", "-c", program, "", RECORD, str(length), state, SEEN]


def one_line(text: str) -> str:
    """Another machine's text for a message: at most 300 characters."""
    return printable(" ".join(text.split()))[:300]


def _executed(replica: Replica, cache: str, command: list[str]) -> str:
    argv = [
        "timeout",
        f"{SECONDS}",
        "kubectl",
        f"--kubeconfig={replica.kubeconfig}",
        f"--cache-dir={cache}",
        "exec",
        f"--namespace={replica.namespace}",
        f"--container={CONTAINER}",
        replica.pod,
        "--",
        *command,
    ]
    with subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        # One after the other: a pod that floods the one or the other is held by the pipe until its time is over.
        answer = cast(IO[bytes], process.stdout).read(LONGEST + 1)
        complaint = b"" if len(answer) > LONGEST else cast(IO[bytes], process.stderr).read(LONGEST)
    error = one_line(complaint.decode(errors="replace"))
    if len(answer) > LONGEST:
        raise Unheard(f"{replica.name} returned more than {LONGEST >> 20} MiB: examine that pod")
    if process.returncode == 124:
        error = f"no answer within {SECONDS} s"
    if process.returncode:
        raise Unheard(
            f"{replica.name}, pod {replica.namespace}/{replica.pod}, did not return the state of its record: {error}"
        )
    return answer.decode(errors="replace")
