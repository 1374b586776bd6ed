"""Conversations to learn from: files of them, and what of each is asked and what is to be said.

Rows of JSON Lines or Parquet in the public forms:

    {"messages": [{"role": "user", "content": …}, {"role": "assistant", "content": …}, …]}
    {"conversations": [{"from": "human", "value": …}, {"from": "gpt", "value": …}, …]}       ShareGPT's
    {"prompt": …, "completion": …}                                                           texts, or lists of messages

An assistant's thought is `reasoning_content` (or `thinking`, `reasoning`), or stands in think tags before the rest of
its `content`. Rows in which assistants call tools are refused; what other keys a row has does not matter.

Every answer of an assistant is one `Turn`: the chat template's text of all that came before it, with the opening of an
answer, exactly as it would be asked at inference; and the answer, thought first, to the token that ends it.
"""

import functools
import json
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fathom.data.chat import CLOSING, OPENING, REASONING_FIELDS
from fathom.data.template_encoding import TemplateEncoder
from fathom.data.tokenizer import Tokenizer
from fathom.errors import UserError, nearest

_SHAREGPT = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_ROLES = ("system", "user", "assistant", "developer")
_COLUMNS = ("messages", "conversations", "prompt", "completion", "tools")
"""What is looked at of a row."""
_SPOKEN = ("content", *REASONING_FIELDS)
"""What of a message is said; a key that is nearly one of these, and none of them, is a slip."""
_NEARLY = 0.8

_UNKNOWN = "no 'messages', 'conversations' or 'prompt' and 'completion'"

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Conversation:
    """One row."""

    messages: tuple[Message, ...]
    where: str
    """File and row, for messages to people."""

    @property
    def question(self) -> str:
        """What people said first, or the system where they say nothing; rows with the same are about the same."""
        return next((m["content"] for m in self.messages if m["role"] == "user"), self.messages[0]["content"])

    def with_system(self, text: str) -> "Conversation":
        """The same behind a system message of `text`, where it has none and `text` is not empty."""
        if not text or self.messages[0]["role"] in ("system", "developer"):
            return self
        return replace(self, messages=({"role": "system", "content": text}, *self.messages))


@dataclass(frozen=True)
class Turn:
    """One answer to be learnt."""

    prompt_ids: list[int]
    """All before it, and the opening of an answer."""
    response_ids: list[int]
    """Thought, answer, and the token that ends it."""

    @property
    def rows(self) -> int:
        """Positions that are computed: the last token is predicted and never read."""
        return len(self.prompt_ids) + len(self.response_ids) - 1


def read_conversations(path: Path) -> Iterator[Conversation]:
    """The rows of a `.jsonl`, `.ndjson` or `.parquet` file. Raises `UserError` with the row and what is wrong there."""
    for number, row in _rows(path):
        where = f"{path}:{number}"
        yield Conversation(tuple(_messages(row, where)), where)


class TurnEncoder:
    """Makes turns of conversations, with one model's tokenizer and chat template."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises `UserError` where the model has no chat template, or names no token that ends a text."""
        if tokenizer.chat_template is None:
            raise UserError("this model's folder has no chat template, without which it cannot learn conversations")
        if not tokenizer.eos_token_ids:
            raise UserError("this model's folder names no token that ends a text (eos_token_id)")
        self._tokenizer, self._encoder = tokenizer, TemplateEncoder(tokenizer)
        # An answer that no template writes itself, so that what follows it is found whatever the marker is made of.
        self._nothing_else = secrets.token_hex(16)

    def turns(self, conversation: Conversation) -> list[Turn]:
        """Every answer of an assistant. Raises `UserError` where the template refuses the messages.

        What the texts spell is text, whatever it looks like: only the template's own markers, and the think tags
        between thought and answer, become control tokens.
        """
        messages: list[Message] = self._encoder.protect(conversation.messages)
        try:
            return [
                self._turn(messages[:place], message)
                for place, message in enumerate(messages)
                if message["role"] == "assistant"
            ]
        except UserError as error:
            raise UserError(f"{conversation.where}: {error}") from None

    def _turn(self, before: Sequence[Message], message: Message) -> Turn:
        thought, content = message.get("reasoning_content", ""), message["content"]
        wanted = bool(thought)
        prompt = self._tokenizer.apply_chat_template(before, thinking=wanted, enable_thinking=wanted)
        opened = prompt.rstrip()
        if opened.endswith(OPENING):
            response = f"{thought}{CLOSING}{content}"
        elif thought and not opened.endswith(CLOSING):
            response = f"{OPENING}{thought}{CLOSING}{content}"
        elif thought:
            raise UserError("the chat template leaves no place for the thought; leave it out of the row")
        else:
            response = content
        encode = self._encoder.encode
        return Turn(encode(prompt), [*encode(response), self._end(before)])

    def _end(self, before: Sequence[Message]) -> int:
        """The token that the template writes after an answer; where it writes none, the first that ends a text."""
        ends = self._tokenizer.eos_token_ids
        said = [*before, {"role": "assistant", "content": self._nothing_else}]
        whole = self._tokenizer.apply_chat_template(said, add_generation_prompt=False)
        tail = self._encoder.encode(whole.rpartition(self._nothing_else)[2])
        return next((token for token in tail if token in ends), ends[0])


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        if path.suffix == ".parquet":
            yield from _parquet(path)
        elif path.suffix in (".jsonl", ".ndjson"):
            yield from _jsonl(path)
        else:
            raise UserError(f"{path}: conversations are read from .jsonl, .ndjson and .parquet files")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def _jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except UnicodeDecodeError:
                    raise UserError(f"{path}:{number}: not UTF-8 text") from None
                except json.JSONDecodeError as error:
                    raise UserError(f"{path}:{number}: not JSON: {error.msg} (character {error.pos + 1})") from None
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{path}:{number}: not JSON: {error}") from None


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            number, names = 0, table.schema_arrow.names
            if not (known := [name for name in _COLUMNS if name in names]):
                raise UserError(f"{path}: {_UNKNOWN}; its columns are {_named(names)}")
            # Others may hold what Python has no value for, such as a time of nanoseconds.
            for batch in table.iter_batches(batch_size=256, columns=known):
                for row in _rows_of(batch, f"{path}:{number + 1}"):
                    yield (number := number + 1), row
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{path}: no Parquet file, or damaged ({str(error).splitlines()[0]})") from None


