"""Formats of what modules store on hosts and the control node: the state of an earlier version is read, a newer one refused.

tests/unit/state_of_5b8e76ea was written by that commit's code.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from plugin_modules import ROOT, load

luks_escrow, luks_escrow_drill = load("modules.luks_escrow"), load("modules.luks_escrow_drill")
luks_erase, luks_swap = load("modules.luks_erase"), load("modules.luks_swap")
volumes, hsm_pin = load("module_utils.volumes.volume"), load("modules.hsm_pin")
softhsm_tokens = load("modules.softhsm_tokens")
record, cluster = load("module_utils.volumes.record"), load("module_utils.cluster.record")
rollout, token_keys = load("module_utils.config.rollout"), load("module_utils.hsm.token_keys")

OLD = ROOT / "tests/unit/state_of_5b8e76ea"
VOLUME, UUID = "llm1/data", "0b4e9d06-9a52-4a7e-b8b1-5d2a0b6a3c11"
GIVEN = {"volume": VOLUME, "uuid": UUID, "serial": "LLM1-DATA-1", "recovery_cms": "", "header_cms": ""}
ENTRY = "control/var/lib/llmkeep/storage/llm1-data.json"
RECORD = "host/var/lib/llmkeep/luks/data.json"
SWAP = "host/var/lib/llmkeep/luks/swap.swap.json"
ERASED = "host/var/lib/llmkeep/luks/old.erased.json"
UPGRADE = "host/var/lib/llmkeep/gpu/upgrade.json"
TOKENS = "host/var/lib/llmkeep/hsm.json"
ROTATION = "host/var/lib/llmkeep/hsm-pin.json"
SOFTHSM = "host/var/lib/softhsm/llmkeep-tokens.json"
APPLIED = "control/var/lib/llmkeep/kubernetes/main/applied.json"
REFUSAL = r"{} has format 2, and this llmkeep reads 1: bundle serial 9 wrote it\. .*bundle at least as new"


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A copy of what 5b8e76ea stored."""
    shutil.copytree(OLD, tmp_path / "state")
    return tmp_path / "state"


