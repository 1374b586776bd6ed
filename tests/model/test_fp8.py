"""A whole model in FP8: near its bfloat16 self, the same parameters, and the same gradients however little is kept."""

import contextlib
import copy
import threading
import weakref

import pytest
import torch
from torch import Tensor, nn

from fathom.config import ModelConfig
from fathom.engine.packing import PackedLinear, packed
from fathom.model.experts import swiglu, swiglu_backward
from fathom.model.fp8 import FP8Experts, FP8FeedForward, FP8Linear, train_in_fp8
from fathom.model.moe import Experts, Router, Routing
from fathom.model.transformer import Transformer
from fathom.precision import recompute
from fathom.precision.fp8 import FP8
from fathom.precision.recompute import Recompute
from fathom.precision.tiles import Tiles
from fathom.train.objective import pretrain_loss
from tests.model.configs import FAMILIES, V3, build
from tests.precision.rounded import blocks, columns, distance, drawn, rows

every_family = pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES.keys())


def in_bf16(config: ModelConfig, seed: int = 0) -> Transformer:
    model = build(config, seed)
    model.compute_dtype = torch.bfloat16
    return model


def in_fp8(config: ModelConfig, **options: bool) -> tuple[Transformer, FP8]:
    model, fp8 = in_bf16(config), FP8(**options)
    train_in_fp8(model, fp8)
    return model, fp8


def tokens(config: ModelConfig, rows: int = 2, length: int = 17) -> Tensor:
    return torch.randint(0, config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(1))


