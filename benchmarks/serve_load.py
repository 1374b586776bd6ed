"""`fathom serve` under load: many streams at once, a third of which hang up, and what is left when all is quiet.

    python -m benchmarks.serve_load MODEL --streams 200 --seconds 120

Starts the command in a process of its own and drives it over loopback. Each stream makes one request after another:
one of a fixed list of greedy requests (beginnings of files of the standard library from a few tokens to over a
thousand, some that share a long beginning, to be completed or, a third of them, as a message of a chat), or a
continuation of the text that it just received; most streamed, some not; a third of them given up at a random moment by
closing the connection. The cache is too small for all of them
(`--cache-memory`, `--queue`), so that requests wait, give their memory back midway, and are sometimes refused.

Compared: every completed text with that of the same request made alone afterwards, from an empty cache (a salt of its
own). Passed: no answer but 200, 429 and 503; no stream broken by the server; all texts equal; no cache block held and
nothing running or waiting at the end; resident memory as after a quarter of the time, plus at most `--growth`; nothing
in the server's log; exit code 0 after SIGTERM.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import sysconfig
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import httpx

import fathom
from benchmarks.server import Server
from fathom.data.tokenizer import Tokenizer
from fathom.errors import UserError

LENGTHS = (6, 20, 40, 62, 63, 64, 100, 150, 200, 255, 257, 300, 320, 400, 513, 640, 800, 1100)
"""Tokens of prompts before the one that begins a text: on both sides of a border of blocks and of chunks."""
SHARED = 448
"""Tokens of the beginning that some prompts have in common."""
ENDINGS = (10, 30, 64, 90, 150, 300)
OUTPUTS = (4, 9, 16, 24, 33, 48, 64)
HANG_UP, WHOLE, CONTINUE = 1 / 3, 1 / 6, 1 / 4
"""Shares of requests that are given up, not streamed, and continuations of the one before."""
QUIET_SECONDS = 60


class Case(NamedTuple):
    """A request that can be made again."""

    prompt: str
    max_tokens: int
    chat: bool = False

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.chat else "/v1/completions"

    def body(self, **more: Any) -> dict[str, Any]:
        asked = {"messages": [{"role": "user", "content": self.prompt}]} if self.chat else {"prompt": self.prompt}
        return {"model": "served", **asked, "max_tokens": self.max_tokens, "temperature": 0, **more}

    def text(self, choice: dict[str, Any]) -> str:
        """What a choice of an answer or of an event holds, thoughts first."""
        if not self.chat:
            return choice["text"]
        said = choice.get("message") or choice["delta"]
        return (said.get("reasoning_content") or "") + (said.get("content") or "")


class Answer(NamedTuple):
    """What of a completed request must be the same when it is made alone."""

    text: str
    finish_reason: str
    tokens: int


@dataclass
class Tally:
    """What happened so far."""

    codes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    answers: dict[Case, Counter[Answer]] = field(default_factory=lambda: defaultdict(Counter))
    hung_up: int = 0
    tokens: int = 0
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    durations: list[float] = field(default_factory=list)
    resident: list[tuple[float, int]] = field(default_factory=list)
    most: dict[str, float] = field(default_factory=dict)


class BrokenStream(Exception):
    """A stream that the server did not bring to its end."""


def make_cases(tokenizer: Tokenizer) -> list[Case]:
    """The fixed list."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [text for file in files if len(text := file.read_text(errors="replace")) > 30_000]
    assert len(texts) > len(LENGTHS) + len(ENDINGS) + 1
    prompts = [tokenizer.decode(tokenizer.encode(t)[:n]) for t, n in zip(texts, LENGTHS, strict=False)]
    rest = texts[len(LENGTHS) :]
    beginning = tokenizer.decode(tokenizer.encode(rest[0])[:SHARED])
    prompts += [beginning + tokenizer.decode(tokenizer.encode(t)[:n]) for t, n in zip(rest[1:], ENDINGS, strict=False)]
    cases = [Case(prompt, OUTPUTS[(i + j) % len(OUTPUTS)]) for i, prompt in enumerate(prompts) for j in (0, 3)]
    return cases + [case._replace(chat=True) for case in cases[::2]]


async def request_whole(client: httpx.AsyncClient, case: Case, tally: Tally | None = None, **more: Any) -> Answer | int:
    """A plain answer, or the code of a refusal. Raises `httpx.HTTPError` and `BrokenStream`."""
    answer = await client.post(case.path, json=case.body(**more))
    if tally is not None:
        tally.codes[str(answer.status_code)] += 1
    if answer.status_code != 200:
        return answer.status_code
    value = answer.json()
    if "choices" not in value:
        raise BrokenStream(f"a plain answer without choices: {answer.text[:300]}")
    choice = value["choices"][0]
    return Answer(case.text(choice), choice["finish_reason"], value["usage"]["completion_tokens"])


