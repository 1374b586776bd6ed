"""What each choice of the FP8 recipe is worth in a single product: relative errors beside float64.

    python -m benchmarks.fp8_errors [--inner 4096]

Three tables, each of normal factors, errors over a product of 64 × 64 outputs:

1. Accumulation (V3 §3.3.2, §3.5.2): Hopper's fourteen bits with and without promotion, against sums without error.
   Both readings of "relative" are printed: the largest error over the root mean square of the outputs, and, for factors
   that are all positive and cannot cancel, over each output itself.
2. Scaling: one scale per tensor, 1 × 128 tiles and 128 × 128 blocks, as outliers of growing size are strewn into the
   activations (one number in 4,096).
3. Gradients of activations in 128 × 128 blocks instead of tiles, where a few tokens' gradients are large (App. B.2).

The last line is JSON; `ratio` is the error without promotion over the one with it.
"""

import argparse
import json
import math

import torch
from torch import Tensor

from fathom.precision.products import scaled_product
from fathom.precision.tiles import (
    E4M3_MAX,
    TILE,
    Tiles,
    dequantise_rows,
    quantise_blocks,
    quantise_rows,
    spread,
)

SIDE = 64
OUTLIERS = [1, 100, 10_000, 1_000_000]


def main() -> None:
    """Print the tables and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--inner", type=int, default=4096, help="K, a multiple of 128")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(options.seed)
    accumulation = _accumulation(options.inner, generator)
    print(f"K = {options.inner}: largest error        of the outputs' size    of a positive output")
    for name, (normal, positive) in accumulation.items():
        print(f"{name:36} {normal:16.3%} {positive:20.3%}")
    print("\nerror of the product (norm) with one activation in 4,096 this many times larger")
    scaling = _scaling(options.inner, generator)
    print(f"{'':24}" + "".join(f"{size:>14,}" for size in OUTLIERS))
    for name, row in scaling.items():
        print(f"{name:24}" + "".join(f"{value:14.3%}" for value in row))
    print("\nerror of dx (norm, tokens without outliers), one token in 64 with a gradient this many times larger")
    gradients = _gradients(options.inner, generator)
    for name, row in gradients.items():
        print(f"{name:24}" + "".join(f"{value:14.3%}" for value in row))
    promoted, plain = accumulation["14 bits, promoted every 128"][0], accumulation["14 bits, no promotion"][0]
    result = {"accumulation": accumulation, "scaling": scaling, "gradients": gradients}
    print(json.dumps({"benchmark": "fp8_errors", "ratio": round(plain / promoted, 2), "inner": options.inner} | result))


def _accumulation(inner: int, generator: torch.Generator) -> dict[str, tuple[float, float]]:
    kinds = {
        "sums without error, promoted": ("exact", TILE),
        "14 bits, promoted every 128": ("hopper", TILE),
        "14 bits, no promotion": ("hopper", None),
    }
    found: dict[str, list[float]] = {name: [] for name in kinds}
    for draw in (torch.randn, torch.rand):
        a, w = (_one_scale(draw(SIDE, inner, generator=generator)) for _ in range(2))
        exact = dequantise_rows(a).double() @ dequantise_rows(w).double().T
        size = exact.pow(2).mean().sqrt() if draw is torch.randn else exact.abs()
        for name, (accumulator, every) in kinds.items():
            error = (scaled_product(a, w, accumulator=accumulator, promote_every=every) - exact).abs() / size
            found[name].append(float(error.max()))
    return {name: (errors[0], errors[1]) for name, errors in found.items()}


def _scaling(inner: int, generator: torch.Generator) -> dict[str, list[float]]:
    w = torch.randn(SIDE, inner, generator=generator)
    found: dict[str, list[float]] = {"one scale per tensor": [], "1 × 128 tiles": [], "128 × 128 blocks": []}
    for size in OUTLIERS:
        x = torch.randn(SIDE, inner, generator=generator)
        places = torch.randperm(x.numel(), generator=generator)[: max(1, x.numel() // 4096)]
        plain = torch.ones_like(x, dtype=torch.bool)
        plain.view(-1)[places] = False
        x.view(-1)[places] *= size
        # What outliers themselves contribute would hide what becomes of the others.
        exact = (x * plain).double() @ w.double().T
        for name, kept in zip(found, (dequantise_rows(_one_scale(x)), _rows(x), _blocks(x)), strict=True):
            found[name].append(_distance((kept * plain).double() @ _rows(w).double().T, exact))
    return found


def _gradients(width: int, generator: torch.Generator) -> dict[str, list[float]]:
    w = torch.randn(width, SIDE, generator=generator)
    found: dict[str, list[float]] = {"1 × 128 tiles": [], "128 × 128 blocks": []}
    for size in OUTLIERS:
        dy = torch.randn(2 * TILE, width, generator=generator)
        large = torch.arange(len(dy)) % 64 == 0
        dy[large] *= size
        exact = (dy.double() @ w.double())[~large]
        for name, kept in zip(found, (_rows(dy), _blocks(dy)), strict=True):
            found[name].append(_distance((kept.double() @ _blocks(w).double())[~large], exact))
    return found


def _one_scale(x: Tensor) -> Tiles:
    scale = float(x.abs().max()) / E4M3_MAX
    return Tiles((x / scale).to(torch.float8_e4m3fn), torch.full((len(x), math.ceil(x.shape[1] / TILE)), scale))


def _rows(x: Tensor) -> Tensor:
    return dequantise_rows(quantise_rows(x))


def _blocks(x: Tensor) -> Tensor:
    tiles = quantise_blocks(x)
    return tiles.codes.float() * spread(tiles.scales.repeat_interleave(TILE, dim=0)[: len(x)], x.shape[1])


def _distance(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


if __name__ == "__main__":
    main()
