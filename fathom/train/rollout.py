"""Rollouts: problems put to the model, groups of completions drawn through an engine, rewards by rule.

Everything here is a function of the recipe's seed, the step, and the weights: problems come from a seed of their own
per step and round, every sample has a seed, and the engine draws a request alike whatever else it serves. So a resumed
run sees what the unbroken one would have seen.
"""

import hashlib
import itertools
import random
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from fathom.config.rl import PromptSection, RLRecipe
from fathom.data.tokenizer import Tokenizer
from fathom.engine.protocol import Chunk, Engine, QueueFull, Request, Sampling, Thinking, Ticket
from fathom.engine.thinking import OPENING, find_think_tags
from fathom.errors import UserError
from fathom.tasks.checker import Checker, Sample
from fathom.tasks.rewards import Reward
from fathom.tasks.task import Problem, Split, Task

HEED_SECONDS = 0.1
"""How long a rollout waits before it looks again whether it is to be given up."""


@dataclass
class Drawn:
    """A completion as it comes from the engine."""

    tokens: list[int] = field(default_factory=list)
    """All that were drawn, the end of the text included."""
    logprobs: list[float] = field(default_factory=list)
    """The engine's own, one per token: at the temperature of sampling, or 1 where an endpoint drew."""
    finished: bool = False
    """Whether the model ended it; False where it ran into the token limit."""
    routes: Tensor | None = None
    """int16 [prompt + completion − 1, mixtures, K]: the experts that the engine chose, where it records them."""
    failure: str = ""
    """Why there is no completion."""


@dataclass(frozen=True)
class Rollout:
    """A completion and what it earned."""

    drawn: Drawn
    text: str
    reward: Reward


@dataclass(frozen=True)
class Group:
    """The completions of one problem."""

    problem: Problem
    prompt_ids: list[int]
    rollouts: list[Rollout]

    @property
    def rewards(self) -> list[float]:
        """Of each rollout."""
        return [rollout.reward.total for rollout in self.rollouts]

    @property
    def informative(self) -> bool:
        """Whether its rewards differ, so that there is something to learn from it."""
        return len(set(self.rewards)) > 1


class Asker:
    """Turns problems into prompts."""

    def __init__(self, tokenizer: Tokenizer, section: PromptSection) -> None:
        """Raises `UserError` where the model cannot be asked in this style, with what to do."""
        self._tokenizer, self._section = tokenizer, section
        if section.style == "chat" and tokenizer.chat_template is None:
            raise UserError(
                "prompt.style = chat, but this model's folder has no chat template; set prompt.style to 'zero', or to "
                "'template' with a prompt.template of your own"
            )

    def __call__(self, problem: Problem) -> list[int]:
        """Token ids of the prompt."""
        section, tokenizer = self._section, self._tokenizer
        if section.style == "chat":
            content = "\n".join(part for part in (problem.question, section.instruction) if part)
            text = tokenizer.apply_chat_template([{"role": "user", "content": content}], **section.template_switches)
            begin: list[int] = []
        else:
            text = section.text.replace("{question}", problem.question)
            begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        opening = OPENING if section.opens_thought and not text.rstrip().endswith(OPENING) else ""
        return begin + tokenizer.encode(text + opening, special=True)


