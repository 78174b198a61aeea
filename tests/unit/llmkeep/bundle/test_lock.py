"""The lock is what artifacts.yml wants, and nothing in it lacks a hash."""

import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.utils import canonicalize_name

from llmkeep.bundle import lock, programs, update, wheels
from llmkeep.bundle.lock import Artifact, Deb, Lock
from llmkeep.errors import LlmkeepError
from llmkeep.source_tree import TREE

PINNED, WANTED = lock.load(profiles=["gpu"]), lock.catalogue()
DEBIAN = lock.load(profiles=["gpu-debian"])


def names(environment: str) -> set[str]:
    return {key.split("==")[0] for key in PINNED.environments[environment]}


def test_every_artifact_has_hash_size_licence_and_purl() -> None:
    for kind in (PINNED.wheels, PINNED.debs, PINNED.models, PINNED.programs):
        assert kind
    for artifact in [
        *PINNED.wheels.values(),
        *PINNED.debs.values(),
        *PINNED.models.values(),
        *PINNED.programs.values(),
    ]:
        assert re.fullmatch("[0-9a-f]{64}", artifact.sha256), artifact
        assert artifact.size > 0, artifact
        assert artifact.licence, artifact
        assert artifact.purl.startswith(("pkg:pypi/", "pkg:deb/debian/", "pkg:golang/", "pkg:maven/")), (
            artifact
        )


@pytest.mark.parametrize("environment", lock.environments(WANTED, "gpu"))
def test_an_environment_has_what_artifacts_yml_wants_for_it(environment: str) -> None:
    entry = WANTED["python"]["environments"][environment]
    wanted = {wheels.canonical(wheels.distribution(requirement)) for requirement in entry["requires"]}
    assert wanted <= names(environment)
    assert not names(environment) & set(entry.get("from_debian", {}))


@pytest.mark.parametrize(
    ("inner", "outer"),
    [("control", "build"), ("build", "dev"), ("serving", "training"), ("training", "payload-dev")],
)
def test_an_environment_that_includes_another_has_its_very_versions(inner: str, outer: str) -> None:
    assert set(PINNED.environments[inner]) <= set(PINNED.environments[outer])


@pytest.mark.parametrize("accelerated", ["serving-cuda", "training-cuda"])
def test_an_environment_with_cuda_differs_from_its_twin_in_torch_and_what_only_torch_wants(
    accelerated: str,
) -> None:
    entry = WANTED["python"]["environments"][accelerated]
    twin, own = PINNED.environments[entry["cuda_of"]], PINNED.environments[accelerated]
    wanted_by_debians_torch = {"sympy", "setuptools"}
    assert {key.split("==")[0] for key in set(twin) - set(own)} <= wanted_by_debians_torch
    added = names(accelerated) - {key.split("==")[0] for key in twin}
    assert {"torch", "numpy", "psutil", "triton", "nvidia-cublas", "nvidia-nccl-cu13"} <= added
    cuda = re.compile(r"torch|triton|nvidia-.*|cuda-.*|numpy|networkx|psutil")
    assert [name for name in added if not cuda.fullmatch(name)] == []


def test_a_bundle_of_profile_gpu_carries_cuda_once() -> None:
    per_environment = [
        {
            key
            for key in PINNED.environments[name]
            if re.match(r"torch==|triton==|nvidia-c(ublas|udnn-cu)", key)
        }
        for name in ("serving-cuda", "training-cuda", "vllm")
    ]
    assert per_environment[0] == per_environment[1] == per_environment[2] != set()


def test_a_bundle_of_profile_gpu_debian_has_debians_drivers_and_one_cuda_12() -> None:
    assert DEBIAN.environments["vllm"] != PINNED.environments["vllm"]
    per_environment = [
        {key for key in DEBIAN.environments[name] if re.match(r"torch==2\.10\.|nvidia-c\w+-cu12==", key)}
        for name in lock.apart(WANTED, "gpu-debian")
    ]
    assert per_environment[0] == per_environment[1] == per_environment[2] != set()
    for role, packages in lock.packages(WANTED, "gpu-debian")["roles"].items():
        assert set(packages) <= {key.split("=")[0] for key in DEBIAN.debs}, role
    assert {key.split("=")[0] for key in DEBIAN.roles["debian-550"]} >= {"nvidia-kernel-dkms", "libcuda1"}
    (kernel,) = (
        DEBIAN.debs[key] for key in DEBIAN.roles["gpu_kernel"] if key.startswith("linux-image-amd64=")
    )
    assert kernel.version.startswith("6.12.")  # the sets' range: none of backports


@pytest.mark.parametrize("profile", ["gpu", "gpu-debian", "lab"])
def test_what_is_locked_for_a_profile_goes_together(profile: str) -> None:
    lock.require_fit(WANTED, profile, lock.load(profiles=lock.apart(WANTED, profile).values()))


