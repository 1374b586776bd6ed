"""Kernels that draw tokens, against the same in PyTorch's float64."""

import pytest
import torch

from fathom.kernels import ops
from fathom.kernels.library import library

pytestmark = pytest.mark.skipif(library() is None, reason="needs a C++ compiler")


@pytest.mark.parametrize("vocab", [1, 3, 16, 63, 64, 65, 1000, 4096])
def test_draws_invert_the_distribution_function(vocab: int) -> None:
    """The token drawn is the one whose stretch of the running sum holds the uniform number."""
    torch.manual_seed(vocab)
    logits, rows = torch.randn(1, vocab) * 3, 500
    temperature = torch.tensor([0.7], dtype=torch.float64)
    running = (logits.double() / temperature).softmax(-1).cumsum(-1)[0]
    uniforms = torch.rand(rows, dtype=torch.float64)
    ids = ops.draw_rows(logits.expand(rows, -1), temperature.expand(rows), uniforms)
    lower = torch.cat([running.new_zeros(1), running])[ids]
    assert ((lower - 1e-6 <= uniforms) & (uniforms <= running[ids] + 1e-6)).all()


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
@pytest.mark.parametrize("vocab", [5, 64, 200])
@pytest.mark.parametrize("allowed", [0, 2, -1])
def test_only_a_token_with_a_chance_is_drawn(vocab: int, allowed: int, uniform: float) -> None:
    """Where one token is not minus infinity it is drawn, whatever the uniform number and wherever it stands."""
    logits = torch.full((1, vocab), float("-inf"))
    logits[0, allowed] = -20.0
    ids = ops.draw_rows(logits, torch.ones(1, dtype=torch.float64), torch.tensor([uniform], dtype=torch.float64))
    assert ids.tolist() == [allowed % vocab]


def test_a_row_of_no_numbers_names_a_token_that_exists() -> None:
    """NaN and infinite logits give some token of the vocabulary."""
    logits = torch.stack([torch.full((70,), value) for value in (float("nan"), float("inf"), float("-inf"))])
    ids = ops.draw_rows(logits, torch.ones(3, dtype=torch.float64), torch.full((3,), 0.3, dtype=torch.float64))
    assert ((ids >= 0) & (ids < 70)).all()


@pytest.mark.parametrize("vocab", [1, 17, 64, 1000])
@pytest.mark.parametrize("shift", [-1000.0, 0.0, 1000.0])
def test_log_sums_are_those_of_float64(vocab: int, shift: float) -> None:
    """log Σ e^(logits · inverse) is right to float32's last places, for logits of any size, each row by its own."""
    torch.manual_seed(vocab)
    logits, inverse = torch.randn(7, vocab) * 5 + shift, torch.tensor([1.0, 0.5, 2.0, 1 / 0.7, 1.0, 0.1, 1.0])
    exact = (logits.double() * inverse.double()[:, None]).logsumexp(-1)
    torch.testing.assert_close(ops.log_sum_exp(logits, inverse), exact, rtol=0, atol=2e-6)
