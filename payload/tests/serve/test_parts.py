"""Parts that need no processes: text, frames, manifests, configuration, admission."""

import errno
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmcore import verity
from llmcore.config import ConfigError, load
from llmcore.manifest import ManifestError, verify_model, write_manifest
from llmserve.api.errors import ApiError
from llmserve.api.requests import ChatBody, chat_call, parse_body, refuse_undeclared
from llmserve.cli import main
from llmserve.engine.stop_strings import StopStrings
from llmserve.protocol import (
    Beat,
    Cancel,
    Delta,
    Done,
    Failed,
    Generate,
    Hello,
    ProtocolError,
    decode,
    encode,
)
from llmserve.settings import EngineConfig, GatewayConfig

GATEWAY = """
listen: {socket: /run/llm-gateway/http.sock}
metrics: {port: 9400}
engines: {echo: {socket: /run/llm-engine/echo.sock}}
keys_file: /var/lib/llm-gateway/keys.json
"""


def test_stop_strings_cut_a_stream_where_they_cut_the_whole_text() -> None:
    chance = random.Random(5)  # noqa: S311 - test data
    for _ in range(3000):
        text = "".join(chance.choices("ab ", k=chance.randint(0, 30)))
        stops = ["".join(chance.choices("ab ", k=chance.randint(1, 4))) for _ in range(chance.randint(0, 3))]
        ends = [text.find(stop) for stop in stops if stop in text]
        # The first complete stop string in time is the one whose end comes first.
        complete = [text.find(stop) + len(stop) for stop in stops if stop in text]
        cutter, shown = StopStrings(stops), ""
        for character in text:
            shown += cutter.push(character)
            if cutter.stopped:
                break
        shown += cutter.flush()
        if not ends:
            assert (shown, cutter.stopped) == (text, False)
        else:
            seen = text[: min(complete)]
            assert shown == seen[: min(seen.find(stop) for stop in stops if stop in seen)]
            assert cutter.stopped


@pytest.mark.parametrize(
    "frame",
    [
        Hello("m", "r", "echo", 10, 2, ["seed", "n"]),
        Generate(3, True, 5, messages=[{"role": "user", "content": 'a "b"\n東京\0'}], stop=["x"]),
        Generate(4, False, 5, prompt="x", extra={"tools": [{"type": "function"}], "n": 2}),
        Generate(3, True, 5, prompt="x", deadline=0.5, traceparent="00-1-2-01"),
        Beat(True, 0.25, [0.5, 1.0]),
        Cancel(3),
        Delta(3, '"\\\n東京\u2028'),
        Done(3, "x", "stop", 1, 2),
        Failed(3, 400, "code", "message", "param"),
    ],
)
def test_a_frame_is_one_line_and_survives_the_round_trip(frame: Delta) -> None:
    line = encode(frame)
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert decode(line) == frame


@pytest.mark.parametrize(
    "line", [b"", b"\n", b"[]\n", b"{}\n", b'{"kind":"who"}\n', b'{"kind":"cancel"}\n', b"[" * 10**5]
)
def test_an_invalid_frame_is_refused(line: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(line)


def test_unknown_fields_of_a_newer_release_are_ignored() -> None:
    assert decode(b'{"kind":"delta","id":1,"text":"a","colour":"red"}\n') == Delta(1, "a")


def model_directory(folder: Path) -> tuple[Path, Path]:
    """Two files and their manifest."""
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    manifest = folder / "MANIFEST.sha256"
    write_manifest(folder, manifest)
    return folder, manifest


def test_a_verified_model_has_the_revision_of_its_manifest(tmp_path: Path) -> None:
    folder, manifest = model_directory(tmp_path)
    revision = verify_model(folder, manifest)
    assert len(revision) == 16
    assert verify_model(folder, manifest) == revision


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda folder: (folder / "model.safetensors").write_bytes(b"Weights"), "its manifest says"),
        (lambda folder: (folder / "model.safetensors").unlink(), "is missing"),
        (lambda folder: (folder / "extra.json").write_text("{}"), "not in the manifest"),
        (lambda folder: (folder / "link").symlink_to("/etc/passwd"), "not a regular file"),
        (lambda folder: (folder / "MANIFEST.sha256").write_text("junk\n"), "line 1"),
        (lambda folder: (folder / "MANIFEST.sha256").write_text(f"{'0' * 64}  ../x\n"), "leaves"),
        (lambda folder: (folder / "MANIFEST.sha256").write_text(""), "empty"),
        (lambda folder: (folder / "MANIFEST.sha256").unlink(), "cannot read the manifest"),
    ],
)
def test_a_model_that_differs_from_its_manifest_is_refused(
    tmp_path: Path, damage: Callable[[Path], object], complaint: str
) -> None:
    folder, manifest = model_directory(tmp_path)
    damage(folder)
    with pytest.raises(ManifestError, match=complaint):
        verify_model(folder, manifest)


