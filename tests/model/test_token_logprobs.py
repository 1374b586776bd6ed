import math

import pytest
import torch

from fathom.kernels.library import library
from fathom.model import token_logprobs
from fathom.model.cross_entropy import chunked_cross_entropy
from fathom.model.token_logprobs import Head, logprobs_and_entropy

with_kernels = pytest.mark.skipif(library() is None, reason="no kernels on this machine")


def make_inputs(S=70, d=16, V=50, dtype=torch.float32, spread=1.0):
    torch.manual_seed(0)
    hidden = (spread * torch.randn(S, d)).to(dtype).requires_grad_()
    return hidden, torch.randn(V, d).requires_grad_(), torch.randint(V, (S,))


def ours(hidden, weight, targets, *more, **options):
    return logprobs_and_entropy(hidden, Head.of(weight, hidden.dtype), targets, *more, **options)


def whole(hidden, weight, targets, temperature=1.0):
    """Log-probabilities and entropies of the whole softmax in float64."""
    logprobs = (hidden.double() @ weight.double().t() / temperature).log_softmax(1)
    return logprobs.gather(1, targets[:, None]).squeeze(1), -(logprobs.exp() * logprobs).sum(1)


def assert_near(actual, expected, tolerance):
    for ours, wanted in zip(actual, expected, strict=True):
        assert ours.shape == wanted.shape
        assert (ours.double() - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("chunk", [1, 16, 70, 256])
def test_equal_the_whole_softmax_under_any_upstream_gradient(chunk, temperature):
    """Each token's log-probability has a gradient of its own, of any sign or zero; no chunk size changes a thing."""
    inputs = make_inputs()
    upstream = torch.randn(70, generator=torch.Generator().manual_seed(1)) * (torch.arange(70) % 3 > 0)
    logprobs, entropy = ours(*inputs, temperature, chunk=chunk)
    expected, expected_entropy = whole(*inputs, temperature)
    assert_near((logprobs, entropy), (expected, expected_entropy), 1e-6)
    gradients = torch.autograd.grad(logprobs, inputs[:2], upstream)
    assert_near(gradients, torch.autograd.grad(expected, inputs[:2], upstream.double()), 2e-6)
    assert not entropy.requires_grad


def test_gradients_pass_finite_differences():
    """In float64 everything stays float64, and finite differences agree with both gradients."""
    hidden, weight, targets = make_inputs(S=7, d=3, V=5)
    inputs = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    assert torch.autograd.gradcheck(lambda h, w: ours(h, w, targets, 0.7, chunk=3)[0], inputs)


@pytest.mark.parametrize("kept_bytes", [1 << 28, 0])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("words", [50, 64, 131])
def test_bfloat16_keeps_float32_logits(words, temperature, kept_bytes, monkeypatch):
    """Large logits of bfloat16 inputs lose nothing: 1e-4 nats, where logits rounded to bfloat16 are 0.1 off.

    Whether the softmax is kept or made again, for vocabularies that do and do not fill registers and panels.
    """
    monkeypatch.setattr(token_logprobs, "KEPT_BYTES", kept_bytes)
    hidden, weight, targets = make_inputs(V=words, dtype=torch.bfloat16, spread=8.0)
    logprobs, entropy = ours(hidden, weight, targets, temperature, chunk=32)
    expected, expected_entropy = whole(hidden, weight.bfloat16(), targets, temperature)
    assert (logprobs - expected).abs().max() < 1e-4
    assert (entropy - expected_entropy).abs().max() < 1e-4
    upstream = torch.randn(70, generator=torch.Generator().manual_seed(1)) * (torch.arange(70) % 3 > 0)
    gradients = torch.autograd.grad(logprobs, (hidden, weight), upstream)
    assert [x.dtype for x in gradients] == [torch.bfloat16, torch.float32]
    assert_near(gradients, torch.autograd.grad(expected, (hidden, weight), upstream.double()), 1e-2)


@with_kernels
def test_kept_and_made_again_are_the_same_bits(monkeypatch):
    """Where the softmax is made again in backward, for the memory's sake, gradients do not change by a bit."""
    gradients = []
    for kept_bytes in (1 << 28, 0):
        monkeypatch.setattr(token_logprobs, "KEPT_BYTES", kept_bytes)
        hidden, weight, targets = make_inputs(dtype=torch.bfloat16)
        gradients.append(torch.autograd.grad(ours(hidden, weight, targets, chunk=32)[0].sum(), (hidden, weight)))
    assert all(torch.equal(kept, again) for kept, again in zip(*gradients, strict=True))


def test_a_certain_token_keeps_its_small_gradient():
    """1 - p of a token that is all but certain survives bfloat16, in which p itself would be 1."""
    hidden = torch.tensor([[1.0, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    weight = torch.tensor([[8.5, 0.0], [0.0, 0.0]], requires_grad=True)
    logprobs, _ = ours(hidden, weight, torch.tensor([0]))
    logprobs.sum().backward()
    assert weight.grad[0, 0] == pytest.approx(1 - 1 / (1 + math.exp(-8.5)), rel=1e-2)


def test_agree_with_the_cross_entropy():
    """The two forms are each other's oracle: losses are minus the log-probabilities, gradients alike."""
    hidden, weight, targets = make_inputs()
    loss_sum, losses = chunked_cross_entropy(hidden, weight, targets)
    logprobs, _ = ours(hidden, weight, targets)
    torch.testing.assert_close(-logprobs.detach(), losses)
    gradients = [torch.autograd.grad(x, (hidden, weight)) for x in (-logprobs.sum(), loss_sum)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_side_gets_no_gradient(dtype):
    """With one side frozen the other's gradient is the same; under no_grad there is none."""
    hidden, weight, targets = make_inputs(dtype=dtype)
    both = torch.autograd.grad(ours(hidden, weight, targets)[0].sum(), (hidden, weight))
    (of_hidden,) = torch.autograd.grad(ours(hidden, weight.detach(), targets)[0].sum(), hidden)
    (of_weight,) = torch.autograd.grad(ours(hidden.detach(), weight, targets)[0].sum(), weight)
    assert torch.equal(of_hidden, both[0])
    assert torch.equal(of_weight, both[1])
    with torch.no_grad():
        assert not ours(hidden, weight, targets)[0].requires_grad


def test_only_tokens_with_a_gradient_are_computed_again(monkeypatch):
    """Backward makes the logits of no token whose upstream gradient is 0: clipped tokens and even groups are free."""
    seen = []
    original = Head.logits
    monkeypatch.setattr(Head, "logits", lambda self, rows: seen.append(len(rows)) or original(self, rows))
    logprobs, _ = ours(*make_inputs())
    assert sum(seen) == 70
    logprobs[1:5].sum().backward()
    assert sum(seen) == 74


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_that_is_no_number_stays_none(dtype):
    """A NaN in one hidden state makes that token's log-probability NaN, not a plausible figure, and no other's."""
    hidden, weight, targets = make_inputs(dtype=dtype)
    poisoned = hidden.detach().clone()
    poisoned[3] = torch.nan
    logprobs, entropy = ours(poisoned, weight, targets)
    assert logprobs.isnan().nonzero().tolist() == entropy.isnan().nonzero().tolist() == [[3]]


def test_unfit_shapes_targets_and_temperatures_are_refused():
    """A head of another width, words that there are not and temperature 0 are refused with what was given."""
    hidden, weight, targets = make_inputs()
    with pytest.raises(ValueError, match="shapes do not fit"):
        ours(hidden, weight[:, :-1], targets)
    with pytest.raises(ValueError, match=r"must be positive, not 0\.0"):
        ours(hidden, weight, targets, temperature=0.0)
    for word in (50, -1):
        with pytest.raises(ValueError, match=rf"targets must be in 0\.\.49, not .*{word}"):
            ours(hidden, weight, targets.masked_fill(targets == targets[0], word))


def test_no_tokens_have_no_logprobs():
    """An empty batch gives empty results and gradients of zero."""
    hidden, weight, targets = make_inputs(S=0)
    logprobs, entropy = ours(hidden, weight, targets)
    assert logprobs.shape == entropy.shape == (0,)
    logprobs.sum().backward()
    assert not weight.grad.any()
