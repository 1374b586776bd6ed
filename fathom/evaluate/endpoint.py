"""Answers of an OpenAI-compatible endpoint, as text.

What every endpoint gives is text, so text is all that is asked for: no token ids, no log-probabilities, no tokenizer.
How many tokens there were is what the endpoint counts (`usage`), and is not known where it counts none. A problem is a
user's message to `/chat/completions`, or with `prompt.style` zero or template a text for `/completions` to go on from.

A thought comes back as `reasoning_content` (DeepSeek's name; vLLM's newer one is `reasoning`) or within the text, and
is put between think tags, so that an answer reads the same wherever it was written. Thoughts can be cut short by
`fathom serve` alone: other servers may leave the field unread, and the curve would be flat for no reason that shows.
"""

import asyncio
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Self

from pydantic import BaseModel

from fathom.config.evaluation import EvaluationSettings
from fathom.engine.endpoint import Dropped, Endpoint, Refused, RemoteSettings
from fathom.engine.thinking import CLOSING, OPENING
from fathom.errors import UserError
from fathom.evaluate.answers import Answer, Reply, results
from fathom.tasks.task import Problem
from fathom.train.rollout import seed_of

_TAKES_SEEDS = ("fathom", "vllm")
"""Who is known to take a seed; others refuse what they do not know."""


class _Message(BaseModel):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Choice(BaseModel):
    message: _Message | None = None
    text: str | None = None
    finish_reason: str | None = None


class _Details(BaseModel):
    reasoning_tokens: int | None = None


class _Usage(BaseModel):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    completion_tokens_details: _Details | None = None


class _Completion(BaseModel):
    choices: list[_Choice]
    usage: _Usage | None = None


class EndpointAnswers:
    """Answers of a model behind an endpoint; a context manager."""

    here = False

    def __init__(self, settings: RemoteSettings) -> None:
        """Waits until the endpoint has said what it serves. Raises `UserError` when it does not, or has no such model,
        and without the extra `remote`."""
        self._endpoint = Endpoint(settings)
        self._connections = asyncio.Semaphore(settings.connections)
        self._answered = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fathom-endpoint", daemon=True)
        self._thread.start()
        try:
            self.model = asyncio.run_coroutine_threadsafe(self._endpoint.served(), self._loop).result()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        """Itself, closed when the block ends."""
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections, and end the thread."""
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        under_way = asyncio.all_tasks() - {asyncio.current_task()}
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)
        await self._endpoint.close()

    def require(self, settings: EvaluationSettings) -> None:
        """As `Answers.require`."""
        if settings.budgets and not self.model.of_fathom:
            raise UserError(
                f"budgets: thoughts are cut short by 'fathom serve' alone, and '{self.model.id}' is served by another "
                "server; leave it out"
            )
        if settings.prompt.style == "chat" and settings.prompt.opens_thought and not self.model.of_fathom:
            raise UserError(
                f"prompt.opens_thought: '{self.model.id}' is served by another server than 'fathom serve', whose chat "
                "template decides whether it thinks; leave it out"
            )

    def replies(
        self, problems: Sequence[Problem], settings: EvaluationSettings, *, budget: int | None
    ) -> Iterator[Reply]:
        """As `Answers.replies`. Once it has answered anything, a request that it refuses leaves its problem out."""
        futures = [
            asyncio.run_coroutine_threadsafe(self._reply(problem, settings, budget), self._loop) for problem in problems
        ]
        return results(futures)

    async def _reply(self, problem: Problem, settings: EvaluationSettings, budget: int | None) -> Reply:
        """Raises `UserError` where asking for anything else is vain too."""
        path, body = self._request(problem, settings)
        if budget is not None:
            body["thinking_budget"] = budget
            body.pop("enable_thinking", None)  # the budget says whether it thinks: 0 is off
        seeds = [seed_of(settings.seed, problem.key or problem.question, n) for n in range(settings.samples)]
        samples = [asyncio.ensure_future(self._answer(path, body, seed)) for seed in seeds]
        try:
            return Reply(problem, tuple(await asyncio.gather(*samples)))
        except (Dropped, Refused) as error:
            told = self._endpoint.without_key(str(error))
            if self._answered and isinstance(error, Refused) and error.fault == "request":
                return Reply(problem, missing=told)
            raise UserError(told) from None
        finally:
            for sample in samples:
                sample.cancel()

    def _request(self, problem: Problem, settings: EvaluationSettings) -> tuple[str, dict[str, Any]]:
        """Where to ask, and what."""
        prompt = settings.prompt
        body: dict[str, Any] = {
            "model": self.model.id,
            "max_tokens": settings.max_tokens,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
        }
        if prompt.style == "chat":
            content = "\n".join(part for part in (problem.question, prompt.instruction) if part)
            thinks = {"enable_thinking": True} if prompt.opens_thought else {}
            return "chat/completions", {**body, **thinks, "messages": [{"role": "user", "content": content}]}
        text = prompt.text.replace("{question}", problem.question)
        opening = OPENING if prompt.opens_thought and not _opens(text) else ""
        return "completions", {**body, "prompt": text + opening}

    async def _answer(self, path: str, body: dict[str, Any], seed: int) -> Answer:
        """One sample. Raises `Dropped` after the last try, and `Refused`."""
        if self.model.owned_by in _TAKES_SEEDS:
            body = {**body, "seed": seed}
        async with self._connections:
            found = await self._endpoint.patiently(lambda: self._endpoint.whole(path, body, _Completion))
        if not found.choices:
            raise Refused(f"{self._endpoint.url}/{path}: gives no answer to this request (no choices)", "request")
        self._answered = True
        choice, usage = found.choices[0], found.usage or _Usage()
        details = usage.completion_tokens_details or _Details()
        return Answer(
            _text(choice, starts_thinking=_opens(body.get("prompt", ""))),
            choice.finish_reason != "length",
            usage.prompt_tokens,
            usage.completion_tokens,
            details.reasoning_tokens,
        )


def _opens(prompt: str) -> bool:
    """Whether it ends inside an open think tag."""
    return prompt.rstrip().endswith(OPENING)


def _text(choice: _Choice, *, starts_thinking: bool) -> str:
    """The completion with its thought between tags."""
    message = choice.message or _Message(content=choice.text)
    content, thought = message.content or "", message.reasoning_content or message.reasoning
    if thought:
        closed = content or choice.finish_reason != "length"
        return f"{OPENING}{thought}{CLOSING if closed else ''}{content}"
    # A template that opens the thought leaves a closing tag alone in the text.
    alone = CLOSING in content and OPENING not in content.partition(CLOSING)[0]
    return OPENING + content if starts_thinking or alone else content
