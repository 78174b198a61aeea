"""The mutation test of the roles' checks tests itself here: it has to notice a check that cannot fail."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from called_module import called
from plugin_modules import ROOT, load

load("module_utils.config.checks")  # puts the collection on the path, which the module is imported from
spec = importlib.util.spec_from_file_location("mutations", ROOT / "molecule/shared/library/mutations.py")
assert spec
assert spec.loader
mutations = importlib.util.module_from_spec(spec)
spec.loader.exec_module(mutations)


def check(name: str, file: Path) -> dict[str, Any]:
    """A check that the file says yes."""
    given = {"id": name, "title": name, "argv": ["cat", str(file)], "rc": 0, "stdout": "yes", "timeout": 10}
    return {**dict.fromkeys(mutations.OPTIONS), **given}


@pytest.fixture
def checks(tmp_path: Path) -> list[dict[str, Any]]:
    """Two checks of a role, each of a file of its own, both passing."""
    files = {name: tmp_path / name for name in ("a b", "two")}
    for file in files.values():
        file.write_text("yes")
    return [check("role.one", files["a b"]), check("role.two", files["two"])]


def breaking(checks: list[dict[str, Any]], *subjects: int) -> dict[str, Any]:
    """A mutation that breaks the subjects of these checks and mends them."""
    files = [checks[number]["argv"][1] for number in subjects]
    return {
        "fails": ["role.one"],
        "break": ["rm", "--force", "--", *files, "/nothing"],
        "repair": ["sh", "-c", 'for file; do printf yes > "$file"; done', "sh", *files],
    }


def test_exactly_the_named_check_failed(checks: list[dict[str, Any]]) -> None:
    seen = mutations.outcome([breaking(checks, 0)], checks)
    assert (seen["named"], list(seen["failed"])) == (["role.one"], ["role.one"])


@pytest.mark.parametrize(
    ("subjects", "failed"), [((), []), ((1,), ["role.two"]), ((0, 1), ["role.one", "role.two"])]
)
def test_any_other_outcome_is_told_and_mended_all_the_same(
    checks: list[dict[str, Any]], subjects: tuple[int, ...], failed: list[str]
) -> None:
    seen = mutations.outcome([breaking(checks, *subjects)], checks)
    assert sorted(seen["failed"]) == failed != seen["named"]
    assert "rm --force" in seen["by"]
    assert {Path(each["argv"][1]).read_text() for each in checks} == {"yes"}


def test_a_slow_check_is_run_only_where_a_mutation_names_it(checks: list[dict[str, Any]]) -> None:
    both = breaking(checks, 0, 1)
    assert list(mutations.outcome([both], checks, ["role.two"])["failed"]) == ["role.one"]
    both["fails"] = ["role.one", "role.two"]
    assert list(mutations.outcome([both], checks, ["role.two"])["failed"]) == ["role.one", "role.two"]


def test_a_file_is_kept_put_back_and_taken_in_both_times() -> None:
    mutation = {"break": ["rm", "a b"], "file": "/etc/a b", "then": ["systemctl", "reload", "x"]}
    assert [mutations.broken([mutation]), mutations.repaired([mutation])] == [
        "cp --archive '/etc/a b' /run/mutation.keep.0\nrm 'a b'\nsystemctl reload x",
        "mv --no-target-directory /run/mutation.keep.0 '/etc/a b'\nsystemctl reload x",
    ]


def test_a_round_is_mended_in_reverse_and_taken_in_once() -> None:
    both = [{"break": [word], "file": "/f", "then": ["reload"]} for word in ("one", "two")]
    assert mutations.broken(both).splitlines() == [
        "cp --archive /f /run/mutation.keep.0", "one",
        "cp --archive /f /run/mutation.keep.1", "two", "reload",
    ]  # fmt: skip
    assert mutations.repaired(both).splitlines() == [
        "mv --no-target-directory /run/mutation.keep.1 /f",
        "mv --no-target-directory /run/mutation.keep.0 /f", "reload",
    ]  # fmt: skip


def test_of_a_round_exactly_the_checks_of_all_its_mutations_failed(checks: list[dict[str, Any]]) -> None:
    second = {**breaking(checks, 1), "fails": ["role.two"]}
    seen = mutations.outcome([breaking(checks, 0), second], checks)
    assert seen["named"] == [*seen["failed"]] == ["role.one", "role.two"]
    assert [*mutations.outcome([breaking(checks), second], checks)["failed"]] == ["role.two"]


def test_mutations_are_broken_alone_or_with_their_round() -> None:
    given: list[dict[str, Any]] = [
        {"fails": [name], "round": name[:-1] or None} for name in ("a1", "b", "c", "a2")
    ]
    assert [[each["fails"][0] for each in together] for together in mutations.rounds(given)] == [
        ["a1", "a2"], ["b"], ["c"],
    ]  # fmt: skip


def test_a_round_that_breaks_a_check_twice_is_refused() -> None:
    with pytest.raises(mutations.MutationError, match=r"round files breaks \['role.one'\] twice"):
        mutations.rounds([{"fails": ["role.one"], "round": "files"}] * 2)


def test_a_mutation_that_cannot_be_made_ends_the_test(checks: list[dict[str, Any]]) -> None:
    with pytest.raises(mutations.MutationError, match=r"'false' ended with 1"):
        mutations.outcome([{**breaking(checks, 0), "break": ["false"]}], checks)


def test_a_check_that_the_role_does_not_have(checks: list[dict[str, Any]]) -> None:
    with pytest.raises(mutations.MutationError, match=r"role\.gone"):
        mutations.require_known([{**breaking(checks, 0), "fails": ["role.gone"]}], checks)


@pytest.mark.parametrize("lacking", ["", "no memory controller"])
def test_a_mutation_is_left_out_and_told_where_the_kernel_cannot_show_it(
    checks: list[dict[str, Any]],
    lacking: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(mutations.limits, "lacking", lambda limit: lacking if limit == "MemoryMax" else "")
    given = [{key: value for key, value in check.items() if value is not None} for check in checks]
    told = called(
        mutations,
        {"checks": given, "mutations": [{**breaking(checks, 0), "needs": "MemoryMax"}, breaking(checks, 0)]},
        capsys,
    )["took"]
    assert [line.split(":")[1] for line in told] == [" role.one", " role.one"]
    assert [line for line in told if "SKIPPED" in line] == (
        ["SKIPPED, no memory controller: role.one"] if lacking else []
    )


def test_what_a_host_cannot_enforce_is_no_failure_of_a_mutation(
    checks: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mutations.limits, "lacking", lambda _: "no means")
    proof = {**checks[1], "id": "role.bounded", "argv": ["false"], "limit": "MemoryMax"}
    assert list(mutations.outcome([breaking(checks, 0)], [*checks, proof])["failed"]) == ["role.one"]
