"""What the reward for one language does: reinforcement learning without and with it, on stories in two languages.

    python -m benchmarks.language_mixing [--base runs/quickstart/base] [--weights 0 0.2] [--steps 60] [--seeds 1 2 3]

The base (`make quickstart`) has read worked solutions of which three lines in ten are in the other language, and so
mixes them. From it, for every seed and weight, a run of `recipes/zero-arithmetic.toml` on `bilingual`, alike in all but
the weight. Held-out stories say how many are right and what share of the words of thoughts is in the language of the
story (DeepSeek-R1 §2.3.2 reports consistency at a small loss in accuracy). Runs are in `runs/language-mixing-SEED`;
those that are there are gone on with. The last line is JSON; `ratio` is the share of foreign words without over with.
"""

import argparse
import json
import statistics
from pathlib import Path

from rich.console import Console

from fathom.config.evaluation import EvaluationSettings
from fathom.config.pipeline import Pipeline, StageSection
from fathom.config.rewards import Layout
from fathom.config.rl import PromptSection
from fathom.pipeline.run import run_pipeline

TASK = "bilingual?levels=3&numbers=small"


def run(base: str, weights: list[float], steps: int, seed: int) -> dict[str, dict[str, float]]:
    """pass@1 and the share of words in the right language: of the base, and by weight."""
    prompt = PromptSection(style="template", template="{question}")
    learners = tuple(
        StageSection(
            name=_stage(weight),
            verb="rl",
            recipe="zero-arithmetic.toml",
            set={
                "model": "@base",
                "task": {"name": TASK, "levels": 3},
                "rewards": {"language": weight},
                "train": {"steps": steps},
                "eval": {"every": steps, "problems": 64, "probe": False, "budgets": []},
            },
        )
        for weight in weights
    )
    pipeline = Pipeline(
        name=f"language-mixing-{seed}",
        seed=seed,
        evaluation=EvaluationSettings(
            tasks=(TASK,), problems=256, samples=4, temperature=1.0, top_p=1.0, max_tokens=128, prompt=prompt,
            layout=Layout(form="rest", thoughts="optional"),
        ),
        stages=(StageSection(name="base", verb="model", set={"model": base}), *learners),
    )  # fmt: skip
    found = run_pipeline(pipeline, Path("recipes"), console=Console(quiet=True))
    values = {}
    for name, stage in found.stages.items():
        (measured,) = stage.evaluation["measurements"]
        values[name] = {"pass@1": measured["pass@k"]["1"]["value"], "language": measured["language"]}
    return values


def _stage(weight: float) -> str:
    return f"weight-{weight:g}".replace(".", "-")


def main() -> None:
    """Run all, print a table, and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", default="runs/quickstart/base")
    parser.add_argument("--weights", nargs="+", type=float, default=[0.0, 0.2])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    options = parser.parse_args()
    found = {seed: run(options.base, options.weights, options.steps, seed) for seed in options.seeds}
    means = {}
    print(f"{'':12}{'pass@1':>10}{'in the language':>18}   by seed")
    for name in found[options.seeds[0]]:
        own = [values[name] for values in found.values()]
        means[name] = {key: statistics.mean(value[key] for value in own) for key in own[0]}
        seeds = ", ".join(f"{value['pass@1']:.3f} {value['language']:.3f}" for value in own)
        print(f"{name:12}{means[name]['pass@1']:10.3f}{means[name]['language']:18.3f}   {seeds}")
    foreign = [1 - means[_stage(weight)]["language"] for weight in (min(options.weights), max(options.weights))]
    ratio = round(foreign[0] / foreign[1], 3) if foreign[1] else None
    print(json.dumps({"benchmark": "language_mixing", "ratio": ratio, "means": means, "seeds": found}))


if __name__ == "__main__":
    main()
