import pytest
import torch
import torch.nn.functional as F

from fathom.model import cross_entropy
from fathom.model.cross_entropy import chunked_cross_entropy, logprobs_and_entropy


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


def whole_logprobs(hidden, weight, targets, temperature=1.0):
    """Log-probabilities and entropies of the whole softmax in float64, 0 where ignored."""
    kept = targets != -100
    logprobs = (hidden.double() @ weight.double().t() / temperature).log_softmax(1)
    own = logprobs.gather(1, targets.clamp(min=0)[:, None]).squeeze(1)
    return own.where(kept, 0.0), -(logprobs.exp() * logprobs).sum(1).where(kept, 0.0)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("chunk", [1, 16, 70, 256])
def test_logprobs_equal_the_whole_softmax_under_any_upstream_gradient(chunk, temperature):
    """Each token's log-probability has a gradient of its own, of any sign or zero; no chunk size changes a thing."""
    inputs = make_inputs()
    upstream = torch.randn(70, generator=torch.Generator().manual_seed(1)) * (torch.arange(70) % 3 > 0)
    logprobs, entropy = logprobs_and_entropy(*inputs, temperature, chunk=chunk)
    expected, expected_entropy = whole_logprobs(*inputs, temperature)
    assert_near((logprobs, entropy), (expected, expected_entropy), 1e-6)
    gradients = torch.autograd.grad(logprobs, inputs[:2], upstream)
    assert_near(gradients, torch.autograd.grad(expected, inputs[:2], upstream.double()), 2e-6)
    assert not entropy.requires_grad


def test_logprob_gradients_pass_finite_differences():
    """In float64 everything stays float64, and finite differences agree with both gradients."""
    hidden, weight, targets = make_inputs(N=7, d=3, V=5)
    inputs = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    assert torch.autograd.gradcheck(lambda h, w: logprobs_and_entropy(h, w, targets, 0.7, chunk=3)[0], inputs)


def test_logprobs_of_bfloat16_keep_float32_logits():
    """Large logits of bfloat16 inputs lose nothing: 1e-4 nats, where logits rounded to bfloat16 are 0.1 off."""
    hidden, weight, targets = make_inputs(dtype=torch.bfloat16, spread=8.0)
    logprobs, entropy = logprobs_and_entropy(hidden, weight, targets)
    expected, expected_entropy = whole_logprobs(hidden, weight.bfloat16(), targets)
    assert (logprobs - expected).abs().max() < 1e-4
    assert (entropy - expected_entropy).abs().max() < 1e-4
    gradients = torch.autograd.grad(logprobs.sum(), (hidden, weight))
    assert [x.dtype for x in gradients] == [torch.bfloat16, torch.float32]
    assert_near(gradients, torch.autograd.grad(expected.sum(), (hidden, weight)), 1e-2)


def test_logprobs_agree_with_the_cross_entropy():
    """The two forms are each other's oracle: losses are minus the log-probabilities, gradients alike."""
    hidden, weight, targets = make_inputs()
    loss_sum, losses = chunked_cross_entropy(hidden, weight, targets)
    logprobs, _ = logprobs_and_entropy(hidden, weight, targets)
    torch.testing.assert_close(-logprobs.detach(), losses)
    ours, theirs = (torch.autograd.grad(x, (hidden, weight)) for x in (-logprobs.sum(), loss_sum))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_ignored_tokens_have_no_logprob_and_no_gradient():
    """Where ignored the figures are 0 and a gradient from above goes nowhere, NaN hidden states included."""
    hidden, weight, targets = make_inputs()
    poisoned = torch.where((targets == -100)[:, None], torch.nan, hidden.detach()).requires_grad_()
    logprobs, entropy = logprobs_and_entropy(poisoned, weight, targets)
    logprobs.sum().backward()
    for values in (logprobs, entropy, poisoned.grad):
        assert not values[targets == -100].any()
    assert_near(
        (poisoned.grad, weight.grad),
        torch.autograd.grad(whole_logprobs(hidden, weight, targets)[0].sum(), (hidden, weight)),
        2e-6,
    )


def test_a_frozen_side_gets_no_logprob_gradient():
    """With one side frozen the other's gradient is the same; under no_grad there is none."""
    hidden, weight, targets = make_inputs()
    both = torch.autograd.grad(logprobs_and_entropy(hidden, weight, targets)[0].sum(), (hidden, weight))
    (of_hidden,) = torch.autograd.grad(logprobs_and_entropy(hidden, weight.detach(), targets)[0].sum(), hidden)
    (of_weight,) = torch.autograd.grad(logprobs_and_entropy(hidden.detach(), weight, targets)[0].sum(), weight)
    assert torch.equal(of_hidden, both[0])
    assert torch.equal(of_weight, both[1])
    with torch.no_grad():
        assert not logprobs_and_entropy(hidden, weight, targets)[0].requires_grad


def test_only_tokens_with_a_gradient_are_computed_again(monkeypatch):
    """Backward makes the logits of no token whose upstream gradient is 0: clipped tokens and even groups are free."""
    seen = []
    original = cross_entropy._wide_head

    def counted(*arguments):
        head = original(*arguments)
        return lambda rows: seen.append(len(rows)) or head(rows)

    monkeypatch.setattr(cross_entropy, "_wide_head", counted)
    hidden, weight, targets = make_inputs()
    logprobs, _ = logprobs_and_entropy(hidden, weight, targets)
    assert sum(seen) == 56
    logprobs[1:5].sum().backward()
    assert sum(seen) == 60


def test_logprob_operators_obey_the_compiler_contract():
    """Fake shapes, schema and autograd of both operators agree with what they do."""
    hidden, weight, targets = make_inputs()
    torch.library.opcheck(cross_entropy._token_logprobs, (hidden, weight, targets, 0.7, -100, 16))
    upstream = torch.randn(len(targets))
    given = (upstream, hidden.detach(), weight.detach(), targets, 0.7, -100, 16, True, False)
    torch.library.opcheck(cross_entropy._token_logprobs_backward, given)


def test_unfit_shapes_and_temperatures_are_refused_for_logprobs():
    """A head of another width and temperature 0 are refused with what was given in the message."""
    hidden, weight, targets = make_inputs()
    with pytest.raises(ValueError, match="shapes do not fit"):
        logprobs_and_entropy(hidden, weight[:, :-1], targets)
    with pytest.raises(ValueError, match=r"must be positive, not 0\.0"):
        logprobs_and_entropy(hidden, weight, targets, temperature=0.0)
