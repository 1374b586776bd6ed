"""Scales and e4m3 codes inside of kernels, in whole numbers: what `fathom.precision.tiles` defines, to the bit.

A float32 is rounded to a code by adding to its bits and shifting (above 2⁻⁶), or by adding a number whose last place is
worth one step (below). A code is read as the half-precision number with the same bits, 2⁸ times too small; half
precision has all of e4m3, and its small numbers on every GPU.

Two things Triton's interpreter (3.9) does otherwise than a GPU: converting to bfloat16 it drops bits instead of
rounding, and it multiplies bfloat16 matrices as if their bits were whole numbers. So rounding is done here in whole
numbers too (`narrow`), and in the interpreter factors are widened first (`multiply`), which changes no product.
"""

import triton
import triton.language as tl

TILE = tl.constexpr(128)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def magnitude_bits(x):
    """float32 -> the bits of |x|, ordered as numbers are: infinity above all, what is no number above that."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_of(bits, POWER_OF_TWO: tl.constexpr):
    """Bits of largest magnitudes -> scales of their tiles, float32."""
    largest = bits.to(tl.float32, bitcast=True)
    scale = tl.div_rn(largest, tl.full(largest.shape, 448.0, tl.float32))
    scale = tl.maximum(scale, 1.1754943508222875e-38)
    if POWER_OF_TWO:
        up = (scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000
        scale = up.to(tl.float32, bitcast=True)
    scale = tl.where(bits == 0, 1.0, scale)
    return tl.where(bits < 0x7F800000, scale, float("nan"))


@triton.jit
def codes_of(x, scale):
    """x and the scale of each number's tile, of one shape -> codes, uint8; no number where there is no scale."""
    scaled = tl.div_rn(x, scale)
    bits = scaled.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - 960
    small = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(size < 0x3C800000, small, normal) | ((bits >> 24) & 0x80)
    return tl.where(scale == scale, code, 0x7F).to(tl.uint8)


@triton.jit
def half_of(codes):
    """Codes, uint8 -> the numbers they stand for, float16."""
    wide = codes.to(tl.uint16)
    numbers = (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True) * 256.0
    return tl.where((codes & 0x7F) == 0x7F, float("nan"), numbers).to(tl.float16)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 -> `dtype`, float32 or bfloat16, to nearest, ties to even; what is no number stays none."""
    if dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)
        high = tl.where(x == x, rounded, bits | 0x400000) >> 16
        return high.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:  # noqa: RET505 (a branch that is decided while compiling)
        return x


@triton.jit
def multiply(a, b):
    """a [m, k] times b [k, n] with float32 sums, in the matrix units for the dtype of both."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:  # noqa: RET505 (as above)
        return tl.dot(a, b, input_precision="ieee")
