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
    lines += [
        "",
        "```yaml",
        *play(role),
        "```",
        "",
        "## On a host",
        "",
        "What its tasks name; `*` stands for what a variable names.",
        "",
    ]
    lines += [
        f"- {what}: {', '.join(f'`{each}`' for each in found)}"
        for what, found in changes(role).items()
        if found
    ]
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


def play(role: Path) -> list[str]:
    """A play with the role, for a group that has it in the estate's playbooks."""
    hosts = [
        each["hosts"].replace("without_python", "")
        for path in sorted((ROOT / "playbooks").glob("*.yml"))
        for each in yaml.safe_load(path.read_text())
        if any(given["role"] == role.name for given in each.get("roles", []))
    ]
    return [f"- hosts: {re.findall('[a-z_]+', hosts[-1])[0]}", f"  roles: [llmkeep.estate.{role.name}]"]


def changes(role: Path) -> dict[str, list[str]]:
    """What the role installs, writes and starts, as far as its tasks name it; `*` for what a variable names."""
    tasks = [yaml.safe_load(path.read_text()) for path in sorted((role / "tasks").glob("*.yml"))]
    named = variables(role)
    packages = [
        name
        for given in [
            *called("packages", list(named.values())),
            *(v for k, v in named.items() if k.endswith("_packages")),
        ]
        for name in (given.values() if isinstance(given, dict) else given if isinstance(given, list) else [])
    ]
    files = [
        path
        for tree in called("llmkeep.estate.config_tree", tasks)
        for each in tree.get("files", [])
        for path in destinations(each, named)
    ]
    units = [
        unit
        for given in called("llmkeep.estate.systemd_units", tasks)
        for text in literal(given["units"], named)
        for unit in re.findall(r"(?<![\\\w@-])[a-z][\w@-]+\.(?:service|timer|path|socket)", text)
    ]
    return {
        "Packages": sorted({re.sub("{{.*?}}", "*", name) for name in packages}),
        "Files": sorted({path for path in files if path.startswith("/") and "{{" not in path}),
        "Units": sorted(set(units)),
    }


def variables(role: Path) -> dict[str, Any]:
    """What the role's own files say of its variables; of packages from a vendor and the lab's, the vendor's."""
    found: dict[str, Any] = {}
    for file in ("defaults/main.yml", "vars/main.yml", "vars/Debian.yml"):
        if (role / file).exists():
            found |= yaml.safe_load((role / file).read_text()) or {}
    return {
        name: value.get("package", value) if isinstance(value, dict) else value
        for name, value in found.items()
    }


def called(name: str, value: Any) -> Iterator[Any]:
    """What has this name, wherever in VALUE."""
    if isinstance(value, dict):
        if name in value:
            yield value[name]
        value = list(value.values())
    for each in value if isinstance(value, list) else []:
        yield from called(name, each)


def literal(value: Any, named: dict[str, Any]) -> list[str]:
    """The texts of a list, or of an expression, with those of the variables in it."""
    if isinstance(value, dict):
        return [text for each in value.values() for text in literal(each, named)]
    if isinstance(value, list):
        return [text for each in value for text in literal(each, named)]
    text = str(value)
    inner = [named[name] for name in re.findall(r"\w+", text) if "{{" in text and name in named]
    return [text, *(found for each in inner for found in literal(each, named))]


def destinations(entry: Any, named: dict[str, Any]) -> list[str]:
    """The paths of an entry of config_tree, which may be an expression that makes several."""
    if isinstance(entry, dict):
        given = [] if entry.get("state") == "absent" else [entry["dest"]]
    else:
        given = [
            f"{{{{ {name} }}}}{path}" if name else path
            for name, path in re.findall(r"dest=(\w+)?(?: ~ )?(?:'([^']*)')?", entry)
            if "state='absent'" not in entry
        ]
    paths = []
    for path in given:
        for _ in range(3):
            path = re.sub(r"{{ (\w+)(?:\.(\w+))? }}", lambda found: inserted(found, named), path)
        paths.append(re.sub(r"^{}", "/etc/systemd/system", path).replace("{}", "*"))
    return paths


def inserted(found: re.Match[str], named: dict[str, Any]) -> str:
    value = named.get(found[1])
    value = value.get(found[2]) if isinstance(value, dict) else value
    return value if isinstance(value, str) else found[0]


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
