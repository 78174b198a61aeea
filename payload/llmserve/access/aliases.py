"""Model aliases from the policy, and the response headers for a retired alias."""

from dataclasses import dataclass
from datetime import UTC, date, datetime
from email.utils import format_datetime
from urllib.parse import quote

DEFAULT = "default"  # the alias of requests that name no model


def midnight(day: date) -> datetime:
    """The start of the day in UTC."""
    return datetime(day.year, day.month, day.day, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Alias:
    """Another name for `model`, deprecated since `deprecated`; it may be removed on or after `sunset`. Both are days in UTC. If
    `collections` is set, chats with this name are answered from the documents in them.
    """

    model: str
    deprecated: date | None = None
    sunset: date | None = None
    collections: tuple[str, ...] = ()

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """Response headers for a retired name: RFC 9745, RFC 8594, and the successor (RFC 5829)."""
        if self.deprecated is None:
            return []
        headers = [
            (b"deprecation", b"@%d" % midnight(self.deprecated).timestamp()),
            (b"link", f'</v1/models/{quote(self.model)}>; rel="successor-version"'.encode()),
        ]
        if self.sunset:
            headers.append((b"sunset", format_datetime(midnight(self.sunset), usegmt=True).encode()))
        return headers
