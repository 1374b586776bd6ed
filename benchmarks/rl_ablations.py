"""The published losses on one small task: held-out pass@1 before and after, several seeds each.

    python -m benchmarks.rl_ablations [--presets r1 dapo dr_grpo gspo] [--seeds 1 2 3] [--steps 60] [--resume]

Every run is `recipes/zero-arithmetic.toml` (its base: `fathom pretrain recipes/zero-base.toml`) with another
`loss.preset`, and with four updates to a rollout: with a single one every ratio is 1, and neither clipping nor the kind
of ratio, in which the losses differ most, has anything to say. DAPO has its dynamic sampling and its punishment of long
completions. Held-out pass@1 is measured every 20 steps, as all may end at the same height. Runs are written to
`runs/ablation-rl-PRESET-SEED`; with `--resume`, those that are there are gone on with, or read where they are complete.
The last line is JSON; `ratio` is the best preset's gain over plain R1 settings' gain.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console

from fathom.config import read_recipe
from fathom.config.policy import PRESETS
from fathom.config.rl import RLRecipe
from fathom.train.metrics import read_metrics
from fathom.train.rl import train_rl

RECIPE = Path("recipes/zero-arithmetic.toml")
NOT_OF_THE_LOSS = {"dapo": ["--rollout.resample", "2", "--rewards.overlong", "1"]}


def run(preset: str, seed: int, steps: int, resume: bool, more: list[str]) -> dict[str, Any]:
    """pass@1 at every evaluation, length of thought at the last, and seconds of one run."""
    overrides = ["--loss.preset", preset, "--seed", str(seed), "--train.steps", str(steps)]
    name = f"ablation-rl-{preset}-{seed}"
    overrides += ["--name", name, "--train.mini_batches", "4", "--eval.every", "20", "--eval.probe", "false"]
    overrides += ["--eval.budgets", "[]", *NOT_OF_THE_LOSS.get(preset, []), *more]
    recipe, begun = read_recipe(RECIPE, overrides, RLRecipe), Path("runs", name).exists()
    result = train_rl(recipe, resume=resume and begun, overwrite=not resume, console=Console(quiet=True))
    lines = read_metrics(result.folder / "metrics.jsonl")
    measured = [line for line in lines if line["kind"] == "eval"]
    steps_made = [line for line in lines if line["kind"] == "train"]
    return {
        "pass@1": [line["pass@1"] for line in measured],
        "thought_tokens": measured[-1]["thought_tokens"],
        "seconds": sum(line["rollout_seconds"] + line["update_seconds"] for line in steps_made),
    }


def main() -> None:
    """Run all, print a table, and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=["r1", "dapo", "dr_grpo", "gspo"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--resume", action="store_true", help="go on with runs that are there")
    options, more = parser.parse_known_args()
    found: dict[str, list[dict[str, Any]]] = {}
    print(f"{'preset':10} {'seed':>4}  {'pass@1 every 20 steps':36} {'thought':>8} {'seconds':>8}")
    for preset in options.presets:
        for seed in options.seeds:
            values = run(preset, seed, options.steps, options.resume, more)
            found.setdefault(preset, []).append(values)
            curve = "  ".join(f"{value:.3f}" for value in values["pass@1"])
            print(
                f"{preset:10} {seed:4}  {curve:36} {values['thought_tokens']:8.1f} {values['seconds']:8.0f}", flush=True
            )
    gains = {name: statistics.mean(v["pass@1"][-1] - v["pass@1"][0] for v in runs) for name, runs in found.items()}
    curves = {name: [[round(p, 4) for p in v["pass@1"]] for v in runs] for name, runs in found.items()}
    base = gains.get("r1", next(iter(gains.values())))
    print(json.dumps({"benchmark": "rl_ablations", "ratio": round(max(gains.values()) / base, 3) if base else None,
                      "gains": {name: round(gain, 4) for name, gain in gains.items()}, "pass@1": curves,
                      "steps": options.steps}))  # fmt: skip


if __name__ == "__main__":
    main()
