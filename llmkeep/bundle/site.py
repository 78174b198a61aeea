"""The documentation as a site that a browser reads without a network: `make docs`, and `docs/` of a bundle.

Sphinx builds it with the settings in docs/conf.py, in an environment of its own that bench/peers/docs.txt pins; without that
environment a bundle has no site. The same pages and tools give the same bytes.
"""

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from llmkeep.bundle import cache, translations
from llmkeep.bundle.lock import Artifact
from llmkeep.errors import LlmkeepError
from llmkeep.source_tree import TREE, tracked

FOLDER = "docs"  # of a bundle
TOOLS = "bench/peers/docs.txt"
PROGRAM = TREE / "bench/.venv-docs/bin/sphinx-build"
LINK = re.compile(r"\]\(([^()#\s:]+)")
# Those of the theme; all others in _static are Sphinx's.
OF_FURO = ("furo", "debug.css", "skeleton.css")


def sources(tree: Path, names: list[str]) -> list[str]:
    """The site's sources among a tree's files: Markdown, docs/, and the files that pages link to."""
    chosen = {name for name in names if name.endswith(".md") or name.startswith("docs/")}
    for page in [name for name in chosen if name.endswith(".md")]:
        folder = Path(page).parent
        chosen |= {os.path.normpath(folder / link) for link in LINK.findall((tree / page).read_text())}
    return sorted(chosen & set(names))


def build(tree: Path, names: list[str], out: Path) -> list[str]:
    """Write the site of these files of a tree to `out`, a folder that is replaced.

    A Chinese page whose original has newer commits says so. Returns Sphinx's warnings, `PAGE:LINE: WARNING: …`, among
    them each link to a page or heading that does not exist. Raises LlmkeepError if Sphinx is not installed or fails, or
    a Chinese page names no original.
    """
    if not PROGRAM.exists():
        raise LlmkeepError(f"there is no {PROGRAM}: run `make peers PEER=docs`")
    with tempfile.TemporaryDirectory(prefix="llmkeep-docs-") as scratch:
        pages, made = Path(scratch, "pages"), Path(scratch, "made")
        for name in sources(tree, names):
            (pages / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(tree / name, pages / name)
        for page in translations.outdated(tree, names):
            text = (pages / page.page).read_text()
            (pages / page.page).write_text(text.replace(page.header, page.header + translations.OUTDATED, 1))
        ended = subprocess.run(
            [PROGRAM, "--quiet", "--no-color", "--nitpicky", "--doctree-dir", Path(scratch, "trees"),
             "-c", pages / "docs", pages, made],
            env=os.environ | {"PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )  # fmt: skip
        if ended.returncode:
            raise LlmkeepError(f"Sphinx built no site: {ended.stderr.strip()[-2000:]}")
        (made / ".buildinfo").unlink()
        shutil.rmtree(out, ignore_errors=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(made, out)
    return ended.stderr.replace(f"{pages}/", "").splitlines()


def place(folder: Path) -> dict[str, Artifact]:
    """Put the site of this checkout into a bundle; returns its third-party files by path in the bundle.

    The cache has the latest site. Warnings are printed: `make docs` and the test suite refuse them.
    """
    names = tracked(TREE, [])
    digest = hashlib.sha256(cache.sha256(TREE / TOOLS).encode())
    for name in sources(TREE, names):
        digest.update(f"\n{name} {cache.sha256(TREE / name)}".encode())
    digest.update("\n".join(page.page for page in translations.outdated(TREE, names)).encode())
    made = cache.home() / f"docs-{digest.hexdigest()[:16]}"
    if not made.exists():
        for outdated in cache.home().glob("docs-*"):
            shutil.rmtree(outdated)
        for warning in build(TREE, names, made):
            print(f"bundle: {warning}", flush=True)
    shutil.copytree(made, folder / FOLDER)
    return _artifacts(folder)


def _artifacts(folder: Path) -> dict[str, Artifact]:
    versions = dict(line.split()[0].lower().split("==") for line in (TREE / TOOLS).read_text().splitlines())
    artifacts = {}
    for path in sorted((folder / FOLDER / "_static").rglob("*")):
        if path.is_file():
            maker, licence = ("furo", "MIT") if path.name.startswith(OF_FURO) else ("sphinx", "BSD-2-Clause")
            artifacts[str(path.relative_to(folder))] = Artifact(
                path.name,
                versions[maker],
                cache.sha256(path),
                path.stat().st_size,
                licence,
                f"pkg:pypi/{maker}@{versions[maker]}",
            )
    return artifacts


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Build the documentation site of this checkout's tracked files."
    )
    parser.add_argument("out", type=Path, help="folder, which is replaced")
    out = parser.parse_args().out
    try:
        names = tracked(TREE, [])
        warnings = build(TREE, names, out)
        for page, commits in translations.outdated(TREE, names).items():
            print(f"{page.page}: {page.original} is newer, by {', '.join(commits)}")
    except LlmkeepError as error:
        warnings = [str(error)]
    print("\n".join(warnings) or f"{out}/docs/README.html", file=sys.stderr if warnings else sys.stdout)
    return int(bool(warnings))


if __name__ == "__main__":
    sys.exit(main())
