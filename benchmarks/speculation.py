"""What drafting with the multi-token-prediction module gives: one stream, greedy, with and without.

    python -m benchmarks.speculation MODEL

MODEL is a folder or a run of a model that has such a module; prompts are beginnings of files of the standard library.
Engines with and without speculation work in turns. Both must write the same tokens. The ratio is the median over rounds
of the speed with over the speed without.
"""

import argparse
import json
import statistics
import sysconfig
import time
from pathlib import Path

import fathom
from fathom.engine.complete import complete
from fathom.engine.engine import Engine, EngineSettings
from fathom.engine.protocol import Request, Sampling
from fathom.errors import UserError


def main() -> None:
    """Measure, print, and a JSON line with the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="a folder or a run")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens after each prompt")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    model, tokenizer = fathom.load(options.model, dtype=options.dtype)
    if tokenizer is None or not model.config.num_nextn_predict_layers:
        raise UserError(f"{options.model}: needs a tokenizer and a multi-token-prediction module")
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:: max(1, 150 // options.prompts)]
    texts = [file.read_text(errors="replace") for file in files[: options.prompts]]
    requests = [
        Request(tokenizer.encode(text)[: options.prompt], options.tokens, Sampling(temperature=0), ignore_eos=True)
        for text in texts
    ]
    speeds: dict[bool, list[float]] = {True: [], False: []}
    written: dict[bool, list[list[int]]] = {}
    acceptance = 0.0
    for turn in range(options.rounds + 1):
        for speculate in (True, False):
            engine = Engine(model, tokenizer, EngineSettings(speculate=speculate))
            start = time.perf_counter()
            written[speculate] = [complete(engine, [request])[0].token_ids for request in requests]
            seconds = time.perf_counter() - start
            counted = engine.statistics()
            engine.close()
            if speculate:
                acceptance = counted.accepted_tokens / counted.drafted_tokens
            if turn:  # the first only warms up
                speeds[speculate].append(len(requests) * options.tokens / seconds)
        if turn:
            print(f"round {turn}: {speeds[True][-1]:,.0f} with, {speeds[False][-1]:,.0f} tokens/s without", flush=True)
    ratios = [a / b for a, b in zip(speeds[True], speeds[False], strict=True)]
    equal = written[True] == written[False]
    print(f"\n{acceptance:.1%} of drafts accepted; tokens with and without are {'equal' if equal else 'DIFFERENT'}")
    result = {
        "benchmark": "speculation",
        "ratio": round(statistics.median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
        "acceptance": round(acceptance, 4),
        "equal": equal,
        "tokens_per_second": {
            "with": round(statistics.median(speeds[True]), 1),
            "without": round(statistics.median(speeds[False]), 1),
        },
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
