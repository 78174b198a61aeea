"""`make release VERSION=X.Y.Z`: the files of a release in dist/…, CHANGELOG.md, and the release's entry in changelogs/.

Everything is made from the commit that is checked out, in a copy: the collection, wheels of llmkeep, llmkeep-core,
llmkeep-proof and llmkeep-payload, the documentation site where its tools are installed, and SHA256SUMS. The same commit and
tools give the same bytes: dates are the commit's. `changelogs/releases.yml` has the commit, the parts of the suite that passed
there, each file's sha256, and the digest of the image in `.lab/image` if it was made from this commit. No tag is read.

`--verify`: build the release again from the commit that releases.yml names, and compare digests; nothing is changed.

Exit codes: 0 done, 1 refused or different, with one sentence.
"""

import argparse
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from llmkeep.bundle import site, wheels
from llmkeep.errors import LlmkeepError

PROGRAMS = Path(sys.executable).parent
CHANGELOG_PROGRAM = Path(__file__).parents[1] / "bench/.venv-release/bin/antsibull-changelog"
PARTS = [".", "llmcore", "llmproof", "payload"]  # with wheels; the lab is never shipped
VERSIONED = [*PARTS, "lab"]
SUITE = {"lint", "types", "policy", "unit-control", "unit-serving", "unit-training"}  # of `make check`
ENTRIES = Path("changelogs/releases.yml")


class Refused(LlmkeepError):
    """No release is made. The message states why, the value seen and the way out."""


@dataclass(frozen=True)
class Release:
    """An entry of releases.yml. `files`: sha256 by name. `image`: variant, digest and bundle_manifest of an image's record."""

    commit: str
    date: str
    suite: list[str]
    files: dict[str, str]
    image: dict[str, str] | None


