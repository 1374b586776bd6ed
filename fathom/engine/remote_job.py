"""One request to an endpoint: what to ask for next, and what has come of it, whatever became of earlier attempts."""

import asyncio
import secrets
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fathom.data.tokenizer import Tokenizer
from fathom.engine.endpoint import Choice, Dropped, Event, Logprobs, Refused, ServedModel
from fathom.engine.output import OutputStream
from fathom.engine.protocol import Chunk, Constraint, Fault, FinishReason, Request, TokenLogprob
from fathom.engine.thinking import ThinkTags

_LOWEST = -9999.0
"""What stands for minus infinity, which JSON cannot write, at `fathom serve` and vLLM alike."""
_ROUNDING = 1e-3
"""How far above 0 a logarithm of nearly 1 may come to lie."""
_REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length"}


class Job:
    """A request under way at an endpoint."""

    def __init__(
        self,
        request: Request,
        deliver: Callable[[Chunk], None],
        on_last: Callable[["Job"], None],
        tokenizer: Tokenizer,
        tags: ThinkTags | None,
        model: ServedModel,
        vocab_size: int,
    ) -> None:
        """`on_last` is called before the last chunk is delivered.

        Raises `UserError` for an empty stop string, and for thoughts of a model that has none.
        """
        self.request = request
        self.task: asyncio.Task[None] | None = None
        self.tokens: list[int] = []
        """All tokens drawn."""
        self.cached = 0
        """Of the prompt, how many the endpoint found in its cache, if it says so."""
        self._deliver, self._on_last = deliver, on_last
        self._model, self._vocab_size = model.id, vocab_size
        # The endpoint keeps the bounds on thoughts. Here it is only read which tokens are thoughts.
        self._output = OutputStream(tokenizer, replace(request, thinking=None), tags)
        # vLLM would find a stop string in thoughts as well, so where there may be thoughts, it is only looked for here.
        self._stops_there = tags is None or (model.of_fathom and bool(tags.tokens))
        self._resumes = _is_resumable(request)
        seed = request.sampling.seed
        self._seed = secrets.randbits(63) if seed is None and not self._resumes else seed
        self._sent = request.prompt_ids
        self._place = 0  # of the next token that this attempt brings
        self._told = False  # the endpoint has said why it ended
        self._last: Chunk | None = None
        self._finished = False

    @property
    def over(self) -> bool:
        """Whether all of the output is here."""
        return self._last is not None

    @property
    def over_early(self) -> bool:
        """The same, while the endpoint goes on."""
        return self.over and not self._told

    @property
    def has_seed(self) -> bool:
        """Whether one is sent."""
        return self._seed is not None

    def leave_out_seed(self) -> None:
        """For an endpoint that takes none. What a seed alone kept from being resumed can be resumed now."""
        self._seed = None
        self._resumes = _is_resumable(replace(self.request, sampling=self.request.sampling.replace(seed=None)))

    def begin(self) -> None:
        """Another attempt."""
        self._place = len(self.tokens) if self._resumes else 0
        self._sent = self.request.prompt_ids + self.tokens[: self._place]
        self._told = False

    def body(self) -> dict[str, Any]:
        """What to ask for. Everything is said, for an endpoint may have defaults of its own."""
        request, sampling = self.request, self.request.sampling
        body: dict[str, Any] = {
            "model": self._model,
            "prompt": self._sent,
            "max_tokens": request.max_tokens - self._place,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": sampling.frequency_penalty,
            "repetition_penalty": sampling.repetition_penalty,
            "ignore_eos": request.ignore_eos,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }
        if sampling.logit_bias:
            body["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias.items()}
        if self._seed is not None:
            body["seed"] = self._seed
        if request.stop and self._stops_there:
            body["stop"] = list(request.stop)
        if request.logprobs is not None:
            body |= {"logprobs": request.logprobs, "return_tokens_as_token_ids": True}
        if request.thinking is not None and request.thinking.budget is not None:
            body["thinking_token_budget"] = request.thinking.budget
        if request.thinking is not None and request.thinking.minimum:
            body["min_thinking_budget"] = request.thinking.minimum
        if request.constraint is not None:
            body["structured_outputs"] = _structured(request.constraint)
        if request.cache_salt:
            body["cache_salt"] = request.cache_salt
        return body

    def take(self, event: Event, where: str) -> None:
        """The next event, from the endpoint at `where`. Raises `Dropped` and `Refused`."""
        details = event.usage.prompt_tokens_details if event.usage else None
        if details is not None:
            self.cached = min(details.cached_tokens or 0, len(self.request.prompt_ids))
        for choice in event.choices:
            self._check(choice, where)
            self._draw(choice, where)
            reason = choice.finish_reason
            self._told = self._told or reason is not None
            if reason is None or self.over:
                continue
            if reason not in _REASONS:
                raise Dropped(f"{where}: cut the completion short ({reason[:60]})")
            self._hand_out(self._output.end(_REASONS[reason]))

    def finish(self) -> None:
        """Deliver the last chunk, which was kept for the account that follows it."""
        assert self._last is not None, "not over"
        if not self._finished:
            self._finished = True
            self._on_last(self)
            usage = replace(self._last.usage, cached=self.cached)
            self._tell(replace(self._last, usage=usage))

    def end(self, reason: FinishReason, message: str = "", fault: Fault = "engine") -> None:
        """Deliver the last chunk now; this is it, unless all is here already."""
        if not self.over:
            self._hand_out(self._output.end(reason, message, fault))
        self.finish()

    def cancel(self) -> None:
        """Stop it, unless it has ended."""
        if self.task is not None:
            self.task.cancel()

    def _check(self, choice: Choice, where: str) -> None:
        if choice.token_ids is None:
            raise Refused(
                f"{where}: gives no token ids, without which a remote engine cannot be sure of its tokens; serve the "
                "model with 'fathom serve' or a vLLM that understands 'return_token_ids'"
            )
        if choice.prompt_token_ids is not None and choice.prompt_token_ids != self._sent:
            raise Refused(
                f"{where}: read other tokens than it was sent as the prompt; serve the model with 'fathom serve' or "
                "vLLM, and nothing between that rewrites prompts"
            )

    def _draw(self, choice: Choice, where: str) -> None:
        ids = choice.token_ids or []
        if unknown := [token for token in ids if token >= self._vocab_size]:
            raise Refused(
                f"{where}: has drawn token {unknown[0]}, but this model's vocabulary has {self._vocab_size}; serve the "
                "very model that asks, or name it (in a recipe endpoint_model)"
            )
        logprobs = self._logprobs(ids, choice.logprobs, where)
        for token, logprob in zip(ids, logprobs, strict=True):
            if self.over:  # an endpoint that draws several tokens at once, beyond a stop string that only we know
                return
            self._place += 1
            if self._place > len(self.tokens):
                self.tokens.append(token)
                self._hand_out(self._output.push(token, logprob))
            elif token != self.tokens[self._place - 1]:
                raise Refused(
                    f"{where}: a connection broke off, and the same request draws other tokens now (the first is "
                    f"number {self._place}), so the completion has to be drawn anew (in a recipe retries "
                    "says how often); mend what cuts connections, such as a proxy's time limit"
                )

    def _logprobs(self, ids: list[int], given: Logprobs | None, where: str) -> list[TokenLogprob | None]:
        if self.request.logprobs is None:
            return [None] * len(ids)
        if given is None:
            if ids:
                raise Refused(
                    f"{where}: gives no log-probabilities, although they were asked for (logprobs); serve the model "
                    "with 'fathom serve' or vLLM, and nothing between that leaves them out"
                )
            return []
        if given.tokens != [f"token_id:{token}" for token in ids]:
            raise Refused(
                f"{where}: its log-probabilities are not those of its token ids; serve the model with 'fathom serve' "
                "or a vLLM that understands 'return_tokens_as_token_ids'"
            )
        if not len(ids) == len(given.token_logprobs) == len(given.top_logprobs):
            raise Refused(f"{where}: the lists of its log-probabilities differ in length; update the server")
        values = zip(ids, given.token_logprobs, given.top_logprobs, strict=True)
        return [TokenLogprob(token, _of_drawn(value, where), self._top(top, where)) for token, value, top in values]

    def _top(self, given: dict[str, float], where: str) -> list[tuple[int, float]]:
        """The likeliest tokens; vLLM adds the one that was drawn."""
        try:
            found = [(int(name.removeprefix("token_id:")), _number(value, where)) for name, value in given.items()]
        except ValueError:
            raise Refused(
                f"{where}: names an alternative token by something else than its id; serve the model with 'fathom "
                "serve' or a vLLM that understands 'return_tokens_as_token_ids'"
            ) from None
        return sorted(found, key=lambda entry: -entry[1])[: self.request.logprobs]

    def _hand_out(self, chunks: list[Chunk]) -> None:
        for chunk in chunks:
            if chunk.finish_reason is not None:
                self._last = chunk
            else:
                self._tell(chunk)

    def _tell(self, chunk: Chunk) -> None:
        try:
            self._deliver(chunk)
        except Exception:  # whoever listened has gone: nobody is left to tell
            self.cancel()


def _is_resumable(request: Request) -> bool:
    """Whether the next token depends on nothing but the tokens before it, whichever of them are the prompt's."""
    sampling = request.sampling
    counts_output = bool(sampling.presence_penalty or sampling.frequency_penalty)
    seeded = sampling.seed is not None and sampling.temperature > 0
    return not (counts_output or seeded or request.constraint is not None or request.thinking is not None)


def _structured(constraint: Constraint) -> dict[str, Any]:
    """`constraint` as `fathom serve` and vLLM say it."""
    if constraint.kind == "json_object":
        return {"json_object": True}
    return {"json" if constraint.kind == "json_schema" else constraint.kind: constraint.text}


def _number(logprob: float, where: str) -> float:
    """What the endpoint means. Raises `Refused` for the logarithm of no probability."""
    if logprob > _ROUNDING:
        raise _no_logprob(logprob, where)
    return min(logprob, 0.0) if logprob > _LOWEST else float("-inf")


def _of_drawn(logprob: float, where: str) -> float:
    """The same of a token that was drawn, and so had a chance."""
    number = _number(logprob, where)
    if number == float("-inf"):
        raise _no_logprob(logprob, where)
    return number


def _no_logprob(value: float, where: str) -> Refused:
    return Refused(
        f"{where}: gives a token the log-probability {value:g}, which must lie between {_LOWEST:g}, its word for no "
        "chance at all, and 0; serve the model with 'fathom serve' or vLLM with '--logprobs-mode raw_logprobs'"
    )
