"""Think tags, and bounds on what lies between them.

A *thought token* is one strictly between an opening and a closing tag. A tag may be a single token of the vocabulary
or ordinary text over several; then every token that holds a byte of it belongs to the tag.

What a model may do, and what is made of it:

- It closes early: allowed from `minimum` thought tokens on; before, the tag and the end of the text cannot be drawn.
- It never opens: all is answer, and neither bound applies.
- It opens again after closing: thoughts go on, and count towards the same budget. Once that is spent, it cannot open.
- It writes an opening tag inside thoughts, or a closing one outside: the tag changes nothing (and is not shown).
- It ends the text inside thoughts: then there is no answer.
"""

import functools
import re
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fathom.data.chat import CLOSING, OPENING
from fathom.data.tokenizer import Tokenizer
from fathom.engine.matching import Pattern
from fathom.engine.protocol import Thinking
from fathom.errors import UserError

Tag = Literal["opening", "closing"]


class ThinkTags:
    """How a model's vocabulary spells its think tags."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """Use `find_think_tags`. `vocab_size` is the model's: masks have that length."""
        added = {token.content: number for number, token in tokenizer.backend.get_added_tokens_decoder().items()}
        self.tokens: dict[int, Tag] = {}
        """The tags where they are single tokens; empty where they are ordinary text."""
        if OPENING in added and CLOSING in added:
            self.tokens = {added[OPENING]: "opening", added[CLOSING]: "closing"}
        self._pieces = tokenizer.pieces
        self._ends_text = list(tokenizer.eos_token_ids)
        self._vocab_size = vocab_size
        self.patterns: dict[Tag, Pattern] = {
            "opening": Pattern([added[OPENING]] if self.tokens else OPENING.encode()),
            "closing": Pattern([added[CLOSING]] if self.tokens else CLOSING.encode()),
        }
        self.closing_ids = tuple(tokenizer.encode(CLOSING, special=True))
        before, after = _newlines_around(tokenizer.chat_template or "")
        self.before_closing_ids = self._newlines(tokenizer, before)
        """Newlines that the model's template writes before a closing tag, as tokens."""
        self.after_closing_ids = self._newlines(tokenizer, after)

    def symbols(self, token: int) -> Sequence:
        """What `patterns` are made of: the token itself, or its bytes."""
        return (token,) if self.tokens else self._pieces[token] if token < len(self._pieces) else b""

    def ends_line(self, token: int) -> bool:
        """Whether the token's text ends with a newline."""
        return token < len(self._pieces) and self._pieces[token].endswith(b"\n")

    @functools.lru_cache(maxsize=32)  # noqa: B019  (one per model, which lives as long as the program)
    def without(self, tag: Tag, state: int) -> Tensor:
        """bool [vocab_size]: every token but those that complete `tag`, whose first `state` symbols are there.

        Without the closing tag, the text cannot end either.
        """
        allowed = torch.ones(self._vocab_size, dtype=torch.bool)
        symbols = self.patterns[tag].symbols
        if self.tokens:
            allowed[list(symbols)] = False
        else:
            begun, whole = bytes(symbols[:state]), bytes(symbols)
            allowed[[token for token, piece in enumerate(self._pieces) if whole in begun + piece]] = False
        if tag == "closing":
            allowed[self._ends_text] = False
        return allowed

    def _newlines(self, tokenizer: Tokenizer, count: int) -> tuple[int, ...]:
        """Tokens that are so many newlines and nothing else (some vocabularies put a space before)."""
        tokens = tokenizer.encode("\n" * count)
        return tuple(tokens) if b"".join(self._pieces[token] for token in tokens) == b"\n" * count else ()


def find_think_tags(tokenizer: Tokenizer, vocab_size: int) -> ThinkTags | None:
    """The think tags of a model with a vocabulary of this size, or None where it has none.

    A model has them when both are added tokens of its vocabulary, or when its chat template spells both.
    """
    added = {token.content for token in tokenizer.backend.get_added_tokens_decoder().values()}
    template = tokenizer.chat_template or ""
    if {OPENING, CLOSING} <= added or (OPENING in template and CLOSING in template):
        return ThinkTags(tokenizer, vocab_size)
    return None


