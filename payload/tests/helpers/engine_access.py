"""A real nginx with the configuration of the role `engine_access`, in front of engines' sockets."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from edge import authority, issue, revoke
from service import PATIENCE, eventually

from llmserve.local_run import free_port

TEMPLATES = Path(__file__).resolve().parents[3] / "roles/engine_access/templates"


@dataclass
class EngineAccess:
    """What offers the engines. `folder` has root.pem, root.crl, and the certificates of `gateway` and `stranger`."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes]

    def tls(self, name: str = "gateway") -> dict[str, str]:
        """The certificates of a client, as in a gateway's configuration."""
        return {
            "ca": str(self.folder / "root.pem"),
            "certificate": str(self.folder / f"{name}.pem"),
            "key": str(self.folder / f"{name}.key"),
            "crl": str(self.folder / "root.crl"),
        }

    def engine(self, name: str, gpus: bool = False) -> dict[str, Any]:
        """An engine that is offered, as in a gateway's configuration."""
        socket = str(self.folder.parent / f"{name}.sock")
        return {"host": "localhost", "port": self.port, "name": name, "socket": socket, "gpus": gpus}

    def reload(self) -> None:
        """Take in changed files; connections that are there stay."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        before = children.read_text().split()
        os.kill(self.process.pid, signal.SIGHUP)

        def accepts(worker: str) -> bool:
            try:
                return b"shutting down" not in Path(f"/proc/{worker}/cmdline").read_bytes()
            except FileNotFoundError:
                return False

        eventually("the workers of before accept no more", lambda: not any(map(accepts, before)))


@contextmanager
def offering(folder: Path, sockets: dict[str, Path], watch: int | None = None) -> Iterator[EngineAccess]:
    """Run nginx within the block, which offers the engines at `sockets`, by name, and the watch over GPUs at port `watch`, to
    `gateway`.
    """
    protocols = {f"llmkeep-engine/{name}": f"unix:{path}" for name, path in sockets.items()}
    if watch:
        protocols["llmkeep-gpu-health"] = f"127.0.0.1:{watch}"
    folder.mkdir()
    root = authority(folder, "root")
    revoke(root)
    for name in ("host", "gateway", "stranger"):
        issue(root, name)
    environment = jinja2.Environment(  # noqa: S701 - the output is not HTML
        loader=jinja2.FileSystemLoader(TEMPLATES), trim_blocks=True, undefined=jinja2.StrictUndefined
    )
    with free_port() as port:
        text = environment.get_template("engine-access.conf.j2").render(
            _common_nginx_user="root",
            ansible_host="127.0.0.1",
            engine_access_port=port,
            engine_access_linger_seconds=3600,
            __engine_access_known=["gateway"],
            __engine_access_protocols=protocols,
        )
        for installed, here in {"crl.pem": "root.crl", "": ""}.items():
            text = text.replace(f"/etc/llmkeep/pki/{installed}", f"{folder}/{here}")
        (folder / "nginx.conf").write_text(f"pid {folder}/nginx.pid;\n{text}")
        command = ["nginx", "-p", str(folder), "-c", str(folder / "nginx.conf"), "-g", "daemon off;"]
        with (folder / "nginx.out").open("wb") as out:
            process = subprocess.Popen(command, stdout=out, stderr=out)
        try:
            eventually("nginx runs", (folder / "nginx.pid").exists)
            yield EngineAccess(folder, port, process)
        finally:
            process.terminate()
            process.wait(PATIENCE)
