"""The built-in engine: continuous batching over a paged cache, on one machine.

A thread of its own repeats one step: take in new requests, choose which tokens to compute, run the model once over all
of them, draw, deliver. Sequences join and leave between any two steps. What a step computes (`Work`):

* for every sequence that is writing, its last token, and behind it a draft if there is one;
* of prompts that are still being read, up to `prefill_tokens` tokens altogether, the oldest request first, so that a
  long prompt never keeps the others waiting for longer. Prompts are cut at multiples of that number, whatever else is
  under way, so that every call of the model has the same shape for them.

Requests with one prompt that come together (a group of samples) read it once: the first reads, the others wait for that
and begin with what it has read, whole pages being shared and the last one copied. Only the prompt's last token, whose
logits each of them draws from, is computed by all. The reader may be any that runs and has the prompt, so nothing is
lost with one that is cancelled; where none runs any more, the next in line reads again.

Memory is pages. A request is taken in when there are pages for its prompt; when writing needs more than there are, the
youngest sequence gives all of its pages back and reads its text again later. Nothing of what is delivered changes by
that: kernels compute a token alike whatever stands beside it, and the n-th draw of a request depends on its seed and n
alone.

Speculation (`drafts.py`): a model with a multi-token-prediction module guesses the token after the next one, and the
next step checks the guess while it computes. What is delivered is distributed as without, and equal where greedy.
"""

import atexit
import functools
import inspect
import logging
import math
import operator
import queue
import reprlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, Self

import torch

from fathom.data.tokenizer import Tokenizer
from fathom.engine.blocks import SINGLES_BELOW, BlockPool
from fathom.engine.complete import Completion, complete, listed
from fathom.engine.consensus import consensus
from fathom.engine.constraint import GrammarCompiler
from fathom.engine.dense import dense_decoder
from fathom.engine.output import OutputStream
from fathom.engine.packing import packed
from fathom.engine.protocol import Chunk, QueueFull, Request, Sampling, Statistics, Thinking
from fathom.engine.sampling import SamplerState
from fathom.engine.sequence import Sequence
from fathom.engine.settings import EngineSettings
from fathom.engine.stepping import Counts, Stepper, Work
from fathom.engine.thinking import find_think_tags
from fathom.errors import UserError, nearest
from fathom.kernels.memory import keep_freed_memory
from fathom.kernels.ops import PAGE, release_threads
from fathom.model.paged import PagedCache
from fathom.model.transformer import Transformer

_log = logging.getLogger(__name__)


class BuiltinTicket:
    """A request under way in the built-in engine."""

    def __init__(self, sequence: Sequence, wake: Callable[[], None]) -> None:
        self._sequence, self._wake = sequence, wake

    def cancel(self) -> None:
        """Stop it soon. From any thread, any number of times."""
        self._sequence.cancelled = True
        self._wake()


