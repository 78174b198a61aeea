"""From a hub on loopback (a stand-in, asked by the real huggingface_hub): what is pinned, compared, resumed and refused."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import model_add
import pytest
import sharded_deepseek
from hub_standin import HubStandIn, serving
from huggingface_hub import constants
from huggingface_hub.utils._http import close_session

from llmkeep.models.hub import git_blob

SHARD = "model-00002-of-00003.safetensors"
NAME = "deepseek-tiny"
CHUNK = constants.DOWNLOAD_CHUNK_SIZE
KILLS = int(os.environ.get("STORM", "3"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    stand_in = HubStandIn("deepseek-ai/DeepSeek-Tiny", sharded_deepseek.write(tmp_path / "repository"))
    with serving(stand_in):
        # Both are read from HF_ENDPOINT, once, when the client is imported.
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, stand_in.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", stand_in.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
        monkeypatch.setattr("time.sleep", lambda _: None)  # the client's, between its attempts
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield stand_in
        close_session()


@pytest.fixture
def into(tmp_path: Path) -> Path:
    return tmp_path / "out" / "candidate"


def nothing_left(into: Path) -> bool:
    return not into.parent.exists() or not list(into.parent.iterdir())


# ---------------------------------------------------------------- what is taken
def test_a_pinned_commit_becomes_a_candidate_with_the_hubs_digests(
    hub: HubStandIn, into: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = model_add.run(capsys, hub.source, into)
    assert code == 0, said
    told = model_add.provenance(into)
    assert (told["source"], told["endpoint"], told["commit"]) == (hub.source, hub.endpoint, hub.commit)
    assert told["purl"] == f"pkg:huggingface/{hub.repository}@{hub.commit}"
    assert (into / f"models/{NAME}/{SHARD}").read_bytes() == (hub.folder / SHARD).read_bytes()


def test_code_pickles_and_images_are_not_even_fetched(
    hub: HubStandIn, into: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model_add.run(capsys, hub.source, into)
    assert set(model_add.provenance(into)["left_out"]) == set(sharded_deepseek.NOT_TAKEN)
    for name in sharded_deepseek.NOT_TAKEN:
        assert not hub.fetched(name)


@pytest.mark.parametrize("revision", ["", "@main"])
def test_a_branch_is_refused_with_the_commit_that_it_is_now(
    revision: str, hub: HubStandIn, into: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = model_add.run(capsys, f"hub:{hub.repository}{revision}", into)
    assert (code, f"at present {hub.source}" in said) == (1, True), said


@pytest.mark.parametrize(
    "source", ["hub:model@x", "hub:../../x@y", "hub:a/../b", "hub:a/b/c@d", "hub:", "hub:-a/b"]
)
def test_refuses_a_repository_that_is_none(
    source: str, hub: HubStandIn, into: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = model_add.run(capsys, source, into)
    assert (code, "write hub:OWNER/REPO@COMMIT" in said, hub.requests) == (1, True, []), said


def test_an_endpoint_without_tls_is_refused(
    hub: HubStandIn, into: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://me:secret@hub.example")
    code, said = model_add.run(capsys, hub.source, into)
    assert (code, "HF_ENDPOINT is http://hub.example" in said, "secret" in said) == (1, True, False), said


# ---------------------------------------------------------------- tokens
def test_the_token_reaches_the_hub_and_neither_its_cdn_nor_any_output(
    hub: HubStandIn, into: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.token = "hf_verysecret"
    code, said = model_add.run(capsys, hub.source, into)
    assert (code, "answered 401" in said, "no token was sent" in said) == (3, True, True), said
    monkeypatch.setenv("HF_TOKEN", hub.token)
    hub.requests.clear()
    code, said = model_add.run(capsys, hub.source, into)
    assert (code, hub.token in said) == (0, False), said
    by_cdn = {each.path.startswith("/large/"): each.authorization for each in hub.requests}
    assert by_cdn == {True: None, False: "Bearer hf_verysecret"}
    for content in model_add.contents(into).values():
        assert hub.token.encode() not in content


# ---------------------------------------------------------------- refusals
FAULTS: dict[str, tuple[dict[str, tuple[int, dict[str, str]]], str]] = {
    "401": ({"/api/": (401, {})}, "private, gated or missing, and no token was sent"),
    "403": ({"/api/": (403, {"X-Error-Code": "GatedRepo"})}, "accept its terms on the hub's page"),
    "404": ({"/api/": (404, {"X-Error-Code": "RevisionNotFound"})}, "no such repository, commit or file"),
    "429": ({"/api/": (429, {"Retry-After": "77"})}, "run it again after 77 s"),
    "503": ({"/api/": (503, {})}, "answered 503"),
    "429 on a shard": ({SHARD: (429, {"Retry-After": "77"})}, "run it again after 77 s"),
    "404 on a shard": ({SHARD: (404, {"X-Error-Code": "EntryNotFound"})}, "answered 404"),
    "another server's page": ({"/api/": (200, {})}, "returned an invalid answer"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_hub_that_answers(
    fault: str, hub: HubStandIn, into: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.faults, words = FAULTS[fault]
    code, said = model_add.run(capsys, hub.source, into)
    assert (code, words in said) == (3, True), said
    assert not into.exists()
    if "shard" not in fault:
        assert nothing_left(into)
    hub.faults = {}
    assert model_add.run(capsys, hub.source, into)[0] == 0
    assert [path.name for path in into.parent.iterdir()] == ["candidate"]


def test_a_hub_that_says_nothing(
    hub: HubStandIn, into: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        code, said = model_add.run(capsys, hub.source, into)
    assert (code, "the limit is 1 s of silence" in said) == (3, True), said
    code, said = model_add.run(capsys, hub.source, into)
    assert (code, "did not answer" in said) == (3, True), said


@pytest.mark.parametrize("file", [SHARD, "tokenizer.json", "config.json"])
def test_a_hub_that_sends_other_bytes_is_refused_and_they_are_not_used(
    file: str, hub: HubStandIn, into: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.wrong = {file}
    code, said = model_add.run(capsys, hub.source, into)
    assert (code, f"{file} arrived with the digest" in said, into.exists()) == (4, True, False), said
    hub.wrong = set()
    assert model_add.run(capsys, hub.source, into)[0] == 0
    assert (into / f"models/{NAME}/{SHARD}").read_bytes() == (hub.folder / SHARD).read_bytes()


def test_a_hub_that_answers_with_another_commit_is_refused(
    hub: HubStandIn, into: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.claimed = "0" * 40
    code, said = model_add.run(capsys, hub.source, into)
    assert (code, f"answers with {'0' * 40}" in said, nothing_left(into)) == (4, True, True), said


def test_a_hub_that_states_no_digest_is_refused(
    hub: HubStandIn, into: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    listing = hub.listing()
    for entry in listing["siblings"]:
        entry.pop("blobId")
    monkeypatch.setattr(HubStandIn, "listing", lambda _: listing)
    code, said = model_add.run(capsys, hub.source, into)
    assert (code, "states no size or digest" in said, nothing_left(into)) == (4, True, True), said


@pytest.mark.parametrize("name", ["../config.json", "/etc/config.json", "a/../model.safetensors"])
def test_paths_that_lead_elsewhere_are_never_written(
    name: str,
    hub: HubStandIn,
    into: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    listing = hub.listing()
    listing["siblings"].append({"rfilename": name, "size": 3, "blobId": "0" * 40})
    monkeypatch.setattr(HubStandIn, "listing", lambda _: listing)
    assert model_add.run(capsys, hub.source, into)[0] == 0
    assert name in model_add.provenance(into)["left_out"]


# ---------------------------------------------------------------- interrupted downloads
def test_a_connection_that_ends_half_way_continues_at_the_byte(
    hub: HubStandIn, into: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 4096)
    hub.cut = {SHARD: 40_000}
    assert model_add.run(capsys, hub.source, into)[0] == 0
    assert [each.begin for each in hub.fetched(SHARD)] == [0, 40_000 // 4096 * 4096]
    assert (into / f"models/{NAME}/{SHARD}").read_bytes() == (hub.folder / SHARD).read_bytes()


def test_a_server_without_ranges_is_asked_for_everything_again(
    hub: HubStandIn, into: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.faults = {"model-00003": (404, {})}
    assert model_add.run(capsys, hub.source, into)[0] == 3
    (partial,) = into.parent.glob(f".candidate.partial-*/models/*/{SHARD}")
    os.truncate(partial, 1000)
    hub.faults, hub.ranges = {}, False
    assert model_add.run(capsys, hub.source, into)[0] == 0
    assert (into / f"models/{NAME}/{SHARD}").read_bytes() == (hub.folder / SHARD).read_bytes()


def test_bytes_of_another_commit_are_not_continued(
    hub: HubStandIn, into: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.faults = {"model-00003": (404, {})}
    assert model_add.run(capsys, hub.source, into)[0] == 3
    hub.faults, hub.commit = {}, "b" * 40
    hub.requests.clear()
    assert model_add.run(capsys, hub.source, into)[0] == 0
    assert [each.begin for each in hub.fetched(SHARD)] == [0]


def test_a_damaged_rest_of_an_earlier_run_is_fetched_again(
    hub: HubStandIn, into: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.faults = {"model-00003": (404, {})}
    assert model_add.run(capsys, hub.source, into)[0] == 3
    (partial,) = into.parent.glob(f".candidate.partial-*/models/*/{SHARD}")
    partial.write_bytes(bytes(5000))
    hub.faults = {}
    assert model_add.run(capsys, hub.source, into)[0] == 0
    assert (into / f"models/{NAME}/{SHARD}").read_bytes() == (hub.folder / SHARD).read_bytes()


def test_a_download_that_is_killed_fetches_at_most_one_chunk_twice(memory: Path) -> None:
    stand_in = HubStandIn("deepseek-ai/DeepSeek-Tiny", sharded_deepseek.write(memory / "repository", 1000))
    first = "model-00001-of-00003.safetensors"
    size, into = (stand_in.folder / first).stat().st_size, memory / "candidate"
    running: list[subprocess.Popen[str]] = []
    limit = 0

    def kill(file: str, sent: int) -> None:
        if file == first and sent >= limit and running[-1].poll() is None:
            running[-1].send_signal(signal.SIGKILL)
            running[-1].wait()

    def start() -> int:
        command = ["model", "add", stand_in.source, "--into", str(into), "--accept-licence", "deepseek"]
        with subprocess.Popen(
            [sys.executable, "-m", "llmkeep", *command],
            env=os.environ | {"HF_ENDPOINT": stand_in.endpoint, "NO_PROXY": "127.0.0.1"},
            stdout=subprocess.DEVNULL,
            text=True,
        ) as run:
            running.append(run)
            return run.wait()

    with serving(stand_in):
        stand_in.sending = kill
        kept = 0
        for number in range(1, KILLS + 1):
            limit = size * number // (KILLS + 1)
            assert start() == -signal.SIGKILL
            now = sum(path.stat().st_size for path in memory.glob(f".candidate.*/models/*/{first}"))
            assert now >= kept
            assert limit - now <= CHUNK + buffered(), "what arrived is on disk, but for the chunk in flight"
            kept = now
        limit = 2 * size
        assert start() == 0
        assert [each.begin for each in stand_in.fetched(first)][-1] == kept, (
            "nothing on disk is fetched again"
        )
    assert (into / f"models/{NAME}/{first}").read_bytes() == (stand_in.folder / first).read_bytes()


def buffered() -> int:
    """Most bytes that the kernel holds for a connection, which the client has not seen."""
    return int(Path("/proc/sys/net/ipv4/tcp_rmem").read_text().split()[2]) + (1 << 20)


def test_a_small_file_is_compared_by_gits_id(tmp_path: Path) -> None:
    (path := tmp_path / "config.json").write_text(json.dumps({}))
    run = subprocess.run(["git", "hash-object", path], capture_output=True, text=True, check=True)
    assert git_blob(path) == run.stdout.strip()


def test_another_name_or_a_misspelt_licence_costs_nothing_that_was_fetched(
    hub: HubStandIn, into: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.faults = {"model-00003": (404, {})}
    assert model_add.run(capsys, hub.source, into)[0] == 3
    assert model_add.run(capsys, hub.source, into, "--accept-licence", "depseek")[0] == 5
    hub.faults = {}
    hub.requests.clear()
    assert model_add.run(capsys, hub.source, into, "--name", "other")[0] == 0
    assert not hub.fetched(SHARD)
    assert sorted(path.name for path in (into / "models").iterdir()) == ["other", "other.sha256"]


def test_a_link_in_the_place_of_the_working_folder_is_not_followed(
    hub: HubStandIn, into: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.faults = {"model-00003": (404, {})}
    assert model_add.run(capsys, hub.source, into)[0] == 3
    (working,) = into.parent.iterdir()
    working.rename(tmp_path / "moved")
    working.symlink_to(tmp_path / "moved")
    code, said = model_add.run(capsys, hub.source, into)
    assert (code, "is not a folder, or is a symbolic link" in said) == (1, True), said