def gradients(model: Transformer, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss, _ = pretrain_loss(model, ids, mtp_weight=0.3, balance_weight=1e-2)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@every_family
def test_parameters_keep_names_and_identity(config: ModelConfig) -> None:
    """The optimizer, the checkpoint and the engine see the model they know."""
    model = in_bf16(config)
    before = dict(model.named_parameters())
    train_in_fp8(model, FP8())
    after = dict(model.named_parameters())
    assert list(before) == list(after)
    assert all(before[name] is after[name] for name in before)


def test_what_stays_in_higher_precision() -> None:
    """Projections and experts multiply in FP8; embedding, head, eh_proj, router and norms are as they were."""
    model, _ = in_fp8(V3)
    in_eight = {name for name, module in model.named_modules() if isinstance(module, (FP8Linear, FP8Experts))}
    in_eight |= {f"{n}.down_proj" for n, module in model.named_modules() if isinstance(module, FP8FeedForward)}
    leaves = {name for name, module in model.named_modules() if list(module.parameters(recurse=False))}
    stay = {name.rpartition(".")[2] for name in leaves - in_eight}
    assert stay <= {"embed_tokens", "lm_head", "eh_proj", "gate"} | {n for n in stay if "norm" in n}
    assert {"lm_head", "eh_proj", "gate", "embed_tokens"} <= stay
    projections = {name.rpartition(".")[2] for name in in_eight}
    assert projections >= {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "down_proj", "experts"}


@every_family
def test_near_bfloat16_and_not_equal(config: ModelConfig) -> None:
    """Loss within 1 %; gradients of matrices in the same direction, though a token here and there changes its
    expert."""
    ids = tokens(config, rows=4, length=33)
    plain, (eight, fp8) = in_bf16(config), in_fp8(config)
    with torch.no_grad():
        losses = [pretrain_loss(m, ids, mtp_weight=0.3, balance_weight=0.0)[0] for m in (plain, eight)]
    assert losses[0] != losses[1]
    assert abs(losses[1] / losses[0] - 1) < 1e-2
    for (name, exact), rounded in zip(gradients(plain, ids).items(), gradients(eight, ids).values(), strict=True):
        if exact.ndim == 2 and exact.norm() > 0 and not name.endswith("gate.weight"):
            assert torch.cosine_similarity(exact.flatten(), rounded.flatten(), dim=0) > 0.75, name
    assert fp8.take_bad_tiles() == 0


def test_all_that_reads_what_enters_a_mixture_reads_the_same_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Routed and shared experts share one tiling with scales that are powers of two; a dense layer's are free."""
    model, _ = in_fp8(V3)
    tiled: list[bool] = []
    rows_of = FP8._rows_of

    def listening(self: FP8, of: Tensor, power_of_two: bool) -> Tiles:
        tiled.append(power_of_two)
        return rows_of(self, of, power_of_two)

    monkeypatch.setattr(FP8, "_rows_of", listening)
    mixture, dense = model.model.layers[1].mlp, model.model.layers[0].mlp
    x = drawn(1, 7, V3.hidden_size)
    mixture(x)
    assert tiled == [True]
    dense(x)
    assert tiled == [True, False]


@pytest.mark.parametrize("gradient_blocks", [False, True])
def test_experts_are_three_products_each(gradient_blocks: bool) -> None:
    """Expert by expert with plain matrices: scales of what travels are powers of two, all that is kept is rounded, and
    gradients are rounded where they enter products."""
    fp8, count = FP8(gradient_blocks=gradient_blocks), 200
    experts = Experts(V3)
    for seed, weight in enumerate(experts.parameters()):
        nn.init.normal_(weight, std=0.3, generator=torch.Generator().manual_seed(seed))
    x, dy = drawn(count, V3.hidden_size, seed=2).requires_grad_(), drawn(count, V3.hidden_size, seed=3)
    quiet = torch.arange(count) % 16 != 0
    dy[~quiet] *= 3e4
    generator = torch.Generator().manual_seed(4)
    ids = torch.stack([torch.randperm(8, generator=generator)[:3] for _ in range(count)])
    weights = torch.rand(count, 3, generator=generator).requires_grad_()
    y = FP8Experts(experts, fp8)(x, Routing(ids, weights, torch.empty(0)))
    y.backward(dy)

    order = ids.flatten().sort(stable=True).indices
    token, expert = order // 3, ids.flatten()[order]
    weight = weights.detach().flatten()[order]
    through = [(expert == e).nonzero()[:, 0] for e in range(8)]

    def by_expert(rows_M: Tensor, matrices: Tensor) -> Tensor:
        parts = [rows_M[at] @ blocks(matrix).T for at, matrix in zip(through, matrices, strict=True)]
        return torch.cat(parts).to(torch.bfloat16)

    def rounded(gradient: Tensor) -> Tensor:
        return fp8.gradient(gradient) if gradient_blocks else gradient

    gate_up, down = (p.detach() for p in (experts.gate_up_proj, experts.down_proj))
    sent = rows(x.detach(), power_of_two=True)
    inner = by_expert(sent[token], gate_up)
    parts = by_expert(rows(swiglu(inner, weight)), down)
    assert distance(y, torch.zeros(count, 48).index_add_(0, token, parts.float())) < 0.01

    arrived = rows(rounded(dy), power_of_two=True)
    dhidden = torch.cat([arrived[token[at]] @ blocks(m) for at, m in zip(through, down, strict=True)])
    hidden, dinner, dweight = swiglu_backward(rows(inner).to(torch.bfloat16), weight, dhidden.to(torch.bfloat16))
    dinner = rounded(dinner)
    back = torch.cat(
        [rows(dinner[at], power_of_two=gradient_blocks) @ blocks(m) for at, m in zip(through, gate_up, strict=True)]
    )
    assert x.grad is not None
    assert weights.grad is not None
    for tokens_of in (quiet, ~quiet):
        dx = torch.zeros(count, 48).index_add_(0, token, back)
        assert distance(x.grad[tokens_of], dx[tokens_of]) < 0.01
        of_choices = torch.empty(count * 3).index_copy_(0, order, dweight).view(count, 3)
        assert distance(weights.grad[tokens_of], of_choices[tokens_of]) < 0.01
    ddown = torch.stack([columns(arrived[token[at]]).T @ columns(hidden[at]) for at in through])
    assert distance(experts.down_proj.grad, ddown) < 1e-3
    dgate_up = torch.stack(
        [columns(dinner[at], power_of_two=gradient_blocks).T @ columns(sent[token[at]]) for at in through]
    )
    assert distance(experts.gate_up_proj.grad, dgate_up) < 1e-3


@every_family
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_recomputing_changes_no_bit(config: ModelConfig, precision: str) -> None:
    """Norms, queries, keys and values made again in the backward pass: the same gradients to the bit."""
    ids = tokens(config)
    model = in_bf16(config) if precision == "bf16" else in_fp8(config)[0]
    kept = gradients(model, ids)
    model.keeping = Recompute
    again = gradients(model, ids)
    assert list(kept) == list(again)
    assert all(torch.equal(kept[name], again[name]) for name in kept)


def test_recomputing_survives_a_second_backward() -> None:
    """A graph that is kept gives its gradients twice."""
    model, _ = in_fp8(V3)
    model.keeping = Recompute
    loss, _ = pretrain_loss(model, tokens(V3), mtp_weight=0.3, balance_weight=0.0)
    loss.backward(retain_graph=True)
    once = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    loss.backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            assert torch.equal(p.grad, 2 * once[name]), name


def test_what_was_changed_since_is_refused() -> None:
    """As autograd does by itself: a weight that moved between the two passes is an error, not another gradient."""
    w = torch.ones(3, 3, requires_grad=True)
    with Recompute():
        y = torch.ones(2, 3, requires_grad=True) @ w
    with torch.no_grad():
        w.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place"):
        y.sum().backward()


def test_what_was_made_and_then_changed_is_kept() -> None:
    """Instructions would make it as it was; the gradient is that of what was used."""
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    with Recompute():
        doubled = (x * 2).detach()
        recompute.made(doubled, lambda of: of * 2, x)
        doubled.add_(1)
        (x * doubled).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.tensor([3.0, 5.0]))


