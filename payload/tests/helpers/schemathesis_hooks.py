"""Knowledge about the gateway that schemathesis lacks; loaded by `test_openapi`."""

from typing import Any

import schemathesis


@schemathesis.hook
def filter_case(context: Any, case: Any) -> bool:
    """Unknown headers are no errors, since HTTP requires servers to ignore them."""
    return not any(name.lower().startswith("x-schemathesis") for name in case.headers or {})


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    """Use an existing model, since every other request ends with 404; and a deadline that can be met, since a
    deadline of a millisecond results in 503.
    """
    if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
        case.body["model"] = "echo"
    for name, value in (case.headers or {}).items():
        if name.lower() == "x-llm-deadline-ms" and str(value).isdecimal() and 0 < int(value) < 10_000:
            case.headers[name] = "10000"
