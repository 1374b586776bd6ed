"""What goes into an engine and what comes out: the one interface that serving, rollouts and evaluation see.

A request goes in with `Engine.submit`; chunks of text and tokens come back through the function given with it, in
order, from the engine's own thread, until one carries a `finish_reason`. The built-in engine implements this for one
machine.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, Self

from pydantic import Field

from fathom.config.section import Section
from fathom.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

FinishReason = Literal["stop", "length", "cancelled", "error"]
Part = Literal["thinking", "answer"]
Fault = Literal["request", "engine"]
_SEEDS = 2**63


class Sampling(Section):
    """How the next token is drawn."""

    temperature: float = Field(default=1.0, ge=0, le=100)
    """Divides the logits; 0 takes the most likely token."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Draw from the smallest set of most likely tokens whose probabilities reach this sum."""
    top_k: int = Field(default=0, ge=0)
    """Draw from this many most likely tokens; 0 draws from all."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    """Leave out tokens less likely than this share of the likeliest one's probability."""
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    """Subtracted from the logit of every token that the output already holds."""
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    """Subtracted from a token's logit once for every time that the output holds it."""
    repetition_penalty: float = Field(default=1.0, gt=0, le=10)
    """Divides positive and multiplies negative logits of tokens that prompt or output hold (arXiv 1909.05858)."""
    logit_bias: dict[int, float] = Field(default_factory=dict)
    """Added to the logits of these token ids."""
    seed: int | None = Field(default=None, ge=0, lt=_SEEDS)
    """Same seed, same text, whatever else is in the batch; None draws a fresh one."""

    def of_sample(self, place: int) -> Self:
        """The same for one of several samples: a seed grows by its place, so that they are not all alike."""
        return self if self.seed is None or not place else self.replace(seed=(self.seed + place) % _SEEDS)


class Thinking(Section):
    """Bounds on the tokens between a model's think tags."""

    budget: int | None = Field(default=None, ge=0)
    """After this many tokens the engine writes the closing tag and the model answers; None is no bound."""
    minimum: int = Field(default=0, ge=0)
    """The closing tag cannot be drawn before this many tokens."""


class Constraint(Section):
    """What the answer must look like. Thoughts before it are free."""

    kind: Literal["json_schema", "json_object", "regex", "grammar"]
    """`json_schema`: `text` is a JSON schema; `regex`; `grammar`: a Lark grammar; `json_object`: any JSON object."""
    text: str = ""
    """The schema, expression or grammar."""


@dataclass(frozen=True)
class Request:
    """One completion to be made."""

    prompt_ids: list[int]
    """Token ids of the whole prompt, template and all; at least one."""
    max_tokens: int
    """Longest output, thoughts included."""
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    """The text ends before the first of these, wherever token borders fall; not in thoughts."""
    ignore_eos: bool = False
    """Go on after the model's end-of-text token (benchmarks, tests)."""
    logprobs: int | None = None
    """With every token, its log-probability and this many of the likeliest alternatives; None gives none."""
    tempered_logprobs: bool = False
    """Log-probabilities are of the temperature of `sampling` rather than 1; a remote endpoint cannot give these."""
    thinking: Thinking | None = None
    """Bounds on thoughts; None leaves them free. Needs a model whose vocabulary has think tags."""
    starts_thinking: bool = False
    """The prompt ends inside an open think tag, so that the output begins with thoughts."""
    constraint: Constraint | None = None
    cache_salt: str = ""
    """Requests share cached prefixes only with those of equal salt: one per user keeps users apart."""


@dataclass(frozen=True)
class TokenLogprob:
    """A drawn token with its log-probability under the model, and alternatives.

    Of temperature 1, or that of the request if it asks for it; before bias, penalties, masks and filters.
    """

    token_id: int
    logprob: float
    top: list[tuple[int, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Usage:
    """What a request has cost so far, in tokens."""

    prompt: int = 0
    cached: int = 0
    """Of the prompt, how many were found in the prefix cache, or read by another request at the same time."""
    completion: int = 0
    """Tokens drawn, thoughts and the end-of-text token included."""
    reasoning: int = 0
    """Of them, tokens of thoughts, tags included."""


@dataclass(frozen=True)
class Chunk:
    """The next piece of an output. Text waits while it could still be part of a stop string, tag or character."""

    part: Part
    """What `text` belongs to; tags are in neither."""
    text: str
    token_ids: list[int]
    """Tokens drawn since the last chunk, whether or not `text` shows them yet."""
    logprobs: list[TokenLogprob] | None
    """One for each of `token_ids`, if asked for."""
    usage: Usage
    finish_reason: FinishReason | None = None
    """Set on the last chunk of a request, and on no other."""
    message: str = ""
    """What went wrong, with finish_reason `error`."""
    fault: Fault = "engine"
    """Whose it is: `request` for a grammar that cannot be followed to the end."""
    routes: "Tensor | None" = field(default=None, compare=False, repr=False)
    """On the last chunk of a request that ended by `stop` or `length`, where the engine records them: the experts that
    computed each token, int16 [prompt + completion - 1, mixture-of-experts layers, num_experts_per_tok]. The last token
    was drawn, but not computed."""


class QueueFull(UserError):
    """The engine's queue is at its bound: try again later."""


class Ticket(Protocol):
    """A request under way."""

    def cancel(self) -> None:
        """Stop it soon; its last chunk then says `cancelled`, unless it had just ended. From any thread, repeatedly."""
        ...


@dataclass(frozen=True)
class Statistics:
    """Counters since the start and levels now."""

    running: int = 0
    waiting: int = 0
    cache_blocks: int = 0
    cache_blocks_used: int = 0
    """Blocks that running requests hold; blocks kept only for later prefixes are not counted."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    """Of the drafted ones."""
    read_tokens: int = 0
    """Tokens of prompts that were computed, some of them again after memory had run short."""


class Engine(Protocol):
    """Requests in, chunks out."""

    context: int
    """Longest prompt and output together, in tokens."""

    def submit(self, request: Request, deliver: Callable[[Chunk], None]) -> Ticket:
        """Queue `request`; `deliver` is called from the engine's thread and must return at once.

        Raises `UserError` for a request that cannot be served (and `QueueFull` for one that cannot be now).
        """
        ...

    def statistics(self) -> Statistics:
        """Counters and levels, from any thread."""
        ...

    def close(self, drain_seconds: float = 0.0) -> None:
        """Take no more requests, let running ones finish for this long, cancel the rest, and end the thread."""
        ...
