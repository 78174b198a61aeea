"""playbooks/upgrade-drivers.yml against hosts of this machine: the waves, the rollback, the sentences.

Programs of a few lines stand in for a host's dkms, apt and llm-gpu, tasks for its role gpu, servers for its gateway and engine.
The real ones are in tests/lab/faults/test_driver_upgrade.py.
"""

import json
import os
import shutil
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import yaml
from plugin_modules import LINK, ROOT, load

load("filter.estate")  # puts the collection where Ansible finds it

KERNEL = "6.12.1-standin"
OLD, NEW = "1.0", "2.0"
SETS = [
    {"name": f"set-{version}", "driver": version, "dkms": {"name": "standin", "package": ""}}
    for version in (OLD, NEW)
]
PROGRAMS = {
    "dkms": """
import sys
words = sys.argv[1:]
said = f"standin/{(root / 'driver').read_text()}, {kernel}, x86_64: installed"
if words[0] == "status":
    wanted = words[words.index("-v") + 1] if "-v" in words else ""
    print(said if wanted in ("", (root / "driver").read_text()) else "")
elif words[0] == "install":
    if (root / "no-way-back").exists():
        sys.exit("dkms: there is no rollback")
    (root / "driver").write_text(words[words.index("-v") + 1])
""",
    "apt-mark": "",
    "systemctl": "",
    "dpkg-query": "",
    "apt-cache": 'print(f"linux-headers-amd64\\n  Depends: linux-headers-{kernel}")',
    "llm-gpu": """
import json, os, sys
orders, driver = root / "orders", (root / "driver").read_text()
given = json.loads(orders.read_text()) if orders.exists() else {}
match sys.argv[1:]:
    case ["status"]:
        by = given.get("by")
        if not by and (root / "sick").exists() and (root / "sick").read_text() in ("", driver):
            by = "llm-gpu"
        print(f"echo: quarantined since now by {by}: {given.get('why', 'GPU 3: lost')}" if by else "echo: in service")
    case ["check", *options]:
        (root / "checked-with").write_text(" ".join(options))
        bad = [driver] if (root / "fails-with").exists() and (root / "fails-with").read_text() == driver else []
        found = [{"text": f"it does not answer with {each}", "gpu": 3, "runbook": "bus-xids", "drains": True} for each in bad]
        print(json.dumps({"findings": found, "driver": driver}))
        sys.exit(len(found))
    case ["drain", _, "--operator", by, "--reason", why]:
        (root / "drained-with").write_text(driver)
        orders.write_text(json.dumps({"by": by, "why": why}))
    case ["undrain", *_]:
        orders.write_text("{}")
""",
}
# In the place of role gpu.
INSTALL = [
    {
        "name": "Install the driver",
        "ansible.builtin.copy": {"dest": "{{ root }}/driver", "content": "{{ wanted_set.driver }}"},
    },
]


class Gateway(BaseHTTPRequestHandler):
    """Answers a question by the driver that its host has."""

    def log_message(self, *_: object) -> None:
        """Nothing on the terminal."""

    def address_string(self) -> str:
        return "a socket"

    def say(self, status: int, body: Any) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def do_GET(self) -> None:
        self.say(200, {"in_flight": 0})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        root: Path = self.server.root  # type: ignore[attr-defined]
        mute = root / "mute-with"
        tokens = 0 if mute.exists() and mute.read_text() == (root / "driver").read_text() else 3
        if self.headers["authorization"] != "Bearer llmk_the_key":
            self.say(401, {"error": "unauthenticated"})
        else:
            self.say(200, {"response": "a word", "usage": {"completion_tokens": tokens}})


class Engine(socketserver.StreamRequestHandler):
    """Says that it is ready, and answers."""

    def handle(self) -> None:
        self.wfile.write(b'{"kind": "beat", "stalled": false, "requests": 0}\n')
        if self.rfile.readline():
            (self.server.root / "engine-was-asked").touch()  # type: ignore[attr-defined]
            self.wfile.write(b'{"kind": "done", "id": 1, "completion_tokens": 3}\n')


class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True

    def __init__(self, root: Path, place: str, handler: type[socketserver.BaseRequestHandler]) -> None:
        self.root = root
        super().__init__(str(root / place), handler)


