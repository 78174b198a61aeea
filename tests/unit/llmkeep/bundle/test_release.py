"""A release that is not exactly what the estate signed is refused, with one sentence, and nothing is changed."""

import datetime
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import sealing_double
from trained_candidate import BASE, LEARNED, MODEL, NAME, VERDICT, candidate, summed

from llmkeep import cli as llmkeep_cli
from llmkeep import durable
from llmkeep.bundle import manifest, release, signing
from llmkeep.bundle.manifest import BundleRefused
from llmkeep.bundle.release import ReleaseError
from llmkeep.errors import LlmkeepError
from llmkeep.places import Places

ROOT = Path(__file__).resolve().parents[4]


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Places:
    """A control node, which is the mirror too."""
    sealing_double.use(monkeypatch, release, release)
    release.init(found := Places(tmp_path / "root"), None)
    return found


@pytest.fixture
def signed(tmp_path: Path, places: Places) -> Path:
    """A release."""
    folder = candidate(tmp_path / "release")
    release.sign(places, folder)
    return folder


def snapshot(folder: Path) -> dict[str, bytes | str]:
    """All that lies there."""
    return {
        str(path.relative_to(folder)): str(path.readlink()) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def test_what_was_signed_is_verified_by_the_code_that_verifies_the_bundle(
    places: Places, signed: Path
) -> None:
    good = manifest.verify(signed, places.publish_public, manifest.RELEASE, highest=1)
    assert good == release.verify(places, signed, places.publish_public)
    assert (release.name_of(good), good.serial) == (NAME, 1)
    assert good.signer == signing.fingerprint(places.publish_public)
    assert {entry.licence for entry in good.files} == {"MIT"}


def test_a_bundle_that_the_publish_key_signed_is_no_release(
    places: Places, signed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert json.loads((signed / manifest.NAME).read_text())["type"] == "release"
    with monkeypatch.context() as another:
        another.setattr(manifest, "RELEASE", manifest.BUNDLE)
        release.sign(places, candidate(tmp_path / "other"))
    with pytest.raises(BundleRefused, match="signed as 'bundle', but 'release' is needed") as refusal:
        release.verify(places, tmp_path / "other", places.publish_public)
    assert refusal.value.code == manifest.UNSIGNED


def test_the_key_is_made_once_and_is_on_no_disk_but_sealed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[bytes] = []

    def seal(secret: bytes, _: str) -> bytes:
        kept.append(secret)
        return b"sealed"

    monkeypatch.setattr(release, "seal", seal)
    monkeypatch.setattr(release, "unseal", lambda *_: kept[0])
    places = Places(tmp_path / "new")
    first = release.init(places, None)
    assert release.init(places, None) == first
    assert len(kept) == 1
    assert b"PRIVATE KEY" in kept[0]
    release.sign(places, candidate(tmp_path / "release"))
    secret = kept[0].splitlines()[6]
    for path in (path for path in tmp_path.rglob("*") if path.is_file()):
        assert secret not in path.read_bytes()
        assert b"PRIVATE KEY" not in path.read_bytes()
    assert (places.publish_key.stat().st_mode & 0o777, places.publish_public.stat().st_mode & 0o777) == (
        0o400,
        0o644,
    )


def test_a_lost_key_is_not_replaced_in_silence(places: Places, tmp_path: Path) -> None:
    places.publish_key.unlink()
    with pytest.raises(ReleaseError, match="restore it from a backup"):
        release.sign(places, candidate(tmp_path / "next"))


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_power_cut_while_the_key_is_made_leaves_none_that_anybody_trusts(
    cut: int, tmp_path: Path, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [cut]

    def write(path: Path, data: bytes, mode: int) -> None:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        durable.write(path, data, mode)

    places = Places(places.root / "new")
    monkeypatch.setattr(release, "write", write)
    with pytest.raises(KeyboardInterrupt):
        release.init(places, None)
    assert not places.publish_public.exists()
    monkeypatch.setattr(release, "write", durable.write)
    release.init(places, None)
    release.sign(places, candidate(tmp_path / "release"))


def test_serials_only_rise(tmp_path: Path, places: Places) -> None:
    serials = []
    for number in range(3):
        folder = candidate(tmp_path / str(number))
        release.sign(places, folder)
        serials.append(manifest.read(folder).serial)
        shutil.rmtree(folder)
    assert serials == [1, 2, 3]
    assert durable.broken_at(places.publish_signed) is None
    assert [json.loads(line)["serial"] for line in places.publish_signed.read_text().splitlines()] == serials


# ---------------------------------------------------------------- releases that are none
def flip_a_byte(folder: Path, _: Path) -> None:
    path = folder / MODEL / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[4000] ^= 1
    path.write_bytes(content)


def flip_a_byte_of_the_manifest(folder: Path, _: Path) -> None:
    path = folder / manifest.NAME
    path.write_bytes(path.read_bytes().replace(b'"licence": "MIT"', b'"licence": "MIU"', 1))


def lose_a_file(folder: Path, _: Path) -> None:
    (folder / MODEL / "LICENSE").unlink()


def add_a_file(folder: Path, _: Path) -> None:
    (folder / MODEL / "more.json").write_text("{}")


def link_a_file(folder: Path, _: Path) -> None:
    path = folder / MODEL / "model.safetensors"
    path.rename(folder.parent / "elsewhere")
    path.symlink_to(folder.parent / "elsewhere")


def lose_the_signature(folder: Path, _: Path) -> None:
    (folder / manifest.SIGNATURE).unlink()


def sign_by_another(folder: Path, other: Path) -> None:
    shutil.copy(other / manifest.SIGNATURE, folder)
    shutil.copy(other / manifest.NAME, folder)


DAMAGE: dict[str, tuple[Callable[[Path, Path], None], int, str]] = {
    "one altered byte": (flip_a_byte, manifest.DAMAGED, "model.safetensors has sha256"),
    "an altered manifest": (flip_a_byte_of_the_manifest, manifest.UNSIGNED, "is not signed by a key of"),
    "a missing file": (lose_a_file, manifest.DAMAGED, f"missing: {MODEL}/LICENSE"),
    "an extra file": (add_a_file, manifest.DAMAGED, f"not in the manifest: {MODEL}/more.json"),
    "a symlink": (link_a_file, manifest.DAMAGED, f"not a plain file: {MODEL}/model.safetensors"),
    "no signature": (lose_the_signature, manifest.UNSIGNED, "unsigned content is not used"),
    "a foreign key": (sign_by_another, manifest.UNSIGNED, "is not signed by a key of"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_refuses_a_release_with(damage: str, tmp_path: Path, places: Places, signed: Path) -> None:
    do, code, words = DAMAGE[damage]
    other = candidate(tmp_path / "other")
    release.init(elsewhere := Places(tmp_path / "another estate"), None)
    release.sign(elsewhere, other)
    do(signed, other)
    before = snapshot(signed)
    with pytest.raises(BundleRefused) as refusal:
        release.add(places, signed, places.publish_public)
    assert (refusal.value.code, words in str(refusal.value)) == (code, True), str(refusal.value)
    assert snapshot(signed) == before
    assert not places.releases.exists()


def test_refuses_an_older_serial_than_the_mirror_had(tmp_path: Path, places: Places, signed: Path) -> None:
    newer = candidate(tmp_path / "newer", b"\2" * 5000)
    release.sign(places, newer)
    release.add(places, newer, places.publish_public)
    with pytest.raises(BundleRefused, match="serial 1 is older than 2") as refusal:
        release.add(places, signed, places.publish_public)
    assert refusal.value.code == manifest.REPLAYED
    assert (places.releases / NAME / MODEL / "model.safetensors").read_bytes() == b"\2" * 5000


def test_an_older_release_of_another_name_is_no_replay(tmp_path: Path, places: Places, signed: Path) -> None:
    newer = candidate(tmp_path / "newer", name="code-1")
    release.sign(places, newer)
    release.add(places, newer, places.publish_public)
    release.add(places, signed, places.publish_public)
    assert [line.split()[0] for line in release.listed(places).splitlines()] == ["code-1", NAME]


def test_refuses_a_release_that_expired(places: Places, signed: Path) -> None:
    later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=366)
    with pytest.raises(BundleRefused, match="expired at") as refusal:
        release.verify(places, signed, places.publish_public, later)
    assert refusal.value.code == manifest.EXPIRED


@pytest.mark.parametrize("profile", ["lab", "release ../../etc", "release other-1"])
def test_what_was_signed_as_something_else_is_no_release(
    profile: str, tmp_path: Path, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = candidate(tmp_path / "release")
    honest = manifest.write

    def lying(where: Path, made: manifest.Manifest) -> None:
        made.profile = profile
        honest(where, made)

    monkeypatch.setattr(manifest, "write", lying)
    release.sign(places, folder)
    with pytest.raises(BundleRefused) as refusal:
        release.verify(places, folder, places.publish_public)
    assert refusal.value.code == manifest.DAMAGED


# ---------------------------------------------------------------- the mirror
def test_what_is_added_is_served_whole_and_readable_whatever_the_umask(places: Places, signed: Path) -> None:
    before = os.umask(0o077)
    try:
        release.add(places, signed, places.publish_public)
    finally:
        os.umask(before)
    assert snapshot(places.releases / NAME) == snapshot(signed)
    release.verify(places, places.releases / NAME, places.publish_public)
    model = places.releases / NAME / MODEL
    assert {path.stat().st_mode & 0o777 for path in model.iterdir()} == {0o644}
    assert {path.stat().st_mode & 0o777 for path in (places.releases, places.releases / NAME, model)} == {
        0o755
    }
    release.add(places, signed, places.publish_public)
    assert sorted(path.name for path in places.releases.iterdir()) == [f".{NAME}-1", NAME]


def test_a_newer_release_takes_the_place_of_the_one_before(
    tmp_path: Path, places: Places, signed: Path
) -> None:
    release.add(places, signed, places.publish_public)
    newer = candidate(tmp_path / "newer", b"\2" * 5000)
    release.sign(places, newer)
    release.add(places, newer, places.publish_public)
    assert sorted(path.name for path in places.releases.iterdir()) == [f".{NAME}-2", NAME]
    assert snapshot(places.releases / NAME) == snapshot(newer)


def test_a_copy_that_breaks_off_leaves_what_was_served(
    tmp_path: Path, places: Places, signed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release.add(places, signed, places.publish_public)
    before = snapshot(places.releases)
    newer = candidate(tmp_path / "newer", b"\2" * 5000)
    release.sign(places, newer)
    (newer / MODEL / "model.safetensors").chmod(0o666)  # so that it is copied

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(OSError, match="No space"):
        release.add(places, newer, places.publish_public)
    assert snapshot(places.releases) == before


def test_a_release_on_the_mirrors_disk_takes_no_space_twice(places: Places, signed: Path) -> None:
    release.add(places, signed, places.publish_public)
    own, served = signed / MODEL / "model.safetensors", places.releases / NAME / MODEL / "model.safetensors"
    assert own.samefile(served)


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file to another user: run it as root")
@pytest.mark.parametrize("change", [lambda path: path.chmod(0o664), lambda path: os.chown(path, 1234, 0)])
def test_a_file_that_others_can_change_is_copied(
    change: Callable[[Path], None], places: Places, signed: Path
) -> None:
    own, served = signed / MODEL / "model.safetensors", places.releases / NAME / MODEL / "model.safetensors"
    change(own)
    release.add(places, signed, places.publish_public)
    assert not own.samefile(served)
    assert served.read_bytes() == own.read_bytes()


def test_the_space_is_checked_before_anything_is_copied(
    places: Places, signed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (signed / MODEL / "model.safetensors").chmod(0o666)
    usage = shutil.disk_usage(signed)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=release.MARGIN + 4999))
    with pytest.raises(ReleaseError, match="make room"):
        release.add(places, signed, places.publish_public)
    assert not list(places.releases.iterdir())


# ---------------------------------------------------------------- candidates
def pickled(folder: Path) -> None:
    (folder / MODEL / "optimizer.pt").write_bytes(b"\x80")
    summed(folder)


def without_weights(folder: Path) -> None:
    (folder / MODEL / "model.safetensors").unlink()
    summed(folder)


def judged(folder: Path, **changes: object) -> None:
    (folder / MODEL / "verdict.json").write_text(json.dumps(VERDICT | changes))
    summed(folder)


def a_link(folder: Path) -> None:
    (folder / MODEL / "notes.txt").symlink_to("/etc/hostname")


def a_second_model(folder: Path) -> None:
    shutil.copytree(folder / MODEL, folder / "models/other")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: flip_a_byte(folder, folder), "its manifest says"),
        (lambda folder: lose_a_file(folder, folder), "LICENSE is missing"),
        (lambda folder: add_a_file(folder, folder), "more.json is not in its manifest"),
        (lambda folder: (folder / "stray.txt").write_text("x"), "stray.txt is not in its manifest"),
        (a_link, "is not a plain file"),
        (pickled, "is not a model file"),
        (without_weights, "has no weights"),
        (lambda folder: judged(folder, verdict="hold"), "neither a promotion nor a reason"),
        (
            lambda folder: judged(folder, new={"model": BASE, "adapter": "3" * 64}),
            r"verdict\.json is about other weights",
        ),
        (lambda folder: judged(folder, new={"model": LEARNED, "adapter": None}), "is about other weights"),
        (a_second_model, "is not a candidate"),
        (lambda folder: shutil.rmtree(folder), "is not a candidate"),
        (lambda folder: (folder / MODEL / "training.json").write_text("{}"), "is not a complete candidate"),
    ],
    ids=[
        "altered",
        "missing",
        "extra",
        "stray",
        "link",
        "pickle",
        "no weights",
        "held",
        "a verdict on another adapter",
        "a verdict on a whole model",
        "two",
        "none",
        "no training",
    ],
)
def test_a_candidate_that_is_not_whole_gets_no_signature(
    change: Callable[[Path], object], words: str, tmp_path: Path, places: Places
) -> None:
    folder = candidate(tmp_path / "release")
    change(folder)
    with pytest.raises(ReleaseError, match=words):
        release.sign(places, folder)
    assert not (folder / manifest.SIGNATURE).exists()
    assert not places.publish_serial.exists()


def test_what_is_not_proved_better_is_signed_only_with_its_reason_and_says_so(
    tmp_path: Path, places: Places
) -> None:
    folder = candidate(tmp_path / "silent", verdict="")
    (folder / MODEL / "training.json").write_text('{"published": {"base": "1"}}')
    summed(folder)
    with pytest.raises(ReleaseError, match="neither a promotion nor a reason"):
        release.sign(places, folder)
    folder = candidate(tmp_path / "said")
    told = {"base": "1" * 64, "licence": "MIT", "unproved": "the pilot of tenant blue"}
    (folder / MODEL / "training.json").write_text(json.dumps({"published": told}))
    summed(folder)
    assert "NOT proved better than its base: the pilot of tenant blue" in release.sign(places, folder)
    assert json.loads(places.publish_signed.read_text())["unproved"] == "the pilot of tenant blue"


def test_a_verdict_on_a_model_that_learned_whole_is_one_on_that_model(tmp_path: Path, places: Places) -> None:
    folder = candidate(tmp_path / "release", merged={})
    with pytest.raises(ReleaseError, match="is about other weights"):
        release.sign(places, folder)
    judged(folder, new={"model": LEARNED, "adapter": None})
    assert "promoted by its gate" in release.sign(places, folder)


def test_the_verdict_is_among_what_is_signed(places: Places, signed: Path) -> None:
    judged(signed, reasons=["written afterwards"])
    with pytest.raises(BundleRefused, match=r"verdict\.json"):
        release.verify(places, signed, places.publish_public)


def test_a_signature_that_cannot_be_made_leaves_no_manifest(
    tmp_path: Path, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = candidate(tmp_path / "release")
    monkeypatch.setattr(release, "unseal", lambda *_: b"no key")
    with pytest.raises(LlmkeepError, match="the publish key is not a private OpenPGP key: restore"):
        release.sign(places, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["models"]


PUBLISHED = """
import json, sys
from pathlib import Path
from tiny import make_model
from llmcore.manifest import verified, write_manifest
from llmtrain.cli import main
folder = Path(sys.argv[1])
for name in ("base", "job/model"):
    make_model(folder / name)
    write_manifest(folder / name, (folder / name).parent / f"{Path(name).name}.sha256")
told = {"job": {"model": str(folder / "base")}, "base_model": {"revision": verified(folder / "base")[:16]}}
(folder / "job/training.json").write_text(json.dumps(told))
more = ["--name", sys.argv[2], "--licence", "MIT", "--unproved", "a test"]
sys.exit(main(["publish", str(folder / "job"), "--into", str(folder / "candidate"), *more]))
"""


def test_what_llm_train_publishes_is_what_is_signed_and_added(tmp_path: Path, places: Places) -> None:
    argv = [str(ROOT / "payload/.venv/bin/python"), "-c", PUBLISHED, str(tmp_path), NAME]
    done = subprocess.run(
        argv, cwd=ROOT / "payload/tests/helpers", capture_output=True, text=True, check=False
    )
    if "python3-torch is not installed" in done.stderr:
        pytest.skip("Debian's python3-torch is not installed")
    assert done.returncode == 0, done.stderr
    assert "NOT proved better than its base: a test" in release.sign(places, tmp_path / "candidate")
    release.add(places, tmp_path / "candidate", places.publish_public)
    assert (places.releases / NAME / MODEL / "model.safetensors").is_file()


def test_the_command_tells_each_refusal_by_its_exit_code(
    tmp_path: Path, places: Places, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = candidate(tmp_path / "release")
    monkeypatch.setattr(release, "Places", lambda: Places(tmp_path / "new"))
    assert llmkeep_cli.main(["release", "verify", str(folder)]) == 1
    assert "with --keyring" in capsys.readouterr().err
    assert llmkeep_cli.main(["release", "sign", str(folder)]) == 1
    assert "with `llmkeep release init`" in capsys.readouterr().err
    monkeypatch.setattr(release, "Places", lambda: places)
    for verb in ("sign", "verify", "add"):
        assert llmkeep_cli.main(["release", verb, str(folder)]) == 0
    assert f"release {NAME}, serial 1" in capsys.readouterr().out
    assert llmkeep_cli.main(["release", "list"]) == 0
    assert f"{NAME}  serial 1" in capsys.readouterr().out
    assert llmkeep_cli.main(["release", "sign", str(folder)]) == 1
    assert "is signed already" in capsys.readouterr().err
    places.publish_seen(NAME).write_text("2\n")
    assert llmkeep_cli.main(["release", "verify", str(folder)]) == manifest.REPLAYED
    flip_a_byte(folder, folder)
    places.publish_seen(NAME).write_text("1\n")
    assert llmkeep_cli.main(["release", "verify", str(folder)]) == manifest.DAMAGED
    lose_the_signature(folder, folder)
    assert llmkeep_cli.main(["release", "verify", str(folder)]) == manifest.UNSIGNED
    assert "llmkeep: refused: " in capsys.readouterr().err
