"""What training in FP8 loses: the loss of every step beside bfloat16's, same weights, same data, same order.

    python -m benchmarks.fp8_gap [--variants bf16 fp8 fp8-blocks] [--resume] [--train.steps 1000]

`fp8` is recipes/fp8.toml at V3's learning rate, `bf16` the same in bfloat16, `fp8-blocks` with gradients of activations
in blocks of 128 × 128, which the paper saw diverge (App. B.2). `bf16-halved` says what is noise: bfloat16 again, with
micro-batches half as large, which changes nothing but the order of sums. At the recipe's own learning rate
(`--optimizer.lr 1e-3`) runs that begin alike come apart further.

Losses are smoothed by an exponential average over 100 steps; the gap is (loss − bf16's) / bf16's at the last step, and
the largest in size behind the warm-up. Runs are written to `runs/fp8-gap-VARIANT`; with `--resume` those that are there
are gone on with, or read where they are complete. `--plot FILE` draws the gaps (SVG, or PNG with the extra `report`).
The last line is JSON; `ratio` is the smoothed FP8 loss over bfloat16's at the end.
"""

import argparse
import json
from pathlib import Path

from rich.console import Console

from fathom.config import read_recipe
from fathom.report.axis import Axis
from fathom.report.chart import Chart, Series, draw
from fathom.report.picture import png_of
from fathom.train.metrics import read_metrics
from fathom.train.pretrain import pretrain

RECIPE = Path("recipes/fp8.toml")
LEARNING_RATE = ["--optimizer.lr", "2.2e-4"]
VARIANTS = {
    "bf16": ["--train.precision", "bf16", "--train.compile", "off"],
    "fp8": [],
    "fp8-blocks": ["--train.fp8_gradients", "blocks"],
    "bf16-halved": ["--train.precision", "bf16", "--train.compile", "off", "--train.micro_batch", "2"],
}
SMOOTHED_OVER = 100


def main() -> None:
    """Run the variants that are asked for, print a table and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=["bf16", "fp8", "fp8-blocks"])
    parser.add_argument("--resume", action="store_true", help="go on with runs that are there, read complete ones")
    parser.add_argument("--plot", type=Path, help="file to draw the gaps to, .svg or .png")
    options, overrides = parser.parse_known_args()
    if "bf16" not in options.variants:
        parser.error("gaps are to bf16: name it among the variants")
    losses, held_out = {}, {}
    for variant in options.variants:
        losses[variant], held_out[variant] = _train(variant, overrides, resume=options.resume)
        print(f"{variant}: loss {losses[variant][-1]:.4f} at the last of {len(losses[variant])} steps", flush=True)
    smooth = {variant: smoothed(values) for variant, values in losses.items()}
    gaps = {
        variant: [(own - base) / base for own, base in zip(values, smooth["bf16"], strict=True)]
        for variant, values in smooth.items()
        if variant != "bf16"
    }
    results = {}
    print(f"\n{'variant':12} {'smoothed':>9} {'held out':>9} {'gap at the end':>15} {'largest gap':>12}")
    for variant, values in smooth.items():
        gap = gaps.get(variant, [0.0])
        results[variant] = {
            "smoothed_loss": round(values[-1], 4),
            "held_out_loss": round(held_out[variant], 4),
            "gap": round(gap[-1], 6),
            "largest_gap": round(max(gap[SMOOTHED_OVER:] or gap, key=abs), 6),
        }
        row = results[variant]
        print(
            f"{variant:12} {row['smoothed_loss']:9.4f} {row['held_out_loss']:9.4f} {row['gap']:15.3%} "
            f"{row['largest_gap']:12.3%}"
        )
    if options.plot is not None:
        _draw(gaps, options.plot)
    ratio = round(1 + results["fp8"]["gap"], 5) if "fp8" in results else None
    print(json.dumps({"benchmark": "fp8_gap", "ratio": ratio, "steps": len(losses["bf16"]), "variants": results}))


def smoothed(losses: list[float]) -> list[float]:
    """An exponential average over `SMOOTHED_OVER` steps, without the pull of its beginning."""
    total = weight = 0.0
    means = []
    for loss in losses:
        total += (loss - total) / SMOOTHED_OVER
        weight += (1 - weight) / SMOOTHED_OVER
        means.append(total / weight)
    return means


def _train(variant: str, overrides: list[str], *, resume: bool) -> tuple[list[float], float]:
    """The loss of every step, and the last held-out loss."""
    name = f"fp8-gap-{variant}"
    recipe = read_recipe(RECIPE, [*LEARNING_RATE, *overrides, *VARIANTS[variant], "--name", name])
    begun = resume and Path("runs", name).exists()
    result = pretrain(recipe, resume=begun, overwrite=not begun, console=Console(stderr=True))
    if result.interrupted:
        raise SystemExit(f"{variant}: interrupted at step {result.step}; go on with --resume")
    lines = read_metrics(result.folder / "metrics.jsonl")
    trained = [line["loss"] for line in lines if line["kind"] == "train"]
    return trained, [line["loss"] for line in lines if line["kind"] == "eval"][-1]


def _draw(gaps: dict[str, list[float]], file: Path) -> None:
    lines = tuple(
        Series(variant, tuple((step, gap) for step, gap in enumerate(values, start=1) if step > SMOOTHED_OVER))
        for variant, values in gaps.items()
    )
    axis = Axis("smoothed loss relative to bfloat16", percent=True)
    bar = ("the paper's bound, 0.25 %", 0.0025)
    chart = Chart("fp8-gap", "What FP8 loses against bfloat16", lines, axis, level=bar)
    picture = draw(chart, width=720, height=360, alone=True)
    if file.suffix == ".png":
        file.write_bytes(png_of(picture))
    else:
        file.write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
