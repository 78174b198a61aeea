"""`make release` refuses what is no release, and makes the same files of the same commit."""

import json
import os
import subprocess
import tarfile
from pathlib import Path

import pytest
import yaml

from changelogs import release
from llmkeep.bundle import site
from llmkeep.image.layout import Layout

COMMIT_TIME = "2026-12-03T00:00:00+00:00"
IDENTITY = {
    f"GIT_{role}_{name}": value
    for role in ("AUTHOR", "COMMITTER")
    for name, value in (("NAME", "llmkeep"), ("EMAIL", "llmkeep@estate.internal"), ("DATE", COMMIT_TIME))
}
PROJECT = """[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"
[project]
name = "{name}"
version = "0.1.0"
[tool.setuptools]
packages = []
"""
NAMES = {
    ".": "llmkeep",
    "llmcore": "llmkeep-core",
    "llmproof": "llmkeep-proof",
    "payload": "llmkeep-payload",
    "lab": "llmkeep-lab",
}
ROOT = Path(__file__).parents[2]


def git(tree: Path, *arguments: str) -> None:
    subprocess.run(
        ["git", "-C", tree, *arguments], env=os.environ | IDENTITY, capture_output=True, check=True
    )


def commit(tree: Path) -> None:
    git(tree, "add", "--all")
    git(tree, "commit", "--quiet", "--message", "State")