async def request_stream(client: httpx.AsyncClient, case: Case, tally: Tally) -> Answer | int:
    """The same as events, with their times."""
    start = last = time.perf_counter()
    text, reason, usage, done, begun = "", None, None, False, False
    body = case.body(stream=True, stream_options={"include_usage": True})
    async with client.stream("POST", case.path, json=body) as answer:
        tally.codes[str(answer.status_code)] += 1
        if answer.status_code != 200:
            await answer.aread()
            return answer.status_code
        async for line in answer.aiter_lines():
            if not line.startswith("data: "):
                if line and not line.startswith(":"):
                    raise BrokenStream(f"a line that is no event: {line[:300]}")
                continue
            if done := line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise BrokenStream(f"an error in a stream: {event['error']}")
            now = time.perf_counter()
            (tally.between if begun else tally.first).append(now - (last if begun else start))
            last, begun = now, True
            for choice in event["choices"]:
                text += case.text(choice)
                reason = choice["finish_reason"] or reason
            usage = event.get("usage") or usage
    if not done or reason is None or usage is None:
        raise BrokenStream(f"a stream ended early: {done=} {reason=} {usage=} after {len(text)} characters")
    return Answer(text, reason, usage["completion_tokens"])


async def run_stream(client: httpx.AsyncClient, cases: list[Case], tally: Tally, until: float, number: int) -> None:
    """One client: request after request until the time is over."""
    draw = random.Random(number)
    following: Case | None = None
    while time.monotonic() < until:
        case, following = following or draw.choice(cases), None
        ask = request_whole if draw.random() < WHOLE else request_stream
        usual = statistics.median(tally.durations[-500:]) if tally.durations else 1.0
        patience = draw.uniform(0, 1.5 * usual) if draw.random() < HANG_UP else None
        start = time.monotonic()
        try:
            async with asyncio.timeout(patience):
                answer = await ask(client, case, tally)
        except TimeoutError:
            tally.hung_up += 1
            continue
        except (httpx.HTTPError, BrokenStream, ValueError, KeyError) as error:
            tally.failures.append(f"{type(error).__name__}: {error} ({ask.__name__}, {case.max_tokens} tokens)")
            continue
        if not isinstance(answer, Answer):
            if answer not in (429, 503):
                tally.failures.append(f"answered {answer}")
            await asyncio.sleep(draw.uniform(0.5, 2))
            continue
        tally.answers[case][answer] += 1
        tally.tokens += answer.tokens
        tally.durations.append(time.monotonic() - start)
        if case in cases and not case.chat and draw.random() < CONTINUE:
            following = Case(case.prompt + answer.text + "\n\n\n", case.max_tokens)


async def read_levels(client: httpx.AsyncClient) -> dict[str, float]:
    """The engine's figures, from /metrics."""
    lines = (await client.get("/metrics")).raise_for_status().text.splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines if line.startswith("fathom_") and "{" not in line]
    return {name.removeprefix("fathom_"): float(value) for name, value in pairs}


async def watch(client: httpx.AsyncClient, server: Server, tally: Tally, start: float) -> None:
    """Every second: memory, levels, and whether the service says that it is well."""
    while True:
        tally.resident.append((time.monotonic() - start, server.resident_bytes()))
        try:
            (await client.get("/health")).raise_for_status()
            for name, value in (await read_levels(client)).items():
                tally.most[name] = max(value, tally.most.get(name, 0.0))
        except httpx.HTTPError as error:
            tally.failures.append(f"health and metrics: {type(error).__name__} {error}")
        await asyncio.sleep(1)


def held(levels: dict[str, float]) -> dict[str, float]:
    """Of the levels, those that must be zero in quiet."""
    return {name: levels[name] for name in ("running_requests", "waiting_requests", "cache_blocks_used")}


async def wait_for_quiet(client: httpx.AsyncClient) -> dict[str, float]:
    """What is still held when nobody asks any more: all zero, or what stayed."""
    until = time.monotonic() + QUIET_SECONDS
    while any((levels := held(await read_levels(client))).values()) and time.monotonic() < until:
        await asyncio.sleep(0.2)
    return levels


