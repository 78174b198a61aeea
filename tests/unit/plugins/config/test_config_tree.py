"""config_tree on plain files: all or nothing, validated, silent when nothing differs."""

import getpass
import grp
import hashlib
import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.errors import AnsibleFilterError
from plugin_modules import ROOT, load

config_tree = load("modules.config_tree")
ME, MY_GROUP = getpass.getuser(), grp.getgrgid(os.getgid()).gr_name
REFUSES = [sys.executable, "-c", "import sys; sys.exit('line 3: no such thing')"]
ACCEPTS = [sys.executable, "-c", "pass"]


def wanted(**parts: Any) -> dict[str, Any]:
    """Arguments as the module's specification completes them."""
    tree: dict[str, Any] = {
        "sysusers": None,
        "directories": [],
        "files": [],
        "secret_contents": {},
        "links": [],
        "validate": [],
        "units": [],
    }
    tree.update(parts)
    for entry in tree["files"] + tree["directories"] + tree["links"]:
        entry.setdefault("state", "present")
    for entry in tree["files"] + tree["directories"]:
        entry.setdefault("owner", ME)
        entry.setdefault("group", MY_GROUP)
    for entry in tree["files"]:
        entry.setdefault("mode", "0640")
        entry.setdefault("validate", None)
        entry.setdefault("secret", False)
    for entry in tree["directories"]:
        entry.setdefault("mode", "0755")
        entry.setdefault("exclusive", False)
    return tree


def everything_in(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(folder)): (
            b"" if path.is_dir() else path.read_bytes(),
            stat.S_IMODE(path.lstat().st_mode),
        )
        for path in sorted(folder.rglob("*"))
    }


def test_makes_a_tree_and_then_has_nothing_to_do(tmp_path: Path) -> None:
    def tree() -> dict[str, Any]:
        return wanted(
            directories=[{"path": str(tmp_path / "etc"), "mode": "0750"}],
            files=[{"dest": str(tmp_path / "etc/a.conf"), "content": "a\n", "validate": ACCEPTS}],
            links=[{"path": str(tmp_path / "etc/b.conf"), "target": "a.conf"}],
            validate=ACCEPTS,
        )

    assert config_tree.apply(tree(), check=False).changes
    assert (tmp_path / "etc/b.conf").read_text() == "a\n"
    assert stat.S_IMODE((tmp_path / "etc").stat().st_mode) == 0o750
    assert config_tree.apply(tree(), check=False).changes == []
    assert config_tree.apply(tree(), check=True).changes == []


def test_check_mode_names_every_change_and_makes_none(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("x")
    (tmp_path / "a").write_text("before\n")
    before = everything_in(tmp_path)
    tree = config_tree.apply(
        wanted(
            directories=[{"path": str(tmp_path / "d")}],
            files=[
                {"dest": str(tmp_path / "a"), "content": "after\n"},
                {"dest": str(tmp_path / "d/b"), "content": "b", "owner": "future-user"},
                {"dest": str(tmp_path / "old"), "state": "absent"},
            ],
            validate=REFUSES,
        ),
        check=True,
    )
    assert len(tree.changes) == 4
    assert tree.before[str(tmp_path / "a")] == "before\n"
    assert everything_in(tmp_path) == before


def test_a_file_that_its_program_refuses_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "good").write_text("old good")
    (tmp_path / "bad").write_text("old bad")
    before = everything_in(tmp_path)
    with pytest.raises(config_tree.Refused, match="no such thing"):
        config_tree.apply(
            wanted(
                files=[
                    {"dest": str(tmp_path / "good"), "content": "new good"},
                    {"dest": str(tmp_path / "bad"), "content": "new bad", "validate": REFUSES},
                ]
            ),
            check=False,
        )
    assert everything_in(tmp_path) == before


