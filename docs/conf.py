"""Settings of Sphinx for the documentation site: `make docs`. Its pages are the tree's Markdown, unchanged."""

import hashlib
import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.search.en import SearchEnglish

project = html_title = "llmkeep"
root_doc = "docs/README"
include_patterns = [
    "*.md",
    "docs/**",
    "lab/README.md",
    "payload/README.md",
    "roles/README.md",
    "roles/*/README.md",
    "tests/doubles/*/README.md",
]
extensions = ["myst_parser"]
html_theme = "furo"
html_copy_source = html_show_copyright = html_show_sphinx = False
highlight_language = "text"
smartquotes = False
# As GitHub makes them.
myst_heading_anchors = 6
# The decisions and the roles have a page of links each instead of sixty lines in the navigation of every page.
suppress_warnings = ["toc.not_included"]
# Chinese pages end in zh-CN, and no other one ends in N.
NAVIGATION = {
    "中文": ["/README.zh-CN", "/docs/*/*.zh-CN"],
    "Use": ["/README", "/payload/README", "/docs/use/*[!N]"],
    "Operate": ["/docs/operate/*[!N]", "/roles/README"],
    "Audit": ["/docs/audit/*[!N]", "/SECURITY"],
    "Develop": ["/docs/develop/*[!N]", "/docs/develop/decisions/README", "/CONTRIBUTING", "/lab/README"],
}
CHINESE = re.compile(r".*[.]zh-CN$")


class SearchBoth(SearchEnglish):
    """Words of English, and pairs of neighbouring characters of Chinese, which has no spaces between words."""

    language_name = "English and Chinese"
    # `split` below, for queries.
    js_splitter_code = r"""
function splitQuery(query) {
  const runs = query.match(/[\u4e00-\u9fff]+|(?:(?![\u4e00-\u9fff])[\p{Letter}\p{Number}_])+/gu) || [];
  return runs.flatMap((run) => {
    if (!/^[\u4e00-\u9fff]{3}/.test(run)) return [run];
    return Array.from({ length: run.length - 1 }, (_, at) => run.slice(at, at + 2));
  });
}
"""

    def split(self, text: str) -> list[str]:
        terms = []
        for run in re.findall(r"[\u4e00-\u9fff]+|[^\W\u4e00-\u9fff]+", text):
            pairs = "\u4e00" <= run[0] <= "\u9fff" and len(run) > 2
            terms += [run[at : at + 2] for at in range(len(run) - 1)] if pairs else [run]
        return terms


def add_navigation(_app: Sphinx, page: str, source: list[str]) -> None:
    if page == root_doc:
        for caption, pages in NAVIGATION.items():
            listing = "\n".join(pages)
            source[0] += f"\n```{{toctree}}\n:hidden:\n:glob:\n:caption: {caption}\n\n{listing}\n```\n"


def link_translation(app: Sphinx, page: str, source: list[str]) -> None:
    """Begin pages that have a Chinese one with a link to it: alerts lead to the English page."""
    chinese = f"{Path(page).name}.zh-CN.md"
    title, blank, rest = source[0].split("\n", 2)
    if f"{page}.zh-CN" in app.env.found_docs and not blank and f"]({chinese})" not in rest:
        # In the place of the empty line, so that warnings name the lines of the file.
        source[0] = f"{title}\n[中文]({chinese}) ·\n{rest}"


def name_language(_app: Sphinx, page: str, _template: str, context: dict[str, Any], _doctree: object) -> None:
    if CHINESE.match(page):
        context["language"] = "zh-CN"


def move_inline_code(app: Sphinx, failure: Exception | None) -> None:
    """Give scripts and styles in pages files of their own, since the mirror's Content-Security-Policy allows no others."""
    if failure:
        return
    static = Path(app.outdir, "_static")

    def as_file(match: re.Match[str]) -> str:
        kind, content = match.groups()
        name = f"{hashlib.sha256(content.encode()).hexdigest()[:16]}.{'js' if kind == 'script' else 'css'}"
        (static / name).write_text(content)
        address = "../" * depth + f"_static/{name}"
        if kind == "style":
            return f'<link rel="stylesheet" href="{address}">'
        return f'<script src="{address}"></script>'

    for page in Path(app.outdir).rglob("*.html"):
        depth = len(page.relative_to(app.outdir).parents) - 1
        text = re.sub(r"<(script|style)>(.*?)</\1>", as_file, page.read_text(), flags=re.DOTALL)
        page.write_text(re.sub(r' style="(display|opacity): ([^";]+);?"', r' \1="\2"', text))


def setup(app: Sphinx) -> None:
    app.add_search_language(SearchBoth)
    app.connect("source-read", add_navigation)
    app.connect("source-read", link_translation)
    app.connect("html-page-context", name_language)
    app.connect("build-finished", move_inline_code)
