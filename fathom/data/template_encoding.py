"""Rendered chat templates to token ids, with no way for a client's text to become a control token.

A template writes its markers (`<|im_end|>`) and a client's words into one string. Encoded as it stands, a client that
spells a marker would end its own turn and begin another's. So every marker in a client's text is *protected* before
the template sees it: replaced by a secret number that stands for it, drawn anew for each process. Digits survive what
templates do to contents (trimming, splitting, changing case, writing JSON). After rendering, all markers that are
still spelled out are the template's own. They become other secret numbers, which a copy of the tokenizer has for its
control tokens; then protected ones are spelled out again, and to that copy they are plain text.
"""

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer as Backend

from fathom.data.tokenizer import Tokenizer
from fathom.errors import UserError


class TemplateEncoder:
    """Protects a client's texts, and encodes strings in which they stand between a template's markers."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        added = tokenizer.backend.get_added_tokens_decoder()
        control = {number: token.content for number, token in added.items() if token.content.strip()}
        self._spelled = control
        self._numbers = {spelling: number for number, spelling in control.items()}
        self._marker = re.compile(_any_of(list(self._numbers)))
        self._protected, self._meant = _secret(), _secret()
        self._stand_in = re.compile(rf"{self._protected}(\d{{9}})")
        self._backend, self._ids = _renamed(tokenizer.backend, control, self._meant)

    def protect(self, value: Any) -> Any:
        """`value` (a text, or JSON with texts in it, keys included) with every marker replaced by its stand-in."""
        if isinstance(value, str):
            return self._marker.sub(lambda found: self._name(self._protected, found[0]), value)
        if isinstance(value, Mapping):
            return {self.protect(key): self.protect(item) for key, item in value.items()}
        if isinstance(value, Sequence):
            return [self.protect(item) for item in value]
        return value

    def reveal(self, text: str) -> str:
        """`text` with stand-ins spelled out again, as its author wrote it."""
        return self._stand_in.sub(lambda found: self._spelled[int(found[1])], text)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`: markers become control tokens, stand-ins the plain spelling of theirs.

        Raises `UserError` should a vocabulary reach a control token from plain text all the same.
        """
        meant = self._marker.sub(lambda found: self._name(self._meant, found[0]), text)
        drawn = self._backend.encode(self.reveal(meant), add_special_tokens=False).ids
        if forged := next((number for number in drawn if number not in self._ids and number in self._spelled), None):
            raise UserError(f"the text spells the control token '{self._spelled[forged]}', which only templates may")
        return [self._ids.get(number, number) for number in drawn]

    def _name(self, secret: str, spelling: str) -> str:
        return f"{secret}{self._numbers[spelling]:09d}"


def _secret() -> str:
    # Nobody can guess it, and it begins with no part of its own end, so that digits before it change nothing.
    return "1" + "".join(secrets.choice("023456789") for _ in range(39))


def _any_of(words: Sequence[str]) -> str:
    """A pattern for the longest of `words` that begins at a place; one that never matches for none.

    It is a tree: trying hundreds of markers one after another, at every `<` of a long text, would take a minute.
    """
    if not words:
        return r"(?!)"
    rests: dict[str, list[str]] = {}
    for word in filter(None, words):
        rests.setdefault(word[0], []).append(word[1:])
    branches = [re.escape(first) + (_any_of(rest) if any(rest) else "") for first, rest in rests.items()]
    if len(branches) == 1 and all(words):
        return branches[0]
    return f"(?:{'|'.join(branches)})" + ("" if all(words) else "?")


def _renamed(backend: Backend, control: Mapping[int, str], secret: str) -> tuple[Backend, dict[int, int]]:
    """A copy of `backend` with control tokens spelled `secret` + number, and its ids of added tokens -> real ones."""
    definition = json.loads(backend.to_str())
    definition["post_processor"] = None
    names = {}
    for token in definition["added_tokens"]:
        if token["id"] in control:
            names[token["id"]] = token["content"] = f"{secret}{token['id']:09d}"
            token["single_word"] = False  # a stand-in has digits for neighbours where a marker had none
        else:
            names[token["id"]] = token["content"]
    model = definition["model"]
    if "merges" in model:  # some converted vocabularies could reach a control token by merging as well
        spelled = set(control.values())
        joined = ["".join(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]
        model["merges"] = [pair for pair, text in zip(model["merges"], joined, strict=True) if text not in spelled]
    copy = Backend.from_str(json.dumps(definition))
    copy.no_truncation()
    copy.no_padding()
    return copy, {copy.token_to_id(name): number for number, name in names.items()}