@pytest.fixture(autouse=True)
def disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Records are read once their disk is found."""
    monkeypatch.setattr(volumes.disks, "disk_of", lambda *_: SimpleNamespace(path=Path("/dev/sdb")))


def volume(path: Path) -> Any:
    return volumes.Volume("data", "LLM1-DATA-1", 0, {}, Path(), "", path.parent).known


def swap(path: Path) -> Any:
    given = {
        "name": "swap",
        "serial": "LLM1-SWAP-1",
        "device": None,
        "size": 0,
        "state_dir": str(path.parent),
    }
    return luks_swap.settle(given, False)


def rotation(path: Path) -> Any:
    return hsm_pin.Rotation(None, {}, path, "0" * 64)


def softhsm(path: Path) -> Any:
    return softhsm_tokens.settle({"record": str(path)}, False)


# By what reads it: the file, the reader, and the exception that its module turns into a failure.
READERS: dict[str, tuple[str, Callable[[Path], object], Any]] = {
    "register": (ENTRY, lambda path: luks_escrow.register(path.parent), luks_escrow.Refused),
    "store": (
        ENTRY,
        lambda path: luks_escrow.store(path.parent, GIVEN | {"recovery_cms": "new"}, False),
        luks_escrow.Refused,
    ),
    "bury": (
        ENTRY,
        lambda path: luks_escrow.bury(path.parent, GIVEN | {"certificate": {}}, False),
        luks_escrow.Refused,
    ),
    "dates": (ENTRY, lambda path: luks_escrow.dates(path.parent, VOLUME), luks_escrow.Refused),
    "drill": (
        ENTRY,
        lambda path: luks_escrow_drill.drill(path.parent, VOLUME, Path("escrow.key")),
        luks_escrow.Refused,
    ),
    "volume": (RECORD, volume, record.Refused),
    "erasure": (RECORD, lambda path: luks_erase.doomed(path.parent, "data", UUID), record.Refused),
    "other volume": (RECORD, lambda path: luks_erase.others(path.parent, "old"), record.Refused),
    "swap": (SWAP, swap, record.Refused),
    "certificate": (ERASED, lambda path: record.read(path), record.Refused),
    "progress": (UPGRADE, rollout.load, rollout.Failed),
    "tokens": (TOKENS, lambda path: token_keys.recorded(str(path)), token_keys.Fault),
    "rotation": (ROTATION, rotation, token_keys.Fault),
    "SoftHSM": (SOFTHSM, softhsm, token_keys.Fault),
    "cluster": (APPLIED, lambda path: cluster.Record(path.parent).applied(), record.Refused),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_document_of_a_newer_format_is_refused_and_nothing_is_written(state: Path, reader: str) -> None:
    name, read, refusal = READERS[reader]
    path = state / name
    document = json.loads(path.read_bytes())
    changed = document if isinstance(document, dict) else {"objects": document}
    path.write_text(json.dumps(changed | {"format": 2, "bundle": 9}))
    before = {each: each.read_bytes() for each in state.rglob("*") if each.is_file()}
    with pytest.raises(refusal, match=REFUSAL.format(path)):
        read(path)
    assert {each: each.read_bytes() for each in state.rglob("*") if each.is_file()} == before


def test_the_state_of_an_earlier_version_is_read_as_it_was_written(state: Path) -> None:
    assert luks_escrow.register((state / ENTRY).parent) == [
        {"uuid": UUID, "serial": "LLM1-DATA-1", "volume": VOLUME}
    ]
    assert luks_escrow.dates((state / ENTRY).parent, VOLUME)["drilled"] == "2026-11-28T09:00:00+00:00"
    known = volume(state / RECORD)
    assert (known.uuid, known.phase, known.owned_by("hsm"), known.format) == (UUID, "done", [1], 1)
    assert luks_erase.doomed((state / RECORD).parent, "data", UUID)[1] == {"llm1-1"}
    assert record.read(state / SWAP)["done"]
    assert record.read(state / ERASED)["key_slots_destroyed"]
    assert rollout.load(state / UPGRADE) == rollout.Progress("done", "new (nvidia 2.0)", "", {"name": "old"})
    assert token_keys.recorded(str(state / TOKENS))["llmkeep"]["serial"] == "1a"
    assert rotation(state / ROTATION).entries["llmkeep"].changed
    assert [each["kind"] for each in cluster.Record((state / APPLIED).parent).applied()] == ["Namespace"]


def test_an_entry_of_an_earlier_version_is_not_rewritten(state: Path) -> None:
    path = state / ENTRY
    before = path.read_bytes()
    assert (
        luks_escrow.store(path.parent, GIVEN | {"recovery_cms": "recovery", "header_cms": "header"}, False)
        == []
    )
    assert path.read_bytes() == before


def test_what_is_written_names_its_format_and_a_second_run_changes_nothing(state: Path) -> None:
    folder = state / "new"
    given = GIVEN | {"recovery_cms": "recovery", "header_cms": "header"}
    assert luks_escrow.store(folder, given, False)
    assert luks_escrow.store(folder, given, False) == []
    rollout.save(state / UPGRADE, rollout.load(state / UPGRADE))
    rotation(state / ROTATION).keep()
    for path in (folder / "llm1-data.json", state / UPGRADE, state / ROTATION):
        assert json.loads(path.read_bytes())["format"] == 1
    assert rotation(state / ROTATION).entries["llmkeep"].changed


@pytest.mark.parametrize("name", [TOKENS, SOFTHSM])
def test_a_token_may_be_labelled_format(state: Path, name: str) -> None:
    known = json.loads((state / name).read_bytes())
    load("module_utils.config.formats").require(state / name, {"format": known["llmkeep"]}, record.Refused)
