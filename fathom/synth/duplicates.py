"""Near-duplicates: rows that say almost what an earlier row says.

How alike two texts are is the share of 5-grams that they have in common (Jaccard), estimated from 128 minima of hashes
each (MinHash, Broder 1997); candidates come from banded buckets (LSH), so that no row is compared with all others. Both
are `datasketch`'s. At a threshold of 1 only equal texts are duplicates, and nothing has to be estimated.
"""

import hashlib
from typing import Any

from fathom.errors import UserError
from fathom.tasks.words import ngrams, units

_SHINGLE = 5
_HASHES = 128
_BUCKETS = 0.8


class Duplicates:
    """The texts that were kept so far."""

    def __init__(self, threshold: float) -> None:
        """Raises `UserError` where `threshold` is below 1 and the package `datasketch` is missing."""
        self._threshold = threshold
        self._digests: set[bytes] = set()
        self._sketches: list[Any] = []
        if threshold < 1:
            try:
                from datasketch import MinHash, MinHashLSH
            except ImportError:
                raise UserError(
                    "filters.duplicates below 1 needs the package datasketch: pip install 'fathom-lm[synth]'; or set "
                    "it to 1, to leave out equal texts alone"
                ) from None
            self._sketch = MinHash
            # Buckets for less alike texts than asked for: they miss fewer, and the estimate has the last word.
            self._buckets = MinHashLSH(threshold=_BUCKETS * threshold, num_perm=_HASHES)

    def has(self, text: str) -> bool:
        """Whether a text that was added is like this one."""
        if _digest(text) in self._digests:
            return True
        if self._threshold == 1:
            return False
        sketch = self._sketched(text)
        return any(self._sketches[place].jaccard(sketch) >= self._threshold for place in self._buckets.query(sketch))

    def add(self, text: str) -> None:
        """Remember it."""
        self._digests.add(_digest(text))
        if self._threshold < 1:
            sketch = self._sketched(text)
            self._buckets.insert(len(self._sketches), sketch)
            self._sketches.append(sketch)

    def _sketched(self, text: str) -> Any:
        sketch = self._sketch(num_perm=_HASHES)
        sketch.update_batch(["\x1f".join(shingle).encode() for shingle in ngrams(units(text), _SHINGLE)])
        return sketch


def _digest(text: str) -> bytes:
    return hashlib.blake2b("\x1f".join(units(text)).encode(), digest_size=16).digest()
