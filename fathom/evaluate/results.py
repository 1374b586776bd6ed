"""What was measured: of one completion, of one task at one budget, of a whole evaluation; and its JSON."""

import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fathom.config.evaluation import EvaluationSettings
from fathom.evaluate.answers import Answer
from fathom.evaluate.statistics import Estimate, Votes, cons_at, estimate, pass_at
from fathom.evaluate.transcripts import Transcript
from fathom.tasks.reading import Reading
from fathom.tasks.task import Problem

VERSION = 2
"""Of the JSON."""


@dataclass(frozen=True)
class Graded:
    """A completion, read and checked."""

    answer: Answer
    reading: Reading
    said: str | None
    """Its final answer in one spelling for equal answers; None where there is not exactly one."""
    score: float
    """0 to 1, by the task."""
    language: float | None = None
    """Share of its thought's words that are in the problem's language; None where it has no word."""
    fault: str = ""
    """Why the check itself failed."""

    @property
    def right(self) -> bool:
        """Wholly."""
        return self.score >= 1


@dataclass(frozen=True)
class Tried:
    """A problem and all its samples."""

    problem: Problem
    samples: tuple[Graded, ...]

    @property
    def right(self) -> int:
        """How many samples are."""
        return sum(sample.right for sample in self.samples)

    def pass_at(self, k: int) -> float:
        """Chance that one of `k` samples is right."""
        return pass_at(k, samples=len(self.samples), right=self.right)

    def cons_at(self, k: int) -> float:
        """Chance that the majority of `k` samples is right."""
        said = Counter(sample.said for sample in self.samples if sample.said is not None)
        right = Counter(sample.said for sample in self.samples if sample.right)
        votes = [Votes(count, right[answer] / count) for answer, count in said.items()]
        return cons_at(k, votes, silent=len(self.samples) - said.total())


@dataclass(frozen=True)
class Prices:
    """Of a million tokens, in whatever money."""

    input: float
    output: float


@dataclass(frozen=True)
class Spread:
    """Of a number that every completion has."""

    mean: float
    median: float


@dataclass(frozen=True)
class Level:
    """One level of difficulty."""

    problems: int
    pass_at: dict[int, Estimate]
    """By k."""
    cons_at: dict[int, Estimate]
    """By k."""

    @property
    def pass_at_1(self) -> Estimate:
        """The mean share of samples that are right."""
        return self.pass_at[1]

    def as_json(self) -> dict[str, Any]:
        """As the guide documents it."""
        return {"problems": self.problems} | _by_k(self.pass_at, self.cons_at)


@dataclass(frozen=True)
class Cost:
    """What all completions together have cost, and how many of them were right."""

    right: int
    prompt_tokens: int | None
    completion_tokens: int | None
    seconds: float
    """From the first request to the last check, as many at once as there were."""
    joules: float | None
    """Of this machine's processors, whoever used them."""
    money: float | None

    def per_solved(self) -> dict[str, float | None]:
        """What one right answer has cost: completion tokens, seconds, joules, money."""
        names = ("completion_tokens", "seconds", "joules", "money")
        values = {name: getattr(self, name) for name in names}
        return {name: None if v is None or not self.right else v / self.right for name, v in values.items()}


@dataclass(frozen=True)
class Measurement:
    """One task at one budget of thought."""

    task: str
    budget: int | None
    """Tokens of thought at most; None is no bound."""
    problems: int
    samples: int
    """Of each problem."""
    pass_at: dict[int, Estimate]
    """By k."""
    cons_at: dict[int, Estimate]
    """By k."""
    levels: dict[int, Level]
    score: float
    """Mean of the task's scores, in which part of an answer may count."""
    well_formed: float
    """Share of completions, as `unread` and `truncated`."""
    unread: float
    """Without exactly one answer in its place."""
    unread_for: str
    """Why, most often."""
    truncated: float
    """Cut off at the longest length."""
    thought_tokens: Spread | None
    """None where an endpoint does not say."""
    completion_tokens: Spread | None
    faults: int
    """Checks that failed themselves; such answers count as wrong."""
    fault: str
    """The first of them."""
    left_out: int
    """Problems that could not be asked, or not as often as wanted."""
    left_out_for: str
    """Why the first of them was."""
    language: float | None
    """Mean share of a thought's words that are in the problem's language; None where no thought has a word."""
    language_thoughts: int
    """Thoughts that have one."""
    cost: Cost
    transcripts: tuple[Transcript, ...] = ()
    """Of a few problems, the same ones for every model, the first sample each."""

    @property
    def pass_at_1(self) -> Estimate:
        """The mean share of samples that are right."""
        return self.pass_at[1]

    def as_json(self) -> dict[str, Any]:
        """As the guide documents it."""
        own = asdict(self)
        del own["pass_at"], own["cons_at"]
        own["levels"] = {str(level): found.as_json() for level, found in self.levels.items()}
        own["cost"]["per_solved"] = self.cost.per_solved()
        head = {name: own.pop(name) for name in ("task", "budget", "problems", "samples")}
        return head | _by_k(self.pass_at, self.cons_at) | own


