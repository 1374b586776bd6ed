"""What balancing and multi-token prediction do, by leaving one thing out of a recipe at a time.

    python -m benchmarks.ablations --recipe recipes/stdlib.toml

Each variant is the same recipe, seed, data and number of steps:
`full` is the recipe as it stands; `sequence-loss-alone` has its sequence-wise loss but no bias rule; `no-balancing` has
neither; `no-mtp-loss` trains without the multi-token loss (λ = 0).
Figures are of held-out text after the last step: loss of the main head, MaxVio over all of the text, and the share
of second tokens accepted. The JSON line's `ratio` is the main loss without balancing bias over the one with it.
"""

import argparse
import json
from pathlib import Path

from rich.console import Console

from fathom.config import read_recipe
from fathom.train.pretrain import pretrain

VARIANTS = {
    "full": [],
    "sequence-loss-alone": ["--balance.bias_rate", "0"],
    "no-balancing": ["--balance.bias_rate", "0", "--balance.sequence_loss", "0"],
    "no-mtp-loss": ["--mtp.weight", "0", "--mtp.late_weight", "0"],
}


def main() -> None:
    """Run the variants that are asked for, print a table and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", type=Path, default=Path("recipes/stdlib.toml"))
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    options, overrides = parser.parse_known_args()

    results: dict[str, dict[str, float]] = {}
    for variant in options.variants:
        name = f"ablation-{variant}"
        recipe = read_recipe(options.recipe, [*overrides, *VARIANTS[variant], "--name", name])
        result = pretrain(recipe, overwrite=True, console=Console(quiet=True))
        if result.interrupted:
            raise SystemExit(f"{variant}: interrupted at step {result.step}")
        results[variant] = result.evaluation
        print(f"{variant}: {result.evaluation}", flush=True)
    print(f"\n{'variant':22} {'loss':>8} {'MaxVio':>8} {'accepted':>9}")
    for variant, values in results.items():
        accepted = f"{values['mtp_acceptance']:9.1%}" if "mtp_acceptance" in values else ""
        print(f"{variant:22} {values['loss']:8.4f} {values['max_vio']:8.3f} {accepted}")
    ratio = None
    if {"full", "sequence-loss-alone"} <= results.keys():
        ratio = round(results["sequence-loss-alone"]["loss"] / results["full"]["loss"], 4)
    print(json.dumps({"benchmark": "ablations", "ratio": ratio, "steps": recipe.train.steps, "variants": results}))


if __name__ == "__main__":
    main()
