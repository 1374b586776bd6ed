"""The page on one run."""

import re
from collections.abc import Iterator
from pathlib import Path

from fathom.errors import UserError
from fathom.report.axis import plain
from fathom.report.bars import Share
from fathom.report.cost import duration
from fathom.report.dialogues import correction_of, dialogues
from fathom.report.document import render, share
from fathom.report.figures import Figure, budgets, figures, funnel, headline, levels, probe
from fathom.report.measurements import number
from fathom.report.recipe_table import recipe_fields, written
from fathom.report.run_data import Run
from fathom.report.stage_figures import thinking_curves
from fathom.report.stages import Story
from fathom.report.synthesis import synthesis
from fathom.report.tables import plural

SAMPLES = 6
"""Of the last samples."""
_HEADING = re.compile(r"^## Step (\d+)$", re.MULTILINE)
_NAMES = {
    "loss": "loss, nats per token",
    "bits_per_byte": "bits per byte",
    "max_vio": "MaxVio",
    "mtp_loss": "loss of the MTP module",
    "mtp_acceptance": "drafts accepted",
    "ema_loss": "loss of the averaged weights",
    "completion_tokens": "tokens of a completion",
    "thought_tokens": "tokens of thought",
    "truncated": "cut off",
    "reflections": "reflective words per thought",
    "faults": "failed checks",
    "seconds": "seconds to evaluate",
}
_SHARES = ("pass@1", "accuracy", "truncated", "mtp_acceptance")
_ELSEWHERE = ("pass@1/", "probe_")
"""What an evaluation holds that has a figure of its own."""
_KINDS = {
    "pretrain": "pre-training",
    "sft": "fine-tuning on conversations",
    "rl": "reinforcement learning, rewards by rule",
    "synth": "synthesis of verified data",
}


def run_page(run: Run) -> str:
    """The text of the page."""
    main, *others = [*_of_training(run)] or [None]
    story = None if run.evaluation is None else Story.of_one(run, run.evaluation)
    return render(
        "run.html.jinja",
        name=str(run.recipe.get("name", run.folder.path.name)),
        verb=run.verb,
        facts=list(_facts(run)),
        fields=recipe_fields(run.recipe, run.kind),
        evaluation=_evaluation_table(run),
        stride=run.measured.stride,
        headline=main,
        figures=others,
        levels=levels(run.measured),
        synthesis=None if run.counts is None else synthesis(run.counts),
        correction=None if run.correction is None else correction_of(run.correction),
        samples=_samples(run.folder.samples),
        examination=_examination(run),
        broken_off="" if run.evaluation is None else run.evaluation.get("stopped", ""),
        curves=list(thinking_curves(story)) if story else [],
        dialogues=dialogues(story) if story else [],
    )


def run_figures(run: Run) -> dict[str, Figure]:
    """All figures of a run by their names, the main one first."""
    found = _of_training(run)
    if run.evaluation is not None:
        found += thinking_curves(Story.of_one(run, run.evaluation))
    return {figure.chart.name: figure for figure in found}


def _of_training(run: Run) -> list[Figure]:
    """The main one first."""
    if run.verb == "synth":
        found = [] if run.counts is None else [funnel(run.counts)]
    else:
        found = [headline(run.measured, run.verb), probe(run.measured), *figures(run.measured, run.verb)]
        found.append(budgets(run.measured))
    return [figure for figure in found if figure is not None]


def _examination(run: Run) -> list[list[str]]:
    """Heading, then a row for each measurement of its evaluation. Empty without one."""
    if run.evaluation is None:
        return []
    rows = [
        ["task", "tokens of thought at most", "problems × samples", "pass@1", "majority right", "tokens of thought",
         "no answer found"]
    ]  # fmt: skip
    for found in run.evaluation["measurements"]:
        most = max(found["cons@k"], key=int)
        thought = found["thought_tokens"]
        rows.append(
            [
                found["task"],
                "as many as it takes" if found["budget"] is None else f"{found['budget']:,}",
                f"{found['problems']:,} × {found['samples']:,}",
                Share.of(found["pass@k"]["1"]).write(),
                f"{Share.of(found['cons@k'][most]).write()}, of {most}",
                "" if thought is None else plain(thought["mean"]),
                share(found.get("unread")),
            ]
        )
    return rows


def _facts(run: Run) -> Iterator[tuple[str, str]]:
    """What a person wants to know first: a name and a value each."""
    measured = run.measured
    yield "kind of run", _KINDS[run.verb]
    if run.verb != "pretrain":
        yield "teacher" if run.verb == "synth" else "begins with", str(run.field("model") or "worked out by rule")
    if run.verb == "rl":
        yield "task", str(run.field("task", "name") or "?")
    elif run.verb == "sft":
        yield "learns from", written(run.field("data", "files"))
    elif run.verb == "synth":
        tasks = run.field("tasks")
        names = (
            [task.get("name") if isinstance(task, dict) else task for task in tasks]
            if isinstance(tasks, list)
            else tasks
        )
        yield "tasks", written(names)
        return
    else:
        yield "learns from", str(run.field("data", "path") or "?")
    yield "steps", f"{measured.step:,}" if run.steps is None else f"{measured.step:,} of {run.steps:,}"
    skipped = sum(bool(line.get("skipped")) for line in measured.train)
    if skipped:
        yield "skipped, not finite", plural(skipped, "step")
    spent = sum(measured.total("train", key) for key in ("seconds", "rollout_seconds", "update_seconds"))
    if spent:
        yield "time in steps", duration(spent)
    if measured.evaluations and (evaluating := measured.total("eval", "seconds")):
        yield "time in evaluations", duration(evaluating)
    if measured.train and (tokens := number(measured.train[-1].get("tokens"))):
        yield "tokens learnt from", f"{tokens:,.0f}"


def _evaluation_table(run: Run) -> list[list[str]]:
    """Heading, then a row per value: name, at the first, the best, the last evaluation. Empty without evaluations."""
    lines = run.measured.evaluations
    if not lines:
        return []
    key, sign = ("pass@1", 1) if run.verb == "rl" else ("loss", -1)
    scored = [(sign * value, line) for line in lines if (value := number(line.get(key))) is not None]
    best = max(scored, key=lambda pair: pair[0])[1] if scored else lines[-1]
    columns = [("first", lines[0]), (f"best by {key}", best), ("last", lines[-1])]
    rows = [["held out", *(f"{name}, step\N{NO-BREAK SPACE}{line['step']:,}" for name, line in columns)]]
    for name in dict.fromkeys(name for _, line in columns for name in line):
        if name in ("kind", "step") or name.startswith(_ELSEWHERE):
            continue
        write = share if name in _SHARES else plain
        values = [number(line.get(name)) for _, line in columns]
        rows.append([_NAMES.get(name, name), *("–" if value is None else write(value) for value in values)])
    return rows


def _samples(file: Path) -> list[tuple[str, str]]:
    """Step and text of the last samples, oldest first. Raises `UserError`."""
    if not file.exists():
        return []
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from None
    _, *parts = _HEADING.split(text)
    sections = list(zip(parts[::2], parts[1::2], strict=True))[-SAMPLES:]
    return [(step, _unindented(text.strip("\n"))) for step, text in sections]


def _unindented(text: str) -> str:
    """Without the margin of the log, unless parts are named in it: there the margin tells those from what is shown."""
    lines = text.split("\n")
    named = any(line and not line.startswith("    ") for line in lines)
    return text if named else "\n".join(line.removeprefix("    ") for line in lines)
