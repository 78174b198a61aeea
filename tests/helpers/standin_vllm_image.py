"""The lab's image as variant cuda, with stand-ins for what takes gigabytes or a GPU: vLLM (tests/doubles/vllm) and libcuda."""

import json
import shutil
import subprocess
from dataclasses import asdict, replace
from pathlib import Path

from plugin_modules import ROOT

from llmkeep.bundle import signing
from llmkeep.bundle.build import Keys
from llmkeep.image import archive, record
from llmkeep.image.contents import OWN, VENVS
from llmkeep.image.layout import LAYER, Layout

PROGRAM = f"""#!/bin/sh
PYTHONPATH=/{VENVS["vllm"]}/lib exec /{VENVS[OWN]}/bin/python -m vllm "$@"
"""
# Where the dynamic linker looks without a cache; NVIDIA's toolkit mounts the driver's.
LIBRARIES = "usr/lib/x86_64-linux-gnu"


def tree(folder: Path) -> Path:
    """What the stand-ins' layer adds."""
    place = folder / VENVS["vllm"]
    (place / "bin").mkdir(parents=True)
    (place / "bin/vllm").write_text(PROGRAM)
    (place / "bin/vllm").chmod(0o755)
    shutil.copytree(ROOT / "tests/doubles/vllm", place / "lib", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "built").mkdir()
    subprocess.run([ROOT / "tests/doubles/nvml/build.sh", folder / "built"], check=True)
    (folder / LIBRARIES).mkdir(parents=True)
    (folder / "built/libcuda.so.1").rename(folder / LIBRARIES / "libcuda.so.1")
    shutil.rmtree(folder / "built")
    return folder


def standin_image(built: Path, out: Path, keys: Path) -> Path:
    """An image in OUT: that of BUILT and one more layer, signed by the same keys."""
    layer = archive.write("vllm", tree(out.with_name("tree")), out.with_name("vllm.tar.gz"), 0)
    made = record.read(built, keys / "keyring.pgp")
    source, target = Layout(built / record.FOLDER), Layout(out / record.FOLDER)
    target.begin()
    for each in made.layers:
        target.add_layer(each, source.blob(each.digest))
    listed = source.read(made.digest)
    config = source.read(listed["config"]["digest"])
    config["rootfs"]["diff_ids"].append(layer.diff_id)
    config["history"].append({"created_by": "tests", "comment": layer.name})
    described = [*listed["layers"], target.add_layer(layer, out.with_name("vllm.tar.gz"))]
    assert {each["mediaType"] for each in described} == {LAYER}
    image = target.add_image(described, config)
    bill = target.add_referrer(image, b"{}", "application/vnd.cyclonedx+json")
    target.end("llmkeep", image, bill)
    changed = replace(
        made, variant="cuda", digest=image["digest"], sbom=bill["digest"], layers=[*made.layers, layer]
    )
    (out / record.NAME).write_text(json.dumps(asdict(changed)))
    with signing.signer(Keys(keys).signing, ROOT / ".lab/passphrase") as key:
        signing.sign(key, out / record.NAME, out / record.SIGNATURE)
    return out