class Engine:
    """A model that answers requests (`protocol.Engine`)."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, settings: EngineSettings | None = None) -> None:
        """Raises `UserError` where the settings do not fit the model or the machine."""
        settings = settings or EngineSettings()
        self._settings, self._tokenizer = settings, tokenizer
        config = model.config
        if settings.context is not None and settings.context > config.max_position_embeddings:
            raise UserError(
                f"context {settings.context} is more than the {config.max_position_embeddings} tokens of the model"
            )
        self.context = settings.context or config.max_position_embeddings
        if settings.record_routes and not model.routers:
            raise UserError("record_routes: this model has no experts to choose from; leave it out")
        self._config, self._dtype = config, _dtype_of(model)
        self._speculates = settings.speculate and config.num_nextn_predict_layers > 0
        one_page = self._new_cache(pages=1).nbytes()
        pages = settings.cache_memory // one_page
        if pages < 2:
            least = math.ceil(2 * one_page / 1e6) / 1e3
            raise UserError(
                f"cache_memory (--cache-memory): this model needs at least {least:g} GB, in bytes {2 * one_page}"
            )
        # Nobody can ever hold more: memory that would stay untouched need not be asked for.
        pages = min(pages, settings.max_running * -(-self.context // PAGE))
        self._cache = self._new_cache(pages)
        self.bytes_per_token = one_page // PAGE
        """Of the cache, over all layers."""
        self._vocab_size = config.vocab_size
        self._answer_with(model)
        self.think_tags = find_think_tags(tokenizer, config.vocab_size)
        """How the model writes its thoughts, or None."""
        self._compiler = functools.cache(lambda: GrammarCompiler(tokenizer, config.vocab_size))
        self._compiler_lock = threading.Lock()
        self._arrived: queue.SimpleQueue[Sequence] = queue.SimpleQueue()
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._unfinished = 0
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._closing = False
        self._stopping = False
        self._statistics = Statistics(cache_blocks=pages)
        # From here on the engine's thread computes, the same things at every step.
        release_threads()
        keep_freed_memory()
        self._thread = threading.Thread(target=self._run, name="fathom-engine", daemon=True)
        self._thread.start()
        # A thread that is inside of the kernels when the interpreter ends would take the process down with it.
        atexit.register(self.close)

    def load_weights(self, model: Transformer) -> None:
        """Answer with the numbers that `model` has now, the same architecture as before, and forget cached prefixes.

        The engine copies what it uses: a trainer may change its weights at any time, and nothing follows from it before
        the next call of this. Packing takes as long as when the engine was made; requests submitted meanwhile wait, and
        memory holds old and new weights until it is done. Raises `UserError` while requests are unfinished, and for a
        model of another shape or dtype.
        """
        with self._lock:
            if self._closing:
                raise UserError("this engine is closed; make another one")
            if self._unfinished:
                raise UserError(
                    f"load_weights: {self._unfinished} requests are unfinished; wait for them, or cancel them"
                )
            different = [name for name, value in self._config if getattr(model.config, name) != value]
            if different:
                raise UserError(f"load_weights: another model (in {', '.join(different)}); make an engine for it")
            if _dtype_of(model) is not self._dtype:
                raise UserError(
                    f"load_weights: the model computes in {_dtype_of(model)} and the engine in {self._dtype}; "
                    "set the model's compute_dtype, or make an engine for it"
                )
            self._answer_with(model)
        release_threads()  # the caller's, which have packed

    def submit(self, request: Request, deliver: Callable[[Chunk], None]) -> BuiltinTicket:
        """Queue `request`; `deliver` is called from the engine's thread and must return at once.

        Raises `UserError` for a request that cannot be served, `QueueFull` for one that cannot be now.
        """
        request = self._checked(request)
        matcher = None
        if request.constraint is not None:
            with self._compiler_lock:  # making one takes a second, in which nobody else should wait
                compiler = self._compiler()
            matcher = compiler.start(request.constraint)
        sequence = Sequence(
            request,
            deliver,
            sampler=SamplerState.start(request.sampling, request.prompt_ids, self._vocab_size),
            output=OutputStream(self._tokenizer, request, self.think_tags),
            matcher=matcher,
        )
        with self._lock:
            if self._closing:
                raise QueueFull("the engine is shutting down; try another one")
            if self._unfinished - len(self._running) >= self._settings.queue:
                raise QueueFull(f"{self._settings.queue} requests are waiting already; try again later")
            self._unfinished += 1
            self._arrived.put(sequence)
        self._wake.set()
        return BuiltinTicket(sequence, self._wake.set)

    def generate(
        self,
        prompts: Iterable[str | list[int]],
        *,
        max_tokens: int = 256,
        thinking_budget: int | None = None,
        stop: str | tuple[str, ...] = (),
        best_of: int = 1,
        check: Callable[[str], float] | None = None,
        **sampling: Any,
    ) -> list[Completion]:
        """Complete all prompts together, texts or token ids; in their order.

        `sampling` are fields of `protocol.Sampling` (temperature, top_p, seed, …); a seed grows by one from each
        completion to the next. With `best_of`, so many are drawn for each prompt, and the one is given that `check`
        scores highest (a number, or whether its text is right), and of those the first that most others agree with
        (`consensus`). Raises `UserError`.
        """
        if self._closing:
            raise UserError("this engine is closed; make another one")
        prompts = listed(prompts)
        _refuse_unknown(sampling)
        if best_of < 1 or (check is not None and best_of < 2):
            raise UserError(f"best_of {best_of}: nothing to choose from; give how many to draw for each prompt")
        drawn = Sampling.parse(sampling, where="generate")
        thinking = None
        if thinking_budget is not None:
            thinking = Thinking.parse({"budget": thinking_budget}, where="generate: thinking_budget")
        start = [] if self._tokenizer.bos_token_id is None else [self._tokenizer.bos_token_id]
        requests = [
            Request(
                start + self._tokenizer.encode(prompt) if isinstance(prompt, str) else prompt,
                max_tokens,
                drawn.of_sample(index * best_of + sample),
                stop=(stop,) if isinstance(stop, str) else tuple(stop),
                thinking=thinking,
            )
            for index, prompt in enumerate(prompts)
            for sample in range(best_of)
        ]
        completions = complete(self, requests)
        groups = [completions[start : start + best_of] for start in range(0, len(completions), best_of)]
        return [group[consensus([one.text for one in group], check=check).winner] for group in groups]

    def __enter__(self) -> Self:
        """The engine itself, which is closed when the block ends."""
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def statistics(self) -> Statistics:
        """Counters and levels, from any thread."""
        return self._statistics

    def close(self, drain_seconds: float = 0.0) -> None:
        """Take no more requests, let running ones finish for this long, cancel the rest, and end the thread."""
        with self._lock:
            self._closing = True
        until = time.monotonic() + drain_seconds
        while self._unfinished and time.monotonic() < until:
            time.sleep(0.02)
        self._stopping = True
        self._wake.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        atexit.unregister(self.close)

    def _checked(self, request: Request) -> Request:
        try:
            prompt_ids = [operator.index(token) for token in request.prompt_ids]
        except TypeError:
            raise UserError("prompt: its token ids must be a list of whole numbers") from None
        try:
            max_tokens = operator.index(request.max_tokens)
        except TypeError:
            raise UserError(f"max_tokens must be a whole number, not {reprlib.repr(request.max_tokens)}") from None
        length = len(prompt_ids)
        outside = next((t for t in prompt_ids if not 0 <= t < self._vocab_size), None)
        if not length:
            raise UserError("the prompt has no tokens; give some text to continue")
        if outside is not None:
            raise UserError(f"prompt: there is no token {outside}; ids go from 0 to {self._vocab_size - 1}")
        if length >= self.context:
            raise UserError(f"the prompt has {length} tokens, but the context is {self.context}; shorten it")
        if max_tokens < 1:
            raise UserError(f"max_tokens must be at least 1, not {max_tokens}")
        if request.logprobs is not None and request.logprobs < 0:
            raise UserError(f"logprobs must be at least 0, not {request.logprobs}")
        most = min(self.context, self._pool.count * PAGE)
        if length >= most:
            raise UserError(
                f"the prompt has {length} tokens, but the cache holds {most}; shorten it or give more memory"
            )
        return replace(request, prompt_ids=prompt_ids, max_tokens=min(max_tokens, most - length))

    def _new_cache(self, pages: int) -> PagedCache:
        return PagedCache(
            self._config,
            pages=pages,
            dtype=self._dtype,
            mtp_layers=int(self._speculates),
            routes=self._settings.record_routes,
            fp8=self._settings.kv_cache == "fp8",
        )

    def _answer_with(self, model: Transformer) -> None:
        """Compute by the numbers of `model`, with nothing remembered that others have computed."""
        fast = dense_decoder(packed(model, self._settings.weights))
        self._pool = BlockPool(self._cache.pages)
        self._stepper = Stepper(fast, self._cache, self._pool, speculates=self._speculates)

    # ------------------------------------------------------------------------------------------ the engine's thread

    def _run(self) -> None:
        with torch.inference_mode():
            while not self._stopping:
                try:
                    self._take_in()
                    if not self._running:
                        self._report()
                        release_threads()  # somebody else's loops may want the cores, a trainer's for one
                        self._wake.wait()
                        self._wake.clear()
                        continue
                    for sequence in self._step():
                        sequence.deliver()
                except Exception as error:  # a defect: nobody may wait for ever
                    _log.exception("the engine failed; all of its requests are ended")
                    self._fail(error)
            for sequence in [*self._running, *self._waiting, *self._drain_arrived()]:
                self._cancel(sequence)

    def _fail(self, error: Exception) -> None:
        """End all requests and begin with an empty cache: after a defect, who holds what is not to be trusted."""
        ended = [*self._running, *self._waiting]
        self._running, self._waiting = [], deque()
        self._pool.clear()
        with self._lock:
            self._unfinished -= len(ended)
        self._report()
        for sequence in ended:
            sequence.end("error", f"{type(error).__name__} in the engine")
            sequence.deliver()

    def _drain_arrived(self) -> Iterator[Sequence]:
        while not self._arrived.empty():
            yield self._arrived.get()

    def _take_in(self) -> None:
        """Drop who has cancelled, and start who waits."""
        self._waiting.extend(self._drain_arrived())
        for sequence in [s for s in (*self._running, *self._waiting) if s.cancelled]:
            self._cancel(sequence)
        self._start_waiting()

    def _start_waiting(self) -> None:
        """Start who waits, in order, while there is room; those whose prompt is just being read, when it has been."""
        if not self._waiting:
            return
        readers: dict[tuple[str, bytes], Sequence] = {}
        for sequence in sorted(self._running, key=lambda running: running.computed):
            readers[sequence.prompt_key] = sequence
        for sequence in list(self._waiting):
            reader = readers.get(sequence.prompt_key)
            if reader is not None and not reader.has_read_prompt:
                continue
            if len(self._running) >= self._settings.max_running or not self._start(sequence, reader):
                return
            readers.setdefault(sequence.prompt_key, sequence)

    def _start(self, sequence: Sequence, reader: Sequence | None) -> bool:
        """Let it run, from where `reader` has read its prompt to; False where there is no room."""
        sequence.adopt_prefix(self._pool, reader)
        # A page more than the text needs, or it would be the first to give all back.
        if sequence.pages_missing(len(sequence.tokens) + 1) > self._pool.available - self._reserve():
            sequence.release(self._pool)
            return False
        if reader is not None:
            sequence.copy_prompt_end(reader, self._pool, self._cache)
        if not sequence.admitted:
            sequence.admitted, sequence.output.cached = True, sequence.computed
            self._statistics = replace(
                self._statistics,
                prompt_tokens=self._statistics.prompt_tokens + sequence.prompt_length,
                cached_tokens=self._statistics.cached_tokens + sequence.computed,
            )
        self._waiting.remove(sequence)
        self._running.append(sequence)
        return True

    def _reserve(self) -> int:
        """Pages that running sequences still lack for their known texts."""
        return sum(s.pages_missing(len(s.tokens) + 1) for s in self._running)

    def _step(self) -> list[Sequence]:
        """Returns the sequences that have something to deliver, when the counters already know of it."""
        work = self._plan()
        counts = Counts()
        try:
            counts = self._stepper.step(work)
        except Exception as error:  # a defect: those it hits are told, the others and the engine live on
            _log.exception("a step of the engine failed")
            for item in work:
                item.sequence.end("error", f"{type(error).__name__} in the engine")
        finished = [item.sequence for item in work if item.sequence.finished]
        if finished:
            self._start_waiting()  # those who end still hold what others may begin with
        for sequence in finished:
            self._let_go(sequence)
        self._statistics = replace(
            self._statistics,
            read_tokens=self._statistics.read_tokens + counts.read,
            completion_tokens=self._statistics.completion_tokens + counts.drawn,
            drafted_tokens=self._statistics.drafted_tokens + counts.drafted,
            accepted_tokens=self._statistics.accepted_tokens + counts.accepted,
        )
        self._report()
        return [item.sequence for item in work]

    def _plan(self) -> list[Work]:
        """What to compute now, with pages for all of it."""
        work: list[Work] = []
        budget = self._settings.prefill_tokens
        for sequence in list(self._running):
            if sequence not in self._running:  # it gave its pages back to an older one
                continue
            known = len(sequence.tokens)
            reads = known - sequence.computed > 1
            draft = None if reads else sequence.draft
            stop = known
            if reads:
                chunk = self._settings.prefill_tokens
                borders = (SINGLES_BELOW, sequence.prompt_length, known)
                border = next(border for border in borders if border > sequence.computed)
                stop = min((sequence.computed // chunk + 1) * chunk, border, known)
                if stop - sequence.computed > budget:
                    continue
                budget -= stop - sequence.computed
            if not self._provide(sequence, stop + (draft is not None), work):
                continue
            work.append(Work(sequence, sequence.computed, stop, draft))
        return work

    def _provide(self, sequence: Sequence, length: int, work: list[Work]) -> bool:
        """Pages for `length` tokens, youngest sequences giving theirs back if need be; False if it is one."""
        for _ in range(sequence.pages_missing(length)):
            page = self._pool.take()
            while page is None:
                youngest = self._running.pop()
                work[:] = [item for item in work if item.sequence is not youngest]
                youngest.release(self._pool)
                self._waiting.appendleft(youngest)
                if youngest is sequence:
                    return False
                page = self._pool.take()
            sequence.pages.append(page)
        return True

    def _cancel(self, sequence: Sequence) -> None:
        """End it, unless it has just ended, and tell it."""
        self._let_go(sequence)
        sequence.end("cancelled")
        self._report()
        sequence.deliver()

    def _let_go(self, sequence: Sequence) -> None:
        """Forget a sequence and give back what it holds."""
        sequence.release(self._pool)
        for place in (self._running, self._waiting):
            if sequence in place:
                place.remove(sequence)
        with self._lock:
            self._unfinished -= 1

    def _report(self) -> None:
        self._statistics = replace(
            self._statistics,
            running=len(self._running),
            waiting=len(self._waiting) + self._arrived.qsize(),
            cache_blocks_used=self._pool.used,
        )


def _dtype_of(model: Transformer) -> torch.dtype:
    """Of the activations."""
    return model.compute_dtype or model.model.embed_tokens.weight.dtype


def _refuse_unknown(sampling: Iterable[str]) -> None:
    """Raises `UserError` for the name of a parameter that `Engine.generate` does not have."""
    own = inspect.signature(Engine.generate).parameters.values()
    known = [*Sampling.model_fields, *(name.name for name in own if name.kind is name.KEYWORD_ONLY)]
    if unknown := next((name for name in sampling if name not in known), None):
        raise UserError(f"generate: unknown parameter '{unknown}'{nearest(unknown, known)}")
