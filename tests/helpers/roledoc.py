"""READMEs of the roles, from argument specifications and checks: `python tests/helpers/roledoc.py` writes them."""

import re
from collections.abc import Iterator
from pathlib import Path
from textwrap import wrap
from typing import Any

import yaml
from plugin_modules import load

ROOT = Path(__file__).resolve().parents[2]
COMMON = ROOT / "roles/_common"
FEATURES: list[dict[str, Any]] = yaml.safe_load((ROOT / "meta/features.yml").read_text())["features"]
ROLES = [ROOT / "roles" / row["role"] for row in FEATURES]


def listed() -> str:
    """The list of all roles."""
    lines = [
        "# Roles",
        "",
        "In the order in which `site.yml` runs them. `_common` has what several of them use.",
        "",
        "| role | hosts | |",
        "|---|---|---|",
    ]
    for row, role in zip(FEATURES, ROLES, strict=True):
        spec = yaml.safe_load((role / "meta/argument_specs.yml").read_text())["argument_specs"]["main"]
        purpose = cell(sentence(spec["short_description"]))
        lines.append(f"| [{role.name}]({role.name}/README.md) | {hosts(row)} | {purpose} |")
    return "\n".join(lines) + (
        "\n\nA pattern with * is another one in estates that lack a group: [meta/features.yml](../meta/features.yml)."
        "\n\n<!-- Written by tests/helpers/roledoc.py from meta/features.yml. -->\n"
    )


def hosts(row: dict[str, Any]) -> str:
    """The pattern of a feature's hosts; of a choice, the first."""
    pattern: str = row["hosts"]
    return f"`{pattern.split(chr(39))[1]}` \\*" if "{{" in pattern else f"`{pattern}`"


def render(role: Path) -> str:
    """The README of one role."""
    spec = yaml.safe_load((role / "meta/argument_specs.yml").read_text())["argument_specs"]["main"]
    lines = [f"# {role.name}", "", sentence(spec["short_description"])]
    for paragraph in spec.get("description", []):
        lines += ["", *wrapped(sentence(paragraph))]
    lines += [
        "",
        "```yaml",
        *play(role),
        "```",
        "",
        "## Changes on a host",
        "",
        "Read from the role's tasks; `*` stands for a name that a variable gives.",
        "",
    ]
    for kind, names in changes(role).items():
        if names:
            lines += wrapped(f"- {kind}: {', '.join(f'`{name}`' for name in names)}", "  ")
    lines += ["", "## Variables", ""]
    for name, option in sorted(spec["options"].items()):
        lines += entries(name, option)
    if shared := shared_by(role):
        lines += [
            "",
            "## Shared variables",
            "",
            *wrapped(
                "Variables of `_common` and of other roles that this role reads. Set them for all hosts that they concern."
            ),
            "",
        ]
        for name, (owner, option) in sorted(shared.items()):
            lines += entry(name, option, f"of {owner}, ")
    lines += [
        "",
        "## Checks",
        "",
        "`playbooks/verify.yml` runs them; so do molecule and every run of the role.",
        "",
    ]
    for check in checks(role):
        lines += wrapped(f"- `{check['id']}`: {check['title']}", "  ")
    return (
        "\n".join(lines)
        + "\n\n<!-- Written by tests/helpers/roledoc.py from meta/argument_specs.yml and tasks/verify.yml. -->\n"
    )


def play(role: Path) -> list[str]:
    """A play with the role, for a group that has it."""
    (row,) = (row for row in FEATURES if row["role"] == role.name)
    return [f"- hosts: {re.findall('[a-z_]+', row['hosts'])[0]}", f"  roles: [llmkeep.estate.{role.name}]"]


def changes(role: Path) -> dict[str, list[str]]:
    """Packages, files and units that the role's tasks name; `*` stands for a name that a variable gives."""
    tasks = [yaml.safe_load(path.read_text()) for path in sorted((role / "tasks").glob("*.yml"))]
    named = variables(role)
    packages = [
        name
        for given in [
            *values_of("packages", list(named.values())),
            *(value for variable, value in named.items() if variable.endswith("_packages")),
        ]
        for name in (given.values() if isinstance(given, dict) else given if isinstance(given, list) else [])
    ]
    files = [
        path
        for tree in values_of("llmkeep.estate.config_tree", tasks)
        for each in tree.get("files", [])
        for path in destinations(each, named)
    ]
    units = [
        unit
        for given in values_of("llmkeep.estate.systemd_units", tasks)
        for text in strings(given["units"], named)
        for unit in re.findall(r"(?<![\\\w@-])[a-z][\w@-]+\.(?:service|timer|path|socket)", text)
    ]
    return {
        "Packages": sorted({re.sub("{{.*?}}", "*", name) for name in packages}),
        "Files": sorted({path for path in files if path.startswith("/") and "{{" not in path}),
        "Units": sorted(set(units)),
    }


