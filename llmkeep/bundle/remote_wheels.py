"""Resolve an environment of several GB without downloading it.

uv resolves by the metadata in each wheel, of which it reads only a part. pip would download every wheel if the index
does not serve metadata separately (PEP 658), as is common for company mirrors. Sizes and hashes come from the index;
the licence is read from the wheel, also by HTTP ranges.
"""

import io
import os
import re
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import IO, Any

import httpx2
from packaging.tags import sys_tags
from packaging.utils import parse_wheel_filename

from llmkeep.bundle import cache, wheels
from llmkeep.bundle.lock import Artifact
from llmkeep.bundle.wheels import FetchError

UV = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-config"]
BLOCK = 1 << 16
SECONDS = 60  # of silence


def resolve(requires: list[str], constraints: list[str]) -> dict[str, Artifact]:
    """Wheels that uv would install for `requires` on this system and Python, by `name==version`."""
    entries = packages(requires, constraints)
    with httpx2.Client(timeout=SECONDS, follow_redirects=True) as client, ThreadPoolExecutor(8) as pool:
        artifacts = list(pool.map(partial(_artifact, client), entries))
    return {
        f"{wheels.canonical(each['name'])}=={each['version']}": a
        for each, a in zip(entries, artifacts, strict=True)
    }


def packages(requires: list[str], constraints: list[str]) -> list[dict[str, Any]]:
    """The same as entries of a pylock.toml (PEP 751)."""
    with tempfile.TemporaryDirectory() as folder:
        requirements, pins, output = (Path(folder, name) for name in ("wanted.in", "pins.txt", "pylock.toml"))
        requirements.write_text("\n".join(requires))
        pins.write_text("\n".join(constraints))
        command = [
            *UV,
            "--only-binary=:all:",
            "--constraint",
            str(pins),
            "--output-file",
            str(output),
            str(requirements),
        ]
        run = subprocess.run(command, capture_output=True, text=True, check=False, env=_environment())
        if run.returncode != 0:
            raise FetchError(
                f"uv cannot resolve {', '.join(requires)}: {run.stderr.strip()}\nCheck the connection to the registry "
                "(UV_DEFAULT_INDEX or pip's index-url, HTTPS_PROXY, SSL_CERT_FILE), then run it again"
            )
        listed: list[dict[str, Any]] = tomllib.loads(output.read_text())["packages"]
        return listed


def metadata(wheel: IO[bytes]) -> dict[str, Any]:
    """What a wheel states of its licence, as `wheels.metadata`."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (each for each in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", each))
        return wheels.metadata(archive.read(name))


def _artifact(client: httpx2.Client, package: dict[str, Any]) -> Artifact:
    name, version = wheels.canonical(package["name"]), package["version"]
    order = {tag: number for number, tag in enumerate(sys_tags())}
    by_file = {each["url"].rpartition("/")[2]: each for each in package["wheels"]}
    best = min(
        by_file, key=lambda file: min(order.get(tag, len(order)) for tag in parse_wheel_filename(file)[3])
    )
    chosen, digest = by_file[best], by_file[best]["hashes"]["sha256"]
    try:
        size = chosen["size"]
        stated = metadata(io.BufferedReader(RemoteFile(client, chosen["url"], size), BLOCK))
    except (OSError, zipfile.BadZipFile, KeyError):
        # The index says no sizes, or its files come as a whole only.
        print(f"{best} cannot be read in parts: downloading it")
        wheels.download({f"{name}=={version}": digest})
        with cache.blob(digest).open("rb") as wheel:
            stated = metadata(wheel)
        size = cache.blob(digest).stat().st_size
    return Artifact(best, version, digest, size, wheels.licence(stated), f"pkg:pypi/{name}@{version}")


def _environment() -> dict[str, str]:
    """Environment with pip's index for uv: its address may contain a password, so it is not an argument."""
    if "UV_DEFAULT_INDEX" in os.environ:
        return dict(os.environ)
    asked = [*wheels.PIP, "config", "get", "global.index-url"]
    answer = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    index = os.environ.get("PIP_INDEX_URL") or answer
    return os.environ | ({"UV_DEFAULT_INDEX": index} if index else {})


class RemoteFile(io.RawIOBase):
    """A file on a server, read by HTTP ranges."""

    def __init__(self, client: httpx2.Client, url: str, size: int) -> None:
        self.client, self.url, self.size, self.at = client, url, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.size}[whence]
        return self.at

    def tell(self) -> int:
        return self.at

    def readinto(self, into: Any) -> int:
        end = min(self.at + len(into), self.size)
        if end <= self.at:
            return 0
        asked = {"Range": f"bytes={self.at}-{end - 1}", "Accept-Encoding": "identity"}
        try:
            with self.client.stream("GET", self.url, headers=asked) as answer:
                if answer.status_code != httpx2.codes.PARTIAL_CONTENT:
                    raise OSError(f"{self.url} answered {answer.status_code} to a range request")
                part = answer.read()
        except httpx2.HTTPError as error:
            raise OSError(f"{self.url}: {error}") from error
        into[: len(part)] = part
        self.at += len(part)
        return len(part)
