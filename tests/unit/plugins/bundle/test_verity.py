"""What is recorded of installed weights, and when they are hashed; the kernel's part is in kernels/test_encrypted_estate.py."""

import hashlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from kernel_with_verity import KernelWithVerity
from plugin_modules import ROOT, load

verity = load("module_utils.bundle.verity")

CONTENTS = {"config.json": b"{}", "sub/model.safetensors": bytes(range(256)) * 50}
SUMS = {name: hashlib.sha256(content).hexdigest() for name, content in CONTENTS.items()}
WEIGHTS = "sub/model.safetensors"


@pytest.fixture
def model() -> Iterator[Path]:
    """On a tmpfs, none of which has fs-verity."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as above:
        folder = Path(above, "m")
        for name, content in CONTENTS.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        (folder / "SHA256SUMS").write_text("".join(f"{sha256}  {name}\n" for name, sha256 in SUMS.items()))
        yield folder


def seal(model: Path) -> None:
    record = verity.record_of(model)
    record.write_text(verity.seal_all(model, SUMS, verity.recorded(record)))


def is_sealed(model: Path) -> bool:
    found: bool = verity.is_sealed(model, SUMS, verity.record_of(model))
    return found


def counts(model: Path, deep: bool = False) -> str:
    """How many files the kernel checks, and how many were hashed."""
    said: str = verity.verify(model, deep)
    return said.partition(": ")[2]


def test_without_fs_verity_nothing_is_recorded_and_every_file_is_hashed(model: Path) -> None:
    assert verity.seal_all(model, SUMS, {}) == ""
    assert is_sealed(model)
    argv = [sys.executable, "-c", (ROOT / "plugins/module_utils/bundle/verity.py").read_text()]
    argv += [str(model.parent), "false", "m"]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    revision = hashlib.sha256((model / "SHA256SUMS").read_bytes()).hexdigest()[:16]
    assert done.stdout == f"m {revision}: 0 files kernel-verified (fs-verity), 2 hashed\n"
    (model / WEIGHTS).write_bytes(b"other")
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"{model}/{WEIGHTS} has sha256" in done.stderr
    assert "llmkeep site -e weights_deep=true" in done.stderr


def test_sealed_files_are_hashed_once_and_by_a_deep_verification(
    model: Path, kernel: KernelWithVerity, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not is_sealed(model)
    seal(model)
    assert is_sealed(model)
    assert kernel.enabled == ["config.json", "model.safetensors"]
    assert counts(model, deep=True) == "0 files kernel-verified (fs-verity), 2 hashed"

    def read(*_: object) -> None:
        pytest.fail("a file was hashed")

    monkeypatch.setattr(verity.hashlib, "file_digest", read)
    seal(model)
    assert is_sealed(model)
    assert counts(model) == "2 files kernel-verified (fs-verity), 0 hashed"


def test_content_that_is_not_what_was_signed_is_not_recorded(model: Path, kernel: KernelWithVerity) -> None:
    (model / WEIGHTS).write_bytes(b"other")
    with pytest.raises(verity.Altered, match=f"{WEIGHTS} has sha256"):
        seal(model)
    assert kernel.enabled == ["config.json", "model.safetensors"]
    assert not verity.record_of(model).exists()


def test_a_run_that_ended_before_the_record_is_ended_by_the_next(
    model: Path, kernel: KernelWithVerity
) -> None:
    seal(model)
    verity.record_of(model).unlink()
    assert not is_sealed(model)
    seal(model)
    assert (is_sealed(model), len(kernel.enabled)) == (True, 2)


@pytest.mark.usefixtures("kernel")
def test_a_file_that_was_replaced_is_hashed_whether_sealed_or_not(model: Path) -> None:
    seal(model)
    for other in (CONTENTS[WEIGHTS], b"other"):
        (model / "new").write_bytes(other)
        if other == b"other":
            verity.seal(model / "new", hashlib.sha256(other).hexdigest())
        (model / "new").replace(model / WEIGHTS)
        assert not is_sealed(model)
        if other == b"other":
            with pytest.raises(verity.Altered, match=f"{WEIGHTS} has sha256"):
                counts(model)
        else:
            assert counts(model) == "1 files kernel-verified (fs-verity), 1 hashed"


@pytest.mark.usefixtures("kernel")
def test_a_record_of_another_content_is_not_believed(model: Path) -> None:
    """Of the release before, say: its files are as sealed as ever."""
    seal(model)
    sums = (model / "SHA256SUMS").read_text()
    (model / "SHA256SUMS").write_text(sums.replace(SUMS[WEIGHTS], "0" * 64))
    with pytest.raises(verity.Altered, match="the signed manifest says 0000"):
        counts(model)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("text", ["", "garbled", "\0" * 4096])
def test_without_a_readable_record_files_are_hashed(model: Path, text: str) -> None:
    seal(model)
    verity.record_of(model).write_text(text)
    assert not is_sealed(model)
    assert counts(model) == "0 files kernel-verified (fs-verity), 2 hashed"


def test_a_model_whose_manifest_is_empty_has_not_passed(model: Path) -> None:
    (model / "SHA256SUMS").write_text("")
    with pytest.raises(verity.Altered, match="SHA256SUMS is empty"):
        counts(model)
