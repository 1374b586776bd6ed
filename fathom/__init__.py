"""Fathom: train, teach to reason, distil and serve DeepSeek-V3/R1-style language models."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from fathom.data.tokenizer import Tokenizer
    from fathom.engine.engine import Engine
    from fathom.model.transformer import Transformer

__all__ = ["Engine", "Transformer", "load"]


# Imports wait for the first use: `import fathom`, and with it `fathom --help`, must not wait for torch.
def load(
    path: str | Path, dtype: "str | torch.dtype" = "bfloat16", device: "str | torch.device" = "cpu"
) -> "tuple[Transformer, Tokenizer | None]":
    """A model and its tokenizer (None where there is none) from a run, a model folder, a `.gguf` file or a hub name.

    A run's folder stands for its newest checkpoint. `dtype` is what the weights are held in: `bfloat16` or `float32`,
    by name or torch's own. Raises `fathom.errors.UserError`.
    """
    from fathom.model.checkpoint import load as load_folder
    from fathom.train.run import model_folder

    return load_folder(model_folder(path), dtype, device)


def __getattr__(name: str) -> Any:
    if name == "Engine":
        from fathom.engine.engine import Engine

        return Engine
    if name == "Transformer":
        from fathom.model.transformer import Transformer

        return Transformer
    raise AttributeError(f"module 'fathom' has no attribute {name!r}")
