"""A model over several media is the one that its maker listed, whatever the order, or it isn't there."""

import contextlib
import errno
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import model_add
import model_media
import pytest
import sealing_double
import small_bundle
from kill_points import KillPoints
from model_media import NAME, SHARDS, SIZE, SUMS, lose_a_shard

from llmkeep import cli, durable
from llmkeep.bundle import cache, join, manifest, media, release
from llmkeep.bundle.manifest import BundleRefused
from llmkeep.errors import LlmkeepError
from llmkeep.places import Places
from llmkeep.resumable import Resumable

KILLS = int(os.environ.get("STORM", "12"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `candidate` and its `media`."""
    folder = tmp_path_factory.mktemp("made")
    model_media.candidate(folder)
    media.split(folder / "candidate", folder / "media", SIZE)
    return folder


@pytest.fixture
def candidate(tmp_path: Path, made: Path) -> Path:
    return Path(shutil.copytree(made / "candidate", tmp_path / "candidate"))


@pytest.fixture
def parts(tmp_path: Path, made: Path) -> list[Path]:
    found = sorted(Path(shutil.copytree(made / "media", tmp_path / "media")).iterdir())
    assert len(found) == 2
    return found


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Places:
    """A control node, which is the mirror too."""
    sealing_double.use(monkeypatch, release, release)
    release.init(found := Places(tmp_path / "root"), None)
    return found


@pytest.fixture
def llmkeep(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Exit code and output of a command."""

    def run(*words: object) -> tuple[int, str]:
        capsys.readouterr()
        code = cli.main([*map(str, words)])
        said = capsys.readouterr()
        return code, said.out + said.err

    return run


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Another file system, of 200 kB."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "small", str(disk)], check=True)
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


# ---------------------------------------------------------------- sizes
@pytest.mark.parametrize(
    ("text", "bytes_"),
    [
        ("900G", 900 * 10**9),
        ("4.7G", 4_700_000_000),
        ("25GB", 25 * 10**9),
        ("2TiB", 2 << 40),
        ("512 kB", 512_000),
        ("77", 77),
    ],
)
def test_a_size_is_in_powers_of_1000_unless_it_says_otherwise(text: str, bytes_: int) -> None:
    assert media.size(text) == bytes_


@pytest.mark.parametrize("text", ["", "G", "-4G", "4,7G", "900 gigabytes", "1e9", "4.7.1G"])
def test_what_is_no_size_is_refused_as_that(text: str, llmkeep: Callable[..., tuple[int, str]]) -> None:
    code, said = llmkeep("bundle", "split", "x", f"--size={text}", "--out", "y")
    assert (code, "is not a size: write it as 900G" in said) == (1, True)


def test_a_size_that_is_too_small_is_refused_with_the_one_that_is_enough(
    candidate: Path, tmp_path: Path, llmkeep: Callable[..., tuple[int, str]]
) -> None:
    code, said = llmkeep("bundle", "split", candidate, "--size", "80K", "--out", tmp_path / "out")
    assert (code, SHARDS[0] in said, "in total, but --size is 80000" in said) == (1, True, True), said
    assert not (tmp_path / "out").exists()
    enough = said.split("at least ")[1].split(",")[0]
    assert llmkeep("bundle", "split", candidate, "--size", enough, "--out", tmp_path / "out")[0] == 0


@pytest.mark.parametrize("room", [100_000, 150_000, 300_000])
def test_no_medium_is_larger_than_the_size_and_together_they_are_all(
    room: int, candidate: Path, tmp_path: Path
) -> None:
    media.split(candidate, tmp_path / "out", room)
    carried = []
    for part in (tmp_path / "out").iterdir():
        used = subprocess.run(
            ["du", "--summarize", "--block-size=1", part], capture_output=True, text=True, check=True
        )
        assert int(used.stdout.split()[0]) <= room
        carried += [path for path in manifest.walk(part) if path not in (SUMS, manifest.MEDIUM)]
    assert sorted([*carried, SUMS]) == sorted(manifest.walk(candidate))


# ---------------------------------------------------------------- a candidate
def test_a_candidate_over_two_media_is_signed_by_the_digest_on_paper(
    candidate: Path,
    parts: list[Path],
    places: Places,
    tmp_path: Path,
    llmkeep: Callable[..., tuple[int, str]],
) -> None:
    digest = cache.sha256(candidate / SUMS)
    code, said = llmkeep("bundle", "verify", parts[1], "--sha256", digest)
    assert (code, f"candidate {NAME}, medium 2 of 2, " in said) == (0, True), said
    joined = tmp_path / "joined"
    code, said = llmkeep("bundle", "join", parts[1], "--into", joined)
    assert (code, "insert medium 1 of 2 (" in said, joined.exists()) == (manifest.INCOMPLETE, True, False), (
        said
    )
    assert llmkeep("bundle", "join", parts[1], "--into", joined)[0] == manifest.INCOMPLETE
    code, said = llmkeep("bundle", "join", parts[0], "--into", joined)
    assert (code, f"manifest {digest}" in said) == (0, True), said
    assert model_add.contents(joined) == model_add.contents(candidate)
    assert llmkeep("bundle", "join", parts[0], "--into", joined) == (
        0,
        f"{joined}: candidate {NAME} is already complete\n",
    )
    release.sign(places, joined, expected=digest)
    release.add(places, joined, places.publish_public)


def test_a_medium_is_neither_signed_nor_added(
    parts: list[Path], places: Places, candidate: Path, tmp_path: Path
) -> None:
    with pytest.raises(LlmkeepError, match="one medium of several"):
        release.sign(places, parts[0])
    release.sign(places, candidate)
    media.split(candidate, tmp_path / "signed", SIZE)
    with pytest.raises(BundleRefused, match="one medium of several") as refusal:
        release.add(places, tmp_path / "signed/1", places.publish_public)
    assert refusal.value.code == manifest.INCOMPLETE
    with pytest.raises(LlmkeepError, match="is a medium itself"):
        media.split(parts[0], tmp_path / "again", SIZE)


def damaged(part: Path) -> None:
    (path,) = part.glob("models/*/model-00002*")
    path.write_bytes(path.read_bytes()[:-1] + b"x")


def longer(part: Path) -> None:
    (path,) = part.glob("models/*/model-00002*")
    path.write_bytes(path.read_bytes() + b"x")


def linked(part: Path) -> None:
    (path,) = part.glob("models/*/model-00002*")
    path.rename(part.parent / "elsewhere")
    path.symlink_to(part.parent / "elsewhere")


def listed_smaller(part: Path) -> None:
    """A candidate's manifest has no sizes, so that those of the list are used."""
    text = (part / manifest.MEDIUM).read_text()
    (part / manifest.MEDIUM).write_text(re.sub(r'(model-00002.*"size": )\d+', r"\g<1>1000", text))


def stray(part: Path) -> None:
    (part / "models/more.safetensors").write_text("")


@pytest.mark.parametrize("harm", [damaged, longer, linked, lose_a_shard, listed_smaller, stray])
def test_a_harmed_medium_is_refused_and_the_others_files_are_kept(
    harm: Callable[[Path], None],
    candidate: Path,
    parts: list[Path],
    tmp_path: Path,
    llmkeep: Callable[..., tuple[int, str]],
) -> None:
    victim, other = sorted(parts, key=lambda part: not list(part.glob("models/*/model-00002*")))
    shutil.copytree(victim, tmp_path / "good")
    harm(victim)
    joined = tmp_path / "joined"
    assert llmkeep("bundle", "join", other, "--into", joined)[0] == manifest.INCOMPLETE
    for command in (
        ["verify", victim, "--sha256", cache.sha256(candidate / SUMS)],
        ["join", victim, "--into", joined],
    ):
        code, said = llmkeep("bundle", *command)
        assert (code, "model-00002" in said or "more.safetensors" in said) == (manifest.DAMAGED, True), said
    assert llmkeep("bundle", "join", tmp_path / "good", "--into", joined)[0] == 0
    assert model_add.contents(joined) == model_add.contents(candidate)


def test_a_medium_of_another_model_is_refused_and_the_begun_one_is_kept(
    candidate: Path, parts: list[Path], tmp_path: Path, llmkeep: Callable[..., tuple[int, str]]
) -> None:
    joined, aside = tmp_path / "joined", tmp_path / ".joined.joining"
    llmkeep("bundle", "join", parts[0], "--into", joined)
    before = small_bundle.snapshot(aside)
    (candidate / SUMS).write_text(
        (candidate / SUMS).read_text().replace(f"  {Path(SHARDS[2]).name}", "  other.safetensors")
    )
    (candidate / SHARDS[2]).rename(candidate / f"models/{NAME}/other.safetensors")
    media.split(candidate, tmp_path / "foreign", SIZE)
    code, said = llmkeep("bundle", "join", tmp_path / "foreign/1", "--into", joined)
    assert (code, f"or remove {aside} to abandon it" in said) == (manifest.FOREIGN, True), said
    assert small_bundle.snapshot(aside) == before
    assert llmkeep("bundle", "join", parts[1], "--into", joined)[0] == 0
    code, said = llmkeep("bundle", "join", tmp_path / "foreign/1", "--into", joined)
    assert (code, "name a folder that does not exist" in said) == (manifest.FOREIGN, True), said


def test_a_manifest_cannot_name_a_file_outside(candidate: Path, tmp_path: Path) -> None:
    """A path of the host, with the content of a file of the model: joining would link it there."""
    digest = cache.sha256(candidate / SHARDS[0])
    (tmp_path / "keys").mkdir()
    for path in (f"../../../{tmp_path.name}-evil", str(tmp_path / "evil"), "./evil"):
        shutil.copytree(candidate, tmp_path / "hostile")
        with (tmp_path / "hostile" / SUMS).open("a") as sums:
            sums.write(f"{digest}  {path}\n")
        with pytest.raises(BundleRefused, match="cannot be read") as refusal:
            join.join(tmp_path / "hostile", tmp_path / "deep/into/joined", [])
        assert refusal.value.code == manifest.DAMAGED
        shutil.rmtree(tmp_path / "hostile")
        small_bundle.write(tmp_path / "hostile", small_bundle.signing_keys(tmp_path / "keys"))
        listing = tmp_path / "hostile" / manifest.NAME
        listing.write_text(listing.read_text().replace('"path": "models/small/weights"', f'"path": "{path}"'))
        with pytest.raises(BundleRefused, match="has no valid path"):
            join.join(tmp_path / "hostile", tmp_path / "deep/into/joined", [])
        shutil.rmtree(tmp_path / "hostile")
    assert not (tmp_path / "deep").exists()


# ---------------------------------------------------------------- interrupted
def test_split_and_join_that_were_killed_anywhere_continue(made: Path) -> None:
    with tempfile.TemporaryDirectory(
        dir="/dev/shm"
    ) as folder:  # another file system than the candidate's: copies
        memory = Path(folder)
        out, joined = memory / "media", memory / "joined"
        wanted = model_add.contents(made / "candidate")
        functions = [
            (Resumable, "write"),
            (durable, "write"),
            (Path, "hardlink_to"),
            (Path, "rename"),
            (Path, "unlink"),
            (Path, "replace"),
            (os, "fsync"),
        ]
        kills = KillPoints(memory / "count", functions)

        def split() -> None:
            media.split(made / "candidate", out, SIZE)

        def put_together(number: int) -> None:
            with contextlib.suppress(BundleRefused):  # more media are needed
                join.join(out / str(number), joined, [])

        def both() -> None:
            split()
            put_together(2)
            put_together(1)

        points = kills.points(both)
        assert points > 60
        for at in range(1, points + 1, max(1, points // KILLS)):
            for path in (out, joined, memory / ".joined.joining"):
                shutil.rmtree(path, ignore_errors=True)
            assert kills.run(both, at) == "killed"
            assert not joined.exists() or model_add.contents(joined) == wanted, "it appears whole"
            assert kills.run(both) == "done", f"killed at point {at}"
            assert model_add.contents(joined) == wanted
            assert not (memory / ".joined.joining").exists()


def test_a_medium_that_is_pulled_out_is_continued_where_it_was(
    parts: list[Path],
    candidate: Path,
    tmp_path: Path,
    llmkeep: Callable[..., tuple[int, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    honest, joined = os.fsync, tmp_path / "joined"

    def pulled(descriptor: int) -> None:
        if ".joining/." in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        honest(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", pulled)
        code, said = llmkeep("bundle", "join", parts[0], "--into", joined)
    assert (code, "Input/output error: reconnect the medium" in said) == (1, True), said
    assert not joined.exists()
    assert [llmkeep("bundle", "join", part, "--into", joined)[0] for part in parts] == [
        manifest.INCOMPLETE,
        0,
    ]
    assert model_add.contents(joined) == model_add.contents(candidate)


def test_the_space_for_all_media_is_checked_before_the_first_is_copied_and_a_full_disk_is_continued(
    parts: list[Path],
    small_disk: Path,
    candidate: Path,
    llmkeep: Callable[..., tuple[int, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    joined = small_disk / "joined"
    code, said = llmkeep("bundle", "join", parts[0], "--into", joined)
    assert (code, "GB are needed: make room" in said) == (1, True), said
    assert list(small_disk.iterdir()) == []
    monkeypatch.setattr(join, "MARGIN", -(10**9))
    codes = [llmkeep("bundle", "join", part, "--into", joined) for part in parts]
    assert [code for code, _ in codes] == [manifest.INCOMPLETE, 1]
    assert "No space left on device: make room, and run it again" in codes[1][1]
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    assert llmkeep("bundle", "join", parts[1], "--into", joined)[0] == 0
    assert model_add.contents(joined) == model_add.contents(candidate)


def test_a_split_on_its_own_disk_takes_no_space_and_another_one_is_not_mixed_in(
    candidate: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    media.split(candidate, out, SIZE)
    (part,) = out.glob(f"*/{SHARDS[0]}")
    assert part.samefile(candidate / SHARDS[0])
    before = small_bundle.snapshot(out)
    with pytest.raises(LlmkeepError, match="or to another --size: remove"):
        media.split(candidate, out, 2 * SIZE)
    assert small_bundle.snapshot(out) == before


def test_a_split_to_another_disk_is_refused_without_space_and_finds_a_damaged_source(
    candidate: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(LlmkeepError, match="where they take none"):
        media.split(candidate, small_disk / "out", SIZE)
    assert list(small_disk.iterdir()) == []
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    monkeypatch.setattr(media, "MARGIN", 0)
    damaged(candidate)
    with pytest.raises(BundleRefused, match="its manifest says"):
        media.split(candidate, small_disk / "out", SIZE)
