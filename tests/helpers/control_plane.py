"""A real Kubernetes control plane: etcd, API server, controller manager and scheduler, of the lock's `kube`.

TLS 1.3 with client certificates everywhere, RBAC, and free ports of one address. Everything is thrown away: keys lie
in its folder, and etcd does not wait for the disk. As a program, it runs until SIGTERM, for tests that start one from
elsewhere:

    python tests/helpers/control_plane.py FOLDER [ADDRESS]

prints the path of the administrator's kubeconfig once the cluster answers.
"""

import base64
import http.client
import json
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster_keys import ClusterKeys
from waiting import own_port, until

from llmkeep.bundle import cache, programs

START_SECONDS = 60
STOP_SECONDS = 20
SERVICES, API_SERVICE = "10.96.0.0/16", "10.96.0.1"


def kube() -> Path:
    """The program of all components; without it, the test is skipped."""
    with cache.alone():
        found = programs.find("kube")
    if not found:
        import pytest  # not on a lab's host, which has the program

        pytest.skip("there is no kube: LLMKEEP_MIRROR names a folder that has it, or the cache does")
    return found


class ControlPlane:
    """One cluster; `start` returns when it answers."""

    def __init__(self, folder: Path, address: str = "127.0.0.1", also: Iterable[str] = ()) -> None:
        """FOLDER is made; ADDRESS is one that this machine, or this thread's network namespace, has; ALSO: of nodes."""
        self.folder, self.address, self.program = folder, address, kube()
        self.port = own_port()
        folder.mkdir(parents=True, mode=0o700)
        self.keys = ClusterKeys(folder, [address, API_SERVICE, *also])
        self.kubeconfig = self.identity("admin", ["system:masters"])
        self._processes: list[tuple[str, subprocess.Popen[bytes]]] = []

    def identity(self, name: str, groups: list[str]) -> Path:
        """A kubeconfig, in one file, of a user with these groups."""
        certificate, key = self.keys.issued(name, groups=groups)
        path = self.folder / f"{name.replace(':', '-')}.kubeconfig"
        encoded = {
            each: base64.b64encode(each_path.read_bytes()).decode()
            for each, each_path in (("ca", self.keys.ca), ("certificate", certificate), ("key", key))
        }
        cluster = {
            "server": f"https://{self.address}:{self.port}",
            "certificate-authority-data": encoded["ca"],
        }
        user = {"client-certificate-data": encoded["certificate"], "client-key-data": encoded["key"]}
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": name, "user": user}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": name}}],
            "current-context": "test",
        }
        path.write_text(json.dumps(content))  # JSON is YAML
        path.chmod(0o600)
        return path

    def start(self) -> Path:
        """Start everything; returns the administrator's kubeconfig."""
        try:
            self._start_etcd()
            self._start_api_server()
            self._start_clients()
            # A namespace has its service account a moment later, and pods need it.
            until(lambda: self.attempted("get", "serviceaccount/default").returncode == 0, START_SECONDS)
        except BaseException:
            self.stop()
            raise
        return self.kubeconfig

    def stop(self) -> None:
        """End what `start` has started, the newest first."""
        while self._processes:
            _, process = self._processes.pop()
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def kubectl(
        self, *arguments: str | Path, stdin: str | None = None, kubeconfig: Path | None = None
    ) -> str:
        """What kubectl prints, as the administrator or another user; AssertionError with its words if it fails."""
        done = self.attempted(*arguments, stdin=stdin, kubeconfig=kubeconfig)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def refused(self, *arguments: str | Path, stdin: str | None = None) -> str:
        """Why kubectl fails; AssertionError if it does not."""
        done = self.attempted(*arguments, stdin=stdin)
        assert done.returncode != 0, done.stdout
        return done.stderr

    def attempted(
        self, *arguments: str | Path, stdin: str | None = None, kubeconfig: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """What comes of a kubectl command."""
        options = ["--kubeconfig", kubeconfig or self.kubeconfig, "--cache-dir", self.folder / "kubectl"]
        argv = [str(each) for each in (self.program, "kubectl", *options, *arguments)]
        return subprocess.run(argv, input=stdin, capture_output=True, text=True, check=False)

    def run(self, name: str, component: str, /, **options: str | int | Path) -> subprocess.Popen[bytes]:
        """Start a component, which `stop` ends; `max_pods=3` is `--max-pods=3`. Its output goes to FOLDER/NAME.log."""
        words = [f"--{key.replace('_', '-')}={value}" for key, value in options.items()]
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen([self.program, component, *words], stdout=log, stderr=log)
        self._processes.append((name, process))
        return process

    def _answers(self, port: int, path: str) -> bool:
        """Whether a component says that it is well; AssertionError with its last words if one has ended."""
        for name, process in self._processes:
            words = (self.folder / f"{name}.log").read_text()[-2000:]
            assert process.poll() is None, f"{name} has ended: {words}"
        link = http.client.HTTPSConnection(self.address, port, timeout=10, context=self._context())
        try:
            link.request("GET", path)
            return link.getresponse().status == 200
        except (ConnectionError, TimeoutError):
            return False
        finally:
            link.close()

    def _context(self) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=self.keys.ca)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_cert_chain(*self.keys.issued("admin", groups=["system:masters"]))
        return context

    def _start_etcd(self) -> None:
        certificate, key = self.keys.issued("etcd", server=True)
        port, peers = own_port(), own_port()
        self.etcd, peer = f"https://{self.address}:{port}", f"https://{self.address}:{peers}"
        self.run(
            "etcd",
            "etcd",
            name="etcd",
            data_dir=self.folder / "etcd",
            listen_client_urls=self.etcd,
            advertise_client_urls=self.etcd,
            listen_peer_urls=peer,
            initial_advertise_peer_urls=peer,
            initial_cluster=f"etcd={peer}",
            cert_file=certificate,
            key_file=key,
            trusted_ca_file=self.keys.ca,
            client_cert_auth="true",
            peer_cert_file=certificate,
            peer_key_file=key,
            peer_trusted_ca_file=self.keys.ca,
            peer_client_cert_auth="true",
            tls_min_version="TLS1.3",
            log_level="warn",
            unsafe_no_fsync="true",
        )
        until(lambda: self._answers(port, "/health"), START_SECONDS)

    def _start_api_server(self) -> None:
        certificate, key = self.keys.issued("kube-apiserver", server=True)
        signing, public = self.keys.of_service_accounts()
        client, client_key = self.keys.issued("admin", groups=["system:masters"])
        self.run(
            "kube-apiserver",
            "kube-apiserver",
            bind_address=self.address,
            secure_port=self.port,
            advertise_address=self.address,
            endpoint_reconciler_type="none",  # loopback is no valid endpoint
            etcd_servers=self.etcd,
            etcd_cafile=self.keys.ca,
            etcd_certfile=certificate,
            etcd_keyfile=key,
            tls_cert_file=certificate,
            tls_private_key_file=key,
            client_ca_file=self.keys.ca,
            kubelet_certificate_authority=self.keys.ca,
            kubelet_client_certificate=client,
            kubelet_client_key=client_key,
            kubelet_preferred_address_types="InternalIP",
            tls_min_version="VersionTLS13",
            service_account_issuer="https://kubernetes.default.svc",
            service_account_key_file=public,
            service_account_signing_key_file=signing,
            service_cluster_ip_range=SERVICES,
            authorization_mode="Node,RBAC",
            anonymous_auth="false",
            profiling="false",
            allow_privileged="true",  # so that what refuses a privileged pod is the namespace's level
        )
        until(lambda: self._answers(self.port, "/readyz"), START_SECONDS)

    def _start_clients(self) -> None:
        """Controller manager and scheduler."""
        signing, _ = self.keys.of_service_accounts()
        own: dict[str, dict[str, str | Path]] = {
            "kube-controller-manager": {
                "service_account_private_key_file": signing,
                "root_ca_file": self.keys.ca,
                "use_service_account_credentials": "true",
            },
            "kube-scheduler": {},
        }
        for component, more in own.items():
            kubeconfig = self.identity(f"system:{component}", [])
            certificate, key = self.keys.issued(component, server=True)
            port = own_port()
            self.run(
                component,
                component,
                kubeconfig=kubeconfig,
                authentication_kubeconfig=kubeconfig,
                authorization_kubeconfig=kubeconfig,
                bind_address=self.address,
                secure_port=port,
                tls_cert_file=certificate,
                tls_private_key_file=key,
                client_ca_file=self.keys.ca,
                tls_min_version="VersionTLS13",
                leader_elect="false",
                kube_api_qps=500,  # else a thousand pods wait for their own clients
                kube_api_burst=1000,
                **more,
            )
            until(lambda port=port: self._answers(port, "/healthz"), START_SECONDS)  # type: ignore[misc]


@contextmanager
def control_plane(folder: Path, address: str = "127.0.0.1") -> Iterator[ControlPlane]:
    """A cluster while the context lasts."""
    cluster = ControlPlane(folder, address)
    cluster.start()
    try:
        yield cluster
    finally:
        cluster.stop()


def main() -> int:
    if len(sys.argv) not in (2, 3):
        print(__doc__, file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with control_plane(Path(sys.argv[1]), *sys.argv[2:]) as cluster:
        print(cluster.kubeconfig, flush=True)
        while True:
            time.sleep(3600)


if __name__ == "__main__":
    sys.exit(main())