def git(tree: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", tree, *arguments], capture_output=True, text=True, check=True).stdout


def entries(tree: Path) -> dict[str, Any]:
    """Releases by version, as releases.yml has them."""
    path = tree / ENTRIES
    return (yaml.safe_load(path.read_text()) or {}) if path.exists() else {}


def numbers(version: str) -> tuple[int, ...]:
    """The numbers of MAJOR.MINOR.PATCH; Refused if the version is none."""
    if not re.fullmatch(r"(0|[1-9]\d*)(\.(0|[1-9]\d*)){2}", version, re.ASCII):
        raise Refused(f"{version!r} is no version: give MAJOR.MINOR.PATCH without leading zeros, as 0.1.0")
    return tuple(map(int, version.split(".")))


def require_releasable(tree: Path, version: str) -> list[str]:
    """The parts of the suite that passed at this very commit; Refused unless the tree may become this release."""
    later = numbers(version)
    released = entries(tree)
    if version in released:
        raise Refused(
            f"{version} is released, from commit {released[version]['commit']}: give a later version"
        )
    if (newest := max(map(numbers, released), default=())) and later < newest:
        raise Refused(
            f"{version} is older than {'.'.join(map(str, newest))}, which is released: give a later one"
        )
    if changes := git(tree, "status", "--porcelain").splitlines():
        raise Refused(f"the tree has changes ({', '.join(changes[:5])}): commit or remove them")
    different = [f"{file} has {seen}" for file, seen in versions(tree).items() if seen != version]
    if different:
        raise Refused(f"{', '.join(different)}, not {version}: set it there, commit, and run `make check`")
    return green_parts(tree, git(tree, "rev-parse", "HEAD").strip())


def versions(tree: Path) -> dict[str, str]:
    """The version that each part states, by file."""
    files = {f"{part}/pyproject.toml".removeprefix("./"): part for part in VERSIONED}
    stated = {file: tomllib.loads((tree / file).read_text())["project"]["version"] for file in files}
    return {"galaxy.yml": yaml.safe_load((tree / "galaxy.yml").read_text())["version"]} | stated


def green_parts(tree: Path, commit: str) -> list[str]:
    """The parts of the last run of the suite; Refused unless it was green and ran at this commit."""
    path = tree / ".lab/timings.json"
    try:
        run = json.loads(path.read_text())
        ran, verdicts = run["commit"], {part: each["verdict"] for part, each in run["parts"].items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Refused(f"{path} is no record of a run of the suite ({error!r}): run `make check`") from error
    if ran != commit:
        raise Refused(f"the suite ran last at {ran}, and this is {commit}: run `make check`")
    if red := {part: verdict for part, verdict in verdicts.items() if verdict != "passed"}:
        raise Refused(f"the suite is not green at {commit} ({red}): run `make check`")
    if missing := sorted(SUITE - verdicts.keys()):
        raise Refused(f"the suite ran without {', '.join(missing)} at {commit}: run `make check`")
    return sorted(verdicts)


@contextmanager
def copy(tree: Path, commit: str) -> Iterator[Path]:
    """The files of a commit, in a folder of their own."""
    with tempfile.TemporaryDirectory(prefix="llmkeep-release-") as folder:
        place = Path(folder, "llmkeep")
        archive = subprocess.run(
            ["git", "-C", tree, "archive", commit], capture_output=True, check=True
        ).stdout
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            files.extractall(place, filter="data")
        yield place


def run(place: Path, *command: Path | str, environment: Mapping[str, str] | None = None) -> None:
    ended = subprocess.run(
        command,
        cwd=place,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **(environment or {})},
    )
    if ended.returncode:
        raise Refused(f"{command[0]} failed:\n{(ended.stdout + ended.stderr).strip()[-2000:]}")


def write_changelog(place: Path, version: str, date: str) -> None:
    """CHANGELOG.md and changelogs/changelog.yaml with what the fragments state, which are removed."""
    if not CHANGELOG_PROGRAM.exists():
        raise Refused(f"there is no {CHANGELOG_PROGRAM}: run `make peers PEER=release`")
    if not list(place.glob("changelogs/fragments/*.y*ml")):
        raise Refused("changelogs/fragments has no fragment: state there what users notice")
    run(place, CHANGELOG_PROGRAM, "lint")
    run(place, CHANGELOG_PROGRAM, "release", "--version", version, "--date", date)
    # Nothing that a reader sees needs the backslashes before these.
    page = place / "CHANGELOG.md"
    page.write_text(re.sub(r"\\([.,:;'\-()!?/])", r"\1", page.read_text()))


def build(place: Path, out: Path, epoch: int) -> dict[str, str]:
    """Build the release's files from a commit's files with its changelog; their sha256 by name. `epoch`: the commit's time."""
    out.mkdir(parents=True)
    (place.parent / "ansible.cfg").touch()  # instead of the machine's own
    home = {
        "ANSIBLE_HOME": str(place.parent / "ansible"),
        "ANSIBLE_CONFIG": str(place.parent / "ansible.cfg"),
    }
    run(place, PROGRAMS / "ansible-galaxy", "collection", "build", "--output-path", out, environment=home)
    (collection,) = out.glob("*.tar.gz")
    normalize(collection, epoch)
    for part in PARTS:
        wheels.build(place / part, out)
    if site.PROGRAM.exists():
        version = yaml.safe_load((place / "galaxy.yml").read_text())["version"]
        pack_site(place, out / f"llmkeep-docs-{version}.tar.gz", epoch)
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.iterdir())}
    (out / "SHA256SUMS").write_text("".join(f"{digest}  {name}\n" for name, digest in digests.items()))
    return digests


def normalize(collection: Path, epoch: int) -> None:
    """Write a collection's archive anew, in the order of names and with one time.

    ansible-galaxy takes the order from the file system, and times from the clock.
    """
    with tarfile.open(collection) as archive:
        members = {
            each.name: (each, file.read() if (file := archive.extractfile(each)) and each.isfile() else b"")
            for each in archive
        }
    listing = json.loads(members["FILES.json"][1])
    listing["files"].sort(key=lambda each: str(each["name"]))
    listed = json.dumps(listing, indent=1).encode()
    manifest = json.loads(members["MANIFEST.json"][1])
    manifest["file_manifest_file"]["chksum_sha256"] = hashlib.sha256(listed).hexdigest()
    contents = {"MANIFEST.json": json.dumps(manifest, indent=1).encode(), "FILES.json": listed}
    names = [*contents, *sorted(members.keys() - contents.keys())]
    pack(collection, epoch, ((members[name][0], contents.get(name, members[name][1])) for name in names))


