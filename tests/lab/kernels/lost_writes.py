"""luks_volume under lost writes. Runs on a host whose kernel has dm-log-writes, with a folder that holds an Estate.

A volume is made, gets data, and its keys are rotated, once, while dm-log-writes keeps each write in the order in which
flushes made it durable. Then a power cut is played at each point of that log, and a plain run has to put things right.

The record (host's root disk) and the register (control node) are other disks. Each of their writes is synced before
luks_volume goes on, so right after each one both are copied, and the log gets a mark of the same number. A cut is then a
pair: the disk as its last flush left it, and any record that was durable before the next flush. Where writes lay
between the two, they may have reached the disk in part: so the newest of these records is also tried with a
random half of them.
"""

import hashlib
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "helpers"))
from luks_estate import PIN, Estate, luks, tool, volume, volume_phases
from write_log import FLUSH, FUA, Entry, apply, entries, logged, loop, mark, spread

DATA = random.Random(7).randbytes(1 << 18)  # noqa: S311 - content, no secret
ROTATION = {"key": "host1-v2", "rotate": ["hsm", "spare", "recovery"]}
WAYS = {"hsm", "spare", "recovery"}


@dataclass(frozen=True)
class Cut:
    """The log up to DURABLE is on the disk, a part of what follows up to PARTLY, and the record of RECORD."""

    durable: int
    partly: int
    record: str


def cuts(log: Sequence[Entry]) -> Iterator[Cut]:
    """Every one that can happen at a flush, in order."""
    durable, record = 0, ""
    for number, entry in enumerate(log):
        if entry.mark.isdigit():
            record = entry.mark
            yield Cut(durable, durable, record)
        elif entry.flags & (FLUSH | FUA):
            written = any(between.length for between in log[durable : number + 1])
            if written and record:
                yield Cut(durable, number + 1, record)
                yield Cut(number + 1, number + 1, record)
            durable = number + 1


@contextmanager
def mounted(device: Path, estate: Estate) -> Iterator[Path]:
    """The volume, opened by the HSM as at a boot."""
    header = luks.read(device)
    token = next(
        number for number, said in header.tokens.items() if "token=main" in said.get("pkcs11-uri", "")
    )
    argv = ["cryptsetup", "open", "--token-only", "--token-id", str(token), str(device), "lost-writes"]
    luks.must(argv, "open the volume", PIN.encode())
    place = estate.root / "mounted"
    place.mkdir(exist_ok=True)
    try:
        tool("mount", "/dev/mapper/lost-writes", place)
        try:
            yield place
        finally:
            tool("umount", place)
    finally:
        luks.close("lost-writes")


class Recording:
    """A run on a disk that is logged, and what the other disks held meanwhile."""

    def __init__(self, estate: Estate) -> None:
        self.estate = estate
        self.marks = 0
        self.doing: dict[str, Any] = {"what": "new", "data": False}

    def folder(self, number: int | str) -> Path:
        return self.estate.root / "marks" / str(number)

    def mark(self) -> None:
        self.marks += 1
        folder = self.folder(self.marks)
        folder.mkdir(parents=True)
        for source in (self.estate.state, self.estate.store):
            shutil.copytree(source, folder / source.name)
        (folder / "doing").write_text(json.dumps(self.doing))
        mark(str(self.marks))

    def marked(self, method: Callable[..., None]) -> Callable[..., None]:
        """METHOD, which writes durably to another disk, with a mark behind it."""

        def write(*args: Any) -> None:
            method(*args)
            self.mark()

        return write

    def make(self, log: Path) -> None:
        estate = self.estate
        estate.blank()
        unmarked = volume.Volume.keep, volume.Volume.drop, Estate.keep
        with logged(estate.disk, log) as device:
            volume.Volume.keep, volume.Volume.drop = map(self.marked, unmarked[:2])
            Estate.keep = self.marked(unmarked[2])  # type: ignore[method-assign]
            try:
                estate.run(device=str(device), serial="")
                with mounted(device, estate) as place:
                    self.doing["what"] = "rotation"
                    with (place / "data").open("wb") as stream:
                        stream.write(DATA)
                        stream.flush()
                        os.fsync(stream.fileno())
                    os.sync()  # the file's name too
                    self.doing["data"] = True
                    self.mark()
                    estate.run(device=str(device), serial="", **ROTATION)
            finally:
                volume.Volume.keep, volume.Volume.drop = unmarked[:2]
                Estate.keep = unmarked[2]  # type: ignore[method-assign]


