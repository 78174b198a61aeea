"""Chinese pages name the commit of the page that they translate, and fall behind when it changes."""

import subprocess
from pathlib import Path

import pytest

from llmkeep.bundle import translations
from llmkeep.errors import LlmkeepError
from llmkeep.source_tree import TREE

ORIGINAL, PAGE = "docs/page.md", "docs/page.zh-CN.md"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with a page and, uncommitted, its translation at the page's first commit."""
    tree = tmp_path / "tree"
    (tree / "docs").mkdir(parents=True)
    (tree / ORIGINAL).write_text("# Page\n")
    git(tree, "init", "--quiet")
    translate(tree, commit(tree, ORIGINAL))
    return tree


def git(tree: Path, *command: str) -> str:
    identity = ("-c", "user.name=A", "-c", "user.email=a@example.org")
    return subprocess.run(
        ["git", "-C", tree, *identity, *command], capture_output=True, text=True, check=True
    ).stdout.strip()


def commit(tree: Path, name: str) -> str:
    git(tree, "add", name)
    git(tree, "commit", "--quiet", "--message", "Change")
    return git(tree, "rev-parse", "HEAD")


def translate(tree: Path, at: str) -> None:
    (tree / PAGE).write_text(f"# 页面\n\n译自 [page.md](page.md)，原文提交：`{at[:12]}`。\n")


def outdated(tree: Path) -> dict[str, int]:
    """Outdated pages, and the number of commits by which each one is behind."""
    pages = translations.outdated(tree, [ORIGINAL, PAGE])
    return {page.page: len(commits) for page, commits in pages.items()}


def test_each_chinese_page_names_its_original_and_a_commit() -> None:
    pages = [*TREE.glob("*.zh-CN.md"), *TREE.glob("docs/**/*.zh-CN.md")]
    assert len(pages) > 5
    for page in pages:
        assert (TREE / translations.translation(TREE, str(page.relative_to(TREE))).original).is_file()


@pytest.mark.parametrize(
    "line",
    [
        "",
        "正文",
        "译自 [page.md](page.md)。",
        "译自 [page.md](page.md)，原文提交：`0123456`。",
        "译自 [page.md](page.md)，原文提交：`main`。",
        "译自 [other.md](other.md)，原文提交：`0123456789ab`。",
    ],
)
def test_a_page_without_original_or_commit_is_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / PAGE).write_text(f"# 页面\n\n{line}\n")
    with pytest.raises(LlmkeepError, match=r"git log -1 --format=%H -- docs/page\.md"):
        translations.outdated(tmp_path, [PAGE])


def test_a_page_is_outdated_once_its_original_changes(checkout: Path) -> None:
    assert outdated(checkout) == {}
    for text in ("# Changed\n", "# Changed again\n"):
        (checkout / ORIGINAL).write_text(text)
        latest = commit(checkout, ORIGINAL)
    assert outdated(checkout) == {PAGE: 2}
    translate(checkout, latest)
    assert outdated(checkout) == {}


def test_changes_of_other_pages_leave_a_page_current(checkout: Path) -> None:
    (checkout / "docs/other.md").write_text("# Other\n")
    commit(checkout, "docs/other.md")
    assert outdated(checkout) == {}


def test_an_archive_has_no_outdated_pages(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / ORIGINAL).write_text("# Changed\n")
    translate(tmp_path, "0123456789ab")
    assert outdated(tmp_path) == {}


def test_a_checkout_of_the_last_commit_alone_has_no_outdated_pages(checkout: Path, tmp_path: Path) -> None:
    git(checkout, "add", PAGE)
    (checkout / ORIGINAL).write_text("# Changed\n")
    commit(checkout, ORIGINAL)
    assert outdated(checkout) == {PAGE: 1}
    git(tmp_path, "clone", "--quiet", "--depth", "1", checkout.as_uri(), "shallow")
    assert outdated(tmp_path / "shallow") == {}
