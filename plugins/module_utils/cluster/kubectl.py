"""kubectl with one kubeconfig, and its errors as sentences.

The kubeconfig is a secret: it is read here to judge it, and kubectl reads it itself. Its content is in no argument and
no message.
"""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from ansible_collections.llmkeep.estate.plugins.module_utils.config import files
from ansible_collections.llmkeep.estate.plugins.module_utils.refused import Refused

Manifest = dict[str, Any]
MANAGER = "llmkeep"
SECONDS = 30
SHOWN = 1200
MOST_OPENED = 1000  # brackets of a kubeconfig: YAML's scanner takes the square of their depth


def private(path: Path, what: str) -> bytes:
    """A file that only its owner reads, below folders that only root changes; Refused otherwise."""
    try:
        content: bytes = files.read(path)
        status = files.status_of(path)
    except OSError as problem:
        raise Refused(
            f"{what} {path} cannot be read: {problem.strerror}. Bring it as root, mode 0600"
        ) from None
    if status is None or status.st_mode & 0o077 or status.st_uid != os.geteuid():
        mode = f"{stat.S_IMODE(status.st_mode):04o} of uid {status.st_uid}" if status else "none"
        raise Refused(
            f"{what} {path} has mode {mode}, and is for root alone. Give it to root with mode 0600, and replace its"
            " key if others could read it"
        )
    return content


def judge_kubeconfig(path: Path) -> None:
    """Refuse a kubeconfig that others can read, or by which another server could pass for the cluster."""
    for key, file in key_files(private(path, "the kubeconfig"), path).items():
        private(path.parent / file, f"the {key} of {path}")


def key_files(content: bytes, path: Path) -> dict[str, str]:
    """The files with secrets that a kubeconfig names, by their fields. Refused if another server could pass for the cluster."""
    try:
        if content.count(b"[") + content.count(b"{") > MOST_OPENED:
            raise TypeError("more lists and objects than any kubeconfig has")
        # Strings only: YAML's dates, tags and merge keys do not belong in a kubeconfig.
        config = yaml.load(content, yaml.BaseLoader)  # noqa: S506 -- it makes texts, lists and dicts
        context = next(
            each["context"] for each in config["contexts"] if each["name"] == config["current-context"]
        )
        cluster = next(each["cluster"] for each in config["clusters"] if each["name"] == context["cluster"])
        user = next(each["user"] for each in config["users"] if each["name"] == context["user"])
        server = cluster["server"]
        files_of_it = {key: user[key] for key in ("client-key", "tokenFile") if user.get(key)}
        if not all(isinstance(each, str) and "\0" not in each for each in (server, *files_of_it.values())):
            raise TypeError("a server or a file that is not a string")
        unverified = cluster.get("insecure-skip-tls-verify", "false") != "false"
    except (yaml.YAMLError, AttributeError, KeyError, TypeError, RecursionError, StopIteration):
        raise Refused(
            f"{path} is not a kubeconfig with a current context, its cluster and its user. Write one with `kubectl config`"
        ) from None
    if unverified:
        raise Refused(
            f"the kubeconfig {path} has insecure-skip-tls-verify, so any server could pass for {server}."
            " Remove it, and set certificate-authority-data to the cluster's authority"
        )
    if not server.startswith("https://"):
        raise Refused(
            f"the kubeconfig {path} names the server {server}, which is not reached by TLS. Name its https address"
        )
    return files_of_it


@dataclass(frozen=True)
class Answer:
    """What kubectl said. WARNINGS are the API server's own."""

    ok: bool
    stdout: str
    error: str
    warnings: list[str]


@dataclass(frozen=True)
class Cluster:
    """A cluster by its kubeconfig. CACHE: folder for what kubectl learns of its API, for this run alone."""

    kubeconfig: Path
    cache: Path

    def ask(self, *words: str, stdin: str | None = None, seconds: float = SECONDS) -> Answer:
        """Run kubectl, which reads STDIN."""
        argv = ["kubectl", f"--kubeconfig={self.kubeconfig}", f"--cache-dir={self.cache}", *words]
        environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(self.cache), "LC_ALL": "C.UTF-8"}
        try:
            done = subprocess.run(
                argv,
                input=stdin,
                capture_output=True,
                text=True,
                timeout=seconds,
                check=False,
                env=environment,
            )
        except subprocess.TimeoutExpired:
            return Answer(False, "", f"kubectl {words[0]} did not end within {seconds:.0f} s", [])
        lines = done.stderr.splitlines()
        warnings = [line.removeprefix("Warning: ") for line in lines if line.startswith("Warning: ")]
        error = "\n".join(line for line in lines if not line.startswith("Warning: "))
        return Answer(done.returncode == 0, done.stdout, error, warnings)

    def do(self, *words: str, stdin: str | None = None, seconds: float = SECONDS) -> str:
        """What kubectl prints; Refused where it fails."""
        answer = self.ask(*words, stdin=stdin, seconds=seconds)
        if not answer.ok:
            raise Refused(explained(answer.error))
        return answer.stdout

    def objects(self, *words: str, stdin: str | None = None) -> list[Manifest]:
        """The objects that kubectl prints."""
        return listed(self.do(*words, "--output=json", stdin=stdin))


def listed(text: str) -> list[Manifest]:
    """Objects of kubectl's JSON, which is a list, or one object after the other."""
    manifests: list[Manifest] = []
    decoder, rest = json.JSONDecoder(), text.strip()
    while rest:
        each, end = decoder.raw_decode(rest)
        manifests += each["items"] if each["kind"].endswith("List") else [each]
        rest = rest[end:].strip()
    return manifests


def stream(objects: Iterable[Mapping[str, Any]]) -> str:
    """Objects for kubectl's --filename=-."""
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": list(objects)})


# An error of the API server, by what it says: what to do.
WAYS = [
    (
        r"Apply failed with \d+ conflicts?: ",
        "llmkeep takes no field from another manager: declare the value that the manager set, or set the declared one there",
    ),
    (
        r"failed calling webhook",
        "The webhook is down or answers wrongly: mend what serves it, or remove its configuration, and run again",
    ),
    (r"exceeded quota", "Ask for a larger ResourceQuota, or declare fewer replicas"),
    (
        r"ValidatingAdmissionPolicy '",
        "The cluster's policy refuses this: change what is declared, or the policy",
    ),
    (r"violates PodSecurity", "Declare pods that keep the level of their namespace"),
    (r"cannot \w+ resource", "Give the user of the kubeconfig this right (docs/operate/kubernetes.md)"),
    (
        r"Unauthorized|must be logged in",
        "The cluster does not know the kubeconfig's user: its certificate may have expired",
    ),
    (
        r"x509: |tls: ",
        "The server's certificate is not one of the kubeconfig's authority: compare both with those of the cluster",
    ),
    (
        r"Unable to connect|was refused|no route to host|i/o timeout|deadline exceeded",
        "Is the API server up, and does the firewall let this host reach it (base_open_out)?",
    ),
    (r"field is immutable", "Remove the object by hand, at a time when it may be missing, and run again"),
]


def explained(error: str) -> str:
    """An error of kubectl as a sentence with a way out, where one is known."""
    text = " ".join(error.split())[:SHOWN].rstrip(".")
    way = next((way for pattern, way in WAYS if re.search(pattern, text)), "")
    return f"{text}. {way}".rstrip(". ")
