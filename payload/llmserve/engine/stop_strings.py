"""Stop strings: cut out of a stream without emitting any part of them."""

from collections.abc import Sequence


class StopStrings:
    """Holds back what may be the beginning of a stop string, and ends the text before the first complete one."""

    def __init__(self, stops: Sequence[str]) -> None:
        """`stops`: non-empty strings."""
        self.stops = tuple(stops)
        self.held = ""
        self.stopped = False
        self.after = ""  # what the piece with the stop string had besides, beginning with it

    def push(self, text: str) -> str:
        """Add a piece; returns the text that can be emitted now. Sets `stopped` when a stop string is complete."""
        if self.stopped:
            return ""
        if not self.stops:
            return text
        self.held += text
        cuts = [at for stop in self.stops if (at := self.held.find(stop)) >= 0]
        if cuts:
            self.stopped = True
            shown, self.after, self.held = self.held[: min(cuts)], self.held[min(cuts) :], ""
            return shown
        keep = self.longest_beginning()
        shown, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return shown

    def flush(self) -> str:
        """At the end of the text, return what was held back, which is no stop string after all."""
        shown, self.held = self.held, ""
        return shown

    def longest_beginning(self) -> int:
        """Length of the longest suffix of `held` that is a proper prefix of a stop string."""
        longest = min(len(self.held), max(len(stop) for stop in self.stops) - 1)
        for size in range(longest, 0, -1):
            end = self.held[-size:]
            if any(stop.startswith(end) for stop in self.stops):
                return size
        return 0
