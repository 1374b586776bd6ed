"""What a pipeline has cost: time, energy where it can be read, money at the price of this machine, and arithmetic."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from fathom.model.accounting import flops_per_token
from fathom.report.axis import plain
from fathom.report.measurements import number
from fathom.report.run_data import Run
from fathom.report.stages import Stage, Story
from fathom.report.tables import count, quantity


@dataclass(frozen=True)
class Cost:
    """Of one stage."""

    seconds: float
    """Of all its sessions, measuring included."""
    joules: float | None
    """Of the machine's processors, whoever used them; None where they cannot be read."""
    tokens: float | None
    """That it has learnt from; None where nothing was learnt."""
    flops: float | None
    """To learn from those tokens; None where the model is not known."""
    share_of_peak: float | None
    """Median of its steps; None where it was not measured."""


def cost_of(stage: Stage) -> Cost | None:
    """None for a stage that is not begun."""
    if stage.state is None:
        return None
    tokens = None if stage.run is None else _tokens(stage.run)
    flops = None
    if stage.run is not None and stage.config is not None and tokens:
        # Modules for multi-token prediction learn in pre-training alone.
        length = max(1, round(_length(stage.run, tokens)))
        flops = tokens * flops_per_token(stage.config, length, mtp=stage.verb == "pretrain")
    lines = () if stage.run is None else stage.run.measured.train
    shares = [share for line in lines if (share := number(line.get("gemm_share"))) is not None]
    share_of_peak = statistics.median(shares) if shares else None
    return Cost(stage.state.seconds, stage.state.joules, tokens, flops, share_of_peak)


def cost_table(story: Story) -> list[list[str]]:
    """Heading, a row per stage that is begun, and their sum; columns of which nothing is known are left out."""
    costs = [(stage.name, cost) for stage in story.stages if (cost := cost_of(stage)) is not None]
    columns = list(_columns(story, [cost for _, cost in costs]))
    rows = [["stage", *(title for title, _, _ in columns)]]
    rows += [[name, *(write(cost) for _, write, _ in columns)] for name, cost in costs]
    return [*rows, ["all", *(total for _, _, total in columns)]]


def money(story: Story, seconds: float) -> str:
    """What so much of this machine's time costs."""
    spent = story.pipeline.price_per_hour * seconds / 3600
    return f"{story.pipeline.currency}{spent:,.{2 if spent >= 10 else 4}f}"


def duration(seconds: float) -> str:
    """Of a few seconds, or of hours."""
    if round(seconds) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02} min"


def energy(costs: Sequence[Cost]) -> str:
    """Of all stages; empty where it is known of none."""
    return _summed([cost.joules for cost in costs], _joules)


def _columns(story: Story, costs: list[Cost]) -> Iterator[tuple[str, Callable[[Cost], str], str]]:
    """Title, a stage's cell, and the sum."""
    seconds = sum(cost.seconds for cost in costs)
    yield "time", lambda cost: duration(cost.seconds), duration(seconds)
    if joules := energy(costs):
        yield "energy", lambda cost: _written(cost.joules, _joules), joules
    yield "money", lambda cost: money(story, cost.seconds), money(story, seconds)
    learning = [cost for cost in costs if cost.tokens]
    if tokens := _summed([cost.tokens for cost in learning], count):
        yield "tokens learnt from", lambda cost: _written(cost.tokens, count), tokens
    if flops := _summed([cost.flops for cost in learning], _operations):
        yield "arithmetic", lambda cost: _written(cost.flops, _operations), flops
    if any(cost.share_of_peak for cost in costs):
        yield (
            "of the machine's peak",
            lambda cost: _written(cost.share_of_peak, lambda share: f"{plain(100 * share)} %"),
            "",
        )


def _joules(value: float) -> str:
    return quantity(value, "J")


def _operations(value: float) -> str:
    return quantity(value, "FLOP")


def _summed(values: Sequence[float | None], write: Callable[[float], str]) -> str:
    """Where some are not known, what it is at least; empty where none is."""
    known = [value for value in values if value is not None]
    if not sum(known):
        return ""
    return write(sum(known)) if len(known) == len(values) else f"at least {write(sum(known))}"


def _written(value: float | None, write: Callable[[float], str]) -> str:
    return "" if value is None else write(value)


def _tokens(run: Run) -> float | None:
    """What was learnt from so far: of rewards, all completions of all steps."""
    if not run.measured.train:
        return None
    if run.verb != "rl":
        return number(run.measured.train[-1].get("tokens"))
    samples = number(run.field("rollout", "samples")) or 0.0
    drawn = (_product(line.get("problems"), line.get("completion_tokens")) for line in run.measured.train)
    return samples * sum(filter(None, drawn))


def _length(run: Run, tokens: float) -> float:
    """Of a sequence, on average: attention's part of the arithmetic grows with it."""
    if run.verb == "pretrain":
        return number(run.field("data", "sequence_length")) or 1.0
    if run.verb == "rl":
        return run.measured.total("train", "completion_tokens") / len(run.measured.train)
    answers = (number(run.field("train", "batch")) or 1.0) * len(run.measured.train)
    return tokens / answers


def _product(first: object, second: object) -> float | None:
    one, other = number(first), number(second)
    return None if one is None or other is None else one * other
