"""Resolving without downloading, and downloading two versions at once. uv and pip are real, their index a stand-in."""

import http.server
import json
import os
import re
import threading
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmkeep.bundle import cache, remote_wheels, wheels

TYPE = "application/vnd.pypi.simple.v1+json"
PAYLOAD = 1 << 20  # bytes in each wheel, of no use for resolving


def wheel(folder: Path, name: str, version: str, requires: str = "") -> Path:
    """A wheel with its metadata and bytes that cannot be compressed."""
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nLicense-Expression: MIT\n"
    metadata += f"Requires-Dist: {requires}\n" if requires else ""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}/lib.so", os.urandom(PAYLOAD))
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


class Index:
    """A stand-in for a company's mirror of PyPI, on loopback: without metadata apart, and it counts the bytes it sends."""

    def __init__(self, files: Path) -> None:
        self.files = files
        self.sent: Counter[str] = Counter()
        self.in_parts = True
        index = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                name = self.path.strip("/").rpartition("/")[2]
                if self.path.startswith("/simple/"):
                    self.answer(200, index.page(name), {"Content-Type": TYPE})
                    return
                content = (index.files / name).read_bytes()
                part = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers["Range"] or "")
                if not (part and index.in_parts):
                    accepts = {"Accept-Ranges": "bytes" if index.in_parts else "none"}
                    index.sent[name] += len(content) * (self.command == "GET")
                    self.answer(200, content, accepts)
                    return
                first, last = part.groups()
                start = int(first) if first else len(content) - int(last)
                end = min(int(last) + 1, len(content)) if first and last else len(content)
                index.sent[name] += end - start
                self.answer(
                    206, content[start:end], {"Content-Range": f"bytes {start}-{end - 1}/{len(content)}"}
                )

            def answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
                self.send_response(status)
                for key, value in headers.items() | {("Content-Length", str(len(content)))}:
                    self.send_header(key, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/simple/"

    def page(self, project: str) -> bytes:
        """The project's page of the simple API, as JSON (PEP 691) with sizes (PEP 700)."""
        files = [
            {
                "filename": file.name,
                "url": f"/files/{file.name}",
                "hashes": {"sha256": cache.sha256(file)},
                "size": file.stat().st_size,
            }
            for file in self.files.glob(f"{project}-*.whl")
        ]
        return json.dumps({"meta": {"api-version": "1.1"}, "name": project, "files": files}).encode()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    """The machine's only index; the cache is empty."""
    (tmp_path / "files").mkdir()
    made = Index(tmp_path / "files")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", made.url)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.delenv("UV_DEFAULT_INDEX", raising=False)
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv"))
    thread = threading.Thread(target=made.server.serve_forever, args=(0.01,))
    thread.start()
    yield made
    made.server.shutdown()
    thread.join()
    made.server.server_close()


def test_an_environment_is_resolved_by_a_small_part_of_each_wheel(index: Index) -> None:
    torch, cublas = wheel(index.files, "torch", "2.0", "cublas>=13"), wheel(index.files, "cublas", "13.1")
    wheel(index.files, "cublas", "14.0")
    found = remote_wheels.resolve(["torch"], ["cublas<14"])
    assert sorted(found) == ["cublas==13.1", "torch==2.0"]
    for path in (torch, cublas):
        artifact = found["==".join(path.name.split("-")[:2])]
        assert (artifact.file, artifact.sha256) == (path.name, cache.sha256(path))
        assert (artifact.size, artifact.licence) == (path.stat().st_size, "MIT")
        assert index.sent[path.name] < PAYLOAD / 4
        assert not cache.blob(artifact.sha256).exists()


def test_where_an_index_sends_whole_files_only_they_are_downloaded(
    index: Index, capsys: pytest.CaptureFixture[str]
) -> None:
    index.in_parts = False
    path = wheel(index.files, "torch", "2.0")
    (artifact,) = remote_wheels.resolve(["torch"], []).values()
    assert (artifact.size, artifact.licence) == (path.stat().st_size, "MIT")
    assert f"{path.name} cannot be read in parts: downloading it" in capsys.readouterr().out
    assert cache.blob(artifact.sha256).exists()


def test_what_cannot_be_resolved_is_told_with_the_way_out(index: Index) -> None:
    wheel(index.files, "torch", "2.0", "cublas>=13")
    with pytest.raises(
        wheels.FetchError, match=r"(?s)uv cannot resolve torch: .*no versions of cublas.*UV_DEFAULT_INDEX"
    ):
        remote_wheels.resolve(["torch"], [])


def test_two_environments_may_have_two_versions_of_a_distribution(index: Index) -> None:
    digests = {
        f"torch=={version}": cache.sha256(wheel(index.files, "torch", version)) for version in ("2.0", "2.1")
    }
    wheels.download(digests)
    assert all(cache.blob(digest).exists() for digest in digests.values())
