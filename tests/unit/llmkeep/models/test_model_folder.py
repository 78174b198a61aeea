"""A directory becomes a release candidate, or is refused with one sentence and leaves nothing."""

import json
import os
import pty
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import model_add
import numpy as np
import pytest
import sealing_double
import sharded_deepseek
import small_gguf
from kill_points import KillPoints

from llmkeep import durable
from llmkeep.bundle import manifest, release
from llmkeep.bundle.cache import sha256
from llmkeep.bundle.release import ReleaseError
from llmkeep.models import intake, licence
from llmkeep.models.contents import File
from llmkeep.models.folder import Folder
from llmkeep.places import Places
from llmkeep.resumable import Resumable

ROOT = Path(__file__).resolve().parents[4]
SHARD = "model-00002-of-00003.safetensors"
NAME = "deepseek-tiny"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return sharded_deepseek.write(tmp_path / "DeepSeek-Tiny")


@pytest.fixture
def into(tmp_path: Path) -> Path:
    return tmp_path / "out" / "candidate"


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Places:
    sealing_double.use(monkeypatch, release, release)
    release.init(found := Places(tmp_path / "root"), None)
    return found


# ---------------------------------------------------------------- what is taken
def test_takes_what_is_a_model_and_names_what_it_leaves_out(
    model: Path, into: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = model_add.run(capsys, model, into)
    assert code == 0, said
    taken = {path.name for path in (into / "models" / NAME).iterdir()}
    assert taken == {path.name for path in model.iterdir()} - {"figures", *sharded_deepseek.NOT_TAKEN} | {
        "provenance.json"
    }
    for name in ("modeling_deepseek.py", "pytorch_model.bin", "figures/", ".gitattributes"):
        assert name in said.split("left out: ")[1].splitlines()[0]
    assert not [path for path in into.parent.iterdir() if path != into]


def test_the_config_names_no_code_afterwards_and_the_change_is_on_record(
    model: Path, into: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model_add.run(capsys, model, into)
    taken = json.loads((into / f"models/{NAME}/config.json").read_bytes())
    assert taken == {key: value for key, value in sharded_deepseek.CONFIG.items() if key != "auto_map"}
    change = model_add.provenance(into)["changed"]["config.json"]
    assert change["removed"] == "auto_map"
    assert change["sha256_before"] != model_add.provenance(into)["files"]["config.json"]


def test_a_candidate_becomes_a_release_on_the_mirror(
    model: Path, into: Path, places: Places, capsys: pytest.CaptureFixture[str]
) -> None:
    _, said = model_add.run(capsys, model, into)
    digest = said.split("--sha256 ")[1].strip()
    said = release.sign(places, into, expected=digest)
    assert "from directory DeepSeek-Tiny, licence deepseek accepted by" in said
    release.add(places, into, places.publish_public)
    found = manifest.read(places.releases / NAME)
    assert {(entry.licence, entry.source) for entry in found.files} == {
        ("deepseek", "directory DeepSeek-Tiny")
    }


def test_the_digest_on_paper_is_compared_before_signing(
    model: Path, into: Path, places: Places, capsys: pytest.CaptureFixture[str]
) -> None:
    model_add.run(capsys, model, into)
    with pytest.raises(ReleaseError, match="this is not the candidate that was noted"):
        release.sign(places, into, expected="0" * 64)
    assert not places.publish_serial.exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda told: told["files"].update({SHARD: "0" * 64}), "add it again"),
        (lambda told: told["licence"].update(accepted_by=""), "no accepted licence"),
        (lambda told: told.pop("source"), "not a complete candidate"),
    ],
    ids=["other files", "no person", "no source"],
)
def test_a_candidate_whose_provenance_was_edited_gets_no_signature(
    change: Callable[[dict[str, object]], object],
    words: str,
    model: Path,
    into: Path,
    places: Places,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model_add.run(capsys, model, into)
    told = model_add.provenance(into)
    change(told)
    path = into / f"models/{NAME}/provenance.json"
    sums = into / f"models/{NAME}.sha256"
    before = sha256(path)
    path.write_text(json.dumps(told))
    sums.write_text(sums.read_text().replace(before, sha256(path)))
    with pytest.raises(ReleaseError, match=words):
        release.sign(places, into)


# ---------------------------------------------------------------- refusals
def truncated(model: Path) -> None:
    path = model / SHARD
    path.write_bytes(path.read_bytes()[:-1000])


def longer(model: Path) -> None:
    with (model / SHARD).open("ab") as stream:
        stream.write(b"more")


def huge_header(model: Path) -> None:
    (model / SHARD).write_bytes(struct.pack("<Q", 1 << 62) + b"{}")


def pickles_only(model: Path) -> None:
    for path in model.glob("*.safetensors"):
        path.unlink()


def edit(model: Path, name: str, **changes: object) -> None:
    path = model / name
    path.write_text(json.dumps(json.loads(path.read_bytes()) | changes))


def rename_a_tensor(model: Path) -> None:
    index = json.loads((model / "model.safetensors.index.json").read_bytes())["weight_map"]
    edit(model, "model.safetensors.index.json", weight_map=index | {"model.lost.weight": SHARD})


def outside(model: Path) -> None:
    index = json.loads((model / "model.safetensors.index.json").read_bytes())["weight_map"]
    edit(model, "model.safetensors.index.json", weight_map=index | {"x": "../../etc/shadow"})


def link(model: Path) -> None:
    (model / SHARD).rename(model.parent / "elsewhere")
    (model / SHARD).symlink_to(model.parent / "elsewhere")


def remote_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    edit(model, "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_x.X", None]})


