"""Formats of the documents that modules store on hosts and on the control node."""

from __future__ import annotations

from collections.abc import Callable

FORMAT = 1  # of each of them; those without the field are of format 1


def require(path: object, document: object, refusal: Callable[[str], Exception]) -> None:
    """Raises REFUSAL where DOCUMENT, read from PATH, has a newer format: its known fields may mean something else by then.

    A format above 1 names in `bundle` the serial of the bundle that wrote it. Documents that are a list, or a map by names that
    a person gives, have no field in format 1: a newer one is a map whose `format` is a number.
    """
    number = document.get("format", FORMAT) if isinstance(document, dict) else FORMAT
    if isinstance(document, dict) and isinstance(number, int) and number > FORMAT:
        writer = f"bundle serial {document['bundle']}" if "bundle" in document else "a newer bundle"
        raise refusal(
            f"{path} has format {number}, and this llmkeep reads {FORMAT}: {writer} wrote it. It was not changed; run bootstrap"
            " of the control node from a bundle at least as new"
        )
