"""A request on its way through the engine."""

from array import array
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fathom.engine.blocks import BlockPool, block_keys
from fathom.engine.constraint import Matcher
from fathom.engine.output import OutputStream
from fathom.engine.protocol import Chunk, Fault, FinishReason, Request, TokenLogprob
from fathom.engine.sampling import SamplerState
from fathom.kernels.ops import PAGE
from fathom.model.paged import PagedCache


class Sequence:
    """Tokens known so far, the pages that remember them, and what its next token depends on."""

    def __init__(
        self,
        request: Request,
        deliver: Callable[[Chunk], None],
        *,
        sampler: SamplerState,
        output: OutputStream,
        matcher: Matcher | None,
    ) -> None:
        self.request, self.sampler, self.output, self.matcher = request, sampler, output, matcher
        self.tokens = list(request.prompt_ids)
        self.prompt_key = (request.cache_salt, array("q", request.prompt_ids).tobytes())
        """Equal for those of whom one may read the prompt for all."""
        self.computed = 0
        """Tokens whose keys and values are in the cache."""
        self.pages: list[int] = []
        self.draft: int | None = None
        """A guess at the token after the last, and the distribution it was drawn from (None: it is
        right if the token is drawn without it)."""
        self.draft_probabilities: Tensor | None = None
        self.admitted = False
        """Whether it has ever run: what it finds in the cache from then on is its own work."""
        self.cancelled = False
        self.routes: Tensor | None = None
        """For its last chunk."""
        self._deliver = deliver
        self._outbox: list[Chunk] = []
        self._keys: list[bytes] = []
        self._published = 0

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt_ids)

    @property
    def finished(self) -> bool:
        """Whether the last chunk is out."""
        return self.output.finish_reason is not None

    @property
    def has_read_prompt(self) -> bool:
        """Whether all of the prompt is in the cache that another with the same prompt can begin with."""
        return self.computed >= self.prompt_length - 1

    def adopt_prefix(self, pool: BlockPool, reader: "Sequence | None" = None) -> None:
        """Hold the known blocks of what it has to compute; its last token is always computed, for what follows it.

        All full blocks of the prompt are known if there is a `reader`, which has read the same prompt.
        """
        self._keys = self._block_keys(self.tokens, self._keys)
        self.pages = pool.find(self._keys[: (len(self.tokens) - 1) // PAGE])
        full = (self.prompt_length - 1) // PAGE
        if reader is not None and len(self.pages) < full:
            pool.release(self.pages)
            self.pages = pool.share(reader.pages[:full])
        self._published = len(self.pages)
        self.computed = self._published * PAGE

    def copy_prompt_end(self, reader: "Sequence", pool: BlockPool, cache: PagedCache) -> None:
        """After `adopt_prefix`: begin with a copy of the page on which `reader` has the end of the prompt.

        The page is not shared, because both go on writing on it. There must be one to take.
        """
        if self.has_read_prompt:
            return
        page = pool.take()
        assert page is not None, "whoever is let in has room for its text"
        cache.copy_page(reader.pages[len(self.pages)], page)
        self.pages.append(page)
        self.computed = self.prompt_length - 1

    def pages_missing(self, length: int) -> int:
        """Pages it lacks for `length` tokens."""
        return max(0, -(-length // PAGE) - len(self.pages))

    def publish_blocks(self, pool: BlockPool) -> None:
        """Let others find the blocks that are full."""
        full = self.computed // PAGE
        if full > self._published:
            self._keys = self._block_keys(self.tokens[: full * PAGE], self._keys[:full])
            for index in range(self._published, full):
                pool.publish(self.pages[index], self._keys[index])
            self._published = full

    def release(self, pool: BlockPool) -> None:
        """Give all pages back; what was computed has to be computed (or found) again."""
        pool.release(self.pages)
        self.pages, self.computed, self._published, self.draft = [], 0, 0, None

    def forced(self) -> int | None:
        """The token that must come next, if it is not to be drawn."""
        thoughts = self.output.thoughts
        return thoughts.forced[0] if thoughts is not None and thoughts.forced else None

    def mask(self) -> Tensor | None:
        """bool [V] of the tokens that may be drawn next; None where all may."""
        thoughts = self.output.thoughts
        mask = None if thoughts is None else thoughts.mask()
        if self.matcher is not None and self._constrained():
            allowed = self.matcher.mask()
            mask = allowed if mask is None else torch.logical_and(mask, allowed)
        return mask

    def push(self, token: int, logprob: TokenLogprob | None) -> None:
        """Take `token` as the next one."""
        if self.matcher is not None and self._constrained():
            self.matcher.advance(token)
        self.sampler.advance(token)
        self.tokens.append(token)
        self._outbox += self.output.push(token, logprob)

    def end(self, reason: FinishReason, message: str = "", fault: Fault = "engine") -> None:
        """End it before its time."""
        if not self.finished:
            self._outbox += self.output.end(reason, message, fault)

    def deliver(self) -> None:
        """Hand out the chunks that are ready."""
        chunks, self._outbox = self._outbox, []
        for chunk in chunks:
            try:
                self._deliver(chunk if chunk.finish_reason is None else replace(chunk, routes=self.routes))
            except Exception:  # whoever listened has gone: nobody is left to tell
                self.cancelled = True

    def _block_keys(self, tokens: list[int], known: list[bytes]) -> list[bytes]:
        return block_keys(tokens, salt=self.request.cache_salt, prompt_length=self.prompt_length, known=known)

    def _constrained(self) -> bool:
        return self.output.thoughts is None or self.output.thoughts.answering
