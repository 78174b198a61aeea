"""Our wheels in blank environments: what each declares is enough for its programs to start. pip installs the lock's wheels."""

import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import httpx2
import pytest
from packaging.requirements import Requirement
from waiting import until

from llmkeep.bundle import cache, lock, wheels
from llmkeep.source_tree import TREE, tracked

PROJECTS = {
    "llmkeep": ".",
    "llmkeep-proof": "llmproof",
    "llmkeep-core": "llmcore",
    "llmkeep-payload": "payload",
}
PACKAGES = {
    "llmkeep": ["llmkeep"],
    "llmkeep-proof": ["llmproof"],
    "llmkeep-core": ["llmcore"],
    "llmkeep-payload": ["llmgpu", "llmserve", "llmtrain", "llmweb"],
}
# Only modules below these may import what an extra brings: the builder's part, and what computes with torch.
IN_EXTRAS = ("llmkeep.bundle.", "llmcore.", "llmserve.engine.", "llmtrain.")
PRIVATE = {"huggingface-hub", "redis", "uvicorn"}  # their private interfaces are used
IMPORTS = """
import importlib, json, pkgutil, sys
lacking = {}
def modules(package):
    for each in pkgutil.iter_modules(importlib.import_module(package).__path__, f"{package}."):
        if each.ispkg:
            yield from modules(each.name)
        elif not each.name.endswith("__main__"):
            yield each.name
for package in sys.argv[1:]:
    for name in modules(package):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            lacking[name] = error.name.split(".")[0]
print(json.dumps(lacking))
"""


class Installed:
    """A distribution in an environment of its own, beside nothing but what it declares."""

    def __init__(self, name: str, folder: Path, *sources: Path) -> None:
        self.name, self.bin = name, folder / "bin"
        venv.create(folder, symlinks=True)
        pip = [sys.executable, "-m", "pip", "--isolated", "--python", str(self.bin / "python"), "install"]
        pip += [
            "--quiet",
            "--disable-pip-version-check",
            "--no-compile",
            "--ignore-requires-python",
            "--no-index",
        ]
        subprocess.run([*pip, *(f"--find-links={source}" for source in sources), name], check=True)
        site = str(next(folder.glob("lib/python*/site-packages")))
        (distribution,) = importlib.metadata.distributions(name=name, path=[site])
        self.requires = [Requirement(each) for each in distribution.requires or ()]
        self.programs = distribution.entry_points.select(group="console_scripts").names
        # Without what would bring this tree's modules along. Bytecode stays, for the next start.
        dropped = {"PYTHONPATH", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE"}
        self.variables = {key: value for key, value in os.environ.items() if key not in dropped}

    def start(self, *words: str, output: Path) -> subprocess.Popen[str]:
        """A program of the environment, which writes to a file."""
        with output.open("w") as file:
            return subprocess.Popen(
                [self.bin / words[0], *words[1:]],
                env=self.variables,
                cwd=self.bin,
                stdout=file,
                stderr=subprocess.STDOUT,
                text=True,
            )


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheels of the hosts' environments, and numpy's, which hosts have from Debian."""
    pinned, folder = lock.load(), tmp_path_factory.mktemp("locked")
    chosen = dict(pinned.environment("control")) | dict(pinned.environment("serving"))
    chosen |= {key: each for key, each in pinned.environment("build") if key.startswith("numpy==")}
    if [key for key, each in chosen.items() if not cache.has(each.sha256, each.size)]:
        with cache.alone():
            wheels.download({key: each.sha256 for key, each in chosen.items()})
    for each in chosen.values():
        cache.place(cache.intact(each.sha256), folder / each.file)
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with our own wheels, as a bundle has them."""
    source, folder = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("built")
    for name in tracked(TREE, lock.catalogue()["tree"]["exclude"]):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(TREE / name, source / name)
    for project in PROJECTS.values():
        wheels.build(source / project, folder)
    return folder


@pytest.fixture(scope="module", params=PROJECTS)
def installed(
    request: pytest.FixtureRequest, built: Path, locked: Path, tmp_path_factory: pytest.TempPathFactory
) -> Installed:
    return Installed(request.param, tmp_path_factory.mktemp("installed") / "venv", built, locked)


def test_each_distribution_but_the_labs_is_installed_here() -> None:
    files = [TREE / name for name in tracked(TREE, []) if Path(name).name == "pyproject.toml"]
    names = {tomllib.loads(file.read_text())["project"]["name"] for file in files}
    assert names == {*PROJECTS, "llmkeep-lab"}


def test_each_program_prints_its_help(installed: Installed, tmp_path: Path) -> None:
    assert installed.programs or installed.name == "llmkeep-core"
    outputs = {name: tmp_path / name for name in installed.programs}
    codes = {name: installed.start(name, "--help", output=outputs[name]).wait() for name in outputs}
    assert {name: outputs[name].read_text() for name, code in codes.items() if code} == {}


def test_extras_are_for_building_bundles_and_for_computing_alone(
    installed: Installed, tmp_path: Path
) -> None:
    output = tmp_path / "output"
    code = installed.start("python", "-c", IMPORTS, *PACKAGES[installed.name], output=output).wait()
    assert code == 0, output.read_text()
    lacking: dict[str, str] = json.loads(output.read_text())
    extras = {wheels.canonical(each.name).replace("-", "_") for each in installed.requires if each.marker}
    extras |= {"yaml"} if "pyyaml" in extras else set()
    assert {name: module for name, module in lacking.items() if module not in extras} == {}
    assert {name: module for name, module in lacking.items() if not name.startswith(IN_EXTRAS)} == {}


def test_the_locks_versions_are_among_those_declared(installed: Installed) -> None:
    pinned = dict(key.split("==") for key in lock.load().wheels)
    names = {each: wheels.canonical(each.name) for each in installed.requires}
    locked = {each: pinned[name] for each, name in names.items() if name in pinned}
    assert {str(each): version for each, version in locked.items() if version not in each.specifier} == {}


def test_what_is_used_by_private_interfaces_has_an_upper_bound(installed: Installed) -> None:
    used = [each for each in installed.requires if wheels.canonical(each.name) in PRIVATE]
    assert [str(each) for each in used if "<" not in str(each.specifier)] == []


@pytest.mark.parametrize("installed", ["llmkeep-payload"], indirect=True)
def test_gateway_and_engine_answer_without_an_extra(installed: Installed, tmp_path: Path) -> None:
    output = tmp_path / "output"
    gateway = installed.start("llm-serve", "run", "--engine", "echo", "--port", "0", output=output)
    try:
        until(lambda: "\ntry " in output.read_text() or gateway.poll() is not None)
        url, key = (re.search(rf"^{word}\s+(\S+)$", output.read_text(), re.M) for word in ("url", "key"))
        assert url, output.read_text()
        assert key
        question = {"prompt": "hello"}, {"Authorization": f"Bearer {key[1]}"}

        def answers() -> bool:
            try:
                response = httpx2.get(f"{url[1]}/generate", params=question[0], headers=question[1])
            except httpx2.TransportError:
                return False
            return bool(response.json().get("response") == "hello")

        until(answers)
    finally:
        gateway.send_signal(signal.SIGINT)
        assert gateway.wait(30) == 0, output.read_text()
