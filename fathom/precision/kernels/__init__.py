"""GPU kernels of FP8 training and latent decoding, in Triton: one source for NVIDIA and AMD.

Each is defined by a twin in plain PyTorch (`fathom.precision.tiles`, `fathom.precision.products`, and `twins.py` here).
The tests hold kernel and twin together in Triton's interpreter, on a CPU, over shapes that divide by nothing and
numbers that are none; they compile every kernel for every target of `targets.py` and read its registers, shared memory
and spills from the binary. **None has met a GPU so far**: `pytest -m gpu` runs the same comparisons there, and has not
been run.

| file | kernels |
|---|---|
| `quantise.py` | activations in 1×128 and 128×1 tiles, both from one reading; weights in 128×128 blocks |
| `products.py` | products of FP8 factors with promotion every 128 numbers, of one matrix or of a stack of experts |
| `fused.py` | RMSNorm and SwiGLU whose result is quantised before it is written |
| `attention.py` | absorbed latent attention of single tokens over pages |

Codes are read and written as bytes and converted in whole numbers, so that they are the same on every target, also
where the hardware has another eight-bit format (gfx942: e4m3 with another bias) or none (gfx1100). Triton is an extra
(`pip install 'fathom-lm[gpu]'`); importing this package does not import it.
"""

import importlib.util

import torch


def available(device: torch.device) -> bool:
    """Whether these kernels can run there: a GPU, and Triton is installed."""
    return device.type in ("cuda", "xpu") and importlib.util.find_spec("triton") is not None
