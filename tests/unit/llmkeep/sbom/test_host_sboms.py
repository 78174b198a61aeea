"""`llmkeep sbom make`: what hosts have is compared with the bundle, signed, and never more complete than they answered."""

import hashlib
import json
import zipfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import sealing_double
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from llmkeep import cli
from llmkeep.bundle import bill, manifest
from llmkeep.bundle.manifest import Entry, Manifest
from llmkeep.errors import LlmkeepError
from llmkeep.places import Places
from llmkeep.playbooks import RunResults
from llmkeep.record import commands as audit
from llmkeep.record import report, report_html, report_sboms, runs, witness
from llmkeep.sbom import answers, catalogue, commands, hosts
from llmproof import cli as proof
from llmproof import sbom
from llmproof.archive import ArchiveRefused
from llmproof.heads import Verifier
from llmproof.report import verified

RECORD = "small/__init__.py,sha256=abc,1\nsmall-1.0.dist-info/RECORD,,\n"
DIGEST = hashlib.sha256(b"sha256=abc  small/__init__.py\n").hexdigest()
OPA, MARKED, WEIGHTS = "3" * 64, "4" * 64, "5" * 64
SUMS = hashlib.sha256(f"{WEIGHTS}  model.safetensors\n".encode()).hexdigest()
LOCK = "{environments: {}, roles: {base: [base-files=13.8, chrony=4.6]}, wheels: {}, debs: {}, models: {}, programs: {}}"
SITE = "lib/python3.13/site-packages"
BASE = ["base-files", "13.8", "amd64", "base-files", "13.8"]


def answer(**rows: Any) -> dict[str, Any]:
    """What a host without anything else says."""
    empty: dict[str, Any] = {
        name: [] for name in ("python", "programs", "scripts", "models", "modules", "loaded", "skipped")
    }
    if "python" in rows and all(len(row) == 4 for row in rows["python"]):
        rows["python"] = [[*row, ""] for row in rows["python"]]
    return {**empty, "packages": [BASE], **rows}