def test_a_tree_that_its_program_refuses_is_put_back_whole(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("old")
    (tmp_path / "kept").chmod(0o600)
    (tmp_path / "gone").write_text("still wanted by the old configuration")
    (tmp_path / "link").symlink_to("kept")
    (tmp_path / "folder").mkdir(mode=0o700)
    (tmp_path / "empty").mkdir(mode=0o700)
    before = everything_in(tmp_path)
    with pytest.raises(config_tree.Refused, match="Everything was restored"):
        config_tree.apply(
            wanted(
                directories=[
                    {"path": str(tmp_path / "made")},
                    {"path": str(tmp_path / "folder")},
                    {"path": str(tmp_path / "empty"), "state": "absent"},
                ],
                files=[
                    {"dest": str(tmp_path / "kept"), "content": "new"},
                    {"dest": str(tmp_path / "made/inside"), "content": "new"},
                    {"dest": str(tmp_path / "gone"), "state": "absent"},
                ],
                links=[{"path": str(tmp_path / "link"), "target": "made/inside"}],
                validate=REFUSES,
            ),
            check=False,
        )
    assert everything_in(tmp_path) == before
    assert (tmp_path / "link").readlink() == Path("kept")


def test_the_validator_sees_the_new_content_before_it_is_in_place(tmp_path: Path) -> None:
    target = tmp_path / "a"
    target.write_text("old")
    looks = (
        "import sys; from pathlib import Path; old, new = (Path(a).read_text() for a in sys.argv[1:3]);"
        "sys.exit((old, new) != ('old', 'new'))"
    )
    config_tree.apply(
        wanted(
            files=[
                {
                    "dest": str(target),
                    "content": "new",
                    "validate": [sys.executable, "-c", looks, str(target), "%s"],
                }
            ]
        ),
        check=False,
    )
    assert target.read_text() == "new"


def test_a_missing_validator_is_named_and_nothing_changes(tmp_path: Path) -> None:
    with pytest.raises(config_tree.Refused, match="no-such-program is not installed on this host"):
        config_tree.apply(
            wanted(
                files=[{"dest": str(tmp_path / "a"), "content": "x", "validate": ["no-such-program", "%s"]}]
            ),
            check=False,
        )
    assert list(tmp_path.iterdir()) == []


def test_an_exclusive_directory_loses_strangers_and_keeps_folders(tmp_path: Path) -> None:
    sources = tmp_path / "sources.list.d"
    (sources / "sub").mkdir(parents=True)
    (sources / "debian.sources").write_text("http")
    config_tree.apply(
        wanted(
            directories=[{"path": str(sources), "exclusive": True}],
            files=[{"dest": str(sources / "llmkeep.sources"), "content": "https"}],
        ),
        check=False,
    )
    assert sorted(path.name for path in sources.iterdir()) == ["llmkeep.sources", "sub"]


def test_a_secret_file_shows_no_difference(tmp_path: Path) -> None:
    tree = config_tree.apply(
        wanted(
            files=[{"dest": str(tmp_path / "s"), "content": None, "secret": True}],
            secret_contents={str(tmp_path / "s"): "canary-7f"},
        ),
        check=False,
    )
    assert (tmp_path / "s").read_text() == "canary-7f"
    assert "canary-7f" not in repr((tree.before, tree.after, tree.changes))


def test_a_symlink_in_the_place_of_a_file_is_replaced_and_its_target_left_alone(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("of another")
    (tmp_path / "resolv.conf").symlink_to("elsewhere")
    config_tree.apply(wanted(files=[{"dest": str(tmp_path / "resolv.conf"), "content": "ours"}]), check=False)
    assert not (tmp_path / "resolv.conf").is_symlink()
    assert (tmp_path / "elsewhere").read_text() == "of another"


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"files": [{"dest": "/nowhere/a", "content": "x", "owner": "no-such-user"}]}, "user 'no-such-user'"),
        ({"files": [{"dest": "/no-such-folder/a", "content": "x"}]}, "/no-such-folder is not a directory"),
        ({"files": [{"dest": "/etc", "content": "x"}]}, "/etc must be a file"),
        ({"files": [{"dest": "/nowhere/a", "content": "x", "mode": "rw"}]}, "not octal"),
    ],
)
def test_a_refusal_says_what_is_wrong(parts: dict[str, Any], message: str) -> None:
    with pytest.raises(config_tree.Refused, match=message):
        config_tree.apply(wanted(**parts), check=False)


