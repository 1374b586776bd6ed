"""Questions that must not be learnt, because something is measured with them.

A question is contaminated where a held-out one is *equal* to it but for case, spaces and punctuation, or *nearly*:
where it has enough of the held-out one's 13-grams (stretches of 13 words, numbers and signs; GPT-3, arXiv 2005.14165
App. C). Held-out questions of 13 units or fewer count as a whole, also where they stand in a longer text, behind a
greeting or before an instruction; there, one of fewer than 5 units is no question but a turn of phrase, and one that
goes on as a formula (`2 + 3` in `2 + 3 + 4`) is another.

Of these 13-grams only those count that no other held-out question has. What several have in common is the wording of a
task ("Answer with the number alone") and tells none of them apart: problems made by rule share most of their text.
Where a question has none of its own, all of its count.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fathom.data.conversations import read_conversations
from fathom.errors import UserError
from fathom.report.tables import plural
from fathom.tasks.words import ngrams, units

NGRAM = 13
_PHRASE = 5
"""Units of a question that is looked for inside other texts, at least."""
_NAMED = 5
_ASKS = ("system", "user")
"""Whose messages ask."""
_FIELDS = ("question", "problem", "prompt")


class HeldOut:
    """Held-out questions, to compare others with."""

    def __init__(self, questions: Iterable[str], overlap: float) -> None:
        """`overlap` is the share of a held-out question's 13-grams that makes another nearly equal; 0: any one."""
        self._overlap = overlap
        self._whole = {tuple(units(question)) for question in questions} - {()}
        self._lengths = sorted({len(words) for words in self._whole if _PHRASE <= len(words) <= NGRAM})
        grams = {words: set(ngrams(words, NGRAM)) for words in self._whole if len(words) > NGRAM}
        shared = Counter(gram for own in grams.values() for gram in own)
        self._sizes: dict[tuple[str, ...], int] = {}
        self._owners: dict[tuple[str, ...], list[tuple[str, ...]]] = defaultdict(list)
        for words, all_of_it in grams.items():
            own = {gram for gram in all_of_it if shared[gram] == 1} or all_of_it
            self._sizes[words] = len(own)
            for gram in own:
                self._owners[gram].append(words)

    def has(self, text: str) -> bool:
        """Whether it is or asks a held-out question, or nearly."""
        words = tuple(units(text))
        if words in self._whole or self._stands_in(words):
            return True
        found = (owner for gram in set(ngrams(words, NGRAM)) for owner in self._owners.get(gram, ()))
        return any(count >= self._overlap * self._sizes[owner] for owner, count in Counter(found).items())

    def _stands_in(self, words: tuple[str, ...]) -> bool:
        """Whether a short question is a part of `words` that is no part of a longer formula."""
        for length in self._lengths:
            for begin in range(len(words) - length + 1):
                end = begin + length
                if words[begin:end] in self._whole and not (
                    (begin and _joins(words[begin - 1], words[begin]))
                    or (end < len(words) and _joins(words[end - 1], words[end]))
                ):
                    return True
        return False


def _joins(left: str, right: str) -> bool:
    """Whether two neighbouring units are of one formula: neither is a word."""
    return not any(character.isalpha() for character in left + right)


class HeldOutSets:
    """Several sets of held-out questions, each compared with by itself: a question that is in two of them would
    otherwise share all of its wording with another, and nothing would be near to it."""

    def __init__(self, sets: Iterable[Iterable[str]], overlap: float) -> None:
        """`overlap` as in `HeldOut`."""
        self._sets = [HeldOut(questions, overlap) for questions in sets]

    def has(self, text: str) -> bool:
        """Whether one of the sets has it, or nearly."""
        return any(held_out.has(text) for held_out in self._sets)


def refuse_contaminated(files: Sequence[str], held_out: HeldOut | HeldOutSets, *, where: str) -> None:
    """Raises `UserError` that names the rows of `files`, which are those of `where`, that ask a held-out question."""
    found = [
        conversation.where
        for file in files
        for conversation in read_conversations(Path(file))
        if any(held_out.has(message["content"]) for message in conversation.messages if message["role"] in _ASKS)
    ]
    if found:
        more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        raise UserError(
            f"the held-out set is contaminated: {plural(len(found), 'training row')} of {where} ask a "
            f"held-out question: {', '.join(found[:_NAMED])}{more}; take these rows out"
        )


def read_questions(path: Path) -> Iterator[str]:
    """The questions of a JSON Lines file. Raises `UserError` with the row and what is wrong there, and where there are
    none: to compare with nothing finds nothing."""
    if path.suffix == ".parquet":
        raise UserError(f"{path}: held-out questions are read from JSON Lines; write them so")
    none = True
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    none = False
                    yield _question(line, f"{path}:{number}")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    if none:
        raise UserError(f"{path}: holds no question; leave it out, or put the held-out questions there")


def _question(line: bytes, where: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON: {error}") from None
    found = _asked(row) if isinstance(row, Mapping) else None
    if not isinstance(found, str) or not found.strip():
        raise UserError(f"{where}: no question; a row has 'question', 'problem' or 'prompt', or 'messages' of a user")
    return found


def _asked(row: Mapping[str, Any]) -> Any:
    """The question of a row, in the fields that hold one."""
    if (found := next((row[name] for name in _FIELDS if name in row), None)) is not None:
        return found
    messages = row.get("messages")
    said = messages if isinstance(messages, list) else []
    return next((m.get("content") for m in said if isinstance(m, Mapping) and m.get("role") == "user"), None)
