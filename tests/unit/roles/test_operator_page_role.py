"""What role operator_page gives the pages of experts and product owners."""

from pathlib import Path
from typing import Any

import yaml
from plugin_modules import ROOT
from rendered_role import content, hardened, rendered

HOSTS = {"llm1.estate.internal": "10.0.0.2"}
GIVEN: dict[str, Any] = {
    "role_path": str(ROOT / "roles/operator_page"),
    "__operator_page_current": {"stat": {"exists": True, "lnk_target": "releases/1"}},
    "estate_name": "llm1.estate.internal",
    "llm_serving_policy": "embedded",
}


def made(folder: Path, **variables: object) -> Any:
    groups = {"edge": ["llm1"], "prometheus": ["llm1"]}
    return rendered(folder, "operator_page", {}, "llm1", HOSTS, GIVEN | variables, groups, configured=True)


def test_what_experiments_found_is_brought_from_the_control_node(tmp_path: Path) -> None:
    verdicts = tmp_path / "verdicts"
    verdicts.mkdir()
    (verdicts / "support-12.json").write_text('[{"percent": 5}]\n')
    (verdicts / "notes.txt").write_text("not brought")
    tree = made(tmp_path, operator_page_verdicts=str(verdicts))
    folder = yaml.safe_load(content(tree, "web.yaml"))["verdicts"]
    assert content(tree, f"{folder}/support-12.json") == '[{"percent": 5}]'
    [brought] = [each for each in tree["tree"]["files"] if each["dest"].startswith(f"{folder}/")]
    assert (brought["group"], brought["mode"], brought.get("owner", "root")) == (
        "llm-gateway",
        "0640",
        "root",
    )
    [kept] = [each for each in tree["tree"]["directories"] if each["path"] == folder]
    assert (kept["exclusive"], kept["mode"]) == (True, "0750"), "what is no longer brought goes"


def test_the_page_may_write_into_the_gateways_journal_and_is_hardened(tmp_path: Path) -> None:
    tree = made(tmp_path)
    journal = yaml.safe_load(content(tree, "web.yaml"))["feedback"]
    gateway = (ROOT / "roles/llm_serving/templates/gateway.yaml.j2").read_text()
    assert f"feedback:\n  folder: {journal}\n" in gateway
    unit = content(tree, "llm-web.service")
    [state] = [
        line.partition("=")[2].split() for line in unit.splitlines() if line.startswith("StateDirectory=")
    ]
    assert Path(journal).name in state
    assert f"RequiresMountsFor={journal}\n" in unit, (
        "or a review would be in clear beside a volume that is shut"
    )
    hardened(tmp_path, "llm-web.service", unit, exposure=20)


def test_a_new_key_of_the_estate_reaches_the_page_in_each_step_of_a_rotation(tmp_path: Path) -> None:
    [secret] = yaml.safe_load((ROOT / "roles/llm_serving/tasks/estate_keys.yml").read_text())
    [restart] = [
        task["llmkeep.estate.systemd_units"]["units"]
        for task in yaml.safe_load((ROOT / "roles/operator_page/tasks/start.yml").read_text())
        if "llmkeep.estate.systemd_units" in task
    ]
    assert f"LoadCredentialEncrypted={secret['vars']['_common_secret_here']}\n" in content(
        made(tmp_path), "llm-web.service"
    )
    assert all(f"'{unit}'" in secret["vars"]["_common_secret_units"] for unit in restart)
    plays = yaml.safe_load((ROOT / "playbooks/rotate-estate-keys.yml").read_text())
    steps = [
        [
            (task["ansible.builtin.include_role"][name])
            for task in play["tasks"]
            for name in ("name", "tasks_from")
        ]
        for play in plays
        if play.get("hosts") == "serve"
    ]
    assert steps == [["llm_serving", "rotate_estate_keys", "operator_page", "start"]] * 2


def test_without_a_folder_nothing_is_brought(tmp_path: Path) -> None:
    tree = made(tmp_path)
    assert not [each for each in tree["tree"]["files"] if "/experiments/" in each["dest"]]
