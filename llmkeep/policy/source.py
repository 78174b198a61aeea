"""A policy's source: Rego, data.yaml and tests below a folder's `llm`; judged by OPA, and packed as a signed bundle."""

import gzip
import hashlib
import io
import json
import re
import tarfile
from collections.abc import Hashable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jwt
import yaml
from cryptography.hazmat.primitives.asymmetric import ec
from opa_bindings import OpaEngine, OpaError

from llmkeep.errors import LlmkeepError
from llmproof.policy_bundle import ALGORITHM, KEY_ID, MANIFEST, SIGNATURES, TIME

# Metadata of a source while it is tested, before it is signed; no decision on a host uses it.
META = {"revision": 0, "expires": "2200-01-01T00:00:00Z"}


class SourceError(LlmkeepError):
    """The source cannot be read."""


@dataclass(frozen=True)
class Source:
    """`modules` and `tests` by path (`llm/authz/authz.rego`), `data` by folder."""

    modules: dict[str, str]
    tests: dict[str, str]
    data: dict[str, Any]

    @property
    def document(self) -> dict[str, Any]:
        """All data as one document, META included."""
        whole: dict[str, Any] = {"llm": {"meta": META}}
        for folder, content in self.data.items():
            place = whole
            *above, last = folder.split("/")
            for name in above:
                place = place.setdefault(name, {})
            place[last] = content
        return whole

    @property
    def files(self) -> dict[str, bytes]:
        """The content of a bundle, except revision and date."""
        modules = {path: text.encode() for path, text in self.modules.items()}
        return modules | {f"{folder}/data.json": canonical(content) for folder, content in self.data.items()}

    @property
    def sha256(self) -> str:
        """One hash over the content of a bundle."""
        lines = [f"{name} {hashlib.sha256(content).hexdigest()}\n" for name, content in self.files.items()]
        return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


class UniqueKeys(yaml.SafeLoader):
    """YAML whose keys are unique strings, so that a duplicate role is an error instead of being dropped silently.

    Dates stay text, since JSON has none.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if not isinstance(key, str) or keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is a duplicate, or not a string", node.start_mark
                )
        return super().construct_mapping(node, deep)


UniqueKeys.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read(folder: Path) -> Source:
    """The source below FOLDER; raises SourceError if one of its files cannot be read."""
    if not (folder / "llm").is_dir():
        raise SourceError(f"{folder} has no folder llm: give one that holds a policy's source")
    source = Source({}, {}, {})
    for path in sorted((folder / "llm").rglob("*")):
        name = path.relative_to(folder).as_posix()
        try:
            if path.suffix == ".rego":
                (source.tests if path.stem.endswith("_test") else source.modules)[name] = path.read_text()
            elif path.name == "data.yaml":
                content = yaml.load(path.read_text(), UniqueKeys)  # noqa: S506 -- a SafeLoader, made stricter
                json.dumps(content, allow_nan=False)
                source.data[name.removesuffix("/data.yaml")] = content
        except (ValueError, TypeError, yaml.YAMLError) as error:
            raise SourceError(f"{path} cannot be read: {error}") from error
    return source


def problems(source: Source) -> list[str]:
    """Reasons not to sign it, one sentence each: Rego, data, tests, in this order."""
    try:
        opa = engine(source.modules | source.tests, source.document)
        if opa.eval_document("llm.authz.decision", {}).get("allow") is not False:
            return ["llm/authz: data.llm.authz.decision does not deny an empty request"]
        reasons = sorted(opa.eval_document("llm.validate.problems"))
    except OpaError as error:
        return [str(error)]
    return reasons + [
        failure for path in source.tests for failure in _failures(opa, path, source.tests[path])
    ]


def tests(source: Source) -> int:
    """Number of tests."""
    return sum(len(_tests(text)) for text in source.tests.values())


def engine(modules: dict[str, str], document: dict[str, Any]) -> OpaEngine:
    """OPA with these modules and this data."""
    opa = OpaEngine()
    for path, text in modules.items():
        opa.add_policy(path, text)
    opa.add_data(document)
    return opa


def _tests(text: str) -> set[str]:
    """Names of the tests in a module."""
    return set(re.findall(r"^(test_\w+)", text, re.MULTILINE))


def _failures(opa: OpaEngine, path: str, text: str) -> list[str]:
    """The failing tests of one module. They are evaluated by one query, since each query is compiled anew."""
    package = re.search(r"^package\s+([\w.]+)", text, re.MULTILINE)
    if not package:
        return [f"{path}: it has no package"]
    try:
        (answer,) = opa.eval_query(f"held = {{name | some name; data.{package[1]}[name] == true}}")
    except OpaError as error:
        return [f"{path}: its tests stop with an error: {error}"]
    return [f"{path}: {test} fails" for test in sorted(_tests(text) - set(answer["held"]))]


def pack(source: Source, revision: int, expires: datetime, key: ec.EllipticCurvePrivateKey) -> bytes:
    """The signed bundle. The same source gives the same bytes, except for the signature, which has a random part."""
    files = source.files | {
        "llm/meta/data.json": canonical({"revision": revision, "expires": expires.strftime(TIME)}),
        MANIFEST: canonical({"revision": str(revision), "roots": ["llm"], "rego_version": 1}),
    }
    hashes = [
        {"name": name, "hash": hashlib.sha256(content).hexdigest(), "algorithm": "SHA-256"}
        for name, content in sorted(files.items())
    ]
    token = jwt.encode({"files": hashes}, key, algorithm=ALGORITHM, headers={"kid": KEY_ID})
    return packed(files | {SIGNATURES: canonical({"signatures": [token]})})


def packed(files: dict[str, bytes]) -> bytes:
    """A reproducible tar.gz: no times, no owners, files in sorted order."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in sorted(files.items()):
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(data), 0o644
            tar.addfile(member, io.BytesIO(data))
    return gzip.compress(content.getvalue(), mtime=0)


def canonical(value: object) -> bytes:
    """JSON in the canonical form that OPA hashes: sorted keys, no spaces, no needless escapes."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029").encode()
