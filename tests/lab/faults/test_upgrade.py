"""A new release while users ask: one gateway after the other, record and engines too where that is asked for, and back where
it does not work. Nobody notices any of it."""

import base64
import csv
import hashlib
import io
import zipfile
from dataclasses import replace
from pathlib import Path

from estate import BUNDLE, CLIENTS, Client, Lab, answers, carry, load, sign_as_builder

from llmkeep.bundle import manifest

LINKS = "cd /opt/llmkeep && readlink units/llm-*.service current"
PIDS = "systemctl show --property=MainPID --value llm-audit.service 'llm-engine@*.service'"
# A gateway that exits at once. Its configuration passes, since `llm-serve check` does not import it.
EXITS = b"raise SystemExit('this gateway exits, as the test wants it')\n"


def wheel_with(old: Path, target: Path, added: dict[str, bytes]) -> Path:
    """The payload's wheel, with something added to the end of some of its files, and its RECORD as of the result."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(old) as source, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as made:
        items = source.infolist()
        contents = {item.filename: source.read(item) + added.get(item.filename, b"") for item in items}
        (record,) = (name for name in contents if name.endswith(".dist-info/RECORD"))
        rows = [
            [name, recorded(contents[name]), str(len(contents[name]))] if name in added else [name, *rest]
            for name, *rest in csv.reader(contents[record].decode().splitlines())
        ]
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        contents[record] = text.getvalue().encode()
        for item in items:
            made.writestr(item, contents[item.filename])
    return target


def recorded(content: bytes) -> str:
    """A file's hash as in RECORD."""
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")


def carry_payload(lab: Lab, folder: Path, serial: int, added: dict[str, bytes]) -> None:
    """Put a bundle with another payload on the mirror, signed as its builder would: what changed, by a medium."""
    bundle = manifest.read(BUNDLE)
    (old,) = (BUNDLE / "wheels/serving").glob("llmkeep_payload-*.whl")
    wheel = wheel_with(old, folder / "wheels/serving" / old.name, added)
    listing = folder / "wheels/serving/requirements.txt"
    text = (BUNDLE / "wheels/serving/requirements.txt").read_text()
    listing.write_text(text.replace(sha256(old), sha256(wheel)))
    changed = {str(path.relative_to(folder)): path for path in (wheel, listing)}
    bundle.files = [
        replace(entry, size=changed[entry.path].stat().st_size, sha256=sha256(changed[entry.path]))
        if entry.path in changed
        else entry
        for entry in bundle.files
    ]
    bundle.serial += serial
    sign_as_builder(bundle, folder)
    carry(lab, folder)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def upgrade(lab: Lab, *more: str) -> str:
    """The playbook, as an operator runs it; its output, and how it ended in the last line."""
    command = " ".join(["llmkeep run playbooks/upgrade.yml -i inventory/lab", *more])
    return lab.on("ops1", f"{command}; echo ended with $?", timeout=900)


def test_a_release_whose_gateway_exits_is_left_by_itself_and_fails_no_request(
    estate: Lab, client: Client, tmp_path: Path
) -> None:
    answers(client)
    before = estate.on("llm1", LINKS)
    pids = estate.on("llm1", PIDS)
    carry_payload(estate, tmp_path / "broken", 2, {"llmserve/gateway/process.py": EXITS})
    with load(estate, client) as statuses:
        output = upgrade(estate)
    # What comes after finds a mirror whose payload works.
    carry_payload(estate, tmp_path / "works", 3, {"llmserve/__init__.py": b"# another release\n"})
    assert output.strip().endswith("ended with 1"), output[-3000:]
    assert "does not work here: llm-gateway@1.service" in " ".join(output.split())
    assert estate.on("llm1", LINKS) == before
    assert estate.on("llm1", PIDS) == pids
    assert set(statuses) == {200}
    assert "Paris" in answers(client)


def test_an_upgrade_under_load_replaces_gateways_then_record_and_engines_and_fails_no_request(
    estate: Lab, client: Client, tmp_path: Path
) -> None:
    before, pids = estate.on("llm1", LINKS).split(), estate.on("llm1", PIDS).split()
    carry_payload(estate, tmp_path, 4, {"llmserve/__init__.py": b"# with its engine\n"})
    with load(estate, client) as statuses:
        gateways = upgrade(estate)
        pids_between = estate.on("llm1", PIDS).split()
        output = upgrade(estate, "-e upgrade_engines=true")
    assert gateways.strip().endswith("ended with 0"), gateways[-3000:]
    assert pids_between == pids
    assert output.strip().endswith("ended with 0"), output[-3000:]
    after, new_pids = estate.on("llm1", LINKS).split(), estate.on("llm1", PIDS).split()
    assert len({name.split("/")[-1] for name in after}) == 1
    assert not {*before} & {*after}
    assert len(new_pids) == len(pids) == 3  # the record, and two models
    assert not {*pids} & {*new_pids}
    assert len(statuses) > CLIENTS
    assert set(statuses) == {200}
