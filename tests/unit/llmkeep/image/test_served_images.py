"""Images on the mirror: `llmkeep image add`, `list` and `remove`."""

import os
from pathlib import Path

import pytest
import small_bundle
import small_image

from llmkeep import cli, source_tree
from llmkeep.bundle.manifest import REPLAYED, BundleRefused
from llmkeep.errors import LlmkeepError
from llmkeep.image import served
from llmkeep.image.layout import Layout
from llmkeep.image.record import FOLDER, Record, verify
from llmkeep.places import Places
from llmkeep.record import runs


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
    with pytest.raises(BundleRefused, match="differs from what was signed"):
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


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[runs.Event]:
    """The record of a control node."""
    appended: list[runs.Event] = []
    monkeypatch.setattr(runs, "is_kept", lambda tree: tree == source_tree.located())
    monkeypatch.setattr(runs, "append", appended.append)
    return appended


def test_an_older_image_than_one_added_before_is_refused_and_is_not_served(
    places: Places, keys: Path
) -> None:
    new = added(places, keys, "new", 40)
    with pytest.raises(BundleRefused, match="serial 2 is older than 40, which was accepted") as refused:
        added(places, keys, "old", 2)
    assert refused.value.code == REPLAYED
    assert served.listed(places, keys / "keyring.pgp") == [new]


def test_a_removed_image_leaves_its_serial_behind(places: Places, keys: Path) -> None:
    served.remove(places, added(places, keys, "new", 40).digest)
    with pytest.raises(BundleRefused, match="serial 39 is older than 40"):
        added(places, keys, "old", 39)


def test_an_older_image_is_added_for_a_reason_that_is_on_record_and_counts_from_then_on(
    places: Places, keys: Path, events: list[runs.Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    added(places, keys, "new", 41)
    old = small_image.write(places.root.with_name("old"), keys, above="old", serial=40)
    monkeypatch.setattr("llmkeep.image.commands.Places", lambda: places)
    add = ["image", "add", "--image", str(old), "--keyring", str(keys / "keyring.pgp")]
    assert cli.main(add) == REPLAYED
    assert not events
    assert cli.main([*add, "--allow-older", "41 answers slowly"]) == 0
    digest = served.listed(places, keys / "keyring.pgp")[1].digest
    assert [
        (
            event["event.reason"],
            event["llmkeep.image.serial"],
            event["llmkeep.image.highest"],
            event["llmkeep.image.digest"],
        )
        for event in events
    ] == [("41 answers slowly", 40, 41, digest)]
    assert cli.main([*add, "--allow-older", "again"]) == cli.main(add) == 0
    assert len(events) == 1
    with pytest.raises(BundleRefused, match="serial 39 is older than 40"):
        added(places, keys, "oldest", 39)


def test_without_its_record_an_older_image_is_not_added(
    places: Places, keys: Path, events: list[runs.Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    new = added(places, keys, "new", 41)

    def refuse(_: runs.Event) -> None:
        raise runs.RecordError("full")

    monkeypatch.setattr(runs, "append", refuse)
    old = small_image.write(places.root.with_name("old"), keys, above="old", serial=40)
    with pytest.raises(runs.RecordError):
        served.add(places, old, keys / "keyring.pgp", "41 answers slowly")
    assert served.listed(places, keys / "keyring.pgp") == [new]
    assert not events


def test_an_expired_image_is_added_for_no_reason(
    places: Places, keys: Path, events: list[runs.Event]
) -> None:
    image = small_image.write(places.root.with_name("expired"), keys, days=-1)
    with pytest.raises(BundleRefused, match="expired at"):
        served.add(places, image, keys / "keyring.pgp", "41 answers slowly")
    assert not events