def pack(path: Path, epoch: int, members: Iterable[tuple[tarfile.TarInfo, bytes]]) -> None:
    """Write an archive of these members, in their order and with one time."""
    with (
        path.open("wb") as file,
        gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=epoch) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.GNU_FORMAT) as archive,
    ):
        for member, content in members:
            member.mtime, member.size = epoch, len(content)
            archive.addfile(member, io.BytesIO(content))


def pack_site(place: Path, path: Path, epoch: int) -> None:
    """Write the documentation site as an archive, in a folder of the archive's name; Refused if a link is broken."""
    made = place.parent / path.name.removesuffix(".tar.gz")
    names = [str(each.relative_to(place)) for each in place.rglob("*") if each.is_file()]
    if warnings := site.build(place, names, made):
        raise Refused("the documentation has broken links:\n" + "\n".join(warnings))
    files = [each for each in sorted(made.rglob("*")) if each.is_file()]
    members = ((tarfile.TarInfo(str(each.relative_to(made.parent))), each.read_bytes()) for each in files)
    pack(path, epoch, members)


def image(tree: Path, commit: str) -> dict[str, str] | None:
    """The record of the image in .lab/image if it was made from this commit."""
    folder = tree / ".lab/image"
    if not (folder / "image.json").is_file():
        return None

    def blob(digest: str) -> Any:
        return json.loads((folder / "oci/blobs/sha256" / digest.removeprefix("sha256:")).read_text())

    record = json.loads((folder / "image.json").read_text())
    labels = blob(blob(record["digest"])["config"]["digest"])["config"]["Labels"]
    if f"git:{commit}" not in labels["org.opencontainers.image.revision"].split(","):
        return None
    return {name: record[name] for name in ("variant", "digest", "bundle_manifest")}


def make(tree: Path, version: str) -> Path:
    """Make a release of a tree's commit; the folder of its files. CHANGELOG.md and changelogs/ are changed, to be committed."""
    suite = require_releasable(tree, version)
    commit, date, epoch = git(tree, "show", "-s", "--date=format:%Y-%m-%d", "--format=%H %cd %ct").split()
    out = tree / "dist" / version
    with copy(tree, commit) as place:
        write_changelog(place, version, date)
        shutil.rmtree(out, ignore_errors=True)
        files = build(place, out, int(epoch))
        release = Release(commit, date, suite, files, image(tree, commit))
        for name in ("CHANGELOG.md", "changelogs/changelog.yaml"):
            shutil.copy(place / name, tree / name)
        for fragment in (tree / "changelogs/fragments").iterdir():
            if not (place / "changelogs/fragments" / fragment.name).exists():
                fragment.unlink()
    every = entries(tree) | {version: asdict(release)}
    (tree / ENTRIES).write_text("---\n" + yaml.safe_dump(every, sort_keys=False, width=120))
    return out


def verify(tree: Path, version: str) -> None:
    """Build a release again from its commit; Refused if a file differs from the digest in releases.yml."""
    numbers(version)
    if version not in entries(tree):
        raise Refused(f"{tree / ENTRIES} has no {version}: check out a commit that has it")
    release = Release(**entries(tree)[version])
    epoch = int(git(tree, "show", "-s", "--format=%ct", release.commit))
    with copy(tree, release.commit) as place:
        write_changelog(place, version, release.date)
        files = build(place, place.parent / "dist", epoch)
    if different := sorted(name for name, _ in set(files.items()) ^ set(release.files.items())):
        names = ", ".join(dict.fromkeys(different))
        raise Refused(f"built again from {release.commit}, these have other bytes than released: {names}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("version", metavar="VERSION", help="MAJOR.MINOR.PATCH")
    parser.add_argument("--tree", type=Path, default=Path(__file__).parents[1], help="default: this one")
    parser.add_argument("--verify", action="store_true", help="build a release again and compare")
    arguments = parser.parse_args()
    try:
        if arguments.verify:
            verify(arguments.tree, arguments.version)
            print(f"{arguments.version}: the same bytes as released")
        else:
            out = make(arguments.tree, arguments.version)
            print(f"{out}: made; commit CHANGELOG.md and changelogs as `Release {arguments.version}`")
    except (LlmkeepError, subprocess.CalledProcessError) as error:
        reason = error.stderr if isinstance(error, subprocess.CalledProcessError) else error
        print(f"release: {reason}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
