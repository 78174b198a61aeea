"""Resolving without downloading, and downloading two versions at once. uv and pip are real, their index a stand-in."""

import http.server
import io
import json
import os
import re
import tarfile
import threading
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmkeep.bundle import cache, remote_wheels, wheels
from llmkeep.bundle.lock import Artifact

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


def source(folder: Path, name: str, version: str) -> tuple[Path, Path]:
    """A source distribution whose build leaves a mark, and the path of that."""
    path, mark = folder / f"{name}-{version}.tar.gz", folder.parent / "mark"
    files = {
        "setup.py": f"open({str(mark)!r}, 'w').close()\n"
        f"import setuptools\nsetuptools.setup(name={name!r}, version={version!r}, license='BSD')\n",
        "PKG-INFO": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nLicense: BSD\n",
    }
    with tarfile.open(path, "w:gz") as archive:
        for file, text in files.items():
            member = tarfile.TarInfo(f"{name}-{version}/{file}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    return path, mark


class Index:
    """A stand-in for a company's mirror of PyPI, on loopback: without metadata apart, and it counts the bytes it sends."""

    def __init__(self, files: Path) -> None:
        self.files = files
        self.sent: Counter[str] = Counter()
        self.in_parts = True
        self.digests: dict[str, str] = {}  # false ones
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
                "hashes": {"sha256": self.digests.get(file.name) or cache.sha256(file)},
                "size": file.stat().st_size,
            }
            for file in self.files.glob(f"{project}-*")
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


def test_a_source_distribution_is_the_newest_that_is_asked_for(index: Index) -> None:
    for version in ("0.19.7", "0.20.0"):
        source(index.files, "deepspeed", version)
    newest, _ = source(index.files, "deepspeed", "0.19.8")
    wheel(index.files, "deepspeed", "0.19.9")
    assert wheels.sources(["DeepSpeed~=0.19.0"], []) == {
        "deepspeed==0.19.8": Artifact(
            newest.name,
            "0.19.8",
            cache.sha256(newest),
            newest.stat().st_size,
            "BSD",
            "pkg:pypi/deepspeed@0.19.8",
        )
    }


def test_a_source_distribution_comes_from_the_index_of_pip_conf(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source(index.files, "deepspeed", "0.19.8")
    monkeypatch.delenv("PIP_INDEX_URL")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    (tmp_path / "pip.conf").write_text(f"[global]\nindex-url = {index.url}\n")
    assert list(wheels.sources(["deepspeed"], [])) == ["deepspeed==0.19.8"]


def test_an_environment_takes_the_source_distribution_of_the_one_that_it_includes(index: Index) -> None:
    for version in ("0.19.7", "0.19.8"):
        source(index.files, "deepspeed", version)
    assert list(wheels.sources(["deepspeed~=0.19.0"], ["deepspeed==0.19.7"])) == ["deepspeed==0.19.7"]


def test_a_source_distribution_is_locked_and_downloaded_without_running_it(index: Index) -> None:
    path, mark = source(index.files, "deepspeed", "0.19.8")
    (artifact,) = wheels.sources(["deepspeed"], []).values()
    cache.blob(artifact.sha256).unlink()
    wheels.download({"deepspeed==0.19.8": cache.sha256(path)}, ["deepspeed==0.19.8"])
    assert not mark.exists()
    wheels.build_source(artifact, index.files)
    assert mark.exists()


def test_a_source_distribution_with_another_hash_than_the_locks_is_refused(index: Index) -> None:
    path, _ = source(index.files, "deepspeed", "0.19.8")
    locked = "0" * 64
    with pytest.raises(
        wheels.FetchError, match=f"{path.name} has sha256 {cache.sha256(path)}, the lock says 0000"
    ):
        wheels.download({"deepspeed==0.19.8": locked}, ["deepspeed==0.19.8"])


def test_a_source_distribution_with_another_hash_than_the_indexs_is_refused(index: Index) -> None:
    path, _ = source(index.files, "deepspeed", "0.19.8")
    index.digests[path.name] = "0" * 64
    with pytest.raises(wheels.FetchError, match="Expected sha256 0000"):
        wheels.sources(["deepspeed"], [])


def test_a_distribution_without_a_source_is_named(index: Index) -> None:
    wheel(index.files, "deepspeed", "0.19.8")
    with pytest.raises(wheels.FetchError, match=r"no source distribution \(.tar.gz\) of deepspeed~=0\.19\n"):
        wheels.sources(["deepspeed~=0.19"], [])
