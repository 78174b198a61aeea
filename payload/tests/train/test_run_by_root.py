"""Root runs `compare`, `publish` and `feedback` as the job's user: a link of the job opens and overwrites nothing of root's."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from saved_adapters import manifest_of, saved_adapter
from tiny import make_model

from llmcore.manifest import verified, write_manifest
from llmcore.privileges import owner
from llmtrain import exits

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can work as another user")
PAYLOAD = Path(__file__).parents[2]
# The job's user imports the payload, too.
READABLE_TREE = PAYLOAD.parent / "tests/helpers/readable-tree"
JOB_USER = 65534  # an account without files of its own


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("root")
    make_model(folder / "base")
    (folder / "base/model.safetensors").chmod(0o644)
    write_manifest(folder / "base", manifest_of(folder / "base"))
    saved_adapter(folder / "base", folder / "adapter")
    return folder / "base"


@pytest.fixture
def folder() -> Iterator[Path]:
    """Which all may enter."""
    with tempfile.TemporaryDirectory() as made:
        Path(made).chmod(0o755)
        yield Path(made)


@pytest.fixture
def estate(base: Path, folder: Path) -> Path:
    """A base that all may read, a job's folder in `jobs`, and in `private` an adapter that only root can read."""
    shutil.copytree(base, folder / "base")
    shutil.copy(manifest_of(base), folder / "base.sha256")
    job = folder / "jobs/sql"
    job.mkdir(parents=True)
    (folder / "private").mkdir(mode=0o700)
    for place in (job, folder / "private"):
        shutil.copytree(base.parent / "adapter", place / "adapter")
        shutil.copy(base.parent / "adapter.sha256", place)
    training = {
        "job": {"model": str(folder / "base"), "method": {"kind": "lora"}},
        "base_model": {"revision": verified(base)[:16]},
    }
    (job / "training.json").write_text(json.dumps(training))
    rows = (json.dumps({"text": f"text {number}"}) for number in range(40))
    (folder / "eval.jsonl").write_text("\n".join(rows))
    (folder / "gate.yaml").write_text(
        "margins: {bits_per_byte: 0.9}\nspeed: {prompts: 2, rounds: 4, tokens: 2}\n"
    )
    hand_over(folder / "jobs")
    return folder


def hand_over(folder: Path) -> None:
    """To the user of jobs, as role llm_training does."""
    for path in (folder, *folder.rglob("*")):
        os.chown(path, JOB_USER, JOB_USER, follow_symlinks=False)


def link_to_private(estate: Path) -> None:
    """What a job does to have root take another adapter than its own."""
    job = estate / "jobs/sql"
    for name in ("adapter", "adapter.sha256"):
        (job / name).rename(job / f"own-{name}")
        (job / name).symlink_to(estate / "private" / name)
    hand_over(job)


