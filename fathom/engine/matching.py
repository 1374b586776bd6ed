"""Finding strings in text that arrives in pieces (Knuth, Morris and Pratt's automaton): think tags and stop strings."""

from collections.abc import Sequence


class Pattern:
    """A sequence to be found, symbol by symbol. A state is how many of its symbols the input now ends with."""

    def __init__(self, symbols: Sequence) -> None:
        assert len(symbols) > 0
        self.symbols = symbols
        self._borders = [0]
        for symbol in symbols[1:]:
            self._borders.append(self._longer(self._borders[-1], symbol))

    def __len__(self) -> int:
        return len(self.symbols)

    def step(self, state: int, symbol: object) -> int:
        """The state after one more symbol; `len(self)` is a match."""
        return self._longer(self._borders[-1] if state == len(self) else state, symbol)

    def _longer(self, state: int, symbol: object) -> int:
        while state and self.symbols[state] != symbol:
            state = self._borders[state - 1]
        return state + 1 if self.symbols[state] == symbol else 0


class Search:
    """The match that begins first, of any of several texts, wherever the borders of the pieces fall.

    Text is handed out as soon as it can no longer be part of a match.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._patterns = [Pattern(text) for text in texts]
        self._firsts = "".join({text[0] for text in texts})
        self._reset()

    def push(self, text: str) -> tuple[str, str | None, str]:
        """Text before a match, the match or None, and what of the pieces lies behind it.

        After a match the search begins anew: push the rest to go on.
        """
        if not self._held and not any(first in text for first in self._firsts):
            return text, None, ""
        scanned = len(self._held)
        self._held += text
        for end in range(scanned + 1, len(self._held) + 1):
            self._step(end)
            # A match counts once nothing that began before it can still become one.
            if self._found and all(end - state >= self._found[0] for state in self._states):
                return self._cut()
        hold = len(self._held) - max(self._states)
        if self._found:
            hold = min(hold, self._found[0])
        released, self._held = self._held[:hold], self._held[hold:]
        if self._found:
            self._found = (self._found[0] - hold, self._found[1] - hold)
        return released, None, ""

    def flush(self) -> tuple[str, str | None, str]:
        """As `push`, when no more text comes."""
        if self._found:
            return self._cut()
        held = self._held
        self._reset()
        return held, None, ""

    def _step(self, end: int) -> None:
        for number, pattern in enumerate(self._patterns):
            state = self._states[number] = pattern.step(self._states[number], self._held[end - 1])
            if state == len(pattern) and (self._found is None or end - state < self._found[0]):
                self._found = (end - state, end)

    def _cut(self) -> tuple[str, str | None, str]:
        assert self._found is not None
        (start, end), held = self._found, self._held
        self._reset()
        return held[:start], held[start:end], held[end:]

    def _reset(self) -> None:
        self._held = ""
        self._states = [0] * len(self._patterns)
        self._found: tuple[int, int] | None = None
        """Where in the held text the best match so far begins and ends."""
