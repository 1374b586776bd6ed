"""What goes through the model together, so that a pass has neither too many rows nor too few."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def packed(items: Iterable[Item], rows: Callable[[Item], int], most: int) -> Iterator[list[Item]]:
    """Neighbouring `items`, as many as `most` rows hold but at least one; `rows` says how many one takes."""
    piece: list[Item] = []
    taken = 0
    for item in items:
        size = rows(item)
        if piece and taken + size > most:
            yield piece
            piece, taken = [], 0
        piece.append(item)
        taken += size
    if piece:
        yield piece
