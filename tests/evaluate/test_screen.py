"""What a person sees: numbers, what must be known of them, and how far it is."""

import io
import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from rich.console import Console

from fathom.evaluate import screen
from fathom.evaluate.evaluate import Progress, evaluate
from fathom.evaluate.figures import HEIGHT, draw_evaluation
from fathom.evaluate.results import Evaluation
from fathom.evaluate.screen import ProgressView, notes, show
from fathom.evaluate.statistics import Estimate
from tests.evaluate.scripted import MODULAR, Scripted


@pytest.fixture(scope="module")
def found() -> Evaluation:
    """Right answers to level 1, and to level 2 with thoughts free."""
    answers = Scripted(lambda p, n, budget: p.answer if p.level == 1 or (budget is None and n) else "no")
    return evaluate(answers, MODULAR.replace(budgets=(0, 9)), model="m")


def _plain(file: io.StringIO) -> Console:
    return Console(file=file, width=100, highlight=False, markup=False, emoji=False)


def test_names_in_brackets_are_shown(found: Evaluation) -> None:
    """A task's file may be called what a terminal's mark-up is."""
    file, name = io.StringIO(), "[bold]mine.py:Sums"
    renamed = tuple(replace(one, task=name) for one in found.measurements)
    show(replace(found, settings=found.settings.replace(tasks=(name,)), measurements=renamed), _plain(file))
    assert f"{name}: 8 held-out problems × 4 samples" in file.getvalue()
    assert "87.5 %" in file.getvalue()


def test_language_is_told_where_it_was_not_kept(found: Evaluation) -> None:
    """A share below 1 has its line; where all words were in the language, or there was none, there is no line."""
    for share, told in ((0.875, True), (1.0, False), (None, False)):
        file = io.StringIO()
        measurements = tuple(replace(one, language=share) for one in found.measurements)
        show(replace(found, measurements=measurements), _plain(file))
        assert ("language kept" in file.getvalue()) is told
        assert ("87.5 % of the words of a thought" in file.getvalue()) is told


def test_unread_answers_of_cut_thoughts_have_a_column(found: Evaluation) -> None:
    """A low share at a budget may be a layout that found nothing, and no lack of thought. 80 letters hold a row."""
    sure = Estimate(1.0, 0.971, 1.0)
    cut = tuple(
        one if one.budget is None else replace(one, unread=0.375, pass_at={1: sure}) for one in found.measurements
    )
    file = io.StringIO()
    show(replace(found, measurements=cut), Console(file=file, width=80))
    heading, first, second = file.getvalue().partition("thought at most")[2].splitlines()[:3]
    assert heading.rstrip().endswith("no answer")
    for budget, row in (("0", first), ("9", second)):
        assert row.split() == [budget, "100.0", "%", "(97.1–100.0)", "4", "10", "37.5", "%"]


def test_what_must_be_known_is_said(found: Evaluation) -> None:
    """Failed checks, problems left out or missing, and a layout that finds no answers; nothing where all is well."""
    assert notes(found) == []
    trouble = replace(
        found.measurements[0], problems=5, left_out=2, left_out_for="too long", faults=3, fault="its check raised",
        unread=0.75, unread_for="no box",
    )  # fmt: skip
    told = notes(replace(found, measurements=(trouble,)))
    assert [re.search(r"8 were wanted|no box|raised|too long", line)[0] for line in told] == [
        "8 were wanted",
        "no box",
        "raised",
        "too long",
    ]
    cut = tuple(
        replace(found.measurements[0], budget=budget, unread=unread)
        for budget, unread in ((0, 0.99), (8, 0.75), (64, 0.0))
    )
    (line,) = notes(replace(found, measurements=(found.measurements[0], *cut)))
    assert line.endswith("and count as wrong: 0 (99.0 %), 8 (75.0 %)")


def test_without_a_terminal_there_is_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the time left, by the problems that are done; not for every problem."""
    clock = iter([0.0, 2.0, 11.0, 12.0])
    monkeypatch.setattr(screen.time, "monotonic", lambda: next(clock))
    file = io.StringIO()
    view = ProgressView(_plain(file))
    monkeypatch.setattr(view, "_bar", type("Quiet", (), {"update": lambda *_, **__: None})())
    for done in (1, 4, 5):
        view.tell(Progress("modular", 16, done, 12))
    assert file.getvalue() == "modular, 16 tokens of thought: 4 of 12 problems, 22 s left\n"


def test_titles_of_charts_end_inside_the_picture(found: Evaluation) -> None:
    """A task without its options, where that tells it apart, and never more than there is room for."""
    for name, said in (("modular?levels=2&more=yes", "modular: by level"), ("p" * 300 + ".jsonl", "…")):
        renamed = tuple(replace(one, task=name) for one in found.measurements)
        settings = found.settings.replace(tasks=(name,))
        svg = ElementTree.fromstring(draw_evaluation(replace(found, settings=settings, measurements=renamed)))
        titles = [text.text for text in svg.iter() if text.get("class") == "title"]
        assert len(titles) == 3
        assert titles[2].endswith(said)
        assert all(len(title) < 80 for title in titles)


def test_charts_show_values_and_intervals(found: Evaluation) -> None:
    """Three charts under one another; in the first, each stroke of an interval holds its point."""
    svg = ElementTree.fromstring(draw_evaluation(found))
    charts = [child for child in svg if child.tag.endswith("svg")]
    assert [chart.get("y") for chart in charts] == ["0", str(HEIGHT), str(2 * HEIGHT)]
    strokes = [path.get("d") for path in charts[0].iter() if path.get("class") == "interval s1"]
    dots = [(dot.get("cx"), float(dot.get("cy"))) for dot in charts[0].iter() if dot.get("class") == "dot s1"]
    assert len(strokes) == len(dots) == 2
    for stroke, (x, y) in zip(strokes, dots, strict=True):
        place, low, high = re.fullmatch(r"M(\S+),(\S+)V(\S+)", stroke).groups()
        assert place == x
        assert float(high) < y < float(low)