def record_suite(tree: Path, **verdicts: str) -> None:
    parts = {part: {"verdict": "passed"} for part in release.SUITE} | {
        part: {"verdict": verdict} for part, verdict in verdicts.items()
    }
    (tree / ".lab").mkdir(exist_ok=True)
    run = {"commit": release.git(tree, "rev-parse", "HEAD").strip(), "parts": parts}
    (tree / ".lab/timings.json").write_text(json.dumps(run))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A tree of small parts that may be released as 0.1.0."""
    tree = tmp_path / "tree"
    for part, name in NAMES.items():
        (tree / part).mkdir(exist_ok=True, parents=True)
        (tree / part / "pyproject.toml").write_text(PROJECT.format(name=name))
    (tree / "galaxy.yml").write_text((ROOT / "galaxy.yml").read_text())
    for name in ("README.md", "LICENSE"):
        (tree / name).write_text(f"# {name}\n")
    (tree / "docs").mkdir()
    (tree / "docs/conf.py").write_text(
        "extensions = ['myst_parser']\nroot_doc = 'README'\nsuppress_warnings = ['toc.not_included']\n"
    )
    (tree / ".gitignore").write_text(".lab/\ndist/\n")
    (tree / "changelogs/fragments").mkdir(parents=True)
    (tree / "changelogs/config.yaml").write_text((ROOT / "changelogs/config.yaml").read_text())
    (tree / "changelogs/changelog.yaml").write_text("ancestor: null\nreleases: {}\n")
    (tree / "changelogs/fragments/edge.yml").write_text("major_changes:\n  - Edge - it answers, at last.\n")
    git(tree, "init", "--quiet")
    commit(tree)
    record_suite(tree)
    return tree


@pytest.mark.parametrize("version", ["", "1", "0.1", "v0.1.0", "0.1.0-rc.1", "01.0.0", "0.1.0\n", "٠.١.٠"])
def test_refuses_what_is_no_version(tree: Path, version: str) -> None:
    with pytest.raises(release.Refused, match=r"is no version: give MAJOR\.MINOR\.PATCH"):
        release.make(tree, version)


def test_refuses_a_tree_with_changes(tree: Path) -> None:
    (tree / "notes").touch()
    with pytest.raises(release.Refused, match=r"the tree has changes \(\?\? notes\): commit or remove them"):
        release.make(tree, "0.1.0")


def test_refuses_a_version_that_a_part_does_not_have(tree: Path) -> None:
    with pytest.raises(release.Refused, match=r"galaxy\.yml has 0\.1\.0, .* not 0\.2\.0: set it there"):
        release.make(tree, "0.2.0")


@pytest.mark.parametrize(
    ("version", "reason"), [("0.2.0", "0.2.0 is released, from commit abc"), ("0.1.0", "is older than 0.2.0")]
)
def test_refuses_a_version_that_is_no_later_than_a_release(tree: Path, version: str, reason: str) -> None:
    (tree / release.ENTRIES).write_text("0.2.0: {commit: abc}\n")
    with pytest.raises(release.Refused, match=reason):
        release.make(tree, version)


def test_refuses_a_commit_at_which_the_suite_did_not_run(tree: Path) -> None:
    (tree / "README.md").write_text("Another.\n")
    commit(tree)
    with pytest.raises(release.Refused, match=r"the suite ran last at .*: run `make check`"):
        release.make(tree, "0.1.0")


@pytest.mark.parametrize("record", [None, "", "[]", '{"commit": "abc"}'])
def test_refuses_a_tree_without_a_record_of_the_suite(tree: Path, record: str | None) -> None:
    (tree / ".lab/timings.json").unlink()
    if record is not None:
        (tree / ".lab/timings.json").write_text(record)
    with pytest.raises(release.Refused, match="is no record of a run of the suite"):
        release.make(tree, "0.1.0")


@pytest.mark.parametrize("verdict", ["FAILED (1)", "passed, 2 of 9 tests left out for lack of time"])
def test_refuses_a_red_suite(tree: Path, verdict: str) -> None:
    record_suite(tree, lint=verdict)
    with pytest.raises(release.Refused, match="the suite is not green"):
        release.make(tree, "0.1.0")


def test_refuses_a_suite_of_some_parts(tree: Path) -> None:
    run = json.loads((tree / ".lab/timings.json").read_text())
    del run["parts"]["policy"]
    (tree / ".lab/timings.json").write_text(json.dumps(run))
    with pytest.raises(release.Refused, match="the suite ran without policy"):
        release.make(tree, "0.1.0")


@pytest.mark.parametrize("commit", ["a" * 40, "a" * 40 + "-dirty", "b" * 40])
def test_states_an_image_of_this_commit_alone(tmp_path: Path, commit: str) -> None:
    layout = Layout(tmp_path / ".lab/image/oci")
    layout.begin()
    labels = {"org.opencontainers.image.revision": f"git:{commit},npm"}
    image = layout.add_image([], {"config": {"Labels": labels}})
    record = {"variant": "cpu", "digest": image["digest"], "bundle_manifest": "c" * 64}
    (tmp_path / ".lab/image/image.json").write_text(json.dumps(record | {"serial": 2}))
    assert release.image(tmp_path, "a" * 40) == (record if commit == "a" * 40 else None)


needs_sphinx = pytest.mark.skipif(not site.PROGRAM.exists(), reason="needs `make peers PEER=docs`")
writes_changelogs = pytest.mark.skipif(
    not release.CHANGELOG_PROGRAM.exists(), reason="antsibull-changelog comes with `make peers PEER=release`"
)


@writes_changelogs
@pytest.mark.parametrize("fragment", ["major_changes: [", "major_changes: no list\n", "marvels: [One.]\n"])
def test_refuses_a_fragment_that_does_not_parse(tree: Path, fragment: str) -> None:
    (tree / "changelogs/fragments/edge.yml").write_text(fragment)
    commit(tree)
    record_suite(tree)
    with pytest.raises(release.Refused, match=r"antsibull-changelog failed:\n.*edge\.yml"):
        release.make(tree, "0.1.0")
    assert not (tree / "CHANGELOG.md").exists()


@writes_changelogs
def test_a_release_is_made_again_with_the_same_bytes(tree: Path) -> None:
    out = release.make(tree, "0.1.0")
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=out, check=True)
    entry = yaml.safe_load((tree / release.ENTRIES).read_text())["0.1.0"]
    assert set(entry["files"]) == {
        "llmkeep-estate-0.1.0.tar.gz",
        *(f"llmkeep{part}-0.1.0-py3-none-any.whl" for part in ("", "_core", "_payload", "_proof")),
        *(["llmkeep-docs-0.1.0.tar.gz"] if site.PROGRAM.exists() else []),
    }
    assert "* Edge - it answers, at last.\n" in (tree / "CHANGELOG.md").read_text()
    assert not (tree / "changelogs/fragments/edge.yml").exists()
    with tarfile.open(out / "llmkeep-estate-0.1.0.tar.gz") as collection:
        assert {"MANIFEST.json", "FILES.json", "CHANGELOG.md"} <= set(collection.getnames())
    commit(tree)
    release.verify(tree, "0.1.0")


@needs_sphinx
def test_the_documentation_of_a_release_is_a_folder_to_unpack(tree: Path, tmp_path: Path) -> None:
    release.pack_site(tree, tmp_path / "llmkeep-docs-0.1.0.tar.gz", 0)
    with tarfile.open(tmp_path / "llmkeep-docs-0.1.0.tar.gz") as archive:
        assert {name.split("/")[0] for name in archive.getnames()} == {"llmkeep-docs-0.1.0"}
        page = archive.extractfile("llmkeep-docs-0.1.0/README.html")
        assert page is not None
        assert b"<h1>README.md" in page.read()


@needs_sphinx
def test_refuses_documentation_with_a_broken_link(tree: Path, tmp_path: Path) -> None:
    (tree / "README.md").write_text("# Pages\n\nSee [this](gone.md).\n")
    with pytest.raises(release.Refused, match=r"broken links:\nREADME\.md:3: .*gone\.md"):
        release.pack_site(tree, tmp_path / "docs.tar.gz", 0)


@writes_changelogs
def test_a_release_with_other_bytes_is_not_verified(tree: Path) -> None:
    release.make(tree, "0.1.0")
    record = (tree / release.ENTRIES).read_text()
    entry = yaml.safe_load(record)["0.1.0"]
    (tree / release.ENTRIES).write_text(record.replace(next(iter(entry["files"].values())), "0" * 64))
    with pytest.raises(release.Refused, match="these have other bytes than released: llmkeep"):
        release.verify(tree, "0.1.0")