def run(estate: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(PAYLOAD), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [READABLE_TREE, sys.executable, "-m", "llmtrain", *arguments],
        env=environment, cwd=estate, capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip


def publish(estate: Path, into: str) -> subprocess.CompletedProcess[str]:
    return run(estate, "publish", "jobs/sql", "--into", into, "--unproved", "a test", "--licence", "MIT")


def compare(estate: Path) -> subprocess.CompletedProcess[str]:
    sides, verdict = ("base", "base+jobs/sql/adapter"), "jobs/sql/verdict.json"
    return run(
        estate, "compare", *sides, "--data", "eval.jsonl", "--rule", "gate.yaml", "--out", verdict, "--json"
    )


def test_a_job_is_published_by_its_own_user(estate: Path) -> None:
    made = publish(estate, "jobs/candidate")
    assert made.returncode == exits.DONE, made.stderr
    card = estate / "jobs/candidate/models/sql/README.md"
    assert card.stat().st_uid == JOB_USER


def test_a_job_cannot_have_root_publish_an_adapter_that_it_cannot_read(estate: Path) -> None:
    link_to_private(estate)
    made = publish(estate, "jobs/candidate")
    assert made.returncode == exits.USAGE, made.stderr
    assert f"user {JOB_USER} has no access to jobs/sql/adapter" in made.stderr
    assert not (estate / "jobs/candidate").exists()


def test_a_folder_that_the_job_s_user_cannot_write_is_named(estate: Path) -> None:
    made = publish(estate, "candidate")
    assert made.returncode == exits.USAGE
    assert f"user {JOB_USER} has no access to .candidate.partial" in made.stderr


def test_a_job_cannot_have_root_compare_an_adapter_that_it_cannot_read(estate: Path) -> None:
    link_to_private(estate)
    made = compare(estate)
    assert made.returncode == exits.USAGE, made.stdout
    assert f"user {JOB_USER} has no access to jobs/sql/adapter" in made.stderr


def test_a_job_cannot_have_root_overwrite_a_file_by_the_verdict(estate: Path) -> None:
    victim = estate / "private/victim"
    victim.write_text("root's")
    (estate / "jobs/sql/verdict.json.partial").symlink_to(victim)
    made = compare(estate)
    assert victim.read_text() == "root's", made.stderr
    assert made.returncode == exits.USAGE
    assert f"user {JOB_USER} has no access to jobs/sql/verdict.json.partial" in made.stderr


def export(folder: Path) -> subprocess.CompletedProcess[str]:
    """Of the copy of a journal that lies with the jobs, beside a held-out set of which they know nothing."""
    given = ["--journal", "jobs/journal", "--since", "2026-11-01", "--kind", "kto", "--held-out", "private"]
    return run(folder, "feedback", "export", *given, "--out", "jobs/kto")


def test_ratings_are_exported_by_the_job_s_user_without_what_only_root_knows(folder: Path) -> None:
    head = {"@timestamp": "2026-11-27T08", "user.id": "ada", "organization.id": "research"}
    (folder / "jobs/journal").mkdir(parents=True)
    for kind, said in (
        ("rated", {"thumb": "up"}),
        ("answered", {"prompt": "who wrote Faust", "answer": "Goethe"}),
    ):
        with (folder / f"jobs/journal/{kind}-20261127T08.jsonl").open("w") as file:
            for number in range(2):
                text = {"prompt": f"{said['prompt']} {number}"} if kind == "answered" else {}
                fields = {f"llmkeep.feedback.{name}": value for name, value in (said | text).items()}
                file.write(json.dumps(head | {"transaction.id": f"t{number}"} | fields) + "\n")
    (folder / "private").write_text('{"prompt": "who wrote Faust 1"}\n')
    (folder / "private").chmod(0o600)
    hand_over(folder / "jobs")
    made = export(folder)
    assert made.returncode == exits.DONE, made.stderr
    assert (folder / "jobs/kto/kto.jsonl").stat().st_uid == JOB_USER
    assert json.loads((folder / "jobs/kto/export.json").read_text())["rejected"] == {"held_out": 1}

    (folder / "jobs/journal/rated-20261127T08.jsonl").unlink()
    (folder / "jobs/journal/rated-20261127T08.jsonl").symlink_to(folder / "private")
    shutil.rmtree(folder / "jobs/kto")
    refused = export(folder)
    assert refused.returncode == exits.USAGE
    assert f"user {JOB_USER} has no access to jobs/journal/rated-20261127T08.jsonl" in refused.stderr


def test_what_was_forgotten_is_removed_by_the_export_s_user(folder: Path) -> None:
    ids, victim = folder / "ids", folder / "victim"
    for path, text in (ids, "t0\n"), (victim, '{"id": "t0"}\n'):
        path.write_text(text)
        path.chmod(0o600)
    made = folder / "jobs/kto"
    made.mkdir(parents=True)
    (made / "export.json").write_text('{"kind": "kto"}')
    (made / "kto.jsonl").write_text('{"id": "t0"}\n')
    (made / "rejects.jsonl").symlink_to(victim)
    hand_over(folder / "jobs")
    remove = ["feedback", "remove", "--ids", "ids", "jobs/kto"]
    refused = run(folder, *remove)
    assert refused.returncode == exits.USAGE, refused.stdout
    assert f"user {JOB_USER} has no access to jobs/kto/rejects.jsonl" in refused.stderr
    (made / "rejects.jsonl").unlink()
    (made / "rejects.jsonl").write_text("")
    hand_over(folder / "jobs")
    done = run(folder, *remove)
    assert done.returncode == exits.DONE, done.stderr
    assert (made / "kto.jsonl").stat().st_uid == JOB_USER


def paths(folder: Path) -> None:
    """A folder of root's and one of a job, with links of both."""
    (folder / "base").mkdir()
    (folder / "jobs").mkdir()
    (folder / "jobs/x").symlink_to(folder / "base")
    hand_over(folder / "jobs")
    (folder / "sent").symlink_to("jobs")
    (folder / "looks").symlink_to("base")


@pytest.mark.parametrize(
    "name", ["jobs", "jobs/none", "jobs/x", "sent/x", "base/../jobs/x", "looks/../sent/x"]
)
def test_a_path_belongs_to_the_first_user_who_can_change_where_it_leads(folder: Path, name: str) -> None:
    paths(folder)
    assert owner(folder / name) == JOB_USER


@pytest.mark.parametrize("name", ["", "base", "none", "looks", "base/none/jobs"])
def test_what_only_root_can_change_is_root_s(folder: Path, name: str) -> None:
    paths(folder)
    assert owner(folder / name) == 0
