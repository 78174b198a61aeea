"""Durable checkpoints: a kill, a power cut, a full disk or a changed byte costs at most the last save.

Each node has its own disk, with a folder `step-00001234` per save that holds the files of its own ranks. A save is written
to `.partial-00001234`, flushed and sealed (`sealed.py`) on every node before any node renames it. So once one node has the
new name, all nodes have the complete content, under one of the two names; `latest_good` relies on this. Older saves are
deleted last.

The parts of a save on different nodes share a random id; a save is good if it is good on all nodes.
"""

import errno
import fcntl
import hmac
import json
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmcore.files import flush, write_aside
from llmtrain.exits import ALTERED, FAILED, NO_SPACE, Refusal
from llmtrain.run import sealed
from llmtrain.run.collectives import gathered, process_group

log = logging.getLogger("llmtrain.checkpoint")
KEY = "llm-train.key"
KEY_BYTES = 32  # minimum
NAME = re.compile(r"(?:step-|\.partial-)(\d{8,})(?:\.old)?")
ASIDES = (".partial-*", ".removed-*")
SPARE = 16 << 20  # bytes that a save leaves free, for its manifest and for other programs


def read_key(file: Path | None) -> bytes:
    """The estate's checkpoint key, from `file` or from the systemd credential `llm-train.key`; raises Refusal."""
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    if file is None and folder is None:
        raise Refusal(
            f"there is no checkpoint key: neither --key-file nor the credential {KEY}; "
            "make one with `openssl rand -out FILE 32`, mode 0600"
        )
    path = file or Path(str(folder), KEY)
    try:
        mode, key = path.stat().st_mode, path.read_bytes()
    except OSError as error:
        raise Refusal(
            f"cannot read the checkpoint key {path}: {error.strerror}; specify a file with --key-file"
        ) from error
    # The group bits of a credential are the mask of systemd's ACL, not permissions of a group.
    if mode & (0o077 if file else 0o007):
        raise Refusal(f"the checkpoint key {path} has mode {mode & 0o777:o}: others can read it; chmod 600")
    if len(key) < KEY_BYTES:
        raise Refusal(
            f"the checkpoint key {path} has {len(key)} bytes: it needs at least {KEY_BYTES} random ones"
        )
    return key


@dataclass(frozen=True)
class Checkpoint:
    """A complete and authentic save. `state` is the one passed to `save`, after a round trip through JSON; `world_size` and
    `nodes` are those of the job that saved it."""

    step: int
    folder: Path
    state: dict[str, Any]
    world_size: int
    nodes: int


