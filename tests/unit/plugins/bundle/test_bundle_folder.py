"""bundle_folder, bundle_program and release against a mirror of our own: TLS, ranges, and what can be wrong with it."""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from bundle_mirror import FLOOD, WEIGHTS, Served, publish
from called_module import called
from plugin_modules import load
from waiting import PATIENCE

bundle_folder = load("modules.bundle_folder")
bundle_program = load("modules.bundle_program")
release = load("modules.release")
mirror = load("module_utils.bundle.mirror")


def bring(state: Served, certificate: Path, dest: Path) -> bool:
    """One run of the module on plain folders; whether it changed anything."""
    source = mirror.Mirror(state.url, certificate / "cert.pem", Path("/keyring"))
    entries = mirror.entries(source.manifest("bundle"), "models/m")
    wanted = {entry.path.removeprefix("models/m/"): entry for entry in entries}
    if bundle_folder.is_there(dest, wanted, deep=False):
        return False
    bundle_folder.install(source, dest, wanted, ["llm-engine@m.service"])
    assert bundle_folder.is_there(dest, wanted, deep=True)
    return True


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to a service")
def test_a_service_that_owns_the_folder_above_gets_no_file_of_root_opened(
    served: Served, certificate: Path, tmp_path: Path
) -> None:
    """A training job renamed the folder of the models, and put a link in the place of a verified file."""
    secret = tmp_path / "shadow"
    secret.write_text("root:secret")
    secret.chmod(0o600)
    above = tmp_path / "training"
    assert bring(served, certificate, above / "models/m")
    os.chown(above, 65534, 65534)
    (above / "models").rename(above / "aside")
    (above / "models/.m.partial").mkdir(parents=True)
    (above / "models/.m.partial/model.safetensors").symlink_to(secret)
    os.chown(above / "models", 65534, 65534)
    with pytest.raises(OSError, match="root changes nothing below"):
        bring(served, certificate, above / "models/m")
    assert (secret.read_text(), secret.stat().st_mode & 0o777) == ("root:secret", 0o600)


def test_fetches_once_and_leaves_it_read_only(served: Served, certificate: Path, tmp_path: Path) -> None:
    dest = tmp_path / "models/m"
    assert bring(served, certificate, dest)
    assert (dest / "model.safetensors").read_bytes() == WEIGHTS
    assert {path.stat().st_mode & 0o777 for path in dest.rglob("*") if path.is_file()} == {0o444}
    check = ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"]
    assert subprocess.run(check, cwd=dest, check=False).returncode == 0
    assert not bring(served, certificate, dest)
    assert [path.name for path in (tmp_path / "pending").iterdir()] == ["llm-engine@m.service"]


