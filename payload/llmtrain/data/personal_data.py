"""Personal data and credentials: e-mail addresses, telephone numbers, public IP addresses, Chinese resident ids, card and account
numbers, and credentials of known forms.

Each kind is replaced by its name in angle brackets, or its document is dropped, as configured. Names of people are not
detected: no rule can do that.
"""

from collections import Counter
from typing import TYPE_CHECKING

from llmcore.detectors import NUMBERS, TRAINED, TRAINED_NUMBERS, replaced
from llmtrain.data.documents import Docs, Rejects, parts, replace_parts

if TYPE_CHECKING:
    from llmtrain.data import settings


class Personal:
    """The step that replaces personal data and credentials or drops the document, as configured for each kind."""

    name = "personal"

    def __init__(self, options: "settings.Personal", rejects: Rejects) -> None:
        self.options, self.rejects = options, rejects
        self.action = options.model_dump()

    def text(self, text: str, counts: "Counter[str]") -> str:
        """The text with replacements; `counts` counts the findings by kind."""

        def by(kind: str, find: str) -> str:
            if self.action[kind] == "keep":
                return find
            counts[kind] += 1
            return f"<{kind.upper()}>"

        text = replaced(text, TRAINED, by)
        return NUMBERS.sub(lambda run: replaced(run[0], TRAINED_NUMBERS, by), text)

    def __call__(self, docs: Docs, rank: int = 0, world_size: int = 1) -> Docs:
        with self.rejects.of(self.name, rank) as reject:
            for document in docs:
                counts: Counter[str] = Counter()
                texts = [self.text(part, counts) for part in parts(document)]
                drops = sorted(kind for kind in counts if self.action[kind] == "drop")
                if drops:
                    reject(document, "personal", f"has {', '.join(drops)}")
                    continue
                if counts:
                    replace_parts(document, texts)
                    document.metadata["personal"] = dict(sorted(counts.items()))
                yield document
