"""Who solves the problems: a model in an engine, or the task itself.

A wrong answer can be asked again in the same conversation. In a chat that is the model's answer, and the verdict as
the user's next message; where a prompt is plain text, the model reads its own completion, the verdict, and the question
once more as it is used to it. Thoughts of a former answer are left out of a chat, as chat templates do.
"""

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from fathom.config.rewards import Layout
from fathom.config.synth import SynthRecipe
from fathom.data.template_encoding import TemplateEncoder
from fathom.data.tokenizer import Tokenizer
from fathom.engine.engine import Engine, EngineSettings
from fathom.engine.protocol import Chunk, QueueFull, Request, Sampling, Ticket
from fathom.engine.protocol import Engine as EngineProtocol
from fathom.engine.thinking import CLOSING, OPENING, find_think_tags
from fathom.errors import UserError
from fathom.model.checkpoint import load
from fathom.synth.candidates import Candidate
from fathom.tasks.faults import describe
from fathom.tasks.task import Problem, Task, half_character
from fathom.train.machine import device, has_bf16
from fathom.train.rollout import Asker, Drawn, draw
from fathom.train.run import model_folder

WORKED_LAYOUT = Layout(form="rest", thoughts="optional")
"""How worked solutions are laid out."""


@dataclass(frozen=True)
class Attempt:
    """A wrong answer."""

    text: str
    """The whole completion."""
    answer: str
    """What was read in it."""


@dataclass(frozen=True)
class Asking:
    """One candidate to be made."""

    problem: Problem
    seed: int
    attempts: tuple[Attempt, ...] = ()
    """Of the same conversation, the first first."""


class Teacher(Protocol):
    """Who solves problems."""

    def solve(self, task: Task, askings: Sequence[Asking]) -> list[Candidate]:
        """A candidate for each, in their order, not checked yet. Raises `UserError` where none can be had."""
        ...


class WorkedSolutions:
    """Solutions that tasks write by rule."""

    def solve(self, task: Task, askings: Sequence[Asking]) -> list[Candidate]:
        """As `Teacher.solve`."""
        solved = [self._one(task, asking) for asking in askings]
        if all(candidate.failure for candidate in solved):
            raise UserError(f"task {task.called}: {solved[0].failure}; draw from a model (source = 'model', model = …)")
        return solved

    def _one(self, task: Task, asking: Asking) -> Candidate:
        try:
            thought = task.solution(asking.problem, random.Random(asking.seed))
        except Exception as error:  # a task is somebody's code
            file = getattr(sys.modules.get(type(task).__module__), "__file__", None)
            raise UserError(f"task {task.called}: its solution() raised {describe(error, file)}; mend it") from error
        if thought is None or not asking.problem.answer:
            return Candidate("", asking.seed, failure="it writes no worked solution")
        if half := half_character(str(thought)):
            raise UserError(f"task {task.called}: its solution() holds {half}, half a character and no text; mend it")
        return Candidate(f"{OPENING}{thought}{CLOSING}{asking.problem.answer}", asking.seed)


