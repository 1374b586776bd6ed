"""What a cache in FP8 costs or gains: tokens per second behind long contexts, with latents in bfloat16 and in FP8.

    python -m benchmarks.kv_cache
    python -m benchmarks.kv_cache --heads 128 --streams 1 --context 32768

A random model of the preset with packed weights, its cache filled with random latents, writes one token for each stream
and step, as a step of the engine does. Both caches hold the same latents and work in turns in one process. The ratio is
the median over rounds of FP8's speed over bfloat16's; with `bytes_per_token` it says what is paid for the memory.
"""

import argparse
import json
import statistics
import time

import torch
from torch import Tensor

from fathom.config.presets import PRESETS, preset
from fathom.engine.packing import packed
from fathom.kernels.ops import PAGE
from fathom.model.latents import pack_latents
from fathom.model.paged import PagedCache, PagedCall
from fathom.model.transformer import Transformer


def fill(wide: PagedCache, narrow: PagedCache) -> None:
    """The same random latents in both."""
    latent = wide.value_width
    for (keys, _), (stored, _) in zip(wide.pools, narrow.pools, strict=True):
        keys.normal_()
        stored.copy_(pack_latents(keys.flatten(0, 2), latent).view_as(stored))


def decode(model: Transformer, cache: PagedCache, tables: Tensor, begin: int, steps: int) -> float:
    """Seconds that `steps` tokens for each stream take, behind `begin` remembered ones."""
    streams = len(tables)
    ids = torch.zeros(streams, dtype=torch.int64)
    start = time.perf_counter()
    for position in range(begin, begin + steps):
        positions = torch.full((streams,), position)
        places = tables[:, position // PAGE].long() * PAGE + position % PAGE
        call = PagedCall(cache, positions, places, streams, tables, (positions + 1).int())
        ids = model.logits(model.hidden_states(ids[None], cache=call)[0][0]).argmax(dim=-1)
    return time.perf_counter() - start


@torch.inference_mode()
def main() -> None:
    """Measure, print, and a JSON line with the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", choices=PRESETS, default="fathom-latent512")
    parser.add_argument("--heads", type=int, help="query heads (the preset's)")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=16, help="new tokens of each stream and round")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    end = options.context + options.tokens
    config = preset(options.preset).replace(max_position_embeddings=end, num_nextn_predict_layers=0)
    if options.heads is not None:
        config = config.replace(num_attention_heads=options.heads)
    model = Transformer(config)
    model.init_weights(0)
    model.compute_dtype = torch.bfloat16
    model = packed(model)
    width = -(-end // PAGE)
    pages = width * options.streams
    caches = {
        name: PagedCache(config, pages=pages, dtype=torch.bfloat16, fp8=name == "fp8") for name in ("bfloat16", "fp8")
    }
    fill(*caches.values())
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(0))
    tables = order.to(torch.int32).view(options.streams, width)
    speeds: dict[str, list[float]] = {name: [] for name in caches}
    for cache in caches.values():
        decode(model, cache, tables, options.context, 2)
    for turn in range(options.rounds):
        for name, cache in caches.items():
            seconds = decode(model, cache, tables, options.context, options.tokens)
            speeds[name].append(options.streams * options.tokens / seconds)
        shown = ", ".join(f"{name} {values[-1]:,.1f}" for name, values in speeds.items())
        print(f"round {turn + 1}: {shown} tokens/s", flush=True)
    ratios = [fp8 / wide for wide, fp8 in zip(speeds["bfloat16"], speeds["fp8"], strict=True)]
    result = {
        "benchmark": "kv_cache",
        "ratio": round(statistics.median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
        "preset": options.preset,
        "heads": config.num_attention_heads,
        "context": options.context,
        "streams": options.streams,
        "tokens_per_second": {name: round(statistics.median(values), 1) for name, values in speeds.items()},
        "bytes_per_token": {name: cache.nbytes() // (pages * PAGE) for name, cache in caches.items()},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
