"""What `llmkeep image build` refuses before it makes anything."""

from pathlib import Path

import pytest
import small_bundle

from llmkeep.bundle.build import Keys
from llmkeep.bundle.manifest import DAMAGED, UNSIGNED, BundleRefused
from llmkeep.errors import LlmkeepError
from llmkeep.image.build import build
from llmkeep.image.layers import VARIANTS


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return Keys(small_bundle.signing_keys(tmp_path_factory.mktemp("keys")))


@pytest.fixture
def bundle(tmp_path: Path, keys: Keys) -> Path:
    (tmp_path / "bundle").mkdir()
    return small_bundle.write(tmp_path / "bundle", keys.folder)


def test_refuses_a_damaged_bundle(bundle: Path, keys: Keys, tmp_path: Path) -> None:
    (bundle / "models/small/weights").write_text("other")
    with pytest.raises(BundleRefused, match="models/small/weights") as refused:
        build(bundle, tmp_path / "image", "cpu", keys)
    assert (refused.value.code, (tmp_path / "image").exists()) == (DAMAGED, False)


def test_refuses_a_bundle_of_other_keys(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with pytest.raises(BundleRefused, match="is not signed by a key of") as refused:
        build(bundle, tmp_path / "image", "cpu", Keys(small_bundle.signing_keys(tmp_path / "other")))
    assert refused.value.code == UNSIGNED


@pytest.mark.parametrize("variant", VARIANTS)
def test_names_the_environment_that_a_bundle_lacks(
    bundle: Path, keys: Keys, tmp_path: Path, variant: str
) -> None:
    *others, last = VARIANTS[variant][0]
    for each in others:
        (bundle / f"wheels/{each}").mkdir(exist_ok=True)
        (bundle / f"wheels/{each}/requirements.txt").touch()
    small_bundle.sign(bundle, keys.folder, serial=8, days=30)
    with pytest.raises(LlmkeepError, match=f"of profile lab, has no wheels/{last}: build a bundle"):
        build(bundle, tmp_path / "image", variant, keys)


def test_names_the_roles_whose_packages_a_bundle_lacks(bundle: Path, keys: Keys, tmp_path: Path) -> None:
    (bundle / "wheels/serving").mkdir()
    (bundle / "wheels/serving/requirements.txt").touch()
    small_bundle.sign(bundle, keys.folder, serial=8, days=30)
    with pytest.raises(LlmkeepError, match="has no packages of image, llm_serving: name these roles"):
        build(bundle, tmp_path / "image", "cpu", keys)


def test_leaves_a_folder_of_other_things_alone(bundle: Path, keys: Keys, tmp_path: Path) -> None:
    (tmp_path / "image").mkdir()
    (tmp_path / "image/thesis.txt").write_text("mine")
    with pytest.raises(LlmkeepError, match="has other content than an image"):
        build(bundle, tmp_path / "image", "cpu", keys)
    assert (tmp_path / "image/thesis.txt").read_text() == "mine"
