"""A lab and what is asked of the estate in it, the way a person would: by the lab's command line, and over HTTP."""

import base64
import http.client
import io
import json
import os
import re
import shlex
import ssl
import subprocess
import tarfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import openai
import pytest
from ledger import watch

from lab.cgroup import mount_point
from lab.cli import require_power
from lab.instance import Instance, identity
from llmkeep.bundle import manifest, signing

ROOT = Path(__file__).resolve().parents[2]
LAB = ROOT / ".venv" / "bin" / "lab"
BUNDLE = ROOT / ".lab" / "bundle"
HOSTS = ("ops1", "llm1")
QUESTION = "Name the capital of France."
CLIENTS = 4
PAUSE = 5.0  # between requests of one client: while Redis is late, a gateway grants 15 a minute of their 60
# The package again, as an older version: its files are the same, and apt has its .deb.
OLDER = """
set -e
mkdir -p /tmp/older && cd /tmp/older
apt-get -qq -o APT::Sandbox::User=root download {name}
dpkg-deb --raw-extract {name}_*.deb tree
sed --in-place 's/^Version: .*/&~/' tree/DEBIAN/control
dpkg-deb --build tree . > /dev/null
dpkg --install ./{name}_*~_*.deb > /dev/null 2>&1
cp ./{name}_*~_*.deb /var/cache/apt/archives/
rm -r /tmp/older
"""
ENCODER = "all-minilm-l6-v2"
WITH_LOGS = "-i inventory/lab -i inventory/lab-logs"
ELASTICSEARCH_REQUEST = "/usr/local/lib/llmkeep/elasticsearch-request"
# A success of all shards: Elasticsearch says 200, and less than there is, where only some of them failed.
OF_ALL_SHARDS = '^2(?!.*"_shards":[{][^}]*"failed":[1-9])'


