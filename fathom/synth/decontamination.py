"""Questions that must not be learnt, because something is measured with them.

A question is contaminated where a held-out one is *equal* to it but for case, spaces and punctuation, or *nearly*:
where it has enough of the held-out one's 13-grams (stretches of 13 words, numbers and signs; GPT-3, arXiv 2005.14165
App. C). Held-out questions of 13 units or fewer count as a whole.

Of these 13-grams only those count that no other held-out question has. What several have in common is the wording of a
task ("Answer with the number alone") and tells none of them apart: problems made by rule share most of their text.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fathom.data.conversations import read_conversations
from fathom.errors import UserError
from fathom.report.tables import plural
from fathom.synth.words import ngrams, units

NGRAM = 13
_NAMED = 5
_FIELDS = ("question", "problem", "prompt")


class HeldOut:
    """Held-out questions, to compare others with."""

    def __init__(self, questions: Iterable[str], overlap: float) -> None:
        """`overlap` is the share of a held-out question's 13-grams that makes another nearly equal; 0: any one."""
        self._overlap = overlap
        self._whole = {tuple(units(question)) for question in questions} - {()}
        grams = {words: set(ngrams(words, NGRAM)) for words in self._whole if len(words) > NGRAM}
        shared = Counter(gram for own in grams.values() for gram in own)
        self._sizes = {words: len(own) for words, own in grams.items()}
        self._owner = {gram: words for words, own in grams.items() for gram in own if shared[gram] == 1}

    def has(self, question: str) -> bool:
        """Whether it is a held-out one, or nearly."""
        words = tuple(units(question))
        if words in self._whole:
            return True
        common = Counter(self._owner[gram] for gram in set(ngrams(words, NGRAM)) if gram in self._owner)
        return any(count >= self._overlap * self._sizes[owner] for owner, count in common.items())


class HeldOutSets:
    """Several sets of held-out questions, each compared with by itself: a question that is in two of them would
    otherwise share all of its wording with another, and nothing would be near to it."""

    def __init__(self, sets: Iterable[Iterable[str]], overlap: float) -> None:
        """`overlap` as in `HeldOut`."""
        self._sets = [HeldOut(questions, overlap) for questions in sets]

    def has(self, question: str) -> bool:
        """Whether one of the sets has it, or nearly."""
        return any(held_out.has(question) for held_out in self._sets)


def refuse_contaminated(files: Sequence[str], held_out: HeldOut | HeldOutSets, *, where: str) -> None:
    """Raises `UserError` that names the rows of `files`, which are those of `where`, that ask a held-out question."""
    found = [
        conversation.where
        for file in files
        for conversation in read_conversations(Path(file))
        if any(held_out.has(message["content"]) for message in conversation.messages if message["role"] == "user")
    ]
    if found:
        more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        raise UserError(
            f"the held-out set is contaminated: {plural(len(found), 'training row')} of {where} ask a "
            f"held-out question: {', '.join(found[:_NAMED])}{more}; take these rows out"
        )


def read_questions(path: Path) -> Iterator[str]:
    """The questions of a JSON Lines file. Raises `UserError` with the row and what is wrong there."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _question(line, f"{path}:{number}")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


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
