"""Text as it leaves an engine: stop strings cut out of a stream without showing a part of them."""

from collections.abc import Sequence


class StopStrings:
    """Holds back what may be the beginning of a stop string, and ends the text before the first whole one."""

    def __init__(self, stops: Sequence[str]) -> None:
        """`stops` are non-empty strings."""
        self.stops = tuple(stops)
        self.held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Take the next piece, return what may be shown now; sets `stopped` once a stop string was met."""
        if self.stopped:
            return ""
        if not self.stops:
            return text
        self.held += text
        cuts = [at for stop in self.stops if (at := self.held.find(stop)) >= 0]
        if cuts:
            self.stopped = True
            shown, self.held = self.held[: min(cuts)], ""
            return shown
        keep = self.longest_beginning()
        shown, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return shown

    def flush(self) -> str:
        """The text has ended: what was held back is no stop string after all."""
        shown, self.held = self.held, ""
        return shown

    def longest_beginning(self) -> int:
        """Length of the longest end of `held` that some stop string begins with."""
        longest = min(len(self.held), max(len(stop) for stop in self.stops) - 1)
        for size in range(longest, 0, -1):
            end = self.held[-size:]
            if any(stop.startswith(end) for stop in self.stops):
                return size
        return 0
