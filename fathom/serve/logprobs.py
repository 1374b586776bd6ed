"""Log-probabilities in OpenAI's two forms: a list of objects for chat, parallel lists for completions."""

import itertools
from collections.abc import Sequence
from typing import Any

from fathom.data.tokenizer import Tokenizer
from fathom.engine.protocol import TokenLogprob

_LOWEST = -9999.0
"""What stands for minus infinity, which JSON cannot write."""


class TokenSpelling:
    """How tokens are shown."""

    def __init__(self, tokenizer: Tokenizer, *, as_ids: bool = False) -> None:
        """`as_ids`: log-probabilities name tokens `token_id:17`, as vLLM has it."""
        self._pieces = tokenizer.pieces
        self._as_ids = as_ids

    def bytes(self, token: int) -> bytes:
        """The bytes that `token` adds to a text; none for ids beyond the vocabulary."""
        return self._pieces[token] if 0 <= token < len(self._pieces) else b""

    def text(self, token: int) -> str:
        """The same as a text; where the bytes are only part of a character, U+FFFD."""
        return self.bytes(token).decode("utf-8", errors="replace")

    def chat(self, logprobs: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
        """The entries of `logprobs.content`."""
        return [
            {
                **self._entry(drawn.token_id, drawn.logprob),
                "top_logprobs": [self._entry(token, logprob) for token, logprob in drawn.top],
            }
            for drawn in logprobs
        ]

    def completion(self, logprobs: Sequence[TokenLogprob], *, offset: int) -> dict[str, Any]:
        """The parallel lists, for tokens whose text begins at character `offset`."""
        lengths = [len(self.text(drawn.token_id)) for drawn in logprobs]
        offsets = [*itertools.accumulate(lengths, initial=offset)][:-1]
        tops = [{self._name(token): _finite(value) for token, value in drawn.top} for drawn in logprobs]
        return {
            "tokens": [self._name(drawn.token_id) for drawn in logprobs],
            "token_logprobs": [_finite(drawn.logprob) for drawn in logprobs],
            "top_logprobs": tops,
            "text_offset": offsets,
        }

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        return {"token": self._name(token), "logprob": _finite(logprob), "bytes": list(self.bytes(token))}

    def _name(self, token: int) -> str:
        return f"token_id:{token}" if self._as_ids else self.text(token)


def _finite(logprob: float) -> float:
    return logprob if logprob > _LOWEST else _LOWEST  # so that what is no number is the lowest as well
