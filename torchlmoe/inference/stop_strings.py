"""Finds strings that end a continuation, even if tokens split them. No part of a stop string is shown."""

from collections.abc import Sequence


class StopStrings:
    """Passes text on up to the first stop string. `push` and `close` return the parts that may be shown.

    strings: the stop strings. As soon as one is complete, the text ends before the complete one that begins first.
    `found`: whether a stop string has occurred; later text is dropped. Raises ValueError for an empty string.
    """

    def __init__(self, strings: Sequence[str] = ()):
        if "" in strings:
            raise ValueError("A stop string is empty; give at least one character.")
        self.strings, self.found, self.held = tuple(strings), False, ""

    def push(self, text: str) -> str:
        """Return the new part of the text that cannot belong to a stop string."""
        if self.found:
            return ""
        self.held += text
        places = [place for string in self.strings if (place := self.held.find(string)) >= 0]
        self.found = bool(places)
        end = min(places) if places else len(self.held) - self._partial_length()
        shown, self.held = self.held[:end], self.held[end:]
        return shown

    def close(self) -> str:
        """Return the text that was held back, if it is not a stop string."""
        return "" if self.found else self.held

    def _partial_length(self) -> int:
        """Length of the longest suffix of the held text that is a prefix of a stop string."""
        longest = min(len(self.held), max(map(len, self.strings), default=1) - 1)
        ends = (self.held[-length:] for length in range(longest, 0, -1))
        return next((len(end) for end in ends if any(string.startswith(end) for string in self.strings)), 0)