class Checkpoints:
    """The checkpoints in a directory of this node. All ranks construct one after the process group is initialized, and call
    the same methods in the same order; the first rank of the node (LOCAL_RANK 0) does the work. GROUP_RANK is the number
    of the node; torchrun sets both."""

    def __init__(
        self, directory: Path, key: bytes, last: int, expected: int = 0, newest: Path | None = None
    ) -> None:
        """The newest `last` saves are kept. `expected` estimates the bytes of the first one on this node. `newest` is a file
        outside the directory that records the newest save: if older saves are restored, they are authentic, too.

        Raises Refusal if another process uses the directory, or others may write to it.
        """
        self.directory, self.last, self.expected, self.newest = directory, last, expected, newest
        self.key = hmac.digest(key, b"llmkeep checkpoint", "sha256")
        group = process_group()
        self.rank: int = group.get_rank() if group else 0
        self.world_size: int = group.get_world_size() if group else 1
        self.first = int(os.environ.get("LOCAL_RANK", self.rank)) == 0
        self.node = int(os.environ.get("GROUP_RANK", "0"))
        if self.first:
            self._make()
            self._lock()

    def save(self, step: int, write: Callable[[Path], None], state: dict[str, Any]) -> Path:
        """Save the files that `write(folder)` writes for this rank, and `state` (JSON); return the folder once the save is
        durable on all nodes.

        Raises Refusal (NO_SPACE if a disk is or would be full), or the error of `write`; older checkpoints are unchanged then.
        """
        aside, folder = self.directory / f".partial-{step:08d}", self.directory / f"step-{step:08d}"
        try:
            begun = self._together(lambda: self._begin(aside, state))
            self._together(lambda: write(aside))
            facts = {
                "save": begun[0][0],
                "step": step,
                "node": self.node,
                "nodes": sum(first for _, first in begun),
                "world_size": self.world_size,
                "state": state,
            }
            self._together(lambda: self._seal(aside, facts))
        except Exception:
            if self.first:
                self._discard(aside)
            raise
        # Sealed on all nodes: from here on the save survives anything.
        displaced = aside.with_suffix(".old")
        saves_by_rank = self._together(lambda: self._put(aside, folder, displaced))
        self._together(lambda: self._remember(step, begun[0][0]))
        if self.first:
            self._prune([saves for saves in saves_by_rank if saves is not None], step)
        return folder

    def latest_good(self) -> Checkpoint | None:
        """The newest save that is complete and authentic on all nodes; None if nothing was ever saved.

        No file of a checkpoint is opened before it is verified. Defects of newer saves are logged. Raises Refusal (ALTERED)
        if there are saves but none is good: starting over is the operator's decision.
        """
        local_saves, bad = self._found() if self.first else ({}, {})
        reports = gathered((self.node, list(local_saves), bad, self._placed()) if self.first else None)
        nodes = [each for each in reports if each is not None]
        common = set.intersection(*(set(map(tuple, saves)) for _, saves, _, _ in nodes))
        for node, _, problems, _ in nodes:
            for name, defect in problems.items():
                self._say(f"checkpoint {name} of node {node} is not good: {defect}")
        for step, save in sorted(common, reverse=True):
            problem = self._problem(*local_saves[step, save]) if self.first else None
            wrong = {rank: defect for rank, defect in enumerate(gathered(problem)) if defect}
            for rank, reason in wrong.items():
                self._say(f"checkpoint of step {step}, verified by rank {rank}, is not good: {reason}")
            if not wrong:
                self._compare_with_remembered(step, save)
                return self._resumed(step, local_saves.get((step, save)))
        if any(placed for *_, placed in nodes):
            have = "; ".join(f"node {node} has {', '.join(placed) or 'none'}" for node, _, _, placed in nodes)
            raise Refusal(
                f"{self.directory}: no checkpoint is good on all nodes ({have}); the messages above say why. Restore the files "
                f"or the key, or move the directory away to start over",
                ALTERED,
            )
        self._compare_with_remembered("none", "")
        self._clean()
        return None

    def _remember(self, step: int, save: str) -> None:
        """Record the newest save in `newest`: a line of JSON, and a line with its HMAC."""
        if self.first and self.newest:
            line = json.dumps({"step": step, "save": save})
            write_aside(self.newest, f"{line}\n{self._mac(line.encode()).decode()}\n")

    def _mac(self, content: bytes) -> bytes:
        """The HMAC of such a record, in hex; the prefix keeps it apart from the HMAC of a manifest."""
        return hmac.digest(self.key, b"newest save\n" + content, "sha256").hex().encode()

    def _remembered(self) -> dict[str, Any] | None:
        """The record of this node's newest save; None if there is none, or if it is not authentic, which is logged."""
        if not (self.first and self.newest and self.newest.exists()):
            return None
        line, _, mac = self.newest.read_bytes().partition(b"\n")
        if not hmac.compare_digest(self._mac(line), mac.strip()):
            log.warning(
                "%s was altered, or authenticated with another key: cannot tell whether an older save was restored",
                self.newest,
            )
            return None
        remembered: dict[str, Any] = json.loads(line)
        return remembered

    def _compare_with_remembered(self, step: int | str, save: str) -> None:
        """Warn if a node has a record of a newer save than the one that is resumed. Ids sort by time."""
        for node, remembered in self._together(lambda: (self.node, self._remembered())):
            if remembered and remembered["save"] > save:
                self._say(
                    f"{self.directory}: the last save of node {node} was of step {remembered['step']}, the newest good one is "
                    f"of step {step}. Unless a message above explains this, older files were restored: find out who did that"
                )

    def _resumed(self, step: int, own_save: tuple[Path, dict[str, Any]] | None) -> Checkpoint:
        """The checkpoint that all nodes agreed on, under its final name, after partial saves are deleted."""
        folder = self.directory / f"step-{step:08d}"
        self._together(lambda: self._name(*own_save, folder) if own_save else None)
        manifests = gathered((self.node, own_save[1] if own_save else None))
        self._clean()
        manifest = next(entry for node, entry in manifests if node == self.node and entry)
        return Checkpoint(step, folder, manifest["state"], manifest["world_size"], manifest["nodes"])

    def _name(self, aside: Path, manifest: dict[str, Any], folder: Path) -> None:
        """Rename a save that was sealed before the job was killed. A folder that has the name already is not good."""
        if aside != folder:
            log.info("taking %s, which was sealed on all nodes", aside)
            self._put(aside, folder, self.directory / f".removed-{folder.name}")

    def _together(self, work: Callable[[], Any]) -> list[Any]:
        """Do `work` on each rank and return the results, JSON, by rank. If one fails, all raise, so that no rank waits for it."""
        caught: Exception | None = None
        value: Any = None
        problem: tuple[str, int] | None = None
        try:
            value = work()
        except Refusal as error:
            caught, problem = error, (str(error), error.code)
        except Exception as error:
            name = type(error).__name__
            if self._is_full(error):
                caught = Refusal(
                    f"{self.directory} became full during a save ({name}); older checkpoints are unchanged: "
                    "free disk space and resume",
                    NO_SPACE,
                )
                caught.__cause__ = error
                problem = (str(caught), NO_SPACE)
            else:
                caught, problem = error, (f"{name}: {error}", FAILED)
        outcomes = gathered((value, problem))
        if caught:
            raise caught
        for rank, (_, problem) in enumerate(outcomes):
            if problem:
                raise Refusal(f"rank {rank} could not save: {problem[0]}", problem[1])
        return [value for value, _ in outcomes]

    def _make(self) -> None:
        """Create the directory durably; raises Refusal if others could change it."""
        missing = [path for path in (self.directory, *self.directory.parents) if not path.exists()]
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in missing:
            flush(path.parent)
        if sealed.changeable(self.directory.stat()):
            raise Refusal(
                f"{self.directory} is writable by others, who could change a checkpoint after it was verified: "
                "chown it to this user, chmod 700"
            )
        for path in self.directory.resolve().parents:
            mode = path.stat().st_mode
            if mode & 0o022 and not mode & 0o1000:
                raise Refusal(
                    f"{path} has mode {mode & 0o7777:o}: others could replace {self.directory}; chmod go-w"
                )

    def _lock(self) -> None:
        """Lock the directory until this process exits. Not with flock, which child processes would inherit."""
        self.lock = os.open(self.directory / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise Refusal(
                f"another process uses the checkpoints in {self.directory}: wait for it, or set another output for this job"
            ) from error

    def _begin(self, aside: Path, state: dict[str, Any]) -> tuple[str, bool]:
        """Make the folder if there is space for a save; return an id, which sorts by time, and whether this rank is the first
        of its node. The save gets the id of rank 0."""
        json.dumps(state)  # fails now, not after everything is written
        if self.first:
            self._clean()
            needed, free = self._needed(), self._free()
            if free < needed:
                raise Refusal(
                    f"a checkpoint takes about {needed / 1e9:.2f} GB, {self.directory} has {free / 1e9:.2f} GB free: "
                    "free disk space, or keep fewer checkpoints (keep.last)",
                    NO_SPACE,
                )
            aside.mkdir(mode=0o700)
        return f"{time.time_ns():016x}{secrets.token_hex(8)}", self.first

    def _seal(self, aside: Path, facts: dict[str, Any]) -> None:
        if self.first:
            self.expected = sealed.seal(aside, self.key, facts)
            flush(self.directory)

    def _put(self, aside: Path, folder: Path, displaced: Path) -> list[tuple[int, str]] | None:
        """Rename a sealed folder and return the saves that this node has then. A folder with that name, from an abandoned
        run of the job, stays complete until it is replaced."""
        if not self.first:
            return None
        shutil.rmtree(displaced, ignore_errors=True)
        if folder.exists():
            folder.rename(displaced)
        aside.rename(folder)
        flush(self.directory)
        shutil.rmtree(displaced, ignore_errors=True)
        return list(self._found()[0])

    def _prune(self, saves: list[list[list[Any]]], step: int) -> None:
        """Delete saves older than the newest `last` up to `step` that all nodes have, judged by manifests and sizes: checking
        hashes would read them all again."""
        common = sorted(
            save for save in set.intersection(*(set(map(tuple, each)) for each in saves)) if save[0] <= step
        )
        if len(common) <= self.last:
            return
        oldest_kept = common[-self.last][0]
        for name in self._placed():
            if int(name.removeprefix("step-")) < oldest_kept:
                removed = self.directory / f".removed-{name}"
                (self.directory / name).rename(removed)
                shutil.rmtree(removed, ignore_errors=True)

    def _placed(self) -> list[str]:
        """The names of all saves, good or not."""
        return sorted(path.name for path in self.directory.glob("step-*") if NAME.fullmatch(path.name))

    def _found(self) -> tuple[dict[tuple[int, str], tuple[Path, dict[str, Any]]], dict[str, str]]:
        """Authentic saves by step and id, their hashes not yet checked; and the defects of the others, by name."""
        saves, bad = {}, {}
        for path in sorted(self.directory.iterdir()):
            if not (match := NAME.fullmatch(path.name)):
                continue
            try:
                manifest = sealed.authentic(path, self.key)
                if manifest["step"] != int(match[1]):
                    raise sealed.NotGood(f"its manifest is of step {manifest['step']}")
                if manifest["node"] != self.node:
                    raise sealed.NotGood(
                        f"it was saved by node {manifest['node']} and this is node {self.node}: "
                        "start the nodes in the same order as before"
                    )
            except (sealed.NotGood, OSError) as error:
                if path.name.startswith("step-"):  # a partial save may be incomplete
                    bad[path.name] = str(error)
            else:
                saves[manifest["step"], manifest["save"]] = path, manifest
        return saves, bad

    def _problem(self, folder: Path, manifest: dict[str, Any]) -> str | None:
        """Check the hashes of a save; return what is wrong, or None."""
        size = sum(file["size"] for file in manifest["files"].values())
        log.info("verifying %s: %.2f GB", folder, size / 1e9)
        try:
            sealed.verify(folder, manifest)
        except (sealed.NotGood, OSError) as error:
            return str(error)
        return None

    def _say(self, message: str) -> None:
        if self.rank == 0:
            log.warning(message)

    def _clean(self) -> None:
        """Delete partial and superseded saves."""
        if self.first:
            for pattern in ASIDES:
                for path in self.directory.glob(pattern):
                    shutil.rmtree(path, ignore_errors=True)

    def _discard(self, aside: Path) -> None:
        """Free the space of a partial save, even if the failed writer still holds a file open."""
        for path in aside.rglob("*"):
            if path.is_file() and not path.is_symlink():
                os.truncate(path, 0)
        shutil.rmtree(aside, ignore_errors=True)

    def _free(self) -> int:
        status = os.statvfs(self.directory)
        return status.f_bavail * status.f_frsize

    def _needed(self) -> int:
        """Bytes that one more save needs: the size of the last one, or `expected`."""
        if not self.expected:
            saves, _ = self._found()
            sizes = {
                each: sum(file["size"] for file in manifest["files"].values())
                for each, (_, manifest) in saves.items()
            }
            self.expected = sizes[max(sizes)] if sizes else 0
        return self.expected + SPARE

    def _is_full(self, error: Exception) -> bool:
        """Whether a save failed because the disk is full, which torch and safetensors report in their own ways or not at all."""
        by_errno = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        return by_errno or os.strerror(errno.ENOSPC) in str(error) or self._free() < SPARE // 4
