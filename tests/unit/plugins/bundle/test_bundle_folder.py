"""bundle_folder, bundle_program and release against a mirror of our own: TLS, ranges, and what can be wrong with it."""

import hashlib
import http.server
import json
import os
import ssl
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from called_module import called
from plugin_modules import load
from waiting import PATIENCE

bundle_folder = load("modules.bundle_folder")
bundle_program = load("modules.bundle_program")
release = load("modules.release")
mirror = load("module_utils.bundle.mirror")

WEIGHTS = bytes(range(256)) * 5000
FLOOD = 128 << 20


@dataclass
class Served:
    """What the mirror has, what was asked of it, after how many bytes it hangs up (once), and what it answers without end."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    cut_after: int | None = None
    endless: dict[str, int] = field(default_factory=dict)
    flooded: int = 0
    hung_up: threading.Event = field(default_factory=threading.Event)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    served: Served

    def do_GET(self) -> None:
        asked_range = self.headers.get("Range")
        self.served.asked.append((self.path, asked_range))
        if self.path in self.served.endless:
            self.flood(self.served.endless[self.path])
            return
        content = self.served.files.get(self.path.lstrip("/"))
        if content is None:
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        begin = int(asked_range.removeprefix("bytes=").removesuffix("-")) if asked_range else 0
        self.send_response(206 if asked_range else 200)
        self.send_header("Content-Length", str(len(content) - begin))
        self.end_headers()
        if self.served.cut_after is not None and "model" in self.path:
            end, self.served.cut_after = self.served.cut_after, None
            self.wfile.write(content[begin:end])
            self.close_connection = True
        else:
            self.wfile.write(content[begin:])

    def flood(self, status: int) -> None:
        """An answer of FLOOD bytes that states no length; flooded says how many the client took."""
        self.send_response(status)
        self.send_header("Connection", "close")
        self.end_headers()
        try:
            while self.served.flooded < FLOOD:
                self.wfile.write(bytes(1 << 20))
                self.served.flooded += 1 << 20
        except OSError:
            self.served.hung_up.set()
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-days", "2",
         "-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")],
        check=True, capture_output=True,
    )  # fmt: skip
    return folder


@pytest.fixture
def served(certificate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    state = Served()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate / "cert.pem", certificate / "key.pem")
    server = http.server.ThreadingHTTPServer(("localhost", 0), type("Bound", (Handler,), {"served": state}))
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    state.url = f"https://localhost:{server.server_address[1]}"
    publish(state, {"model.safetensors": WEIGHTS, "sub/config.json": b"{}"})
    sqv = tmp_path / "bin/sqv"
    sqv.parent.mkdir()
    sqv.write_text('#!/bin/sh\n[ "$(cat "$4")" = signed ] || { echo "bad signature" >&2; exit 1; }\n')
    sqv.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sqv.parent}:/usr/bin:/bin")
    monkeypatch.setattr(bundle_folder.atomic, "PENDING", tmp_path / "pending")
    yield state
    server.shutdown()
    server.server_close()


def publish(state: Served, model: dict[str, bytes], folder: str = "models/m") -> None:
    listed = [
        {"path": f"{folder}/{name}", "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in model.items()
    ]
    state.files = {f"{folder}/{name}": content for name, content in model.items()}
    state.files["MANIFEST.json"] = json.dumps({"serial": 7, "files": listed}).encode()
    state.files["MANIFEST.json.sig"] = b"signed"


def bring(state: Served, certificate: Path, dest: Path) -> bool:
    """One run of the module on plain folders; whether it changed anything."""
    source = mirror.Mirror(state.url, certificate / "cert.pem", Path("/keyring"))
    entries = mirror.entries(source.manifest(), "models/m")
    wanted = {entry.path.removeprefix("models/m/"): entry for entry in entries}
    if bundle_folder.is_there(dest, wanted, deep=False):
        return False
    bundle_folder.install(source, dest, wanted, ["llm-engine@m.service"])
    assert bundle_folder.is_there(dest, wanted, deep=True)
    return True


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to a service")
def test_a_service_that_owns_the_folder_above_gets_no_file_of_root_opened(
    served: Served, certificate: Path, tmp_path: Path
) -> None:
    """A training job renamed the folder of the models, and put a link in the place of a verified file."""
    secret = tmp_path / "shadow"
    secret.write_text("root:secret")
    secret.chmod(0o600)
    above = tmp_path / "training"
    assert bring(served, certificate, above / "models/m")
    os.chown(above, 65534, 65534)
    (above / "models").rename(above / "aside")
    (above / "models/.m.partial").mkdir(parents=True)
    (above / "models/.m.partial/model.safetensors").symlink_to(secret)
    os.chown(above / "models", 65534, 65534)
    with pytest.raises(OSError, match="root changes nothing below"):
        bring(served, certificate, above / "models/m")
    assert (secret.read_text(), secret.stat().st_mode & 0o777) == ("root:secret", 0o600)


def test_fetches_once_and_leaves_it_read_only(served: Served, certificate: Path, tmp_path: Path) -> None:
    dest = tmp_path / "models/m"
    assert bring(served, certificate, dest)
    assert (dest / "model.safetensors").read_bytes() == WEIGHTS
    assert {path.stat().st_mode & 0o777 for path in dest.rglob("*") if path.is_file()} == {0o444}
    check = ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"]
    assert subprocess.run(check, cwd=dest, check=False).returncode == 0
    assert not bring(served, certificate, dest)
    assert [path.name for path in (tmp_path / "pending").iterdir()] == ["llm-engine@m.service"]


def test_goes_on_where_the_connection_broke(served: Served, certificate: Path, tmp_path: Path) -> None:
    dest = tmp_path / "models/m"
    served.cut_after = 500_000
    assert bring(served, certificate, dest)
    assert ("/models/m/model.safetensors", "bytes=500000-") in served.asked


def test_refuses_a_flipped_bit_and_keeps_what_was_there(
    served: Served, certificate: Path, tmp_path: Path
) -> None:
    dest = tmp_path / "models/m"
    bring(served, certificate, dest)
    publish(served, {"model.safetensors": WEIGHTS + b"newer", "sub/config.json": b"{}"})
    served.files["models/m/model.safetensors"] = b"X" + WEIGHTS[1:] + b"newer"
    with pytest.raises(mirror.MirrorError, match="the signed manifest says"):
        bring(served, certificate, dest)
    assert (dest / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize(
    ("path", "status", "said"),
    [
        ("/MANIFEST.json", 200, "MANIFEST.json is longer than 16777216 bytes"),
        ("/MANIFEST.json.sig", 200, "MANIFEST.json.sig is longer than 65536 bytes"),
        ("/models/m/model.safetensors", 200, "is longer than the 1280000 bytes in the signed manifest"),
        ("/models/m/model.safetensors", 404, "answered 404"),
    ],
)
def test_a_mirror_that_answers_without_end_is_not_read_to_the_end(
    served: Served, certificate: Path, tmp_path: Path, path: str, status: int, said: str
) -> None:
    served.endless[path] = status
    with pytest.raises(mirror.MirrorError, match=said):
        bring(served, certificate, tmp_path / "m")
    assert served.hung_up.wait(PATIENCE)
    assert served.flooded < FLOOD // 4


def release_run(
    state: Served, certificate: Path, root: Path, monkeypatch: pytest.MonkeyPatch, check: bool = False
) -> dict[str, Any]:
    """One run of the whole module for a release, as the role calls it; what it returned."""
    arguments = {
        "url": f"{state.url}/releases/m", "folders": ["models/m"], "dest": str(root / "models"), "seen": str(root / "seen/m"),
        "ca": str(certificate / "cert.pem"), "keyring": str(certificate / "cert.pem"), "_ansible_check_mode": check,
    }  # fmt: skip
    told: dict[str, Any] = {}

    class Ended(Exception):
        """The module said what it had to."""

    class Module:
        def __init__(self) -> None:
            self.params = {"units": [], "deep": False, "certificate": None, **arguments}
            self.check_mode = check

        def exit_json(self, **result: Any) -> None:
            told.update(result)
            raise Ended

        def fail_json(self, msg: str) -> None:
            self.exit_json(failed=msg)

    monkeypatch.setattr(bundle_folder, "AnsibleModule", lambda **_: Module())
    with pytest.raises(Ended):
        bundle_folder.main()
    return told


def as_release(
    state: Served, serial: int, expires: str = "2999-01-01T00:00:00Z", content: bytes = WEIGHTS
) -> None:
    """Serve a release `m` of this serial."""
    publish(state, {"model.safetensors": content})
    document = json.loads(state.files["MANIFEST.json"]) | {"serial": serial, "expires": expires}
    state.files["MANIFEST.json"] = json.dumps(document).encode()
    state.files = {f"releases/m/{path}": data for path, data in state.files.items()}


def test_a_release_is_never_replaced_by_an_older_one(
    served: Served, certificate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_release(served, 5)
    assert release_run(served, certificate, tmp_path, monkeypatch, check=True)["changed"]
    assert not (tmp_path / "seen/m").exists()
    assert release_run(served, certificate, tmp_path, monkeypatch) == {
        "changed": True,
        "fetched": ["models/m"],
    }
    assert not release_run(served, certificate, tmp_path, monkeypatch)["changed"]
    assert (tmp_path / "seen/m").read_text() == "5\n"
    as_release(served, 4, content=b"old and weak")
    assert "an old one was put back" in release_run(served, certificate, tmp_path, monkeypatch)["failed"]
    assert (tmp_path / "models/m/model.safetensors").read_bytes() == WEIGHTS


def test_a_release_that_expired_is_not_fetched_and_stays_where_it_is(
    served: Served, certificate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_release(served, 5)
    release_run(served, certificate, tmp_path, monkeypatch)
    as_release(served, 5, expires="2020-01-01T00:00:00Z")
    assert not release_run(served, certificate, tmp_path, monkeypatch)["changed"]
    as_release(served, 6, expires="2020-01-01T00:00:00Z", content=b"newer")
    assert "expired at 2020" in release_run(served, certificate, tmp_path, monkeypatch)["failed"]
    assert (tmp_path / "seen/m").read_text() == "5\n"


def test_a_release_that_the_mirror_has_not_is_to_be_added_there(
    served: Served, certificate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "`llmkeep release add`" in release_run(served, certificate, tmp_path, monkeypatch)["failed"]


def test_another_release_under_a_release_s_name_is_refused(
    served: Served, certificate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are signed by the same key: the name is in the signed paths."""
    as_release(served, 5)
    served.files = {path: data.replace(b"models/m/", b"models/other/") for path, data in served.files.items()}
    assert "nothing under models/m/" in release_run(served, certificate, tmp_path, monkeypatch)["failed"]


