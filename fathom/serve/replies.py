"""From the engine's chunks to what a client reads: events of a stream as they come, or one object at the end."""

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from fathom.engine.consensus import consensus
from fathom.engine.protocol import Chunk, FinishReason, Usage
from fathom.serve.logprobs import TokenSpelling
from fathom.serve.tools import Call, ToolReader

_REASONS: dict[FinishReason, str] = {
    "stop": "stop",
    "length": "length",
    "cancelled": "insufficient_system_resource",  # DeepSeek's word for an answer that the server cut short
}


class Reply(Protocol):
    """What is made of the chunks of one job."""

    def feed(self, place: int, chunk: Chunk) -> list[dict[str, Any]]:
        """Take the next chunk of the job's request at `place`; the events to stream for it."""
        ...

    def result(self) -> dict[str, Any]:
        """The whole answer, once every request has ended."""
        ...

    def usage_event(self) -> dict[str, Any]:
        """The event without choices that ends a stream with its cost."""
        ...


def usage_object(usages: Sequence[Usage], *, samples: int) -> dict[str, Any]:
    """OpenAI's and DeepSeek's account. Each prompt counts once, however many samples were drawn from it."""
    prompt = sum(usage.prompt for usage in usages[::samples])
    cached = sum(usage.cached for usage in usages[::samples])
    completion = sum(usage.completion for usage in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": sum(usage.reasoning for usage in usages)},
        "prompt_cache_hit_tokens": cached,
        "prompt_cache_miss_tokens": prompt - cached,
    }


def best(texts: Sequence[str], keep: int) -> list[tuple[int, int]]:
    """(place, votes) of the `keep` texts that most others agree with, best first."""
    votes = consensus(texts).votes
    return sorted(enumerate(votes), key=lambda entry: -entry[1])[:keep]


class _Envelope:
    """What every object of one answer carries."""

    def __init__(self, prefix: str, kind: str, chunk_kind: str, model: str, *, samples: int, with_usage: bool) -> None:
        self._common = {"id": f"{prefix}-{secrets.token_hex(16)}", "created": int(time.time()), "model": model}
        self._kind, self._chunk_kind = kind, chunk_kind
        self._samples = samples
        self._with_usage = with_usage
        self.usages: list[Usage] = []

    def event(self, choice: dict[str, Any]) -> dict[str, Any]:
        absent = {"usage": None} if self._with_usage else {}
        return {**self._common, "object": self._chunk_kind, "choices": [choice], **absent}

    def usage_event(self) -> dict[str, Any]:
        return {**self._common, "object": self._chunk_kind, "choices": [], "usage": self._usage()}

    def result(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        numbered = [{**choice, "index": index} for index, choice in enumerate(choices)]
        return {**self._common, "object": self._kind, "choices": numbered, "usage": self._usage()}

    def _usage(self) -> dict[str, Any]:
        return usage_object(self.usages, samples=self._samples)


@dataclass
class _ChatChoice:
    reader: ToolReader | None
    begun: bool = False
    thoughts: list[str] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    logprobs: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {"content": [], "reasoning_content": []})
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None

    def deltas(self, chunk: Chunk) -> list[dict[str, Any]]:
        """What `chunk` adds to the message."""
        if chunk.part == "thinking":
            self.thoughts += [chunk.text] if chunk.text else []
            found = [{"reasoning_content": chunk.text}] if chunk.text else []
            return found + (self._answer(self.reader.finish()) if chunk.finish_reason and self.reader else [])
        if self.reader is None:
            return self._answer([chunk.text] if chunk.text else [])
        pieces = self.reader.push(chunk.text)
        return self._answer(pieces + (self.reader.finish() if chunk.finish_reason else []))

    def _answer(self, pieces: Sequence[str | Call]) -> list[dict[str, Any]]:
        found = []
        for piece in pieces:
            if isinstance(piece, Call):
                found.append({"tool_calls": [{"index": len(self.calls), **piece.as_json()}]})
                self.calls.append(piece)
            else:
                found.append({"content": piece})
                self.text.append(piece)
        return found

    def message(self) -> dict[str, Any]:
        text = "".join(self.text)
        content = None if self.calls and not text.strip() else text
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if self.thoughts:
            message["reasoning_content"] = "".join(self.thoughts)
        if self.calls:
            message["tool_calls"] = [call.as_json() for call in self.calls]
        return message


