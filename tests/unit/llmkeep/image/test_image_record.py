"""The signed record of an image, and what `llmkeep image verify` refuses."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import small_bundle
import small_image

from llmkeep.bundle import manifest, signing
from llmkeep.bundle.manifest import DAMAGED, EXPIRED, REPLAYED, UNSIGNED, BundleRefused
from llmkeep.image import archive, layout
from llmkeep.image.layout import Layout
from llmkeep.image.record import FOLDER, NAME, SIGNATURE, verify


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_bundle.signing_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def image(tmp_path: Path, keys: Path) -> Path:
    """An image of two layers with a file each."""
    return small_image.write(tmp_path / "image", keys)


def blobs(image: Path) -> list[Path]:
    """From the largest to the smallest."""
    return sorted((image / FOLDER / "blobs/sha256").iterdir(), key=lambda path: -path.stat().st_size)


def test_accepts_what_was_signed(image: Path, keys: Path) -> None:
    assert [layer.name for layer in verify(image, keys / "keyring.pgp").layers] == ["below", "above"]


def _add_a_blob(image: Path) -> None:
    (image / FOLDER / "blobs/sha256" / ("0" * 64)).write_text("more")


def _lose_a_layer(image: Path) -> None:
    record = json.loads((image / NAME).read_text())
    Layout(image / FOLDER).blob(record["layers"][0]["digest"]).unlink()


def _swap_the_index(image: Path) -> None:
    index = json.loads((image / FOLDER / "index.json").read_text())
    index["manifests"][0]["digest"] = index["manifests"][1]["digest"]
    (image / FOLDER / "index.json").write_bytes(layout.encoded(index))


def _lose_the_index(image: Path) -> None:
    (image / FOLDER / "index.json").unlink()


def test_refuses_each_flipped_bit_of_a_blob(image: Path, keys: Path) -> None:
    for blob in blobs(image):
        whole = blob.read_bytes()
        blob.chmod(0o644)
        blob.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
        with pytest.raises(BundleRefused, match=blob.name) as refused:
            verify(image, keys / "keyring.pgp")
        assert refused.value.code == DAMAGED
        blob.write_bytes(whole)
    verify(image, keys / "keyring.pgp")


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (_add_a_blob, "not in the manifest: blobs/sha256/0000"),
        (_lose_a_layer, "missing: blobs/sha256"),
        (_swap_the_index, "its index lists other manifests"),
        (_lose_the_index, "index.json"),
    ],
)
def test_refuses_a_layout_that_is_not_what_was_signed(
    image: Path, keys: Path, harm: Callable[[Path], None], said: str
) -> None:
    harm(image)
    with pytest.raises(BundleRefused, match=said) as refused:
        verify(image, keys / "keyring.pgp")
    assert refused.value.code == DAMAGED


def test_refuses_a_signed_record_whose_layer_unpacks_to_something_else(image: Path, keys: Path) -> None:
    record = verify(image, keys / "keyring.pgp")
    target = Layout(image / FOLDER)
    for path in blobs(image):
        path.unlink()
    layer = record.layers[0]
    false = "sha256:" + "0" * 64
    content = Path(image.parent / "image-below.gz")
    shutil.copy(content, target.blob(layer.digest))
    described = [{"mediaType": layout.LAYER, "digest": layer.digest, "size": layer.size}]
    made = target.add_image(described, {"rootfs": {"diff_ids": [false]}})
    bill = target.add_referrer(made, b"{}", "application/vnd.cyclonedx+json")
    target.end("llmkeep", made, bill)
    lies = archive.Layer(layer.name, layer.digest, layer.size, false)
    small_image.sign(
        image,
        keys,
        replace(record, digest=made["digest"], sbom=bill["digest"], layers=[lies]),
    )
    with pytest.raises(BundleRefused, match=f"the layer below unpacks to {layer.diff_id}, but {false}"):
        verify(image, keys / "keyring.pgp")


def test_refuses_an_sbom_of_another_image(image: Path, keys: Path) -> None:
    record = verify(image, keys / "keyring.pgp")
    target = Layout(image / FOLDER)
    old = json.loads(target.blob(record.sbom).read_bytes())
    target.blob(record.sbom).unlink()
    other = old["subject"] | {"digest": "sha256:" + "1" * 64}
    bill = target.add_referrer(other, b"{}", "application/vnd.cyclonedx+json")
    target.end("llmkeep", {"digest": record.digest}, bill)
    small_image.sign(image, keys, replace(record, sbom=bill["digest"]))
    with pytest.raises(BundleRefused, match="its SBOM is about sha256:1111"):
        verify(image, keys / "keyring.pgp")


@pytest.mark.parametrize("lost", [NAME, SIGNATURE])
def test_refuses_what_is_not_signed(image: Path, keys: Path, lost: str) -> None:
    (image / lost).unlink()
    with pytest.raises(BundleRefused, match=f"lacks {lost}") as refused:
        verify(image, keys / "keyring.pgp")
    assert refused.value.code == UNSIGNED


def test_refuses_a_record_that_names_another_signer(image: Path, keys: Path) -> None:
    record = verify(image, keys / "keyring.pgp")
    small_image.sign(image, keys, replace(record, signer="0" * 40))
    with pytest.raises(BundleRefused, match="but names the signer 0000") as refused:
        verify(image, keys / "keyring.pgp")
    assert refused.value.code == UNSIGNED


def test_refuses_a_record_of_another_key(image: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    with pytest.raises(BundleRefused, match="is not signed by a key of") as refused:
        verify(image, small_bundle.signing_keys(foreign) / "keyring.pgp")
    assert refused.value.code == UNSIGNED


def test_refuses_an_expired_image_with_its_date_and_the_clocks(tmp_path: Path, keys: Path) -> None:
    image = small_image.write(tmp_path / "image", keys, days=-1)
    with pytest.raises(
        BundleRefused, match=r"expired at 20\S+Z, and the clock says 20\S+Z: .*newer"
    ) as refused:
        verify(image, keys / "keyring.pgp")
    assert refused.value.code == EXPIRED


def test_refuses_an_image_of_an_older_serial_than_it_accepted_before(image: Path, keys: Path) -> None:
    assert verify(image, keys / "keyring.pgp", highest=7).serial == 7
    with pytest.raises(BundleRefused, match=r"serial 7 is older than 8.* --allow-older REASON") as refused:
        verify(image, keys / "keyring.pgp", highest=8)
    assert refused.value.code == REPLAYED


@pytest.mark.parametrize("kind", ["bundle", "release", ""])
def test_refuses_a_signed_record_of_another_type(kind: str, image: Path, keys: Path) -> None:
    small_image.sign(image, keys, replace(verify(image, keys / "keyring.pgp"), type=kind))
    with pytest.raises(BundleRefused, match=f"signed as '{kind}', but 'image' is needed") as refused:
        verify(image, keys / "keyring.pgp")
    assert refused.value.code == UNSIGNED


def test_refuses_a_bundles_manifest_that_is_given_as_an_image(
    image: Path, keys: Path, tmp_path: Path
) -> None:
    bundle = small_bundle.write(tmp_path / "bundle", keys)
    shutil.copy(bundle / manifest.NAME, image / NAME)
    shutil.copy(bundle / manifest.SIGNATURE, image / SIGNATURE)
    with pytest.raises(BundleRefused, match="signed as 'bundle', but 'image' is needed"):
        verify(image, keys / "keyring.pgp")


def test_refuses_an_image_that_is_given_as_a_bundles_manifest(
    image: Path, keys: Path, tmp_path: Path
) -> None:
    bundle = small_bundle.write(tmp_path / "bundle", keys)
    shutil.copy(image / NAME, bundle / manifest.NAME)
    shutil.copy(image / SIGNATURE, bundle / manifest.SIGNATURE)
    with pytest.raises(BundleRefused, match="signed as 'image', but 'bundle' is needed") as refused:
        manifest.verify(bundle, keys / "keyring.pgp", manifest.BUNDLE)
    assert refused.value.code == UNSIGNED


def test_refuses_a_package_index_of_apt_that_the_same_key_signed(image: Path, keys: Path) -> None:
    (image / NAME).write_text("Origin: llmkeep\nSuite: trixie\n")
    (image / SIGNATURE).unlink()
    signing.sign(keys / "signing.key", image / NAME, image / SIGNATURE)
    with pytest.raises(BundleRefused, match="cannot be read") as refused:
        verify(image, keys / "keyring.pgp")
    assert refused.value.code == DAMAGED
