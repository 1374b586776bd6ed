import pytest
import torch
import torch.nn.functional as F

from fathom.kernels.library import library
from fathom.model import pointwise
from fathom.model.layers import RMSNorm
from fathom.model.rope import rotate

pytestmark = pytest.mark.skipif(library() is None, reason="no kernels on this machine")

DTYPES = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 8e-3)])


def draw(*shape, dtype, spread=1.0):
    return (spread * torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + shape[-1]))).to(dtype)


def compare(ours, plain, inputs, tolerance):
    """Values and gradients of `ours` against `plain` in float64, for an upstream gradient of every sign."""
    wide = [x.detach().double().requires_grad_() for x in inputs]
    inputs = [x.detach().requires_grad_() for x in inputs]
    y, expected = ours(*inputs), plain(*wide)
    upstream = draw(*y.shape, dtype=y.dtype)
    gradients = torch.autograd.grad(y, inputs, upstream)
    wanted = torch.autograd.grad(expected, wide, upstream.double())
    for got, want in zip((y, *gradients), (expected, *wanted), strict=True):
        assert got.shape == want.shape
        assert (got.double() - want).norm() <= tolerance * want.norm()


@DTYPES
@pytest.mark.parametrize("width", [3, 16, 37, 576])
def test_norm_equals_its_formula(width, dtype, tolerance):
    """Values and both gradients are those of x / rms(x) · weight, for widths that do and do not fill registers."""
    x, weight = draw(3, 5, width, dtype=dtype, spread=3.0), draw(width, dtype=torch.float32)

    def plain(x, weight):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight

    compare(lambda x, w: pointwise.rms_norm(x, w, 1e-5), plain, (x, weight), tolerance)


def test_norm_takes_any_strides():
    """Inputs, weights and upstream gradients that do not lie in one piece are read in their own order."""
    x = draw(6, 4, 32, dtype=torch.float32).transpose(0, 1).requires_grad_()
    weight = draw(2, 32, dtype=torch.float32).T[:, 0].requires_grad_()
    upstream = draw(32, 4, 6, dtype=torch.float32).permute(1, 2, 0)
    strided = torch.autograd.grad(pointwise.rms_norm(x, weight, 1e-6), (x, weight), upstream)
    copies = [tensor.detach().contiguous().requires_grad_() for tensor in (x, weight)]
    whole = torch.autograd.grad(pointwise.rms_norm(*copies, 1e-6), copies, upstream.contiguous())
    for got, want in zip(strided, whole, strict=True):
        assert torch.equal(got, want)


@DTYPES
@pytest.mark.parametrize("count", [1, 16, 131, 70_000])
def test_gate_equals_its_formula(count, dtype, tolerance):
    """Values and gradients are those of silu(gate) · up, out to gates where e^-g overflows."""
    gate, up = draw(count, dtype=dtype, spread=30.0), draw(2, count, dtype=dtype)[1]
    compare(pointwise.gated, lambda g, u: F.silu(g) * u, (gate, up), tolerance)


@DTYPES
def test_rotation_equals_its_formula(dtype, tolerance):
    """Values and gradients are those of the plain rotation, for heads cut out of a wider row."""
    x = draw(7, 3, 80, dtype=dtype)[..., 8:72]
    angles = draw(7, 32, dtype=torch.float32)

    def plain(x):
        c, s = (t[:, None].double() for t in (angles.cos(), angles.sin()))
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * c - b * s, b * c + a * s), dim=-1)

    compare(lambda x: pointwise.rotate(x, angles.cos(), angles.sin()), plain, (x,), tolerance)


def test_layers_choose_these_forms_only_where_they_fit(monkeypatch):
    """A float32 norm and a row of heads in halves go through the kernels; pairs, batches and float64 do not."""
    seen = []
    for name in ("rms_norm", "rotate"):
        original = getattr(pointwise, name)
        monkeypatch.setattr(pointwise, name, lambda *a, n=name, f=original: seen.append(n) or f(*a))
    RMSNorm(8, 1e-6)(torch.randn(2, 8))
    RMSNorm(8, 1e-6)(torch.randn(2, 8, dtype=torch.float64))
    cos, sin = torch.randn(2, 1, 5, 1, 4)
    rotate(torch.randn(1, 5, 3, 8), cos, sin, interleaved=False)
    rotate(torch.randn(1, 5, 3, 8), cos, sin, interleaved=True)
    rotate(torch.randn(2, 5, 3, 8), cos.expand(2, -1, -1, -1), sin.expand(2, -1, -1, -1), interleaved=False)
    assert seen == ["rms_norm", "rotate"]
