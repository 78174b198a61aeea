"""Images on the mirror: `llmkeep image add`, `list` and `remove`."""

import os
from pathlib import Path

import pytest
import small_bundle
import small_image

from llmkeep import cli
from llmkeep.errors import LlmkeepError
from llmkeep.image import served
from llmkeep.image.layout import Layout
from llmkeep.image.record import FOLDER, ImageRefused, Record, verify
from llmkeep.places import Places


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_bundle.signing_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def places(tmp_path: Path) -> Places:
    return Places(tmp_path / "root")


def added(places: Places, keys: Path, name: str, serial: int = 7) -> Record:
    """A new image on the mirror, whose upper layer is its own."""
    image = small_image.write(places.root.with_name(name), keys, above=name, serial=serial)
    return served.add(places, image, keys / "keyring.pgp")


def blobs(places: Places) -> dict[str, int]:
    """What nginx serves: the names of each blob, and how many images have it."""
    return {path.name: path.stat().st_nlink - 1 for path in (places.images / ".blobs").iterdir()}


def here(places: Places, image: Record) -> Path:
    return places.images / image.digest.removeprefix("sha256:")


def test_an_added_image_is_whole_and_each_of_its_blobs_is_served(places: Places, keys: Path) -> None:
    before = os.umask(0o077)
    try:
        image = added(places, keys, "first")
    finally:
        os.umask(before)
    assert verify(here(places, image), keys / "keyring.pgp") == image
    layout = Layout(here(places, image) / FOLDER)
    assert set(blobs(places)) == {path.name for path in layout.blob(image.digest).parent.iterdir()}
    shared = places.images / ".blobs"
    assert {path.stat().st_mode & 0o777 for path in (places.images, shared)} == {0o755}
    assert {path.stat().st_mode & 0o777 for path in shared.iterdir()} == {0o644}


def test_adding_it_again_changes_nothing(places: Places, keys: Path) -> None:
    image, before = added(places, keys, "first"), blobs(places)
    assert served.add(places, places.root.with_name("first"), keys / "keyring.pgp") == image
    assert blobs(places) == before


def test_images_have_their_common_layers_once(places: Places, keys: Path) -> None:
    first, second = added(places, keys, "first"), added(places, keys, "second")
    assert first.layers[0] == second.layers[0]
    assert blobs(places)[first.layers[0].digest.removeprefix("sha256:")] == 2


def test_a_removed_image_takes_its_own_blobs_and_leaves_common_ones(places: Places, keys: Path) -> None:
    first, second = added(places, keys, "first"), added(places, keys, "second")
    served.remove(places, first.digest)
    assert served.listed(places, keys / "keyring.pgp") == [second]
    assert first.digest.removeprefix("sha256:") not in blobs(places)
    assert verify(here(places, second), keys / "keyring.pgp") == second
    assert set(blobs(places).values()) == {1}


def test_lists_the_newest_bundles_image_first(
    places: Places, keys: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [added(places, keys, name, serial) for name, serial in (("old", 7), ("new", 9))]
    monkeypatch.setattr("llmkeep.image.commands.Places", lambda: places)
    assert cli.main(["image", "list", "--keyring", str(keys / "keyring.pgp")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.rpartition(" ")[2] for line in lines] == [image.digest for image in reversed(images)]


def test_a_damaged_image_is_refused_and_nothing_is_served(places: Places, keys: Path) -> None:
    image = small_image.write(places.root.with_name("damaged"), keys)
    next((image / FOLDER / "blobs/sha256").iterdir()).write_bytes(b"other")
    with pytest.raises(ImageRefused, match="is not what was signed"):
        served.add(places, image, keys / "keyring.pgp")
    assert not places.images.exists()


def test_a_blob_that_was_damaged_on_the_mirror_is_replaced(places: Places, keys: Path) -> None:
    image = added(places, keys, "first")
    layer = image.layers[0].digest.removeprefix("sha256:")
    (places.images / ".blobs" / layer).write_bytes(b"rot")
    served.add(places, places.root.with_name("first"), keys / "keyring.pgp")
    assert (places.images / ".blobs" / layer).read_bytes() != b"rot"
    assert verify(here(places, image), keys / "keyring.pgp") == image


@pytest.mark.parametrize(
    "digest", ["sha256:" + "0" * 64, "", "sha256:", "..", "../releases", "/etc", ".blobs"]
)
def test_refuses_to_remove_what_is_no_image(places: Places, keys: Path, digest: str) -> None:
    added(places, keys, "first")
    before = blobs(places)
    with pytest.raises(LlmkeepError, match="has no image"):
        served.remove(places, digest)
    assert blobs(places) == before