def _rows_of(batch: Any, where: str) -> list[Any]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        raise
    except (ValueError, OverflowError) as error:
        raise UserError(
            f"{where}: this row, or one of the {len(batch) - 1} after it, holds a value that cannot be read "
            f"({str(error).splitlines()[0]}); write the conversations alone"
        ) from None


def _named(names: Iterable[Any]) -> str:
    return ", ".join(str(name).encode(errors="replace").decode() for name in names) or "nothing"


def _messages(row: Any, where: str) -> Iterator[dict[str, Any]]:
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: a row is an object with 'messages', not {type(row).__name__}")
    if row.get("tools"):
        raise UserError(f"{where}: has 'tools', whose use is not learnt here; leave the row out")
    if row.get("messages") is not None:
        found = row["messages"]
    elif row.get("conversations") is not None:
        found = [_sharegpt(entry, where) for entry in _list(row["conversations"], "conversations", where)]
    elif row.get("prompt") is not None and row.get("completion") is not None:
        found = [
            *_said(row["prompt"], "user", "prompt", where),
            *_said(row["completion"], "assistant", "completion", where),
        ]
    else:
        raise UserError(f"{where}: {_UNKNOWN}; the row has {_named(row)}")
    found = [_checked(message, where) for message in _list(found, "messages", where)]
    if not any(message["role"] == "assistant" for message in found):
        raise UserError(f"{where}: no message of an assistant, so there is nothing to learn; leave the row out")
    if found[0]["role"] == "assistant":
        raise UserError(f"{where}: begins with an assistant's message, so nothing is asked; begin with a user's")
    yield from found


def _said(value: Any, role: str, key: str, where: str) -> Sequence[Any]:
    return [{"role": role, "content": value}] if isinstance(value, str) else _list(value, key, where)


def _sharegpt(entry: Any, where: str) -> dict[str, Any]:
    if not isinstance(entry, Mapping) or entry.get("from") not in list(_SHAREGPT) or entry.get("value") is None:
        raise UserError(f"{where}: 'conversations' has entries with 'from' ({', '.join(_SHAREGPT)}) and 'value'")
    return {"role": _SHAREGPT[entry["from"]], "content": entry.get("value")}


def _list(found: Any, key: str, where: str) -> Sequence[Any]:
    if not isinstance(found, list) or not found:
        raise UserError(f"{where}: {key!r} is not a list of messages")
    return found


@functools.lru_cache
def _meant(key: str) -> str:
    return nearest(key, _SPOKEN, cutoff=_NEARLY)


def _check_keys(message: Message, where: str) -> None:
    """Raises `UserError` for a message that says what it says under another name, and would be learnt without it."""
    for key in message:
        if key not in _SPOKEN and (meant := _meant(key)):
            raise UserError(f"{where}: a message has {_named([key])!r}, which is not read{meant}")
    if message["role"] != "assistant" and "content" not in message:
        raise UserError(f"{where}: a message of role {message['role']!r} has no 'content'; it has {_named(message)}")
    try:
        json.dumps(message, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: a message holds half a character, which is no text; write the whole one") from None


def _checked(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping) or message.get("role") not in _ROLES:
        role = message.get("role") if isinstance(message, Mapping) else None
        raise UserError(f"{where}: a message has a 'role' ({', '.join(_ROLES)}), not {role!r}, and 'content'")
    if message.get("tool_calls"):
        raise UserError(f"{where}: an assistant calls tools, which is not learnt here; leave the row out")
    kept = {key: value for key, value in message.items() if value is not None}
    _check_keys(kept, where)
    thought = next((kept.pop(key) for key in REASONING_FIELDS if kept.get(key)), "")
    content = kept.get("content", "")
    for key, text in (("thought", thought), ("content", content)):
        if not isinstance(text, str):
            raise UserError(f"{where}: a message's {key} is {json.dumps(text, default=str)[:40]}, not a text")
    if kept["role"] == "assistant":
        if not thought and content.lstrip().startswith(OPENING) and CLOSING in content:
            thought, _, content = content.lstrip().removeprefix(OPENING).partition(CLOSING)
        if not content.strip():
            raise UserError(f"{where}: an assistant's message says nothing; leave the row out")
        if content.lstrip().startswith(OPENING):
            raise UserError(f"{where}: an assistant's message opens {OPENING} and does not close it, or twice")
    return kept | {"content": content} | ({"reasoning_content": thought} if thought else {})
