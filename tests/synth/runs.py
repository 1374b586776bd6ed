"""Runs of the data factory in tests, a file of tasks for them, and what they write."""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet
from rich.console import Console

from fathom.config.synth import SynthRecipe
from fathom.synth.factory import SynthResult, synthesize

RULES = '''
from fathom.tasks import Problem, Task


class Odd(Task):
    """Answers of an odd number of bytes are right."""

    levels = 2

    def problem(self, random, level):
        return Problem(f"{random.randrange(10**6)}:{level}", "1", level=level)

    def check(self, problem, answer):
        return float(len(answer.encode()) % 2)


class Never(Odd):
    def check(self, problem, answer):
        return 0.0


class Sloppy(Task):
    """Sums whose questions are spelt in several ways; some solutions are wrong, and some go round in circles."""

    def problem(self, random, level):
        a, b = random.randrange(30), random.randrange(30)
        said = random.choice(("What is {} + {}?", "what is  {}+{}", "WHAT IS {} +{} ?"))
        wrong = a % 5 == 0
        return Problem(said.format(a, b), str(a + b + wrong), level, data={"sum": a + b})

    def check(self, problem, answer):
        return float(answer.strip() == str(problem.data["sum"]))

    def solution(self, problem, random):
        return "so we add them up once more " * (40 if problem.data["sum"] % 7 == 0 else 1) + str(problem.data["sum"])


class Halved(Sloppy):
    def solution(self, problem, random):
        return "half a smile \\ud83d"


class HalfAsked(Sloppy):
    def problem(self, random, level):
        return Problem("half a smile \\ud83d", "1")
'''


def run(recipe: SynthRecipe, runs: Path, **options: Any) -> tuple[SynthResult, str]:
    said = io.StringIO()
    result = synthesize(recipe, runs=runs, console=Console(file=said, width=300), **options)
    return result, said.getvalue()


def rows_of(result: SynthResult) -> list[dict[str, Any]]:
    assert result.traces is not None
    if result.traces.suffix == ".parquet":
        return pyarrow.parquet.read_table(result.traces).to_pylist()
    return [json.loads(line) for line in result.traces.read_text(encoding="utf-8").split("\n")[:-1]]


def counts_of(result: SynthResult) -> dict[str, Any]:
    return json.loads((result.folder / "synth.json").read_text(encoding="utf-8"))