class Replay:
    """The estate after a cut, and what has to hold then."""

    def __init__(self, made: Recording, log: Path, seed: int) -> None:
        self.made, self.estate, self.log, self.seed = made, made.estate, log, seed
        self.entries = entries(log)

    def after(self, cut: Cut) -> None:
        """Disk, record and register as the cut left them."""
        written = [entry for entry in self.entries[cut.durable : cut.partly] if entry.length]
        chance = random.Random(f"{self.seed} {cut}")  # noqa: S311
        half = [entry for entry in written if chance.random() < 0.5]
        self.estate.blank()
        apply(self.log, [*self.entries[: cut.durable], *half], self.estate.disk)
        for target in (self.estate.state, self.estate.store):
            shutil.rmtree(target)
            shutil.copytree(self.made.folder(cut.record) / target.name, target)

    def is_faithful(self, before: str) -> bool:
        """Whether the whole log gives the disk that there was: otherwise no replay proves anything."""
        self.estate.blank()
        apply(self.log, self.entries, self.estate.disk)
        return hashlib.sha256(self.estate.disk.read_bytes()).hexdigest() == before

    def holds(self, cut: Cut) -> str:
        """A plain run after the cut; 'converged', or the person's message. AssertionError for what must not be."""
        self.after(cut)
        estate = self.estate
        doing = json.loads((self.made.folder(cut.record) / "doing").read_text())
        record = estate.state / "data.json"
        phase = json.loads(record.read_text())["phase"] if record.exists() else "absent"
        told = f"{cut}, {doing['what']}, phase {phase}"
        if doing["data"] or phase in ("wiping", "filesystem", "done"):
            assert estate.ways_in(), f"{told}: locked out"
        given = ROTATION if doing["what"] == "rotation" else {}
        with loop(estate.disk) as device:
            try:
                done = estate.run(device=str(device), **given)
            except volume.NeedsPerson as problem:
                if doing["data"]:
                    with mounted(device, estate) as place:
                        assert (place / "data").read_bytes() == DATA, f"{told}: data is lost"
                return f"{told}: {problem}"
            header = luks.read(device)
            listed = {int(slot) for slot in done.known.slots}
            assert set(header.slots) == listed, f"{told}: slots {set(header.slots)}, listed {listed}"
            assert volume_phases.differences(done, header) == ([], []), told
            assert estate.ways_in() == WAYS, f"{told}: {estate.ways_in()}"
            with mounted(device, estate) as place:
                assert not doing["data"] or (place / "data").read_bytes() == DATA, f"{told}: data is lost"
        return "converged"


def main(root: Path, count: int, seed: int) -> int:
    estate, log = Estate(root), root / "log"
    estate.conf.write_text(f"directories.tokendir = {root}/tokens\nobjectstore.backend = file\n")
    os.environ["SOFTHSM2_CONF"] = str(estate.conf)
    estate.set_pin(PIN)
    began = time.monotonic()
    made = Recording(estate)
    made.make(log)
    whole = hashlib.sha256(estate.disk.read_bytes()).hexdigest()
    replay = Replay(made, log, seed)
    every = list(cuts(replay.entries))
    print(
        f"{len(replay.entries)} entries, {made.marks} records, {len(every)} cuts, {time.monotonic() - began:.0f} s"
    )
    assert replay.is_faithful(whole), "the log does not give the disk that there was"
    persons, failures = [], []
    tried = spread(every, count, seed)
    for cut in tried:
        began = time.monotonic()
        try:
            said = replay.holds(cut)
        except Exception as problem:
            failures.append(said := f"{cut}: {type(problem).__name__}: {problem}")
        else:
            persons += [said] if said != "converged" else []
        print(f"{cut}: {said} ({time.monotonic() - began:.1f} s)", flush=True)
    print(f"seed {seed}: {len(tried)} cuts, {len(persons)} for a person, {len(failures)} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