def test_a_change_marks_the_units_that_have_to_read_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config_tree.atomic, "PENDING", tmp_path / "pending")
    tree = {"files": [{"dest": str(tmp_path / "a"), "content": "x"}], "units": ["redis-server.service"]}
    config_tree.apply(wanted(**tree), check=False)
    assert [path.name for path in (tmp_path / "pending").iterdir()] == ["redis-server.service"]
    (tmp_path / "pending/redis-server.service").unlink()
    config_tree.apply(wanted(**tree), check=False)
    assert list((tmp_path / "pending").iterdir()) == []


def test_of_a_file_that_is_somebody_elses_only_the_named_block_is_ours(tmp_path: Path) -> None:
    path = tmp_path / "crypttab"
    path.write_text("theirs - one")

    def with_content(content: str) -> list[str]:
        files = [{"dest": str(path), "content": content, "block": "llmkeep volumes"}]
        found: list[str] = config_tree.apply(wanted(files=files), check=False).changes
        return found

    assert with_content("ours\n")
    assert path.read_text() == "theirs - one\n# BEGIN llmkeep volumes\nours\n# END llmkeep volumes\n"
    path.write_text(path.read_text() + "theirs - two\n")
    assert with_content("ours anew\n")
    assert with_content("ours anew\n") == []
    assert "# BEGIN llmkeep volumes\nours anew\n# END llmkeep volumes\ntheirs - two\n" in path.read_text()
    assert with_content("")
    assert path.read_text() == "theirs - one\ntheirs - two\n"


def test_removes_files_links_and_the_directories_that_are_empty_then(tmp_path: Path) -> None:
    for folder in ("a", "a/b", "kept"):
        (tmp_path / folder).mkdir()
    for file in ("a/b/file", "kept/another"):
        (tmp_path / file).write_text("x")
    (tmp_path / "a/link").symlink_to("b/file")

    def tree() -> dict[str, Any]:
        return wanted(
            directories=[{"path": str(tmp_path / name), "state": "absent"} for name in ("a", "a/b", "kept")],
            files=[{"dest": str(tmp_path / "a/b/file"), "state": "absent"}],
            links=[{"path": str(tmp_path / "a/link"), "state": "absent"}],
        )

    assert config_tree.apply(tree(), check=True).changes
    assert config_tree.apply(tree(), check=False).changes
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == [
        "kept",
        "kept/another",
    ]
    assert config_tree.apply(tree(), check=False).changes == []


def test_a_sysusers_file_is_removed_and_its_accounts_stay(tmp_path: Path) -> None:
    (tmp_path / "users.conf").write_text("u future-user -\n")
    users = {"dest": str(tmp_path / "users.conf"), "content": "u future-user -\n", "state": "absent"}
    assert config_tree.apply(wanted(sysusers=users), check=False).changes == [
        f"removed: {tmp_path}/users.conf"
    ]
    assert config_tree.apply(wanted(sysusers=users), check=False).changes == []


def test_an_entry_for_each_item_knows_its_item_and_has_its_name() -> None:
    job = {"name": "sql", "memory": "2G"}
    filters = load("filter.config_tree")
    assert filters.for_each(
        [job], "job", dest="/etc/{}.yaml", template="job.yaml.j2", validate=["check", "%s"]
    ) == [
        {
            "dest": "/etc/sql.yaml",
            "template": "job.yaml.j2",
            "validate": ["check", "%s"],
            "vars": {"job": job},
        }
    ]
    assert filters.for_each(["a", 2], "name", dest="/{}/{}", state="absent") == [
        {"dest": "/a/a", "state": "absent"},
        {"dest": "/2/2", "state": "absent"},
    ]
    assert filters.for_each({"sql.mount": job}, "job", path="/etc/{}") == [{"path": "/etc/sql.mount"}]
    assert filters.named(["a", "b"], hold=True) == [{"name": "a", "hold": True}, {"name": "b", "hold": True}]


