"""Which client gets what from the mirror: the role's nginx, the estate's CA, and the code that fetches."""

import hashlib
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import small_bundle
import small_image
import yaml
from called_module import called
from mirror_here import authority, certify, configured, mirror
from plugin_modules import load
from rendered_role import content, rendered
from role_nginx import COMMON
from waiting import own_port

from llmkeep.bundle import manifest
from llmkeep.image import served
from llmkeep.image.layout import Layout
from llmkeep.image.record import read as read_record
from llmkeep.pki import revoking
from llmkeep.places import Places

fetching = load("module_utils.bundle.mirror")
mirror_copy = load("modules.mirror_copy")
ROLE = Path(__file__).parents[3] / "roles/mirror"
LIMIT = yaml.safe_load((ROLE / "defaults/main.yml").read_text())["mirror_downloads"]
HOSTS = {
    "ops1.estate.internal": "10.0.0.11",
    "llm1.estate.internal": "10.0.0.12",
    "llm2.estate.internal": "2001:db8::13",
}
APART = {"control": ["ops1"], "mirror": ["depot1"], "serve": ["llm1", "llm2"]}
WITH_DEPOT = {**HOSTS, "depot1.estate.internal": "10.0.0.14"}
needs_skopeo = pytest.mark.skipif(not shutil.which("skopeo"), reason="skopeo is not installed")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return configured(tmp_path_factory.mktemp("role"), HOSTS, own_port())


@pytest.fixture(scope="module")
def places(made: dict[str, Any]) -> Iterator[Places]:
    """A mirror that runs, and the CA of its estate."""
    if not shutil.which("nginx"):
        pytest.skip("the mirror is nginx, which is not here")
    folder: Path = made["folder"]
    with authority(folder / "control") as found:
        certify(found, "llm2", "llm2.estate.internal")
        revoking.revoke(found, "llm2", "stolen", "ada")
        for path in ("bundle/apt/InRelease", "releases/m/MANIFEST.json"):
            (folder / path).parent.mkdir(parents=True)
            (folder / path).write_text(path)
        image = small_image.write(folder / "image", small_bundle.signing_keys(folder))
        served.add(Places(folder), image, folder / "keyring.pgp")
        with mirror(made, found, "localhost"):
            yield found


def get(made: dict[str, Any], path: str, certificate: Path | None = None) -> str:
    """What a host reads at this path of the mirror."""
    root = made["folder"] / "pki/root.pem"
    source = fetching.Mirror(f"https://localhost:{made['port']}", root, Path("/keyring"), certificate)
    return str(source.get(path).read().decode())


@pytest.mark.usefixtures("places")
def test_a_bare_host_takes_packages_without_a_certificate(made: dict[str, Any]) -> None:
    assert get(made, "apt/InRelease") == "bundle/apt/InRelease"