@dataclass
class Estate:
    folder: Path
    hosts: dict[str, dict[str, Any]] = field(default_factory=dict)
    servers: list[Server] = field(default_factory=list)

    def __truediv__(self, host: str) -> Path:
        return self.folder / host

    def add(self, host: str, model: str) -> None:
        """A host that runs the old set, and answers for a model."""
        root = self / host
        for place in (
            "bin",
            "usr/local/bin",
            "boot",
            "run/llm-gateway",
            "run/llm-engine",
            "var/lib/llmkeep/gpu",
            f"usr/src/standin-{OLD}",
        ):
            (root / place).mkdir(parents=True)
        built = root / f"var/lib/dkms/standin/{OLD}/{KERNEL}/x86_64/module"
        built.mkdir(parents=True)
        (built / "standin.ko").write_text("a module")
        (root / "driver").write_text(OLD)
        (root / "var/lib/llmkeep/gpu/kernel").write_text(KERNEL)
        for name, text in PROGRAMS.items():
            program = root / ("usr/local/bin" if name == "llm-gpu" else "bin") / name
            head = (
                f"#!{sys.executable}\nfrom pathlib import Path\nroot, kernel = Path('{root}'), '{KERNEL}'\n"
            )
            program.write_text(head + text)
            program.chmod(0o755)
        python = root / "python"
        python.write_text(f'#!/bin/sh\nPATH={root}/bin:$PATH exec {sys.executable} "$@"\n')
        python.chmod(0o755)
        self.hosts[host] = {
            "ansible_connection": "local",
            "ansible_python_interpreter": str(python),
            "root": str(root),
            "llm_serving_models": [{"name": model, "driver": "echo"}],
        }
        for place, handler in (
            ("run/llm-gateway/gateway-1.sock", Gateway),
            (f"run/llm-engine/{model}.sock", Engine),
        ):
            self.servers.append(server := Server(root, place, handler))
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()

    def upgrade(self, *words: str, **given: Any) -> tuple[int, str]:
        """Run the playbook; how it ended, and what it said, as one line."""
        plays = yaml.safe_load((ROOT / "playbooks/upgrade-drivers.yml").read_text())
        [play] = [each for each in plays if "hosts" in each]
        play["tasks"] = [task for task in play["tasks"] if "llmkeep.estate.packages" not in task]
        play["gather_facts"] = False
        # A folder that the host's own interpreter fills in, since a survey is delegated.
        for module in ("driver_upgrade", "serving_canary"):
            play["module_defaults"].setdefault(f"llmkeep.estate.{module}", {})["root"] = "$HOST_ROOT"
        play["module_defaults"]["llmkeep.estate.driver_upgrade"]["recorded"] = False
        books = self.folder / "playbooks"
        shutil.copytree(ROOT / "playbooks/tasks", books / "tasks", dirs_exist_ok=True)
        (books / "upgrade-drivers.yml").write_text(yaml.safe_dump([play]))
        for role in ("gpu", "llm_serving"):
            shutil.copytree(
                ROOT / f"roles/{role}/defaults", self.folder / f"roles/{role}/defaults", dirs_exist_ok=True
            )
        tasks = self.folder / "roles/gpu/tasks"
        tasks.mkdir(exist_ok=True)
        (tasks / "main.yml").write_text(yaml.safe_dump(INSTALL))
        (self.folder / "key.json").write_text(json.dumps({"key": "llmk_the_key"}))
        for host in self.hosts:
            python = self / host / "python"
            if "HOST_ROOT" not in python.read_text():
                python.write_text(python.read_text().replace("PATH=", f"HOST_ROOT={self / host} PATH=", 1))
        groups = {name: {"hosts": dict.fromkeys(self.hosts)} for name in ("gpu", "serve")}
        first = next(iter(self.hosts))
        children = {
            **groups,
            "control": {"hosts": {first: None}},
            "engines": {"hosts": {list(self.hosts)[-1]: None}},
        }
        inventory = {
            "all": {
                "hosts": self.hosts,
                "vars": {"gpu_set": "set-2.0", "gpu_sets": SETS},
                "children": children,
            }
        }
        (self.folder / "hosts.yml").write_text(yaml.safe_dump(inventory))
        variables = {
            "upgrade_canary_key_file": str(self.folder / "key.json"),
            "upgrade_accept_seconds": 1,
            "upgrade_canary_seconds": 1,
            "upgrade_reboot_seconds": 5,
            **given,
        }
        command = [
            str(Path(sys.executable).with_name("ansible-playbook")),
            "-i",
            str(self.folder / "hosts.yml"),
        ]
        done = subprocess.run(
            [*command, str(books / "upgrade-drivers.yml"), "-e", json.dumps(variables), *words],
            capture_output=True,
            text=True,
            check=False,
            cwd=self.folder,
            env={
                **os.environ,
                "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
                "ANSIBLE_COLLECTIONS_PATH": str(LINK.parents[2]),
                "ANSIBLE_ROLES_PATH": str(self.folder / "roles"),
                "ANSIBLE_NOCOLOR": "1",
            },
        )
        return done.returncode, " ".join((done.stdout + done.stderr).split())

    def drivers(self) -> dict[str, str]:
        return {host: (self / host / "driver").read_text() for host in self.hosts}

    def progress(self, host: str) -> dict[str, Any]:
        file = self / host / "var/lib/llmkeep/gpu/upgrade.json"
        found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        return found

    def in_service(self, host: str) -> bool:
        orders = self / host / "orders"
        return not orders.exists() or orders.read_text() == "{}"


