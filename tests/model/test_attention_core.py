import pytest
import torch

from fathom.kernels import training
from fathom.model import attention_core
from fathom.model.attention_core import causal_attention

SCALE = 0.2


def make_inputs(B, H, Hkv, T, dtype, Dqk=24, Dv=16):
    torch.manual_seed(0)
    shapes = [(B, H, T, Dqk), (B, Hkv, T, Dqk), (B, Hkv, T, Dv)]
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def reference(q, k, v):
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    above = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    scores = (q @ k.transpose(-1, -2) * SCALE).masked_fill(above, float("-inf"))
    return scores.softmax(-1) @ v


def value_and_gradients(function, inputs):
    output = function(*inputs)
    torch.manual_seed(1)
    upstream = torch.randn(output.shape, dtype=torch.float64).to(output.dtype)
    return output, *torch.autograd.grad(output, inputs, upstream)


def relative_error(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-3)).item()


@pytest.mark.parametrize(
    "shape",
    [(2, 4, 2, 1), (2, 3, 3, 128), (1, 6, 1, 129), (2, 4, 2, 300), (13, 6, 6, 130)],
)
def test_value_and_gradients_equal_dense_attention(shape):
    """Blocks, folded groups and ragged last blocks give the dense value and gradients in float64."""
    inputs = make_inputs(*shape, torch.float64)
    actual = value_and_gradients(lambda q, k, v: causal_attention(q, k, v, SCALE), inputs)
    torch.testing.assert_close(actual, value_and_gradients(reference, inputs), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
def test_low_precision_stays_near_float64(dtype, tolerance):
    """Value and gradients differ from float64 by no more than the type's rounding explains."""
    inputs = make_inputs(2, 4, 2, 200, dtype)
    actual = value_and_gradients(lambda q, k, v: causal_attention(q, k, v, SCALE), inputs)
    expected = value_and_gradients(reference, [x.detach().double().requires_grad_() for x in inputs])
    for ours, exact in zip(actual, expected, strict=True):
        assert ours.dtype == dtype
        assert relative_error(ours, exact) < tolerance


@pytest.mark.parametrize(
    ("shape", "widths"),
    [((2, 4, 2, 1), (24, 16)), ((1, 6, 1, 129), (96, 64)), ((3, 3, 3, 600), (34, 50)), ((1, 4, 2, 33), (2, 2))],
)
def test_kernels_equal_the_operators(monkeypatch, shape, widths):
    """The kernels are as near to float64 as the form in PyTorch's operators, or as bfloat16 allows."""
    if not training.available():
        pytest.skip("no kernels for training on this machine")
    inputs = make_inputs(*shape, torch.bfloat16, *widths)
    ours = value_and_gradients(lambda q, k, v: causal_attention(q, k, v, SCALE), inputs)
    monkeypatch.setattr(training, "attention_fits", lambda q, v: False)
    theirs = value_and_gradients(lambda q, k, v: causal_attention(q, k, v, SCALE), inputs)
    exact = value_and_gradients(reference, [x.detach().double().requires_grad_() for x in inputs])
    for kernel, operator, wanted in zip(ours, theirs, exact, strict=True):
        assert relative_error(kernel, wanted) <= max(5e-3, relative_error(operator, wanted))


@pytest.mark.parametrize("mean", [1.0, 2.0])
def test_gradients_survive_what_keys_have_in_common(mean):
    """Where all keys and values share a mean, as trained models' do, the kernels' gradients stay near float64's."""
    if not training.available():
        pytest.skip("no kernels for training on this machine")
    drawn = make_inputs(1, 2, 2, 300, torch.float64, 96, 64)
    inputs = [(x.detach() * 0.3 + mean).to(torch.bfloat16).requires_grad_() for x in drawn]
    ours = value_and_gradients(lambda q, k, v: causal_attention(q, k, v, SCALE), inputs)
    exact = value_and_gradients(reference, [x.detach().double().requires_grad_() for x in inputs])
    for kernel, wanted in zip(ours, exact, strict=True):
        assert relative_error(kernel, wanted) < 1e-2 * mean


def test_a_query_does_not_depend_on_the_others():
    """The last queries alone, over all keys, give the bits that they give among all queries."""
    q, k, v = (x.detach() for x in make_inputs(2, 4, 2, 300, torch.bfloat16))
    whole = causal_attention(q, k, v, SCALE)
    for count in (1, 44, 172):  # a part begins where a block of the operators' form begins, or is one query
        if training.available() or (300 - count) % attention_core.QUERY_BLOCK == 0:
            assert torch.equal(whole[:, :, -count:], causal_attention(q[:, :, -count:], k, v, SCALE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", [0, 1])
def test_what_is_no_number_is_not_hidden(which, bad, dtype):
    """A query or key that is not finite makes the outputs that read it NaN: training must see that it diverges."""
    inputs = [x.detach() for x in make_inputs(1, 2, 2, 40, dtype)]
    inputs[which][0, 1, 20] = bad
    out = causal_attention(*inputs, SCALE)
    assert out[0, 1, 20].isnan().all()
    assert out[0, 0].isfinite().all()


def test_two_runs_are_bitwise_equal():
    """The same input gives the same bits, forward and backward."""
    inputs = make_inputs(2, 6, 6, 257, torch.bfloat16)
    runs = [value_and_gradients(lambda q, k, v: causal_attention(q, k, v, SCALE), inputs) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_output_does_not_see_the_future():
    """Changing keys and values after position t changes no bit of the outputs up to t."""
    q, k, v = (x.detach() for x in make_inputs(1, 2, 2, 300, torch.bfloat16))
    before = causal_attention(q, k, v, SCALE)
    k[:, :, 150:], v[:, :, 150:] = 7.0, -7.0
    assert torch.equal(before[:, :, :150], causal_attention(q, k, v, SCALE)[:, :, :150])


def test_transposed_views_are_taken_as_they_are():
    """[B, T, H, D] memory viewed as [B, H, T, D] gives the bits that contiguous memory gives."""
    inputs = [x.detach() for x in make_inputs(2, 4, 2, 140, torch.bfloat16)]
    views = [x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in inputs]
    contiguous = [x.clone().requires_grad_() for x in inputs]
    actual, expected = (
        value_and_gradients(lambda q, k, v: causal_attention(q, k, v, SCALE), x) for x in (views, contiguous)
    )
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("batch", [1, 2])
def test_operators_obey_the_compiler_contract(batch, kernels):
    """Fake shapes, strides and autograd agree with what the operators do, of views too: torch.compile relies on it."""
    if kernels and not training.available():
        pytest.skip("no kernels for training on this machine")
    inputs = make_inputs(batch, 4, 2, 130, torch.bfloat16)
    views = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in inputs]
    for q, k, v in (inputs, views):
        torch.library.opcheck(attention_core.attention_forward, (q, k, v, SCALE, kernels))
        o, log_sums = attention_core.attention_forward(q, k, v, SCALE, kernels)
        rest = [x.detach() for x in (torch.randn_like(o), q, k, v, log_sums)]
        torch.library.opcheck(attention_core.attention_backward, (*rest, SCALE, kernels))


def test_unfit_shapes_are_refused():
    """Query heads that key heads do not divide are refused with the shapes in the message."""
    q, k, v = make_inputs(1, 3, 2, 4, torch.float32)
    with pytest.raises(ValueError, match="shapes do not fit"):
        causal_attention(q, k, v, SCALE)


def test_unlike_types_are_refused():
    """Types that differ are refused: the kernels read numbers where they lie."""
    q, k, v = make_inputs(1, 2, 2, 4, torch.bfloat16)
    for mixed in ((q, k.float(), v.float()), (q, k, v.float()), (q.float(), k, v)):
        with pytest.raises(ValueError, match="types differ"):
            causal_attention(*mixed, SCALE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_queries_are_refused(dtype):
    """Neither form is asked to attend for nobody."""
    with pytest.raises(ValueError, match="shapes do not fit"):
        causal_attention(*make_inputs(1, 2, 2, 0, dtype), SCALE)
