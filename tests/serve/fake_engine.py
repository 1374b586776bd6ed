"""An engine that plays scripts instead of computing, and remembers what it was asked."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fathom.engine.protocol import Chunk, Part, QueueFull, Request, Statistics, TokenLogprob, Usage
from fathom.errors import UserError

STALL = object()
"""In a script: say nothing more until cancelled or `go_on` is set."""


@dataclass
class FakeTicket:
    """Remembers whether it was cancelled."""

    cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """See `protocol.Ticket`."""
        self.cancelled.set()


@dataclass
class FakeEngine:
    """Plays `scripts` in turn: texts for the answer, ("thinking", text) for thoughts, `STALL`, or an exception."""

    scripts: Sequence[Sequence[object]] = (("Hello", " world"),)
    context: int = 4096
    finish: str = "stop"
    refuse: UserError | None = None
    requests: list[Request] = field(default_factory=list)
    tickets: list[FakeTicket] = field(default_factory=list)
    go_on: threading.Event = field(default_factory=threading.Event)
    stalled: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)
    """Some request was cancelled and has said so."""
    closed: bool = False
    full_after: int | None = None
    """`QueueFull` once this many requests have been taken."""

    def submit(self, request: Request, deliver: Callable[[Chunk], None]) -> FakeTicket:
        """See `protocol.Engine`."""
        if self.refuse is not None:
            raise self.refuse
        if self.full_after is not None and len(self.requests) >= self.full_after:
            raise QueueFull("the queue holds as many requests as it may; try again later")
        script = self.scripts[len(self.requests) % len(self.scripts)]
        self.requests.append(request)
        ticket = FakeTicket()
        self.tickets.append(ticket)
        threading.Thread(target=self._play, args=(request, script, ticket, deliver), daemon=True).start()
        return ticket

    def statistics(self) -> Statistics:
        """See `protocol.Engine`."""
        return Statistics(
            running=2, waiting=3, cache_blocks=10, cache_blocks_used=4, drafted_tokens=8, accepted_tokens=6
        )

    def close(self, drain_seconds: float = 0.0) -> None:
        """See `protocol.Engine`."""
        self.closed = True
        for ticket in self.tickets:
            ticket.cancel()

    def _play(self, request: Request, script: Sequence[object], ticket: FakeTicket, deliver) -> None:
        prompt, drawn, thought = len(request.prompt_ids), 0, 0
        part: Part = "answer"
        finish, message, fault = self.finish, "", "engine"
        for step in script:
            if step is STALL:
                self.stalled.set()
                while not (ticket.cancelled.is_set() or self.go_on.is_set()):
                    ticket.cancelled.wait(0.005)
                if ticket.cancelled.is_set():
                    finish = "cancelled"
                    break
                continue
            if isinstance(step, Exception):
                finish, message = "error", str(step)
                fault = "request" if isinstance(step, UserError) else "engine"
                break
            part, text = step if isinstance(step, tuple) else ("answer", step)
            drawn += 1
            thought += part == "thinking"
            logprobs = None
            if request.logprobs is not None:
                top = [(20 + place, -1.0 - place) for place in range(request.logprobs)]
                logprobs = [TokenLogprob(20, float("-inf") if text == "impossible" else -0.5, top)]
            deliver(Chunk(part, text, [20], logprobs, Usage(prompt, 1, drawn, thought)))
        deliver(Chunk(part, "", [], None, Usage(prompt, 1, drawn, thought), finish, message, fault))
        if finish == "cancelled":
            self.ended.set()
