"""The image record that role kubernetes deploys: its type, its age, and its serial against the one deployed last."""

import json
from pathlib import Path
from typing import Any

import pytest
import small_bundle
from cluster_overlay import DIGESTS, signed, signed_image
from plugin_modules import load

from llmkeep.bundle import manifest

declared = load("module_utils.cluster.declared")
EXPIRED = "2024-06-01T00:00:00Z"


def read(folder: Path, keys: Path, seen: int = 0, **stated: object) -> dict[str, Any]:
    """What the role reads of a signed record that states this."""
    record: dict[str, Any] = declared.image_record(
        signed_image(folder, keys, **stated), keys / "keyring.pgp", seen
    )
    return record


def test_a_record_of_the_serial_deployed_last_or_a_later_one_is_read(tmp_path: Path, keys: Path) -> None:
    for serial in (40, 41):
        assert read(tmp_path, keys, seen=40, serial=serial)["digest"] == DIGESTS[0]


def test_an_older_record_is_refused_with_both_serials_and_the_way_out(tmp_path: Path, keys: Path) -> None:
    with pytest.raises(declared.Refused, match=r"serial 2, and 40 was deployed .* kubernetes_allow_older"):
        read(tmp_path, keys, seen=40, serial=2)


def test_an_expired_record_is_refused_with_its_date_and_the_clocks(tmp_path: Path, keys: Path) -> None:
    with pytest.raises(declared.Refused, match=rf"expired at {EXPIRED}, and this host's clock says 20\S+Z"):
        read(tmp_path, keys, expires=EXPIRED)


@pytest.mark.parametrize("kind", ["bundle", "release", None])
def test_a_signed_record_of_another_type_is_refused(kind: str | None, tmp_path: Path, keys: Path) -> None:
    with pytest.raises(declared.Refused, match=f"signed as {kind!r}, and 'image' is needed"):
        read(tmp_path, keys, type=kind)


def test_a_bundles_manifest_is_refused(tmp_path: Path, keys: Path) -> None:
    bundle = small_bundle.write(tmp_path / "bundle", keys)
    (bundle / manifest.SIGNATURE).rename(tmp_path / "image.json.sig")
    with pytest.raises(declared.Refused, match="signed as 'bundle', and 'image' is needed"):
        declared.image_record((bundle / manifest.NAME).rename(tmp_path / "image.json"), keys / "keyring.pgp")


def test_signed_text_that_is_no_record_is_refused(tmp_path: Path, keys: Path) -> None:
    path = signed(tmp_path, keys, "Origin: llmkeep\nSuite: trixie\n")
    with pytest.raises(declared.Refused, match="is not an image record"):
        declared.image_record(path, keys / "keyring.pgp")


@pytest.mark.parametrize(("content", "serial"), [(None, 0), ("41\n", 41)])
def test_the_serial_deployed_last_is_remembered(content: str | None, serial: int, tmp_path: Path) -> None:
    if content:
        (tmp_path / "image.serial").write_text(content)
    assert declared.deployed_serial(tmp_path / "image.serial") == serial


def test_a_serial_that_is_no_number_is_refused_and_does_not_count_as_none(tmp_path: Path) -> None:
    (tmp_path / "image.serial").write_text(json.dumps(None))
    with pytest.raises(declared.Refused, match="holds 'null', which is not a serial"):
        declared.deployed_serial(tmp_path / "image.serial")
