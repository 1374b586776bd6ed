"""What the rule's filter is worth: the same base fine-tuned on samples of its own, filtered and not.

    python -m benchmarks.filter_worth [--base runs/quickstart/base] [--problems 2000] [--seeds 1 2 3]

The base (`make quickstart`), made to think, writes one solution to each of some training problems; it is right in about
two of three. From these come three files of equally many rows: all that have an answer, those that a rule proves right,
and those of them whose thought keeps to the language of the problem as well. Each teaches the same base with
`recipes/sft-arithmetic.toml`, and held-out problems say what was learnt. Runs are in `runs/filter-worth-SEED`. The last
line is JSON; `ratio` is pass@1 of proven rows over that of all.
"""

import argparse
import json
import random
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console

from fathom.config import read_recipe
from fathom.config.evaluation import EvaluationSettings
from fathom.config.pipeline import Pipeline, StageSection
from fathom.config.rewards import Layout
from fathom.config.rl import PromptSection
from fathom.config.synth import RewriteSection, SynthRecipe
from fathom.evaluate.evaluate import held_out
from fathom.pipeline.run import run_pipeline
from fathom.synth.candidates import DrawnFile
from fathom.synth.decontamination import HeldOut
from fathom.synth.factory import synthesize
from fathom.synth.plan import open_tasks, plan_problems
from fathom.synth.rows import make_row
from fathom.tasks import language

QUIET = Console(quiet=True)
TASKS = ({"name": "modular?levels=8", "levels": 8}, {"name": "bilingual?levels=3&numbers=small", "levels": 3})
KINDS = ("unfiltered", "right", "right-and-consistent")
CONSISTENT = 0.9
MEASURED = EvaluationSettings(
    tasks=tuple(task["name"] for task in TASKS),
    problems=256,
    samples=4,
    temperature=1.0,
    top_p=1.0,
    max_tokens=128,
    prompt=PromptSection(style="chat", opens_thought=True),
    layout=Layout(form="rest", thoughts="optional"),
)


def draw(base: str, problems: int, seed: int) -> dict[str, list[dict[str, Any]]]:
    """Rows of each kind, as many of one as of another."""
    recipe = read_recipe(
        Path("recipes/synth-arithmetic.toml"),
        ["--name", f"filter-worth-{seed}-drawn", "--seed", str(seed), "--model", base, "--problems", str(problems)],
        SynthRecipe,
    ).replace(
        tasks=TASKS,
        prompt={"style": "template", "template": "{question}", "opens_thought": True},
        layout={"form": "rest", "thoughts": "optional"},
    )
    recipe = recipe.replace(draw={**recipe.draw.model_dump(), "samples": 1})
    folder = synthesize(recipe, overwrite=True, console=QUIET).folder
    assert recipe.layout is not None
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    questions = [problem.question for problems in held_out(MEASURED).values() for problem in problems]
    near = HeldOut(questions, recipe.decontamination.overlap)
    planned = plan_problems(recipe, open_tasks(recipe), lambda _: None)
    for (task, problem), solved in zip(planned, DrawnFile(folder / "drawn.jsonl"), strict=True):
        (candidate,) = solved.candidates
        reading = candidate.reading(recipe.layout, starts_thinking=True)
        if not candidate.finished or reading.answer is None or near.has(problem.question):
            continue
        how = {"task": task, "source": base, "instruction": "", "rewrite": RewriteSection()}
        row = make_row(problem, candidate, reading, **how)
        share = language.share(reading.thought, problem.language)
        kinds = (True, candidate.right, candidate.right and (share is None or share >= CONSISTENT))
        for kind, belongs in zip(KINDS, kinds, strict=True):
            if belongs:
                found[kind].append(row)
    fewest = min(map(len, found.values()))
    return {kind: random.Random(seed).sample(rows, fewest) for kind, rows in found.items()}


def run(base: str, problems: int, seed: int) -> dict[str, Any]:
    """pass@1 of both tasks and language kept to, by what was learnt from."""
    rows = draw(base, problems, seed)
    files = {kind: Path("runs") / f"filter-worth-{seed}-drawn" / f"{kind}.jsonl" for kind in KINDS}
    for kind, file in files.items():
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows[kind]), encoding="utf-8")
    stages = [
        StageSection(
            name=kind,
            verb="sft",
            recipe="sft-arithmetic.toml",
            set={"model": base, "data": {"files": [str(file)]}, "train": {"epochs": 3.0}},
        )
        for kind, file in files.items()
    ]
    pipeline = Pipeline(
        name=f"filter-worth-{seed}",
        seed=seed,
        evaluation=MEASURED,
        stages=tuple(stages),
    )
    found = run_pipeline(pipeline, Path("recipes"), console=QUIET, redo=True)
    right = sum(row["score"] >= 1 for row in rows["unfiltered"]) / len(rows["unfiltered"])
    values: dict[str, Any] = {"rows": len(rows["right"]), "right of the unfiltered": right}
    for kind in KINDS:
        measured = found.stages[kind].evaluation["measurements"]
        values[kind] = {one["task"]: one["pass@k"]["1"]["value"] for one in measured}
        values[kind]["pass@1"] = statistics.mean(values[kind].values())
        values[kind]["language"] = measured[1]["language"]
    return values


def main() -> None:
    """Run all, print a table, and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", default="runs/quickstart/base")
    parser.add_argument("--problems", type=int, default=2000)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    options = parser.parse_args()
    found = {seed: run(options.base, options.problems, seed) for seed in options.seeds}
    for seed, values in found.items():
        share = values["right of the unfiltered"]
        print(f"seed {seed}: {values['rows']} rows each, of the unfiltered {share:.3f} right")
    columns = list(found[options.seeds[0]][KINDS[0]])
    means = {}
    print(f"{'':22}" + "".join(f"{column.partition('?')[0]:>12}" for column in columns))
    for kind in KINDS:
        means[kind] = {column: statistics.mean(values[kind][column] for values in found.values()) for column in columns}
        print(f"{kind:22}" + "".join(f"{value:12.3f}" for value in means[kind].values()))
    ratio = round(means["right"]["pass@1"] / means["unfiltered"]["pass@1"], 3)
    print(json.dumps({"benchmark": "filter_worth", "ratio": ratio, "means": means, "seeds": found}))


if __name__ == "__main__":
    main()
