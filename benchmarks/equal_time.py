"""Held-out loss after the same wall-clock time as transformers, on the same text.

    python -m benchmarks.equal_time --data runs/data/stdlib --seconds 240 [--side fathom-muon]

Both sides start from the same distribution of weights with one learning rate, see the same batches in the same order
and train in turns; compilation and the first two steps are not counted for either. Held-out text is measured by each
side's own forward pass. `fathom` uses AdamW as the peer does; `fathom-muon` is what recipes/stdlib.toml uses.
"""

import argparse
import json
from pathlib import Path

from benchmarks.sides import open_sides


def main() -> None:
    """Train, print the curve, and a JSON line with the ratio of losses (theirs over ours)."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder that 'fathom data build' wrote")
    parser.add_argument("--model", default="fathom-59m", help="a preset or the path of a config.json")
    parser.add_argument("--side", default="fathom", choices=["fathom", "fathom-muon"])
    parser.add_argument(
        "--peer", default="transformers-compiled", choices=["transformers-eager", "transformers-compiled"]
    )
    parser.add_argument("--seconds", type=float, default=240, help="training time of each side")
    parser.add_argument("--turns", type=int, default=6, help="the time is cut into this many turns")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate of both, after no warm-up")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--sequence", type=int, default=512)
    options = parser.parse_args()

    names = [options.side, options.peer]
    arguments = {
        "model": options.model, "batch": options.batch, "sequence": options.sequence, "lr": options.lr, "seed": 0,
        "data": str(options.data), "train_batches": 2000, "heldout_batches": 8,
    }  # fmt: skip
    losses: dict[str, float] = {}
    steps: dict[str, int] = {}
    with open_sides(names, arguments) as sides:
        for side in sides.values():
            side.ask(do="train", steps=2)
        for turn in range(options.turns):
            for name, side in sides.items():
                steps[name] = side.ask(do="train", seconds=options.seconds / options.turns)["done"]
                losses[name] = side.ask(do="evaluate")["loss"]
            spent = options.seconds * (turn + 1) / options.turns
            print(
                f"{spent:5.0f} s  " + "  ".join(f"{n}: step {steps[n]}, loss {losses[n]:.4f}" for n in names),
                flush=True,
            )
    result = {
        "benchmark": "equal_time",
        "ratio": round(losses[options.peer] / losses[options.side], 4),
        "held_out_loss": {name: round(loss, 4) for name, loss in losses.items()},
        "steps": steps,
        "seconds": options.seconds,
        "lr": options.lr,
        "model": options.model,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