def seed_of(*parts: object) -> int:
    """A seed of 63 bits that depends on `parts` alone."""
    digest = hashlib.blake2b(" ".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def draw_problems(
    task: Task, split: Split, levels: int, count: int, *, seed: int, without: Collection[str] = ()
) -> list[Problem]:
    """`count` different problems of levels 1 to `levels`, or as many as are found; which level each is of is drawn too.

    `without` are questions not to be asked again.
    """
    source = random.Random(seed)
    streams: dict[int, Iterator[Problem]] = {}
    found: dict[str, Problem] = {}
    tries = 0
    while len(found) < count and tries < 20 * count:
        level, tries = source.randint(1, levels), tries + 1
        if level not in streams:
            streams[level] = task.problems(split, level=level, seed=seed)
        problem = next(streams[level])
        if problem.question not in without:
            found.setdefault(problem.key or problem.question, problem)
    return list(found.values())


def held_out_problems(task: Task, levels: int, count: int, *, seed: int) -> list[Problem]:
    """The same problems whenever asked: `count` held out, none of them twice, or as many as are found.

    They are spread evenly over the levels; what one has too few of, others have more of.
    """
    found: dict[str, Problem] = {}
    streams = [task.problems("held-out", level=level, seed=seed) for level in range(1, levels + 1)]
    before = -1
    while before < len(found) < count:  # once more where a level had too few for its share
        before = len(found)
        for place, stream in enumerate(streams):
            wanted = len(found) + -(-(count - len(found)) // (levels - place))
            for problem in itertools.islice(stream, 20 * count):
                if len(found) == wanted:
                    break
                found.setdefault(problem.key or problem.question, problem)
    return list(found.values())


def draw(
    engine: Engine, requests: Sequence[Request], *, retries: int, heed: Callable[[], None] = lambda: None
) -> list[Drawn]:
    """All completions, in the order of the requests. One that fails is asked for again, `retries` times.

    What fails for good has a `failure`, and the others are none the worse. Raises `UserError` where all fail, and for a
    request that cannot be served at all. `heed` is called again and again; what it raises cancels all requests.
    """
    results = [Drawn(failure="not asked for") for _ in requests]
    for _ in range(retries + 1):
        left = [place for place, drawn in enumerate(results) if drawn.failure]
        if not left:
            break
        for place, drawn in zip(left, _draw_once(engine, [requests[place] for place in left], heed), strict=True):
            results[place] = drawn
    if requests and all(drawn.failure for drawn in results):
        raise UserError(f"no completion could be drawn: {results[0].failure}")
    return results


def _draw_once(engine: Engine, requests: Sequence[Request], heed: Callable[[], None]) -> list[Drawn]:
    results = [Drawn() for _ in requests]
    ended = threading.Semaphore(0)

    def listener(drawn: Drawn) -> Callable[[Chunk], None]:
        def deliver(chunk: Chunk) -> None:
            drawn.tokens += chunk.token_ids
            drawn.logprobs += [entry.logprob for entry in chunk.logprobs or []]
            if chunk.finish_reason is not None:
                drawn.finished, drawn.routes = chunk.finish_reason == "stop", chunk.routes
                if chunk.finish_reason in ("error", "cancelled"):
                    drawn.failure = chunk.message or chunk.finish_reason
                elif not drawn.tokens:
                    drawn.failure = "it has no tokens"
                ended.release()

        return deliver

    tickets: list[Ticket] = []
    waiting = 0

    def await_one() -> None:
        nonlocal waiting
        heed()
        while not ended.acquire(timeout=HEED_SECONDS):
            heed()
        waiting -= 1

    try:
        for request, drawn in zip(requests, results, strict=True):
            while True:
                try:
                    tickets.append(engine.submit(request, listener(drawn)))
                    break
                except QueueFull:
                    if not waiting:
                        raise
                    await_one()
            waiting += 1
        while waiting:
            await_one()
    except BaseException:
        for ticket in tickets:
            ticket.cancel()
        while waiting:
            ended.acquire()
            waiting -= 1
        raise
    return results


class Roller:
    """Draws and scores groups as a recipe says."""

    def __init__(
        self,
        recipe: RLRecipe,
        engine: Engine,
        tokenizer: Tokenizer,
        checker: Checker,
        heed: Callable[[], None] = lambda: None,
    ) -> None:
        """`heed` as in `draw`."""
        self._recipe, self._engine, self._tokenizer, self._checker = recipe, engine, tokenizer, checker
        self._heed = heed
        self._ask = Asker(tokenizer, recipe.prompt)
        self._marks_thoughts = find_think_tags(tokenizer, tokenizer.vocab_size) is not None
        self.too_long = 0
        """Problems so far whose prompt left no room in the model's context, and were left out."""
        if recipe.rollout.max_tokens >= engine.context:
            raise UserError(
                f"rollout.max_tokens = {recipe.rollout.max_tokens}, but prompt and completion together have "
                f"{engine.context} tokens at most in this model"
            )
        if recipe.eval.budgets and not self._marks_thoughts:
            raise UserError(
                "eval.budgets: thoughts can be cut short only where <think> and </think> are tokens of the vocabulary, "
                "which this model has not; leave it out"
            )

    def groups(self, problems: Sequence[Problem], samples: int, *, seed: int) -> list[Group]:
        """`samples` completions of each problem, scored; fewer where some could not be drawn."""
        rollout = self._recipe.rollout
        problems, prompts = self._prompts(problems)
        requests = [
            self._request(prompt, rollout.temperature, seed_of(seed, place, sample))
            for place, prompt in enumerate(prompts)
            for sample in range(samples)
        ]
        drawn = draw(self._engine, requests, retries=rollout.retries, heed=self._heed)
        rollouts = self.score([problem for problem in problems for _ in range(samples)], drawn)
        groups = []
        for place, (problem, prompt) in enumerate(zip(problems, prompts, strict=True)):
            own = slice(place * samples, (place + 1) * samples)
            kept = [rollout for rollout in rollouts[own] if rollout is not None]
            if kept:
                groups.append(Group(problem, prompt, kept))
        return groups

    def measure(
        self,
        problems: Sequence[Problem],
        *,
        temperature: float,
        seed: int,
        begin: str = "",
        bias: dict[int, float] | None = None,
        budget: int | None = None,
    ) -> list[tuple[Problem, Rollout]]:
        """One completion of each problem that could be drawn.

        `begin` is put into the model's mouth and counts as its own text; `bias` is on its first tokens' logits and all
        others'; `budget` closes its thoughts.
        """
        begun = self._tokenizer.encode(begin, special=True)
        thinking = None if budget is None else Thinking(budget=budget)
        problems, prompts = self._prompts(problems)
        requests = [
            self._request(prompt + begun, temperature, seed_of(seed, place), thinking, bias, begin.endswith(OPENING))
            for place, prompt in enumerate(prompts)
        ]
        drawn = draw(self._engine, requests, retries=self._recipe.rollout.retries, heed=self._heed)
        scored = self.score(problems, drawn, begin=begin)
        return [(p, rollout) for p, rollout in zip(problems, scored, strict=True) if rollout is not None]

    def prompt(self, problem: Problem) -> str:
        """What the model reads."""
        return self._tokenizer.decode(self._ask(problem))

    def score(self, problems: Sequence[Problem], drawn: Sequence[Drawn], *, begin: str = "") -> list[Rollout | None]:
        """The rewards of completions; None for one that could not be drawn."""
        there = [place for place, one in enumerate(drawn) if not one.failure]
        texts = {place: begin + self._tokenizer.decode(drawn[place].tokens) for place in there}
        rewards = self._checker.score_all(
            [Sample(problems[p], texts[p], len(drawn[p].tokens), drawn[p].finished) for p in there],
            max_tokens=self._recipe.rollout.max_tokens,
            starts_thinking=self._recipe.prompt.opens_thought,
            settings=self._recipe.rewards,
        )
        result: list[Rollout | None] = [None] * len(drawn)
        for place, reward in zip(there, rewards, strict=True):
            result[place] = Rollout(drawn[place], texts[place], reward)
        return result

    def _prompts(self, problems: Sequence[Problem]) -> tuple[list[Problem], list[list[int]]]:
        """Those that fit into the model's context beside a completion, and their prompts."""
        asked = [(problem, self._ask(problem)) for problem in problems]
        most = self._engine.context - self._recipe.rollout.max_tokens
        fitting = [(problem, prompt) for problem, prompt in asked if len(prompt) <= most]
        self.too_long += len(asked) - len(fitting)
        if asked and not fitting:
            raise UserError(
                f"task {self._recipe.task.name}: its prompts have {min(len(prompt) for _, prompt in asked)} tokens and "
                f"more, of which this model takes {most} beside {self._recipe.rollout.max_tokens} of a completion; "
                "lower rollout.max_tokens or the level"
            )
        return [problem for problem, _ in fitting], [prompt for _, prompt in fitting]

    def _request(
        self,
        prompt: list[int],
        temperature: float,
        seed: int,
        thinking: Thinking | None = None,
        bias: dict[int, float] | None = None,
        starts_thinking: bool = False,
    ) -> Request:
        return Request(
            prompt,
            self._recipe.rollout.max_tokens,
            Sampling(temperature=temperature, seed=seed, logit_bias=bias or {}),
            logprobs=0,
            tempered_logprobs=self._recipe.rollout.endpoint is None,
            thinking=thinking,
            # Where the tags are ordinary text, the engine does not tell thoughts from the rest, and need not.
            starts_thinking=self._marks_thoughts and (starts_thinking or self._recipe.prompt.opens_thought),
        )