class Node:
    """A control node with a bundle, whose hosts give the answers of a test."""

    def __init__(self, root: Path) -> None:
        self.places = Places(root)
        self.results = RunResults()
        self.answers: dict[str, Any] = {}
        self.content = b""
        folder = self.places.bundles / "7"
        files = {
            "apt/pool/base-files.deb": ("1" * 64, "pkg:deb/debian/base-files@13.8?arch=amd64"),
            "bin/opa": (OPA, "pkg:golang/github.com/open-policy-agent/opa@v1.22.2"),
            "models/small/model.safetensors": (WEIGHTS, "pkg:pypi/llm-small@1"),
            "tree/payload/llmweb/static/vendor/marked.js": (MARKED, "pkg:npm/marked@18"),
            "wheels/serving/requirements.txt": ("6" * 64, ""),
            "wheels/serving/small-1.0-py3-none-any.whl": ("7" * 64, "pkg:pypi/small@1.0"),
            "wheels/serving/ours-2.0-py3-none-any.whl": ("8" * 64, ""),
        }
        entries = [Entry(path, 1, digest, "", "MIT", "x", purl) for path, (digest, purl) in files.items()]
        self.home = catalogue.places(
            "wheels/serving", [each for each in entries if each.path.startswith("wheels/")]
        )[0]
        for name in ("wheels/serving", "tree"):
            (folder / name).mkdir(parents=True)
        (folder / "tree/artifacts.lock.yml").write_text(LOCK)
        with zipfile.ZipFile(folder / "wheels/serving/small-1.0-py3-none-any.whl", "w") as archive:
            archive.writestr("small-1.0.dist-info/RECORD", RECORD)
        manifest.write(folder, Manifest(manifest.BUNDLE, 7, "lab", "", "", "", "", "", entries))
        (self.places.bundles / "current").symlink_to("7")

    def play(self, *_: object, **__: object) -> tuple[int, RunResults]:
        said = {
            (hosts.READ, name): json.dumps(text) for name, text in self.answers.items() if text is not None
        }
        roles = {(hosts.ROLES, name): json.dumps(["base"]) for name in self.answers}
        self.results.outputs = {**said, **roles}
        return int(len(said) < len(self.answers)), self.results

    def make(self, **given: Any) -> sbom.Sbom:
        self.answers = given
        code = cli.main(["sbom", "make"])
        (path,) = sorted(self.places.sboms.glob("*.tar"))[-1:]
        self.content = path.read_bytes()
        made, _ = sbom.verified(self.content, Verifier((runs.FOLDER / "verifier").read_text()))
        assert code == (0 if made.complete else 1)
        return made


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    made = Node(tmp_path / "node")
    tree = tmp_path / "tree"
    for name in ("playbooks/components.yml", "hosts.yml"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("[]")
    for module, names in (
        (runs, {"FOLDER": "log", "SEALED_SEED": "seed", "SERIAL": "serial"}),
        (witness, {"KEPT": "witness"}),
    ):
        for name, path in names.items():
            monkeypatch.setattr(module, name, tmp_path / path)
    for module in (commands, report):
        monkeypatch.setattr(module, "PLACES", made.places)
    monkeypatch.setattr(hosts, "INVENTORY", str(tree / "hosts.yml"))
    monkeypatch.setattr(hosts, "verified_tree", lambda: tree)
    monkeypatch.setattr(hosts, "listed", lambda *_: {"all": {"hosts": list(made.answers)}, "_meta": {}})
    monkeypatch.setattr(hosts, "play", made.play)
    sealing_double.use(monkeypatch, audit, runs)
    assert cli.main(["audit", "init"]) == 0
    runs.append({"event.action": "begun"})
    return made


def origins(document: dict[str, Any]) -> dict[str, str]:
    return {each["name"]: sbom.origin(each) for each in document["components"]}


def test_what_the_bundle_has_is_known_by_name_and_hash(node: Node) -> None:
    made = node.make(
        llm1=answer(
            python=[["Small", "1.0", f"{node.home}{SITE}", DIGEST]],
            programs=[["/opt/llmkeep/programs/opa/333/opa", OPA]],
            scripts=[[f"{node.home}{SITE}/llmweb/static/vendor/marked.js", MARKED]],
            models=[["/srv/llmkeep/models/small", SUMS]],
        )
    )
    assert origins(made.documents["llm1"]) == dict.fromkeys(
        ["base-files", "Small", "opa", "marked", "small"], "bundle 7"
    )
    assert made.summary["hosts"]["llm1"]["unknown"] == []
    text = json.dumps(made.documents["llm1"])
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None


@pytest.mark.parametrize(
    ("rows", "ref"),
    [
        ({"packages": [BASE, ["nmap", "7.9", "amd64", "nmap", "7.9"]]}, "pkg:deb/debian/nmap@7.9?arch=amd64"),
        ({"packages": [["base-files", "13.7", "amd64", "base-files", "13.7"]]}, "pkg:deb/debian/base-files@13.7?arch=amd64"),
        ({"python": [["evil", "1", "/usr/local/lib/x", DIGEST]]}, "pkg:pypi/evil@1#/usr/local/lib/x"),
        ({"python": [["small", "1.0", "/opt/x", "9" * 64]]}, "pkg:pypi/small@1.0#/opt/x"),
        ({"python": [["small", "1.0", "/opt/x", ""]]}, "pkg:pypi/small@1.0#/opt/x"),
        ({"programs": [["/home/ann/miner", "9" * 64]]}, "application:/home/ann/miner#/home/ann/miner"),
        ({"models": [["/srv/llmkeep/models/small", "9" * 64]]}, "machine-learning-model:small#/srv/llmkeep/models/small"),
        ({"models": [["/home/ann", ""]]}, "machine-learning-model:ann#/home/ann"),
        ({"modules": [["/m/extra/x.ko", "9" * 64, ""]]}, "device-driver:/m/extra/x.ko#/m/extra/x.ko"),
        ({"modules": [["/m/x.ko", "9" * 64, "nmap"]]}, "device-driver:/m/x.ko#/m/x.ko"),
        ({"loaded": ["rootkit"]}, "device-driver:loaded%20module%20rootkit"),
    ],
)  # fmt: skip
def test_what_no_bundle_has_is_named(node: Node, rows: dict[str, Any], ref: str) -> None:
    made = node.make(llm1=answer(**rows))
    assert made.summary["hosts"]["llm1"]["unknown"] == [ref]


def test_a_distribution_with_other_modules_does_not_hide_behind_the_bundles(node: Node) -> None:
    place = f"{node.home}{SITE}"
    made = node.make(llm1=answer(python=[["small", "1.0", place, "9" * 64], ["small", "1.0", place, DIGEST]]))
    (ref,) = made.summary["hosts"]["llm1"]["unknown"]
    (component,) = (each for each in made.documents["llm1"]["components"] if each["bom-ref"] == ref)
    assert sbom.origin(component) == "unknown: bundle 7 has one with other modules"


def test_a_module_that_dkms_built_is_as_known_as_its_package(node: Node) -> None:
    made = node.make(llm1=answer(modules=[["/m/x.ko", "9" * 64, "base-files"]]))
    assert origins(made.documents["llm1"])["/m/x.ko"] == "built on the host from base-files of bundle 7"


def test_what_a_package_brought_as_a_wheel_is_as_known_as_the_package(node: Node) -> None:
    rows = [["pip", "25", "/opt/x", "9" * 64, "base-files"], ["pip", "25", "/opt/y", "9" * 64, "nmap"]]
    made = node.make(llm1=answer(python=rows))
    assert made.summary["hosts"]["llm1"]["unknown"] == ["pkg:pypi/pip@25#/opt/y"]
    assert "unpacked on the host from base-files of bundle 7" in map(
        sbom.origin, made.documents["llm1"]["components"]
    )


def test_what_a_host_lacks_is_named_with_where_it_belongs(node: Node) -> None:
    made = node.make(llm1=answer(python=[["small", "1.0", f"{node.home}{SITE}", DIGEST]]))
    assert made.summary["hosts"]["llm1"]["missing"] == [
        "chrony 4.6, of role base: the host has none",
        f"pkg:generic/ours@2.0, of wheels/serving: {node.home} lacks this version",
    ]


def test_a_host_that_does_not_answer_is_never_counted_as_complete(
    node: Node, capsys: pytest.CaptureFixture[str]
) -> None:
    node.results.failures = ["llm2: List installed components: cannot be reached"]
    made = node.make(llm1=answer(), llm2=None)
    assert not made.complete
    assert made.summary["hosts"]["llm2"]["problem"] == "List installed components: cannot be reached"
    assert "llm2" not in made.documents
    out = capsys.readouterr().out
    assert "NOT COMPLETE: 1 of 2 hosts answered" in out
    assert "llm2: NOT KNOWN: List installed components: cannot be reached" in out


def test_an_inventory_without_hosts_is_not_complete(node: Node) -> None:
    assert not node.make().complete


@pytest.mark.parametrize(
    "text",
    [
        {"packages": [["../../etc", "1", "amd64", "x", "1"]]},
        {"packages": [["-o", "1", "amd64", "x", "1"]]},
        {"packages": [["x", "1\x1b[2J", "amd64", "x", "1"]]},
        {"packages": [["x", "1", "amd64"]]},
        {"packages": []},
        {"packages": "all"},
        {"python": [["x", "1", "/x", "short"]]},
        {"python": [[1, 2, 3, 4]]},
        {"programs": [["/x" * 4096, "1" * 64]]},
        {"loaded": [["deep"]]},
    ],
)
def test_an_answer_that_is_no_list_of_components_is_no_answer(node: Node, text: dict[str, Any]) -> None:
    made = node.make(llm1=answer(**text), llm2=answer())
    assert made.summary["hosts"]["llm1"]["problem"].startswith("its answer is not a list of components (")
    assert (made.complete, list(made.documents)) == (False, ["llm2"])


@pytest.mark.parametrize("text", ["", "[]", "{}", "nothing", "[" * 100_000, '{"packages": null}'])
def test_text_that_is_no_answer_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"Error: |Expecting value|at most 200000 rows"):
        answers.read(text)


