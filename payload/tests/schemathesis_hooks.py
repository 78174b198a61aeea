"""What schemathesis cannot know of the gateway; `test_openapi` has it loaded."""

from typing import Any

import schemathesis


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    """A model that there is, where the body names one: else every question ends with a 404."""
    if isinstance(body, dict) and isinstance(body.get("model"), str):
        return {**body, "model": "echo"}
    return body


@schemathesis.hook
def filter_case(context: Any, case: Any) -> bool:
    """Not among the mistakes: a header that nobody knows, which HTTP has us ignore; nor a deadline of a millisecond,
    whose 503 is what was asked for.
    """
    headers = {name.lower(): value for name, value in (case.headers or {}).items()}
    if any(name.startswith("x-schemathesis") for name in headers):
        return False
    deadline = str(headers.get("x-llm-deadline-ms", ""))
    return not deadline.isdecimal() or int(deadline) > 10_000 or int(deadline) == 0