@pytest.mark.usefixtures("places")
def test_one_download_of_weights_too_many_waits_for_another_to_end(
    made: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = made["folder"] / "bundle/models/m/model.safetensors"
    weights.parent.mkdir(parents=True)
    with weights.open("wb") as file:
        file.truncate(32 << 20)
    entry = fetching.Entry(
        "models/m/model.safetensors", 32 << 20, hashlib.sha256(weights.read_bytes()).hexdigest()
    )
    url, root = f"https://localhost:{made['port']}", made["folder"] / "pki/root.pem"
    sources = [fetching.Mirror(url, root, Path("/keyring")) for _ in range(LIMIT + 1)]
    answers = [source.get(entry.path) for source in sources[:LIMIT]]
    assert {answer.status for answer in answers} == {200}
    with pytest.raises(fetching.BusyError, match="as many downloads as it may") as busy:
        sources[LIMIT].get(entry.path)
    assert busy.value.seconds == 15
    assert get(made, "apt/InRelease") == "bundle/apt/InRelease"  # not counted
    asked = []

    def end_one(seconds: float) -> None:
        asked.append(seconds)
        answers[0].read()

    monkeypatch.setattr(fetching.time, "sleep", end_one)
    sources[LIMIT].fetch(entry, tmp_path / "model.safetensors")
    assert len(asked) == 1
    assert (tmp_path / "model.safetensors").stat().st_size == 32 << 20
    for source in sources:
        source.connection.close()


def test_a_host_takes_releases_by_its_certificate(made: dict[str, Any], places: Places) -> None:
    llm1 = certify(places, "llm1", "llm1.estate.internal")
    assert get(made, "releases/m/MANIFEST.json", llm1) == "releases/m/MANIFEST.json"


@pytest.mark.usefixtures("places")
def test_a_client_without_a_certificate_is_refused_releases(made: dict[str, Any]) -> None:
    with pytest.raises(fetching.MirrorError, match=r"answered 403 Forbidden; .* run the roles pki here"):
        get(made, "releases/m/MANIFEST.json")


def test_a_user_with_a_certificate_of_the_estate_is_refused_releases(
    made: dict[str, Any], places: Places
) -> None:
    """`edge_client_ca_file` may be the estate's own CA, which then signs for users, too."""
    with pytest.raises(fetching.MirrorError, match="answered 403"):
        get(made, "releases/m/MANIFEST.json", certify(places, "ada", "ada.estate.internal"))


def test_a_host_whose_certificate_is_revoked_is_refused(made: dict[str, Any], places: Places) -> None:
    with pytest.raises(fetching.MirrorError, match="answered 400"):
        get(made, "releases/m/MANIFEST.json", places.root / "llm2.pem")


def test_a_key_that_is_not_there_is_named(made: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(
        fetching.MirrorError, match=r"host\.pem and its \.key: No such file or directory; the role pki"
    ):
        get(made, "releases/m/MANIFEST.json", tmp_path / "host.pem")


def skopeo(
    made: dict[str, Any], places: Places, host: str | None, *copied: str
) -> "subprocess.CompletedProcess[str]":
    """What skopeo, a client of registries, says of a copy, with the certificate of this host, if there is one."""
    certs = Path(made["folder"], f"certs-{host}")
    certs.mkdir(exist_ok=True)
    shutil.copy(places.root_certificate, certs / "ca.crt")
    if host:
        certificate = certify(places, host, f"{host}.estate.internal")
        shutil.copy(certificate, certs / "client.cert")
        shutil.copy(certificate.with_suffix(".key"), certs / "client.key")
    both = [f"--src-cert-dir={certs}", f"--dest-cert-dir={certs}"]
    command = ["skopeo", "--insecure-policy", "copy", "--preserve-digests", *both, *copied]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def named(made: dict[str, Any]) -> str:
    """The image on the mirror, as clients of registries call it."""
    return f"docker://localhost:{made['port']}/llmkeep@{digest(made)}"


def digest(made: dict[str, Any]) -> str:
    return read_record(made["folder"] / "image", made["folder"] / "keyring.pgp").digest


@needs_skopeo
def test_a_host_pulls_an_image_as_from_any_registry(
    made: dict[str, Any], places: Places, tmp_path: Path
) -> None:
    done = skopeo(made, places, "llm1", named(made), f"oci:{tmp_path}/layout:there")
    assert done.returncode == 0, done.stderr
    assert Layout(tmp_path / "layout").index()[0]["digest"] == digest(made)


@needs_skopeo
@pytest.mark.parametrize("client", [None, "ada"])
def test_a_client_that_is_no_host_pulls_nothing(
    made: dict[str, Any], places: Places, tmp_path: Path, client: str | None
) -> None:
    done = skopeo(made, places, client, named(made), f"oci:{tmp_path}/layout:there")
    assert done.returncode != 0
    assert "403 Forbidden" in done.stderr


@needs_skopeo
def test_a_host_pushes_no_image(made: dict[str, Any], places: Places) -> None:
    layout = f"oci:{made['folder']}/image/oci:llmkeep"
    done = skopeo(made, places, "llm1", layout, f"docker://localhost:{made['port']}/llmkeep:1")
    assert done.returncode != 0
    assert "403 Forbidden" in done.stderr


def test_an_image_has_no_tag_no_other_name_and_no_file_of_its_own(
    made: dict[str, Any], places: Places
) -> None:
    llm1, this = certify(places, "llm1", "llm1.estate.internal"), digest(made)
    folder = f"images/{this.removeprefix('sha256:')}"
    tags = ("v2/llmkeep/tags/list", "v2/llmkeep/manifests/latest")
    for path in (*tags, f"v2/other/manifests/{this}", f"{folder}/image.json"):
        with pytest.raises(fetching.MirrorError, match="answered 404"):
            get(made, path, llm1)


def test_the_firewall_of_an_estates_only_host_gets_an_empty_file(tmp_path: Path) -> None:
    hosts, groups = {"box.estate.internal": "10.0.0.9"}, {"mirror": ["box"], "control": ["box"]}
    found = rendered(tmp_path, "mirror", {}, "box", hosts, {}, groups, configured=True)
    assert content(found, "input-mirror.nft") == ""


def test_the_firewall_lets_in_the_other_hosts_of_the_inventory_only(made: dict[str, Any]) -> None:
    rules = content(made, "input-mirror.nft").splitlines()
    assert rules == [
        f"ip saddr 10.0.0.12 tcp dport {made['port']} accept",
        f"ip6 saddr 2001:db8::13 tcp dport {made['port']} accept",
    ]


def test_a_reader_of_the_documentation_gets_nothing_else(tmp_path: Path) -> None:
    if not shutil.which("nginx"):
        pytest.skip("the mirror is nginx, which is not here")
    made = configured(tmp_path, HOSTS, own_port(), readers=["127.0.0.0/8", "10.0.0.12"])
    for path in ("bundle/docs/docs/README.html", "bundle/apt/InRelease", "releases/m/MANIFEST.json"):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text(path)
    with authority(tmp_path / "control") as places, mirror(made, places, "localhost"):
        host = certify(places, "llm1", "llm1.estate.internal")
        assert get(made, "docs/docs/README.html") == "bundle/docs/docs/README.html"
        for path in ("docs/", "docs/docs/operate/metrics.md"):
            with pytest.raises(fetching.MirrorError, match="answered 302"):
                get(made, path)
        for path in ("apt/InRelease", "docs/../apt/InRelease", "releases/m/MANIFEST.json", "v2/"):
            with pytest.raises(fetching.MirrorError, match="answered 403"):
                get(made, path, host)
    rules = content(made, "input-mirror.nft").splitlines()
    assert f"ip saddr 127.0.0.0/8 tcp dport {made['port']} accept" in rules
    assert len(rules) == len(set(rules)) == 3


def test_a_mirror_on_a_host_of_its_own_is_the_control_nodes_only_client(tmp_path: Path) -> None:
    accepted, let_in = {}, {}
    for name in ("ops1", "depot1"):
        (tmp_path / name).mkdir()
        found = rendered(tmp_path / name, "mirror", COMMON, name, WITH_DEPOT, {}, APART, configured=True)
        server = content(found, "llmkeep-mirror.conf")
        accepted[name] = [line.split()[2] for line in content(found, "input-mirror.nft").splitlines()]
        let_in[name] = re.findall(r"SUCCESS CN=(\w+)", server)
        assert f"server_name {name}.estate.internal;" in server
        assert ('location ~ "^/images/' in server) == (name == "ops1")
    assert accepted == {"ops1": ["10.0.0.14"], "depot1": ["10.0.0.12", "2001:db8::13"]}
    assert let_in == {"ops1": ["depot1", "ops1"], "depot1": ["depot1", "llm1", "llm2"]}


@pytest.mark.parametrize(
    ("host", "source"), [("ops1", "ops1"), ("depot1", "ops1"), ("llm1", "depot1"), ("llm2", "depot1")]
)
def test_the_mirror_asks_the_control_node_and_all_others_the_mirror(
    host: str, source: str, tmp_path: Path
) -> None:
    wanted = {"url": "mirror_url", "packages": "base_apt_uri"}
    found = rendered(tmp_path, "base", wanted, host, WITH_DEPOT, {}, APART)
    assert found["url"] == f"https://{source}.estate.internal:8443"
    bundle = "file:/srv/llmkeep/bundle/current"
    assert found["packages"] == f"{bundle if host == 'ops1' else found['url']}/apt"


def test_the_mirror_copies_bundle_and_image_from_the_control_nodes_nginx(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not shutil.which("nginx"):
        pytest.skip("the control node's server is nginx, which is not here")
    made = configured(tmp_path, WITH_DEPOT, own_port(), APART)
    keys = small_bundle.signing_keys(tmp_path)
    small_bundle.write(tmp_path / "bundle", keys)
    served.add(Places(tmp_path), small_image.write(tmp_path / "image", keys), keys / "keyring.pgp")
    image = digest(made).removeprefix("sha256:")
    with authority(tmp_path / "control") as found, mirror(made, found, "localhost"):
        given: dict[str, object] = {
            "url": f"https://localhost:{made['port']}",
            "root": str(tmp_path / "copy"),
            "images": [image],
            "ca": str(tmp_path / "pki/root.pem"),
            "keyring": str(keys / "keyring.pgp"),
        }
        refused = called(
            mirror_copy, given | {"certificate": str(certify(found, "llm1", "llm1.estate.internal"))}, capsys
        )
        given["certificate"] = str(certify(found, "depot1", "depot1.estate.internal"))
        copied = [called(mirror_copy, given, capsys)["copied"] for _ in range(2)]
    assert "image.json answered 403" in refused["msg"]
    assert copied == [[f"images/{image}"], []]
    manifest.verify(tmp_path / "copy/bundle/current", keys / "keyring.pgp", manifest.BUNDLE)
    for folder in ("images/.blobs", f"images/{image}"):
        names = {path.name for path in (tmp_path / "copy" / folder).iterdir()}
        assert names == {
            path.name for path in (tmp_path / "srv/llmkeep" / folder).iterdir() if path.is_file()
        }
