import pytest
import torch
import torch.nn.functional as F

from fathom.model import cross_entropy
from fathom.model.cross_entropy import chunked_cross_entropy


def make_inputs(N=70, d=16, V=50, dtype=torch.float32, spread=1.0):
    torch.manual_seed(0)
    hidden = (spread * torch.randn(N, d)).to(dtype).requires_grad_()
    weight = torch.randn(V, d).requires_grad_()
    targets = torch.randint(V, (N,))
    targets[::5] = -100
    return hidden, weight, targets


def loss_and_gradients(hidden, weight, targets, chunk):
    loss_sum, _ = chunked_cross_entropy(hidden, weight, targets, chunk=chunk)
    loss = 3.0 * loss_sum / (targets != -100).sum()
    return loss, *torch.autograd.grad(loss, (hidden, weight))


def exact(hidden, weight, targets):
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    loss = 3.0 * F.cross_entropy(hidden @ weight.t(), targets)
    return loss, *torch.autograd.grad(loss, (hidden, weight))


def assert_near(actual, expected, tolerance):
    for ours, wanted in zip(actual, expected, strict=True):
        assert ours.shape == wanted.shape
        assert (ours.double() - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize("chunk", [1, 16, 70, 256])
def test_loss_and_gradients_equal_the_whole_softmax(chunk):
    """No chunk size, ragged or larger than the input, changes the mean loss or its scaled gradients."""
    inputs = make_inputs()
    assert_near(loss_and_gradients(*inputs, chunk), exact(*inputs), 2e-6)


def test_bfloat16_hidden_with_float32_master():
    """bfloat16 hidden states beside a float32 head: near float64; the head's gradient is float32."""
    inputs = make_inputs(N=300, dtype=torch.bfloat16)
    actual = loss_and_gradients(*inputs, 64)
    assert_near(actual, exact(*inputs), 1e-2)
    assert [x.dtype for x in actual] == [torch.float32, torch.bfloat16, torch.float32]


def test_hopeless_tokens_keep_a_finite_exact_loss():
    """A target whose probability underflows float32 still has the right loss, not infinity."""
    hidden, weight, targets = make_inputs(spread=60.0)
    loss, dhidden, dweight = loss_and_gradients(hidden, weight, targets, 16)
    assert loss > 300
    assert_near((loss, dhidden, dweight), exact(hidden, weight, targets), 1e-5)


def test_token_losses_sum_to_the_loss():
    """The per-token losses are those of the whole softmax, 0 where ignored, detached, and sum to the loss."""
    hidden, weight, targets = make_inputs()
    loss_sum, token_losses = chunked_cross_entropy(hidden, weight, targets)
    assert not token_losses.requires_grad
    expected = F.cross_entropy(hidden @ weight.t(), targets, reduction="none").detach()
    torch.testing.assert_close(token_losses, expected)
    torch.testing.assert_close(token_losses.sum(), loss_sum.detach())


def test_all_ignored_is_zero_not_nan():
    """With no target left the sum and the gradients are zero."""
    hidden, weight, targets = make_inputs()
    loss_sum, _ = chunked_cross_entropy(hidden, weight, targets.fill_(-100))
    loss_sum.backward()
    assert [x.count_nonzero().item() for x in (loss_sum, hidden.grad, weight.grad)] == [0, 0, 0]


def test_one_head_may_be_used_twice():
    """Two losses on one weight (main and multi-token-prediction head) add up in its gradient."""
    hidden, weight, targets = make_inputs()
    first = chunked_cross_entropy(hidden, weight, targets)[0]
    second = chunked_cross_entropy(hidden.flip(0), weight, targets)[0]
    (both,) = torch.autograd.grad(first + 0.3 * second, weight, retain_graph=True)
    parts = [torch.autograd.grad(x, weight)[0] for x in (first, second)]
    torch.testing.assert_close(both, parts[0] + 0.3 * parts[1])


def test_a_frozen_side_gets_no_gradient():
    """With one side frozen, or no_grad, the loss is the same and only what is wanted has a gradient."""
    hidden, weight, targets = make_inputs()
    expected = chunked_cross_entropy(hidden, weight, targets)[0]
    for frozen_hidden, frozen_weight in ((hidden.detach(), weight), (hidden, weight.detach())):
        loss_sum = chunked_cross_entropy(frozen_hidden, frozen_weight, targets)[0]
        loss_sum.backward()
        assert torch.equal(loss_sum, expected)
    assert hidden.grad.any()
    assert weight.grad.any()
    with torch.no_grad():
        assert not chunked_cross_entropy(hidden, weight, targets)[0].requires_grad


def test_two_runs_are_bitwise_equal():
    """The same input gives the same bits of loss and gradients."""
    inputs = make_inputs(N=600, dtype=torch.bfloat16)
    runs = [loss_and_gradients(*inputs, 256) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_operator_obeys_the_compiler_contract():
    """Fake shapes, schema and autograd agree with what the operator does: torch.compile relies on it."""
    torch.library.opcheck(cross_entropy._cross_entropy, (*make_inputs(), -100, 16, True, True))


def test_unfit_shapes_are_refused():
    """A head of another width is refused with the shapes in the message."""
    hidden, weight, targets = make_inputs()
    with pytest.raises(ValueError, match="shapes do not fit"):
        chunked_cross_entropy(hidden, weight[:, :-1], targets)
