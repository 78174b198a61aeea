"""The documentation as a site: every link leads somewhere, and a page needs nothing but the site."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from llmkeep.bundle import build, manifest, site, translations
from llmkeep.errors import LlmkeepError
from llmkeep.source_tree import TREE, tracked

pytestmark = pytest.mark.skipif(not site.PROGRAM.exists(), reason="needs `make peers PEER=docs`")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The site of this checkout, and the warnings."""
    out = tmp_path_factory.mktemp("whole") / "site"
    return out, site.build(TREE, tracked(TREE, []), out)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A tree of two pages."""
    tree = tmp_path / "tree"
    (tree / "docs").mkdir(parents=True)
    shutil.copy(TREE / "docs/conf.py", tree / "docs")
    (tree / "docs/README.md").write_text("# Pages\n\nSee [the other](other.md#a-heading).\n")
    (tree / "docs/other.md").write_text("# Other\n\n## A heading\n")
    return tree


def names(tree: Path) -> list[str]:
    return [str(path.relative_to(tree)) for path in sorted(tree.rglob("*")) if path.is_file()]


def warnings(tree: Path) -> list[str]:
    """Those of broken links; a small tree also lacks what the navigation lists."""
    return [line for line in site.build(tree, names(tree), tree.parent / "out") if "xref" in line]


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names(folder)}


def test_each_link_in_the_documentation_leads_to_a_page_and_a_heading(whole: tuple[Path, list[str]]) -> None:
    assert whole[1] == []


def test_a_page_has_no_inline_code_and_loads_nothing_from_elsewhere(whole: tuple[Path, list[str]]) -> None:
    pages = [path.read_text() for path in whole[0].rglob("*.html")]
    assert len(pages) > 100
    forbidden = (
        r'<script>|<style|<[^>]* style=|<[^>]* on[a-z]+="|(?:src|rel="stylesheet" href)="(?:https?:)?//'
    )
    assert not [hit for page in pages for hit in re.findall(forbidden, page)]


def test_chinese_pages_are_marked_as_such(whole: tuple[Path, list[str]]) -> None:
    assert re.search(r"<html [^>]*lang=.zh-CN", (whole[0] / "README.zh-CN.html").read_text())
    assert re.search(r"<html [^>]*lang=.en", (whole[0] / "README.html").read_text())


def test_a_page_links_to_its_chinese_one_and_back(whole: tuple[Path, list[str]]) -> None:
    for page, other, name in (
        ("metrics", "metrics.zh-CN", "中文"),
        ("metrics.zh-CN", "metrics", "metrics.md"),
    ):
        text = (whole[0] / f"docs/operate/{page}.html").read_text()
        assert re.search(rf'href="{other}[.]html"><span[^>]*>{name}</span>', text), page


def test_alerts_find_their_runbooks_on_the_site(whole: tuple[Path, list[str]]) -> None:
    headings = re.findall(r"^### ([a-z-]+)$", (TREE / "docs/operate/metrics.md").read_text(), re.MULTILINE)
    ids = re.findall(r'id="([^"]+)"', (whole[0] / "docs/operate/metrics.html").read_text())
    assert set(headings) <= set(ids)


@pytest.mark.parametrize("link", ["gone.md", "other.md#gone", "#gone", "../gone/README.md"])
def test_a_link_that_leads_nowhere_is_named_with_its_line(small: Path, link: str) -> None:
    (small / "docs/README.md").write_text(f"# Pages\n\nSee [this]({link}).\n")
    [warning] = warnings(small)
    assert warning.startswith("docs/README.md:3: WARNING:")
    assert "gone" in warning


def test_the_same_pages_give_the_same_bytes(small: Path, tmp_path: Path) -> None:
    for out in ("first", "second"):
        site.build(small, names(small), tmp_path / out)
    assert contents(tmp_path / "first") == contents(tmp_path / "second")


def test_a_chinese_page_says_that_its_original_is_newer(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (small / "docs/other.zh-CN.md").write_text(
        "# 其他\n\n译自 [other.md](other.md)，原文提交：`0123456789ab`。\n"
    )
    assert warnings(small) == []
    page = small.parent / "out/docs/other.zh-CN.html"
    assert "英文页较新" not in page.read_text()
    monkeypatch.setattr(
        translations,
        "outdated",
        lambda tree, names: {translations.translation(tree, names[-1]): ["abcdef0"]},
    )
    assert warnings(small) == []
    assert "<strong>英文页较新。</strong>" in page.read_text()


def test_files_that_pages_link_to_are_part_of_the_site(small: Path) -> None:
    (small / "inventory").mkdir()
    for name in ("hosts.yml", "other.yml"):
        (small / "inventory" / name).write_text(name)
    (small / "docs/other.md").write_text(
        "# Other\n\nStart from [this](../inventory/hosts.yml).\n\n## A heading\n"
    )
    assert warnings(small) == []
    copied = [name for name in names(small.parent / "out") if name.startswith("_downloads/")]
    assert [Path(name).name for name in copied] == ["hosts.yml"]


def test_a_bundle_has_the_site_with_the_licences_of_its_makers(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(site, "TREE", small)
    (small / site.TOOLS).parent.mkdir(parents=True)
    shutil.copy(TREE / site.TOOLS, small / site.TOOLS)
    for command in (["init", "--quiet"], ["add", "--all"]):
        subprocess.run(["git", "-C", small, *command], check=True)
    sources = site.place(tmp_path / "bundle")
    entries = {entry.path: entry for entry in build._entries(tmp_path / "bundle", sources)}
    assert set(entries) == set(manifest.walk(tmp_path / "bundle"))
    page, theme = entries["docs/docs/README.html"], entries["docs/_static/styles/furo.css"]
    assert (page.media_type, page.licence) == ("text/html", "Apache-2.0")
    assert (theme.licence, theme.purl.partition("@")[0]) == ("MIT", "pkg:pypi/furo")
    assert entries["docs/_static/searchtools.js"].licence == "BSD-2-Clause"


def test_a_bundle_takes_the_site_of_the_same_pages_from_the_cache(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(site, "TREE", small)
    monkeypatch.setattr(site, "tracked", lambda tree, _exclude: names(tree))
    (small / site.TOOLS).parent.mkdir(parents=True)
    shutil.copy(TREE / site.TOOLS, small / site.TOOLS)
    site.place(tmp_path / "first")
    with monkeypatch.context() as without_sphinx:
        without_sphinx.setattr(site, "PROGRAM", tmp_path / "none")
        site.place(tmp_path / "second")
        (small / "docs/other.md").write_text("# Changed\n\n## A heading\n")
        with pytest.raises(LlmkeepError, match="make peers PEER=docs"):
            site.place(tmp_path / "third")
    assert contents(tmp_path / "first") == contents(tmp_path / "second")
