"""Errors as sent to clients: OpenAI's envelope with a documented status and code."""

import json
from dataclasses import dataclass, field

TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


@dataclass
class ApiError(Exception):
    """An error response. `message` states what is wrong, the value seen, and what to do."""

    status: int
    code: str
    message: str
    param: str | None = None
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)

    def body(self) -> bytes:
        """The envelope `{"error": {"message", "type", "param", "code"}}`."""
        return json.dumps(
            {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}},
            ensure_ascii=False,
        ).encode()

    @property
    def type(self) -> str:
        """OpenAI's coarse error type, which depends only on the status."""
        return "server_error" if self.status >= 500 else TYPES.get(self.status, "invalid_request_error")


def unauthenticated(code: str, message: str) -> ApiError:
    """A 401 with the header that RFC 9110 requires."""
    return ApiError(401, code, message, headers=[(b"www-authenticate", b'Bearer realm="llm"')])


def unavailable(code: str, message: str, retry_after: int = 1) -> ApiError:
    """A 503 with `retry-after` in seconds."""
    return ApiError(503, code, message, headers=[(b"retry-after", str(retry_after).encode())])


def deadline_exceeded(seconds: float) -> ApiError:
    """A 503 for the gateway's own deadline, or one set by the client."""
    return unavailable(
        "deadline_exceeded",
        f"the answer was not complete within {seconds:g} s: request fewer tokens, or retry later",
    )
