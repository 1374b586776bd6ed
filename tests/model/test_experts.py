import pytest
import torch
import torch.nn.functional as F

from fathom.kernels import training
from fathom.model.experts import routed_experts


def make_inputs(N=50, K=3, E=7, d=32, I=16, dtype=torch.float32, master=torch.float32):  # noqa: E741
    torch.manual_seed(0)
    ids = torch.rand(N, E).topk(K, dim=1).indices
    tensors = [
        torch.randn(N, d).to(dtype),
        torch.rand(N, K),
        (torch.randn(E, 2 * I, d) / d**0.5).to(master),
        (torch.randn(E, d, I) / I**0.5).to(master),
    ]
    return ids, [x.requires_grad_() for x in tensors]


def reference(x, ids, weights, gate_up, down):
    y = torch.zeros_like(x)
    for n in range(ids.shape[0]):
        for k, e in enumerate(ids[n].tolist()):
            gate, up = (gate_up[e] @ x[n]).chunk(2)
            y[n] = y[n] + weights[n, k] * (down[e] @ (F.silu(gate) * up))
    return y


def value_and_gradients(function, ids, inputs):
    x, weights, gate_up, down = inputs
    y = function(x, ids, weights, gate_up, down)
    torch.manual_seed(1)
    return y, *torch.autograd.grad(y, inputs, torch.randn(y.shape).to(y.dtype))


def exact(ids, inputs):
    return value_and_gradients(reference, ids, [x.detach().double().requires_grad_() for x in inputs])


def assert_near(actual, expected, tolerance):
    for ours, wanted in zip(actual, expected, strict=True):
        assert ours.shape == wanted.shape
        assert (ours.double() - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize(
    "sizes",
    [{}, {"N": 1, "K": 1}, {"E": 60}, {"E": 3}, {"d": 30, "I": 13}, {"N": 33, "d": 8, "I": 8}],
)
def test_value_and_gradients_equal_token_by_token(sizes):
    """With odd widths, empty experts or one token, the result equals a loop over tokens in float32."""
    ids, inputs = make_inputs(**sizes)
    assert_near(value_and_gradients(routed_experts, ids, inputs), exact(ids, inputs), 1e-5)


@pytest.mark.parametrize("d", [32, 30])
def test_bfloat16_with_float32_masters(d):
    """bfloat16 beside float32 masters: near float64, y and dx bfloat16, the other gradients float32."""
    ids, inputs = make_inputs(d=d, dtype=torch.bfloat16)
    actual = value_and_gradients(routed_experts, ids, inputs)
    assert_near(actual, exact(ids, inputs), 1.5e-2)
    assert [x.dtype for x in actual] == [torch.bfloat16] * 2 + [torch.float32] * 3


@pytest.mark.parametrize("master", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"N": 1, "K": 1},
        {"E": 60},
        {"N": 2100, "K": 2, "E": 2},
        {"d": 70, "I": 34},
        {"N": 1100, "K": 2, "E": 2, "d": 34, "I": 18},
    ],
)
def test_kernels_equal_the_operators(monkeypatch, sizes, master):
    """The kernels' grouped products and PyTorch's agree within bfloat16's rounding of what is between them."""
    if not training.available():
        pytest.skip("no kernels for training on this machine")
    ids, inputs = make_inputs(**sizes, dtype=torch.bfloat16, master=master)
    ours = value_and_gradients(routed_experts, ids, inputs)
    monkeypatch.setattr(training, "groups_fit", lambda x, weight: False)
    theirs = value_and_gradients(routed_experts, ids, inputs)
    assert [x.dtype for x in ours] == [x.dtype for x in theirs]
    assert_near(ours, [x.double() for x in theirs], 1e-2)


def test_every_token_on_one_expert():
    """A group that holds all rows drops none, and the untouched experts' gradients are exactly zero."""
    ids, inputs = make_inputs(K=1)
    ids.fill_(4)
    actual = value_and_gradients(routed_experts, ids, inputs)
    assert_near(actual, exact(ids, inputs), 1e-5)
    idle = torch.arange(7) != 4
    assert not actual[3][idle].any()
    assert not actual[4][idle].any()


def test_an_expert_chosen_twice_by_a_token_counts_twice():
    """Two slots of a token may name one expert; both weights count and both get a gradient."""
    ids, inputs = make_inputs(K=2)
    ids[:, 1] = ids[:, 0]
    assert_near(value_and_gradients(routed_experts, ids, inputs), exact(ids, inputs), 1e-5)


def test_two_runs_are_bitwise_equal():
    """The same input gives the same bits, forward and backward: no sum depends on the order of threads."""
    ids, inputs = make_inputs(N=700, d=64, I=32, dtype=torch.bfloat16)
    runs = [value_and_gradients(routed_experts, ids, inputs) for _ in range(3)]
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


def test_a_token_does_not_depend_on_its_neighbours():
    """Permuting the tokens permutes the outputs."""
    ids, (x, weights, gate_up, down) = make_inputs()
    order = torch.randperm(x.shape[0])
    permuted = routed_experts(x[order], ids[order], weights[order], gate_up, down)
    torch.testing.assert_close(permuted, routed_experts(x, ids, weights, gate_up, down)[order])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_whole_graph_is_traced(dtype, tolerance):
    """torch.compile meets no graph break, and other group sizes need no recompilation."""
    compiled = torch.compile(routed_experts, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        _, inputs = make_inputs(dtype=dtype)
        ids = torch.rand(50, 7, generator=torch.Generator().manual_seed(seed)).topk(3, dim=1).indices
        with torch.compiler.set_stance("fail_on_recompile" if seed else "default"):
            actual = value_and_gradients(compiled, ids, inputs)
        assert_near(actual, [x.double() for x in value_and_gradients(routed_experts, ids, inputs)], tolerance)


def test_unfit_shapes_are_refused():
    """A down projection of the wrong width is refused with the shapes in the message."""
    ids, (x, weights, gate_up, down) = make_inputs()
    with pytest.raises(ValueError, match="shapes do not fit"):
        routed_experts(x, ids, weights, gate_up, down[:, :, :-1])