async def drive(server: Server, cases: list[Case], options: argparse.Namespace) -> dict[str, Any]:
    """The load, the quiet after it, and every request alone; what came of them."""
    tally = Tally()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=600, limits=limits) as client:
        start = time.monotonic()
        watching = asyncio.create_task(watch(client, server, tally, start))
        streams = (run_stream(client, cases, tally, start + options.seconds, n) for n in range(options.streams))
        await asyncio.gather(*streams)
        seconds = time.monotonic() - start
        watching.cancel()
        left = await wait_for_quiet(client)
        resident = server.resident_bytes()
        answered = sum(sum(found.values()) for found in tally.answers.values())
        print(
            f"{answered:,} answers in {seconds:.0f} s, {tally.hung_up:,} given up; codes {dict(tally.codes)}; "
            f"left when quiet: {left}",
            flush=True,
        )
        equal, mismatches = await compare_alone(client, tally)
        left_at_end = await wait_for_quiet(client)
    # The median of a few readings, since one of them may fall on a moment of unusual load.
    quarter = statistics.median(size for at, size in tally.resident if 0.25 <= at / options.seconds <= 0.35)
    return {
        "seconds": round(seconds, 1),
        "codes": dict(tally.codes),
        "hung_up": tally.hung_up,
        "failures": len(tally.failures),
        "failure_examples": tally.failures[:5],
        "answers": answered,
        "distinct_requests": len(tally.answers),
        "text equal to solo": f"{equal} of {answered}",
        "mismatches": mismatches[:5],
        "left": [left, left_at_end],
        "blocks": int(tally.most["cache_blocks"]),
        "most_blocks_used": int(tally.most["cache_blocks_used"]),
        "most_running": int(tally.most["running_requests"]),
        "most_waiting": int(tally.most["waiting_requests"]),
        "cached_share_of_prompts": round(
            tally.most["cached_prompt_tokens_total"] / tally.most["prompt_tokens_total"], 3
        ),
        "resident_mb": {
            "quarter": round(quarter / 1e6, 1),
            "quiet": round(resident / 1e6, 1),
            "tenths": [round(size / 1e6, 1) for _, size in tally.resident[:: max(1, len(tally.resident) // 10)]],
        },
        "growth": round(resident / quarter - 1, 4),
        "requests_per_second": round(answered / seconds, 1),
        "tokens_per_second": round(tally.tokens / seconds, 1),
        "first_token_ms": percentiles(tally.first),
        "between_ms": percentiles(tally.between),
        "_equal": equal == answered,
        "_quiet": not any((*left.values(), *left_at_end.values())),
    }


async def compare_alone(client: httpx.AsyncClient, tally: Tally) -> tuple[int, list[dict[str, Any]]]:
    """Make every answered request again, alone and from an empty cache: how many were equal, and the others."""
    equal, mismatches = 0, []
    for number, (case, answers) in enumerate(tally.answers.items()):
        try:
            alone = await request_whole(client, case, cache_salt=f"alone {number}")
        except (httpx.HTTPError, BrokenStream, ValueError, KeyError) as error:
            tally.failures.append(f"alone: {type(error).__name__}: {error}")
            continue
        if not isinstance(alone, Answer):
            tally.failures.append(f"alone: answered {alone}")
            continue
        for answer, count in answers.items():
            if answer == alone:
                equal += count
            else:
                mismatches.append(
                    {
                        "prompt": case.prompt,
                        "under_load": answer,
                        "alone": alone,
                        "answers": count,
                        "of": answers.total(),
                    }
                )
    return equal, mismatches


def percentiles(seconds: list[float]) -> dict[str, float]:
    """p50 and p95 in milliseconds."""
    cuts = statistics.quantiles(seconds, n=20) if len(seconds) > 1 else [0.0] * 19
    return {"p50": round(cuts[9] * 1e3, 1), "p95": round(cuts[18] * 1e3, 1)}


def main() -> None:
    """Drive, print, and a JSON line; exit code 1 where something did not hold."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="a folder or a run")
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument(
        "--cache-memory", type=float, default=0.01, help="gigabytes; enough for few of the streams (0.01)"
    )
    parser.add_argument("--queue", type=int, default=160, help="requests that may wait; more are refused (160)")
    parser.add_argument(
        "--growth", type=float, default=0.03, help="of resident memory, allowed after the first quarter"
    )
    options = parser.parse_args()
    sizes = ("--cache-memory", str(options.cache_memory), "--queue", str(options.queue))
    server = Server(options.model, "--dtype", options.dtype, *sizes)
    try:
        with httpx.Client(base_url=server.url) as client:
            print(f"{options.streams} streams for {options.seconds:g} s against {client.get('/v1/models').json()}")
        _, tokenizer = fathom.load(options.model, dtype=options.dtype)
        if tokenizer is None:
            raise UserError(f"{options.model}: needs a tokenizer")
        result = asyncio.run(drive(server, make_cases(tokenizer), options))
    finally:
        code = server.close()
    complaints = server.complaints()
    equal, quiet = result.pop("_equal"), result.pop("_quiet")
    checks = {
        "no failures": not result["failures"],
        "texts equal": equal,
        "nothing left": quiet,
        "memory": result["growth"] <= options.growth,
        "log empty": not complaints,
        "exit code 0": code == 0,
    }
    for name, held_true in checks.items():
        print(f"{name:14} {'yes' if held_true else 'NO'}")
    passed = all(checks.values())
    print(
        json.dumps(
            {"benchmark": "serve_load", "passed": passed, "checks": checks, **result, "streams": options.streams,
             "exit_code": code, "log": complaints[:10]}
        )
    )  # fmt: skip
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