@dataclass(frozen=True)
class Lab:
    """One instance of the lab, driven through its command line as a person would."""

    instance: str
    inventories: tuple[str, ...] = ("inventory/lab",)

    @cached_property
    def group(self) -> Path:
        """Control group of its hosts."""
        return mount_point() / f"llmkeep-{identity(self.instance)}"

    @cached_property
    def _instance(self) -> Instance:
        return Instance(self.instance)

    def command(self, verb: str, *args: str) -> str:
        """As an operator types it on the control node."""
        given = [f"-i {inventory}" for inventory in self.inventories]
        return " ".join(["llmkeep", verb, *given, *args])

    @property
    def site_command(self) -> str:
        return self.command("site")

    def floor(self, *options: str) -> None:
        """Make the hosts, and the snapshots `bare` and `floor` of them."""
        inventories = [word for inventory in self.inventories for word in ("--inventory", inventory)]
        self.run(*inventories, "floor", *options, timeout=2400)

    def run(
        self, *args: str, check: bool = True, timeout: float = 900, given: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run `lab ARGS`, which reads GIVEN; with `check`, a non-zero exit fails the test with the command's own output."""
        if "up" in args:  # it may be of another inventory
            vars(self).pop("_instance", None)
        return self._ran(f"lab {' '.join(args)}", [str(LAB), *args], check, timeout, given)

    def _ran(
        self, name: str, argv: list[str], check: bool, timeout: float, given: str | None
    ) -> subprocess.CompletedProcess[str]:
        watch(self.group)
        environment = {
            **os.environ,
            "LAB_INSTANCE": self.instance,
            "PATH": f"{LAB.parent}:{os.environ['PATH']}",
        }
        # Of its own: a killed ssh leaves it non-blocking, which Ansible refuses, for all that share it.
        stdin = {"stdin": subprocess.DEVNULL} if given is None else {"input": given}
        done = subprocess.run(
            argv,
            **stdin,
            capture_output=True,
            text=True,
            errors="replace",  # a host's files may hold anything
            timeout=timeout,
            env=environment,
            cwd=ROOT,
            check=False,
        )
        if check and done.returncode:
            pytest.fail(f"{name} exited {done.returncode}\n{excerpt(done.stdout)}\n{done.stderr[-3000:]}")
        return done

    def on(
        self, host: str, command: str, check: bool = True, timeout: float = 900, given: str | None = None
    ) -> str:
        """What the shell command COMMAND prints on HOST, where it reads GIVEN.

        It is `lab exec` without the Python process of the command line, which costs ten times as much as SSH's client.
        """
        machine = self._instance.machine(host)
        if not check and not machine.running():
            return ""
        require_power(machine)
        argv = self._instance.ssh(machine, shlex.join(["sh", "-c", command]))
        return self._ran(f"{host}: {command}", argv, check, timeout, given).stdout

    def send(self, host: str, place: str, parts: Mapping[str, Path]) -> None:
        """Put files and folders below PLACE on HOST, each under its name there."""
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w:gz") as tar:
            for name, path in parts.items():
                tar.add(path, name)
        text = base64.encodebytes(content.getvalue()).decode()
        self.on(host, f"mkdir -p {place} && base64 -d | tar -xz -C {place}", given=text)

    def outside(
        self, *argv: str, check: bool = True, timeout: float = 120
    ) -> subprocess.CompletedProcess[str]:
        """Run ARGV on this machine, inside the lab's network namespace."""
        return self.run("netns", "--", *argv, check=check, timeout=timeout)

    def site(self, *args: str) -> str:
        """Run `site.yml` as the estate does: on ops1, through ansible-runner."""
        return self.on("ops1", " ".join([self.site_command, *args]), timeout=1800)

    def operate(self, verb: str, *args: str, check: bool = True) -> str:
        """What another of the operator's verbs prints: `llmkeep VERB`, on ops1."""
        return self.on("ops1", self.command(verb, *args), check=check, timeout=600)

    def snapshots(self, host: str) -> list[str]:
        """Names of a host's snapshots."""
        names: list[str] = json.loads(self.run("status", "--json").stdout)["hosts"][host]["snapshots"]
        return names

    def sink(self) -> list[dict[str, Any]]:
        """Every packet and DNS question that was meant for elsewhere."""
        found: list[dict[str, Any]] = json.loads(self.run("sink", "--json").stdout)
        return found


def excerpt(output: str) -> str:
    """Of what Ansible printed, its end and its first failed task: where one host failed, the others go on."""
    _, fatal, said = output.partition("fatal: ")
    return f"{output[-6000:]}\n…\n{fatal}{said[:3000]}"


def changed(output: str) -> dict[str, int]:
    """Changed tasks by host, out of Ansible's recap."""
    return {
        host: int(count)
        for host, count in re.findall(r"^(\S+)\s+: ok=\d+\s+changed=(\d+)", output, re.MULTILINE)
    }


@dataclass(frozen=True)
class Client:
    """What `lab open` gave to any client of the estate."""

    url: str
    ca: Path
    key: str


def open_client(lab: Lab) -> Client:
    lab.run("open")
    env_file = ROOT / ".lab" / "instances" / lab.instance / "env"
    # Exported, for programs that the shell starts.
    assignments = dict(re.findall(r"^export (\w+)=(.*)$", env_file.read_text(), re.MULTILINE))
    return Client(
        url=assignments["LLMKEEP_URL"],
        ca=Path(assignments["LLMKEEP_CA"]),
        key=Path(assignments["LLMKEEP_API_KEY_FILE"]).read_text().strip(),
    )


@contextmanager
def official_client(client: Client) -> Iterator[openai.OpenAI]:
    """OpenAI's own client, trusting the estate's CA only."""
    context = ssl.create_default_context(cafile=str(client.ca))
    http_client = httpx2.Client(verify=context)
    with openai.OpenAI(base_url=f"{client.url}/v1", api_key=client.key, http_client=http_client) as opened:
        yield opened


@contextmanager
def load(lab: Lab, client: Client) -> Iterator[list[int]]:
    """Clients who ask for a short answer again and again; the statuses they saw. 0 is no answer at all."""
    names = [f"load-{number}@lab" for number in range(CLIENTS)]
    add = "llm-serve keys add --tenant t --role developer --subject"
    keys = lab.on("llm1", "; ".join(f"{add} {name}" for name in names)).split()
    statuses: list[int] = []
    done = threading.Event()

    def ask(key: str) -> None:
        while not done.wait(PAUSE):
            try:
                body = {"prompt": f"Say a word. {time.monotonic()}", "max_tokens": 2}
                statuses.append(request(client, "POST", "/generate", body, key=key)[0])
            except OSError:
                statuses.append(0)

    threads = [threading.Thread(target=ask, args=(key,)) for key in keys]
    for thread in threads:
        thread.start()
    try:
        yield statuses
    finally:
        done.set()
        for thread in threads:
            thread.join(120)


def within(seconds: float, what: str, holds: Callable[[], bool]) -> None:
    """Wait until `holds()` is true."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            pytest.fail(f"not within {seconds:.0f} s: {what}")
        time.sleep(0.3)


def request(
    client: Client, method: str, path: str, body: object = None, key: str | None = None
) -> tuple[int, bytes]:
    """One request, over TLS 1.3, trusting the estate's CA only."""
    target = urlsplit(client.url)
    context = ssl.create_default_context(cafile=str(client.ca))
    link = http.client.HTTPSConnection(str(target.hostname), target.port, context=context, timeout=120)
    headers = {"authorization": f"Bearer {key or client.key}", "content-type": "application/json"}
    try:
        link.request(method, path, json.dumps(body) if body is not None else None, headers)
        answer = link.getresponse()
        return answer.status, answer.read()
    finally:
        link.close()


def answered(client: Client, path: str, body: object, seconds: float) -> Any:
    """What the service answers, as soon as it does."""
    end = time.monotonic() + seconds
    while True:
        try:
            status, answer = request(client, "POST", path, body)
        except (OSError, http.client.HTTPException) as problem:
            status, answer = 0, str(problem).encode()
        if status == 200:
            return json.loads(answer)
        if time.monotonic() > end:
            pytest.fail(f"no answer within {seconds:.0f} s; the last one: {status} {answer[:300]!r}")
        time.sleep(1)


def answers(client: Client, seconds: float = 120) -> str:
    """The answer to the question."""
    body = {"prompt": QUESTION, "max_tokens": 16, "temperature": 0}
    return str(answered(client, "/generate", body, seconds)["response"])


def verify(lab: Lab, *options: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The report of `llmkeep verify`, and what those of its checks that fail observed."""
    report: dict[str, Any] = json.loads(lab.operate("verify", "--json", *options, check=False))
    checks = [check for checks in report["hosts"].values() for check in checks]
    return report, {
        check["id"]: check["observed"]
        for check in checks
        # A container's kernel may lack the means, and its Debian may be older than the bundle.
        if not (check["ok"] or "not_enforceable" in check or "accepted" in check)
    }


@contextmanager
def escrow_medium(lab: Lab) -> Iterator[tuple[str, str]]:
    """The escrow key and its passphrase on the control node, as long as their owner is there."""
    files = {"/run/escrow.key": ".lab/escrow/escrow.key", "/run/escrow.passphrase": ".lab/passphrase"}
    for there, here in files.items():
        lab.on("ops1", f"umask 077 && cat > {there}", given=(ROOT / here).read_text())
    try:
        yield "/run/escrow.key", "/run/escrow.passphrase"
    finally:
        lab.on("ops1", f"rm {' '.join(files)}")


def sign_as_builder(bundle: manifest.Manifest, folder: Path) -> None:
    """Write a bundle's manifest to FOLDER, signed by the key that signed the lab's bundle."""
    manifest.write(folder, bundle)
    with signing.unlocked(ROOT / ".lab/keys/signing.key", ROOT / ".lab/passphrase") as key:
        signing.sign(key, folder / manifest.NAME, folder / manifest.SIGNATURE)


def carry(lab: Lab, folder: Path) -> None:
    """Add the files of FOLDER to the bundle in use on the control node, from a medium."""
    lab.run("plug", "ops1", str(folder))
    lab.on("ops1", "cp -r /run/lab/stick/. /srv/llmkeep/bundle/current/")


def drill(lab: Lab, volume: str) -> None:
    """Open what the control node keeps of a volume, as an operator with the escrow key does."""
    with escrow_medium(lab) as (key, passphrase):
        words = f"-e volume={volume} -e escrow_key={key} -e escrow_passphrase_file={passphrase}"
        lab.operate("run playbooks/drill.yml", words)


def lose_control_node(lab: Lab) -> None:
    """Put a blank machine into its place. The HSM is another device, whose tokens are on this one in the lab alone: it stays."""
    tokens = lab.on("ops1", "tar -C / -c var/lib/softhsm | base64")
    lab.run("restore", "ops1", "bare")
    lab.run("plug", "ops1", str(ROOT / ".lab/bundle"))
    lab.on("ops1", "base64 -d | tar -C / -x", given=tokens)
    lab.on("ops1", "sh /run/lab/stick/bootstrap --restore")


def give_canary_key(lab: Lab) -> None:
    """Put a key that may ask the models into /root/canary.json on the control node."""
    key = lab.on("llm1", "llm-serve keys add --json --subject canary --tenant operations --role developer")
    lab.on("ops1", "umask 077 && cat > /root/canary.json", given=key)


def make_older(lab: Lab, host: str, *names: str) -> None:
    """Give the host packages just below the bundle's versions; apt has the .deb of each."""
    for name in names:
        lab.on(host, OLDER.format(name=name))


def patch(lab: Lab, *words: str) -> str:
    """`llmkeep patch`, as an operator runs it; its output as one line, which ends with how it ended."""
    command = " ".join(["llmkeep patch -i inventory/lab", *words])
    return " ".join(lab.on("ops1", f"{command}; echo ended with $?", timeout=1200).split())


def elasticsearch(lab: Lab, method: str, path: str, body: object = None) -> Any:
    """What the search host's Elasticsearch answers to its superuser, as soon as it does with success of all shards."""
    asked = f"{ELASTICSEARCH_REQUEST} --until '{OF_ALL_SHARDS}' 300 {method} '{path}'"
    given = None if body is None else json.dumps(body)
    said = lab.on("ops1", asked if given is None else f"{asked} -", given=given)
    return json.loads(said.partition(" ")[2])


def sign_and_add(lab: Lab, candidate: str, options: str = "") -> str:
    """Make a release of a candidate on the control node, and put it on the mirror; what `sign` said.

    The publish key is made with a passphrase, if there is none yet.
    """
    lab.on("ops1", "umask 077 && cat > /run/publish.passphrase", given="only for the lab's models\n")
    given = "--passphrase-file /run/publish.passphrase"
    lab.on("ops1", f"llmkeep release init {given}")
    said = lab.on("ops1", f"llmkeep release sign {candidate} {given} {options}")
    lab.on("ops1", f"rm /run/publish.passphrase && llmkeep release add {candidate}")
    return said


def fetch_sign_and_add(lab: Lab, fetch: str) -> str:
    """Run a `llmkeep release fetch` on the control node, and what it prints; what `sign` said."""
    [(folder, options)] = re.findall(
        r"^  llmkeep release sign (\S+) (--sha256 [0-9a-f]{64})$", lab.on("ops1", fetch), re.MULTILINE
    )
    return sign_and_add(lab, folder, options)


def job_done(lab: Lab, host: str, unit: str, seconds: float = 1500) -> None:
    """Wait until a training job is done there."""
    end = time.monotonic() + seconds
    while "exited" not in (state := lab.on(host, f"systemctl show -P SubState {unit}", check=False)):
        assert time.monotonic() < end, state + lab.on(
            host, f"journalctl --unit {unit} --lines 40 --output cat"
        )
        time.sleep(5)


def serve_models(lab: Lab, models: list[dict[str, Any]]) -> None:
    """What an operator does: other models into the inventory, and the roles that serve them."""
    variables = json.dumps({"serve": {"vars": {"llm_serving_models": models}}})
    lab.on("ops1", "cat > /root/models.json", given=variables)
    lab.on("ops1", f"{lab.site_command} -i /root/models.json -t llm_serving", timeout=1800)


def leaks(lab: Lab, client: Client, sealed: list[tuple[str, str]], output: str) -> list[str]:
    """Where a secret of the estate is readable that should be nowhere but in its place.

    The real secrets are the canaries: `sealed` credentials (host and name), the API key and a host's private key, read where
    root may and looked for in OUTPUT, logs, command lines, environments and what Ansible leaves behind.
    """
    opened = "systemd-creds decrypt --name={0} /etc/credstore.encrypted/{0} -"
    secrets = {name: lab.on(host, opened.format(name)) for host, name in sealed}
    secrets["host key"] = lab.on("llm1", "cat /etc/llmkeep/pki/host.key")
    needles = {"api key": client.key.split("_")[2]}
    for name, text in secrets.items():
        # Of a PEM file a line in its middle: the first ones are the same for every key.
        line = max(text.split("\n")[2:4] or text.split("\n"), key=len) if "-----" in text else text.strip()
        assert len(line) >= 30, f"{name} could not be read, so that this would prove nothing"
        needles[name] = line[:60]
        encoded = base64.b64encode(text.encode()).decode()
        needles[f"{name} in base64"] = encoded[max(0, len(encoded) // 2 - 24) :][:48]
    places = {"output of site.yml": output}
    for host in HOSTS:
        places[f"logs of {host}"] = lab.on(
            host, "journalctl --no-pager --quiet -o cat; cat /var/log/*.log; true"
        )
        places[f"processes of {host}"] = lab.on(
            host, "cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ | tr '\\0' '\\n'"
        )
        places[f"Ansible's leftovers on {host}"] = lab.on(
            host, "find /root/.ansible /tmp -type f -size -2M -exec cat {} + 2>/dev/null | tr -d '\\0'; true"
        )
    return [
        f"{name} in the {place}"
        for name, text in needles.items()
        for place, where in places.items()
        if text in where
    ]


def scenarios(kind: str) -> list[str]:
    """The roles whose molecule scenario needs hosts of a kind: container, or kernel where its configuration asks for them."""
    found = sorted(path.parent for path in (ROOT / "molecule").glob("*/scenario.yml"))
    on_kernels = {path for path in found if "inventory/lab-kernel" in (path / "molecule.yml").read_text()}
    return [path.name for path in found if (path in on_kernels) == (kind == "kernel")]


def require_programs(*names: str) -> None:
    """Skip the test where the bundle has not these programs, which come from a mirror folder alone."""
    for name in names:
        if not (ROOT / ".lab/bundle/bin" / name).exists():
            pytest.skip(f"the bundle has no {name}: build it with LLMKEEP_MIRROR set to a folder that has it")


def run_scenario(lab: Lab, role: str) -> None:
    """One role's molecule scenario: fresh host, converge, every check broken in turn, exactly the drift seen and repaired."""
    lab.run("sink", "--clear")
    done = lab.outside("molecule", "test", "--scenario-name", role, timeout=1800, check=False)
    log = ROOT / ".lab" / "logs" / lab.instance / f"{role}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(done.stdout + done.stderr, encoding="utf-8")
    if done.returncode:
        # Molecule repeats on stderr, in colours, what ansible-playbook printed.
        said = re.sub(r"\x1b\[[0-9;]*m", "", done.stderr)
        pytest.fail(f"the scenario failed, {log} has all of it\n{excerpt(said)}")
    assert lab.sink() == [], "the role tried to leave"
