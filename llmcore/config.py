"""Configuration files: YAML, validated by a pydantic model before anything starts."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError


class ConfigError(Exception):
    """An unusable configuration; the message names the file, the key, the value seen and the remedy."""


class Section(BaseModel):
    """Base of all configuration sections: unknown keys are rejected, instances are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


def load[T: BaseModel](path: Path, kind: type[T]) -> T:
    """Read the YAML file `path` as a `kind`; raises ConfigError, which lists every wrong key with its value."""
    try:
        text = path.read_text()
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    return parse(text, str(path), kind)


def parse[T: BaseModel](text: str, name: str, kind: type[T]) -> T:
    """Read YAML as a `kind`; raises ConfigError, in which `name` is where it is from."""
    try:
        content: Any = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{name} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{name} must contain a mapping, not {type(content).__name__}")
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{name}: {line}" for line in describe(error))) from error


def describe(error: ValidationError) -> list[str]:
    """One line per error: the key, the value seen, and what is expected."""
    lines = []
    for mistake in error.errors(include_url=False):
        where = ".".join(str(part) for part in mistake["loc"]) or "the whole file"
        if mistake["type"] == "extra_forbidden":
            lines.append(f"unknown key '{where}': remove it or correct its name")
        elif mistake["type"] == "missing":
            lines.append(f"key '{where}' is missing: set it")
        else:
            value = repr(mistake["input"])[:80]
            lines.append(f"key '{where}' is {value}: {mistake['msg']}")
    return lines
