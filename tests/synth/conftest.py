"""Two runs of the data factory that tests look at: of a model, and of solutions by rule."""

from pathlib import Path

import pytest

from fathom.config.synth import SynthRecipe
from fathom.synth.factory import SynthResult
from tests.synth.runs import RULES, run
from tests.train.tiny import save_talker


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny V3 with random weights, its byte tokenizer, and a file of tasks."""
    folder = tmp_path_factory.mktemp("synth")
    save_talker(folder / "model")
    (folder / "rules.py").write_text(RULES)
    return folder


@pytest.fixture(scope="session")
def drawn_recipe(start: Path) -> SynthRecipe:
    """Twenty-four problems, six candidates each of a random model, whose length's parity is right or wrong."""
    return SynthRecipe(
        name="drawn",
        model=str(start / "model"),
        tasks=({"name": f"{start / 'rules.py'}:Odd", "levels": 2},),
        problems=24,
        prompt={"style": "template"},
        layout={"form": "rest", "thoughts": "optional"},
        draw={"samples": 6, "max_tokens": 6, "batch": 6, "repair_rounds": 2, "repair_text": "no {answer}"},
        filters={"layout": False, "finished": False, "language": 0.0},
        decontamination={"held_out": 4},
    )


@pytest.fixture(scope="session")
def worked_recipe(start: Path) -> SynthRecipe:
    """Solutions of two tasks by rule, some wrong, some repetitive, some of held-out sums."""
    return SynthRecipe(
        name="worked",
        source="worked",
        tasks=({"name": f"{start / 'rules.py'}:Sloppy"}, {"name": "bilingual", "levels": 2, "share": 0.25}),
        problems=100,
        draw={"samples": 2},
    )


@pytest.fixture(scope="session")
def drawn(drawn_recipe: SynthRecipe, tmp_path_factory: pytest.TempPathFactory) -> SynthResult:
    """The run of a model, unbroken. Whoever changes something in it works on a copy."""
    return run(drawn_recipe, tmp_path_factory.mktemp("runs"))[0]


@pytest.fixture(scope="session")
def worked(worked_recipe: SynthRecipe, tmp_path_factory: pytest.TempPathFactory) -> SynthResult:
    """The run of worked solutions, unbroken."""
    return run(worked_recipe, tmp_path_factory.mktemp("runs"))[0]
