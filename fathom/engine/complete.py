"""Whole completions from an engine, for programs that do not stream."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fathom.engine.protocol import Chunk, Engine, FinishReason, Request, TokenLogprob, Usage
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
    """All completions, in the order of the requests, computed together. Raises `UserError`, and cancels the rest."""
    chunks: list[list[Chunk]] = [[] for _ in requests]
    ended = threading.Semaphore(0)

    def listener(received: list[Chunk]) -> Callable[[Chunk], None]:
        def deliver(chunk: Chunk) -> None:
            received.append(chunk)
            if chunk.finish_reason is not None:
                ended.release()

        return deliver

    tickets = []
    try:
        for request, received in zip(requests, chunks, strict=True):
            tickets.append(engine.submit(request, listener(received)))
        for _ in requests:
            ended.acquire()
    except BaseException:
        for ticket in tickets:
            ticket.cancel()
        raise
    completions = []
    for received in chunks:
        completion = Completion()
        for chunk in received:
            completion.add(chunk)
        completions.append(completion)
    return completions
