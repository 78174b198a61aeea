"""Stop strings: cut out of a stream without emitting any part of them."""

from collections.abc import Sequence


class StopStrings:
    """Holds back what may be the beginning of a stop string, and ends the text before the first complete one."""

    def __init__(self, stops: Sequence[str]) -> None:
        """`stops`: non-empty strings."""
        self.stops = tuple(stops)
        self.tail = ""
        self.stopped = False
        self.after = ""  # what the piece with the stop string had besides, beginning with it

    def push(self, text: str) -> str:
        """Add a piece; returns the text that can be emitted now. Sets `stopped` when a stop string is complete."""
        if self.stopped:
            return ""
        if not self.stops:
            return text
        self.tail += text
        cuts = [at for stop in self.stops if (at := self.tail.find(stop)) >= 0]
        if cuts:
            self.stopped = True
            piece, self.after, self.tail = self.tail[: min(cuts)], self.tail[min(cuts) :], ""
            return piece
        keep = self.longest_beginning()
        piece, self.tail = self.tail[: len(self.tail) - keep], self.tail[len(self.tail) - keep :]
        return piece

    def flush(self) -> str:
        """At the end of the text, return what was held back, which is no stop string after all."""
        piece, self.tail = self.tail, ""
        return piece

    def longest_beginning(self) -> int:
        """Length of the longest suffix of `tail` that is a proper prefix of a stop string."""
        longest = min(len(self.tail), max(len(stop) for stop in self.stops) - 1)
        for size in range(longest, 0, -1):
            end = self.tail[-size:]
            if any(stop.startswith(end) for stop in self.stops):
                return size
        return 0
