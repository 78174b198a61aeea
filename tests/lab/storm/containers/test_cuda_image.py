"""The image of variant cuda, of the bundle of profile gpu-debian: one digest from any builder, and programs that start.

Its root file system is unpacked and entered as a container's is: read-only, another user, no network, no GPU.
"""

import json
import shutil
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from gpu_bundle import KEYS, SIGNED_BY, gpu_bundle, run_llmkeep, timed

from llmkeep.image.contents import USER
from llmkeep.image.layout import Layout
from llmkeep.image.record import FOLDER, Record, verify

# Mounts end with the process. As in a pod, /tmp alone can be written.
ENTER = """
root=$1; shift
mount --bind "$root" "$root"
mount -o remount,bind,ro "$root"
mount -t proc proc "$root/proc"
mount --bind /dev "$root/dev"
mount -t tmpfs tmpfs "$root/tmp"
mount -t tmpfs tmpfs "$root/run"
chmod 1777 "$root/tmp" "$root/run"
[ -z "${SETTINGS:-}" ] || mount --bind -o ro "$SETTINGS" "$root/mnt"
exec chroot --userspec=USER:USER "$root" "$@"
""".replace("USER", str(USER))
ENVIRONMENT = {"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "HOME": "/tmp", "HF_HUB_OFFLINE": "1"}
SITE = "lib/python3.13/site-packages"


@dataclass(frozen=True)
class Image:
    """An image, and its unpacked root file system."""

    folder: Path
    record: Record
    root: Path

    def run(self, *command: str, settings: str = "") -> "subprocess.CompletedProcess[str]":
        """Run a program of it. SETTINGS: a folder that it sees at /mnt."""
        inside = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child"]
        return subprocess.run(
            [*inside, "sh", "-euc", ENTER, "enter", str(self.root), *command],
            env=ENVIRONMENT | {"SETTINGS": settings},
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )

    def output(self, *command: str) -> str:
        """What a program prints that has to succeed."""
        done = self.run(*command)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout


def build(out: Path, bundle: Path, cache: Path) -> Record:
    """The image, built with nothing at hand but the bundle; it verifies."""
    begun = time.monotonic()
    words = ("--variant=cuda", f"--bundle={bundle}", f"--out={out}", *SIGNED_BY)
    cache.mkdir()
    run_llmkeep("image", "build", *words, XDG_CACHE_HOME=str(cache))
    shutil.rmtree(cache)
    timed("image", begun)
    return verify(out, KEYS / "keyring.pgp")


@pytest.fixture(scope="module")
def built() -> Iterator[tuple[Path, Path, Record]]:
    """A folder on a disk, the bundle, and the record of the image in `image`."""
    bundle = gpu_bundle()
    with tempfile.TemporaryDirectory(prefix="llmkeep-cuda-", dir=bundle.parent) as name:
        folder = Path(name)
        yield folder, bundle, build(folder / "image", bundle, folder / "cache")


@pytest.fixture(scope="module")
def image(built: tuple[Path, Path, Record]) -> Image:
    folder, _, record = built
    root, layout = folder / "root", Layout(folder / "image" / FOLDER)
    root.mkdir()
    for layer in record.layers:
        with tarfile.open(layout.blob(layer.digest)) as archive:
            archive.extractall(root, filter="fully_trusted", numeric_owner=True)  # noqa: S202 -- signed
    return Image(folder / "image", record, root)


def test_another_build_gives_the_same_digest(built: tuple[Path, Path, Record]) -> None:
    folder, bundle, record = built
    again = build(folder / "again", bundle, folder / "cache")
    shutil.rmtree(folder / "again")
    assert again == record
    print(record.digest, *(f"{each.name}: {each.size / 1e6:.0f} MB" for each in record.layers))


def test_vllm_is_a_layer_of_its_own_below_our_code(built: tuple[Path, Path, Record]) -> None:
    names = [each.name for each in built[2].layers]
    assert (names[:3], names[-1]) == (["debian", "wheels", "vllm"], "code")


def test_both_environments_are_imported(image: Image) -> None:
    program = "import torch, vllm; print(vllm.__version__, torch.__version__)"
    assert image.output("/opt/vllm/bin/python", "-c", program).split() == ["0.19.1", "2.10.0+cu128"]
    program = "import llmserve.cli, torch, transformers; print(torch.version.cuda)"
    assert image.output("/opt/llmkeep/venv/bin/python", "-c", program).split() == ["None"]


def test_every_program_of_a_pod_starts(image: Image) -> None:
    for command in ("llm-serve --help", "llm-audit --help", "llm-probe --help", "nginx -v", "gcc --version"):
        image.output(*command.split())


def test_vllm_itself_ends_without_a_gpu(image: Image) -> None:
    done = image.run("/opt/vllm/bin/vllm", "serve", "/models")
    assert done.returncode != 0
    assert "Failed to infer device type" in done.stderr, done.stderr[-3000:]


def test_an_engine_without_a_gpu_ends_and_says_what_to_do(image: Image, tmp_path: Path) -> None:
    model = {"driver": "vllm", "path": "/models", "manifest": "/models/SHA256SUMS", "context": 2048}
    (tmp_path / "engine.yaml").write_text(json.dumps({"socket": "/run/engine.sock", "model": model}))
    (tmp_path / "engine.yaml").chmod(0o644)
    tmp_path.chmod(0o755)
    command = ("llm-serve", "engine", "--name", "m", "--config", "/mnt/engine.yaml")
    done = image.run(*command, settings=str(tmp_path))
    assert done.returncode == 2
    assert "no GPU: no driver is in this container (libcuda.so.1" in done.stderr
    assert "ask for nvidia.com/gpu and the runtime class" in done.stderr


def test_the_sbom_has_what_both_environments_have(image: Image) -> None:
    layout = Layout(image.folder / FOLDER)
    referrer = layout.read(image.record.sbom)
    assert referrer["subject"]["digest"] == image.record.digest
    components: list[dict[str, Any]] = layout.read(referrer["layers"][0]["digest"])["components"]
    listed = {each["purl"] for each in components}
    assert len(listed) == len(components)
    environments = [f"opt/vllm/{SITE}", f"opt/llmkeep/venv/{SITE}"]
    records = {path for each in environments for path in (image.root / each).glob("*.dist-info")}
    distributions = {path.name.removesuffix(".dist-info").lower().replace("_", "-") for path in records}
    assert {
        each["purl"].split("/")[1].replace("@", "-") for each in components if "pkg:pypi" in each["purl"]
    } == {name for name in distributions if not name.startswith("llmkeep")}
    assert "pkg:pypi/torch@2.10.0" in listed
    print(f"{len(components)} components")


def test_no_file_gives_rights(image: Image) -> None:
    found = ["find", str(image.root), "-xdev", "(", "-perm", "/6000", "-o", "-name", "*.pyc", ")", "-print"]
    assert subprocess.run(found, capture_output=True, text=True, check=True).stdout == ""
