"""Whole completions from an engine, for programs that do not stream."""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from fathom.engine.protocol import Chunk, Engine, FinishReason, QueueFull, Request, Ticket, TokenLogprob, Usage
from fathom.errors import UserError


@dataclass
class Completion:
    """What a request gave."""

    text: str = ""
    """The answer."""
    thoughts: str = ""
    token_ids: list[int] = field(default_factory=list)
    """All tokens drawn, those of thoughts and tags included."""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    """One per token, where the request asked for them."""
    usage: Usage = field(default_factory=Usage)
    finish_reason: FinishReason = "stop"

    def add(self, chunk: Chunk) -> None:
        """Take the next chunk. Raises `UserError` for one that reports an error."""
        if chunk.finish_reason == "error" and chunk.fault == "request":
            raise UserError(chunk.message)
        if chunk.finish_reason == "error":
            raise UserError(f"the engine could not finish a completion: {chunk.message}")
        if chunk.part == "thinking":
            self.thoughts += chunk.text
        else:
            self.text += chunk.text
        self.token_ids += chunk.token_ids
        self.logprobs += chunk.logprobs or []
        self.usage = chunk.usage
        self.finish_reason = chunk.finish_reason or self.finish_reason


def complete(engine: Engine, requests: Sequence[Request]) -> list[Completion]:
    """All completions, in the order of the requests, computed together as far as the engine's queue has room.

    Raises `UserError`; then, and when interrupted, it returns when the engine has let go of all of them.
    """
    chunks: list[list[Chunk]] = [[] for _ in requests]
    ended = threading.Semaphore(0)
    under_way = 0

    def listener(received: list[Chunk]) -> Callable[[Chunk], None]:
        def deliver(chunk: Chunk) -> None:
            received.append(chunk)
            if chunk.finish_reason is not None:
                ended.release()

        return deliver

    tickets: list[Ticket] = []
    try:
        while len(tickets) < len(requests):
            place = len(tickets)
            try:
                tickets.append(engine.submit(requests[place], listener(chunks[place])))
                under_way += 1
            except QueueFull:
                if not under_way:
                    raise
                ended.acquire()
                under_way -= 1
        while under_way:
            ended.acquire()
            under_way -= 1
    except BaseException:
        for ticket in tickets:
            ticket.cancel()
        for _ in range(under_way):
            ended.acquire()
        raise
    completions = []
    for received in chunks:
        completion = Completion()
        for chunk in received:
            completion.add(chunk)
        completions.append(completion)
    return completions


def listed(prompts: Iterable[str | list[int]]) -> list[str | list[int]]:
    """`prompts` as a list. Raises `UserError` for what is likely meant as one prompt, or as a conversation."""
    if isinstance(prompts, str):
        shown = prompts if len(prompts) <= 20 else f"{prompts[:19]}…"
        raise UserError(f"prompts is one text; give a list: [{shown!r}]")
    listed = list(prompts)
    for prompt in listed:
        if isinstance(prompt, int):
            raise UserError("prompts is one list of token ids; give a list of them: [[1, 2, …]]")
        if isinstance(prompt[0] if isinstance(prompt, list) and prompt else prompt, Mapping):
            raise UserError("prompts are texts or token ids, not messages; put them into the chat template first")
    return listed