def test_refuses_a_manifest_that_nobody_signed(served: Served, certificate: Path, tmp_path: Path) -> None:
    served.files["MANIFEST.json.sig"] = b"somebody else"
    with pytest.raises(mirror.MirrorError, match="no valid signature"):
        bring(served, certificate, tmp_path / "m")


def test_refuses_a_mirror_whose_certificate_is_not_of_the_estate(
    served: Served, certificate: Path, tmp_path: Path
) -> None:
    with pytest.raises(mirror.MirrorError, match="certificate"):
        mirror.Mirror(
            served.url.replace("localhost", "127.0.0.1"), certificate / "cert.pem", tmp_path
        ).manifest()


def rewrite(path: Path, text: str) -> None:
    path.chmod(0o644)
    path.write_text(text)
    path.chmod(0o444)


def test_a_changed_an_extra_and_a_missing_file_are_noticed(
    served: Served, certificate: Path, tmp_path: Path
) -> None:
    dest = tmp_path / "models/m"
    for harm in (
        lambda: (dest / "extra").write_text("x"),
        (dest / "sub/config.json").unlink,
        lambda: (dest / "model.safetensors").chmod(0o644),
        lambda: rewrite(dest / "sub/config.json", "[]"),
    ):
        bring(served, certificate, dest)
        harm()
        assert bring(served, certificate, dest)


