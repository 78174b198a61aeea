"""`llmkeep release fetch` from hosts that send what they like: one whole model arrives, or nothing at all."""

import io
import json
import shlex
import stat
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sealing_double
from trained_candidate import MODEL, NAME, candidate, summed

from llmkeep import cli, fetch
from llmkeep.bundle import release
from llmkeep.bundle.cache import sha256
from llmkeep.bundle.release import ReleaseError
from llmkeep.places import Places

FOLDER = "round-1-candidate"
ESCAPE = "\x1b[2J"
# In place of ssh: it keeps its arguments, and prints what the host would send.
SSH = """#!/bin/sh
printf '%s\\n' "$@" > {folder}/arguments
cat {folder}/complaint >&2
cat {folder}/stream {folder}/endless 2> /dev/null
exit $(cat {folder}/code)
"""
CONNECTION: dict[str, Any] = {
    "host": "10.0.0.7", "port": None, "remote_user": None, "private_key_file": None, "ssh_executable": "ssh", "ssh_args": "",
    "ssh_common_args": "", "ssh_extra_args": "", "jobs": "/srv/llmkeep/training/jobs",
}  # fmt: skip


@dataclass
class Host:
    """A training host, as an SSH client of the control node sees it."""

    folder: Path
    places: Places

    def sends(self, stream: bytes, code: int = 0, complaint: str = "") -> None:
        (self.folder / "stream").write_bytes(stream)
        (self.folder / "code").write_text(str(code))
        (self.folder / "complaint").write_text(complaint)

    @property
    def arguments(self) -> list[str]:
        return (self.folder / "arguments").read_text().splitlines()

    def refused(self) -> str:
        """The reason for which the candidate is refused; nothing of it is left, here or elsewhere."""
        before = everything(self.folder)
        with pytest.raises(ReleaseError) as refusal:
            fetch.fetch(self.places, CONNECTION, "train1", FOLDER)
        assert list(self.places.candidates.iterdir()) == []
        assert everything(self.folder) == before
        return str(refusal.value)


