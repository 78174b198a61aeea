"""A release over several media, and what a newer one has beyond an older one."""

import json
import shutil
import tempfile
from pathlib import Path

import model_add
import model_media
import pytest
import sealing_double
from model_media import NAME, SHARDS, SIZE, SUMS, lose_a_shard

from llmkeep import cli
from llmkeep.bundle import cache, join, manifest, media, release
from llmkeep.bundle.manifest import BundleRefused
from llmkeep.places import Places


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Places:
    """A control node, which is the mirror too."""
    sealing_double.use(monkeypatch, release, release)
    release.init(found := Places(tmp_path / "root"), None)
    return found


@pytest.fixture
def signed(tmp_path: Path, places: Places) -> Path:
    folder = model_media.candidate(tmp_path)
    release.sign(places, folder)
    return folder


def newer(signed: Path, places: Places, folder: Path) -> Path:
    """The same model with another last shard, signed anew."""
    shutil.copytree(signed, folder)
    for name in (manifest.NAME, manifest.SIGNATURE):
        (folder / name).unlink()
    damaged_shard = folder / SHARDS[2]
    damaged_shard.write_bytes(damaged_shard.read_bytes()[:-1] + b"x")
    told = model_add.provenance(folder)
    told["files"][Path(SHARDS[2]).name] = cache.sha256(damaged_shard)
    (folder / f"models/{NAME}/provenance.json").write_text(json.dumps(told))
    names = [line.split("  ")[1] for line in (folder / SUMS).read_text().splitlines()]
    (folder / SUMS).write_text(
        "".join(f"{cache.sha256(folder / f'models/{NAME}' / name)}  {name}\n" for name in names)
    )
    release.sign(places, folder)
    return folder


def test_each_medium_of_a_release_is_verified_by_its_signature(
    signed: Path, places: Places, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    media.split(signed, tmp_path / "out", SIZE)
    key = str(places.publish_public)
    assert cli.main(["release", "verify", str(tmp_path / "out/1"), "--keyring", key]) == 0
    said = capsys.readouterr().out
    assert f"release {NAME} serial 1, medium 1 of 2, " in said
    assert "all as signed by " in said
    assert cli.main(["bundle", "verify", str(tmp_path / "out/1"), "--keyring", key]) == manifest.UNSIGNED
    assert "is signed as 'release', but 'bundle' is needed" in capsys.readouterr().err
    lose_a_shard(next(path.parents[2] for path in tmp_path.glob("out/*/models/*/model-00002*")))
    codes = {
        cli.main(["release", "verify", str(part), "--keyring", key]) for part in (tmp_path / "out").iterdir()
    }
    assert codes == {0, manifest.DAMAGED}


def test_a_delta_of_a_release_carries_what_changed_and_links_the_rest(
    signed: Path, places: Places, tmp_path: Path
) -> None:
    release.add(places, signed, places.publish_public)
    media.split(newer(signed, places, tmp_path / "newer"), tmp_path / "delta", None, signed)
    delta, joined = tmp_path / "delta/1", places.root / "srv/joined"
    new = {"model-00003-of-00003.safetensors", "provenance.json", f"{NAME}.sha256"}
    assert {Path(path).name for path in manifest.walk(delta)} == {
        *new,
        manifest.MEDIUM,
        manifest.NAME,
        manifest.SIGNATURE,
    }
    with pytest.raises(
        BundleRefused,
        match=rf"it is a delta from release {NAME} serial 1 \(manifest [0-9a-f]{{64}}\): name that",
    ) as refusal:
        join.join(delta, joined, [])
    assert (refusal.value.code, joined.parent.exists()) == (manifest.FOREIGN, True)
    join.join(delta, joined, join.here(places))
    assert model_add.contents(joined) == model_add.contents(tmp_path / "newer")
    old = places.releases / NAME / SHARDS[0]
    assert (joined / SHARDS[0]).samefile(old)
    inode = old.stat().st_ino
    release.add(places, joined, places.publish_public)
    assert (places.releases / NAME / SHARDS[0]).stat().st_ino == inode


def test_what_is_damaged_in_the_release_in_use_is_not_taken_from_it(
    signed: Path, places: Places, tmp_path: Path
) -> None:
    release.add(places, shutil.copytree(signed, tmp_path / "first"), places.publish_public)
    media.split(newer(signed, places, tmp_path / "newer"), tmp_path / "delta", None, signed)
    victim = places.releases / NAME / SHARDS[0]
    victim.write_bytes(victim.read_bytes()[:-1] + b"x")
    with pytest.raises(BundleRefused, match="1 files on this host are damaged: use a full one"):
        join.join(tmp_path / "delta/1", tmp_path / "joined", join.here(places))
    join.join(tmp_path / "newer", tmp_path / "joined", join.here(places))
    assert model_add.contents(tmp_path / "joined") == model_add.contents(tmp_path / "newer")


def test_a_release_from_another_disk_takes_only_what_the_mirror_lacks(signed: Path, places: Places) -> None:
    release.add(places, signed, places.publish_public)
    inode = (places.releases / NAME / SHARDS[0]).stat().st_ino
    with tempfile.TemporaryDirectory(dir="/dev/shm") as disk:
        release.add(places, newer(signed, places, Path(disk, "newer")), places.publish_public)
    assert (places.releases / NAME / SHARDS[0]).stat().st_ino == inode