def program(state: Served, certificate: Path, root: Path, check: bool = False) -> bool:
    """One run of bundle_program; whether it changed anything."""
    source = mirror.Mirror(state.url, certificate / "cert.pem", Path("/keyring"))
    changed: bool
    changed, _ = bundle_program.bring(source, "opa", root, ["opa.service"], check)
    return changed


def test_a_program_is_fetched_once_and_the_one_before_stays(
    served: Served, certificate: Path, tmp_path: Path
) -> None:
    current = tmp_path / "opa/current/opa"
    for number, content in enumerate([b"first", b"second", b"third"]):
        publish(served, {"opa": content, "other": b"not asked for"}, "bin")
        assert program(served, certificate, tmp_path, check=True)
        assert program(served, certificate, tmp_path)
        assert not program(served, certificate, tmp_path)
        assert (current.read_bytes(), current.stat().st_mode & 0o777) == (content, 0o555)
        assert len(list((tmp_path / "opa").glob("*/opa"))) == [2, 3, 3][number]  # current counts twice
    assert not list(tmp_path.rglob("other"))
    assert [path.name for path in (tmp_path / "pending").iterdir()] == ["opa.service"]


def test_a_program_that_somebody_changed_is_mended(served: Served, certificate: Path, tmp_path: Path) -> None:
    publish(served, {"opa": b"first"}, "bin")
    program(served, certificate, tmp_path)
    for harm in (
        lambda path: rewrite(path, "xirst"),
        lambda path: path.chmod(0o755),
        lambda path: path.unlink(),
    ):
        harm(tmp_path / "opa/current/opa")
        assert program(served, certificate, tmp_path)
        assert (tmp_path / "opa/current/opa").read_bytes() == b"first"