class ChatReply:
    """Answers of /v1/chat/completions. Thoughts come before the answer, as `reasoning_content`.

    With `prompt_ids`, these and the ids of all tokens drawn are told as well.
    """

    def __init__(
        self,
        model: str,
        spelling: TokenSpelling,
        *,
        samples: int,
        keep: int,
        readers: Sequence[ToolReader | None],
        with_usage: bool,
        prompt_ids: Sequence[int] | None = None,
    ) -> None:
        kinds = ("chat.completion", "chat.completion.chunk")
        self._envelope = _Envelope("chatcmpl", *kinds, model, samples=samples, with_usage=with_usage)
        self._envelope.usages = [Usage()] * samples
        self._choices = [_ChatChoice(reader) for reader in readers]
        self._spelling = spelling
        self._keep = keep
        self._prompt_ids = None if prompt_ids is None else {"prompt_token_ids": list(prompt_ids)}
        self._prompt_told = False
        self.usage_event = self._envelope.usage_event

    def feed(self, place: int, chunk: Chunk) -> list[dict[str, Any]]:
        """See `Reply`."""
        choice = self._choices[place]
        self._envelope.usages[place] = chunk.usage
        deltas = choice.deltas(chunk)
        if not choice.begun:
            choice.begun = True
            deltas.insert(0, {"role": "assistant", "content": ""})
        about = self._tokens(choice, chunk)
        if about:
            deltas = deltas or [{}]
        choices = [{"index": place, "delta": delta, "logprobs": None, "finish_reason": None} for delta in deltas]
        if about:
            choices[-1] |= about
        if chunk.finish_reason is not None:
            reason = _REASONS[chunk.finish_reason]
            choice.finish_reason = "tool_calls" if choice.calls and reason == "stop" else reason
            choices.append({"index": place, "delta": {}, "logprobs": None, "finish_reason": choice.finish_reason})
        events = [self._envelope.event(choice) for choice in choices]
        if self._prompt_ids and not self._prompt_told:
            self._prompt_told = True
            events[0] |= self._prompt_ids
        return events

    def _tokens(self, choice: _ChatChoice, chunk: Chunk) -> dict[str, Any]:
        """What is told of the tokens of `chunk`, as far as it was asked for."""
        about: dict[str, Any] = {}
        if chunk.logprobs:
            entries = self._spelling.chat(chunk.logprobs)
            part = "reasoning_content" if chunk.part == "thinking" else "content"
            choice.logprobs[part] += entries
            about["logprobs"] = {"content": [], part: entries}
        if self._prompt_ids and chunk.token_ids:
            choice.token_ids += chunk.token_ids
            about["token_ids"] = chunk.token_ids
        return about

    def result(self) -> dict[str, Any]:
        """See `Reply`."""
        choices = [
            {
                "message": choice.message(),
                "logprobs": choice.logprobs if any(choice.logprobs.values()) else None,
                "finish_reason": choice.finish_reason,
                **({"token_ids": choice.token_ids} if self._prompt_ids else {}),
            }
            for choice in self._choices
        ]
        if self._keep < len(choices):
            ranked = best(["".join(choice.text) for choice in self._choices], self._keep)
            choices = [{**choices[place], "votes": votes} for place, votes in ranked]
        return {**self._envelope.result(choices), **(self._prompt_ids or {})}


