"""A mirror for the modules that fetch from one, and kernels that check what they have fetched."""

import http.server
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from bundle_mirror import WEIGHTS, Handler, Served, publish
from kernel_with_verity import KernelWithVerity
from plugin_modules import load

atomic = load("module_utils.config.files")
progress = load("module_utils.bundle.progress")
verity = load("module_utils.bundle.verity")


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
    monkeypatch.setattr(atomic, "PENDING", tmp_path / "pending")
    yield state
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def journal(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lines that downloads write to the host's journal."""
    lines: list[str] = []
    monkeypatch.setattr(progress, "journal", lines.append)
    return lines


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> KernelWithVerity:
    """A stand-in: the machine's own may have no fs-verity."""
    stand_in = KernelWithVerity()
    monkeypatch.setattr(verity.fcntl, "ioctl", stand_in.ioctl)
    return stand_in
