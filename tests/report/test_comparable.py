"""What stands side by side on a pipeline's page was asked the same; what was not is said to be something else."""

from pathlib import Path
from typing import Any

import pytest

from fathom.report.page import write_report
from fathom.report.stages import Story
from tests.evaluate.scripted import MODULAR
from tests.report import house
from tests.report.outline import table_of


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """All stages made."""
    return house.build(tmp_path / "house")


def _page(folder: Path) -> str:
    return write_report(folder).read_text(encoding="utf-8")


@pytest.mark.parametrize("change", [{"levels": 1}, {"problems": 4}, {"seed": 5}])
def test_stages_that_were_asked_other_problems_are_not_compared(whole: Path, change: dict[str, Any]) -> None:
    """Other levels, another number or another seed: a star and a sentence, no bar and no line; the rest stands."""
    settings = MODULAR.replace(budgets=(0, 5))
    found = house.states(whole)
    found["taught"]["evaluation"] = house.evaluation(3, settings)
    house.write_states(whole, found)
    page = _page(whole)
    assert "the same problems after every stage" in page
    assert "Asked other problems" not in page
    found["best"]["evaluation"] = house.evaluation(3, settings.replace(samples=8, **change))
    house.write_states(whole, found)
    page = _page(whole)
    assert "best" not in " ".join(table_of(page, "More samples: modular")[0])
    assert "the same problems after every stage" not in page
    assert "not to be compared with them, and in no figure: best on modular." in page
    for caption, column in (("Stages", 2), ("Ways to teach given", 3)):
        rows = {row[0]: row[column] for row in table_of(page, caption)[1:]}
        assert {name for name, share in rows.items() if share.endswith("*")} == {"best"}
    assert table_of(page, "More thought: modular")[0][1:] == ["taught"]
    for picture in ("stages", "distillation"):
        drawn = write_report(whole, whole / "x.svg", figure=picture).read_text()
        assert ">taught</text>" in drawn
        assert ">best</text>" not in drawn


def test_of_equally_many_the_later_stages_are_compared(whole: Path) -> None:
    """Where one half was asked other problems than the other half."""
    found = house.states(whole)
    for name in ("given", "judged", "alone"):
        found.pop(name)
    found["ground"]["evaluation"] = house.evaluation(1, MODULAR.replace(problems=4))
    found["first-floor"]["evaluation"] = house.evaluation(1, MODULAR.replace(problems=4))
    house.write_states(whole, found)
    assert [stage.name for stage in Story.read(whole).comparable("modular")] == ["best", "taught"]
    assert "<dt>measured with held-out problems</dt><dd><bdi>8 of modular</bdi></dd>" in _page(whole)


def test_answers_that_were_drawn_otherwise_are_said_to_be(whole: Path) -> None:
    """The same problems with more samples can be compared, and the page says what was different."""
    assert "drawn otherwise" not in _page(whole)
    found = house.states(whole)
    found["best"]["evaluation"] = house.evaluation(3, MODULAR.replace(samples=8, temperature=1.0))
    house.write_states(whole, found)
    page = _page(whole)
    assert "the same problems after every stage" in page
    assert (
        "Answers drawn otherwise: best with samples = 8, where most have 4; "
        "best with temperature = 1, where most have 0.6."
    ) in page


def test_what_was_measured_is_told_and_not_what_the_file_asks_for_now(whole: Path) -> None:
    """The pipeline's file asks for 128 problems, as few as there were were asked."""
    assert "<dt>measured with held-out problems</dt><dd><bdi>8 of modular</bdi></dd>" in _page(whole)
