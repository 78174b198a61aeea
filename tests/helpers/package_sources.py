"""Real, signed repositories of tiny packages: stand-ins of Debian and of vendors, for apt itself."""

import datetime
import subprocess
from collections.abc import Sequence
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import small_bundle

from llmkeep.bundle import signing


def deb(folder: Path, name: str, version: str = "1.0", copyright_file: str = "", **fields: str) -> Path:
    """Build a package; `fields` are those of its control file, with `_` for `-`."""
    root = folder / f"{name}_{version}"
    (root / "DEBIAN").mkdir(parents=True)
    control = {
        "Package": name,
        "Version": version,
        "Architecture": "amd64",
        "Maintainer": "A test <test@example.org>",
        **{key.replace("_", "-"): value for key, value in fields.items()},
        "Description": "a package of a test",
    }
    (root / "DEBIAN/control").write_text("".join(f"{key}: {value}\n" for key, value in control.items()))
    if copyright_file:
        place = root / "usr/share/doc" / name / "copyright"
        place.parent.mkdir(parents=True)
        place.write_text(copyright_file)
    made = folder / f"{name}_{version}_amd64.deb"
    subprocess.run(["dpkg-deb", "-Znone", "--build", str(root), str(made)], check=True, capture_output=True)
    return made


def publish(
    root: Path,
    keys: Path,
    debs: Sequence[Path],
    suite: str = "stable",
    origin: str = "Vendor",
    days: int = 9,
    lie: tuple[str, str] = ("", ""),
) -> Path:
    """A repository with one suite (`/`: a flat one), valid for so many days; `keys` sign it.

    `lie`: what its index says, and says instead.
    """
    flat = suite == "/"
    pool, place = root / "pool" / suite.strip("/"), root if flat else root / "dists" / suite
    index = place / "Packages" if flat else place / "main/binary-amd64/Packages"
    for folder in (pool, index.parent):
        folder.mkdir(parents=True, exist_ok=True)
    for path in debs:
        (pool / path.name).hardlink_to(path)
    index.write_text(_ftparchive(root, "packages", str(pool.relative_to(root))).decode().replace(*lie))
    until = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)
    facts = {
        "Origin": origin,
        "Suite": suite,
        "Codename": suite,
        "Components": "main",
        "Architectures": "amd64",
    }
    options = [f"--option=APT::FTPArchive::Release::{key}={value}" for key, value in facts.items()]
    release = place / "Release"
    content = _ftparchive(root, *options, "release", str(place.relative_to(root)))
    # apt-ftparchive leaves a date out that has passed.
    release.write_bytes(f"Valid-Until: {format_datetime(until, usegmt=True)}\n".encode() + content)
    signing.sign_inline(keys / "signing.key", release, place / "InRelease")
    release.unlink()
    return root


def use_as_debian(folder: Path, root: Path, keys: Path, suites: Sequence[str]) -> Path:
    """An apt configuration for APT_CONFIG whose machine has this repository as its Debian mirror."""
    state = folder / "machine"
    (state / "lists/partial").mkdir(parents=True)
    lines = [f"deb [signed-by={keys / 'keyring.pgp'}] file:{root} {suite} main\n" for suite in suites]
    (state / "sources.list").write_text("".join(lines))
    config = state / "apt.conf"
    config.write_text(
        f'Dir::State::Lists "{state}/lists"; Dir::Etc::sourcelist "{state}/sources.list"; Dir::Etc::sourceparts "/dev/null";\n'
        f'Dir::Cache "{state}"; APT::Sandbox::User "root"; Acquire::Check-Valid-Until "true"; Acquire::Check-Date "true";\n'
        'Acquire::Retries "0";\n'
    )
    subprocess.run(
        ["apt-get", "-qq", "update"], env={"APT_CONFIG": str(config), "PATH": "/usr/bin:/bin"}, check=True
    )
    return config


def key_pair(folder: Path) -> Path:
    """A vendor's or Debian's keys."""
    folder.mkdir(parents=True, exist_ok=True)
    return Path(small_bundle.signing_keys(folder))


def vendor(root: Path, keys: Path, packages: Sequence[str], **more: Any) -> dict[str, Any]:
    """The entry in `apt.sources` of a repository on this machine; its key is the file vendor.asc of the tree."""
    return {
        "uri": f"file:{root}",
        "suites": ["stable"],
        "components": ["main"],
        "key": "vendor.asc",
        "fingerprint": signing.fingerprint(keys / "keyring.pgp"),
        "packages": list(packages),
        "licence": "LicenseRef-Vendor",
        **more,
    }


def _ftparchive(folder: Path, *arguments: str) -> bytes:
    command = ["apt-ftparchive", "--no-md5", "--no-sha1", "--no-sha512", *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True).stdout
