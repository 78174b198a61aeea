"""Paths and links in documentation, docstrings and comments lead somewhere."""

import io
import itertools
import os
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from plugin_modules import ROOT

NOT_OURS = {"node_modules", "__pycache__", "changelogs"}  # changelogs describe the past
COMMENTED = {".yml", ".yaml", ".j2", ".sh", ".toml", ".cfg", ""}
PLACEHOLDERS = re.compile(r"\b(FAMILY|ID|NAME|PEER|PROFILE)\b|…")
FOLDERS = "|".join(
    re.escape(each.name) for each in ROOT.iterdir() if each.is_dir() and not each.name.startswith(".")
)
# A path from the root of the tree, and after a colon what it defines.
PATH = re.compile(
    rf"(?<![\w./~$}}{{-])((?:{FOLDERS})/(?:\{{[^}}\s]*\}}|[^\s`'\"()<>\[\],;|:])*)(?:::?(\w[\w.]*))?"
)
CODE = re.compile(r"`([^`]+)`")
# Beside a path in a sentence: what it defines, or another file by its name alone.
BESIDE = re.compile(rf"`((?:{FOLDERS})/[\w./-]+)`, `([A-Za-z_][\w.]*)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")


def files(folder: Path) -> Iterator[Path]:
    """The tree's own files below `folder`, without what is hidden or built."""
    for parent, folders, names in os.walk(folder):
        folders[:] = [each for each in folders if not each.startswith(".") and each not in NOT_OURS]
        yield from (Path(parent, name) for name in names)


def docstrings_and_comments(text: str) -> Iterator[str]:
    """Those of a Python program."""
    previous = tokenize.NEWLINE
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        starts_statement = previous in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
        if token.type == tokenize.COMMENT or (token.type == tokenize.STRING and starts_statement):
            yield token.string
        if token.type not in (tokenize.COMMENT, tokenize.NL):
            previous = token.type


def without_code_blocks(text: str) -> str:
    """Markdown without its fenced blocks."""
    return re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)


def statements(path: Path, text: str) -> Iterator[str]:
    """The parts of a file that may name paths: code in Markdown, else docstrings and comments."""
    if path.suffix == ".md":
        yield from CODE.findall(without_code_blocks(text))
    elif path.suffix == ".py" and PATH.search(text):
        yield from docstrings_and_comments(text)
    elif path.suffix in COMMENTED:
        yield from re.findall(r"(?:^|\s)#\s(.*)", text, re.MULTILINE)


def alternatives(name: str) -> Iterator[str]:
    """`a/{b,c}` is `a/b` and `a/c`."""
    parts = [
        each[1:-1].split(",") if each[0] == "{" else [each] for each in re.findall(r"\{.*?\}|[^{]+", name)
    ]
    return map("".join, itertools.product(*parts))


@cache
def exists(name: str, folder: Path) -> bool:
    """Whether a path or pattern matches a file or folder below `folder`; what is hidden is built, and may be absent."""
    shown = re.split(r"(?<=/)\.", name)[0]
    pattern = PLACEHOLDERS.sub("*", shown.rstrip(".…/") if shown.endswith((".", "/")) else shown)
    return (folder / pattern).exists() or any(folder.glob(pattern))


@cache
def file_names() -> set[str]:
    return {each.name for each in files(ROOT)}


