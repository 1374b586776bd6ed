"""What the guide to the data factory shows is as it says."""

import json
import re
import tomllib
from pathlib import Path

from fathom.config.rewards import Layout
from fathom.config.synth import FilterSection, SynthRecipe
from fathom.synth.candidates import Candidate
from fathom.synth.counts import REASONS
from fathom.synth.rows import answer_in, make_row
from fathom.tasks.task import Problem

GUIDE = (Path(__file__).parents[2] / "docs/guides/synth.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The code blocks of the guide in this language."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", GUIDE, re.DOTALL | re.MULTILINE)
    return [text for name, text in found if name == language]


def test_recipe_and_rewriting_of_the_guide_are_taken() -> None:
    """The recipe that is shown parses, and the rewriting shown makes rows in which the answer is found."""
    recipe, rewriting = map(tomllib.loads, blocks("toml"))
    parsed = SynthRecipe.parse({**recipe, **rewriting}, where="guide")
    candidate = Candidate("<think>3+8=1;1*7=7</think>7", seed=123, tokens=15, score=1.0)
    layout = Layout(form="rest")
    problem = Problem("3+8*7=", "7", 2)
    reading = candidate.reading(layout, starts_thinking=False)
    names = {"task": "modular", "source": "model:runs/zero-arithmetic", "instruction": ""}
    row = make_row(problem, candidate, reading, rewrite=parsed.rewrite, **names)
    assert row["messages"][1]["content"] == "The answer is \\boxed{7}."
    assert answer_in(row, parsed.rewrite) == "7"
    shown = json.loads(next(block for block in blocks("") if block.startswith('{"messages"')))
    assert make_row(problem, candidate, reading, rewrite=SynthRecipe.parse(recipe, where="").rewrite, **names) == shown


def test_table_of_filters_names_all() -> None:
    """Every reason to drop but a failure to draw has its line, and the fields named are the recipe's."""
    table = GUIDE.partition("| dropped as |")[2].partition("\n\n")[0]
    assert all(reason in table for reason in REASONS if reason != "not drawn")
    assert all(f"`{name}" in table for name in FilterSection.model_fields if name != "choice")
