"""bundle_folder as roles call it: releases of the estate's own, and weights that the kernel checks from their installation on."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from bundle_mirror import WEIGHTS, Served, publish
from kernel_with_verity import KernelWithVerity
from plugin_modules import load

bundle_folder = load("modules.bundle_folder")
mirror = load("module_utils.bundle.mirror")


def release_run(
    state: Served,
    certificate: Path,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    check: bool = False,
    deep: bool = False,
) -> dict[str, Any]:
    """One run of the whole module for a release, as the role calls it; what it returned."""
    arguments = {
        "url": f"{state.url}/releases/m", "folders": ["models/m"], "dest": str(root / "models"), "seen": str(root / "seen/m"),
        "ca": str(certificate / "cert.pem"), "keyring": str(certificate / "cert.pem"), "_ansible_check_mode": check,
    }  # fmt: skip
    told: dict[str, Any] = {}

    class Ended(Exception):
        """The module said what it had to."""

    class Module:
        def __init__(self) -> None:
            self.params = {"units": [], "deep": deep, "certificate": None, **arguments}
            self.check_mode = check

        def exit_json(self, **result: Any) -> None:
            told.update(result)
            raise Ended

        def fail_json(self, msg: str) -> None:
            self.exit_json(failed=msg)

    monkeypatch.setattr(bundle_folder, "AnsibleModule", lambda **_: Module())
    with pytest.raises(Ended):
        bundle_folder.main()
    return told


@pytest.fixture
def run(
    served: Served,
    certificate: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kernel: KernelWithVerity,  # noqa: ARG001 - where the module runs
) -> Callable[..., dict[str, Any]]:
    """Runs of the module for a release that the mirror has, on a kernel with fs-verity."""
    as_release(served, 5)
    return partial(release_run, served, certificate, tmp_path, monkeypatch)


def test_weights_are_sealed_before_they_appear_and_again_when_they_were_replaced(
    run: Callable[..., Any], kernel: KernelWithVerity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as seeing:
        seeing.setattr(bundle_folder.atomic, "mark_pending", lambda _: appeared.append([*kernel.enabled]))
        appeared: list[list[str]] = []
        taken = {"changed": True, "fetched": ["models/m"], "sealed": [], "bytes": {"m": 1280000}}
        assert run() == taken
        assert appeared == [["model.safetensors"]]
    assert not run()["changed"]
    weights = tmp_path / "models/m/model.safetensors"
    shutil.copy2(weights, tmp_path / "copy")
    (tmp_path / "copy").replace(weights)
    for check in (True, False):
        assert run(check=check) == taken | {"fetched": [], "sealed": ["models/m"]}
    assert not run()["changed"]


def test_weights_that_differ_when_they_are_to_be_sealed_are_fetched_again(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    run()
    weights = tmp_path / "models/m/model.safetensors"
    shutil.copy2(weights, tmp_path / "copy")
    with (tmp_path / "copy").open("r+b") as stream:
        stream.write(b"X")
    os.utime(tmp_path / "copy", ns=(0, 0))  # as a disk that errs leaves it
    (tmp_path / "copy").replace(weights)
    assert run()["fetched"] == ["models/m"]
    assert weights.read_bytes() == WEIGHTS
    assert not run()["changed"]


def test_a_download_that_the_disk_garbled_is_not_kept(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as garbled:
        garbled.setattr(bundle_folder.verity.hashlib, "file_digest", lambda *_: hashlib.sha256(b"garbled"))
        garbled.setattr(
            mirror.atomic, "sha256_of", lambda path: hashlib.sha256(path.read_bytes()).hexdigest()
        )
        assert "the signed manifest says" in run()["failed"]
    assert [path.name for path in (tmp_path / "models/.m.partial").iterdir()] == ["SHA256SUMS"]
    assert run()["changed"]
    assert not run(check=True)["changed"]


def test_a_file_that_the_disk_no_longer_gives_is_fetched_again_by_a_deep_run(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run()
    damaged, compare = tmp_path / "models/m/model.safetensors", bundle_folder.verity.hashlib.file_digest
    number = damaged.stat().st_ino

    def file_digest(stream: Any, name: str) -> Any:
        if os.fstat(stream.fileno()).st_ino == number:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return compare(stream, name)

    def copy2(source: Path, _: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(source))

    monkeypatch.setattr(bundle_folder.verity.hashlib, "file_digest", file_digest)
    monkeypatch.setattr(bundle_folder.shutil, "copy2", copy2)
    assert not run()["changed"]
    assert run(deep=True)["fetched"] == ["models/m"]
    assert damaged.stat().st_ino != number


def as_release(
    state: Served,
    serial: int,
    expires: str = "2999-01-01T00:00:00Z",
    content: bytes = WEIGHTS,
    kind: str = "release",
) -> None:
    """Serve a release `m` of this serial, signed as `kind`."""
    publish(state, {"model.safetensors": content})
    document = json.loads(state.files["MANIFEST.json"]) | {
        "type": kind,
        "serial": serial,
        "expires": expires,
    }
    state.files["MANIFEST.json"] = json.dumps(document).encode()
    state.files = {f"releases/m/{path}": data for path, data in state.files.items()}


@pytest.mark.parametrize("kind", ["bundle", "image"])
def test_a_release_is_refused_that_its_key_signed_as_something_else(
    kind: str, served: Served, certificate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_release(served, 5, kind=kind)
    said = release_run(served, certificate, tmp_path, monkeypatch)["failed"]
    assert f"is signed as '{kind}', and 'release' is needed" in said
    assert not (tmp_path / "models/m").exists()


def test_a_release_is_never_replaced_by_an_older_one(
    served: Served, certificate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_release(served, 5)
    assert release_run(served, certificate, tmp_path, monkeypatch, check=True)["changed"]
    assert not (tmp_path / "seen/m").exists()
    assert release_run(served, certificate, tmp_path, monkeypatch) == {
        "changed": True,
        "fetched": ["models/m"],
        "sealed": [],
        "bytes": {"m": 1280000},
    }
    assert not release_run(served, certificate, tmp_path, monkeypatch)["changed"]
    assert (tmp_path / "seen/m").read_text() == "5\n"
    as_release(served, 4, content=b"old and weak")
    assert "an old one was put back" in release_run(served, certificate, tmp_path, monkeypatch)["failed"]
    assert (tmp_path / "models/m/model.safetensors").read_bytes() == WEIGHTS


def test_a_release_that_expired_is_not_fetched_and_stays_where_it_is(
    served: Served, certificate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_release(served, 5)
    release_run(served, certificate, tmp_path, monkeypatch)
    as_release(served, 5, expires="2020-01-01T00:00:00Z")
    assert not release_run(served, certificate, tmp_path, monkeypatch)["changed"]
    as_release(served, 6, expires="2020-01-01T00:00:00Z", content=b"newer")
    assert "expired at 2020" in release_run(served, certificate, tmp_path, monkeypatch)["failed"]
    assert (tmp_path / "seen/m").read_text() == "5\n"


def test_a_release_that_the_mirror_has_not_is_to_be_added_there(
    served: Served, certificate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "`llmkeep release add`" in release_run(served, certificate, tmp_path, monkeypatch)["failed"]


def test_another_release_under_a_release_s_name_is_refused(
    served: Served, certificate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are signed by the same key: the name is in the signed paths."""
    as_release(served, 5)
    served.files = {path: data.replace(b"models/m/", b"models/other/") for path, data in served.files.items()}
    assert "nothing under models/m/" in release_run(served, certificate, tmp_path, monkeypatch)["failed"]