def test_volumes_are_told_to_the_host_by_size_and_by_what_the_control_node_stores() -> None:
    filters = load("filter.volumes")
    swap = {"name": "swap", "serial": "S", "size": "128M", "device": "/dev/vdd"}
    assert filters.swap_disks([swap]) == [{"name": "swap", "serial": "S", "size": 128 * 2**20}]
    stored = {"llm1/data": {"recovery": "r"}, "llm2/audit": {"recovery": "other"}}
    volumes = [{"name": "data"}, {"name": "audit"}]
    assert filters.volume_escrow(volumes, "llm1", stored) == {"data": {"recovery": "r"}, "audit": {}}
    assert filters.key_labels({"llm1": {"hsm_key_label": "one"}, "llm2": {}}, ["llm1", "llm2"]) == [
        "one",
        "llm2",
    ]


def test_hosts_share_the_pin_of_their_tokens_unless_each_names_its_own() -> None:
    filters = load("filter.volumes")
    defaults = yaml.safe_load((ROOT / "roles/_common/defaults/main.yml").read_text())
    shared = {"home": "llmkeep.hsm-pin", "name": "softhsm.user-pin", "tokens": ["llmkeep", "llmkeep-spare"]}
    assert [defaults[name] for name in ("hsm_pin", "hsm_token", "hsm_spare_token")] == [
        shared["home"],
        *shared["tokens"],
    ]
    assert filters.hsm_pins(["a", "b"], {"a": {}, "b": {}}) == [shared]
    own = {"hsm_pin": "llmkeep.hsm-pin-b", "hsm_token": "b", "hsm_spare_token": "b-spare"}
    assert filters.hsm_pins(["a", "b"], {"a": {}, "b": own}) == [
        shared,
        {"home": "llmkeep.hsm-pin-b", "name": "softhsm.user-pin-b", "tokens": ["b", "b-spare"]},
    ]
    with pytest.raises(AnsibleFilterError, match="the token llmkeep-spare has the PINs"):
        filters.hsm_pins(["a", "b"], {"a": {}, "b": {**own, "hsm_spare_token": "llmkeep-spare"}})


def test_hashes_of_what_was_written_are_kept_but_of_secrets_and_shared_files(tmp_path: Path) -> None:
    store, path = tmp_path / "kept/sha256.json", tmp_path / "etc"
    path.mkdir()

    def written(**parts: Any) -> set[str]:
        tree = wanted(**parts)
        config_tree.note_written(tree, config_tree.apply(tree, False), store)
        return {Path(name).name for name in json.loads(store.read_text())}

    files = [
        {"dest": str(path / "a"), "content": "a\n"},
        {"dest": str(path / "b"), "content": "b\n"},
        {"dest": str(path / "secret"), "content": "s\n", "secret": True},
        {"dest": str(path / "shared"), "content": "c\n", "block": "ours"},
    ]
    assert written(files=files) == {"a", "b"}
    assert stat.S_IMODE(store.stat().st_mode) == 0o600
    assert json.loads(store.read_text())[str(path / "a")] == hashlib.sha256(b"a\n").hexdigest()
    assert written(files=[{"dest": str(path / "a"), "state": "absent"}]) == {"b"}
    folder = {"path": str(path), "exclusive": True}
    assert written(directories=[folder], files=[{"dest": str(path / "d"), "content": ""}]) == {"d"}
    (path / "d").unlink()
    assert written(links=[{"path": str(path / "d"), "target": "a"}]) == set()
    store.write_text("{")
    assert written(files=files[:1]) == {"a"}