def variables(role: Path) -> dict[str, Any]:
    """The role's variables as its files write them; of a choice between vendor and lab, the vendor's."""
    found: dict[str, Any] = {}
    for file in ("defaults/main.yml", "vars/main.yml"):
        if (role / file).exists():
            found |= yaml.safe_load((role / file).read_text()) or {}
    return {
        name: value.get("package", value) if isinstance(value, dict) else value
        for name, value in found.items()
    }


def values_of(name: str, value: Any) -> Iterator[Any]:
    """The value of each key NAME, at any depth."""
    return (mapping[name] for mapping in mappings(value) if name in mapping)


def mappings(value: Any) -> Iterator[dict[str, Any]]:
    """All mappings in lists and mappings, the outer ones first."""
    if isinstance(value, dict):
        yield value
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else []:
        yield from mappings(each)


def strings(value: Any, named: dict[str, Any]) -> list[str]:
    """All strings of a value, with those of the variables that its expressions name."""
    if isinstance(value, dict):
        return [text for each in value.values() for text in strings(each, named)]
    if isinstance(value, list):
        return [text for each in value for text in strings(each, named)]
    text = str(value)
    inner = [named[name] for name in re.findall(r"\w+", text) if "{{" in text and name in named]
    return [text, *(found for each in inner for found in strings(each, named))]


def destinations(entry: Any, named: dict[str, Any]) -> list[str]:
    """Paths of an entry of config_tree; an expression makes several, its first `{}` a folder of units."""
    if isinstance(entry, dict):
        templates = [] if entry.get("state") == "absent" else [entry["dest"]]
    else:
        templates = [
            f"{{{{ {name} }}}}{path}" if name else path
            for name, path in re.findall(r"dest=(\w+)?(?: ~ )?(?:'([^']*)')?", entry)
            if not re.search("state='absent'(?! if )", entry)
        ]
    paths = []
    for path in templates:
        for _ in range(3):
            path = re.sub(r"{{ (\w+)(?:\.(\w+))? }}", lambda match: inserted(match, named), path)
        paths.append(re.sub(r"^{}", "/etc/systemd/system", path).replace("{}", "*"))
    return paths


def inserted(match: re.Match[str], named: dict[str, Any]) -> str:
    """The variable's text; the expression as it is where that is no text."""
    value = named.get(match[1])
    value = value.get(match[2]) if isinstance(value, dict) else value
    return value if isinstance(value, str) else match[0]


def checks(role: Path) -> list[dict[str, Any]]:
    """The checks that a role's verify.yml declares, wherever in it, in their order; their expressions are as they stand there."""
    return checks_of((role / "tasks/verify.yml").read_text())


def checks_of(verify: str) -> list[dict[str, Any]]:
    """Likewise, of the file's text. A service whose units an expression names has one unit here."""
    declared = [each for each in mappings(yaml.safe_load(verify)) if {"id", "service"} & each.keys()]
    plain = [each | {"units": [str(each["units"])]} if "service" in each else each for each in declared]
    found: list[dict[str, Any]] = load("filter.service_checks").with_service_checks(plain)
    return found


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


def entries(name: str, option: dict[str, Any], indent: str = "") -> list[str]:
    """A variable's entry of the list, and below it one for each option inside it."""
    lines = entry(name, option, indent=indent)
    for inner, value in option.get("options", {}).items():
        lines += entries(inner, value, indent + "  ")
    return lines


def entry(name: str, option: dict[str, Any], owner: str = "", indent: str = "") -> list[str]:
    """A variable's entry of the list; of a shared one, with the role that declares it."""
    kind = option["type"] + (f" of {option['elements']}" if "elements" in option else "")
    default = "required" if option.get("required") else f"`{shown(option.get('default'))}`"
    meaning = option["description"]
    meaning = " ".join(meaning) if isinstance(meaning, list) else meaning
    if "choices" in option:
        meaning = f"{sentence(meaning)} One of {', '.join(str(choice) for choice in option['choices'])}"
    return wrapped(f"{indent}- `{name}` ({owner}{kind}, {default}): {sentence(meaning)}", indent + "  ")


def wrapped(text: str, indent: str = "") -> list[str]:
    """The text in lines of 100 columns, each after the first one indented."""
    return wrap(text, 100, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def shown(value: object) -> str:
    """A default as one would write it in an inventory, on one line."""
    if value is None:
        return "derived"
    if isinstance(value, str):
        return " ".join(value.split()) or '""'
    flow = yaml.safe_dump(value, default_flow_style=True, width=10_000, sort_keys=False)
    return flow.removesuffix("\n").removesuffix("\n...").strip()


def cell(text: str) -> str:
    """Text that does not end a table's cell."""
    return text.replace("|", "\\|").replace("\n", " ")


def main() -> None:
    for role in ROLES:
        (role / "README.md").write_text(render(role))
    (ROOT / "roles/README.md").write_text(listed())


if __name__ == "__main__":
    main()