def test_a_lock_of_another_python_is_refused() -> None:
    torch = next(key for key in DEBIAN.environments["vllm"] if key.startswith("torch=="))
    wheel = DEBIAN.wheels[torch]
    other = replace(wheel, file=wheel.file.replace("cp313", "cp312"))
    with pytest.raises(
        LlmkeepError, match=r"nothing was changed:\n  torch-\S+-cp312-\S+ are not for Python 3\.13"
    ):
        lock.require_fit(WANTED, "gpu-debian", replace(DEBIAN, wheels={**DEBIAN.wheels, torch: other}))


def test_a_profile_with_environments_of_its_own_writes_its_own_lock_alone(tmp_path: Path) -> None:
    wheel = Artifact("a-1-py3-none-any.whl", "1", "0" * 64, 3, "MIT", "pkg:pypi/a@1")
    deb = Deb("b_2_all.deb", "2", "1" * 64, 4, "GPL-2", "pkg:deb/debian/b@2?arch=all", "debian")
    common = Lock({"serving": ["a==1"]}, {"a==1": wheel}, {"base": ["b=2"]}, {"b=2": deb})
    lock.save(common, tmp_path)
    before = (tmp_path / "artifacts.lock.yml").read_bytes()
    newer = replace(deb, version="3")
    own = Lock({"serving": ["a==1"], "cuda": ["a==1"]}, {"a==1": wheel}, {"base": ["b=3"]}, {"b=3": newer})
    lock.save(own, tmp_path, {"cuda": "ours"}, "ours")
    assert (tmp_path / "artifacts.lock.yml").read_bytes() == before
    assert (lock.load(tmp_path), lock.load(tmp_path, ["ours"])) == (common, own)


def test_the_lab_reads_no_lock_of_cuda() -> None:
    common = lock.load()
    assert set(common.environments) == set(PINNED.environments) - set(lock.apart(WANTED, "gpu"))
    assert not [key for key in common.wheels if re.match(r"torch==|nvidia-(?!ml-py)", key)]


def test_a_program_is_pinned_in_the_version_that_artifacts_yml_names() -> None:
    assert PINNED.programs.keys() == WANTED["programs"].keys()
    for name, entry in WANTED["programs"].items():
        assert PINNED.programs[name].purl == programs.package_url(entry)
        assert entry["version"].removeprefix("v") in " ".join(entry.get("go", [entry["version"]])), (
            "the recipe builds another version"
        )


def test_every_package_that_a_role_wants_is_pinned_with_its_closure() -> None:
    pinned = {key.split("=")[0] for key in PINNED.debs}
    for role in WANTED["profiles"]["lab"]["roles"]:
        assert set(WANTED["apt"]["roles"][role]) <= pinned, role
        assert all(key in PINNED.debs for key in PINNED.roles[role])
    assert {"libc6", "libtorch2.6", "libpython3.13-stdlib"} <= pinned  # nothing is taken for granted


@pytest.mark.parametrize("profile", ["gpu", "elastic"])
def test_a_profile_of_estates_has_nothing_of_the_lab(profile: str) -> None:
    chosen = WANTED["profiles"][profile]
    assert not [role for role in chosen["roles"] if role.endswith("_of_the_lab")]
    assert chosen["programs"] == ["opa"]  # the other ones are the lab's builds of Elastic's packages


def test_requirements_pin_and_hash_each_wheel() -> None:
    text = lock.requirements(PINNED, "control")
    assert re.search(r"^ansible-core==2\.21\.\d+ --hash=sha256:[0-9a-f]{64}$", text, re.MULTILINE)
    assert len(text.splitlines()) == len(PINNED.environments["control"])


def test_a_distribution_that_is_published_as_source_is_listed_apart() -> None:
    wheels_of, sources_of = (lock.requirements(PINNED, "training", sources) for sources in (False, True))
    assert re.fullmatch(r"deepspeed==[\d.]+ --hash=sha256:[0-9a-f]{64}\n", sources_of)
    assert "deepspeed" not in wheels_of
    assert len((wheels_of + sources_of).splitlines()) == len(PINNED.environments["training"])


def test_requirements_need_nothing_but_debians_python_and_yaml() -> None:
    command = [
        "/usr/bin/python3.13",
        "-I",
        "-c",
        "import sys; sys.path[:0] = '.'; import llmkeep.bundle.lock",
    ]
    assert subprocess.run(command, cwd=TREE, check=False).returncode == 0


def test_an_unknown_environment_is_told_with_those_that_there_are() -> None:
    with pytest.raises(LlmkeepError, match=r"no environment 'gpu', only \['build', 'control'"):
        lock.requirements(PINNED, "gpu")


def test_what_is_saved_is_loaded_again(tmp_path: Path) -> None:
    wheel = Artifact("a-1-py3-none-any.whl", "1", "0" * 64, 3, "MIT", "pkg:pypi/a@1")
    deb = Deb("b_2_all.deb", "1:2", "1" * 64, 4, "GPL-2", "pkg:deb/debian/b@1%3A2?arch=all", "debian")
    program = Artifact("c", "3", "2" * 64, 5, "MIT", "pkg:golang/example.org/c@v3")
    made = Lock(
        {"control": ["a==1"]}, {"a==1": wheel}, {"base": ["b=1:2"]}, {"b=1:2": deb}, {}, {"c": program}
    )
    lock.save(made, tmp_path)
    assert lock.load(tmp_path) == made
    assert (tmp_path / "artifacts.lock.yml").read_text().startswith("# Written by `llmkeep lock update`")


