"""Who holds which page of the cache, and which pages already hold a given beginning of a text.

A *block* is a page and the PAGE tokens in it. A full block is known by its key: a digest of its tokens and of the key
of the block before it, so that equal keys mean equal texts from the first token on. Blocks that nobody holds stay known
until their page is needed, the longest unused going first; so a prompt seen before costs nothing, and memory is never
reserved for that.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

from fathom.kernels.ops import PAGE

SINGLES_BELOW = 256
"""Prompts are read token by token up to here (cheap while little is remembered), in stretches from here on."""


def block_keys(
    tokens: Sequence[int], *, salt: str, prompt_length: int, known: list[bytes] | None = None
) -> list[bytes]:
    """Keys of all full blocks of `tokens`, of which the first `prompt_length` were a prompt.

    Texts of unlike salt share none. Nor do a prompt and an answer that read alike, from SINGLES_BELOW on: a prompt is
    computed in stretches there and an answer token by token, which round differently. `known` are the first keys.
    """
    keys = list(known or [])
    for start in range(len(keys) * PAGE, len(tokens) - PAGE + 1, PAGE):
        before = keys[-1] if keys else salt.encode(errors="surrogatepass")
        content = array("q", tokens[start : start + PAGE]).tobytes()
        read = max(0, min(prompt_length - start, PAGE))
        if start >= SINGLES_BELOW and read < PAGE:
            content += b"written after" + read.to_bytes(1)
        keys.append(hashlib.blake2b(before + content, digest_size=16).digest())
    return keys


class BlockPool:
    """`count` pages, handed out one by one."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.clear()

    def clear(self) -> None:
        """Forget all blocks and all holders."""
        count = self.count
        self._free = list(range(count - 1, -1, -1))
        self._holders = [0] * count
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        """Known blocks that nobody holds, the longest unused first."""

    @property
    def available(self) -> int:
        """Pages that `take` can still give."""
        return len(self._free) + len(self._idle)

    @property
    def used(self) -> int:
        """Pages that somebody holds."""
        return self.count - self.available

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """Pages of the longest beginning of `keys` that is known; each is held once more."""
        pages = []
        for key in keys:
            page = self._block_of.get(key)
            if page is None:
                break
            self._idle.pop(page, None)
            self._holders[page] += 1
            pages.append(page)
        return pages

    def share(self, pages: Sequence[int]) -> list[int]:
        """`pages`, which somebody holds; each is held once more."""
        for page in pages:
            assert self._holders[page] > 0, f"{page=}"
            self._holders[page] += 1
        return list(pages)

    def take(self) -> int | None:
        """A page with one holder, its content undefined; None when all are held."""
        if self._free:
            page = self._free.pop()
        elif self._idle:
            page, _ = self._idle.popitem(last=False)
            del self._block_of[self._key_of.pop(page)]
        else:
            return None
        self._holders[page] = 1
        return page

    def publish(self, page: int, key: bytes) -> None:
        """Say that `page`, which the caller holds, is full, and of what. Of two with one content, the first counts."""
        if key not in self._block_of and page not in self._key_of:
            self._block_of[key] = page
            self._key_of[page] = key

    def release(self, pages: Sequence[int]) -> None:
        """Give pages back. The last of a text go first when memory is needed: others may share the beginning."""
        for page in reversed(pages):
            assert self._holders[page] > 0, f"{page=}"
            self._holders[page] -= 1
            if self._holders[page] == 0:
                if page in self._key_of:
                    self._idle[page] = None
                else:
                    self._free.append(page)