class ThoughtTracker:
    """Where in its thoughts one request is, which tokens must come next, and which cannot."""

    def __init__(self, tags: ThinkTags, thinking: Thinking | None, *, inside: bool) -> None:
        """`inside`: the prompt ends inside thoughts. Raises `UserError` when the bounds contradict each other."""
        thinking = thinking or Thinking()
        self._budget, self._minimum = thinking.budget, thinking.minimum
        if self._budget is not None and self._minimum > self._budget:
            raise UserError(
                f"thinking: minimum {self._minimum} is above budget {self._budget}; lower the one or raise the other"
            )
        self._tags = tags
        self.inside = inside
        """Whether the next token belongs to thoughts (or closes them)."""
        self.thoughts = 0
        """Thought tokens so far. Tokens of a tag that is still incomplete count until it is whole."""
        self.reasoning = 0
        """Thought tokens and tokens of tags, as in `Usage.reasoning`."""
        self.forced: tuple[int, ...] = ()
        """Tokens that must come next, in this order, instead of drawn ones."""
        self.tag_tokens = 0
        """How many tokens the last whole tag spans."""
        self._closed = False
        self._state = 0
        self._recent: tuple[int, ...] = ()  # symbols in each token that may be part of a tag, the newest last
        self._since_tag = 0
        self._force(ends_line=True)

    def advance(self, token: int) -> None:
        """Take `token` as drawn. While tokens are forced it must be the first of them."""
        assert not self.forced or token == self.forced[0], f"{token=} {self.forced=}"
        self.forced = self.forced[1:]
        symbols = self._tags.symbols(token)
        whole = False
        for place, symbol in enumerate(symbols):
            pattern = self._tags.patterns[self._awaited]
            self._state = pattern.step(self._state, symbol)
            if self._state == len(pattern):
                whole = True
                self._complete(place + 1, len(pattern))
        if whole:
            self.reasoning += 1
            self._recent = (len(symbols),)
        else:
            self.thoughts += self.inside
            self.reasoning += self.inside
            self._since_tag += 1
            self._recent = (*self._recent, len(symbols))[-len(self._tags.patterns["closing"]) :]
        self._force(ends_line=self._tags.ends_line(token))

    @property
    def answering(self) -> bool:
        """Whether the next token belongs to the answer: outside thoughts, and the engine has nothing left to write."""
        return not self.inside and not self.forced

    def mask(self) -> Tensor | None:
        """bool [vocab_size] of the tokens that may be drawn next; None where all may. Forced tokens go before it."""
        if self.inside:
            if self.thoughts - self._partial(self._state) < self._minimum:
                return self._tags.without("closing", self._state)
        elif self._closed and self._budget is not None and self.thoughts >= self._budget:
            return self._tags.without("opening", self._state)
        return None

    @property
    def _awaited(self) -> Tag:
        return "closing" if self.inside else "opening"

    def _complete(self, symbols_now: int, length: int) -> None:
        """A tag is whole: `symbols_now` of the present token are used, and the tag has `length` in all."""
        before = self._partial(length - symbols_now)
        self.tag_tokens = before + 1
        if self.inside:
            self.thoughts -= before
            self._closed = True
        else:
            self.reasoning += before
        self.inside = not self.inside
        self._state, self._since_tag, self._recent = 0, 0, ()

    def _partial(self, symbols: int) -> int:
        """How many of the last tokens, back to the last tag, hold the last `symbols` symbols."""
        count = 0
        for length in reversed(self._recent):
            if symbols <= 0:
                break
            symbols -= length
            count += 1
        return min(count, self._since_tag)

    def _force(self, *, ends_line: bool) -> None:
        """Close where the budget ends. The newline that a template writes before the tag is its last thought."""
        if not self.inside or self.forced or self._budget is None:
            return
        before = self._tags.before_closing_ids
        closing = self._tags.closing_ids + self._tags.after_closing_ids
        if self.thoughts >= self._budget:
            self.forced = closing
        elif before and not ends_line and 0 < self.thoughts == self._budget - len(before):
            self.forced = before + closing


def _newlines_around(template: str) -> tuple[int, int]:
    """How many newlines a chat template writes before and after a closing tag, at most."""
    newline = r"(?:\\n|\n)"  # in a string of the template's program, or as it stands
    found = re.findall(rf"({newline}*){re.escape(CLOSING)}({newline}*)", template)
    counts = [(len(re.findall(newline, before)), len(re.findall(newline, after))) for before, after in found]
    return max((before for before, _ in counts), default=0), max((after for _, after in counts), default=0)
