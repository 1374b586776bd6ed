"""An engine elsewhere: the engine protocol over an OpenAI-compatible endpoint, `fathom serve` or vLLM.

Tokens are what crosses the network: prompts go as ids to `/v1/completions`, and the ids of what was drawn come back
with their log-probabilities (vLLM's `return_token_ids` and `return_tokens_as_token_ids`, which `fathom serve` has too).
Text, thoughts and the ends of answers are read from these ids here, by the same code as in the built-in engine, so that
they mean the same wherever a request is computed. An endpoint that gives no ids is refused: to tokenise its text again
would make other tokens than were drawn, and log-probabilities of something else.

**What is asked of vLLM.** A version with `return_token_ids`; `--logprobs-mode raw_logprobs` (its default), since ours
are of the model at temperature 1; `--reasoning-parser` for a thinking budget. Log-probabilities with more than 20
alternatives need `--max-logprobs`. What it cannot do is refused here: a least number of thoughts (`Thinking.minimum`),
and constraints for a model with think tags, for which vLLM takes all before a closing tag, or nothing, for thoughts,
as its parser has it, whatever the prompt says.

**Connections that break off.** Nothing is delivered twice, and nothing that was delivered is taken back:

* A request whose next token depends on its text alone is *resumed*: the tokens drawn so far become part of its prompt.
  Greedy text stays the same, and samples have the distribution that they would have had.
* All others (a seed, penalties that count the output, a constraint, bounds on thoughts) are *replayed*: asked again
  from the start, with a seed if they had none, and only what is new is delivered. An endpoint that draws other tokens
  with the same seed, as vLLM can in other batches, cannot replay, and the request ends with an error that says so.

One thread of its own runs everything in one event loop, and `deliver` is called from it. Who serves is `endpoint.py`.
"""

import asyncio
import atexit
import logging
import operator
import secrets
import threading
from collections.abc import Callable
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import Any, Self

from fathom.data.tokenizer import Tokenizer
from fathom.engine.endpoint import Choice, Dropped, Endpoint, Event, Logprobs, Refused, RemoteSettings, ServedModel
from fathom.engine.output import OutputStream
from fathom.engine.protocol import (
    Chunk,
    Constraint,
    Fault,
    FinishReason,
    QueueFull,
    Request,
    Statistics,
    TokenLogprob,
)
from fathom.engine.thinking import ThinkTags, find_think_tags
from fathom.errors import UserError

__all__ = ["RemoteEngine", "RemoteSettings", "RemoteTicket"]

_log = logging.getLogger(__name__)
_LOWEST = -9999.0
"""What stands for minus infinity, which JSON cannot write, at `fathom serve` and vLLM alike."""
_REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length"}


class RemoteTicket:
    """A request under way at an endpoint."""

    def __init__(self, cancel: Callable[[], None]) -> None:
        self._cancel = cancel

    def cancel(self) -> None:
        """Stop it soon, by closing its connection. From any thread, any number of times."""
        self._cancel()