class Model:
    """A model in an engine."""

    def __init__(
        self, recipe: SynthRecipe, engine: EngineProtocol, tokenizer: Tokenizer, heed: Callable[[], None]
    ) -> None:
        """`recipe` has prompt and layout; `heed` as in `draw`. Raises `UserError` where a model cannot be asked so."""
        assert recipe.prompt is not None
        self._draw, self._prompt = recipe.draw, recipe.prompt
        self._engine, self._tokenizer, self._heed = engine, tokenizer, heed
        self._ask = Asker(tokenizer, recipe.prompt)
        self._marks_thoughts = find_think_tags(tokenizer, tokenizer.vocab_size) is not None
        self._encoder = TemplateEncoder(tokenizer) if recipe.prompt.style == "chat" else None
        if recipe.draw.max_tokens >= engine.context:
            raise UserError(
                f"draw.max_tokens = {recipe.draw.max_tokens}, but prompt and completion together have "
                f"{engine.context} tokens at most in this model"
            )

    def solve(self, task: Task, askings: Sequence[Asking]) -> list[Candidate]:
        """As `Teacher.solve`."""
        prompts = [self._conversation(asking) for asking in askings]
        most = self._engine.context - self._draw.max_tokens
        fitting = [place for place, prompt in enumerate(prompts) if len(prompt) <= most]
        requests = [
            Request(
                prompts[place],
                self._draw.max_tokens,
                Sampling(temperature=self._draw.temperature, top_p=self._draw.top_p, seed=askings[place].seed),
                starts_thinking=self._marks_thoughts and self._prompt.opens_thought,
            )
            for place in fitting
        ]
        drawn = dict(zip(fitting, self._drawn(requests, again=bool(askings[0].attempts)), strict=True))
        no_room = Drawn(failure=f"its prompt leaves no room for draw.max_tokens = {self._draw.max_tokens}")
        return [self._candidate(asking, drawn.get(place, no_room)) for place, asking in enumerate(askings)]

    def _drawn(self, requests: Sequence[Request], *, again: bool) -> list[Drawn]:
        """As `draw`; but where an engine that works brings nothing, as a round of a few that are asked again may come
        to, that is what has come of them. The run could never go on behind them otherwise."""
        engine = _Watched(self._engine)
        try:
            return draw(engine, requests, retries=self._draw.retries, heed=self._heed)
        except UserError as error:
            if engine.failed or isinstance(error, QueueFull) or not (again or engine.ended):
                raise
            return [Drawn(failure=str(error)) for _ in requests]

    def _candidate(self, asking: Asking, drawn: Drawn) -> Candidate:
        text = "" if drawn.failure else self._tokenizer.decode(drawn.tokens)
        return Candidate(
            text, asking.seed, len(asking.attempts), len(drawn.tokens), drawn.finished, failure=drawn.failure
        )

    def _conversation(self, asking: Asking) -> list[int]:
        """Token ids of the prompt."""
        question = self._ask(asking.problem)
        if not asking.attempts:
            return question
        if self._encoder is not None:
            return self._chat(asking)
        verdicts = [f"{attempt.text}\n{self._verdict(attempt)}\n" for attempt in asking.attempts]
        bos = self._tokenizer.bos_token_id
        again = question[1:] if question[0] == bos else question
        return question + [token for text in verdicts for token in (*self._tokenizer.encode(text), *again)]

    def _chat(self, asking: Asking) -> list[int]:
        assert self._encoder is not None
        first = "\n".join(part for part in (asking.problem.question, self._prompt.instruction) if part)
        messages = [{"role": "user", "content": first}]
        for attempt in asking.attempts:
            said = attempt.text.rpartition(CLOSING)[2].strip()
            messages.append({"role": "assistant", "content": said})
            messages.append({"role": "user", "content": self._verdict(attempt)})
        text = self._tokenizer.apply_chat_template(self._encoder.protect(messages), **self._prompt.template_switches)
        opens = self._prompt.opens_thought and not text.rstrip().endswith(OPENING)
        return self._encoder.encode(text + (OPENING if opens else ""))

    def _verdict(self, attempt: Attempt) -> str:
        return self._draw.repair_text.replace("{answer}", attempt.answer)


class _Watched:
    """An engine, and what became of all that it was asked."""

    def __init__(self, engine: EngineProtocol) -> None:
        self._engine, self.context = engine, engine.context
        self.statistics, self.close = engine.statistics, engine.close
        self.failed = False
        """Whether a completion failed by its fault."""
        self.ended = False
        """Whether it brought a completion to its end, if with nothing in it."""

    def submit(self, request: Request, deliver: Callable[[Chunk], None]) -> Ticket:
        """As `Engine.submit`."""

        def watched(chunk: Chunk) -> None:
            if chunk.finish_reason in ("error", "cancelled"):
                self.failed |= chunk.fault == "engine"
            elif chunk.finish_reason is not None:
                self.ended = True
            deliver(chunk)

        return self._engine.submit(request, watched)


@contextmanager
def open_teacher(recipe: SynthRecipe, heed: Callable[[], None]) -> Iterator[Teacher]:
    """The teacher of a recipe that has prompt and layout; inside, it can be asked. Raises `UserError`."""
    if recipe.source == "worked":
        yield WorkedSolutions()
        return
    assert recipe.model is not None
    folder = model_folder(recipe.model)
    candidates = recipe.draw.batch * recipe.draw.samples
    if recipe.draw.endpoint is None:
        model, tokenizer = load(folder, dtype="bfloat16" if has_bf16() else "float32", device=device())
        settings = EngineSettings(max_running=min(256, candidates), queue=candidates)
        with Engine(model, _required(tokenizer, recipe), settings) as engine:
            yield Model(recipe, engine, _required(tokenizer, recipe), heed)
        return
    from fathom.engine.remote import RemoteEngine, RemoteSettings

    tokenizer = load(folder)[1] if folder.suffix == ".gguf" else Tokenizer.from_folder(folder)
    remote = RemoteSettings(
        url=recipe.draw.endpoint, model=recipe.draw.endpoint_model, api_key_env=recipe.draw.endpoint_key_env
    )
    with RemoteEngine(remote, _required(tokenizer, recipe)) as engine:
        yield Model(recipe, engine, _required(tokenizer, recipe), heed)


def _required(tokenizer: Tokenizer | None, recipe: SynthRecipe) -> Tokenizer:
    if tokenizer is None:
        raise UserError(f"{recipe.model}: has no tokenizer, without which no problem can be put to it")
    return tokenizer