@cache
def content(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def defines(path: Path, name: str) -> bool:
    """Whether the file has the last part of `Class.name` as a word; a number is a line."""
    if name.isdigit():
        return content(path).count("\n") >= int(name)
    return re.search(rf"\b{re.escape(name.split('.')[-1])}\b", content(path)) is not None


def wrong_paths(path: Path, text: str) -> list[str]:
    """Paths from the root of the tree, in a file's statements, that do not exist or lack what they are to define.

    A command that begins with `cd FOLDER && ` names paths of that folder.
    """
    wrong = []
    for statement in statements(path, text):
        entered = re.match(r"cd (\w+) && ", statement)
        folder = ROOT / entered[1] if entered else ROOT
        for written, name in PATH.findall(statement):
            for each in alternatives(written):
                if not exists(each, folder):
                    wrong.append(each)
                elif name and (folder / each).is_file() and not defines(folder / each, name):
                    wrong.append(f"{each}:{name}")
    if path.suffix == ".md":
        wrong += [
            f"{file}, {name}"
            for file, name in BESIDE.findall(text)
            if (ROOT / file).is_file() and not (defines(ROOT / file, name) or name in file_names())
        ]
    return wrong


@cache
def anchors(path: Path) -> set[str]:
    """The fragments of a Markdown page, as GitHub and GitLab derive them from its headings."""
    taken: set[str] = set()
    for heading in re.findall(r"^#+ +(.*?) *$", without_code_blocks(content(path)), re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        base = re.sub(r"[^\w -]", "", plain).lower().replace(" ", "-")
        taken.add(
            next(name for n in itertools.count() if (name := f"{base}-{n}" if n else base) not in taken)
        )
    return taken


def wrong_links(path: Path, text: str) -> list[str]:
    """Links of a Markdown page to files or headings that do not exist."""
    wrong = []
    for link in LINK.findall(CODE.sub("", without_code_blocks(text))):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, fragment = link.partition("#")
        target = path.parent / name if name else path
        if not target.exists() or (fragment and target.suffix == ".md" and fragment not in anchors(target)):
            wrong.append(link)
    return wrong


def test_every_path_that_is_documented_exists() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}: {each}"
        for path in files(ROOT)
        if path.suffix in {".md", ".py", *COMMENTED}
        for each in wrong_paths(path, content(path))
    ]
    assert not wrong, "\n".join(["correct the path, or write a placeholder of PLACEHOLDERS in it:", *wrong])


def test_every_link_leads_to_a_file_and_a_heading() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}: {each}"
        for path in files(ROOT)
        if path.suffix == ".md"
        for each in wrong_links(path, content(path))
    ]
    assert not wrong, "\n".join(["correct the link:", *wrong])


@pytest.mark.parametrize(
    ("name", "text", "wrong"),
    [
        ("a.md", "`docs/none.md`, `docs/README.md`, docs/none", ["docs/none.md"]),
        ("a.md", "```\ncat docs/none.md\n```\n`lab/{ask,none}.py`", ["lab/none.py"]),
        ("a.md", "`roles/NAME/README.md`, `roles/*/tasks/…`, `bench/.wheels`, `/srv/docs/none`", []),
        ("a.md", "`roles/NAME/none.md`", ["roles/NAME/none.md"]),
        ("a.md", "`cd payload && pytest tests/web` and `pytest tests/web`", ["tests/web"]),
        ("a.md", "`lab/ask.py:ask`, `lab/ask.py:nor`", ["lab/ask.py:nor"]),
        ("a.md", "`lab/ask.py`, `Answer`; `lab/ask.py`, `nor`", ["lab/ask.py, nor"]),
        ("a.py", '"""See docs/DESIGN: roles."""\nx = "docs/none"  # docs/nor', ["docs/DESIGN", "docs/nor"]),
        ("a.py", 'def f():\n    """Is roles/none\'s."""\n    return """docs/none"""', ["roles/none"]),
        ("a.yml", "# As docs/none.md says.\nkey: docs/nor.md", ["docs/none.md"]),
    ],
)
def test_a_wrong_path_is_named(name: str, text: str, wrong: list[str]) -> None:
    assert wrong_paths(ROOT / name, text) == wrong


def test_a_wrong_link_is_named(tmp_path: Path) -> None:
    (tmp_path / "b.md").write_text("# One *thing*\n## Two: `it`\n## Two: `it`\n```\n# Not\n```\n")
    links = ["b.md", "b.md#one-thing", "b.md#two-it-1", "https://example.org/none", "b.md#not", "none.md"]
    text = " ".join(f"[x]({each})" for each in links)
    assert wrong_links(tmp_path / "a.md", text) == ["b.md#not", "none.md"]


def test_the_index_of_decisions_has_each_of_them_once_by_its_title() -> None:
    folder = ROOT / "docs/develop/decisions"
    index = re.sub(r"\s+", " ", (folder / "README.md").read_text())
    entries = re.findall(r" - \[(.*?)\]\((\d{4}-\S+\.md)\)", index)
    pages = list(folder.glob("0*.md"))
    titles = {(page.read_text().partition("\n")[0].removeprefix("# "), page.name) for page in pages}
    assert (set(entries), len(entries)) == (titles, len(pages))
