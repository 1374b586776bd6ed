"""What `train.precision` and `train.recompute` make of a model: a policy, applied once, that no layer has to ask for.

| | fp32 | bf16 | fp8 (DeepSeek-V3 §3.3) |
|---|---|---|---|
| activations between layers, attention, router's input | float32 | bfloat16 | bfloat16 |
| linear layers and experts multiply | float32 | bfloat16 | e4m3 in tiles and blocks, sums promoted to float32 |
| embedding, head, MTP's `eh_proj`, norms' results | float32 | bfloat16 | bfloat16 |
| router's scores, softmax, norms' statistics, loss | float32 | float32 | float32 |
| kept of a linear layer's input | float32 | bfloat16 | e4m3; behind attention e5m6; of SwiGLU's result its inputs |
| weights, gradients of weights | float32 | float32 | float32 |
| moments | `optimizer.state_dtype` | the same | the same (V3: bfloat16) |
"""

import torch

from fathom.config.recipe import Precision
from fathom.errors import UserError
from fathom.model.fp8 import train_in_fp8
from fathom.model.transformer import Transformer
from fathom.precision.fp8 import FP8
from fathom.precision.recompute import Recompute
from fathom.train.machine import device, use_bf16


def set_precision(
    model: Transformer, precision: Precision, *, recompute: bool = False, gradient_blocks: bool = False
) -> FP8 | None:
    """Let `model` compute as the recipe says. Returns what its layers share if that is FP8.

    `recompute` and `gradient_blocks` are those of `Recompute` and `FP8`. Raises `UserError` where there is no FP8.
    """
    model.compute_dtype = torch.bfloat16 if use_bf16(precision) else torch.float32
    if recompute:
        model.keeping = Recompute
    if precision != "fp8":
        return None
    require_fp8(device())
    fp8 = FP8(gradient_blocks=gradient_blocks)
    train_in_fp8(model, fp8)
    return fp8


def take_bad_tiles(fp8: FP8 | None) -> int:
    """FP8 tiles without a number since this was asked last; 0 where nothing is in FP8."""
    return 0 if fp8 is None else fp8.take_bad_tiles()


def fp8_notice(fp8: FP8 | None) -> str | None:
    """What is to be said of eight bits when a run begins, if anything."""
    if fp8 is None or device().type != "cpu":
        return None
    return "linear layers multiply in FP8, which a CPU emulates: it takes less memory, and more time than bf16"


def require_fp8(where: torch.device) -> None:
    """Raise `UserError` where PyTorch has no float8_e4m3fn, or `where` cannot convert to it."""
    advice = "set train.precision to bf16, or use PyTorch ≥ 2.13 on a device that has it (a CPU does)"
    e4m3 = getattr(torch, "float8_e4m3fn", None)
    if e4m3 is None:
        lacking = f"torch.float8_e4m3fn, which PyTorch {torch.__version__} lacks"
        raise UserError(f"train.precision = fp8 needs {lacking}; {advice}")
    try:
        torch.ones(1, device=where).to(e4m3).float().cpu()
    except (RuntimeError, TypeError, NotImplementedError) as error:
        lacking = f"float8_e4m3fn, which is missing on {where.type} ({str(error).splitlines()[0]})"
        raise UserError(f"train.precision = fp8 needs {lacking}; {advice}") from None
