"""mirror_copy: what a mirror on a host of its own has of the control node's bundle, releases and images."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bundle_mirror import WEIGHTS, Served
from called_module import called
from plugin_modules import load

module = load("modules.mirror_copy")
Copied = Callable[..., dict[str, Any]]


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def sign(state: Served, place: str, kind: str, serial: int, files: dict[str, bytes]) -> None:
    """Have the control node serve a folder at PLACE, signed as KIND."""
    listed = [{"path": path, "size": len(data), "sha256": sha256(data)} for path, data in files.items()]
    document = {"type": kind, "serial": serial, "files": listed}
    state.files |= {f"{place}{path}": data for path, data in files.items()}
    state.files |= {
        f"{place}MANIFEST.json": json.dumps(document).encode(),
        f"{place}MANIFEST.json.sig": b"signed",
    }


def add_image(state: Served, layer: bytes) -> str:
    """Have the control node serve an image with one layer beside a shared one; its digest, without `sha256:`."""

    def blob(content: bytes) -> dict[str, Any]:
        state.files[f"v2/llmkeep/blobs/sha256%3A{sha256(content)}"] = content
        return {"digest": f"sha256:{sha256(content)}", "size": len(content)}

    documents = [
        json.dumps({"config": blob(b"{}"), "layers": [blob(b"shared"), blob(each)]}).encode()
        for each in (layer, b"bill of materials")
    ]
    image, bill = (blob(document)["digest"] for document in documents)
    name: str = image.removeprefix("sha256:")
    record = json.dumps({"type": "image", "digest": image, "sbom": bill}).encode()
    state.files |= {f"images/{name}/image.json": record, f"images/{name}/image.json.sig": b"signed"}
    return name


@pytest.fixture
def copied(served: Served, certificate: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Copied:
    """A run of the module, of a control node that has bundle 7."""
    served.files = {}
    sign(served, "", "bundle", 7, {"apt/InRelease": b"index", "models/m/weights": WEIGHTS})
    for name, suffix in (("cert.pem", ".pem"), ("key.pem", ".key")):
        shutil.copy(certificate / name, tmp_path / f"host{suffix}")
    (tmp_path / "keyring").touch()
    trust = {"ca": certificate / "cert.pem", "certificate": tmp_path / "host.pem"}
    trust |= dict.fromkeys(("keyring", "publish_keyring"), tmp_path / "keyring")

    def run(**given: Any) -> dict[str, Any]:
        words = {name: str(path) for name, path in trust.items()} | {
            "url": served.url,
            "root": str(tmp_path / "srv"),
        }
        return called(module, words | given, capsys)

    return run


def contents(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and not path.name.startswith(("MANIFEST", "image.json"))
    }


def test_a_bundle_is_copied_whole_and_only_once(served: Served, copied: Copied, tmp_path: Path) -> None:
    assert copied(_ansible_check_mode=True)["copied"] == ["bundle 7"]
    assert not (tmp_path / "srv").exists()
    assert copied()["copied"] == ["bundle 7"]
    assert (tmp_path / "srv/bundle/current").readlink() == Path("7")
    assert contents(tmp_path / "srv/bundle/7") == {"apt/InRelease": b"index", "models/m/weights": WEIGHTS}
    served.asked.clear()
    assert not copied()["changed"]
    assert {path for path, _ in served.asked} == {"/MANIFEST.json", "/MANIFEST.json.sig"}


def test_the_next_bundle_takes_what_is_here_and_the_bundle_before_stays(
    served: Served, copied: Copied, tmp_path: Path
) -> None:
    for serial in (7, 8, 9):
        served.asked.clear()
        sign(
            served, "", "bundle", serial, {"apt/InRelease": b"index %d" % serial, "models/m/weights": WEIGHTS}
        )
        assert copied()["copied"] == [f"bundle {serial}"]
    assert "/models/m/weights" not in {path for path, _ in served.asked}
    assert sorted(path.name for path in (tmp_path / "srv/bundle").iterdir()) == ["8", "9", "current"]
    weights = [tmp_path / f"srv/bundle/{serial}/models/m/weights" for serial in (8, 9)]
    assert weights[0].samefile(weights[1])


def test_a_file_that_is_not_as_signed_is_never_served(served: Served, copied: Copied, tmp_path: Path) -> None:
    served.files["apt/InRelease"] = b"other"
    failed = copied()
    assert "/apt/InRelease has sha256" in failed["msg"]
    assert "the signed manifest says" in failed["msg"]
    assert not (tmp_path / "srv/bundle/7").exists()
    assert not (tmp_path / "srv/bundle/current").exists()


def test_an_interrupted_copy_goes_on(served: Served, copied: Copied, tmp_path: Path) -> None:
    whole = served.files.pop("models/m/weights")
    assert "answered 404" in copied()["msg"]
    served.files["models/m/weights"] = whole
    served.asked.clear()
    assert copied()["changed"]
    assert "/apt/InRelease" not in {path for path, _ in served.asked}
    assert [path.name for path in (tmp_path / "srv/bundle").glob(".*")] == []


def test_an_older_bundle_is_refused(served: Served, copied: Copied, tmp_path: Path) -> None:
    copied()
    sign(served, "", "bundle", 6, {"apt/InRelease": b"index"})
    assert (
        "has the bundle 6, and this mirror has 7: an old bundle reintroduces fixed vulnerabilities"
        in copied()["msg"]
    )
    assert (tmp_path / "srv/bundle/current").readlink() == Path("7")


def test_a_damaged_file_is_replaced_by_a_deep_run(copied: Copied, tmp_path: Path) -> None:
    copied()
    weights = tmp_path / "srv/bundle/7/models/m/weights"
    weights.write_bytes(WEIGHTS[:-1] + b"x")
    assert not copied()["changed"]
    assert copied(deep=True)["copied"] == ["bundle 7"]
    assert weights.read_bytes() == WEIGHTS


def test_a_release_is_replaced_by_its_next_one_and_stays_without_it(
    served: Served, copied: Copied, tmp_path: Path
) -> None:
    for serial in (1, 2):
        sign(
            served, "releases/support/", "release", serial, {"models/support/weights": b"release %d" % serial}
        )
        assert "releases/support" in copied(releases=["support"])["copied"]
    assert not copied(releases=["support"])["changed"]
    assert not copied()["changed"]
    assert contents(tmp_path / "srv/releases/support") == {"models/support/weights": b"release 2"}
    assert sorted(path.name for path in (tmp_path / "srv/releases").iterdir()) == [".support-2", "support"]


def test_a_release_that_its_key_signed_as_something_else_is_refused(served: Served, copied: Copied) -> None:
    sign(served, "releases/support/", "bundle", 1, {"models/support/weights": b"release"})
    assert "is signed as 'bundle', and 'release' is needed" in copied(releases=["support"])["msg"]


def test_images_are_those_of_the_control_node(served: Served, copied: Copied, tmp_path: Path) -> None:
    first, second = add_image(served, b"first"), add_image(served, b"second")
    assert copied(images=[first, second])["copied"] == ["bundle 7", f"images/{first}", f"images/{second}"]
    assert not copied(images=[first, second])["changed"]
    assert copied(images=[second], _ansible_check_mode=True)["removed"] == [first]
    assert copied(images=[second])["removed"] == [first]
    blobs = {path.name for path in (tmp_path / "srv/images/.blobs").iterdir()}
    assert sha256(b"first") not in blobs
    assert {second, sha256(b"second"), sha256(b"shared"), sha256(b"bill of materials")} < blobs


def test_a_damaged_blob_is_replaced_by_a_deep_run(served: Served, copied: Copied, tmp_path: Path) -> None:
    name = add_image(served, b"first")
    copied(images=[name])
    layer = tmp_path / "srv/images/.blobs" / sha256(b"first")
    layer.write_bytes(b"FIRST")
    assert copied(images=[name], deep=True)["copied"] == [f"images/{name}"]
    assert layer.read_bytes() == b"first"
    assert not copied(images=[name], deep=True)["changed"]


def test_a_blob_that_is_not_as_its_digest_says_is_refused(
    served: Served, copied: Copied, tmp_path: Path
) -> None:
    name = add_image(served, b"first")
    served.files[f"v2/llmkeep/blobs/sha256%3A{name}"] = b"{}"
    assert f"has other content for sha256:{name}" in copied(images=[name])["msg"]
    assert not (tmp_path / f"srv/images/{name}/image.json").exists()


@pytest.mark.parametrize("given", [{"releases": ["../etc"]}, {"images": ["latest"]}])
def test_names_that_lead_elsewhere_are_refused(given: dict[str, list[str]], copied: Copied) -> None:
    assert "which is not a valid name" in copied(**given)["msg"]


def test_check_mode_asks_nothing_before_the_host_trusts_the_control_node(
    served: Served, copied: Copied, tmp_path: Path
) -> None:
    (tmp_path / "host.pem").unlink()
    assert copied(_ansible_check_mode=True)["changed"]
    assert served.asked == []
