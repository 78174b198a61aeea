"""The control node's parsers of foreign bytes, and the refusals that each declares."""

import hashlib
import io
import json
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from fuzzing import Target
from plugin_modules import load

from llmkeep.bundle import gguf, manifest, media
from llmkeep.bundle.manifest import BundleRefused
from llmkeep.errors import LlmkeepError
from llmkeep.models import contents
from llmkeep.models.refusal import ModelRefused
from llmkeep.record import witness
from llmkeep.sbom import answers, comparison
from llmkeep.sbom.catalogue import Catalogue
from llmproof import cli, heads, policy_bundle, report, sbom, service, verify
from llmproof.archive import ArchiveRefused, packed
from llmproof.chain import fields, file_name
from llmproof.heads import Head, HeadError, Signer
from llmproof.policy_bundle import PolicyRefused

placed_policy = load("module_utils.bundle.policy")
kubectl = load("module_utils.cluster.kubectl")
Refused = load("module_utils.refused").Refused
SIGNER = Signer("llm-audit/llm1", bytes(32))
VERIFIER = SIGNER.verifier
KEY = (Path(__file__).parent / "policy.pem").read_text()
OTHER_KEY = "-----BEGIN PUBLIC KEY-----\n-----END PUBLIC KEY-----\n"  # refused before openssl runs


def in_folder(parse: Callable[[Path, bytes], object]) -> Callable[[bytes], object]:
    """PARSE with an empty folder."""
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108 -- the folder's name is random

    def parse_in_folder(data: bytes) -> object:
        folder = Path(tempfile.mkdtemp(prefix="llmkeep-fuzz-", dir=memory))
        try:
            return parse(folder, data)
        finally:
            shutil.rmtree(folder)

    return parse_in_folder


