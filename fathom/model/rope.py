"""Rotary position embedding (arXiv 2104.09864) and the ways to stretch it.

A head's rotary dimensions are read as pairs, and pair i turns by position · θ^(−2i/d). Two layouts of the
pairs are in use: DeepSeek's weights hold them *interleaved*, (x0, x1), (x2, x3), …; Llama's and Qwen's hold
them as *two halves*, (x0, x[d/2]), (x1, x[d/2+1]), …. `rotate` reads either and always writes halves: queries
and keys get the same permutation, so q·k does not see it, and nothing is shuffled back.

Stretching beyond the trained context rescales the frequencies once, here: `linear` divides all of them,
`llama3` and `yarn` (arXiv 2309.00071) divide the slow ones and keep the fast ones. YaRN also has two
temperatures: a factor on cos and sin (`mscale` over `mscale_all_dim`, 1 in DeepSeek's configs), returned
here, and mscale² on the softmax scale, which is `ModelConfig.softmax_scale`.
"""

import math

import torch
from torch import Tensor

from fathom.config.model import ModelConfig, RopeScaling, yarn_mscale
from fathom.kernels import ops as kernels
from fathom.model import pointwise


def rope_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Angular frequencies [rotary_dim / 2] in float32 (radians per token), and the factor on cos and sin."""
    dim = config.rotary_dim
    steps = torch.arange(0, dim, 2, dtype=torch.float32, device="cpu")  # real even where the model is on meta
    frequencies = 1.0 / config.rope_theta ** (steps / dim)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies, 1.0
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor, 1.0
    if scaling.rope_type == "llama3":
        return _llama3(frequencies, scaling), 1.0
    return _yarn(frequencies, scaling, config.rope_theta, dim), _yarn_attention_factor(scaling)


def rope_tables(positions: Tensor, frequencies: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """cos and sin, each [..., time, rotary_dim / 2] float32, for integer `positions` [..., time]."""
    angles = positions[..., None].float() * frequencies
    return angles.cos() * factor, angles.sin() * factor


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """Turn `x` [..., rotary_dim] by `cos`, `sin` [..., rotary_dim / 2] (broadcast); the result is in halves."""
    in_one_row = x.dim() == 4 and x.shape[0] == cos.shape[0] == cos.shape[2] == 1
    if in_one_row and not interleaved and pointwise.fits(x):
        return pointwise.rotate(x[0], cos[0, :, 0], sin[0, :, 0])[None]
    if interleaved:
        first, second = x[..., 0::2].float(), x[..., 1::2].float()
    else:
        first, second = (half.float() for half in x.chunk(2, dim=-1))
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def rotate_heads(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """As `rotate`, for heads x [T, H, d] and cos, sin [T, d/2] of their tokens; without gradient."""
    if kernels.usable(x):
        return kernels.rotate(x, cos, sin, interleaved=interleaved)
    return rotate(x, cos.unsqueeze(1), sin.unsqueeze(1), interleaved=interleaved)


def _yarn(frequencies: Tensor, scaling: RopeScaling, theta: float, dim: int) -> Tensor:
    """Blend interpolated and original frequencies by how often a dimension turns in the original context."""

    def dimension_turning(rotations: float) -> float:
        assert scaling.original_max_position_embeddings is not None
        wavelengths = scaling.original_max_position_embeddings / (rotations * 2 * math.pi)
        return dim * math.log(wavelengths) / (2 * math.log(theta))

    low, high = dimension_turning(scaling.beta_fast), dimension_turning(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # a ramp needs a width
    ramp = ((torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low)).clamp(0, 1)
    return frequencies / scaling.factor * ramp + frequencies * (1 - ramp)


def _yarn_attention_factor(scaling: RopeScaling) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return yarn_mscale(scaling.factor, scaling.mscale) / yarn_mscale(scaling.factor, scaling.mscale_all_dim)
    return yarn_mscale(scaling.factor, 1.0)


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1: keep short wavelengths, divide long ones by `factor`, blend between."""
    assert scaling.original_max_position_embeddings is not None
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = smooth.clamp(0, 1)
    return frequencies * smooth + frequencies / scaling.factor * (1 - smooth)
