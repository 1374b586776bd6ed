"""Where answers come from: a protocol, and the engine as one that has it."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Protocol

from fathom.config.evaluation import EvaluationSettings
from fathom.data.tokenizer import Tokenizer
from fathom.engine.protocol import Engine, Request, Sampling, Thinking
from fathom.engine.remote import RemoteEngine
from fathom.engine.thinking import OPENING, ThinkTags, ThoughtTracker, find_think_tags
from fathom.errors import UserError
from fathom.tasks.task import Problem
from fathom.train.rollout import Asker, Drawn, draw, seed_of
from fathom.train.signals import Stopped

RETRIES = 2
"""Times that a completion which failed is asked for again."""
_UNDER_WAY = 256
"""Completions that are drawn at once, or one problem's for each thread."""
_THREADS = 8
_TAIL = 16
"""Tokens at a prompt's end that hold an opening tag and the white space behind it, however they are spelt."""


@dataclass(frozen=True)
class Answer:
    """One completion."""

    text: str
    """With the think tags; where the prompt opened the thought, with that tag too."""
    finished: bool
    """Whether the model ended it; False where it was cut off."""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    """None where nobody says."""
    thought_tokens: int | None = None
    """Those of thoughts; an endpoint may count the tags too."""


@dataclass(frozen=True)
class Reply:
    """What came of one problem."""

    problem: Problem
    answers: tuple[Answer, ...] = ()
    missing: str = ""
    """Why it has not as many answers as were asked for; it has none then."""


class Answers(Protocol):
    """What problems are put to."""

    here: bool
    """Whether this machine computes, and not another one."""

    def require(self, settings: EvaluationSettings) -> None:
        """Raise `UserError` for what cannot be asked of this model."""
        ...

    def replies(
        self, problems: Sequence[Problem], settings: EvaluationSettings, *, budget: int | None
    ) -> Iterator[Reply]:
        """One for each problem, as they come. `budget`: tokens of thought at most; None is no bound.

        Raises `UserError` where nothing more can come. Closing the iterator gives up what is under way.
        """
        ...


class EngineAnswers:
    """Answers of a model in an engine, the built-in one or a remote one that gives token ids."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer) -> None:
        """`tokenizer` is the model's own."""
        self.here = not isinstance(engine, RemoteEngine)
        self._engine, self._tokenizer = engine, tokenizer
        self._tags = find_think_tags(tokenizer, tokenizer.vocab_size)
        # To count thoughts, tags need not be known to the model's vocabulary or template: spelt out, they are tags.
        self._counted = self._tags or ThinkTags(tokenizer, tokenizer.vocab_size)

    def require(self, settings: EvaluationSettings) -> None:
        """As `Answers.require`: a chat template for `prompt.style` chat, think tags for budgets."""
        Asker(self._tokenizer, settings.prompt)
        if settings.budgets and self._tags is None:
            raise UserError(
                "budgets: thoughts can be cut short only where <think> and </think> are in the vocabulary or the chat "
                "template, as they are not in this model's; leave it out"
            )

    def replies(
        self, problems: Sequence[Problem], settings: EvaluationSettings, *, budget: int | None
    ) -> Iterator[Reply]:
        """As `Answers.replies`. A sample's seed depends on the problem, its number and `settings.seed` alone, so that
        budgets are compared on the same draws."""
        ask, stopping = Asker(self._tokenizer, settings.prompt), threading.Event()
        size = max(1, _UNDER_WAY // (_THREADS * settings.samples))
        batches = [problems[start : start + size] for start in range(0, len(problems), size)]

        def heed() -> None:
            if stopping.is_set():
                raise Stopped

        def work(batch: Sequence[Problem]) -> list[Reply]:
            heed()
            asked = [(problem, ask(problem)) for problem in batch]
            requests = [
                self._request(problem, prompt, settings, budget, number)
                for problem, prompt in asked
                if self._fits(prompt)
                for number in range(settings.samples)
            ]
            drawn = iter(draw(self._engine, requests, retries=RETRIES, heed=heed))
            return [self._reply(problem, prompt, drawn, settings) for problem, prompt in asked]

        with ThreadPoolExecutor(_THREADS) as pool:
            futures = [pool.submit(work, batch) for batch in batches]
            try:
                for replies in results(futures):
                    yield from replies
            finally:
                stopping.set()

    def _request(
        self, problem: Problem, prompt: list[int], settings: EvaluationSettings, budget: int | None, number: int
    ) -> Request:
        seed = seed_of(settings.seed, problem.key or problem.question, number)
        return Request(
            prompt,
            settings.max_tokens,
            Sampling(temperature=settings.temperature, top_p=settings.top_p, seed=seed),
            thinking=None if budget is None else Thinking(budget=budget),
            starts_thinking=self._tags is not None and self._opens(prompt),
        )

    def _reply(
        self, problem: Problem, prompt: list[int], drawn: Iterator[Drawn], settings: EvaluationSettings
    ) -> Reply:
        """The next `samples` of `drawn` as the answers to `problem`, if it was asked."""
        if not self._fits(prompt):
            told = f"its prompt has {len(prompt)} tokens, and the model's context is {self._engine.context}"
            return Reply(problem, missing=told)
        own = [next(drawn) for _ in range(settings.samples)]
        if failure := next((one.failure for one in own if one.failure), None):
            return Reply(problem, missing=failure)
        return Reply(problem, tuple(self._answer(one, prompt) for one in own))

    def _answer(self, drawn: Drawn, prompt: list[int]) -> Answer:
        inside = self._opens(prompt)
        thoughts = ThoughtTracker(self._counted, None, inside=inside)
        for token in drawn.tokens:
            thoughts.advance(token)
        text = (OPENING if inside else "") + self._tokenizer.decode(drawn.tokens)
        return Answer(text, drawn.finished, len(prompt), len(drawn.tokens), thoughts.thoughts)

    def _fits(self, prompt: list[int]) -> bool:
        """Whether it leaves room for an answer."""
        return len(prompt) < self._engine.context

    def _opens(self, prompt: list[int]) -> bool:
        """Whether it ends inside an open think tag."""
        return self._tokenizer.decode(prompt[-_TAIL:], skip_special=False).rstrip().endswith(OPENING)


def results(futures: Sequence[Future]) -> Iterator:
    """What each of them gives, as they end; left early, those that have not begun never will."""
    try:
        for future in as_completed(futures):
            yield future.result()
    finally:
        for future in futures:
            future.cancel()