REFUSED: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "a truncated shard": (truncated, 4, f"{SHARD} has 62984 bytes, but its header says 63984"),
    "a shard with more than its tensors": (longer, 4, "its header says"),
    "a header as long as a disk": (huge_header, 4, "is not a safetensors file"),
    "pickles only": (pickles_only, 1, "only pytorch_model.bin, which can run code"),
    "a link": (link, 1, "a link can lead anywhere"),
    "a pipe": (lambda model: os.mkfifo(model / "LICENSE"), 1, "is not a plain file"),
    "a shard that the index does not name": (
        lambda model: shutil.copy(model / SHARD, model / "model-00004-of-00004.safetensors"),
        4,
        "model-00004-of-00004.safetensors (1 files) is a shard",
    ),
    "an index that names an absent shard": (lambda model: (model / SHARD).unlink(), 4, f"wants {SHARD}"),
    "an index that names an absent tensor": (rename_a_tensor, 4, "lacks the tensor 'model.lost.weight'"),
    "an index that leads out of the folder": (outside, 4, "'../../etc/shadow'"),
    "a config that is a list": (
        lambda model: (model / "config.json").write_text("[1]"),
        4,
        "config.json is '[1]', not a JSON object",
    ),
    "a config that is no JSON": (lambda model: (model / "config.json").write_text("{"), 4, "is not JSON"),
    "a config as deep as a well": (
        lambda model: (model / "config.json").write_text('{"a": ' + "[" * 900 + "]" * 900 + "}"),
        1,
        "nested more than 100 levels deep",
    ),
    "a config as large as weights": (
        lambda model: os.truncate(model / "config.json", 17 << 20),
        1,
        "config.json has 17825792 bytes",
    ),
    "no config": (lambda model: (model / "config.json").unlink(), 1, "no config.json"),
    "a custom class": (
        lambda model: edit(model, "config.json", architectures=["MyModel"]),
        1,
        "'MyModel' for model_type 'deepseek_v2'",
    ),
    "a type of its own": (
        lambda model: edit(model, "config.json", model_type="mine"),
        1,
        "model_type 'mine'",
    ),
    "a tokenizer of its own": (remote_tokenizer, 1, "its tokenizer is code in the repository"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refuses(what: str, model: Path, into: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, wanted, words = REFUSED[what]
    change(model)
    code, said = model_add.run(capsys, model, into)
    assert (code, words in said) == (wanted, True), said
    assert not into.parent.exists() or not list(into.parent.iterdir())


@pytest.mark.parametrize("name", ["../up", "A", "a/b", "", ".", "a..b", "x" * 64])
def test_refuses_the_name(name: str, model: Path, into: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = model_add.run(capsys, model, into, f"--name={name}")
    if name:
        assert (code, "the name is" in said) == (1, True), said
        assert not into.parent.exists()
    else:
        assert code == 0


def test_refuses_a_folder_that_is_there(model: Path, into: Path, capsys: pytest.CaptureFixture[str]) -> None:
    into.mkdir(parents=True)
    code, said = model_add.run(capsys, model, into)
    assert (code, f"{into} exists" in said) == (1, True)
    assert not list(into.iterdir())


def test_checks_the_space_before_anything_is_written(
    model: Path, into: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(model)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1 << 20))
    code, said = model_add.run(capsys, model, into)
    assert (code, "0.00 GB free" in said) == (6, True), said
    assert not into.parent.exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=80M", "tmpfs", str(place)], capture_output=True, check=False
    ).returncode:
        pytest.skip("no file system can be mounted here: run it as root")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_fills_half_way_is_told_and_the_next_run_continues(
    model: Path, small_disk: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    into, filler, honest = small_disk / "candidate", small_disk / "filler", Folder.copy

    def copy(self: Folder, file: File, target: Resumable) -> None:
        if file.path == SHARD:
            with filler.open("wb", buffering=0) as stream:
                while shutil.disk_usage(small_disk).free:
                    stream.write(bytes(min(1 << 20, shutil.disk_usage(small_disk).free)))
        honest(self, file, target)

    monkeypatch.setattr(Folder, "copy", copy)
    code, said = model_add.run(capsys, model, into)
    assert (code, "is full" in said, into.exists()) == (6, True, False), said
    monkeypatch.undo()
    filler.unlink()
    assert model_add.run(capsys, model, into)[0] == 0
    assert sorted(path.name for path in small_disk.iterdir()) == ["candidate"]


# ---------------------------------------------------------------- GGUF
def write_llama(path: Path, **more: str) -> Path:
    blocks = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "ffn_down": (32, 64)}
    shapes = {"token_embd.weight": (6, 32), "output_norm.weight": (32,)}
    shapes |= {f"blk.0.{name}.weight": shape for name, shape in blocks.items()}
    small_gguf.write_gguf(path, {name: np.ones(shape, np.float32) for name, shape in shapes.items()}, **more)
    return path


def test_a_gguf_file_becomes_a_candidate_with_its_own_digest_and_licence(
    tmp_path: Path, into: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_llama(tmp_path / "SmolLM2.gguf", licence="apache-2.0")
    (text := tmp_path / "LICENSE").write_text("Apache License\n")
    words = ("--licence-file", text, "--accept-licence", "Apache-2.0", "--name", "smol")
    code, said = model_add.run(capsys, file, into, *words)
    assert code == 0, said
    told = model_add.provenance(into)
    assert told["source"] == f"GGUF file SmolLM2.gguf, sha256 {sha256(file)}"
    assert (told["licence"]["name"], told["licence"]["file"]) == ("apache-2.0", "LICENSE")
    assert [path.name for path in into.parent.iterdir()] == ["candidate"]


@pytest.mark.parametrize(
    ("tokenizer", "size", "wanted", "words"),
    [("smollm", 100, 4, "is not a GGUF file"), ("qwen2", None, 1, "a llama model with a qwen2 tokenizer")],
    ids=["truncated", "another kind"],
)
def test_refuses_a_gguf_file_that_is(
    tokenizer: str,
    size: int | None,
    wanted: int,
    words: str,
    tmp_path: Path,
    into: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = write_llama(tmp_path / "x.gguf", tokenizer=tokenizer)
    if size:
        os.truncate(file, size)
    code, said = model_add.run(capsys, file, into)
    assert (code, words in said) == (wanted, True), said
    assert not into.parent.exists() or not list(into.parent.iterdir())


# ---------------------------------------------------------------- licences
def test_a_licence_that_was_not_accepted_is_shown_with_the_way_to_accept_it(
    model: Path, into: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "llmkeep", "model", "add", str(model), "--into", str(into)]
    run = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert run.returncode == 5
    assert sharded_deepseek.LICENCE in run.stdout
    assert "--accept-licence 'deepseek'" in run.stderr
    assert not list((tmp_path / "out").iterdir())


def test_a_terminal_is_asked(model: Path, into: Path) -> None:
    command = [sys.executable, "-m", "llmkeep", "model", "add", str(model), "--into", str(into)]
    ours, theirs = pty.openpty()
    with subprocess.Popen(command, stdin=theirs, stdout=subprocess.PIPE, text=True) as run:
        os.write(ours, b"DeepSeek\n")
        assert run.wait() == 0
    os.close(ours)
    os.close(theirs)
    record = model_add.provenance(into)["licence"]
    assert (record["name"], record["file"]) == ("deepseek", "LICENSE-MODEL")
    assert record["sha256"] == model_add.provenance(into)["files"]["LICENSE-MODEL"]


def test_another_licence_than_the_models_cannot_be_accepted(
    model: Path, into: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = model_add.run(capsys, model, into, "--accept-licence", "MIT")
    assert (code, "'MIT' was accepted, the model's licence is 'deepseek'" in said) == (5, True), said


def test_a_model_without_a_licence_takes_one_from_a_file(
    model: Path, into: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / "README.md").unlink()
    (model / "LICENSE-MODEL").unlink()
    code, said = model_add.run(capsys, model, into)
    assert (code, "it states no licence" in said) == (5, True), said
    (text := tmp_path / "agreed.txt").write_text("\n  Agreement of November\n\nterms\n")
    words = ("--licence-file", text, "--accept-licence", "agreement of november")
    assert model_add.run(capsys, model, into, *words)[0] == 0
    assert (into / f"models/{NAME}/LICENSE").read_bytes() == text.read_bytes()


def test_a_licence_file_does_not_replace_the_models_own(
    model: Path, into: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (text := tmp_path / "other.txt").write_text("Other\n")
    code, said = model_add.run(capsys, model, into, "--licence-file", text)
    assert (code, "it has its own LICENSE-MODEL" in said) == (5, True), said


@pytest.mark.parametrize(
    ("card", "name"),
    [
        ("---\nlicense: apache-2.0\n---\n", "apache-2.0"),
        ("---\nlicense:\n- mit\n- apache-2.0\n---\n", "mit AND apache-2.0"),
        ("---\nlicense: other\n---\n", "other"),
        ("---\nlicense: [1]\n---\n", "DEEPSEEK LICENSE AGREEMENT"),
        ("---\n\t: {\n---\n", "DEEPSEEK LICENSE AGREEMENT"),
        ("no front matter", "DEEPSEEK LICENSE AGREEMENT"),
    ],
)
def test_the_name_is_the_cards_else_the_texts_first_line(card: str, name: str, model: Path) -> None:
    (model / "README.md").write_text(card)
    assert licence.stated(model).name == name


def test_what_strangers_wrote_cannot_redraw_a_terminal(
    model: Path, into: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / "\x1b[2Jcleared.png").write_text("")
    (model / "LICENSE-MODEL").write_text("\x1b[2JLicence\n")
    _, said = model_add.run(capsys, model, into, "--accept-licence", "no")
    assert "\x1b" not in said
    _, said = model_add.run(capsys, model, into)
    assert "?[2Jcleared.png" in said


# ---------------------------------------------------------------- interrupted runs
def test_a_run_that_was_killed_anywhere_continues_to_the_same_candidate(model: Path, memory: Path) -> None:
    def accept(found: licence.Licence, _: str) -> dict[str, str]:
        return licence.accepted(found, "deepseek", "tester", "2026-11-27T00:00:00+00:00")

    def work() -> None:
        intake.add(Folder(model), memory / "out", None, accept)

    kills = KillPoints(
        memory / "count", [(Resumable, "write"), (durable, "write"), (Path, "rename"), (Path, "mkdir")]
    )
    points = kills.points(work)
    wanted = model_add.contents(memory / "out")
    assert points > 40
    for at in range(1, points + 1):
        shutil.rmtree(memory / "out", ignore_errors=True)
        assert kills.run(work, at) == "killed"
        if (memory / "out").exists():
            assert model_add.contents(memory / "out") == wanted, "a candidate appears whole"
        else:
            assert kills.run(work) == "done"
        assert model_add.contents(memory / "out") == wanted, f"killed at point {at}"
        assert not list(memory.glob(".out*"))


def test_a_source_that_changed_after_the_interruption_is_copied_as_it_is_now(
    model: Path, into: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(durable, "sync_all", interrupted)
        assert model_add.run(capsys, model, into)[0] == 130
    content = bytearray((model / SHARD).read_bytes())
    content[-1] ^= 1
    (model / SHARD).write_bytes(content)
    assert model_add.run(capsys, model, into)[0] == 0
    assert (into / f"models/{NAME}/{SHARD}").read_bytes() == content


def test_two_runs_do_not_share_a_folder(
    model: Path, into: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, said = intake._without_code, []

    def meanwhile(*given: object) -> object:
        monkeypatch.setattr(intake, "_without_code", honest)
        said.append(model_add.run(capsys, model, into))
        return honest(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(intake, "_without_code", meanwhile)
    assert model_add.run(capsys, model, into)[0] == 0
    assert [(code, "another llmkeep is using" in words) for code, words in said] == [(1, True)]


# ---------------------------------------------------------------- the payload
SERVED = """
import sys
from pathlib import Path

from llmcore.manifest import verified
from llmserve.engine.naive import NaiveDriver
from llmserve.settings import NaiveModel

model = Path(sys.argv[1])
verified(model)
settings = NaiveModel(driver="naive", path=model, manifest=model.with_name(f"{model.name}.sha256"))
language = NaiveDriver(settings, "r").language
assert language.tokenizer.decode(language.tokenizer("数据库?").input_ids) == "数据库?"
print("answered by", type(language.model).__module__)
"""


def test_the_payload_loads_the_shards_without_code_of_the_repository(
    model: Path, into: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert model_add.run(capsys, model, into)[0] == 0
    command = [str(ROOT / "payload/.venv/bin/python"), "-c", SERVED, str(into / "models" / NAME)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if "python3-torch is not installed" in run.stderr:
        pytest.skip("Debian's python3-torch is not installed")
    assert run.returncode == 0, run.stderr
    assert "answered by transformers.models.deepseek_v2." in run.stdout
    assert "newly initialized" not in run.stderr