@dataclass(frozen=True)
class Evaluation:
    """All that was measured."""

    model: str
    settings: EvaluationSettings
    measurements: tuple[Measurement, ...]
    """Task by task in the order of the settings: first with thoughts free, then by budget."""
    stopped: str = ""
    """Why it is not complete; empty where it is. What was under way then is measured on the problems that had ended."""

    def free(self, task: str) -> Measurement | None:
        """The measurement of `task` with thoughts free."""
        return next((found for found in self.measurements if found.task == task and found.budget is None), None)

    def by_budget(self, task: str) -> list[Measurement]:
        """The measurements of `task` with thoughts cut, the shortest first."""
        cut = [found for found in self.measurements if found.task == task and found.budget is not None]
        return sorted(cut, key=lambda found: found.budget or 0)

    def as_json(self) -> dict[str, Any]:
        """As the guide documents it."""
        return {
            "version": VERSION,
            "model": self.model,
            "complete": not self.stopped,
            "stopped": self.stopped,
            "settings": self.settings.model_dump(mode="json"),
            "measurements": [found.as_json() for found in self.measurements],
        }


@dataclass(frozen=True)
class Spent:
    """What the time of a measurement has cost beside tokens."""

    seconds: float = 0.0
    joules: float | None = None


def measured(
    task: str,
    budget: int | None,
    tried: Sequence[Tried],
    settings: EvaluationSettings,
    spent: Spent,
    *,
    prices: Prices | None = None,
    left_out: Sequence[str] = (),
    shown: Sequence[Problem] = (),
) -> Measurement:
    """The measurement that `tried` makes, in whatever order; `left_out` says why each of the other problems was, and
    `shown` of which there are transcripts."""
    graded = [sample for one in tried for sample in one.samples]
    faults = [sample.fault for sample in graded if sample.fault]
    unread = Counter(sample.reading.fault for sample in graded if sample.reading.answer is None)
    in_language = [sample.language for sample in graded if sample.language is not None]
    firsts = {one.problem.question: one.samples[0] for one in tried}
    passes, votes = _estimates(tried, settings)
    by_level: dict[int, list[Tried]] = defaultdict(list)
    for one in tried:
        by_level[one.problem.level].append(one)
    return Measurement(
        task,
        budget,
        len(tried),
        settings.samples,
        passes,
        votes,
        {level: Level(len(own), *_estimates(own, settings)) for level, own in sorted(by_level.items())},
        score=statistics.fmean(sample.score for sample in graded),
        well_formed=statistics.fmean(sample.reading.well_formed for sample in graded),
        unread=statistics.fmean(sample.said is None for sample in graded),
        unread_for=next((reason for reason, _ in unread.most_common(1)), ""),
        truncated=statistics.fmean(not sample.answer.finished for sample in graded),
        thought_tokens=_spread([sample.answer.thought_tokens for sample in graded]),
        completion_tokens=_spread([sample.answer.completion_tokens for sample in graded]),
        faults=len(faults),
        fault=faults[0] if faults else "",
        left_out=len(left_out),
        left_out_for=left_out[0] if left_out else "",
        language=statistics.fmean(in_language) if in_language else None,
        language_thoughts=len(in_language),
        cost=_cost(graded, spent, prices),
        transcripts=tuple(
            Transcript.of(problem, first.answer, first.reading, right=first.right)
            for problem in shown
            if (first := firsts.get(problem.question)) is not None
        ),
    )


def _estimates(tried: Sequence[Tried], settings: EvaluationSettings) -> tuple[dict[int, Estimate], dict[int, Estimate]]:
    """pass@k and cons@k."""
    # Of k samples each, there are so many sets without a sample in common.
    passes = {k: estimate([one.pass_at(k) for one in tried], settings.samples // k) for k in settings.sizes}
    votes = {k: estimate([one.cons_at(k) for one in tried], settings.samples // k) for k in settings.votes}
    return passes, votes


def _by_k(pass_at: dict[int, Estimate], cons_at: dict[int, Estimate]) -> dict[str, Any]:
    return {
        "pass@k": {str(k): asdict(value) for k, value in pass_at.items()},
        "cons@k": {str(k): asdict(value) for k, value in cons_at.items()},
    }


def _spread(numbers: Sequence[int | None]) -> Spread | None:
    known = [number for number in numbers if number is not None]
    return Spread(statistics.fmean(known), statistics.median(known)) if len(known) == len(numbers) else None


def _cost(graded: Sequence[Graded], spent: Spent, prices: Prices | None) -> Cost:
    read = _total([sample.answer.prompt_tokens for sample in graded])
    written = _total([sample.answer.completion_tokens for sample in graded])
    money = None
    if prices is not None and read is not None and written is not None:
        money = (read * prices.input + written * prices.output) / 1e6
    return Cost(sum(sample.right for sample in graded), read, written, spent.seconds, spent.joules, money)


def _total(numbers: Sequence[int | None]) -> int | None:
    known = [number for number in numbers if number is not None]
    return sum(known) if len(known) == len(numbers) else None
