"""`llmkeep image`: one digest from any builder, and a pod's containers that answer from it, run by a user without rights."""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import policies
import pytest
import rootless
import yaml
from estate import ROOT
from plugin_modules import load
from rootless import Podman
from waiting import own_port, until

from llmkeep.bundle import cache, manifest
from llmkeep.bundle.wheels import canonical
from llmkeep.image.contents import USER
from llmkeep.image.layout import Layout
from llmkeep.image.record import FOLDER, Record, verify
from llmkeep.places import Places
from llmkeep.policy import bundle as policy

BUNDLE, KEYS = ROOT / ".lab/bundle", ROOT / ".lab/keys"
MODEL = "smollm2-135m-instruct"
LOCKED_DOWN = ["--read-only", "--read-only-tmpfs=false", "--cap-drop=all", "--security-opt=no-new-privileges"]


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """A folder that a user without rights can reach, on a disk."""
    for program in ("podman", "runc", "newuidmap"):
        if not shutil.which(program):
            pytest.skip(f"{program} is not installed: apt-get install podman runc uidmap")
    folder = Path(tempfile.mkdtemp(prefix="llmkeep-image-", dir="/var/tmp"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def built(out: Path, *more: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """`llmkeep image build` of the lab's bundle."""
    command = [sys.executable, "-m", "llmkeep", "image", "build", f"--bundle={BUNDLE}", f"--out={out}"]
    command += [f"--keys={KEYS}", f"--passphrase-file={ROOT / '.lab/passphrase'}", *more]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)


def build(out: Path, **environment: str) -> Record:
    """A built image, which verifies."""
    done = built(out, **environment)
    assert done.returncode == 0, done.stderr
    return verify(out, KEYS / "keyring.pgp")


@pytest.fixture(scope="module")
def record(home: Path) -> Record:
    return build(home / "image")


@pytest.fixture(scope="module")
def layout(home: Path, record: Record) -> Layout:  # noqa: ARG001 -- built
    return Layout(home / "image" / FOLDER)


@pytest.fixture(scope="module")
def podman(home: Path, record: Record) -> Iterator[Podman]:  # noqa: ARG001 -- built
    """podman of that user, with the image in its storage."""
    folder = home / "user"
    folder.mkdir()
    with rootless.podman(folder) as run:
        run("pull", "--quiet", f"oci:{home / 'image' / FOLDER}:llmkeep")
        yield run


@dataclass(frozen=True)
class Pod:
    """The containers of a serving pod, and a key for each of two roles."""

    podman: Podman
    keys: dict[str, str]

    def logs(self) -> str:
        """What all containers printed."""
        names = self.podman("ps", "--all", "--format={{.Names}}").split()
        return "".join(f"{name}: {self.podman('logs', name, check=False)}\n" for name in names)

    def ask(self, role: str, model: str) -> tuple[int, Any]:
        """The answer to a question to this model, by a key of this role."""
        messages = [{"role": "user", "content": "Name the capital of France."}]
        question = {"model": model, "max_tokens": 8, "temperature": 0, "messages": messages}
        return self.request("POST", "/v1/chat/completions", question, self.keys[role])

    def request(self, method: str, path: str, body: object = None, key: str = "") -> tuple[int, Any]:
        """Status and document, by the gateway's socket; 0 and the error while it does not listen."""
        link = policies.Connection(self.podman.volume("gateway-run") / "1.sock")
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        try:
            link.request(method, path, json.dumps(body) if body else None, headers)
            answer = link.getresponse()
            return answer.status, json.loads(answer.read())
        except OSError as error:
            return 0, str(error)
        finally:
            link.close()


def configured(folder: Path, places: Places) -> None:
    """Files that a cluster would have as ConfigMaps, the release's manifest included."""
    engines = {"echo": {"driver": "echo"}}
    weights = {"path": "/models", "manifest": "/etc/llmkeep/SHA256SUMS"}
    engines[MODEL] = {"driver": "naive", **weights}
    for name, model in engines.items():
        settings = {"socket": f"/run/llm-engine/{name}.sock", "model": model}
        (folder / f"engine-{name}.yaml").write_text(json.dumps(settings))
    gateway = {
        "listen": {"socket": "/run/llm-gateway/1.sock", "socket_mode": "0660"},
        "metrics": {"host": "127.0.0.1", "port": 9100},
        "engines": {name: {"socket": f"/run/llm-engine/{name}.sock"} for name in engines},
        "policy": {
            "engine": "server",
            "socket": "/run/opa/opa.sock",
            "key": "/etc/llmkeep/policy.pem",
            "deadline_ms": 2000,
        },
        "audit": {"socket": "/run/llm-audit/audit.sock"},
        "keys_file": "/var/lib/llm-gateway/keys.json",
    }
    (folder / "gateway.yaml").write_text(json.dumps(gateway))
    entries = [entry for entry in manifest.read(BUNDLE).files if entry.path.startswith(f"models/{MODEL}/")]
    sums = "".join(f"{entry.sha256}  {Path(entry.path).name}\n" for entry in entries)
    (folder / "SHA256SUMS").write_text(sums)
    key = places.policy_public.read_text()
    (folder / "policy.pem").write_text(key)
    (folder / "opa.yaml").write_text(opa_settings(key))
    shutil.copy(places.policy_bundle, folder / "bundle.tar.gz")
    shutil.copy(ROOT / "roles/opa/files/authz.rego", folder)
    for path in [folder, *folder.iterdir()]:
        path.chmod(0o755)


@pytest.fixture(scope="module")
def pod(podman: Podman, home: Path) -> Pod:
    """gateway, two engines, audit writer, OPA and the server of its policy, each in a container of its own."""
    settings = home / "settings"
    settings.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        places = policies.control_node(home / "control", patch)
        policy.build(places, policies.SOURCE, places.policy_bundle, 30)
    configured(settings, places)
    secrets = home / "secrets"
    secrets.mkdir()
    for name in ("llm-audit.seed", "llm-gateway.pepper"):
        (secrets / name).write_text(os.urandom(32).hex())
        (secrets / name).chmod(0o400)
        os.chown(secrets / name, *[rootless.FIRST + USER - 1] * 2)  # as the user in the container

    def run(
        name: str, *command: str, network: str = "none", volumes: Iterable[str] = (), how: str = "--detach"
    ) -> str:
        mounts = [f"{settings}:/etc/llmkeep:ro", f"{secrets}:/run/secrets:ro", *volumes]
        return podman(
            *("run", how, "--name", name, f"--network={network}", *LOCKED_DOWN, "--tmpfs=/tmp"),
            *(
                "--env=CREDENTIALS_DIRECTORY=/run/secrets",
                *(f"--volume={mount}" for mount in mounts),
            ),
            *("llmkeep", *command),
        )

    audit, engines, gateway = (
        "audit-run:/run/llm-audit",
        "engine-run:/run/llm-engine",
        "gateway-run:/run/llm-gateway",
    )
    opa, state = "opa-run:/run/opa", "gateway-state:/var/lib/llm-gateway"
    run(
        "audit",
        "llm-audit",
        "serve",
        "--folder",
        "/var/log/llm-audit",
        "--socket",
        "/run/llm-audit/audit.sock",
        volumes=[audit, "audit-log:/var/log/llm-audit"],
    )
    run("policy", "/usr/local/lib/llmkeep/serve-policy", "/etc/llmkeep/bundle.tar.gz", "8181")
    run("opa", *opa_command(), network="container:policy", volumes=[opa, "opa-state:/var/lib/opa"])
    for name, more in {"echo": [], MODEL: [f"{BUNDLE}/models/{MODEL}:/models:ro"]}.items():
        run(
            name,
            "llm-serve",
            "engine",
            "--name",
            name,
            "--config",
            f"/etc/llmkeep/engine-{name}.yaml",
            volumes=[engines, *more],
        )
    keys = {}
    for role in ("analyst", "developer"):
        add = ["llm-serve", "keys", "add", "--json", f"--subject={role}", "--tenant=t", f"--role={role}"]
        keys[role] = json.loads(run("keys", *add, volumes=[state], how="--rm"))["key"]
    run(
        "gateway",
        "llm-serve",
        "gateway",
        "--config",
        "/etc/llmkeep/gateway.yaml",
        volumes=[audit, engines, gateway, opa, state],
    )
    made = Pod(podman, keys)
    try:
        until(lambda: made.request("GET", "/readyz")[0] == 200, 120)
    except TimeoutError:
        raise AssertionError(f"{made.request('GET', '/readyz')}\n{made.logs()}") from None
    return made


def opa_settings(key: str) -> str:
    """The role's configuration of OPA, as it would be on a host."""
    template = (ROOT / "roles/opa/templates/config.yaml.j2").read_text()
    before, _, after = template.replace("{{ __opa_port }}", "8181").partition("{{ ansible_facts")
    return before + "".join(f"      {line}\n" for line in key.splitlines()) + after.partition("}}")[2]


def opa_command() -> list[str]:
    """The role's arguments of OPA."""
    unit = (ROOT / "roles/opa/templates/opa.service.j2").read_text()
    line = next(line for line in unit.splitlines() if line.startswith("ExecStart="))
    _, _, arguments = line.partition("/opa run ")
    for old, new in {
        "{{ __opa_socket }}": "/run/opa/opa.sock",
        "/etc/opa/config.yaml": "/etc/llmkeep/opa.yaml",
        "/etc/opa/authz.rego": "/etc/llmkeep/authz.rego",
    }.items():
        arguments = arguments.replace(old, new)
    return ["opa", "run", *arguments.split()]


def inside(podman: Podman, *command: str) -> list[str]:
    """Lines that a command of the image prints."""
    return podman("run", "--rm", "--network=none", *LOCKED_DOWN, "llmkeep", *command).splitlines()


def test_the_role_that_deploys_reads_its_record(home: Path, record: Record) -> None:
    read = load("module_utils.cluster.declared").image_record(home / "image/image.json", KEYS / "keyring.pgp")
    assert (read["digest"], read["variant"]) == (record.digest, "cpu")


def test_containers_of_a_user_without_rights_answer(pod: Pod) -> None:
    assert pod.ask("developer", "echo")[0] == 200, pod.logs()
    status, answer = pod.ask("developer", MODEL)
    assert status == 200, answer
    assert "Paris" in answer["choices"][0]["message"]["content"]


def test_the_policy_decides_in_them(pod: Pod) -> None:
    status, refusal = pod.ask("analyst", MODEL)
    assert status == 403, refusal


def test_the_record_in_them_proves_itself(pod: Pod) -> None:
    pod.ask("developer", "echo")
    said = pod.podman("exec", "audit", "llm-audit", "verify", "--live", "--json")
    assert json.loads(said)["records"] >= 2, said


def test_the_sbom_lists_what_is_installed_and_nothing_else(
    podman: Podman, layout: Layout, record: Record
) -> None:
    referrer = layout.read(record.sbom)
    assert referrer["subject"]["digest"] == record.digest
    components = layout.read(referrer["layers"][0]["digest"])["components"]
    listed = {(each["purl"].split("/")[0], each["name"], each["version"]) for each in components}
    packages = inside(podman, "dpkg-query", "--show", "--showformat=${Package} ${Version}\\n")
    installed = {("pkg:deb", *line.split()) for line in packages}
    program = "import importlib.metadata as m; print(*(f'{d.name} {d.version}' for d in m.distributions(path=['%s'])), sep='\\n')"
    site = "/opt/llmkeep/venv/lib/python3.13/site-packages"
    for line in inside(podman, "/opt/llmkeep/venv/bin/python", "-c", program % site):
        name, version = line.split()
        installed.add(("pkg:generic" if name.startswith("llmkeep") else "pkg:pypi", canonical(name), version))
    for row in yaml.safe_load("\n".join(inside(podman, "cat", f"{site}/llmweb/static/vendor.yml"))):
        installed.add(("pkg:npm", row["purl"].split("/")[1].split("@")[0], row["version"]))
    installed.add(("pkg:golang", "opa", inside(podman, "opa", "version")[0].replace("Version: ", "v")))
    assert listed == installed


def test_no_file_gives_rights_or_is_made_at_run_time(layout: Layout, record: Record) -> None:
    found, size = [], 0
    for layer in record.layers:
        with tarfile.open(layout.blob(layer.digest)) as archive:
            for member in archive:
                size += member.size
                wrong = (
                    member.mode & 0o6000 or member.isdev() or member.name.endswith((".pyc", ".safetensors"))
                )
                found += [member.name] if wrong else []
    assert (found, size < 1.5e9) == ([], True), size


def test_it_says_what_it_is_made_of(podman: Podman, record: Record) -> None:
    (seen,) = json.loads(podman("image", "inspect", "llmkeep"))
    labels = {name: value for name, value in seen["Labels"].items() if name.startswith("org.llmkeep.")}
    assert seen["Config"]["User"] == "10001:10001"
    assert labels == {
        "org.llmkeep.bundle.manifest": cache.sha256(BUNDLE / manifest.NAME),
        "org.llmkeep.bundle.serial": str(manifest.read(BUNDLE).serial),
        "org.llmkeep.policy.revision": record.policy_revision,
    }


def test_every_program_of_a_pod_starts_from_a_read_only_root(podman: Podman) -> None:
    for command in ("llm-serve --help", "llm-audit --help", "opa version", "nginx -v"):
        inside(podman, *command.split())


def test_another_builder_makes_the_same_image(home: Path, record: Record) -> None:
    other = home / "other"
    other.mkdir(mode=0o700)
    # With STORM, nothing is at hand: neither packages' nor wheels' layer.
    place = other if os.environ.get("STORM") else cache.home().parent
    before = os.umask(0o077)
    try:
        again = build(
            other / "image",
            HOME=str(other),
            LC_ALL="C",
            PYTHONHASHSEED="7",
            TMPDIR=str(other),
            TZ="Asia/Shanghai",
            XDG_CACHE_HOME=str(place),
        )
    finally:
        os.umask(before)
        shutil.rmtree(other)
    assert again == record


def test_refuses_cuda_of_a_bundle_that_has_none(home: Path) -> None:
    refused = built(home / "cuda", "--variant", "cuda")
    assert refused.returncode == 1
    assert "of profile lab, has no wheels/vllm: build a bundle of a profile" in refused.stderr
    assert not (home / "cuda").exists()


def certificates(folder: Path, trust: Path) -> None:
    """Of localhost in FOLDER; of a CA and of a client in TRUST, under the names that podman and skopeo want."""
    for each in (folder, trust):
        each.mkdir()

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)

    new = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1"]
    openssl(*new, "-subj", "/CN=ca", "-keyout", "ca.key", "-out", f"{trust}/ca.crt")
    signed = [
        *new,
        "-CA",
        f"{trust}/ca.crt",
        "-CAkey",
        "ca.key",
        "-addext",
        "basicConstraints=critical,CA:false",
    ]
    named = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    openssl(*signed, *named, "-keyout", "server.key", "-out", "server.crt")
    client = ["-subj", "/CN=node", "-addext", "extendedKeyUsage=clientAuth"]
    openssl(*signed, *client, "-keyout", f"{trust}/client.key", "-out", f"{trust}/client.cert")


@pytest.fixture
def registry(home: Path) -> Iterator[tuple[str, Path]]:
    """Debian's docker-registry with TLS 1.3 and a client CA: a name in it, and the folder of a client's certificates."""
    for program in ("docker-registry", "skopeo"):
        if not shutil.which(program):
            pytest.skip(f"{program} is not installed: apt-get install {program}")
    folder, trust, port = home / "registry", home / "trust", own_port()
    certificates(folder, trust)
    tls = {
        "certificate": f"{folder}/server.crt",
        "key": f"{folder}/server.key",
        "clientcas": [f"{trust}/ca.crt"],
    }
    settings = {
        "version": 0.1,
        "log": {"level": "error"},
        "storage": {"filesystem": {"rootdirectory": f"{folder}/data"}},
        "http": {"addr": f"127.0.0.1:{port}", "tls": tls | {"minimumtls": "tls1.3"}},
    }
    (folder / "config.yml").write_text(json.dumps(settings))
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(["docker-registry", "serve", folder / "config.yml"], stdout=log, stderr=log)
    try:
        until(lambda: answers(port))
        yield f"localhost:{port}/llmkeep", trust
    finally:
        server.kill()
        server.wait()


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_a_registry_behind_mutual_tls_keeps_the_digest(
    registry: tuple[str, Path], layout: Layout, record: Record
) -> None:
    name, certs = registry
    trusted = ["--override-os=linux", "--insecure-policy", "copy", "--quiet", "--preserve-digests"]

    def skopeo(*words: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(["skopeo", *words], capture_output=True, text=True, check=False)

    unknown = certs.with_name("stranger")
    unknown.mkdir()
    shutil.copy(certs / "ca.crt", unknown)
    source, there = f"oci:{layout.folder}:llmkeep", f"docker://{name}:1"
    refused = skopeo(*trusted, f"--dest-cert-dir={unknown}", source, there)
    assert refused.returncode != 0
    assert "certificate required" in refused.stderr
    pushed = skopeo(*trusted, f"--dest-cert-dir={certs}", source, there)
    assert pushed.returncode == 0, pushed.stderr
    back = certs.with_name("back")
    pulled = skopeo(
        *trusted, f"--src-cert-dir={certs}", f"docker://{name}@{record.digest}", f"oci:{back}:llmkeep"
    )
    assert pulled.returncode == 0, pulled.stderr
    assert Layout(back).index()[0]["digest"] == record.digest


def content(podman: Podman, image: str) -> list[str]:
    """Debian's packages, and all files of ours: the sha256 of each, or where a link leads."""
    files = "find opt/llmkeep usr/local"
    script = f"dpkg-query --show; {files} -type f -exec sha256sum {{}} +; {files} -type l -printf '%p %l\\n'"
    return sorted(podman("run", "--rm", "--network=none", image, "bash", "-c", script).splitlines())


@pytest.mark.skipif(not os.environ.get("STORM"), reason="minutes, so in `make storm` (STORM=1)")
def test_the_containerfile_makes_the_same_content(podman: Podman, home: Path) -> None:
    text = (ROOT / "deploy/Containerfile").read_text()
    written = re.search(r"mmdebstrap --(?:.|\n)*?trixie main'", text)
    assert written, "deploy/Containerfile does not say how its base is made"
    command = written[0].replace("\n#", "").replace("\\", "").replace("BUNDLE", str(BUNDLE))
    subprocess.run(["mmdebstrap", "--quiet", *shlex.split(command)[1:]], cwd=home, check=True)
    podman("import", "--quiet", str(home / "debian.tar"), "localhost/debian")
    context = home / "bundle"
    subprocess.run(["cp", "--recursive", "--reflink=auto", BUNDLE, context], check=True)
    podman(
        *("build", "--quiet", "--network=none", "--tag=localhost/ours"),
        f"--file={ROOT}/deploy/Containerfile",
        str(context),
    )
    assert content(podman, "localhost/ours") == content(podman, "llmkeep")