class RemoteEngine:
    """A model behind an endpoint that answers requests (`protocol.Engine`)."""

    def __init__(self, settings: RemoteSettings, tokenizer: Tokenizer) -> None:
        """`tokenizer` is the served model's. Waits until the endpoint has said what it serves, trying again as with
        requests. Raises `UserError` when it does not, or has no such model, and without the extra `remote`.
        """
        self._settings, self._tokenizer = settings, tokenizer
        self._tags = find_think_tags(tokenizer, tokenizer.vocab_size)
        self._endpoint = Endpoint(settings)
        self._connections = asyncio.Semaphore(settings.connections)
        self._tasks: set[asyncio.Task[None]] = set()
        self._unfinished: set[_Job] = set()
        self._running: set[_Job] = set()
        self._prompt_tokens = self._cached_tokens = self._completion_tokens = 0
        self._closing = False
        self._changed = threading.Condition()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="fathom-remote-engine", daemon=True)
        self._thread.start()
        atexit.register(self.close)
        try:
            self._model = asyncio.run_coroutine_threadsafe(self._endpoint.served(), self._loop).result()
            self.context = self._context()
        except BaseException:
            self.close()
            raise

    def submit(self, request: Request, deliver: Callable[[Chunk], None]) -> RemoteTicket:
        """Queue `request`; `deliver` is called from the engine's thread and must return at once.

        Raises `UserError` for a request that cannot be served, and `QueueFull` once the engine is closed. What only the
        endpoint knows (its vocabulary, its bounds) it refuses later, in a chunk with `fault` "request".
        """
        job = _Job(self._checked(request), deliver, self._account, self._tokenizer, self._tags, self._model)
        with self._changed:  # so that nothing is begun behind the end of the loop
            if self._closing:
                raise QueueFull("the engine is shutting down; try another one")
            self._unfinished.add(job)
            self._loop.call_soon_threadsafe(self._start, job)
        return RemoteTicket(lambda: self._cancel(job))

    def __enter__(self) -> Self:
        """The engine itself, which is closed when the block ends."""
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def statistics(self) -> Statistics:
        """Counters and levels of what went through here, from any thread. The endpoint's cache is not seen."""
        return Statistics(
            running=len(self._running),
            waiting=len(self._unfinished) - len(self._running),
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            completion_tokens=self._completion_tokens,
        )

    def close(self, drain_seconds: float = 0.0) -> None:
        """Take no more requests, let running ones finish for this long, cancel the rest, and end the thread."""
        with self._changed:
            self._closing = True
            if threading.current_thread() is not self._thread:
                self._changed.wait_for(lambda: not self._unfinished, timeout=drain_seconds)
        with suppress(RuntimeError):  # closed before
            self._loop.call_soon_threadsafe(self._begin_to_stop)
        if threading.current_thread() is not self._thread:
            self._thread.join()
        atexit.unregister(self.close)

    def _context(self) -> int:
        context = self._settings.context or self._model.max_model_len
        if context is None:
            raise UserError(
                f"{self._endpoint.url}/models: does not say how long the context of '{self._model.id}' is "
                "(max_model_len); give it (context)"
            )
        return context

    def _checked(self, request: Request) -> Request:
        """`request` within the context. Raises `UserError` for what no endpoint, or not this one, can be asked."""
        try:
            prompt_ids = [operator.index(token) for token in request.prompt_ids]
        except TypeError:
            raise UserError("prompt: its token ids must be a list of whole numbers") from None
        if not prompt_ids:
            raise UserError("the prompt has no tokens; give some text to continue")
        if len(prompt_ids) >= self.context:
            raise UserError(f"the prompt has {len(prompt_ids)} tokens, but the context is {self.context}; shorten it")
        if request.max_tokens < 1:
            raise UserError(f"max_tokens must be at least 1, not {request.max_tokens}")
        if request.logprobs is not None and request.logprobs < 0:
            raise UserError(f"logprobs must be at least 0, not {request.logprobs}")
        if outside := next((bias for bias in request.sampling.logit_bias.values() if abs(bias) > 100), None):
            raise UserError(f"logit_bias: endpoints take numbers from -100 to 100, not {outside:g}")
        self._check_thoughts(request)
        max_tokens = min(request.max_tokens, self.context - len(prompt_ids))
        return replace(request, prompt_ids=prompt_ids, max_tokens=max_tokens)

    def _check_thoughts(self, request: Request) -> None:
        of_fathom, thinking = self._model.of_fathom, request.thinking
        if thinking is not None and self._tags is None:
            raise UserError("thinking: this model has no think tags; leave the bounds on thoughts out")
        if thinking is not None and thinking.minimum and not of_fathom:
            raise UserError("thinking.minimum: only 'fathom serve' keeps a least number of thoughts; leave it at 0")
        if request.constraint is not None and self._tags is not None and not of_fathom:
            raise UserError(
                "constraint: of a model with think tags, only 'fathom serve' keeps the answers to it and leaves the "
                "thoughts free; leave it out"
            )
        depends = thinking is not None or request.constraint is not None
        if request.starts_thinking and depends and of_fathom and self._tags and not self._tags.tokens:
            raise UserError(
                "starts_thinking: 'fathom serve' sees an open think tag in token ids only where the tag is one token, "
                "as it is not in this vocabulary; leave the bounds on thoughts and the constraint out"
            )

    # ------------------------------------------------------------------------------------------ the engine's thread

    def _run(self) -> None:
        try:
            self._loop.run_forever()
        finally:
            self._loop.run_until_complete(self._endpoint.close())
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()

    def _start(self, job: "_Job") -> None:
        task = job.task = self._loop.create_task(self._serve(job))
        self._tasks.add(task)
        task.add_done_callback(lambda _: self._ended(job, task))

    def _cancel(self, job: "_Job") -> None:
        with suppress(RuntimeError):  # the loop has ended, and the job with it
            self._loop.call_soon_threadsafe(job.cancel)

    async def _serve(self, job: "_Job") -> None:
        async with self._connections:
            self._running.add(job)
            try:
                await self._endpoint.patiently(lambda: self._attempt(job), lambda: len(job.tokens))
            except (Dropped, Refused) as error:
                fault = error.fault if isinstance(error, Refused) else "engine"
                job.end("error", self._endpoint.without_key(str(error)), fault)

    async def _attempt(self, job: "_Job") -> None:
        """Ask once, for all that is missing. Raises `Dropped` and `Refused`."""
        job.begin()
        try:
            async with aclosing(self._endpoint.completion(job.body())) as events:
                async for event in events:
                    job.take(event, f"{self._endpoint.url}/completions")
                    if job.over_early:
                        break
        except (Dropped, Refused):
            if not job.over:  # else nothing is missing but the count of cached tokens
                raise
        if not job.over:
            raise Dropped(f"{self._endpoint.url}/completions: the stream ended before the completion did")
        job.finish()

    def _ended(self, job: "_Job", task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            job.end("cancelled")
        elif error := task.exception():  # a defect: nobody may wait for ever
            _log.error("a remote request failed", exc_info=error)
            job.end("error", f"{type(error).__name__} in the remote engine")

    def _account(self, job: "_Job") -> None:
        """`job` is about to deliver its last chunk: whoever gets that finds it in the statistics."""
        self._prompt_tokens += len(job.request.prompt_ids)
        self._cached_tokens += job.cached
        self._completion_tokens += len(job.tokens)
        with self._changed:
            self._running.discard(job)
            self._unfinished.discard(job)
            self._changed.notify_all()

    def _begin_to_stop(self) -> None:
        self._stopping = self._loop.create_task(self._stop())

    async def _stop(self) -> None:
        while self._tasks:
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(self._tasks, timeout=1.0)
        self._loop.stop()


class _Job:
    """One request: what to ask for next, and what has come of it."""

    def __init__(
        self,
        request: Request,
        deliver: Callable[[Chunk], None],
        on_last: Callable[["_Job"], None],
        tokenizer: Tokenizer,
        tags: ThinkTags | None,
        model: ServedModel,
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
        self._model = model.id
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
                f"{where}: gives no token ids, without which a remote engine cannot be sure of its tokens; it must "
                "understand 'return_token_ids', as 'fathom serve' and vLLM do"
            )
        if choice.prompt_token_ids is not None and choice.prompt_token_ids != self._sent:
            raise Refused(f"{where}: read other tokens than it was sent as the prompt")

    def _draw(self, choice: Choice, where: str) -> None:
        ids = choice.token_ids or []
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
                    f"{where}: a connection broke off, and asked again with the same seed it draws other tokens "
                    f"(the first is number {self._place}); leave out the seed, so that completions can be resumed"
                )

    def _logprobs(self, ids: list[int], given: Logprobs | None, where: str) -> list[TokenLogprob | None]:
        if self.request.logprobs is None:
            return [None] * len(ids)
        if given is None:
            if ids:
                raise Refused(f"{where}: gives no log-probabilities, although they were asked for (logprobs)")
            return []
        if given.tokens != [f"token_id:{token}" for token in ids]:
            raise Refused(
                f"{where}: its log-probabilities are not those of its token ids; it must understand "
                "'return_tokens_as_token_ids', as 'fathom serve' and vLLM do"
            )
        if not len(ids) == len(given.token_logprobs) == len(given.top_logprobs):
            raise Refused(f"{where}: the lists of its log-probabilities differ in length")
        values = zip(ids, given.token_logprobs, given.top_logprobs, strict=True)
        return [TokenLogprob(token, _number(value), self._top(top, where)) for token, value, top in values]

    def _top(self, given: dict[str, float], where: str) -> list[tuple[int, float]]:
        """The likeliest tokens; vLLM adds the one that was drawn."""
        try:
            found = [(int(name.removeprefix("token_id:")), _number(value)) for name, value in given.items()]
        except ValueError:
            raise Refused(f"{where}: names an alternative token by something else than its id") from None
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


def _number(logprob: float) -> float:
    return logprob if logprob > _LOWEST else float("-inf")