def test_hostile_names_are_escaped_and_unknown(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    name = '</td><script>x</script>\x1b[2J\u202e"?arch=amd64#x/../\ud800'
    made = node.make(
        llm1=answer(python=[[name, name, f"/opt/{name}", ""]], programs=[[f"/opt/{name}", "9" * 64]])
    )
    assert len(made.summary["hosts"]["llm1"]["unknown"]) == 2
    assert "\x1b" not in capsys.readouterr().out
    text = json.dumps(made.documents["llm1"], ensure_ascii=False)
    assert text.isprintable()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None


def test_llmproof_alone_proves_it_and_refuses_an_altered_one(
    node: Node, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    node.make(llm1=answer(programs=[["/home/ann/miner", "9" * 64]]))
    key = (runs.FOLDER / "verifier").read_text()
    archive = tmp_path / "sbom.tar"
    archive.write_bytes(node.content)
    capsys.readouterr()
    assert proof.main(["verify-sbom", str(archive), "--verifier", key]) == 0
    assert "llm1: unknown: application:/home/ann/miner" in capsys.readouterr().out
    archive.write_bytes(node.content.replace(b"/home/ann/miner", b"/home/ann/mined"))
    assert proof.main(["verify-sbom", str(archive), "--verifier", key]) == proof.ALTERED
    assert "has SHA-256" in capsys.readouterr().out


def test_a_summary_that_says_less_than_the_documents_is_refused(node: Node) -> None:
    made = node.make(llm1=answer(programs=[["/home/ann/miner", "9" * 64]]))
    summary = json.loads(json.dumps(made.summary))
    summary["hosts"]["llm1"]["unknown"] = []
    document = bill.encoded(made.documents["llm1"])
    files = {sbom.SUMMARY: json.dumps(summary).encode(), sbom.file_of("llm1"): document}
    forged = hosts.archive(files, report.own_verifier(), runs.seed(), datetime.now(UTC))
    with pytest.raises(ArchiveRefused, match=r"sbom.json does not follow from hosts/llm1.cdx.json"):
        sbom.verified(forged, report.own_verifier())
    del summary["hosts"]["llm1"]
    files[sbom.SUMMARY] = json.dumps(summary).encode()
    forged = hosts.archive(files, report.own_verifier(), runs.seed(), datetime.now(UTC))
    with pytest.raises(ArchiveRefused, match="do not match the hosts that answered"):
        sbom.verified(forged, report.own_verifier())


def test_a_report_is_no_sbom(node: Node) -> None:
    """They are signed by one key, under names of their own."""
    node.make(llm1=answer())
    with pytest.raises(ArchiveRefused, match="it is signed by"):
        verified(node.content, report.own_verifier())


def test_it_is_an_event_of_the_record_and_listed(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    node.make(llm1=answer())
    (path,) = node.places.sboms.glob("*.tar")
    (text,) = runs.FOLDER.glob("*.jsonl")
    event = json.loads(text.read_text().splitlines()[-1])
    assert (event["event.action"], event["llmkeep.sbom.name"]) == ("sbom made", path.name)
    assert event["llmkeep.sbom.sha256"] == hashlib.sha256(node.content).hexdigest()
    capsys.readouterr()
    assert cli.main(["sbom", "list"]) == 0
    assert f"{path.name}: complete: 1 of 1 hosts answered" in capsys.readouterr().out
    path.write_bytes(path.read_bytes() + b"x")
    assert cli.main(["sbom", "list"]) == commands.ALTERED


def test_one_hosts_document_is_shown(node: Node, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = node.make(llm1=answer())
    assert cli.main(["sbom", "show", "--host", "llm1", "--out", str(tmp_path / "llm1.json")]) == 0
    digest = hashlib.sha256((tmp_path / "llm1.json").read_bytes()).hexdigest()
    assert digest == made.summary["hosts"]["llm1"]["sha256"]
    assert cli.main(["sbom", "show", "--host", "llm9"]) == 1
    assert "it has no components of llm9, only of llm1" in capsys.readouterr().err


def test_diff_names_what_hosts_got_lost_and_changed(node: Node) -> None:
    program = "/opt/tool"
    before = node.make(llm1=answer(programs=[[program, "9" * 64]]), llm2=answer(), llm3=answer())
    nmap = ["nmap", "7.9", "amd64", "nmap", "7.9"]
    after = node.make(llm1=answer(programs=[[program, "a" * 64]], packages=[BASE, nmap]), llm2=None)
    assert list(commands.differences(before, after)) == [
        "llm1: application:/opt/tool#/opt/tool: unknown 9999999999999999 -> unknown aaaaaaaaaaaaaaaa",
        "llm1: + pkg:deb/debian/nmap@7.9?arch=amd64 (unknown)",
        "llm2: not compared, it did not answer after",
        "llm3: not compared, not in the inventory after",
    ]
    assert list(commands.differences(before, before)) == []


def test_without_a_bundle_nothing_is_known_and_that_is_said(node: Node) -> None:
    (node.places.bundles / "7/MANIFEST.json").unlink()
    made = node.make(llm1=answer())
    assert made.summary["bundle_serial"] is None
    assert made.summary["hosts"]["llm1"]["unknown"] == ["pkg:deb/debian/base-files@13.8?arch=amd64"]
    assert made.summary["hosts"]["llm1"]["missing"] == ["the control node has no bundle to compare with"]


def test_a_component_of_an_older_bundle_names_it(node: Node) -> None:
    folder = node.places.bundles / "8"
    folder.mkdir()
    manifest.write(folder, Manifest(manifest.BUNDLE, 8, "lab", "", "", "", "", "", []))
    (folder / "tree").mkdir()
    (folder / "tree/artifacts.lock.yml").write_text(LOCK)
    (node.places.bundles / "current").unlink()
    (node.places.bundles / "current").symlink_to("8")
    made = node.make(llm1=answer())
    assert origins(made.documents["llm1"]) == {"base-files": "bundle 7"}
    assert made.summary["bundle_serial"] == 8


@pytest.mark.parametrize("language", report_html.LANGUAGES)
def test_a_report_has_a_row_for_each_host_and_no_markup_of_theirs(node: Node, language: str) -> None:
    made = node.make(llm1=answer(python=[["</td><script>x</script>", "1", "/opt/<x>", ""]]), llm2=None)
    written = report_sboms.section(made, language)
    assert written.count("<tr>") == 3
    assert "<script>" not in written
    assert "&lt;x&gt;" not in written  # quoted in the component's name
    assert ("A host did not answer" in written) == (language == "en")
    assert ("llm2" in written, made.summary["hosts"]["llm1"]["sha256"] in written) == (True, True)


def test_a_report_takes_the_newest_and_none_that_was_altered(node: Node) -> None:
    assert report_sboms.newest(node.places, report.own_verifier()) is None
    assert "No SBOM was made" in report_sboms.section(None, "en")
    node.make(llm1=answer())
    made = node.make(llm1=answer(), llm2=answer())
    assert report_sboms.newest(node.places, report.own_verifier()) == made
    path = sorted(node.places.sboms.glob("*.tar"))[-1]
    path.write_bytes(node.content + b"x")
    with pytest.raises(LlmkeepError, match="save it as evidence, and make another"):
        report_sboms.newest(node.places, report.own_verifier())