def test_threads_do_not_hear_each_other() -> None:
    """What another thread makes while this one listens is not learnt here."""
    x, found = torch.ones(2), []

    def elsewhere() -> None:
        recompute.made(x, torch.clone, x)
        found.append(recompute.is_made(x))

    with Recompute():
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        found.append(recompute.is_made(x))
    assert found == [False, False]


def test_what_is_made_again_is_let_go() -> None:
    """Made once for two readers, and gone when both have had it."""
    x, made = torch.ones(4, requires_grad=True), []

    def double(of: Tensor) -> Tensor:
        made.append(weakref.ref(again := of * 2))
        return again

    with Recompute():
        y = double(x)
        made.clear()
        recompute.made(y, double, x)
        total = (y * y.detach()).sum() + y.square().sum()
        del y
    total.backward(retain_graph=True)
    assert len(made) == 1
    assert made[0]() is None


def test_a_tile_is_counted_once_however_little_is_kept() -> None:
    """Making tiles again does not count their bad ones again."""
    counted = []
    for keeping in (contextlib.nullcontext, Recompute):
        model, fp8 = in_fp8(V3)
        model.keeping = keeping
        with torch.no_grad():
            model.model.layers[0].input_layernorm.weight[0] = torch.nan
        gradients(model, tokens(V3))
        counted.append(fp8.take_bad_tiles())
    assert counted[0] == counted[1] > 0


def test_frozen_experts_cost_no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing but the embedding learns no weight's gradient is made."""
    model, _ = in_fp8(V3)
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith("embed_tokens.weight"))
    monkeypatch.setattr(FP8, "weight_gradient", lambda *_: pytest.fail("a frozen weight got a gradient"))
    assert list(gradients(model, tokens(V3))) == ["model.embed_tokens.weight"]


def test_nothing_is_learnt_of_outside() -> None:
    """Without a listener nothing is remembered; what failed within leaves nothing behind."""
    with pytest.raises(RuntimeError, match="stop"), Recompute():
        raise RuntimeError("stop")
    assert recompute._here.active == []
    assert not recompute.is_made(torch.ones(2))


@pytest.mark.usefixtures("kernels")
@every_family
def test_the_engine_packs_the_same_weights(config: ModelConfig) -> None:
    """What is decoded with after training in FP8 is the bfloat16 of the master weights, as without."""
    plain, eight = (
        {name: module for name, module in packed(model).named_modules() if isinstance(module, PackedLinear)}
        for model in (in_bf16(config), in_fp8(config)[0])
    )
    assert list(plain) == list(eight)
    assert all(torch.equal(plain[name].weight.panels, eight[name].weight.panels) for name in plain)


def test_a_copy_has_its_own_parameters() -> None:
    """Copying a model in FP8 copies it; the copy multiplies in FP8 too."""
    model, _ = in_fp8(V3)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(tokens(V3)), model(tokens(V3)))
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert all(p.abs().sum() > 0 for name, p in model.named_parameters() if p.ndim > 1)


def test_the_router_keeps_its_input_as_it_is() -> None:
    """Scores and gradients in float32 as a plain product's, without a float32 copy of the input."""
    router: nn.Module = Router(V3)
    assert isinstance(router, Router)
    torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(0))
    x = torch.randn(9, V3.hidden_size, generator=torch.Generator().manual_seed(1)).bfloat16()
    found, meant = x.clone().requires_grad_(), x.clone().requires_grad_()
    router.logits(found).square().sum().backward()
    by_router, router.weight.grad = router.weight.grad, None
    nn.functional.linear(meant.float(), router.weight).square().sum().backward()
    assert found.grad is not None
    assert meant.grad is not None
    assert torch.equal(found.grad, meant.grad)
    assert by_router is not None
    assert torch.equal(by_router, router.weight.grad)
