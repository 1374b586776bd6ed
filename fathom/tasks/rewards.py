"""What a completion earns: accuracy, form, language, length. All by rule; no model judges.

R1-Zero adds accuracy and format with equal weight; R1 adds the language consistency of the thought; DAPO adds a soft
punishment of overlong completions. The parts are kept beside their weighted sum, so that a run can show what it learnt.
"""

from dataclasses import dataclass

from fathom.config.rewards import Rewards
from fathom.tasks import language
from fathom.tasks.reading import Reading, read, says_something
from fathom.tasks.task import Problem, Task, Verdict, judge


@dataclass(frozen=True)
class Reward:
    """What one completion earned."""

    total: float
    """The parts, each times its weight."""
    parts: dict[str, float]
    """`accuracy`, `format`, `language` (0 to 1) and `overlong` (-1 to 0), before their weights."""
    reading: Reading
    """What was read."""
    fault: str = ""
    """One line where the task's check itself failed; accuracy is then 0."""


def score(
    task: Task,
    problem: Problem,
    completion: str,
    *,
    tokens: int,
    max_tokens: int,
    finished: bool,
    starts_thinking: bool,
    settings: Rewards,
) -> Reward:
    """The reward of one completion of `tokens` tokens; see `read` for `finished` and `starts_thinking`.

    The check runs here and now: for one that may hang, and for many, there is `Checker`.
    """
    reading = read(completion, settings.layout, starts_thinking=starts_thinking, finished=finished)
    verdict = Verdict(0.0) if reading.answer is None else judge(task, problem, reading.answer)
    return combine(reading, verdict, problem, tokens=tokens, max_tokens=max_tokens, settings=settings)


def combine(
    reading: Reading, verdict: Verdict, problem: Problem, *, tokens: int, max_tokens: int, settings: Rewards
) -> Reward:
    """The reward of a completion that was read and whose answer was checked."""
    parts = {
        "accuracy": verdict.score,
        "format": float(reading.well_formed),
        "language": consistency(reading.thought, problem.language),
        "overlong": overlong(tokens, max_tokens, settings.overlong_share),
    }
    weights = settings.model_dump(include=set(parts))
    return Reward(sum(weights[name] * value for name, value in parts.items()), parts, reading, verdict.fault)


def consistency(thought: str, target: language.Language) -> float:
    """The share of a thought's words in `target`.

    A thought of figures alone is in no wrong language and earns 1: it should not pay to adorn it. One that says
    nothing, or is not there, earns nothing.
    """
    share = language.share(thought, target)
    return float(says_something(thought)) if share is None else share


def overlong(tokens: int, max_tokens: int, share: float) -> float:
    """DAPO's soft punishment (eq. 13): 0 until the last `share` of `max_tokens`, then linearly down to -1."""
    cache = share * max_tokens
    return -min(1.0, max(0.0, (tokens - (max_tokens - cache)) / cache))
