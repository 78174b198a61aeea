"""What schemathesis cannot know of the gateway; `test_openapi` has it loaded."""

from typing import Any

import schemathesis


@schemathesis.hook
def filter_case(context: Any, case: Any) -> bool:
    """Not among the mistakes: a header that nobody knows, which HTTP has us ignore."""
    return not any(name.lower().startswith("x-schemathesis") for name in case.headers or {})


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    """A model that there is, for else every question ends with a 404; and a deadline that can be kept, for the 503 of a
    millisecond is what was asked for.
    """
    if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
        case.body["model"] = "echo"
    for name, value in (case.headers or {}).items():
        if name.lower() == "x-llm-deadline-ms" and str(value).isdecimal() and 0 < int(value) < 10_000:
            case.headers[name] = "10000"
