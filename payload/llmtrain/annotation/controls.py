"""The annotators' questions: Label Studio's labelling configuration, and the valid values of its controls.

https://labelstud.io/tags: a control's result has the control's name, that of the object it is about, a type, and a value.
"""

from dataclasses import dataclass
from typing import Annotated, Any
from xml.etree import ElementTree

from pydantic import Field, field_validator

from llmcore.config import Section
from llmtrain.annotation.agreement import Level
from llmtrain.feedback.export import Rejected

Name = Annotated[
    str, Field(pattern=r"^\S(.*\S)?$")
]  # one line without blanks around it, which Label Studio may trim
CORRECTED, UNCHANGED = "corrected", "unchanged"


class Label(Section):
    """A label of a domain. `good`: what KTO learns from an answer with this label; nothing if it is unset."""

    name: Name
    good: bool | None = None


class Labels(Section):
    """A question of a domain and its possible labels."""

    question: Name
    labels: Annotated[tuple[Label, ...], Field(min_length=2)]

    @field_validator("labels")
    @classmethod
    def are_different(cls, value: tuple[Label, ...]) -> tuple[Label, ...]:
        """No two labels have the same name."""
        names = [each.name for each in value]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{twice[0]!r} occurs twice")
        return value


@dataclass(frozen=True)
class Control:
    """The single control of a configuration, for the object `of`. `values`: all possible values, lowest first; None: any text.

    Agreement is measured by `scale` and `level`.
    """

    name: str
    of: str
    type: str
    values: tuple[str | int, ...] | None
    scale: tuple[str | int, ...]
    level: Level

    def value(self, results: Any) -> str | int:
        """The value of an annotation's results; raises Rejected for anything that this control cannot produce."""
        if not isinstance(results, list) or not all(isinstance(each, dict) for each in results):
            raise Rejected("malformed", "its `result` is not a list of results")
        for each in results:
            for key, own in ("from_name", self.name), ("to_name", self.of), ("type", self.type):
                if each.get(key) != own:
                    raise Rejected(
                        "unknown_control",
                        f"{key} is {str(each.get(key))[:60]!r}, but the configuration of this export only has {own!r}",
                    )
        if not results:
            raise Rejected("empty", "it was submitted without an answer")
        if len(results) > 1:
            raise Rejected("several_values", f"there are {len(results)} results of one control")
        content = results[0].get("value")
        key = "text" if self.type == "textarea" else self.type
        if not isinstance(content, dict) or content.keys() != {key}:
            raise Rejected("malformed", f"its value must contain {key!r} and nothing else")
        value = content[key]
        if self.type != "rating":
            if not isinstance(value, list):
                raise Rejected("malformed", f"{key} is {type(value).__name__}, but must be a list")
            if len(value) != 1:
                raise Rejected("several_values", f"{key} has {len(value)} values, but must have one")
            value = value[0]
        return self.allowed(value)

    def allowed(self, value: Any) -> str | int:
        """The value, if it is valid for the control; raises Rejected."""
        if self.values is None:
            if not isinstance(value, str) or not encodable(value):
                raise Rejected("malformed", "its text cannot be encoded in UTF-8")
            if not value.strip():
                raise Rejected("empty", "its text is blank")
            return value
        # True is 1, and 4.0 is 4, for `in`.
        if not any(type(value) is type(each) and value == each for each in self.values):
            raise Rejected(
                "value", f"{str(value)[:60]!r} is not one of {', '.join(map(str, self.values))[:200]}"
            )
        return value  # type: ignore[no-any-return]  # one of the values


def encodable(text: str) -> bool:
    """Whether a text has no half of a surrogate pair, which JSON can contain but UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def control(kind: str, labels: Labels | None) -> Control:
    """The control that annotates by `kind`; `labels` are those of the kind "labels"."""
    if kind == "better":
        values: tuple[str | int, ...] = ("A", "B", "equal")
        return Control("better", "prompt", "choices", values, values, "nominal")
    if kind == "rating":
        stars = (1, 2, 3, 4, 5)
        return Control("rating", "answer", "rating", stars, stars, "ordinal")
    if kind == "correction":
        return Control("correction", "answer", "textarea", None, (UNCHANGED, CORRECTED), "nominal")
    names = tuple(each.name for each in labels.labels) if labels else ()
    return Control("label", "text", "choices", names, names, "nominal")


OBJECTS = {
    "better": {"prompt": "Question", "a": "Answer A", "b": "Answer B"},
    "rating": {"prompt": "Question", "answer": "Answer"},
    "correction": {"prompt": "Question", "answer": "Answer"},
    "labels": {"text": "Text"},
}
ASKED = {
    "better": "Which answer is better?",
    "rating": "How good is the answer?",
    "correction": "Correct the answer. Submit it as it is if nothing is wrong.",
}


def configuration(kind: str, labels: Labels | None) -> str:
    """Label Studio's labelling configuration, as XML."""
    own = control(kind, labels)
    view = ElementTree.Element("View")
    for name, title in OBJECTS[kind].items():
        ElementTree.SubElement(view, "Header", value=title)
        ElementTree.SubElement(view, "Text", name=name, value=f"${name}")
    ElementTree.SubElement(view, "Header", value=labels.question if labels else ASKED[kind])
    about = {"name": own.name, "toName": own.of, "required": "true"}
    if own.type == "choices":
        choices = ElementTree.SubElement(view, "Choices", about, choice="single-radio")
        for value in own.values or ():
            ElementTree.SubElement(choices, "Choice", value=str(value))
    elif own.type == "rating":
        ElementTree.SubElement(view, "Rating", about, maxRating="5")
    else:
        more = {"value": "$answer", "maxSubmissions": "1", "editable": "true", "rows": "8"}
        ElementTree.SubElement(view, "TextArea", about, **more)
    ElementTree.indent(view)
    return ElementTree.tostring(view, encoding="unicode") + "\n"