def test_a_program_that_the_bundle_lacks_is_told(served: Served, certificate: Path, tmp_path: Path) -> None:
    publish(served, {"other": b"x"}, "bin")
    with pytest.raises(mirror.MirrorError, match="has no bin/opa; build it where LLMKEEP_MIRROR"):
        program(served, certificate, tmp_path)


def test_a_release_is_named_by_what_is_in_it(served: Served, certificate: Path) -> None:
    source = mirror.Mirror(served.url, certificate / "cert.pem", Path("/keyring"))
    first = release.release_id(mirror.entries(source.manifest(), "models/m"))
    again = release.release_id(mirror.entries(source.manifest(), "models/m"))
    publish(served, {"model.safetensors": b"other"})
    other = release.release_id(mirror.entries(source.manifest(), "models/m"))
    assert first == again != other


def test_old_releases_go_and_the_previous_one_stays(tmp_path: Path) -> None:
    for number, name in enumerate(["a", "b", "c", "half"]):
        (tmp_path / name).mkdir()
        if name != "half":
            (tmp_path / name / release.RECORD).write_text("{}")
            stamp = 1_000_000 + number
            subprocess.run(["touch", "-d", f"@{stamp}", str(tmp_path / name / release.RECORD)], check=True)
    assert release.forget_old(tmp_path, {"c"}, 2) == ["a", "half"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "c"]


def test_a_release_that_is_current_or_that_a_unit_runs_stays_however_old(tmp_path: Path) -> None:
    for name in "abcd":
        (tmp_path / "releases" / name).mkdir(parents=True)
        (tmp_path / "releases" / name / release.RECORD).write_text("{}")
    (tmp_path / "units").mkdir()
    (tmp_path / "current").symlink_to("releases/b")
    (tmp_path / "units/llm-engine@m.service").symlink_to("../releases/a")
    used = release.in_use(tmp_path)
    assert used == {"a", "b"}
    assert release.forget_old(tmp_path / "releases", {*used, "d"}, 2) == ["c"]


@pytest.mark.parametrize(
    ("module", "given", "told"),
    [
        (bundle_folder, {"folders": ["models/m"], "dest": "/nonexistent"}, {"fetched": ["models/m"]}),
        (bundle_program, {"name": "opa"}, {"sha256": ""}),
        (release, {"folder": "wheels/payload"}, {"id": "unknown"}),
    ],
)
def test_check_mode_asks_no_mirror_that_the_host_does_not_trust_yet(
    module: Any,
    given: dict[str, object],
    told: dict[str, object],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trust = {
        "url": "https://localhost:1",
        "ca": str(tmp_path / "root.pem"),
        "keyring": str(tmp_path / "keyring"),
    }
    answer = called(module, {**given, **trust, "_ansible_check_mode": True}, capsys)
    assert (answer["changed"], told.items() <= answer.items()) == (True, True)
    assert called(module, {**given, **trust}, capsys)["failed"]
