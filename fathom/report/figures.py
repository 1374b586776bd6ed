"""Which figures the report of a run has, and what each of them shows."""

import re
from dataclasses import dataclass
from typing import Any

from fathom.report.axis import Axis
from fathom.report.bars import Bars, Share
from fathom.report.chart import Chart, Series
from fathom.report.measurements import Measurements

EVALUATIONS = 12
"""Columns that the table by level has at most."""


@dataclass(frozen=True)
class Figure:
    """A picture and the sentence under its title."""

    chart: Chart | Bars
    says: str


@dataclass(frozen=True)
class Levels:
    """pass@1 by level of difficulty."""

    steps: tuple[int, ...]
    rows: tuple[tuple[str, tuple[float | None, ...]], ...]
    """A level, and its value at each of the steps."""


def headline(measured: Measurements, verb: str) -> Figure | None:
    """What a person looks at first of a run that `verb` made; None where there is nothing to see yet."""
    return _thought_and_accuracy(measured) if verb == "rl" else _losses(measured, verb)


def figures(measured: Measurements, verb: str) -> list[Figure]:
    """All other charts that the run has numbers for."""
    found = {"rl": _of_rewards, "sft": _of_conversations}.get(verb, _of_pretraining)(measured)
    return [figure for figure in found if figure is not None]


def funnel(counts: dict[str, Any]) -> Figure | None:
    """What became of the candidates of a data factory; None where none was drawn."""
    total = counts["total"]
    if not total["drawn"]:
        return None
    rows = tuple(
        (f"{total[name]:,} {name}", (Share(total[name] / total["drawn"]),)) for name in ("drawn", "right", "kept")
    )
    says = "Candidates that a rule proved right, and of these the ones that passed all filters."
    return Figure(Bars("funnel", "From candidates to rows", rows), says)


def levels(measured: Measurements) -> Levels | None:
    """The table by level; None for a task with one level, or before the first evaluation."""
    found = sorted(measured.latest("pass@1/level_"), key=lambda level: (len(level), level))
    if not found:
        return None
    lines = measured.evaluations
    last, columns = len(lines) - 1, min(len(lines), EVALUATIONS)
    shown = [lines[round(column * last / max(1, columns - 1))] for column in range(columns)]
    points = {level: dict(measured.line("eval", f"pass@1/level_{level}", level).points) for level in found}
    rows = tuple((level, tuple(points[level].get(line["step"]) for line in shown)) for level in found)
    return Levels(tuple(line["step"] for line in shown), rows)


def budgets(measured: Measurements) -> Figure | None:
    """pass@1 with thoughts cut short; None where it was not measured."""
    cut = {key: value for key, value in measured.latest("pass@1/budget_").items() if re.fullmatch(r"\d{1,9}", key)}
    points = tuple(sorted((int(tokens), value) for tokens, value in cut.items()))
    if not points:
        return None
    whole = measured.line("eval", "pass@1", "not cut").known
    chart = Chart(
        "budget",
        "Thoughts cut short",
        (Series("thought cut", points, marked=True),),
        Axis("pass@1", percent=True, least=0, most=1),
        along="tokens of thought at most",
        level=("not cut", whole[-1][1]) if whole else None,
    )
    return Figure(chart, "Held-out problems, with the thought ended after so many tokens: does it carry the answer?")


def probe(measured: Measurements) -> Figure | None:
    """The model before its first step, made to think and made to guess; None where it was not measured."""
    found = measured.latest("probe_")
    if not {"thinking", "guessing"} <= found.keys():
        return None
    first = measured.line("eval", "pass@1", "").known[:1]
    shares = [("made to think", found["thinking"]), ("made to guess", found["guessing"])]
    shares += [("left to itself", value) for _, value in first]
    bars = Bars("probe", "Before the first step", tuple((name, (Share(value),)) for name, value in shares))
    says = (
        "Right answers of the model as it was, made to think and made to guess. Without a gap there is no reason to "
        "learn to think."
    )
    return Figure(bars, says)


def _thought_and_accuracy(measured: Measurements) -> Figure | None:
    kind, where = ("eval", "held-out problems") if measured.evaluations else ("train", "the problems it learns from")
    accuracy = measured.line(kind, "pass@1" if kind == "eval" else "accuracy", "pass@1")
    thought = measured.line(kind, "thought_tokens", "length of thought", second=True)
    return _figure(
        "thought-and-accuracy",
        "Accuracy and length of thought",
        f"Share of {where} that one sample solves, and tokens between the think tags of those samples.",
        (accuracy, thought),
        Axis("pass@1", percent=True, least=0, most=1),
        Axis("tokens of thought", least=0),
    )


def _losses(measured: Measurements, verb: str) -> Figure | None:
    return _figure(
        "loss",
        "Loss",
        "Mean cross-entropy of the next token, on the batches that are learnt from and on held-out "
        f"{'answers' if verb == 'sft' else 'text'}.",
        (
            measured.line("train", "loss", "training"),
            measured.line("eval", "loss", "held out"),
            measured.line("eval", "ema_loss", "held out, averaged weights"),
        ),
        Axis("nats per token"),
    )


