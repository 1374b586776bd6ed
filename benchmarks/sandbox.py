"""How many checks of trivial programs per second: the pool, against a bubblewrap and Python started for each check.

    python -m benchmarks.sandbox
    python -m benchmarks.sandbox --checks 500 --rounds 5

Both sides run the same program with the same limits in the same kind of sandbox; the peer starts a worker for every
check and stops it after. Rounds go by turns, both sides with as many checks at a time as there are cores. The ratio
is the median over rounds of the pool's rate over the peer's.
"""

import argparse
import json
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

from fathom.options import positive
from fathom.tasks.sandbox import Calls, Limits, Outcome, Sandbox

CHECK = Calls("def double(x):\n    return 2 * x\n", "double", [(21,)])
EXPECTED = Outcome((42,), "ok")
PEER_SHARE = 10  # the peer gets so many times fewer checks, to take about as long


def rate_of_pool(pool: Sandbox, checks: int) -> float:
    """Checks per second through workers that stay."""
    start = time.perf_counter()
    outcomes = pool.run_many([CHECK] * checks)
    seconds = time.perf_counter() - start
    assert outcomes == [EXPECTED] * checks
    return checks / seconds


def rate_of_peer(at_a_time: int, checks: int) -> float:
    """Checks per second when each starts bubblewrap and Python, runs, and ends them."""

    def check(_: int) -> Outcome:
        with Sandbox(Limits(), workers=1) as fresh:
            return fresh.run(CHECK)

    start = time.perf_counter()
    with ThreadPoolExecutor(at_a_time) as threads:
        outcomes = list(threads.map(check, range(checks)))
    seconds = time.perf_counter() - start
    assert outcomes == [EXPECTED] * checks
    return checks / seconds


def main() -> None:
    """Measure, print, and a JSON line with the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checks", type=positive, default=1000, help="of the pool, per round")
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--workers", type=positive, default=os.cpu_count() or 1, help="checks at a time")
    options = parser.parse_args()
    rates: dict[str, list[float]] = {"pool": [], "start per check": []}
    with Sandbox(Limits(), workers=options.workers) as pool:
        rate_of_pool(pool, 20)  # warms up
        for turn in range(options.rounds):
            rates["pool"].append(rate_of_pool(pool, options.checks))
            rates["start per check"].append(rate_of_peer(options.workers, max(1, options.checks // PEER_SHARE)))
            shown = ", ".join(f"{name} {values[-1]:.0f}/s" for name, values in rates.items())
            print(f"round {turn + 1}: {shown}", flush=True)
    ratios = [ours / theirs for ours, theirs in zip(*rates.values(), strict=True)]
    result = {
        "benchmark": "sandbox",
        "ratio": round(statistics.median(ratios), 2),
        "ratio_min": round(min(ratios), 2),
        "ratio_max": round(max(ratios), 2),
        "checks_per_second": {name: round(statistics.median(values), 1) for name, values in rates.items()},
        "workers": options.workers,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
