"""A training step in bfloat16 and in FP8, each with and without recomputing: seconds, and bytes that layers keep.

    python -m benchmarks.precision [--model fathom-59m] [--batch 8] [--sequence 512]

Sides work in turns in one run, each the trainer's own step; the ratio is the time of the FP8 step over that of the
bfloat16 step as it is usually taken (compiled), median over rounds: at most 3, as FP8 is emulated here in order to be
studied. Then, per kind of layer, what autograd keeps of one token for the backward pass, counted by hooks on a real
pass and computed by `model/accounting.py`; the two must be equal.
"""

import argparse
import json
import statistics

import torch

from benchmarks.sides import open_sides, read_model
from fathom.config import ModelConfig
from fathom.config.recipe import Precision
from fathom.model.accounting import activation_bytes
from fathom.model.kept import kept_bytes

SIDES = ["fathom", "fathom-eager", "fathom-recompute", "fathom-fp8", "fathom-fp8-recompute"]
POLICIES: list[tuple[Precision, bool]] = [("bf16", False), ("bf16", True), ("fp8", False), ("fp8", True)]


def main() -> None:
    """Measure, print two tables, and a JSON line with the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="fathom-59m", help="a preset or the path of a config.json")
    parser.add_argument("--batch", type=int, default=8, help="sequences per step")
    parser.add_argument("--sequence", type=int, default=512, help="tokens per sequence")
    parser.add_argument("--rounds", type=int, default=5, help="turns of every side")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps per turn")
    options = parser.parse_args()

    config = read_model(options.model)
    arguments = {"model": options.model, "batch": options.batch, "sequence": options.sequence, "lr": 1e-4, "seed": 0}
    seconds: dict[str, list[float]] = {}
    with open_sides(SIDES, arguments) as sides:
        for name, side in sides.items():
            print(f"{name}: ready after {side.ask(do='train', steps=2)['seconds']:.0f} s", flush=True)
        for turn in range(options.rounds):
            for name, side in sides.items():
                done = side.ask(do="train", steps=options.steps)
                seconds.setdefault(name, []).append(done["seconds"] / done["steps"])
            print(f"round {turn + 1}: " + ", ".join(f"{n} {s[-1]:.2f} s" for n, s in seconds.items()), flush=True)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"\n{'step':24} {'seconds':>8} {'of bf16':>8}")
    for name, value in medians.items():
        print(f"{name:24} {value:8.2f} {value / medians['fathom']:8.2f}")

    kept = _kept(config)
    print(f"\n{'bytes kept per token':24}" + "".join(f"{_title(policy):>18}" for policy in POLICIES))
    for kind, row in kept.items():
        print(f"{kind:24}" + "".join(f"{row[_title(policy)]:18,}" for policy in POLICIES))
    ratios = [eight / plain for eight, plain in zip(seconds["fathom-fp8"], seconds["fathom"], strict=True)]
    result = {
        "benchmark": "precision",
        "ratio": round(statistics.median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
        "seconds_per_step": {name: round(value, 3) for name, value in medians.items()},
        "bytes_per_token": kept,
        "model": options.model,
        "batch": [options.batch, options.sequence],
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(result))


def _kept(config: ModelConfig) -> dict[str, dict[str, int]]:
    """Bytes per token by kind of layer and policy, the accounting's, once hooks have counted the same."""
    small = config.replace(num_hidden_layers=min(config.num_hidden_layers, 2), num_nextn_predict_layers=0)
    kinds = {"mixture" if small.is_moe_layer(i) else "dense": i for i in range(small.num_hidden_layers)}
    kept: dict[str, dict[str, int]] = {kind: {} for kind in kinds}
    time = 64
    for precision, recompute in POLICIES:
        counted = [kept_bytes(small, precision, recompute=recompute, sequences=n, time=time) for n in (1, 2)]
        how = {"precision": precision, "recompute": recompute}
        said = sum(activation_bytes(small, i, tokens=time, sequences=1, **how) for i in range(small.num_hidden_layers))
        if counted[1] - counted[0] != said:
            raise SystemExit(f"{how}: hooks counted {counted[1] - counted[0]:,} bytes, accounting says {said:,}")
        for kind, index in kinds.items():
            kept[kind][_title((precision, recompute))] = activation_bytes(small, index, tokens=1, sequences=0, **how)
    return kept


def _title(policy: tuple[Precision, bool]) -> str:
    return policy[0] + ("+recompute" if policy[1] else "")


if __name__ == "__main__":
    main()