def _of_pretraining(measured: Measurements) -> list[Figure | None]:
    line = measured.line
    return [
        _figure(
            "bits-per-byte",
            "Bits per byte",
            "The loss without the tokenizer's share in it: comparable between vocabularies.",
            (line("train", "bits_per_byte", "training"), line("eval", "bits_per_byte", "held out")),
            Axis("bits per byte"),
        ),
        _figure(
            "mtp-acceptance",
            "Drafts accepted",
            "Share of the tokens drafted by the multi-token-prediction module that the model itself would write.",
            (line("eval", "mtp_acceptance", "accepted"),),
            Axis("accepted", percent=True, least=0, most=1),
        ),
        _figure(
            "max-vio",
            "Expert load: MaxVio",
            "How far the busiest expert is above an even share of the tokens; 0 is even.",
            (line("train", "max_vio", "training"), line("eval", "max_vio", "held out")),
            Axis("excess over the mean load", least=0),
        ),
        _speed(measured),
        _learning_rate(measured),
        _gradient(measured),
    ]


def _of_conversations(measured: Measurements) -> list[Figure | None]:
    return [
        _figure(
            "entropy",
            "Entropy",
            "How undecided the model is about the tokens that it learns to say.",
            (measured.line("train", "entropy", "entropy"),),
            Axis("nats per token", least=0),
        ),
        _speed(measured),
        _learning_rate(measured),
        _gradient(measured),
    ]


def _of_rewards(measured: Measurements) -> list[Figure | None]:
    line = measured.line
    return [
        _figure(
            "right-answers",
            "Right answers",
            "On held-out problems, and on the problems of each step while they are learnt from.",
            (line("eval", "pass@1", "held out"), line("train", "accuracy", "training")),
            Axis("pass@1", percent=True, least=0, most=1),
        ),
        _figure(
            "reward",
            "Reward and its parts",
            "Means over a step's completions. Parts are shown before their weights, which may be 0.",
            tuple(line("train", key, key) for key in ("reward", "accuracy", "format", "language", "overlong")),
            Axis("mean of a step"),
        ),
        _figure(
            "lengths",
            "Length",
            "Tokens of a completion, and of the thought in it, on the problems of each step.",
            (line("train", "completion_tokens", "completion"), line("train", "thought_tokens", "thought")),
            Axis("tokens", least=0),
        ),
        _figure(
            "teacher",
            "Away from the teacher",
            "Mean of log p(student) − log p(teacher) over the student's own tokens: an estimate of the reverse KL.",
            (line("train", "teacher_kl", "reverse KL"),),
            Axis("nats per token"),
        ),
        _figure(
            "entropy",
            "Entropy",
            "How undecided the policy is about the tokens it draws; near 0 it has stopped to explore.",
            (line("train", "entropy", "entropy"),),
            Axis("nats per token", least=0),
        ),
        _figure(
            "clipped",
            "Clipped tokens",
            "Share of tokens whose ratio left the clip range. With one mini-batch per step there are none.",
            (line("train", "clip_low", "below"), line("train", "clip_high", "above")),
            Axis("share of tokens", percent=True, least=0),
        ),
        _figure(
            "sampler-gap",
            "Engine against trainer",
            "How far the engine's log-probabilities are from the trainer's: two programs for one model.",
            (line("train", "kl_sampler", "mean KL per token"), line("train", "sampler_gap_max", "largest gap")),
            Axis("nats, powers of ten", log=True),
        ),
        _figure(
            "uninformative",
            "Nothing to learn from",
            "Completions cut off at the longest length, and groups whose rewards are all equal.",
            (line("train", "truncated", "cut off"), line("train", "uninformative", "groups of equal rewards")),
            Axis("share", percent=True, least=0, most=1),
        ),
        _figure(
            "reflections",
            "Reflection",
            "How often a thought has one of the words that the recipe counts (eval.reflections).",
            (line("train", "reflections", "training"), line("eval", "reflections", "held out")),
            Axis("words per thought", least=0),
        ),
        _figure("level", "Hardest level", "That problems are drawn from.", _changing(line("train", "level", "level")),
                Axis("level", least=0)),
        _figure(
            "faults",
            "Failed checks",
            "Checks that raised, took too long or were no number; such an answer counts as wrong.",
            _changing(line("train", "faults", "faults")),
            Axis("faults per step", least=0),
        ),
        _figure(
            "seconds",
            "Time of a step",
            "Drawing completions, and learning from them.",
            (line("train", "rollout_seconds", "rollout"), line("train", "update_seconds", "update")),
            Axis("seconds", least=0),
        ),
        _gradient(measured),
    ]  # fmt: skip


def _speed(measured: Measurements) -> Figure | None:
    line = measured.line("train", "tokens_per_second", "speed")
    says = "Tokens learnt from in a second. The first steps of a session compile and warm up."
    return _figure("tokens-per-second", "Speed", says, (line,), Axis("tokens per second", least=0))


def _learning_rate(measured: Measurements) -> Figure | None:
    line = measured.line("train", "lr", "learning rate")
    return _figure("learning-rate", "Learning rate", "As the schedule says.", (line,), Axis("learning rate", least=0))


def _gradient(measured: Measurements) -> Figure | None:
    line = measured.line("train", "grad_norm", "norm")
    says = "Norm of the gradient before clipping; a gap is a step that was not finite and was skipped."
    return _figure("gradient", "Gradient", says, (line,), Axis("norm", least=0))


def _changing(series: Series) -> tuple[Series, ...]:
    """The line, or nothing where it is flat from beginning to end."""
    return (series,) if len({value for _, value in series.known}) > 1 else ()


def _figure(
    name: str, title: str, says: str, series: tuple[Series, ...], axis: Axis, second: Axis | None = None
) -> Figure | None:
    """The figure of those lines that have something to show; None where none has."""
    shown = [
        line for line in series if any((second if line.second and second else axis).holds(v) for _, v in line.known)
    ]
    lefts = [line for line in shown if not line.second]
    if not lefts:
        return None
    if len(lefts) == len(shown):
        second = None
    return Figure(Chart(name, title, tuple(shown), axis, second), says)