@dataclass
class _CompletionChoice:
    echo: str
    thinking: bool
    text: list[str] = field(default_factory=list)
    length: int = 0
    logprobs: dict[str, list[Any]] | None = None
    prompt_ids: Sequence[int] | None = None
    token_ids: list[int] = field(default_factory=list)
    prompt_told: bool = False
    finish_reason: str | None = None

    def ids(self) -> dict[str, list[int]]:
        """The tokens drawn, and those of the prompt, if they are to be told."""
        if self.prompt_ids is None:
            return {}
        return {"prompt_token_ids": list(self.prompt_ids), "token_ids": self.token_ids}

    def ids_since(self, token_ids: list[int]) -> dict[str, list[int]]:
        """The same for an event of a stream that brings `token_ids`: the prompt's come with the first."""
        if self.prompt_ids is None:
            return {}
        self.token_ids += token_ids
        prompt = {} if self.prompt_told else {"prompt_token_ids": list(self.prompt_ids)}
        self.prompt_told = True
        return {**prompt, "token_ids": token_ids}


class CompletionReply:
    """Answers of /v1/completions, which know no parts: thoughts stand in the text, between the model's own tags.

    For each prompt, `echoes` has what is repeated of it, and `inside` whether it ends inside an open think tag. With
    `prompt_ids`, these and the ids of all tokens drawn are told as well.
    """

    def __init__(
        self,
        model: str,
        spelling: TokenSpelling,
        *,
        echoes: Sequence[str],
        inside: Sequence[bool],
        tags: tuple[str, str] | None,
        samples: int,
        keep: int,
        with_usage: bool,
        prompt_ids: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self._envelope = _Envelope(
            "cmpl", "text_completion", "text_completion", model, samples=samples, with_usage=with_usage
        )
        starts = zip(echoes, inside, prompt_ids or [None] * len(echoes), strict=True)
        self._choices = [
            _CompletionChoice(echo, thinking, prompt_ids=ids) for echo, thinking, ids in starts for _ in range(samples)
        ]
        self._envelope.usages = [Usage()] * len(self._choices)
        self._spelling = spelling
        self._tags = tags or ("", "")
        self._samples, self._keep = samples, keep
        self.usage_event = self._envelope.usage_event

    def feed(self, place: int, chunk: Chunk) -> list[dict[str, Any]]:
        """See `Reply`."""
        choice = self._choices[place]
        self._envelope.usages[place] = chunk.usage
        text = self._with_tags(choice, chunk)
        if choice.echo:
            text, choice.echo = choice.echo + text, ""
        logprobs = None
        if chunk.logprobs:
            logprobs = self._spelling.completion(chunk.logprobs, offset=choice.length)
            choice.logprobs = choice.logprobs or {name: [] for name in logprobs}
            for name, values in logprobs.items():
                choice.logprobs[name] += values
            choice.length += sum(len(self._spelling.text(drawn.token_id)) for drawn in chunk.logprobs)
        if text:
            choice.text.append(text)
        if chunk.finish_reason is not None:
            choice.finish_reason = _REASONS[chunk.finish_reason]
        if not (text or logprobs or chunk.finish_reason or (choice.prompt_ids and chunk.token_ids)):
            return []
        told = {"index": place, "text": text, "logprobs": logprobs, "finish_reason": choice.finish_reason}
        return [self._envelope.event(told | choice.ids_since(chunk.token_ids))]

    def result(self) -> dict[str, Any]:
        """See `Reply`."""
        whole = [
            {
                "text": "".join(choice.text),
                "logprobs": choice.logprobs,
                "finish_reason": choice.finish_reason,
                **choice.ids(),
            }
            for choice in self._choices
        ]
        if self._keep == self._samples:
            return self._envelope.result(whole)
        kept = []
        for start in range(0, len(whole), self._samples):
            group = whole[start : start + self._samples]
            ranked = best([choice["text"] for choice in group], self._keep)
            kept += [{**group[place], "votes": votes} for place, votes in ranked]
        return self._envelope.result(kept)

    def _with_tags(self, choice: _CompletionChoice, chunk: Chunk) -> str:
        thinking = chunk.part == "thinking"
        if not chunk.text or thinking == choice.thinking:
            return chunk.text
        choice.thinking = thinking
        return self._tags[0 if thinking else 1] + chunk.text
