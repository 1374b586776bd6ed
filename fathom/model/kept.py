"""What autograd keeps of a pass through a model's layers, counted on a real one."""

from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from fathom.config.model import ModelConfig
from fathom.config.recipe import Precision
from fathom.model.fp8 import train_in_fp8
from fathom.model.transformer import Transformer
from fathom.precision.fp8 import FP8
from fathom.precision.recompute import Recompute


def kept_bytes(config: ModelConfig, precision: Precision, *, recompute: bool, sequences: int, time: int) -> int:
    """Bytes of all memory that autograd keeps of the layers' pass over so many sequences of `time` tokens.

    Each piece of memory counts once, weights in another dtype included: what activations take is the difference between
    two numbers of sequences. Random weights and tokens, without compilation.
    """
    model = Transformer(config)
    model.init_weights(1)
    model.compute_dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    if precision == "fp8":
        train_in_fp8(model, FP8())
    kept = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        kept[storage._cdata] = storage
        return x

    def keeping() -> AbstractContextManager[object]:
        return Recompute(keep) if recompute else saved_tensors_hooks(keep, lambda x: x)

    model.keeping = keeping
    generator = torch.Generator().manual_seed(0)
    model.hidden_states(torch.randint(0, config.vocab_size, (sequences, time), generator=generator))
    return sum(storage.nbytes() for storage in kept.values())
