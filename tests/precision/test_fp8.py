"""Layers in FP8 as differentiable functions: what they compute, what they keep, what poisons them."""

import os
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fathom.kernels import tiles as kernels
from fathom.precision import kernels as gpu
from fathom.precision.e5m6 import pack_e5m6, unpack_e5m6
from fathom.precision.fp8 import FP8
from fathom.precision.tiles import Tiles, dequantise_rows, quantise_rows
from tests.precision.rounded import blocks, columns, distance, drawn, rows


def close(found: Tensor | None, meant: Tensor) -> None:
    """Equal but for the order of sums and one rounding to bfloat16."""
    assert found is not None
    assert (found.float() - meant).abs().max() <= 2.0**-7 * meant.abs().max()


@pytest.fixture(params=["kernels", "definitions", "triton"])
def how(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """By the kernels of a CPU; by the definitions, as on a device without; by a GPU's kernels in the interpreter."""
    if request.param == "kernels":
        request.getfixturevalue("kernels")
        return request.param
    monkeypatch.setattr(kernels, "fits", lambda x: False)
    if request.param == "triton":
        pytest.importorskip("triton")
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("there is a GPU, which Triton then uses; its interpreter is for machines without one")
        monkeypatch.setattr(gpu, "available", lambda device: True)
    return request.param


@pytest.mark.usefixtures("how")
@pytest.mark.parametrize("behind_attention", [False, True])
@pytest.mark.parametrize("shape", [(1, 2, 2), (7, 130, 300), (300, 64, 128), (5, 33, 77)])
def test_a_linear_layer_is_three_products(shape: tuple[int, int, int], behind_attention: bool) -> None:
    """Forward of rows and blocks; back by rows and the same blocks; the weight's by columns, of what was kept. Odd
    sides and sides that are no multiples of 128 included."""
    count, outputs, inputs = shape
    x, w = drawn(count, inputs).requires_grad_(), drawn(outputs, inputs, seed=1, dtype=torch.float32).requires_grad_()
    dy = drawn(count, outputs, seed=2)
    y = FP8().linear(x, w, behind_attention=behind_attention)
    y.backward(dy)
    close(y, rows(x.detach(), power_of_two=behind_attention) @ blocks(w.detach()).T)
    close(x.grad, rows(dy) @ blocks(w.detach()))
    kept = unpack_e5m6(*pack_e5m6(x.detach()), inputs) if behind_attention else rows(x.detach())
    close(w.grad, columns(dy).T @ columns(kept, power_of_two=behind_attention))
    assert w.grad is not None
    assert w.grad.dtype == torch.float32
    assert y.dtype == x.dtype == torch.bfloat16


@pytest.mark.usefixtures("how")
def test_twelve_bits_round_less_than_eight() -> None:
    """The gradient of a weight behind attention is nearer to the one of an input that was not rounded."""
    x, w, dy = drawn(256, 128), drawn(64, 128, seed=1, dtype=torch.float32), drawn(256, 64, seed=2)
    errors = []
    for behind_attention in (False, True):
        weight = w.clone().requires_grad_()
        FP8().linear(x, weight, behind_attention=behind_attention).backward(dy)
        exact = columns(dy).T @ x.float()
        assert weight.grad is not None
        errors.append(((weight.grad - exact).norm() / exact.norm()).item())
    assert errors[1] < errors[0]


@pytest.mark.usefixtures("how")
def test_swiglu_is_made_again_from_its_inputs_in_fp8() -> None:
    """Forward takes gate and up as they are; back, everything follows from their codes."""
    gate, up = drawn(50, 190).requires_grad_(), drawn(50, 190, seed=1).requires_grad_()
    w, dy = drawn(70, 190, seed=2, dtype=torch.float32).requires_grad_(), drawn(50, 70, seed=3)
    y = FP8().gated_linear(gate, up, w)
    y.backward(dy)
    hidden = (F.silu(gate.detach().float()) * up.detach().float()).to(torch.bfloat16)
    close(y, rows(hidden) @ blocks(w.detach()).T)
    kept = [rows(t.detach()).to(torch.bfloat16).float().requires_grad_() for t in (gate, up)]
    again = F.silu(kept[0]) * kept[1]
    dhidden = rows(dy) @ blocks(w.detach())
    again.backward(dhidden)
    close(gate.grad, kept[0].grad)
    close(up.grad, kept[1].grad)
    close(w.grad, columns(dy).T @ columns(again.detach().to(torch.bfloat16)))


@pytest.mark.usefixtures("how")
def test_no_rows_are_no_trouble() -> None:
    """Nothing goes in, nothing comes out, and the weight learns nothing."""
    w = drawn(20, 130, dtype=torch.float32).requires_grad_()
    for behind_attention in (False, True):
        FP8().linear(drawn(0, 130), w, behind_attention=behind_attention).sum().backward()
        assert w.grad is not None
        assert (w.grad == 0).all()


def test_layers_that_share_an_input_share_its_codes() -> None:
    """Two layers over one tensor keep the same codes; a changed tensor, or other scales, get their own."""
    fp8, x = FP8(), drawn(4, 128)
    first = fp8.tiles_of(x, power_of_two=False)
    assert fp8.tiles_of(x, power_of_two=False).codes is first.codes
    assert fp8.tiles_of(x, power_of_two=True).codes is not first.codes
    again = fp8.tiles_of(x, power_of_two=False)
    x.mul_(2)
    assert not torch.equal(fp8.tiles_of(x, power_of_two=False).scales, again.scales)
    assert fp8.tiles_of(x.clone(), power_of_two=False).codes is not first.codes


@pytest.mark.usefixtures("how")
def test_a_nan_is_counted_and_poisons_only_its_row() -> None:
    """One number that is none: its tile is counted, its row of the output lost, all others the same as without it."""
    x, w, fp8 = drawn(9, 300), drawn(20, 300, seed=1, dtype=torch.float32), FP8()
    plain = fp8.linear(x, w)
    assert fp8.take_bad_tiles() == 0
    hit = x.clone()
    hit[4, 200] = torch.nan
    y = fp8.linear(hit, w)
    assert fp8.take_bad_tiles() == 1
    assert y[4].isnan().all()
    others = torch.arange(9) != 4
    assert torch.equal(y[others], plain[others])


@pytest.mark.usefixtures("how")
def test_blocks_of_gradients_share_a_scale_across_tokens() -> None:
    """The paper's negative result in small: one token's large gradient costs those of its neighbours, tiles do not."""
    w, dy = drawn(128, 128, seed=1, dtype=torch.float32), drawn(128, 128, seed=2) * 1e-3
    dy[5] *= 1e9
    errors = []
    for gradient_blocks in (False, True):
        x = drawn(128, 128).requires_grad_()
        FP8(gradient_blocks=gradient_blocks).linear(x, w).backward(dy)
        exact = dy.float() @ w
        others = torch.arange(128) != 5
        assert x.grad is not None
        errors.append(((x.grad.float() - exact)[others].norm() / exact[others].norm()).item())
    assert errors[0] < 0.1
    assert errors[1] > 0.9


@pytest.mark.usefixtures("how")
def test_gradient_blocks_reach_every_product_of_a_gated_layer() -> None:
    """As with tiles, but of a gradient that was rounded in blocks first; its neighbours' scales show in each result."""
    gate, up = drawn(130, 140).requires_grad_(), drawn(130, 140, seed=1).requires_grad_()
    w, dy = drawn(70, 140, seed=2, dtype=torch.float32).requires_grad_(), drawn(130, 70, seed=3)
    dy[::16] *= 3e4
    FP8(gradient_blocks=True).gated_linear(gate, up, w).backward(dy)
    rounded = blocks(dy, power_of_two=True)
    assert distance(rounded, dy) > 1e-3
    kept = [rows(t.detach()).to(torch.bfloat16).float().requires_grad_() for t in (gate, up)]
    again = F.silu(kept[0]) * kept[1]
    again.backward(rounded @ blocks(w.detach()))
    hidden = columns(again.detach().to(torch.bfloat16))
    quiet = torch.arange(130) % 16 != 0
    assert gate.grad is not None
    assert kept[0].grad is not None
    assert distance(gate.grad[quiet], kept[0].grad[quiet]) < 0.01
    assert distance(w.grad, rounded.T @ hidden) < 0.01


@pytest.mark.usefixtures("how")
def test_gradient_blocks_round_nothing_twice() -> None:
    """What blocks kept goes through a linear layer's rows and columns unchanged."""
    x, w, dy = drawn(200, 130), drawn(150, 130, seed=1, dtype=torch.float32), drawn(200, 150, seed=2)
    x.requires_grad_()
    w.requires_grad_()
    FP8(gradient_blocks=True).linear(x, w).backward(dy)
    close(x.grad, blocks(dy, power_of_two=True) @ blocks(w.detach()))
    close(w.grad, blocks(dy, power_of_two=True).T @ columns(rows(x.detach())))


@pytest.mark.usefixtures("how")
def test_groups_are_products_of_their_own() -> None:
    """Experts' products: rows by an index, groups of any size and none, forward, back and for the weights."""
    sizes, fp8 = (5, 0, 140, 1), FP8()
    ends = torch.tensor(sizes).cumsum(0).to(torch.int32)
    x, w = drawn(60, 130), drawn(4, 66, 130, seed=1, dtype=torch.float32)
    at = torch.randint(0, 60, (sum(sizes),), generator=torch.Generator().manual_seed(2)).to(torch.int32)
    tiles, stack = fp8.rows(x), fp8.blocks(w)
    found = fp8.product(tiles, at, ends, stack).split(sizes)
    dy = drawn(sum(sizes), 66, seed=3)
    back = fp8.product(fp8.rows(dy), None, ends, stack, columns=True).split(sizes)
    sums = fp8.weight_gradient(fp8.columns(dy, None, ends), fp8.columns(tiles, at, ends), ends)
    for e, (chosen, own_dy) in enumerate(zip(at.split(sizes), dy.split(sizes), strict=True)):
        if len(chosen):
            close(found[e], rows(x)[chosen] @ blocks(w[e]).T)
            close(back[e], rows(own_dy) @ blocks(w[e]))
            close(sums[e], columns(own_dy).T @ columns(rows(x)[chosen]))
    assert (sums[1] == 0).all()


def test_kept_values_are_codes_times_scales() -> None:
    """Both ways of reading tiles back say the same."""
    tiles = quantise_rows(drawn(9, 300))
    meant = dequantise_rows(tiles).to(torch.bfloat16)
    assert torch.equal(FP8().values(Tiles(*tiles)), meant)


def test_what_was_shared_is_let_go_with_its_tensor() -> None:
    """Remembered tiles do not outlive the tensor that they are of."""
    fp8, x = FP8(), drawn(4, 128)
    codes = weakref.ref(fp8.tiles_of(x, power_of_two=False).codes)
    assert codes() is not None
    del x
    assert codes() is None


def test_a_used_policy_can_be_pickled() -> None:
    """What is remembered for neighbours stays behind."""
    fp8, x = FP8(gradient_blocks=True), drawn(4, 128)
    fp8.tiles_of(x, power_of_two=False)
    twin = pickle.loads(pickle.dumps(fp8))
    assert twin.gradient_blocks
    assert torch.equal(twin.tiles_of(x, power_of_two=False).scales, fp8.tiles_of(x, power_of_two=False).scales)


def test_factors_that_do_not_fit_are_refused() -> None:
    """An input of another width, or gradients of other rows, are no product, whoever would make it."""
    fp8, ends = FP8(), torch.tensor([4], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"\[4, 256\] does not fit the columns of a weight \[1, 128, 200\]"):
        fp8.linear(drawn(4, 256), drawn(128, 200, dtype=torch.float32))
    dy, x = fp8.columns(drawn(4, 128), None, ends), fp8.columns(drawn(5, 128), None, ends + 1)
    with pytest.raises(ValueError, match="differ in rows"):
        fp8.weight_gradient(dy, x, ends)


@pytest.mark.usefixtures("how")
def test_weights_learn_in_float32() -> None:
    """The gradient of a weight is not rounded to bfloat16 on its way."""
    w = drawn(64, 96, seed=1, dtype=torch.float32).requires_grad_()
    FP8().linear(drawn(300, 96), w).backward(drawn(300, 64, seed=2))
    assert w.grad is not None
    assert (w.grad != w.grad.bfloat16().float()).float().mean() > 0.9
