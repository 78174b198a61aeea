"""Each role's README, from its argument specification and its checks: `python tests/roledoc.py` writes them."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
COMMON = ROOT / "roles/_common"
ROLES = sorted(path for path in (ROOT / "roles").iterdir() if not path.name.startswith("_"))


def render(role: Path) -> str:
    """The README of one role."""
    spec = yaml.safe_load((role / "meta/argument_specs.yml").read_text())["argument_specs"]["main"]
    lines = [f"# {role.name}", "", sentence(spec["short_description"])]
    for paragraph in spec.get("description", []):
        lines += ["", sentence(paragraph)]
    lines += ["", "## Variables", "", "| Name | Type | Default | Meaning |", "|---|---|---|---|"]
    for name, option in sorted(spec["options"].items()):
        lines += rows(name, option)
    if shared := shared_by(role):
        lines += [
            "",
            "## Shared variables",
            "",
            "Variables of `_common` and of other roles that this role reads. Set them for all hosts that they concern.",
            "",
        ]
        lines += ["| Name | Role | Type | Default | Meaning |", "|---|---|---|---|---|"]
        lines += [row(name, option, of) for name, (of, option) in sorted(shared.items())]
    lines += [
        "",
        "## Checks",
        "",
        "`playbooks/verify.yml` runs them; so do molecule and every run of the role.",
        "",
    ]
    lines += [f"- `{check['id']}`: {check['title']}" for check in checks(role)]
    return (
        "\n".join(lines)
        + "\n\n<!-- Written by tests/roledoc.py from meta/argument_specs.yml and tasks/verify.yml. -->\n"
    )


def checks(role: Path) -> list[dict[str, Any]]:
    """The checks that a role's verify.yml declares, wherever in it, in their order."""
    return list(declared(yaml.safe_load((role / "tasks/verify.yml").read_text())))


def declared(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict) and "id" in value:
        yield value
        return
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else []:
        yield from declared(each)


def sentence(text: str) -> str:
    """The text with its full stop."""
    text = text.strip()
    return text if text.endswith((".", ":")) else f"{text}."


def shared_by(role: Path) -> dict[str, tuple[str, dict[str, Any]]]:
    """Variables of _common and of other roles that a role reads: the role that declares each, and its option."""
    text = "\n".join(
        path.read_text()
        for folder in ("defaults", "handlers", "tasks", "templates", "vars")
        for path in sorted((role / folder).rglob("*"))
        if path.is_file()
    )
    words = set(re.findall(r"\w+", re.sub(r"^ *#.*$", "", text, flags=re.MULTILINE)))
    found = {}
    for of in [COMMON, *ROLES]:
        for name, option in declared_by(of).items():
            if of != role and name in words and not name.startswith("_"):
                found[name] = (of.name, option)
    return found


def declared_by(role: Path) -> dict[str, dict[str, Any]]:
    """The options of a role; of _common, those that its preflight declares for all roles."""
    specs = yaml.safe_load((role / "meta/argument_specs.yml").read_text())["argument_specs"]
    options: dict[str, dict[str, Any]] = specs["preflight" if role == COMMON else "main"]["options"]
    return options


def rows(name: str, option: dict[str, Any]) -> list[str]:
    """A variable's lines of the table: its own, and one for each option below it."""
    below = f"{name}[]" if option["type"] == "list" else name
    found = [row(name, option)]
    for each, inner in option.get("options", {}).items():
        found += rows(f"{below}.{each}", inner)
    return found


def row(name: str, option: dict[str, Any], of: str = "") -> str:
    """A variable's line of the table, in the table of shared ones with the role that declares it."""
    kind = option["type"] + (f" of {option['elements']}" if "elements" in option else "")
    default = "required" if option.get("required") else f"`{shown(option.get('default'))}`"
    meaning = option["description"]
    meaning = " ".join(meaning) if isinstance(meaning, list) else meaning
    if "choices" in option:
        meaning = f"{sentence(meaning)} One of {', '.join(str(choice) for choice in option['choices'])}"
    role = f" {of} |" if of else ""
    return f"| `{name}` |{role} {kind} | {default} | {cell(sentence(meaning))} |"


def shown(value: object) -> str:
    """A default as one would write it in an inventory, on one line."""
    if value is None:
        return "derived"
    if isinstance(value, str):
        return cell(" ".join(value.split())) or '""'
    flow = yaml.safe_dump(value, default_flow_style=True, width=10_000, sort_keys=False)
    return cell(flow.removesuffix("\n").removesuffix("\n...").strip())


def cell(text: str) -> str:
    """Text that does not end a table's cell."""
    return text.replace("|", "\\|").replace("\n", " ")


def main() -> None:
    for role in ROLES:
        (role / "README.md").write_text(render(role))


if __name__ == "__main__":
    main()
