"""Stop strings in a text that comes in pieces: none is ever shown in part, and whole only where that is asked for."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Finds the first of several strings in a growing text, and holds back what may become one.

    Args:
        stops: Non-empty strings.
        free: Tokens at the beginning whose text ends nothing, `min_new_tokens`.
        shown: The string that is found belongs to the text, which ends with it.

    Attributes:
        found: The string that was found, None until then.
    """

    def __init__(self, stops: Sequence[str], *, free: int = 0, shown: bool = False) -> None:
        self._stops = tuple(stops)
        self._free = free
        self._shown = shown
        self._seen = 0
        self._longest = max((len(stop) for stop in stops), default=0)
        self._held = ""
        self.found: str | None = None

    def add(self, piece: str, tokens: int = 1) -> tuple[str, bool]:
        """Text that may be shown, and whether a stop string was found at its end.

        Args:
            tokens: How many of them this is the text of.
        """
        if not self._stops:
            return piece, False
        if self._free:
            self._seen += tokens
            if self._seen <= self._free:
                return piece, False
        text = self._held + piece
        # The one that is complete first, of these the one that begins first: so it does not matter where tokens end.
        matches = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if matches:
            self._held = ""
            end, begin = min(matches)
            self.found = text[begin:end]
            return text[: end if self._shown else begin], True
        keep = self._possible_start(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def finish(self) -> str:
        """What is held back; it did not become a stop string."""
        held, self._held = self._held, ""
        return held

    def _possible_start(self, text: str) -> int:
        """Length of the longest end of the text that begins a stop string."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
