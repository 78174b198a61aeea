"""A bundle over several media, or as a delta, is in place when all of it is there, and each content takes its space once."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import small_bundle
from bootstrapped import Machine

from llmkeep.bundle import join, manifest, media

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="bootstrap needs root")

WEIGHTS = {f"models/small/shard-{number}": bytes([number]) * 40_000 for number in range(1, 5)}
NEW = {"models/small/shard-4": b"\x09" * 40_000, "models/small/shard-5": WEIGHTS["models/small/shard-2"]}
TWIN = "tree/the-same-as-shard-1"
KILLS = int(os.environ.get("STORM", "2"))
SIZE = (
    133_616 + -(-small_bundle.BOOTSTRAP.stat().st_size // 4096) * 4096
)  # two shards a medium, and bootstrap


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_bundle.signing_keys(tmp_path_factory.mktemp("keys"))


def bundle(folder: Path, keys: Path, serial: int = 7, **changed: bytes) -> Path:
    """A bundle of four shards, one of which it has twice."""
    small_bundle.write(folder, keys)
    for path, content in {**WEIGHTS, TWIN: WEIGHTS["models/small/shard-1"], **changed}.items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(content)
    small_bundle.sign(folder, keys, serial, 30)
    return folder


def split(folder: Path, out: Path, old: Path | None = None) -> list[Path]:
    media.split(folder, out, None if old else SIZE, old)
    return sorted(out.iterdir())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, keys: Path) -> Path:
    """`whole` and `newer`, which has one other shard and one content under another name; `media` of one, `delta` to the other."""
    folder = tmp_path_factory.mktemp("made")
    split(bundle(folder / "whole", keys), folder / "media")
    split(bundle(folder / "newer", keys, 8, **NEW), folder / "delta", folder / "whole")
    return folder


@pytest.fixture
def here(tmp_path: Path, made: Path) -> Path:
    """A copy of them, to damage."""
    return Path(shutil.copytree(made, tmp_path / "here"))


@pytest.fixture
def whole(here: Path) -> Path:
    return here / "whole"


@pytest.fixture
def newer(here: Path) -> Path:
    return here / "newer"


@pytest.fixture
def delta(here: Path) -> Path:
    return here / "delta/1"


@pytest.fixture
def parts(here: Path) -> list[Path]:
    found = sorted((here / "media").iterdir())
    assert len(found) == 3
    return found


@pytest.fixture
def machine(tmp_path: Path, whole: Path) -> Machine:
    (tmp_path / "root").mkdir()
    return Machine(tmp_path / "root", whole)


def assert_in_place(machine: Machine, whole: Path, serial: int = 7) -> None:
    place = machine.store / str(serial)
    assert {path: (place / path).read_bytes() for path in manifest.walk(place)} == {
        path: (whole / path).read_bytes() for path in manifest.walk(whole)
    }
    assert not (machine.store / ".incoming").exists()


def inodes(folder: Path) -> dict[str, int]:
    return {path: (folder / path).stat().st_ino for path in manifest.walk(folder)}


@pytest.mark.parametrize("order", [(2, 0, 1), (1, 2, 0)])
def test_media_are_taken_in_any_order(
    order: tuple[int, ...], machine: Machine, whole: Path, parts: list[Path]
) -> None:
    for number in order[:2]:
        run = machine.bootstrap(parts[number])
        assert (run.returncode, run.stderr, machine.accepted) == (manifest.INCOMPLETE, "", [])
    assert f"\nmedium {order[2] + 1}: " in run.stdout, run.stdout
    run = machine.bootstrap(parts[order[2]])
    assert (run.returncode, run.stderr) == (0, "")
    assert_in_place(machine, whole)
    assert "here already and whole" in machine.bootstrap(parts[0]).stdout


def test_a_content_that_a_bundle_has_twice_takes_its_space_once(machine: Machine, whole: Path) -> None:
    assert machine.bootstrap(whole).returncode == 0
    assert (machine.store / "7" / TWIN).samefile(machine.store / "7/models/small/shard-1")


def test_the_same_medium_twice_is_still_not_complete(machine: Machine, parts: list[Path]) -> None:
    machine.bootstrap(parts[0])
    run = machine.bootstrap(parts[0])
    assert (run.returncode, machine.accepted) == (manifest.INCOMPLETE, [])
    awaited = [line for line in run.stdout.splitlines() if line.startswith("medium ")]
    assert awaited[0] == "medium 2: 2 files, 0.1 MB"
    assert [line.split(":")[0] for line in awaited[1:]] == ["medium 3"]


def test_a_medium_of_another_bundle_is_refused_and_what_is_half_here_is_kept(
    machine: Machine, whole: Path, parts: list[Path], delta: Path
) -> None:
    machine.bootstrap(parts[0])
    before = small_bundle.snapshot(machine.store / ".incoming")
    run = machine.bootstrap(delta)
    assert run.returncode == manifest.FOREIGN
    assert "this medium belongs to serial 8, but serial 7, created" in run.stderr
    assert small_bundle.snapshot(machine.store / ".incoming") == before
    for part in parts[1:]:
        machine.bootstrap(part)
    assert_in_place(machine, whole)


def test_a_half_copied_bundle_that_was_overtaken_is_given_up(
    machine: Machine, tmp_path: Path, keys: Path, parts: list[Path]
) -> None:
    machine.bootstrap(parts[0])
    shutil.move(machine.store / ".incoming", tmp_path / "aside")
    newer = bundle(tmp_path / "newer", keys, 8)
    assert machine.bootstrap(newer).returncode == 0
    shutil.move(tmp_path / "aside", machine.store / ".incoming")
    newest = bundle(tmp_path / "newest", keys, 9)
    assert machine.bootstrap(newest).returncode == 0
    assert_in_place(machine, newest, 9)


def test_a_damaged_file_is_found_while_its_medium_is_plugged_in(
    machine: Machine, whole: Path, parts: list[Path]
) -> None:
    machine.bootstrap(parts[0])
    victim = parts[1] / "models/small/shard-3"
    victim.unlink()
    victim.write_bytes(WEIGHTS["models/small/shard-3"][:-1] + b"x")
    run = machine.bootstrap(parts[1])
    assert run.returncode == manifest.DAMAGED
    assert "models/small/shard-3: FAILED" in run.stderr
    victim.write_bytes(WEIGHTS["models/small/shard-3"])
    for part in parts[1:]:
        run = machine.bootstrap(part)
    assert run.returncode == 0
    assert_in_place(machine, whole)


def test_what_a_power_cut_damaged_in_the_copy_is_copied_again(
    machine: Machine, whole: Path, parts: list[Path]
) -> None:
    machine.bootstrap(parts[0])
    victim = machine.store / ".incoming/models/small/shard-1"
    victim.write_bytes(bytes(victim.stat().st_size))
    run = machine.bootstrap(parts[0])
    assert (run.returncode, run.stderr) == (manifest.INCOMPLETE, "")
    for part in parts[1:]:
        run = machine.bootstrap(part)
    assert run.returncode == 0
    assert_in_place(machine, whole)


def test_a_file_that_a_medium_lost_is_missed_before_anything_is_copied(
    machine: Machine, parts: list[Path]
) -> None:
    (parts[1] / "models/small/shard-3").unlink()
    run = machine.bootstrap(parts[1])
    assert (run.returncode, "missing: models/small/shard-3" in run.stderr) == (manifest.DAMAGED, True)
    assert not (machine.store / ".incoming").exists()


def test_a_copy_shows_how_far_it_is_and_how_long_it_takes(machine: Machine, whole: Path) -> None:
    """Ten seconds, and the copy, take a part of one here."""
    machine.meanwhile = 'sleep() { command sleep 0.1; }\nxargs() { case $1 in cp) command sleep 1 ;; esac; command xargs "$@"; }'
    run = machine.bootstrap(whole)
    assert (run.returncode, run.stderr) == (0, "")
    shown = [line for line in run.stdout.splitlines() if line.startswith("bootstrap: copied ")]
    assert shown, run.stdout
    assert all(
        re.fullmatch(r"bootstrap: copied 0\.0 of 0\.0 GB, \d\.\d MB/s(, .* left)?", line) for line in shown
    )
    assert run.stdout.splitlines().index(shown[-1]) < run.stdout.splitlines().index(
        "bootstrap: checking every file"
    )


# ---------------------------------------------------------------- interrupted
def test_a_copy_that_stops_half_way_goes_on(machine: Machine, whole: Path, tmp_path: Path) -> None:
    """The stick is pulled out while it is copied: its files are gone."""
    stick = tmp_path / "stick"
    shutil.copytree(whole, stick)
    machine.meanwhile = f"mv {stick}/models {tmp_path}/gone"
    run = machine.bootstrap(stick)
    assert (run.returncode, machine.accepted) == (1, [])
    assert "copying stopped (cp: " in run.stderr
    assert "reconnect the medium" in run.stderr
    (tmp_path / "gone").rename(stick / "models")
    machine.meanwhile = ""
    copied = inodes(machine.store / ".incoming")
    assert copied.keys() >= {"apt/pool/odd+name~1_2.deb", "bootstrap"}
    assert machine.bootstrap(stick).returncode == 0
    assert inodes(machine.store / "7").items() >= {
        (path, copied[path]) for path in ("bootstrap", "apt/pool/odd+name~1_2.deb")
    }
    assert_in_place(machine, whole)


@pytest.fixture
def small_disk(machine: Machine) -> Iterator[Path]:
    """A disk of 200 kB for bundles, whose size the check of free space does not see."""
    machine.store.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "small", str(machine.store)], check=True)
    yield machine.store
    subprocess.run(["umount", str(machine.store)], check=True)


def test_a_disk_that_is_full_half_way_is_named_and_the_copy_goes_on(
    machine: Machine, whole: Path, small_disk: Path
) -> None:
    run = machine.bootstrap(whole)
    assert (run.returncode, "make room" in run.stderr) == (1, True)
    assert list(small_disk.iterdir()) == []
    honest = machine.script
    text = honest().read_text()
    checked = '[ "$free" -ge "$need" ]'
    assert checked in text

    def without_check() -> Path:
        script = honest()
        script.write_text(script.read_text().replace(checked, "true"))
        return script

    machine.script = without_check  # type: ignore[method-assign]
    run = machine.bootstrap(whole)
    assert (run.returncode, "No space left on device" in run.stderr) == (1, True), run.stderr
    assert "make room" in run.stderr
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    assert machine.bootstrap(whole).returncode == 0
    assert_in_place(machine, whole)


@pytest.mark.parametrize("number", range(KILLS))
def test_media_with_a_kill_in_each_are_put_together(
    number: int, machine: Machine, whole: Path, parts: list[Path], tmp_path: Path
) -> None:
    """Killed at moments that are spread over the time that a run takes."""
    (tmp_path / "timed").mkdir()
    begin = time.monotonic()
    assert Machine(tmp_path / "timed", parts[0]).bootstrap().returncode == manifest.INCOMPLETE
    duration = time.monotonic() - begin
    for part in parts:
        machine.stick = part
        command = ["sh", str(machine.script())]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        started = subprocess.Popen(command, start_new_session=True, **quiet)  # type: ignore[call-overload]
        time.sleep(duration * (number + 0.5) / KILLS)
        os.killpg(started.pid, signal.SIGKILL)
        started.wait()
    codes = [machine.bootstrap(part).returncode for part in parts]
    assert codes[-1] == 0, codes
    assert_in_place(machine, whole)


# ---------------------------------------------------------------- delta
def test_a_delta_carries_what_is_new_and_nothing_else(delta: Path) -> None:
    head = {"bootstrap", "keyring.pgp", manifest.NAME, manifest.SIGNATURE, manifest.MEDIUM}
    assert set(manifest.walk(delta)) == {*head, "models/small/shard-4"}


def test_a_delta_takes_the_rest_from_the_bundle_in_use(
    machine: Machine, whole: Path, delta: Path, newer: Path
) -> None:
    machine.bootstrap(whole)
    run = machine.bootstrap(delta)
    assert (run.returncode, run.stderr) == (0, "")
    assert "medium 1 of 1 of serial 8, a delta from lab serial 7" in run.stdout
    assert "(0.0 MB of it are new here)" in run.stdout
    assert_in_place(machine, newer, 8)
    before, after = inodes(machine.store / "7"), inodes(machine.store / "8")
    assert after["models/small/shard-2"] == after["models/small/shard-5"] == before["models/small/shard-2"]
    assert after["models/small/shard-4"] != before["models/small/shard-4"]
    assert (machine.store / "7/models/small/shard-4").read_bytes() == WEIGHTS["models/small/shard-4"]


def test_a_whole_bundle_copies_only_what_is_not_here(
    machine: Machine, whole: Path, keys: Path, tmp_path: Path
) -> None:
    machine.bootstrap(whole)
    newer = bundle(tmp_path / "newer", keys, 8, **NEW)
    shutil.rmtree(newer / "apt")  # so that a copy of it would fail
    small_bundle.sign(newer, keys, 8, 30)
    assert machine.bootstrap(newer).returncode == 0
    before, after = inodes(machine.store / "7"), inodes(machine.store / "8")
    changed = {"models/small/shard-4", "keyring.pgp", *NEW, manifest.NAME, manifest.SIGNATURE}
    assert {path for path in before.keys() & after.keys() if before[path] != after[path]} == changed - {
        "models/small/shard-5"
    }


def test_contents_of_a_release_on_the_same_disk_are_linked(machine: Machine, whole: Path) -> None:
    release = machine.root / "srv/llmkeep/releases/small"
    shutil.copytree(whole, release)
    assert machine.bootstrap(whole).returncode == 0
    assert (machine.store / "7/models/small/shard-1").samefile(release / "models/small/shard-1")


def test_a_delta_from_another_bundle_than_the_one_here_is_refused(machine: Machine, delta: Path) -> None:
    run = machine.bootstrap(delta)
    assert run.returncode == manifest.FOREIGN
    assert (
        "It is a delta from lab serial 7, but serial 0 is in use here: use a delta from that, or a full bundle"
        in run.stderr
    )
    assert (machine.accepted, (machine.store / ".incoming").exists()) == ([], False)


@pytest.mark.parametrize("kind", ["delta", "whole"])
def test_what_is_damaged_in_the_bundle_in_use_is_not_taken_from_it(
    kind: str, machine: Machine, whole: Path, delta: Path, newer: Path
) -> None:
    machine.bootstrap(whole)
    victim = machine.store / "7/models/small/shard-2"
    victim.write_bytes(WEIGHTS["models/small/shard-2"][:-1] + b"x")
    run = machine.bootstrap(delta if kind == "delta" else newer)
    if kind == "delta":
        assert run.returncode == manifest.INCOMPLETE
        assert "models/small/shard-2: FAILED" in run.stdout
        assert "a whole bundle: 1 files" in run.stdout
        assert machine.accepted == ["7", "current"]
        run = machine.bootstrap(newer)
    assert (run.returncode, run.stderr) == (0, "")
    assert_in_place(machine, newer, 8)


# ---------------------------------------------------------------- lists that lie
def rewritten(change: Callable[[dict[str, object]], object]) -> Callable[[Path], None]:
    def do(part: Path) -> None:
        path = part / manifest.MEDIUM
        document = json.loads(path.read_text())
        change(document)
        rows = document.pop("files")
        path.unlink()
        path.write_text(manifest.document(document, rows))

    return do


def without(path: str) -> Callable[[dict[str, object]], object]:
    def change(document: dict[str, object]) -> None:
        document["files"] = [row for row in document["files"] if row["path"] != path]  # type: ignore[attr-defined]

    return change


def with_row(path: str) -> Callable[[dict[str, object]], object]:
    return lambda document: document["files"].append({"path": path, "medium": 2, "size": 1})  # type: ignore[attr-defined]


# What the list of medium 1 claims, and a word of the message.
LIES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a file that it does not have": (
        rewritten(with_row("models/small/shard-9")),
        "1 files that were not signed",
    ),
    "a file of the host": (rewritten(with_row("../../../etc/passwd")), "1 files that were not signed"),
    "that a file is on no medium": (
        rewritten(without("models/small/shard-3")),
        "are neither on its media nor here",
    ),
    "that it does not have its file": (
        rewritten(without("models/small/shard-1")),
        "not in the manifest: models/small/shard-1",
    ),
    "that it is another medium": (
        rewritten(lambda document: document.update(medium=2)),
        "not in the manifest: ",
    ),
    "to be of another bundle": (
        rewritten(lambda document: document.update(manifest="0" * 64)),
        "belongs to another bundle",
    ),
    "a number that is none": (
        rewritten(lambda document: document.update(medium="1; rm -rf /")),
        "cannot be read",
    ),
    "no number": (rewritten(lambda document: document.update(of="")), "cannot be read"),
    "nothing": (lambda part: (part / manifest.MEDIUM).write_text("{}"), "cannot be read"),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("lie", LIES)
def test_a_list_that_claims(lie: str, machine: Machine, parts: list[Path], tmp_path: Path) -> None:
    do, words = LIES[lie]
    do(parts[0])
    run = machine.bootstrap(parts[0])
    assert (run.returncode, words in run.stderr) == (manifest.DAMAGED, True), run.stderr
    assert machine.accepted == []
    assert not (machine.store / ".incoming").exists()
    with pytest.raises(manifest.BundleRefused) as refusal:
        join.join(parts[0], tmp_path / "joined", [])
    assert refusal.value.code == manifest.DAMAGED
    assert not [path for path in tmp_path.iterdir() if "join" in path.name]


def test_a_list_that_sends_to_the_wrong_medium_costs_a_walk_and_no_more(
    machine: Machine, whole: Path, parts: list[Path]
) -> None:
    def swapped(document: dict[str, object]) -> None:
        for row in document["files"]:  # type: ignore[attr-defined]
            row["medium"] = {1: 1, 2: 3, 3: 2}[row["medium"]]

    rewritten(swapped)(parts[0])
    run = machine.bootstrap(parts[0])
    assert (run.returncode, "medium 3: 2 files" in run.stdout) == (manifest.INCOMPLETE, True)
    assert [machine.bootstrap(part).returncode for part in parts[1:]] == [manifest.INCOMPLETE, 0]
    assert_in_place(machine, whole)