def written(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    path.chmod(0o600)
    return path


def audit_frames(data: bytes) -> None:
    """Lines of a client of the record's writer, in two pieces, on a volume with room and on one without."""
    for short in (False, True):
        writer = service.Service(cast(Any, None))
        cast(Any, writer).is_short = lambda short=short: short
        connection = service.Connection(writer)
        connection.transport = cast(Any, SimpleNamespace(is_closing=lambda: False, write=bytes))
        connection.data_received(data[: len(data) // 2])
        connection.data_received(data[len(data) // 2 :])
        fields(service.withheld(writer.withheld))


def audit_record(folder: Path, data: bytes) -> None:
    """The first file of a record that begins at its start, or behind records that were removed, under a head that fits none."""
    written(folder / heads.NAME, SIGNER.sign(Head(1000, bytes(32))) + b"\n")
    for name in (file_name(1), file_name(6)):
        path = written(folder / name, data + b"\n")  # for one without an end, a writer is waited for
        verify.verify(folder, VERIFIER)
        path.unlink()
    written(path, data)
    list(cli._records(folder))


def audit_heads(folder: Path, data: bytes) -> None:
    """A file of heads, and of a witness's tips."""
    for note in heads.split(data)[0]:
        with suppress(HeadError):
            VERIFIER.open(note)
    heads.tips(written(folder / heads.TIPS, data))
    with suppress(HeadError):
        heads.Verifier(data.decode(errors="replace"))


def witness_answer(folder: Path, data: bytes) -> None:
    """A host's answer to the witness, as text with surrogates for bytes that are no UTF-8."""
    witness._keep(folder / "llm1", data.decode(errors="surrogateescape"))


def gguf_header(folder: Path, data: bytes) -> None:
    path = written(folder / "model.gguf", data)
    gguf.outline(path)
    gguf.convert(path, folder / "model")


def safetensors_header(data: bytes) -> None:
    contents.check_weights(io.BytesIO(data), "model.safetensors", len(data), {"a"})


def weights_index(folder: Path, data: bytes) -> None:
    contents.read_index(written(folder / contents.INDEX, data))


def bundle_manifest(folder: Path, data: bytes) -> None:
    """A manifest whose signature may be right, since a signer may err."""
    written(folder / manifest.NAME, data)
    written(folder / manifest.SIGNATURE, b"")
    read = manifest.read(folder)
    manifest.require_serial(read.serial, 0, "")
    with suppress(BundleRefused):
        manifest.require_in_date(read.expires)
    manifest.differences(folder, read.files, set())
    media.fitting(folder, None, media.contents(folder))


def medium(folder: Path, data: bytes) -> None:
    """MEDIUM.json beside a manifest that is right."""
    written(folder / manifest.NAME, (Path(__file__).parent / "corpus/bundle-manifest/lab").read_bytes())
    written(folder / manifest.SIGNATURE, b"")
    written(folder / manifest.MEDIUM, data)
    read = media.read(folder)
    str(read)
    media.fitting(folder, read, media.contents(folder, read))


def report_archive(data: bytes) -> None:
    """A report as it is carried."""
    report.verified(data, VERIFIER)


def report_results(data: bytes) -> None:
    """A report's results, signed by the key that they are verified with."""
    signer = Signer(VERIFIER.scoped(report.PURPOSE).name, bytes(32))
    files = {report.RESULTS: data, report.VERDICTS: b"[]"}
    report.verified(packed(files, signer, datetime(2027, 1, 31, tzinfo=UTC)), VERIFIER)


def host_components(data: bytes) -> None:
    """What a host says that it has installed, up to its SBOM."""
    answer = answers.read(data.decode(errors="replace"))
    made = comparison.document("llm1", answer, Catalogue([]), "2027-01-31T00:00:00Z")
    if len(sbom.unknown(made)) != len(made["components"]):
        raise RuntimeError("a component of no bundle is not unknown")


def sbom_summary(data: bytes) -> None:
    """A host's document, under a summary that says what was counted of it before."""
    host = {
        "answers": True,
        "sha256": hashlib.sha256(data).hexdigest(),
        "components": 2,
        "unknown": ["a", "b"],
    }
    summary = json.dumps({"format": sbom.FORMAT, "hosts": {"llm1": host}}).encode()
    sbom.read({sbom.SUMMARY: summary, sbom.file_of("llm1"): data})


def policy_archive(data: bytes) -> None:
    """The tarball, by both of its readers."""
    with suppress(PolicyRefused):
        policy_bundle.judged(data, KEY.encode())
    placed_policy.opened(data, OTHER_KEY)


def policy_files(data: bytes) -> None:
    """A bundle's files after its signature was verified: names and contents in turn, separated by NUL."""
    parts = data.split(b"\0")
    files = {name.decode(errors="replace"): each for name, each in zip(parts[::2], parts[1::2], strict=False)}
    with suppress(PolicyRefused):
        policy_bundle.parsed(files)
    placed_policy.described(files)


def policy_signatures(data: bytes) -> None:
    with suppress(PolicyRefused):
        policy_bundle._signed(data, KEY.encode())
    placed_policy.signed_hashes(data, OTHER_KEY)


def kubeconfig(data: bytes) -> None:
    kubectl.key_files(data, Path("kubeconfig"))


CORPUS = Path(__file__).parent / "corpus"
TARGETS = [
    Target(name, parse, tuple(refusals), CORPUS / name)
    for name, parse, *refusals in (
        ("audit-frames", audit_frames),
        ("audit-record", in_folder(audit_record)),
        ("audit-heads", in_folder(audit_heads)),
        ("witness-answer", in_folder(witness_answer), witness.Altered),
        ("gguf-header", in_folder(gguf_header), LlmkeepError),
        ("safetensors-header", safetensors_header, ModelRefused),
        ("weights-index", in_folder(weights_index), ModelRefused),
        ("bundle-manifest", in_folder(bundle_manifest), BundleRefused),
        ("medium", in_folder(medium), BundleRefused),
        ("report-archive", report_archive, ArchiveRefused),
        ("report-results", report_results, ArchiveRefused),
        ("host-components", host_components, ValueError),
        ("sbom-summary", sbom_summary, ArchiveRefused),
        ("policy-archive", policy_archive, Refused),
        ("policy-files", policy_files, Refused),
        ("policy-signatures", policy_signatures, Refused),
        ("kubeconfig", kubeconfig, Refused),
    )
]