def test_the_environments_of_one_profile_are_saved_apart_with_all_of_their_wheels(tmp_path: Path) -> None:
    wheels_of = {
        f"{name}==1": Artifact(f"{name}-1-py3-none-any.whl", "1", "0" * 64, 3, "MIT", f"pkg:pypi/{name}@1")
        for name in ("torch", "both", "small")
    }
    made = Lock({"serving": ["both==1", "small==1"], "cuda": ["both==1", "torch==1"]}, wheels_of)
    lock.save(made, tmp_path, {"cuda": "gpu"})
    assert lock.load(tmp_path, ["gpu"]) == made
    common = lock.load(tmp_path)
    assert (set(common.environments), set(common.wheels)) == ({"serving"}, {"both==1", "small==1"})
    lock.save(common, tmp_path)
    assert lock.load(tmp_path, ["gpu"]) == made  # of another profile, and left alone


def test_what_a_model_and_its_wheel_say_of_the_licence_is_both_kept() -> None:
    stated = {name: model.stated for name, model in PINNED.models.items()}
    assert stated["all-minilm-l6-v2"] == "Apache-2.0 (weights, upstream); MIT License (package)"
    assert "Apache Software License (package)" in stated["smollm2-135m-instruct"]


def test_a_lock_of_another_shape_is_refused(tmp_path: Path) -> None:
    (tmp_path / "artifacts.lock.yml").write_text(yaml.safe_dump({"wheels": {}}))
    with pytest.raises(LlmkeepError, match="is not a lock of this version"):
        lock.load(tmp_path)


@pytest.mark.parametrize(
    ("version", "upstream"), [("1:2.2.4+ds-1", "2.2.4"), ("2.6.0+dfsg-7", "2.6.0"), ("3-1", "3")]
)
def test_debians_version_tells_the_upstream_one(version: str, upstream: str) -> None:
    deb = Deb("", version, "", 1, "", "", "debian")
    assert update.upstream({f"python3-x={version}": deb}, "python3-x") == upstream


@pytest.mark.parametrize(
    ("metadata", "licence"),
    [
        ({"license_expression": "MIT OR Apache-2.0", "license": "other"}, "MIT OR Apache-2.0"),
        ({"classifier": ["License :: OSI Approved :: MIT License"]}, "MIT License"),
        ({"license": "ISC"}, "ISC"),
        ({"license": "Copyright\nmany lines"}, "NOASSERTION"),
        ({"license": "UNKNOWN"}, "NOASSERTION"),
    ],
)
def test_the_licence_of_a_wheel(metadata: dict[str, object], licence: str) -> None:
    assert wheels.licence(metadata) == licence


def packages(document: object) -> set[str]:
    """What stands under a key `packages` or `…_packages`, however deep."""
    found: set[str] = set()
    if isinstance(document, dict):
        for key, value in document.items():
            if isinstance(value, list | dict) and str(key).endswith("packages"):
                found |= set(
                    value.values() if isinstance(value, dict) else value
                )  # by a name of the role's own
            else:
                found |= packages(value)
    return found


WITH_NGINX = ("mirror", "edge", "exporters")


def of_system(role: str) -> dict[str, Any]:
    """A role's names of packages and paths, as its vars/main.yml has them."""
    variables = yaml.safe_load((TREE / f"roles/{role}/vars/main.yml").read_text()) or {}
    return {name: value for name, value in variables.items() if name.startswith(f"__{role}_os")}


@pytest.mark.parametrize(
    "role", [path.parts[-3] for path in TREE.glob("roles/*/vars/main.yml") if of_system(path.parts[-3])]
)
def test_what_a_role_installs_is_what_artifacts_yml_lists_for_it(role: str) -> None:
    shared = {"nginx"} if role in WITH_NGINX else set()
    listed = WANTED["apt"]["roles"]
    assert packages(of_system(role)) | shared == {*listed[role], *listed.get(f"{role}_of_the_lab", [])}


def canonical(requirement: str) -> str:
    """NAME==VERSION with the name as PyPI compares it."""
    name, version = requirement.split("==")
    return f"{canonicalize_name(name)}=={version}"


@pytest.mark.parametrize("wanted", sorted((TREE / "bench/peers").glob("*.in")), ids=lambda path: path.stem)
def test_what_a_benchmark_compares_with_is_installed_by_hash(wanted: Path) -> None:
    pinned = wanted.with_suffix(".txt").read_text().splitlines()
    assert all(re.fullmatch(r"[\w.-]+==\S+ --hash=sha256:[0-9a-f]{64}", line) for line in pinned)
    versions = {canonical(line.split(" ")[0]) for line in pinned}
    assert {canonical(re.sub(r"\[.*\]", "", line)) for line in wanted.read_text().split()} <= versions
    assert '--require-hashes -r "bench/peers/$1.txt"' in (TREE / "bench/peers.sh").read_text()