def everything(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.name != "arguments"}


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    places = Places(tmp_path / "root")
    places.candidates.mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/ssh").write_text(SSH.format(folder=tmp_path))
    (tmp_path / "bin/ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    with tempfile.TemporaryDirectory(prefix="run-", dir="/tmp") as memory:
        monkeypatch.setenv("TMPDIR", memory)
        yield Host(tmp_path, places)


def archive(folder: Path, more: Callable[[tarfile.TarFile], None] = lambda _: None) -> bytes:
    """An archive as the host's tar makes it, with some more at its end."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as tar:
        tar.add(folder / "models", "models")
        more(tar)
    return stream.getvalue()


def member(
    name: str, kind: bytes = tarfile.REGTYPE, content: bytes = b"", link: str = ""
) -> Callable[[tarfile.TarFile], None]:
    """Adds one member to an archive."""

    def add(tar: tarfile.TarFile) -> None:
        info = tarfile.TarInfo(name)
        info.type, info.linkname, info.size = kind, link, len(content)
        tar.addfile(info, io.BytesIO(content))

    return add


def header(name: str, kind: bytes, size: int) -> bytes:
    """A header that states so many bytes, of which none follow."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


def test_a_candidate_is_fetched_signed_and_added_by_the_commands_that_are_printed(
    host: Host, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = candidate(host.folder / "made")
    (made / MODEL / "config.json").chmod(0o777)
    host.sends(archive(made))
    inventory = host.folder / "hosts.yml"
    options = {
        "ansible_host": "10.0.0.{{ 3 + 4 }}", "ansible_port": 2222, "ansible_ssh_common_args": "-o 'ProxyJump=a b'",
        "llm_training_dir": "/srv/a folder",
    }  # fmt: skip
    hosts = {"train1": options, "train2": {}}
    inventory.write_text(
        json.dumps({"all": {"children": {"train": {"hosts": hosts}, "serve": {"hosts": {"llm1": {}}}}}})
    )
    monkeypatch.setattr(release, "Places", lambda: host.places)
    sealing_double.use(monkeypatch, release, release)
    release.init(host.places, None)

    assert cli.main(["release", "fetch", "train1", FOLDER, "-i", str(inventory)]) == 0
    told = capsys.readouterr().out
    where = host.places.candidates / FOLDER
    digest = sha256(made / f"{MODEL}.sha256")
    commands = [line.strip() for line in told.splitlines() if line.startswith("  ")]
    assert commands == [f"llmkeep release sign {where} --sha256 {digest}", f"llmkeep release add {where}"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in (where, where.parent)} == {0o700}
    assert not any(path.stat().st_mode & 0o111 for path in where.rglob("*") if path.is_file())
    *first, where_to, remote = host.arguments
    assert (where_to, shlex.split(remote)) == (
        "10.0.0.7",
        ["runuser", "-u", "llm-train", "--", "tar", "--create", "--format=gnu", "--hard-dereference", "--directory",
         f"/srv/a folder/jobs/{FOLDER}", "models"],
    )  # fmt: skip
    assert first[-4:] == ["ProxyJump=a b", "-p", "2222", "--"]
    assert "BatchMode=yes" in first
    assert "ServerAliveCountMax=3" in first, "as ansible.cfg has it"

    for command in commands:
        assert cli.main(shlex.split(command)[1:]) == 0
    assert "serial 1, promoted by its gate" in capsys.readouterr().out
    assert (host.places.releases / NAME / MODEL / "model.safetensors").samefile(
        where / MODEL / "model.safetensors"
    )
    assert cli.main(["release", "fetch", "train1", FOLDER, "-i", str(inventory)]) == 1
    assert f"{where} exists" in capsys.readouterr().err

    for wrong in ("llm1", "train", "train9"):
        assert cli.main(["release", "fetch", wrong, "another", "-i", str(inventory)]) == 1
        assert (
            f"{wrong} is not a host in [train] of {inventory}, which has: train1, train2"
            in capsys.readouterr().err
        )


def test_a_hosts_own_tar_brings_long_names_and_files_with_two_of_them(host: Host) -> None:
    name = "a" * 63
    made = candidate(host.folder / "jobs" / FOLDER, name=name)
    model = made / "models" / name
    (model / f"{'b' * 80}.jinja").write_text("{{ messages }}")
    (model / "again.txt").hardlink_to(model / "README.md")
    summed(made, name)
    (host.folder / "bin/ssh").write_text('#!/bin/sh\nfor remote; do :; done\neval "$remote"\n')
    (host.folder / "bin/runuser").write_text('#!/bin/sh\nshift 3\nexec "$@"\n')
    (host.folder / "bin/runuser").chmod(0o755)
    fetch.fetch(host.places, CONNECTION | {"jobs": str(host.folder / "jobs")}, "train1", FOLDER)
    arrived = host.places.candidates / FOLDER
    files = sorted(path.relative_to(made) for path in made.rglob("*") if path.is_file())
    assert sorted(path.relative_to(arrived) for path in arrived.rglob("*") if path.is_file()) == files
    assert all((arrived / path).read_bytes() == (made / path).read_bytes() for path in files)


@pytest.mark.parametrize(
    ("name", "folder"),
    [("-oProxyCommand=id", "a"), ("t;id", "a"), ("train1", "../a"), ("train1", "-a"), ("train1", "a b")],
)
def test_words_that_could_be_an_option_or_a_path_are_refused(
    name: str, folder: str, host: Host, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["release", "fetch", "-i", str(host.folder), "--", name, folder]) == 1
    assert "use letters, digits and . _ -" in capsys.readouterr().err
    assert not (host.folder / "arguments").exists()


HOSTILE = {
    "an absolute path": (member("/etc/cron.d/job", content=b"x"), "'/etc/cron.d/job' does not belong"),
    "a path that leads out": (member(f"{MODEL}/../../../../x.json"), "does not belong"),
    "another folder": (member("bundle/7/tree/site.yml"), "'bundle/7/tree/site.yml' does not belong"),
    "a file beside the model": (member("models/site.yml"), "'models/site.yml' does not belong"),
    "a program": (member(f"{MODEL}/modeling.py"), "is not a model file"),
    "a name for the terminal": (member(f"{MODEL}/{ESCAPE}.json"), "does not belong"),
    "a symbolic link": (member(f"{MODEL}/a.json", tarfile.SYMTYPE, link="/etc/shadow"), "is of type b'2'"),
    "a linked folder": (member("models", tarfile.SYMTYPE, link="/etc"), "is of type b'2'"),
    "a hard link": (member(f"{MODEL}/a.json", tarfile.LNKTYPE, link=f"{MODEL}/config.json"), "is of type b'1'"),
    "a device": (member(f"{MODEL}/a.json", tarfile.BLKTYPE), "is of type b'4'"),
    "a FIFO": (member(f"{MODEL}/a.json", tarfile.FIFOTYPE), "is of type b'6'"),
    "a file twice": (member(f"{MODEL}/config.json", content=b"{}"), "File exists"),
    "a file as a folder": (member(f"{MODEL}/config.json/a.json"), "Not a directory"),
    "one more file": (member(f"{MODEL}/more.json", content=b"{}"), f"{MODEL}/more.json is not in its manifest"),
    "one more model": (member("models/other/a.json", content=b"{}"), "models/other/a.json is not in its manifest"),
    "a second manifest": (member("models/other.sha256"), "is not a model file"),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_what_has_no_place_in_a_candidate_is_refused(what: str, host: Host) -> None:
    add, reason = HOSTILE[what]
    host.sends(archive(candidate(host.folder / "made"), add))
    assert reason in host.refused()


def _another_digest(folder: Path) -> None:
    path = folder / f"{MODEL}.sha256"
    path.write_text(path.read_text().replace("0", "1"))


def _path_out(folder: Path) -> None:
    with (folder / f"{MODEL}.sha256").open("a") as file:
        file.write(f"{'0' * 64}  ../../../../etc/{ESCAPE}passwd\n")


def _nested(folder: Path) -> None:
    (folder / MODEL / "training.json").write_text("[" * 100_000)
    summed(folder)


def _from_outside(folder: Path) -> None:
    path = folder / MODEL / "training.json"
    path.rename(path.with_name("provenance.json"))
    digests = {
        each.name: sha256(each) for each in (folder / MODEL).iterdir() if each.name != "provenance.json"
    }
    licence = {"name": "MIT", "accepted_by": "ada"}
    told = {"source": "hub:them/theirs", "purl": "", "licence": licence, "files": digests}
    (folder / MODEL / "provenance.json").write_text(json.dumps(told))
    summed(folder)


def _unpromoted(folder: Path) -> None:
    (folder / MODEL / "verdict.json").write_text('{"verdict": "hold"}')
    summed(folder)


FORGED = {
    "other digests": (_another_digest, "its manifest says"),
    "a path that leads out": (_path_out, "is missing"),
    "JSON without end": (_nested, "is not a complete candidate"),
    "a licence that a person accepted elsewhere": (_from_outside, "hosts have only models that they trained"),
    "no promotion": (_unpromoted, "is not a complete candidate"),
}


@pytest.mark.parametrize("what", FORGED)
def test_a_candidate_that_contradicts_itself_is_refused(what: str, host: Host) -> None:
    forge, reason = FORGED[what]
    made = candidate(host.folder / "made")
    forge(made)
    host.sends(archive(made))
    assert reason in host.refused()


WEIGHTS = f"{MODEL}/a.safetensors"
NEGATIVE = bytearray(header(WEIGHTS, tarfile.REGTYPE, 0))
NEGATIVE[124:136] = b"\xff" * 11 + b"\xfe"  # -2, in base 256
NEGATIVE[148:156] = b"%06o\0 " % (256 + sum(NEGATIVE[:148]) + sum(NEGATIVE[156:]))
BOMBS = {
    "a sparse file": (header(WEIGHTS, tarfile.GNUTYPE_SPARSE, 1 << 50), "is of type b'S'"),
    "a file larger than the disk": (header(WEIGHTS, tarfile.REGTYPE, 1 << 60), "more than fit"),
    "a text larger than texts are": (
        header(f"{MODEL}/a.json", tarfile.REGTYPE, 1 << 30),
        "but such a file may have",
    ),
    "an extended header larger than memory": (header("x", tarfile.XHDTYPE, 1 << 40), "is of type b'x'"),
    "a global header": (header("x", tarfile.XGLTYPE, 10), "is of type b'g'"),
    "a name larger than memory": (header("x", tarfile.GNUTYPE_LONGNAME, 1 << 40), "is of type b'L'"),
    "names without end": ((header("x", tarfile.GNUTYPE_LONGNAME, 1) + b"x" * 512) * 5000, "more than 4096"),
    "members without end": (header("models", tarfile.DIRTYPE, 0) * 5000, "more than 4096"),
    "a folder with content": (header("models", tarfile.DIRTYPE, 1 << 50), "does not belong"),
    "a size below nothing": (bytes(NEGATIVE), "with -2 bytes"),
}


@pytest.mark.parametrize("what", BOMBS)
def test_what_would_fill_disk_or_memory_is_refused_before_it_does(what: str, host: Host) -> None:
    stream, reason = BOMBS[what]
    host.sends(stream)
    (host.folder / "endless").symlink_to("/dev/zero")  # a host that never ends
    assert reason in host.refused()


@pytest.mark.parametrize(("length", "code"), [(0, 255), (700, 0), (3000, 2), (-5000, 0), (-12000, 0)])
def test_a_stream_that_is_cut_off_is_refused(length: int, code: int, host: Host) -> None:
    host.sends(
        archive(candidate(host.folder / "made", b"\1" * 50_000))[:length], code, f"{ESCAPE}Connection closed"
    )
    reason = host.refused()
    assert ("Connection closed" in reason) == bool(code)


@pytest.mark.parametrize("stream", [b"Welcome to train1!\n", b"\xff" * 100_000, b"\0" * 100_000])
def test_what_is_no_archive_is_refused(stream: bytes, host: Host) -> None:
    host.sends(stream)
    assert "round-1-candidate of train1 was refused, and nothing was kept: " in host.refused()


def test_what_follows_the_archive_is_refused(host: Host) -> None:
    host.sends(archive(candidate(host.folder / "made")) + b"more" * 10_000)
    assert "there is data after the end of the archive" in host.refused()


def test_a_tar_that_failed_after_all_is_refused(host: Host) -> None:
    host.sends(archive(candidate(host.folder / "made")), 1, "tar: models: file changed as we read it")
    assert "ended with 1: tar: models: file changed as we read it" in host.refused()


def test_what_a_host_says_reaches_no_terminal_as_control_characters(
    host: Host, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inventory = host.folder / "hosts.yml"
    inventory.write_text('{"all": {"children": {"train": {"hosts": {"train1": {}}}}}}')
    monkeypatch.setattr(release, "Places", lambda: host.places)
    host.sends(b"", 255, f"{ESCAPE}all is well")
    assert cli.main(["release", "fetch", "train1", FOLDER, "-i", str(inventory)]) == 1
    message = capsys.readouterr().err
    assert "all is well" in message
    assert "\x1b" not in message


def test_a_reason_of_several_lines_is_no_line_of_its_own_when_it_is_signed(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    sealing_double.use(monkeypatch, release, release)
    release.init(host.places, None)
    made = candidate(host.folder / "made", verdict="", unproved="late\n  llmkeep run theirs.yml")
    (made / MODEL / "verdict.json").unlink()
    told = json.loads((made / MODEL / "training.json").read_text())
    del told["published"]["verdict"]
    (made / MODEL / "training.json").write_text(json.dumps(told))
    summed(made)
    assert "\n" not in release.sign(host.places, made)


def test_what_a_killed_run_left_is_removed_by_the_next(host: Host) -> None:
    left = host.places.candidates / ".abc123/models"
    left.mkdir(parents=True)
    (left / "a.json").write_text("half a file")
    host.sends(archive(candidate(host.folder / "made")))
    fetch.fetch(host.places, CONNECTION, "train1", FOLDER)
    assert [path.name for path in host.places.candidates.iterdir()] == [FOLDER]


@pytest.mark.parametrize("host_does", ["exec sleep 60", "while sleep 0.1; do printf x; done"])
def test_a_host_that_does_not_come_to_an_end_is_refused(
    host_does: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "MOST_SECONDS", 1)
    with pytest.raises(ReleaseError, match="did not finish within 1 s"):
        fetch.received(["sh", "-c", host_does], tmp_path, 10**9)