@pytest.fixture
def estate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Estate]:
    """Two hosts with one model."""
    made = Estate(tmp_path_factory.mktemp("up"))  # short: sockets lie below it
    for host in ("g1", "g2"):
        made.add(host, "m")
    yield made
    for server in made.servers:
        server.shutdown()
        server.server_close()


def test_a_host_that_was_interrupted_goes_on_and_then_the_next_one_is_upgraded(estate: Estate) -> None:
    before = {"step": "installed", "wanted": "", "cause": "", "previous": {"name": "set-1.0"}}
    (estate / "g1/var/lib/llmkeep/gpu/upgrade.json").write_text(json.dumps(before))
    (estate / "g1/orders").write_text(json.dumps({"by": "upgrade-drivers", "why": "a run that was killed"}))
    (estate / "g1/driver").write_text(NEW)
    code, said = estate.upgrade()
    assert code == 0, said
    assert estate.drivers() == {"g1": NEW, "g2": NEW}
    assert all(map(estate.in_service, estate.hosts))
    assert [estate.progress(host)["step"] for host in estate.hosts] == ["done", "done"]
    assert estate.progress("g1")["previous"] == before["previous"], "what ran before it began"
    assert estate.progress("g2")["previous"]["version"] == OLD
    assert (estate / "g2/drained-with").read_text() == OLD, "drained before its driver changed"
    assert "--cuda" in (estate / "g2/checked-with").read_text()
    assert [(estate / host / "engine-was-asked").exists() for host in ("g1", "g2")] == [False, True], (
        "gateways of others use g2's"
    )


def test_a_host_whose_way_back_fails_stays_drained_and_is_never_called_done(estate: Estate) -> None:
    (estate / "g1/mute-with").write_text(NEW)
    (estate / "g1/no-way-back").touch()
    code, said = estate.upgrade()
    assert code != 0
    assert (
        "The upgrade of g1 failed at Ask the test questions: no answer within 1 s: m at"
        f" {estate.folder}/g1/run/llm-gateway/gateway-1.sock: 200"
    ) in said
    assert "The rollback failed too, at Restore the former driver set: dkms install ended with 1" in said
    assert "What is in service there: `llm-gpu status`. No further host was touched" in said
    cause = estate.progress("g1")["cause"]
    assert (cause.startswith("Ask the test questions: "), "rollback" in cause) == (True, False), (
        "the first cause"
    )
    assert (estate.progress("g1")["step"], estate.in_service("g1")) == ("stuck", False)
    assert estate.drivers() == {"g1": NEW, "g2": OLD}

    (estate / "g1/no-way-back").unlink()
    code, said = estate.upgrade()
    assert code != 0
    assert (
        "It is back on set-1.0 (standin 1.0 on 6.12.1-standin), accepted again and in service. No further host was touched."
        " Set gpu_set back in the inventory before the next site.yml."
    ) in said
    assert (estate.progress("g1")["step"], estate.in_service("g1")) == ("returned", True)
    assert estate.drivers() == {"g1": OLD, "g2": OLD}, "no other host is begun with while one goes back"


def test_engines_that_were_returned_are_drained_again_before_the_way_back(estate: Estate) -> None:
    (estate / "g1/sick").write_text(NEW)  # as soon as it is in service
    estate.hosts["g1"]["gpu_health_expect"] = {"compute_mode": "exclusive_process"}
    code, said = estate.upgrade()
    assert code != 0
    assert "The upgrade of g1 failed at Return the engines to service: engines are quarantined" in said
    assert (estate / "g1/drained-with").read_text() == NEW, "once more, with the driver that it leaves"
    assert (estate.progress("g1")["step"], estate.in_service("g1")) == ("returned", True)
    assert estate.drivers() == {"g1": OLD, "g2": OLD}
    assert "--cuda" not in (estate / "g1/checked-with").read_text(), "its engine has the GPU alone"


def test_a_host_that_has_the_set_is_not_touched_and_the_next_wave_stops_at_a_sick_host(
    estate: Estate,
) -> None:
    (estate / "g1/driver").write_text(NEW)
    (estate / "g2/sick").touch()
    code, said = estate.upgrade()
    assert code != 0
    assert "g1: skip. it has the set set-2.0" in said
    assert "g2 was not touched: echo of g2 is quarantined by llm-gpu: GPU 3: lost" in said
    assert estate.drivers() == {"g1": NEW, "g2": OLD}
    assert [estate.progress(host) for host in estate.hosts] == [{}, {}]
    assert not (estate / "g1/drained-with").exists()
