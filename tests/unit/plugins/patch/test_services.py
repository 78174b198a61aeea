"""Which units run replaced files, and in which order they are restarted."""

import shutil
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from plugin_modules import load

services = load("module_utils.patch.services")
rollout = load("module_utils.config.rollout")

LIBRARY = "/usr/lib/x86_64-linux-gnu/libjemalloc.so.2"
MAPS = """7f00-7f01 r-xp 00000000 fe:00 1234   {library} (deleted)
7f02-7f03 r-xp 00000000 fe:00 1235   /usr/bin/redis-check-rdb
7f04-7f05 rw-s 00000000 00:01 1236   /memfd:pool (deleted)
7f06-7f07 rw-s 00000000 00:01 1237   /dev/shm/segment (deleted)
"""


def process(
    proc: Path, number: int, cgroup: str, maps: str = MAPS.format(library=LIBRARY), comm: str = "a"
) -> None:
    (proc / str(number)).mkdir(parents=True)
    (proc / str(number) / "comm").write_text(f"{comm}\n")
    (proc / str(number) / "maps").write_text(maps)
    (proc / str(number) / "cgroup").write_text(cgroup)


@pytest.mark.parametrize(
    "cgroup",
    [
        "0::/system.slice/redis-server.service\n",
        "5:memory:/x\n1:name=systemd:/system.slice/redis-server.service\n",
    ],
)
def test_a_unit_is_named_with_the_files_that_were_replaced(tmp_path: Path, cgroup: str) -> None:
    process(tmp_path, 12, cgroup)
    process(tmp_path, 13, "0::/system.slice/cron.service\n", MAPS.format(library="/tmp/x"))
    assert services.stale(tmp_path) == {"redis-server.service": [LIBRARY]}


def test_a_connection_of_sshs_is_left_and_its_listener_is_not(tmp_path: Path) -> None:
    process(tmp_path, 12, "0::/system.slice/ssh.service\n", comm="sshd-session")
    assert services.stale(tmp_path) == {}
    process(tmp_path, 13, "0::/system.slice/ssh.service\n", comm="sshd")
    assert services.stale(tmp_path) == {"ssh.service": [LIBRARY]}


def test_a_real_process_whose_program_was_replaced_is_seen(tmp_path: Path) -> None:
    program = Path("/opt") / f"{tmp_path.parent.name}-{tmp_path.name}"
    shutil.copy("/usr/bin/sleep", program)
    with subprocess.Popen([program, "60"]) as running:
        try:
            program.unlink()
            deadline = time.monotonic() + 10
            maps = Path(f"/proc/{running.pid}/maps")
            while not services.MAPPED.findall(maps.read_text()) and time.monotonic() < deadline:
                time.sleep(0.05)
            assert services.MAPPED.findall(maps.read_text())[0] == (str(program), " (deleted)")
        finally:
            running.kill()


def test_gateways_come_last_and_sessions_jobs_and_the_bus_are_left() -> None:
    units = [
        "llm-gateway@2.service",
        "dbus.service",
        "session-4.scope",
        "nginx.service",
        "llm-gateway@1.service",
        "init.scope",
        "llm-train@job.service",
        "systemd-logind.service",
    ]
    assert services.to_restart(units) == ["nginx.service", "llm-gateway@1.service", "llm-gateway@2.service"]
    assert services.by_reboot(units) == ["dbus.service", "systemd-logind.service"]


def test_each_gateway_is_ready_before_the_next_one_is_restarted() -> None:
    steps: list[str] = []

    def ready(instance: str) -> bool:
        steps.append(f"{instance} is asked")
        return steps.count(f"{instance} is asked") > 1

    def call(argv: list[str]) -> str:
        steps.append(" ".join(argv))
        return ""

    services.restart(["llm-gateway@2.service", "llm-gateway@1.service", "init.scope"], ready, 5, call)
    assert steps == [
        "systemctl daemon-reexec",
        "systemctl restart llm-gateway@1.service",
        "1 is asked",
        "1 is asked",
        "systemctl restart llm-gateway@2.service",
        "2 is asked",
        "2 is asked",
    ]


CONFIGURATION = """
pid {folder}/nginx.pid; error_log {folder}/error.log notice; worker_processes 1;
events {{ }}
http {{
    access_log off;
    client_body_temp_path {folder}/a; proxy_temp_path {folder}/b; fastcgi_temp_path {folder}/c;
    uwsgi_temp_path {folder}/d; scgi_temp_path {folder}/e;
    server {{ listen 127.0.0.1:{port}; return 200 "yes"; }}
}}
"""


@pytest.fixture
def nginx(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """The folder of a running nginx, and its port."""
    if (program := shutil.which("nginx")) is None:
        pytest.skip("there is no nginx")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (tmp_path / "nginx.conf").write_text(CONFIGURATION.format(folder=tmp_path, port=port))
    # It starts itself anew by the path that it was started by, and keeps what it writes to.
    command = [program, "-p", f"{tmp_path}", "-e", f"{tmp_path}/error.log", "-c", f"{tmp_path}/nginx.conf"]
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    # Signals before its first worker are lost.
    urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10).close()
    yield tmp_path, port
    subprocess.run([*command, "-s", "stop"], check=True)


def test_nginx_is_started_anew_without_a_connection_refused(nginx: tuple[Path, int]) -> None:
    folder, port = nginx
    answers: list[int] = []
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10) as answer:
                answers.append(answer.status)

    old = int((folder / "nginx.pid").read_text())
    with ThreadPoolExecutor(1) as clients:
        asking = clients.submit(ask)
        try:
            shown = f"PIDFile={folder}/nginx.pid\nMainPID={old}\n"
            assert services.restart(["nginx.service"], lambda _: False, 20, lambda _: shown) == [
                "nginx.service"
            ]
        finally:
            over.set()
        asking.result()
    assert int((folder / "nginx.pid").read_text()) != old
    assert set(answers) == {200}


def test_an_nginx_that_does_not_start_anew_serves_on(nginx: tuple[Path, int]) -> None:
    folder, port = nginx
    old = int((folder / "nginx.pid").read_text())
    good = (folder / "nginx.conf").read_text()
    (folder / "nginx.conf").write_text("nothing of nginx's;")
    with pytest.raises(rollout.Failed, match=rf"no new nginx started beside process {old} within 1 s"):
        services.replace_nginx(old, folder / "nginx.pid", 1)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10) as answer:
        assert answer.status == 200
    (folder / "nginx.conf").write_text(good)


def test_a_gateway_that_is_not_ready_in_time_is_named() -> None:
    with pytest.raises(
        rollout.Failed, match=r"llm-gateway@1\.service was restarted and not ready within 0 s"
    ):
        services.restart(["llm-gateway@1.service"], lambda _: False, 0, lambda _: "")
