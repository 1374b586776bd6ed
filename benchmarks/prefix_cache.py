"""What the prefix cache saves: time to first token of a long prompt, and of the same prompt again.

    python -m benchmarks.prefix_cache MODEL
    python -m benchmarks.prefix_cache MODEL --prompt 1000 --rounds 8

MODEL is whatever Fathom opens. Every round has a new prompt of random tokens, asked twice through the engine in this
process and twice through `fathom serve` in another, by turns, with nothing else under way. The ratio is the median over
rounds of the second time over the first; it should be at most 0.2.
"""

import argparse
import json
import random
import statistics
import threading
import time
from collections.abc import Callable

import httpx

import fathom
from benchmarks.server import Server
from fathom.engine.engine import Engine
from fathom.engine.protocol import Chunk, Request, Sampling
from fathom.errors import UserError

BAR = 0.2


def first_token_of_engine(engine: Engine, prompt: list[int]) -> tuple[float, int]:
    """Seconds until the first token of an answer to `prompt`, and how many tokens of the prompt were remembered."""
    arrived = threading.Event()
    found: list[Chunk] = []

    def deliver(chunk: Chunk) -> None:
        found.append(chunk)
        arrived.set()

    start = time.perf_counter()
    engine.submit(Request(prompt, 1, Sampling(temperature=0), ignore_eos=True), deliver)
    arrived.wait()
    seconds = time.perf_counter() - start
    if found[0].finish_reason == "error":
        raise UserError(f"the engine failed: {found[0].message}")
    return seconds, found[0].usage.cached


def first_token_of_server(client: httpx.Client, prompt: list[int]) -> tuple[float, int]:
    """The same over HTTP, until the first event of a stream has arrived."""
    body = {
        "model": "served", "prompt": prompt, "max_tokens": 1, "temperature": 0, "ignore_eos": True,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    start = time.perf_counter()
    seconds = None
    with client.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            raise UserError(f"the server answered {answer.status_code}: {answer.read().decode()}")
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            seconds = seconds or time.perf_counter() - start
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise UserError(f"the server failed: {event['error']}")
    assert seconds is not None, "the stream held no event"
    return seconds, event["usage"]["prompt_tokens_details"]["cached_tokens"]


def main() -> None:
    """Measure, print, and a JSON line with the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="what Fathom opens")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--prompt", type=int, default=1000, help="tokens of each prompt")
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    model, tokenizer = fathom.load(options.model, dtype=options.dtype)
    if tokenizer is None:
        raise UserError(f"{options.model}: needs a tokenizer")
    engine = Engine(model, tokenizer)
    server = Server(options.model, "--dtype", options.dtype)
    draw = random.Random(0)
    seconds: dict[str, tuple[list[float], list[float]]] = {"engine": ([], []), "http": ([], [])}
    cached: set[int] = set()
    try:
        with httpx.Client(base_url=server.url, timeout=600) as client:
            ways: dict[str, Callable[[list[int]], tuple[float, int]]] = {
                "engine": lambda prompt: first_token_of_engine(engine, prompt),
                "http": lambda prompt: first_token_of_server(client, prompt),
            }
            for turn in range(options.rounds + 1):
                for name, ask in ways.items():
                    prompt = [draw.randrange(tokenizer.vocab_size) for _ in range(options.prompt)]
                    (first, none), (second, some) = ask(prompt), ask(prompt)
                    assert none == 0, f"a new prompt, but {none} of its tokens were remembered"
                    cached.add(some)
                    if turn:  # the first only warms up
                        seconds[name][0].append(first)
                        seconds[name][1].append(second)
                if turn:
                    shown = ", ".join(
                        f"{n} {a[-1] * 1e3:.0f} and {b[-1] * 1e3:.0f} ms" for n, (a, b) in seconds.items()
                    )
                    print(f"round {turn}: {shown}", flush=True)
    finally:
        server.close()
        engine.close()
    ratios = {n: [b / a for a, b in zip(*both, strict=True)] for n, both in seconds.items()}
    medians = {name: statistics.median(values) for name, values in ratios.items()}
    for name, ratio in medians.items():
        print(f"{name:8} second/first {ratio:.3f} (bar {BAR})")
    result = {
        "benchmark": "prefix_cache",
        "ratio": {name: round(ratio, 3) for name, ratio in medians.items()},
        "ratio_min": {name: round(min(values), 3) for name, values in ratios.items()},
        "ratio_max": {name: round(max(values), 3) for name, values in ratios.items()},
        "bar": BAR,
        "passed": all(ratio <= BAR for ratio in medians.values()),
        "prompt_tokens": options.prompt,
        "remembered_tokens": sorted(cached),
        "milliseconds": {
            name: {
                "first": round(statistics.median(first) * 1e3, 1),
                "second": round(statistics.median(second) * 1e3, 1),
            }
            for name, (first, second) in seconds.items()
        },
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
