"""Each role's README, from its argument specification and its checks: `python tests/roledoc.py` writes them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
ROLES = sorted(path for path in (ROOT / "roles").iterdir() if not path.name.startswith("_"))


def render(role: Path) -> str:
    """The README of one role."""
    spec = yaml.safe_load((role / "meta/argument_specs.yml").read_text())["argument_specs"]["main"]
    lines = [f"# {role.name}", "", sentence(spec["short_description"])]
    for paragraph in spec.get("description", []):
        lines += ["", sentence(paragraph)]
    lines += ["", "## Variables", "", "| Name | Type | Default | Meaning |", "|---|---|---|---|"]
    lines += [row(name, option) for name, option in sorted(spec["options"].items())]
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


def row(name: str, option: dict[str, Any]) -> str:
    """A variable's line of the table."""
    kind = option["type"] + (f" of {option['elements']}" if "elements" in option else "")
    default = "required" if option.get("required") else f"`{shown(option.get('default'))}`"
    meaning = option["description"]
    meaning = " ".join(meaning) if isinstance(meaning, list) else meaning
    if "choices" in option:
        meaning = f"{sentence(meaning)} One of {', '.join(str(choice) for choice in option['choices'])}"
    return f"| `{name}` | {kind} | {default} | {cell(sentence(meaning))} |"


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
