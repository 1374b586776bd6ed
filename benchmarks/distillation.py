"""A student distilled, and the same student with rewards alone, for the same compute: held-out pass@1, several seeds.

    python -m benchmarks.distillation [--seeds 1 2 3] [--sft.train.epochs 3 …]

`recipes/distill-arithmetic.toml` (its teacher: `fathom rl recipes/zero-arithmetic.toml`, its student: `fathom pretrain
recipes/student-base.toml`). First the way of traces, as long as the recipe makes it. The seconds in which the teacher's
traces are drawn, checked and filtered, and those of all steps of fine-tuning on them, are what the other ways get: from
the same student they make steps until they have had as many seconds, rollouts and updates together, to within half a
step. What is measured meanwhile counts for no one. So the ways must not run beside other work. Every model is then
measured on the same held-out problems, asked as it was taught. The teacher's own training is no part of it, as in the
paper (DeepSeek-R1 §4.1, table 6).

Runs are written to `runs/distillation-SEED` and `runs/distillation-SEED-WAY`; those that are there are gone on with.
The last line is JSON; `ratio` is pass@1 distilled from traces over that by rewards alone.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console

from fathom.config import read_recipe
from fathom.config.distill import DISTILLED, ON_POLICY, REWARDS, STUDENT, TRACES, DistillRecipe
from fathom.config.pipeline import Pipeline, StageSection
from fathom.config.rl import RLRecipe
from fathom.pipeline.distill import distill, pipeline_of, resolved
from fathom.pipeline.run import PipelineResult, run_pipeline
from fathom.train.metrics import read_metrics
from fathom.train.rl import train_rl

RECIPE, RUNS = Path("recipes/distill-arithmetic.toml"), Path("runs")
COLUMNS = (STUDENT, DISTILLED, ON_POLICY, REWARDS)
QUIET = Console(quiet=True)
FIRST_STEPS = 4
SECONDS = ("seconds", "rollout_seconds", "update_seconds")
"""What a step takes, by its line of metrics: of fine-tuning the first, of reinforcement learning the others."""


def spent(run: Path) -> tuple[int, float]:
    """Steps that a run has made, and the seconds of these alone."""
    file = run / "metrics.jsonl"
    steps = [line for line in read_metrics(file) if line["kind"] == "train"] if file.exists() else []
    return len(steps), sum(line.get(name, 0.0) for line in steps for name in SECONDS)


def train_for(recipe: RLRecipe, seconds: float) -> tuple[int, float]:
    """Make as many steps as take so many seconds, and return both: a run may be gone on with for more steps."""
    folder = RUNS / recipe.name
    made, so_far = spent(folder)
    while not made or (left := seconds - so_far) > so_far / made / 2:
        # Steps grow longer as thoughts do, so not all that are left are made at once.
        more = max(1, int(0.8 * left * made / so_far)) if made else FIRST_STEPS
        train = recipe.train.replace(steps=made + more).model_dump()
        train_rl(recipe.replace(train=train), resume=(folder / "recipe.toml").exists(), console=QUIET)
        made, so_far = spent(folder)
    return made, so_far


def run(seed: int, more: list[str]) -> dict[str, Any]:
    """pass@1, steps and seconds of every way."""
    name = f"distillation-{seed}"
    words = ["--name", name, "--seed", str(seed), *more]
    traces = read_recipe(RECIPE, [*words, "--way", "traces", "--compare_rewards", "false"], DistillRecipe)
    others = read_recipe(RECIPE, [*words, "--way", "on-policy", "--compare_rewards", "true"], DistillRecipe)
    found = distill(traces, console=QUIET)
    steps, learning = spent(found.folder / DISTILLED)
    budget = found.stages[TRACES].seconds + learning
    told = {DISTILLED: (steps, budget)}
    pipeline = pipeline_of(resolved(others))
    for way, recipe in pipeline.recipes(RUNS / name, Path()).items():
        if isinstance(recipe, RLRecipe):
            told[way] = train_for(recipe.replace(name=f"{name}-{way}"), budget)
    passed = {stage: pass_at_1(found, stage) for stage in (STUDENT, DISTILLED)}
    measured = measure(pipeline, f"{name}-measured", {way: RUNS / f"{name}-{way}" for way in (ON_POLICY, REWARDS)})
    passed |= {way: pass_at_1(measured, way) for way in (ON_POLICY, REWARDS)}
    return {"pass@1": passed, "steps": {way: own[0] for way, own in told.items()},
            "seconds": {way: round(own[1], 1) for way, own in told.items()}}  # fmt: skip


def measure(pipeline: Pipeline, name: str, models: dict[str, Path]) -> PipelineResult:
    """Each of `models` as the stage of its name in `pipeline` would be measured."""
    asked = next(stage for stage in pipeline.stages if stage.name == STUDENT)
    stages = tuple(
        StageSection(name=way, verb="model", set={"model": str(model)}, prompt=asked.prompt, layout=asked.layout)
        for way, model in models.items()
    )
    return run_pipeline(pipeline.replace(name=name, serves=None, stages=stages), Path(), console=QUIET)


def pass_at_1(result: PipelineResult, stage: str) -> float:
    """Mean over the tasks."""
    evaluation = result.stages[stage].evaluation
    assert evaluation is not None, f"{stage} was measured"
    return statistics.mean(one["pass@k"]["1"]["value"] for one in evaluation["measurements"] if one["budget"] is None)


def main() -> None:
    """Run all, print a table, and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    options, more = parser.parse_known_args()
    found = []
    print(f"{'seed':>4}" + "".join(f"{way:>11}" for way in COLUMNS) + "   steps and seconds of each way")
    for seed in options.seeds:
        values = run(seed, more)
        found.append(values)
        took = [f"{values['steps'][way]} in {seconds:.0f} s" for way, seconds in values["seconds"].items()]
        shown = "".join(f"{values['pass@1'][way]:11.3f}" for way in COLUMNS)
        print(f"{seed:4}{shown}   {', '.join(took)}", flush=True)
    means = {way: statistics.mean(one["pass@1"][way] for one in found) for way in COLUMNS}
    print(json.dumps({"benchmark": "distillation", "ratio": round(means[DISTILLED] / means[REWARDS], 3)
                      if means[REWARDS] else None, "pass@1": {way: round(own, 4) for way, own in means.items()},
                      "seeds": options.seeds, "runs": found}))  # fmt: skip


if __name__ == "__main__":
    main()
