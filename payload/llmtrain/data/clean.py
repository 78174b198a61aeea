"""Cleaning: Unicode normalization and the rules of `cleaning_rules.py`."""

import unicodedata
from typing import TYPE_CHECKING

from llmtrain.data.cleaning_rules import CLEANING, Rule, compiled
from llmtrain.data.documents import Docs, Rejects, parts, replace_parts

if TYPE_CHECKING:
    from llmtrain.data import settings


class Clean:
    """The step that applies the rules. Documents that become empty are rejected."""

    name = "clean"

    def __init__(self, options: "settings.Clean", rejects: Rejects) -> None:
        self.unicode = options.unicode
        self.rules = [rule for name in options.rules for rule in CLEANING[name]]
        self.rules += [Rule(compiled(own.pattern), own.replace) for own in options.own]
        self.rejects = rejects

    def text(self, text: str) -> str:
        """The cleaned text."""
        if self.unicode != "none":
            text = unicodedata.normalize(self.unicode, text)
        for pattern, replace, needs in self.rules:
            if not needs or any(need in text for need in needs):
                text = pattern.sub(replace, text)
        return text.strip("\n" + " \t")

    def __call__(self, docs: Docs, rank: int = 0, world_size: int = 1) -> Docs:
        with self.rejects.of(self.name, rank) as reject:
            for document in docs:
                replace_parts(document, [self.text(part) for part in parts(document)])
                if document.text.strip():
                    yield document
                else:
                    reject(document, "empty", "nothing is left after cleaning")
