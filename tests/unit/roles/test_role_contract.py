"""The contract that all roles keep (CONTRIBUTING.md: "A role"): one anatomy, typed variables, nothing forgiving."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import roledoc
import yaml

ROOT = Path(__file__).resolve().parents[3]
ROLES = sorted(path for path in (ROOT / "roles").glob("[!_]*/"))
YAML_FILES = sorted(
    path
    for folder in ("roles", "playbooks", "molecule", "inventory")
    for path in (ROOT / folder).rglob("*.yml")
)
TEMPLATES = sorted((ROOT / "roles").rglob("*.j2"))
VERBS = ("preflight", "install", "configure", "start", "verify")

FORGIVING = {
    "ignore_errors": re.compile(r"ignore_errors:"),
    "certificates not verified": re.compile(
        r"(validate_certs|verify):\s*(false|no)\b|curl .*(-k|--insecure)\b"
    ),
    "host keys not verified": re.compile(r"StrictHostKeyChecking=no|UserKnownHostsFile=/dev/null"),
    "always changed": re.compile(r"changed_when:\s*true"),
    "packages not signed": re.compile(r"allow_unauthenticated|trusted=yes|\[trusted"),
    "packages past llmkeep.estate.packages": re.compile(r"ansible\.builtin\.(apt|dpkg_selections|package):"),
    "shell": re.compile(r"^\s*(ansible\.builtin\.)?shell:", re.MULTILINE),
}


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def tasks_of(role: Path, name: str) -> list[dict[str, Any]]:
    path = role / "tasks" / f"{name}.yml"
    return load(path) or [] if path.exists() else []


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)
def test_main_reads_as_its_verbs(role: Path) -> None:
    """A verb of a task or two is a block, a longer one a file."""
    verbs = [task["name"].lower() for task in tasks_of(role, "main")]
    assert verbs == [verb for verb in VERBS if verb in verbs]
    assert {"preflight", "verify"} <= set(verbs)
    for task in tasks_of(role, "main"):
        assert "block" in task or task["ansible.builtin.import_tasks"] == f"{task['name'].lower()}.yml"


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)
def test_defaults_and_specified_options_have_the_same_names_and_each_option_is_described(role: Path) -> None:
    defaults = load(role / "defaults" / "main.yml") or {}
    options = load(role / "meta" / "argument_specs.yml")["argument_specs"]["main"]["options"]
    assert sorted(options) == sorted(defaults)
    for name, option in options.items():
        assert option.get("description"), f"{name} has no description"
        assert option.get("type"), f"{name} has no type"


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)
def test_variables_start_with_the_name_of_the_role(role: Path) -> None:
    defaults = load(role / "defaults" / "main.yml") or {}
    strangers = [name for name in defaults if not name.startswith(f"{role.name}_")]
    assert not strangers, f"{role.name} defines {strangers}"


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)
def test_verify_returns_named_checks_through_common(role: Path) -> None:
    ids = [check["id"] for check in roledoc.checks(role)]
    assert ids, f"{role.name} has no check"
    assert len(ids) == len(set(ids)), f"{role.name} names a check twice"
    assert all(name.startswith(f"{role.name}.") for name in ids), ids


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)
def test_every_check_has_a_mutation_that_breaks_it(role: Path) -> None:
    checks = {check["id"] for check in roledoc.checks(role)}
    mutations = load(ROOT / "molecule" / role.name / "scenario.yml")["mutations"]
    broken = {check for mutation in mutations for check in mutation["fails"]}
    assert checks <= broken, f"no mutation breaks {sorted(checks - broken)}"


@pytest.mark.parametrize("path", YAML_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_forgiving(path: Path) -> None:
    text = path.read_text()
    found = [what for what, pattern in FORGIVING.items() if pattern.search(text)]
    assert not found, f"{path.relative_to(ROOT)}: {', '.join(found)}"


# Ansible's filters on sets have another order in each run: a file with it would change for ever.
OF_SETS = re.compile(r"\|\s*(?:difference|intersect|symmetric_difference|union)\(")


@pytest.mark.parametrize(
    "path",
    [path for path in (*YAML_FILES, *TEMPLATES) if OF_SETS.search(path.read_text())],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_what_comes_of_a_set_is_sorted_or_counted(path: Path) -> None:
    text = path.read_text()
    rests = [re.split(r"[}%]\}|\n\n", text[found.end() :])[0] for found in OF_SETS.finditer(text)]
    assert not [rest for rest in rests if not re.search(r"\|\s*(?:sort|length)\b", rest)]


def imported(node: Any) -> Iterator[str]:
    """Names of the roles that tasks import or include, at any depth, without the collection's name."""
    if isinstance(node, list):
        for each in node:
            yield from imported(each)
    elif isinstance(node, dict):
        for key, value in node.items():
            if re.fullmatch(r"(ansible\.builtin\.)?(import|include)_role", key):
                yield value["name"].removeprefix("llmkeep.estate.")
            yield from imported(value)


def reached(role: Path) -> set[str]:
    """What a role takes from other roles: by an import, a dependency, or a path into their folders."""
    found: set[str] = set()
    for path in sorted(path for path in role.rglob("*") if path.is_file()):
        text = path.read_text()
        found |= set(re.findall(r"\.\./(\w+)/(?:defaults|files|handlers|meta|tasks|templates|vars)\b", text))
        if path.suffix == ".yml":
            found |= set(imported(yaml.safe_load(text)))
    meta = role / "meta/main.yml"
    dependencies = (load(meta) if meta.exists() else {}).get("dependencies", [])
    found |= {str(each["role"] if isinstance(each, dict) else each) for each in dependencies}
    return {name.removeprefix("llmkeep.estate.") for name in found} - {role.name}


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)
def test_a_role_takes_nothing_from_another_but_the_shared_floor(role: Path) -> None:
    assert reached(role) == {"_common"}


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("tasks/main.yml", "- ansible.builtin.import_role: {name: llmkeep.estate.redis, tasks_from: start}"),
        ("tasks/main.yml", "- block:\n    - include_role:\n        name: redis\n"),
        ("handlers/main.yml", "- name: x\n  ansible.builtin.include_role:\n    name: llmkeep.estate.redis\n"),
        ("templates/unit.j2", "{{ lookup('template', role_path ~ '/../redis/templates/redis.conf.j2') }}"),
        ("meta/main.yml", "dependencies: [{role: llmkeep.estate.redis}]"),
    ],
)
def test_a_role_that_reaches_into_another_is_found(file: str, text: str, tmp_path: Path) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(text)
    assert reached(tmp_path) == {"redis"}


def test_no_role_names_a_version_or_a_hash() -> None:
    pattern = re.compile(r"\b[0-9a-f]{64}\b|==\d+\.\d+")
    for path in (ROOT / "roles").rglob("*"):
        if path.is_file() and path.suffix in {".yml", ".j2"}:
            assert not pattern.search(path.read_text()), (
                f"{path}: versions and hashes live in artifacts.lock.yml"
            )


@pytest.mark.parametrize(
    "unit",
    sorted(
        [
            *(ROOT / "roles").glob("*/templates/llm-*.service.j2"),
            *(ROOT / "roles").glob("vllm/templates/*.service.j2"),
        ]
    ),
    ids=lambda path: path.name,
)
def test_a_unit_that_is_restarted_for_ever_rests_longer_each_time(unit: Path) -> None:
    lines = unit.read_text().splitlines()
    if "Restart=always" in lines:
        assert {"StartLimitIntervalSec=0", "RestartSteps=3", "RestartMaxDelaySec=4"} <= set(lines)