def test_goes_on_where_the_connection_broke(
    served: Served, certificate: Path, tmp_path: Path, journal: list[str]
) -> None:
    dest = tmp_path / "models/m"
    served.cut_after = 500_000
    assert bring(served, certificate, dest)
    assert journal == ["m: 0.0 of 0.0 GB, fetching the rest", "m: all 0.0 GB are here, after 0 s"]
    assert ("/models/m/model.safetensors", "bytes=500000-") in served.asked


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds for which a fetch waited, which take no time here."""
    seconds: list[float] = []
    # Not `time` itself, by which other threads sleep too.
    monkeypatch.setattr(mirror, "time", SimpleNamespace(**vars(time) | {"sleep": seconds.append}))
    return seconds


def test_waits_for_a_mirror_that_serves_others_and_goes_on_where_it_was(
    served: Served, certificate: Path, tmp_path: Path, slept: list[float]
) -> None:
    """More often busy than a download may break off."""
    served.busy = 2 * mirror.TRIES
    left = tmp_path / "models/.m.partial/model.safetensors.partial"
    left.parent.mkdir(parents=True)
    left.write_bytes(WEIGHTS[:500_000])
    assert bring(served, certificate, tmp_path / "models/m")
    assert len(slept) == 2 * mirror.TRIES
    assert all(10 <= seconds <= 30 for seconds in slept)
    assert served.asked[-1] == ("/models/m/sub/config.json", None)
    assert ("/models/m/model.safetensors", "bytes=500000-") in served.asked


def test_a_mirror_that_stays_busy_is_told(
    served: Served, certificate: Path, tmp_path: Path, slept: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "PATIENCE", 100)
    served.busy = 1000
    with pytest.raises(mirror.MirrorError, match=r"serves as many downloads .* raise mirror_downloads"):
        bring(served, certificate, tmp_path / "models/m")
    assert 100 <= sum(slept) <= 130


def test_an_interrupted_shard_is_refused_where_the_rest_is_of_another_file(
    served: Served, certificate: Path, tmp_path: Path
) -> None:
    left = tmp_path / "models/.m.partial/model.safetensors.partial"
    left.parent.mkdir(parents=True)
    left.write_bytes(WEIGHTS[:500_000])
    served.files["models/m/model.safetensors"] = WEIGHTS[:-1] + b"X"
    with pytest.raises(mirror.MirrorError, match="the signed manifest says"):
        bring(served, certificate, tmp_path / "models/m")
    assert not (tmp_path / "models/m").exists()
    assert not left.exists()


def test_a_disk_without_room_for_the_rest_is_told_before_anything_is_fetched(
    served: Served, certificate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(mirror.MirrorError, match="GB are to be copied: make room"):
        bring(served, certificate, tmp_path / "models/m")
    assert all("MANIFEST" in path for path, _ in served.asked)


def test_refuses_a_flipped_bit_and_keeps_what_was_there(
    served: Served, certificate: Path, tmp_path: Path
) -> None:
    dest = tmp_path / "models/m"
    bring(served, certificate, dest)
    publish(served, {"model.safetensors": WEIGHTS + b"newer", "sub/config.json": b"{}"})
    served.files["models/m/model.safetensors"] = b"X" + WEIGHTS[1:] + b"newer"
    with pytest.raises(mirror.MirrorError, match="the signed manifest says"):
        bring(served, certificate, dest)
    assert (dest / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize(
    ("path", "status", "said"),
    [
        ("/MANIFEST.json", 200, "MANIFEST.json is longer than 16777216 bytes"),
        ("/MANIFEST.json.sig", 200, "MANIFEST.json.sig is longer than 65536 bytes"),
        ("/models/m/model.safetensors", 200, "is longer than the 1280000 bytes in the signed manifest"),
        ("/models/m/model.safetensors", 404, "answered 404"),
    ],
)
def test_a_mirror_that_answers_without_end_is_not_read_to_the_end(
    served: Served, certificate: Path, tmp_path: Path, path: str, status: int, said: str
) -> None:
    served.endless[path] = status
    with pytest.raises(mirror.MirrorError, match=said):
        bring(served, certificate, tmp_path / "m")
    assert served.hung_up.wait(PATIENCE)
    assert served.flooded < FLOOD // 4


def test_refuses_a_manifest_that_nobody_signed(served: Served, certificate: Path, tmp_path: Path) -> None:
    served.files["MANIFEST.json.sig"] = b"somebody else"
    with pytest.raises(mirror.MirrorError, match="no valid signature"):
        bring(served, certificate, tmp_path / "m")


def test_refuses_a_manifest_that_the_same_key_signed_as_something_else(
    served: Served, certificate: Path
) -> None:
    document = json.loads(served.files["MANIFEST.json"])
    served.files["MANIFEST.json"] = json.dumps(document | {"type": "image"}).encode()
    source = mirror.Mirror(served.url, certificate / "cert.pem", Path("/keyring"))
    with pytest.raises(mirror.MirrorError, match="is signed as 'image', and 'bundle' is needed"):
        source.manifest("bundle")


def test_refuses_a_mirror_whose_certificate_is_not_of_the_estate(
    served: Served, certificate: Path, tmp_path: Path
) -> None:
    with pytest.raises(mirror.MirrorError, match="certificate"):
        mirror.Mirror(
            served.url.replace("localhost", "127.0.0.1"), certificate / "cert.pem", tmp_path
        ).manifest("bundle")


def rewrite(path: Path, text: str) -> None:
    path.chmod(0o644)
    path.write_text(text)
    path.chmod(0o444)


def test_a_changed_an_extra_and_a_missing_file_are_noticed(
    served: Served, certificate: Path, tmp_path: Path
) -> None:
    dest = tmp_path / "models/m"
    for harm in (
        lambda: (dest / "extra").write_text("x"),
        (dest / "sub/config.json").unlink,
        lambda: (dest / "model.safetensors").chmod(0o644),
        lambda: rewrite(dest / "sub/config.json", "[]"),
    ):
        bring(served, certificate, dest)
        harm()
        assert bring(served, certificate, dest)


def program(state: Served, certificate: Path, root: Path, check: bool = False) -> bool:
    """One run of bundle_program; whether it changed anything."""
    source = mirror.Mirror(state.url, certificate / "cert.pem", Path("/keyring"))
    changed: bool
    changed, _ = bundle_program.bring(source, "opa", root, ["opa.service"], check)
    return changed


def test_a_program_is_fetched_once_and_the_one_before_stays(
    served: Served, certificate: Path, tmp_path: Path
) -> None:
    current = tmp_path / "opa/current/opa"
    for number, content in enumerate([b"first", b"second", b"third"]):
        publish(served, {"opa": content, "other": b"not asked for"}, "bin")
        assert program(served, certificate, tmp_path, check=True)
        assert program(served, certificate, tmp_path)
        assert not program(served, certificate, tmp_path)
        assert (current.read_bytes(), current.stat().st_mode & 0o777) == (content, 0o555)
        assert len(list((tmp_path / "opa").glob("*/opa"))) == [2, 3, 3][number]  # current counts twice
    assert not list(tmp_path.rglob("other"))
    assert [path.name for path in (tmp_path / "pending").iterdir()] == ["opa.service"]


def test_a_program_that_somebody_changed_is_mended(served: Served, certificate: Path, tmp_path: Path) -> None:
    publish(served, {"opa": b"first"}, "bin")
    program(served, certificate, tmp_path)
    for harm in (
        lambda path: rewrite(path, "xirst"),
        lambda path: path.chmod(0o755),
        lambda path: path.unlink(),
    ):
        harm(tmp_path / "opa/current/opa")
        assert program(served, certificate, tmp_path)
        assert (tmp_path / "opa/current/opa").read_bytes() == b"first"


def test_a_program_that_the_bundle_lacks_is_told(served: Served, certificate: Path, tmp_path: Path) -> None:
    publish(served, {"other": b"x"}, "bin")
    with pytest.raises(mirror.MirrorError, match="has no bin/opa; build it with LLMKEEP_MIRROR set"):
        program(served, certificate, tmp_path)


def test_a_release_is_named_by_what_is_in_it(served: Served, certificate: Path) -> None:
    source = mirror.Mirror(served.url, certificate / "cert.pem", Path("/keyring"))
    first = release.release_id(mirror.entries(source.manifest("bundle"), "models/m"))
    again = release.release_id(mirror.entries(source.manifest("bundle"), "models/m"))
    publish(served, {"model.safetensors": b"other"})
    other = release.release_id(mirror.entries(source.manifest("bundle"), "models/m"))
    assert first == again != other


def test_old_releases_go_and_the_previous_one_stays(tmp_path: Path) -> None:
    for number, name in enumerate(["a", "b", "c", "half"]):
        (tmp_path / name).mkdir()
        if name != "half":
            (tmp_path / name / release.RECORD).write_text("{}")
            stamp = 1_000_000 + number
            subprocess.run(["touch", "-d", f"@{stamp}", str(tmp_path / name / release.RECORD)], check=True)
    assert release.forget_old(tmp_path, {"c"}, 2) == ["a", "half"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "c"]


def test_a_release_that_is_current_or_that_a_unit_runs_stays_however_old(tmp_path: Path) -> None:
    for name in "abcd":
        (tmp_path / "releases" / name).mkdir(parents=True)
        (tmp_path / "releases" / name / release.RECORD).write_text("{}")
    (tmp_path / "units").mkdir()
    (tmp_path / "current").symlink_to("releases/b")
    (tmp_path / "units/llm-engine@m.service").symlink_to("../releases/a")
    used = release.in_use(tmp_path)
    assert used == {"a", "b"}
    assert release.forget_old(tmp_path / "releases", {*used, "d"}, 2) == ["c"]


@pytest.mark.parametrize(
    ("module", "given", "told"),
    [
        (bundle_folder, {"folders": ["models/m"], "dest": "/nonexistent"}, {"fetched": ["models/m"]}),
        (bundle_program, {"name": "opa"}, {"sha256": ""}),
        (release, {"folder": "wheels/payload"}, {"id": "unknown"}),
    ],
)
def test_check_mode_asks_no_mirror_that_the_host_does_not_trust_yet(
    module: ModuleType,
    given: dict[str, object],
    told: dict[str, object],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trust = {
        "url": "https://localhost:1",
        "ca": str(tmp_path / "root.pem"),
        "keyring": str(tmp_path / "keyring"),
    }
    answer = called(module, {**given, **trust, "_ansible_check_mode": True}, capsys)
    assert (answer["changed"], told.items() <= answer.items()) == (True, True)
    assert called(module, {**given, **trust}, capsys)["failed"]
