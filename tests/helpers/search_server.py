"""The lab's Elasticsearch on loopback, without passwords and TLS, for what is not about either."""

import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from waiting import own_port, until

from llmkeep.bundle import cache, programs

OLDEST_JAVA = 21
START_SECONDS = 180
WATERMARKS = "{low: 2gb, high: 1gb, flood_stage: 500mb}"
USER = "daemon"  # Elasticsearch refuses to run as root
SMALL = "-Xms256m -Xmx256m -XX:-UseG1GC -XX:+UseSerialGC -XX:TieredStopAtLevel=1"


def java() -> Path:
    """A JDK or JRE that starts Elasticsearch; without one, the test is skipped."""
    for release in sorted(Path("/usr/lib/jvm").glob("*/release")):
        version = re.search(r'JAVA_VERSION="(\d+)', release.read_text())
        if version and int(version.group(1)) >= OLDEST_JAVA:
            return release.parent
    pytest.skip(f"no Java {OLDEST_JAVA} or later below /usr/lib/jvm to run Elasticsearch with")


class SearchServer:
    """A node in a folder of its own; its data may be on another file system."""

    def __init__(self, folder: Path, java_options: str = SMALL) -> None:
        self.java_options = java_options
        self.home, self.data, self.snapshots = folder / "home", folder / "data", folder / "snapshots"
        self.port = own_port()
        self.log = folder / "output"
        self.process: subprocess.Popen[bytes] | None = None
        self._java = java()
        with cache.alone():
            found = programs.find("elasticsearch")
        if not found:
            pytest.skip(
                "there is no Elasticsearch: LLMKEEP_MIRROR names a folder that has it, or the cache does"
            )
        self.home.mkdir()
        subprocess.run(["tar", "-xf", found, "--strip-components=1", "-C", self.home], check=True)
        self.snapshots.mkdir()
        (self.home / "tmp").mkdir()
        (self.home / "config/elasticsearch.yml").write_text(
            f"discovery.type: single-node\npath.data: {self.data}\npath.logs: {self.home}/logs\n"
            f"path.repo: [{self.snapshots}]\nhttp.port: {self.port}\ntransport.port: {own_port()}\n"
            "xpack.security.enabled: false\ncluster.info.update.interval: 10s\n"
            "action.auto_create_index: 'logs-llmkeep.*'\n"
            # A disk that is shared with all else says nothing by its share that is in use.
            + ("" if self.data.is_mount() else f"cluster.routing.allocation.disk.watermark: {WATERMARKS}\n")
        )
        if os.geteuid() == 0:
            subprocess.run(["chown", "--recursive", USER, folder], check=True)

    def start(self) -> None:
        """Until it answers."""
        user = ["setpriv", f"--reuid={USER}", "--clear-groups"] if os.geteuid() == 0 else []
        environment = {
            "PATH": os.environ["PATH"],
            "ES_JAVA_HOME": str(self._java),
            "ES_PATH_CONF": str(self.home / "config"),
            "ES_TMPDIR": str(self.home / "tmp"),
            "ES_JAVA_OPTS": self.java_options,
        }
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*user, self.home / "bin/elasticsearch"],
                stdout=log,
                stderr=log,
                env=environment,
                cwd=self.home,
                start_new_session=True,
            )

        def answers() -> bool:
            assert self.process is not None
            assert self.process.poll() is None, self.log.read_text()[-2000:]
            try:
                return self.ask("GET", "/_cluster/health")[0] == 200
            except OSError:
                return False

        until(answers, START_SECONDS)

    def stop(self) -> None:
        if self.process and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()

    def lose_data(self) -> None:
        """As with a broken disk: stopped, and everything it had indexed is gone."""
        self.stop()
        for path in self.data.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.start()

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Status and JSON of the answer; a body in a string goes as it is."""
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        text = body if body is None or isinstance(body, str) else json.dumps(body)
        link.request(method, path, text, {"Content-Type": "application/json"})
        answer = link.getresponse()
        found = answer.read()
        link.close()
        return answer.status, json.loads(found) if found else None

    def do(self, method: str, path: str, body: Any = None) -> Any:
        """JSON of the answer, which has to be a success."""
        status, answer = self.ask(method, path, body)
        assert 200 <= status < 300, (method, path, status, answer)
        return answer


@contextmanager
def search_server(volume_mb: int = 0, java_options: str = SMALL) -> Iterator[SearchServer]:
    """A node that answers. Its data has a volume of its own with VOLUME_MB, where one can be mounted."""
    with tempfile.TemporaryDirectory(prefix="elasticsearch-") as name:
        folder = Path(name)
        data = folder / "data"
        data.mkdir()
        tmpfs = ["mount", "-t", "tmpfs", "-o", f"size={volume_mb}m", "tmpfs", str(data)]
        mounted = (
            volume_mb > 0
            and os.geteuid() == 0
            and subprocess.run(tmpfs, capture_output=True, check=False).returncode == 0
        )
        try:
            server = SearchServer(folder, java_options)
            try:
                server.start()
                yield server
            finally:
                server.stop()
        finally:
            if mounted:
                subprocess.run(["umount", data], check=True)
