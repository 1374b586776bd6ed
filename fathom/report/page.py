"""A run's report: one HTML file that needs no network and no JavaScript.

What a model has written is hostile text: the template escapes everything (Jinja's autoescape), the page's own policy
forbids scripts, and control characters are shown as the pictures Unicode has for them.
"""

import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from fathom.config import PretrainRecipe
from fathom.config.recipe import Recipe
from fathom.config.rl import RLRecipe
from fathom.errors import UserError
from fathom.report.axis import plain
from fathom.report.bars import draw_bars
from fathom.report.chart import draw, table
from fathom.report.figures import budgets, figures, headline, levels, probe
from fathom.report.measurements import Measurements, number
from fathom.report.recipe_table import recipe_fields
from fathom.report.tables import plural
from fathom.train.run import RunFolder, replace_text

SAMPLES = 6
"""Of the last samples."""
WIDE = {"width": 720, "height": 340}
"""The headline figure where there is room, and in a file of its own."""
_HEADING = re.compile(r"^## Step (\d+)$", re.MULTILINE)
_PICTURES = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421}
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


@dataclass(frozen=True)
class _Run:
    """What the folder of a run says."""

    folder: RunFolder
    recipe: dict[str, Any]
    measured: Measurements

    @classmethod
    def read(cls, path: Path) -> "_Run":
        folder = RunFolder(path)
        if not folder.recipe.is_file():
            raise UserError(f"{path}: is not a run, it has no {folder.recipe.name}; name a folder in runs/")
        try:
            recipe = tomllib.loads(folder.recipe.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{folder.recipe}: not valid TOML ({error})") from None
        return cls(folder, recipe, Measurements.of(folder.metrics))

    @property
    def learns_by_reward(self) -> bool:
        return "task" in self.recipe

    @property
    def kind(self) -> type[Recipe]:
        return RLRecipe if self.learns_by_reward else PretrainRecipe

    @property
    def steps(self) -> int | None:
        """How many the recipe asks for."""
        section = self.recipe.get("train")
        steps = section.get("steps") if isinstance(section, dict) else None
        return steps if isinstance(steps, int) else None


def write_report(path: Path, out: Path | None = None) -> Path:
    """Write the report of the run in `path`, by default as its `report.html`; returns where it is.

    An `out` that ends in `.svg` gets the headline figure alone. Raises `UserError` for what is no run, for metrics that
    cannot be read, and for a place that cannot be written.
    """
    run = _Run.read(path)
    target = path / "report.html" if out is None else out
    text = headline_svg(run) if target.suffix == ".svg" else _page(run)
    try:
        replace_text(target, text)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror or error})") from None
    return target


def headline_svg(run: _Run) -> str:
    """The headline figure as a file. Raises `UserError` where nothing has been measured."""
    figure = headline(run.measured, learns_by_reward=run.learns_by_reward)
    if figure is None:
        raise UserError(f"{run.folder.path}: has measured nothing yet that could be drawn")
    return draw(figure.chart, **WIDE, alone=True) + "\n"


def _page(run: _Run) -> str:
    here = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(here), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"share": _share, "prose": _prose}
    by_reward, measured = run.learns_by_reward, run.measured
    first = headline(measured, learns_by_reward=by_reward)
    bars = probe(measured)
    return environment.get_template("page.html.jinja").render(
        name=str(run.recipe.get("name", run.folder.path.name)),
        styles=Markup("\n".join((here / name).read_text(encoding="utf-8") for name in ("page.css", "chart.css"))),
        facts=list(_facts(run)),
        fields=recipe_fields(run.recipe, run.kind),
        evaluation=_evaluation_table(run),
        stride=measured.stride,
        headline=first,
        wide="" if first is None else Markup(draw(first.chart, **WIDE)),
        figures=[*figures(measured, learns_by_reward=by_reward), *filter(None, [budgets(measured)])],
        draw=lambda chart: Markup(draw(chart)),
        table=table,
        levels=levels(measured),
        probe=bars,
        probe_bars="" if bars is None else Markup(draw_bars(bars)),
        samples=_samples(run.folder.samples),
    )


def _facts(run: _Run) -> Iterator[tuple[str, str]]:
    """What a person wants to know first: a name and a value each."""
    measured = run.measured
    if run.learns_by_reward:
        yield "kind of run", "reinforcement learning, rewards by rule"
        yield "begins with", str(run.recipe.get("model", "?"))
        yield "task", str((run.recipe.get("task") or {}).get("name", "?"))
    else:
        yield "kind of run", "pre-training"
        yield "learns from", str((run.recipe.get("data") or {}).get("path", "?"))
    done = measured.step
    yield "steps", f"{done:,}" if run.steps is None else f"{done:,} of {run.steps:,}"
    skipped = sum(bool(line.get("skipped")) for line in measured.train)
    if skipped:
        yield "skipped, not finite", plural(skipped, "step")
    spent = sum(measured.total("train", key) for key in ("seconds", "rollout_seconds", "update_seconds"))
    if spent:
        yield "time in steps", _duration(spent)
    if measured.evaluations and (evaluating := measured.total("eval", "seconds")):
        yield "time in evaluations", _duration(evaluating)
    if measured.train and (tokens := number(measured.train[-1].get("tokens"))):
        yield "tokens learnt from", f"{tokens:,.0f}"


def _evaluation_table(run: _Run) -> list[list[str]]:
    """Heading, then a row per value: name, at the first, the best, the last evaluation. Empty without evaluations."""
    lines = run.measured.evaluations
    if not lines:
        return []
    key, sign = ("pass@1", 1) if run.learns_by_reward else ("loss", -1)
    scored = [(sign * value, line) for line in lines if (value := number(line.get(key))) is not None]
    best = max(scored, key=lambda pair: pair[0])[1] if scored else lines[-1]
    columns = [("first", lines[0]), (f"best by {key}", best), ("last", lines[-1])]
    rows = [["held out", *(f"{name}, step\N{NO-BREAK SPACE}{line['step']:,}" for name, line in columns)]]
    for name in dict.fromkeys(name for _, line in columns for name in line):
        if name in ("kind", "step") or name.startswith(_ELSEWHERE):
            continue
        write = _share if name in _SHARES else plain
        values = [number(line.get(name)) for _, line in columns]
        rows.append([_NAMES.get(name, name), *("–" if value is None else write(value) for value in values)])
    return rows


def _samples(file: Path) -> list[tuple[str, str]]:
    """Step and text of the last samples, oldest first."""
    if not file.exists():
        return []
    _, *parts = _HEADING.split(file.read_text(encoding="utf-8", errors="replace"))
    sections = list(zip(parts[::2], parts[1::2], strict=True))[-SAMPLES:]
    return [(step, _visible(_unindented(text.strip("\n")))) for step, text in sections]


def _unindented(text: str) -> str:
    """Without the margin of the log, unless parts are named in it: there the margin tells those from what is shown."""
    lines = text.split("\n")
    named = any(line and not line.startswith("    ") for line in lines)
    return text if named else "\n".join(line.removeprefix("    ") for line in lines)


def _visible(text: str) -> str:
    """Control characters as pictures of themselves."""
    return text.translate(_PICTURES)


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _prose(docstring: str) -> Markup:
    """A field's docstring; what stands in backticks is code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(docstring))))


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{seconds:.1f} s"
