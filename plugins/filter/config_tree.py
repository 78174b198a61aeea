"""Filters that make entries of M(llmkeep.estate.config_tree) and of M(llmkeep.estate.release_rollout) out of lists."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any


def for_each(items: Iterable[Any] | Mapping[str, Any], known_as: str, **entry: Any) -> list[dict[str, Any]]:
    """One entry of config_tree for each item, whose template knows the item as KNOWN_AS.

    C({}) in C(dest) and C(path) becomes the item's name: itself, its C(name), or its key where ITEMS is a mapping.
    """
    if isinstance(items, Mapping):
        named = [(str(name), item) for name, item in items.items()]
    else:
        named = [(str(item["name"]) if isinstance(item, Mapping) else str(item), item) for item in items]
    return [
        {
            **{key: placed(key, value, name) for key, value in entry.items()},
            **({"vars": {known_as: item}} if "template" in entry else {}),
        }
        for name, item in named
    ]


def placed(key: str, value: Any, name: str) -> Any:
    return value.replace("{}", name) if key in ("dest", "path") else value


def named(names: Iterable[str], **fields: Any) -> list[dict[str, Any]]:
    """A mapping for each name: C(name), and the same FIELDS in all of them."""
    return [{"name": name, **fields} for name in names]


class FilterModule:
    """What Ansible asks for."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"for_each": for_each, "named": named}
