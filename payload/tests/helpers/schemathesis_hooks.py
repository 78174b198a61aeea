"""Knowledge about the gateway that schemathesis lacks; loaded by `test_openapi`."""

import json
from typing import Any

import schemathesis

from llmserve.api.requests import BARE_BYTES, bare_bytes

BODY_BYTES = 1024 * 1024  # the gateway's limit
GRANTED_TOKENS = 2048  # of an answer, by the policy for the role of the key


@schemathesis.hook
def filter_case(context: Any, case: Any) -> bool:
    """Unknown headers are no errors, since HTTP requires servers to ignore them. A body above the limits is a 413, which
    schemathesis does not count as a rejection.
    """
    body = json.dumps(case.body, default=str).encode()
    if len(body) > BODY_BYTES or bare_bytes(body) > BARE_BYTES:
        return False
    return not any(name.lower().startswith("x-schemathesis") for name in case.headers or {})


def is_beyond(length: object) -> bool:
    """Whether it is a number above what the policy grants."""
    return isinstance(length, int | float) and length > GRANTED_TOKENS


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    """Use an existing model, since every other request ends with 404; a length that the policy grants; and a deadline that
    can be met, since a deadline of a millisecond results in 503.
    """
    for fields in case.body, case.query:
        for name in "max_tokens", "max_completion_tokens", "max_output_tokens":
            if isinstance(fields, dict) and is_beyond(fields.get(name)):
                fields[name] = GRANTED_TOKENS
    if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
        case.body["model"] = "echo"
    for name, value in (case.headers or {}).items():
        if name.lower() == "x-llm-deadline-ms" and str(value).isdecimal() and 0 < int(value) < 10_000:
            case.headers[name] = "10000"
