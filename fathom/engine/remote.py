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

**Endpoints without seeds.** One that refuses a request for its seed, and takes the same request without, is asked
without from then on, and one warning says that its samples cannot be drawn again.

One thread of its own runs everything in one event loop, and `deliver` is called from it. Who serves is `endpoint.py`,
what is asked and what comes of it is `remote_job.py`.
"""

import asyncio
import atexit
import logging
import operator
import re
import threading
from collections.abc import Callable
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import Self

from fathom.data.tokenizer import Tokenizer
from fathom.engine.endpoint import Dropped, Endpoint, Refused, RemoteSettings
from fathom.engine.protocol import Chunk, QueueFull, Request, Statistics
from fathom.engine.remote_job import Job
from fathom.engine.thinking import find_think_tags
from fathom.errors import UserError

__all__ = ["RemoteEngine", "RemoteSettings", "RemoteTicket"]

_log = logging.getLogger(__name__)
_SEED = re.compile(r"\bseeds?\b", re.IGNORECASE)


class RemoteTicket:
    """A request under way at an endpoint."""

    def __init__(self, cancel: Callable[[], None]) -> None:
        self._cancel = cancel

    def cancel(self) -> None:
        """Stop it soon, by closing its connection. From any thread, any number of times."""
        self._cancel()


class RemoteEngine:
    """A model behind an endpoint that answers requests (`protocol.Engine`)."""

    def __init__(self, settings: RemoteSettings, tokenizer: Tokenizer, *, vocab_size: int | None = None) -> None:
        """`tokenizer` is the served model's; `vocab_size` that model's own, where tokens without a text fill it up.

        Waits until the endpoint has said what it serves, trying again as with requests. Raises `UserError` when it
        does not, or has no such model, and without the extra `remote`.
        """
        self._settings, self._tokenizer = settings, tokenizer
        self._tags = find_think_tags(tokenizer, tokenizer.vocab_size)
        self._vocab_size = vocab_size or tokenizer.vocab_size
        self._endpoint = Endpoint(settings)
        self._connections = asyncio.Semaphore(settings.connections)
        self._tasks: set[asyncio.Task[None]] = set()
        self._unfinished: set[Job] = set()
        self._running: set[Job] = set()
        self._prompt_tokens = self._cached_tokens = self._completion_tokens = 0
        self._takes_seeds = True
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
        parts = self._tokenizer, self._tags, self._model, self._vocab_size
        job = Job(self._checked(request), deliver, self._account, *parts)
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
                "(max_model_len), as 'fathom serve' and vLLM do of a model of its own; serve it so, or give "
                "RemoteSettings its context"
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
        if request.tempered_logprobs and request.sampling.temperature != 1:
            raise UserError("tempered_logprobs: endpoints give log-probabilities of temperature 1; leave it out")
        if outside := next((bias for bias in request.sampling.logit_bias.values() if abs(bias) > 100), None):
            raise UserError(f"logit_bias: endpoints take numbers from -100 to 100, not {outside:g}")
        self._check_thoughts(request)
        max_tokens = min(request.max_tokens, self.context - len(prompt_ids))
        return replace(request, prompt_ids=prompt_ids, max_tokens=max_tokens)

    def _check_thoughts(self, request: Request) -> None:
        of_fathom, thinking = self._model.of_fathom, request.thinking
        if thinking is not None and self._tags is None:
            raise UserError(
                "thinking: this model has no think tags; leave the bounds on thoughts out (in a recipe eval.budgets)"
            )
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
                "as it is not in this vocabulary; leave the bounds on thoughts (in a recipe eval.budgets) and the "
                "constraint out"
            )

    # ------------------------------------------------------------------------------------------ the engine's thread

    def _run(self) -> None:
        try:
            self._loop.run_forever()
        finally:
            self._loop.run_until_complete(self._endpoint.close())
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()

    def _start(self, job: Job) -> None:
        task = job.task = self._loop.create_task(self._serve(job))
        self._tasks.add(task)
        task.add_done_callback(lambda _: self._ended(job, task))

    def _cancel(self, job: Job) -> None:
        with suppress(RuntimeError):  # the loop has ended, and the job with it
            self._loop.call_soon_threadsafe(job.cancel)

    async def _serve(self, job: Job) -> None:
        async with self._connections:
            self._running.add(job)
            try:
                await self._endpoint.patiently(lambda: self._attempt(job), lambda: len(job.tokens))
            except (Dropped, Refused) as error:
                fault = error.fault if isinstance(error, Refused) else "engine"
                job.end("error", self._endpoint.without_key(str(error)), fault)

    async def _attempt(self, job: Job) -> None:
        """Ask for all that is missing; once more where it is the seed that is refused. Raises `Dropped`, `Refused`."""
        if not self._takes_seeds:
            job.leave_out_seed()
        try:
            await self._ask(job)
        except Refused as refusal:
            if not (job.has_seed and refusal.fault == "request" and _SEED.search(str(refusal))):
                raise
            job.leave_out_seed()
            try:
                await self._ask(job)
            except Refused:  # so it was not for the seed
                raise refusal from None
            self._do_without_seeds(refusal)

    def _do_without_seeds(self, refusal: Refused) -> None:
        if self._takes_seeds:
            self._takes_seeds = False
            reason = self._endpoint.without_key(str(refusal))
            _log.warning("%s; asked without a seed, so samples cannot be drawn again, by a resumed run either", reason)

    async def _ask(self, job: Job) -> None:
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

    def _ended(self, job: Job, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            job.end("cancelled")
        elif error := task.exception():  # a defect: nobody may wait for ever
            _log.error("a remote request failed", exc_info=error)
            job.end("error", f"{type(error).__name__} in the remote engine")

    def _account(self, job: Job) -> None:
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