def test_an_unreadable_file_of_a_model_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, manifest = model_directory(tmp_path)

    def refused(*_given: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refused)  # the user that runs the tests can read everything
    monkeypatch.setattr(Path, "read_text", lambda path: path.read_bytes().decode())
    monkeypatch.setattr(Path, "read_bytes", lambda path: os.read(os.open(path, os.O_RDONLY), 4096))
    with pytest.raises(ManifestError, match=r"cannot read .*config.json: Permission denied"):
        verify_model(folder, manifest)


@pytest.fixture
def kernel_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A model with a record of its installation, and a stand-in for a kernel that checks its files."""
    (tmp_path / "m").mkdir()
    folder, manifest = model_directory(tmp_path / "m")
    digests = {"config.json": "c0", "model.safetensors": "3d"}
    lines = [line.replace("  ", f"  {digests[line[66:]]}  ") for line in manifest.read_text().splitlines()]
    (tmp_path / "m.fsverity").write_text("".join(f"{line}\n" for line in lines))
    monkeypatch.setattr(verity, "measured", lambda path: digests[path.name])
    return folder, manifest


def test_files_that_the_kernel_checks_are_read_and_not_hashed(
    kernel_verified: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, manifest = kernel_verified
    revision, read = verify_model(folder, manifest), []
    monkeypatch.setattr(verity, "read", lambda path: read.append(path.name))
    monkeypatch.setattr("llmcore.manifest.sha256_of", lambda path: pytest.fail(f"{path} was hashed"))
    assert verify_model(folder, manifest) == revision
    assert read == ["config.json", "model.safetensors"]


def test_a_file_that_the_kernel_refuses_to_read_is_named(
    kernel_verified: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def corrupt(_: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(verity, "read", corrupt)
    said = r"cannot read .*/m/config.json: Input/output error; its disk is damaged or was tampered with"
    with pytest.raises(ManifestError, match=said):
        verify_model(*kernel_verified)


@pytest.mark.parametrize("part", ["3d", "[0-9a-f]{64}(?=  3d)"])
def test_a_file_with_another_digest_or_hash_than_was_recorded_is_hashed(
    kernel_verified: tuple[Path, Path], part: str
) -> None:
    folder, manifest = kernel_verified
    record = folder.with_name("m.fsverity")
    record.write_text(re.sub(part, "0" * 64, record.read_text()))
    verify_model(folder, manifest)
    (folder / "model.safetensors").write_bytes(b"Weights")
    with pytest.raises(ManifestError, match="its manifest says"):
        verify_model(folder, manifest)


def test_a_file_is_read_to_its_end_and_without_fs_verity_has_no_digest() -> None:
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:  # no tmpfs has fs-verity
        file.truncate(verity.BLOCK + 1)
        assert verity.measured(Path(file.name)) == ""
        verity.read(Path(file.name))
    with pytest.raises(OSError, match="Input/output error"):
        verity.read(Path("/proc/self/mem"))  # whose first page is never there


def test_a_pickled_file_is_refused_even_if_the_manifest_lists_it(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"code")
    folder, manifest = model_directory(tmp_path)
    with pytest.raises(ManifestError, match="only safetensors"):
        verify_model(folder, manifest)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ("limitz: {}\n", "unknown key 'limitz'"),
        ("limits: {body_byte: 5}\n", "unknown key 'limits.body_byte'"),
        ("limits: {body_bytes: -5}\n", "'limits.body_bytes' is -5"),
        ("limits: {waiting: many}\n", "'limits.waiting' is 'many'"),
        ("redis: {}\n", "'redis.url' is missing"),
        ("- list", "is not YAML"),
    ],
)
def test_a_wrong_configuration_names_the_key_and_the_value(
    tmp_path: Path, change: str, complaint: str
) -> None:
    file = tmp_path / "gateway.yaml"
    file.write_text(GATEWAY + change)
    with pytest.raises(ConfigError, match=complaint):
        load(file, GatewayConfig)


def test_the_cli_checks_configurations_with_an_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "gateway.yaml"
    file.write_text(GATEWAY)
    assert main(["check", "gateway", str(file)]) == 0
    file.write_text(GATEWAY + "colour: red\n")
    assert main(["check", "gateway", str(file)]) == 2
    assert "unknown key 'colour'" in capsys.readouterr().err
    assert main(["check", "engine", str(tmp_path / "none.yaml")]) == 2
    file.write_text("socket: /run/x.sock\nmodel: {driver: turbo}\n")
    with pytest.raises(ConfigError, match="turbo"):
        load(file, EngineConfig)


@pytest.mark.parametrize(
    ("model", "weights", "complaint"),
    [
        ("driver: continuous", {"model_type": "deepseek_v2"}, "'deepseek_v2' model, whose compressed cache"),
        ("driver: continuous", {"model_type": "new", "kv_lora_rank": 8}, "or with driver 'naive'"),
        ("driver: naive, quantization: int8", {"model_type": "llama"}, "cannot be imported"),
        ("driver: naive", {"model_type": "deepseek_v2"}, None),
        (
            "driver: naive, adapters: {law: {path: /a, manifest: /m}}",
            {"model_type": "deepseek_v2"},
            "would ignore an adapter beside them",
        ),
        ("driver: continuous", {"model_type": "llama"}, None),
    ],
)
def test_check_refuses_what_an_engine_would_refuse_at_load(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    weights: dict[str, object],
    complaint: str | None,
) -> None:
    monkeypatch.setattr("llmserve.engine.unsupported_models.find_spec", lambda _: None)
    (tmp_path / "config.json").write_text(json.dumps(weights))
    file = tmp_path / "engine.yaml"
    file.write_text(
        f"socket: /run/x.sock\nmodel: {{path: {tmp_path}, manifest: {tmp_path}/SHA256SUMS, {model}}}\n"
    )
    assert main(["check", "engine", str(file)]) == (2 if complaint else 0)
    assert (complaint or "") in capsys.readouterr().err


def hello(*fields: str) -> Hello:
    """That of an engine which takes these fields."""
    return Hello("m", "r", "remote", 4096, 8, [*fields])


def test_only_declared_fields_are_passed_to_the_engine() -> None:
    tools = [{"type": "function", "function": {"name": "now"}}]
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], "seed": 5, "tools": tools, "n": 1}
    request = chat_call(parse_body(ChatBody, json.dumps(body).encode()), 2048).generate
    assert request.extra == {"tools": tools}
    refuse_undeclared(request, "m", hello("tools", "seed"), dict)
    with pytest.raises(ApiError, match="'seed'") as refused:
        refuse_undeclared(request, "m", hello("tools"), dict)
    assert (refused.value.status, refused.value.code, refused.value.param) == (
        400,
        "unsupported_field",
        "seed",
    )
    others = {"a": hello("seed"), "b": hello("tools", "seed"), "c": hello("seed", "tools")}
    with pytest.raises(ApiError, match="by the model 'm': 'seed'; use 'b' or 'c', or remove it"):
        refuse_undeclared(request, "m", hello("tools"), lambda: others)


def test_arguments_of_a_chat_template_are_those_that_the_operator_lists() -> None:
    body: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
    body |= {"chat_template_kwargs": {"thinking": True, "tools": "x"}}
    request = chat_call(parse_body(ChatBody, json.dumps(body).encode()), 2048).generate
    takes = replace(hello("chat_template_kwargs"), template_arguments=["thinking"])
    with pytest.raises(ApiError, match=r"by the model 'm': 'chat_template_kwargs\.tools'; remove it"):
        refuse_undeclared(request, "m", takes, dict)
    del request.extra["chat_template_kwargs"]["tools"]
    refuse_undeclared(request, "m", takes, dict)
    with pytest.raises(ApiError, match=r"'chat_template_kwargs\.thinking'"):
        refuse_undeclared(request, "m", hello("chat_template_kwargs"), dict)


def test_a_gateway_imports_fastapi_only_for_the_routes_that_need_it() -> None:
    code = "import sys, llmserve.gateway.process; sys.exit('fastapi' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
