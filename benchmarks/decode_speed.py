"""Decoding speed beside other programs: tokens per second over all streams, sampled, short prompts.

    python -m benchmarks.decode_speed --against transformers --streams 64
    python -m benchmarks.decode_speed --against vllm --vllm-python VLLM_ENV/bin/python --streams 1
    python -m benchmarks.decode_speed --against llama.cpp --llama-python ENV/bin/python --streams 1 --ours fathom-int8

Both programs stay loaded and work in turns; the one that waits is suspended, so that its idle threads take nothing.
`--model` takes whatever Fathom opens (FATHOM_SMOLLM2_GGUF names the default, SmolLM2-135M); peers get it as a bfloat16
folder, llama.cpp as the .gguf of `--gguf`. The ratio is the median over rounds of our speed over theirs. The limit of
the machine is printed with it: a step reads all weights once, and multiplies each by every stream.
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import fathom
from fathom.model.checkpoint import save_model
from fathom.train.machine import measure_gemm_peak

SIDES = Path(__file__).with_name("decode_sides.py")


class Side:
    """A program in a process of its own, suspended while it has nothing to do."""

    def __init__(self, python: str, program: str, model: str) -> None:
        environment = os.environ | {"PYTHONPATH": str(SIDES.parent.parent)} if program.startswith("fathom") else None
        self._process = subprocess.Popen(
            [python, str(SIDES), program, model],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True, env=environment,
        )  # fmt: skip
        self._read(program)
        self._signal(signal.SIGSTOP)

    def ask(self, **command: Any) -> dict[str, Any]:
        """Let it work on one command."""
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        answer = self._read("the program")
        self._signal(signal.SIGSTOP)
        return answer

    def close(self) -> None:
        """End it."""
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _read(self, name: str) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{name} ended with exit code {self._process.wait()}; its error is above")
        return json.loads(line)

    def _signal(self, number: int) -> None:
        os.killpg(self._process.pid, number)


def measure_read_bandwidth() -> float:
    """Bytes per second that all cores read together, from memory larger than any cache."""
    data = torch.ones(1 << 27, dtype=torch.float32)
    fastest = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        data.sum()
        fastest = min(fastest, time.perf_counter() - start)
    return data.nbytes / fastest


def main() -> None:
    """Measure, print, and a JSON line with the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--against", choices=["transformers", "vllm", "llama.cpp"], required=True)
    parser.add_argument("--ours", choices=["fathom", "fathom-int8", "fathom-fp8"], default="fathom")
    parser.add_argument("--model", default=os.environ.get("FATHOM_SMOLLM2_GGUF"), help="what Fathom opens")
    parser.add_argument("--gguf", help="file for llama.cpp (the model itself, if it is one)")
    parser.add_argument("--vllm-python", default=sys.executable)
    parser.add_argument("--llama-python", default=sys.executable)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of each stream")
    parser.add_argument("--prompt", type=int, default=16, help="tokens of each prompt")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if options.model is None:
        parser.error("--model is missing: a folder, a run or a .gguf")

    model, tokenizer = fathom.load(options.model, dtype="bfloat16")
    weights = sum(p.numel() for p in set(model.parameters())) - (
        0 if model.config.tie_word_embeddings else model.model.embed_tokens.weight.numel()
    )
    random.seed(0)
    prompts = [
        [random.randrange(model.config.vocab_size // 2) for _ in range(options.prompt)] for _ in range(options.streams)
    ]
    pythons = {"vllm": options.vllm_python, "llama.cpp": options.llama_python}
    speeds: dict[str, list[float]] = {options.ours: [], options.against: []}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        save_model(model, folder, tokenizer=tokenizer, dtype="bfloat16")
        del model
        theirs = (options.gguf or options.model) if options.against == "llama.cpp" else str(folder)
        sides = {options.ours: Side(sys.executable, options.ours, options.model)}
        sides[options.against] = Side(pythons.get(options.against, sys.executable), options.against, theirs)
        try:
            for side in sides.values():
                side.ask(prompts=prompts, tokens=8)
            for turn in range(options.rounds):
                for name, side in sides.items():
                    done = side.ask(prompts=prompts, tokens=options.tokens)
                    assert done["tokens"] == options.streams * options.tokens, f"{name}: {done}"
                    speeds[name].append(done["tokens"] / done["seconds"])
                shown = ", ".join(f"{name} {values[-1]:,.0f}" for name, values in speeds.items())
                print(f"round {turn + 1}: {shown} tokens/s", flush=True)
        finally:
            for side in sides.values():
                side.close()
    bandwidth, peak = measure_read_bandwidth(), measure_gemm_peak(torch.bfloat16)
    size = 2 if options.ours == "fathom" else 1
    step = max(size * weights / bandwidth, 2 * weights * options.streams / peak)
    limit = options.streams / step
    ratios = [a / b for a, b in zip(speeds[options.ours], speeds[options.against], strict=True)]
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    print(f"\nlimit: {limit:,.0f} tokens/s ({bandwidth / 1e9:.0f} GB/s, {peak / 1e9:.0f} GFLOP/s)")
    for name, speed in medians.items():
        print(f"{name:14} {speed:9,.1f} tokens/s {speed / limit:7.1%} of the limit")
    result = {
        "benchmark": "decode_speed",
        "ratio": round(statistics.median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
        "ours": options.ours,
        "against": options.against,
        "streams": options.streams,
        "tokens": options.tokens,
        "tokens_per_second": {name: round(speed, 1) for name, speed in medians.items()},
        "share_of_limit": round(medians[options.ours] / limit, 4),
        "read_gb_per_second": round(bandwidth / 1e9, 1),
        "gemm_peak_gflops": round(peak / 1e9, 1),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
