"""luks_volume killed at random moments, with all its children: a plain run afterwards puts things right.

30 moments, or as many as STORM says, from the seed SEED. A kill keeps the page cache; lost writes are for lab hosts.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from luks_estate import Estate, luks, volume
from plugin_modules import HELPERS
from waiting import until

MOMENTS = int(os.environ.get("STORM", "30"))
SEED = int(os.environ.get("SEED", "5"))
DATA = random.Random(SEED).randbytes(1 << 20)  # noqa: S311
WAYS = {"hsm", "spare", "recovery"}
PROGRAM = HELPERS / "luks_estate.py"


def started(estate: Estate, given: dict[str, object]) -> subprocess.Popen[bytes]:
    argv = [sys.executable, str(PROGRAM), str(estate.root), json.dumps(given)]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)


def killed(estate: Estate, given: dict[str, object], seconds: float) -> bool:
    """A run that is killed SECONDS after it began its work; whether it still was at it."""
    process = started(estate, given)
    assert process.stdout
    process.stdout.readline()  # it says that it begins
    time.sleep(seconds)
    at_work = process.poll() is None
    if at_work:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    until(lambda: not alive_in(process.pid))  # a killed one that waits for a core may still be writing
    return at_work


def alive_in(session: int) -> list[int]:
    """The processes of a session, but for those of which only the exit code is left."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, its_session, *_ = path.read_text().rpartition(")")[2].split()
            if int(its_session) == session and state not in "ZX":
                found.append(int(path.parent.name))
    return found


def restored(kept: Path, estate: Estate) -> None:
    """The estate's disk, record and control node as they were."""
    for name in ("DISK-1", "state", "control"):
        target = estate.root / name
        if target.is_dir():
            shutil.rmtree(target)
        source = kept / name
        if source.is_dir():
            shutil.copytree(source, target)
        elif source.exists():
            shutil.copy(source, target)


def test_a_run_after_a_kill_at_any_moment_converges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    estate = Estate(tmp_path / "estate")
    estate.root.mkdir()
    monkeypatch.setenv("SOFTHSM2_CONF", str(estate.conf))
    estate.make()
    for key in ("host1-v2",):
        for token in ("main", "spare"):
            estate.new_key(token, key)
    shutil.rmtree(estate.root / "tokens.kept")
    shutil.copytree(estate.root / "tokens", estate.root / "tokens.kept")
    kept = {"new": tmp_path / "new", "rotation": tmp_path / "rotation"}
    given: dict[str, dict[str, object]] = {
        "new": {},
        "rotation": {"key": "host1-v2", "rotate": ["hsm", "spare", "recovery"]},
    }
    took = {}
    for what, folder in kept.items():
        folder.mkdir()
        for name in ("DISK-1", "state", "control"):
            source = estate.root / name
            if source.is_dir():
                shutil.copytree(source, folder / name)
            elif source.exists():
                shutil.copy(source, folder / name)
        began = time.monotonic()
        estate.run(**given[what])
        took[what] = time.monotonic() - began
        restored(folder, estate)
        if what == "new":
            estate.run()
            estate.put_data(DATA)
    chance = random.Random(SEED)  # noqa: S311
    phases: dict[str, int] = {}
    persons, interrupted = [], 0
    for moment in range(MOMENTS):
        what = chance.choice(sorted(kept))
        restored(kept[what], estate)
        at_work = killed(estate, given[what], chance.uniform(0, took[what]))
        interrupted += at_work
        if not at_work:  # the machine has less to do than when a run was timed
            took[what] *= 0.7
        estate.heal_tokens()
        path = estate.state / "data.json"
        phase = json.loads(path.read_text())["phase"] if path.exists() else "absent"
        phases[f"{what}: {phase}"] = phases.get(f"{what}: {phase}", 0) + 1
        told = f"moment {moment} of seed {SEED}: {what}, phase {phase}"
        if what == "rotation" or phase in ("wiping", "done"):
            assert estate.ways_in(), f"{told}: locked out"
        try:
            done = estate.run(**given[what])
        except volume.NeedsPerson as problem:
            persons.append(f"{told}: {problem}")
            continue
        assert done.known.phase == "done", told
        header = luks.read(estate.disk)
        slots = [entry["owner"] for entry in done.inventory(header)]
        assert sorted(slots) == sorted(WAYS), f"{told}: slots of {slots}"
        assert estate.ways_in() == WAYS, told
        assert all(header.slots_of(token) for token in header.tokens), f"{told}: a token without a slot"
        if what == "rotation":
            assert estate.data(len(DATA)) == DATA, f"{told}: data is lost"
    print(f"seed {SEED}: {interrupted} of {MOMENTS} runs were killed at work, in phases {phases}")
    assert not persons, "\n".join(persons)  # allowed, but none is known
    assert interrupted > MOMENTS // 2
