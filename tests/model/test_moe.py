"""Routing and balancing against their definitions, written out with loops."""

import pytest
import torch
import torch.nn.functional as F

from fathom.config import ModelConfig
from fathom.model.moe import MoE, Router, router_report
from tests.model.configs import V2, V2_LITE, V3, build, tokens


def _moe(config: ModelConfig) -> MoE:
    moe = build(config).model.layers[1].mlp
    assert isinstance(moe, MoE)
    return moe


def _inputs(config: ModelConfig, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, config.hidden_size, generator=torch.Generator().manual_seed(5))


def _choose_by_hand(router: Router, scores: list[float], config: ModelConfig) -> set[int]:
    """The published selection for one token, without tensors."""
    bias = router.e_score_correction_bias.tolist() if config.topk_method == "noaux_tc" else [0.0] * len(scores)
    biased = [s + b for s, b in zip(scores, bias, strict=True)]
    allowed = set(range(len(scores)))
    if config.topk_method != "greedy":
        size = len(scores) // config.n_group
        members = [range(g * size, (g + 1) * size) for g in range(config.n_group)]
        best = 2 if config.topk_method == "noaux_tc" else 1
        rank = [sum(sorted((biased[e] for e in m), reverse=True)[:best]) for m in members]
        groups = sorted(range(config.n_group), key=lambda g: -rank[g])[: config.topk_group]
        allowed = {e for g in groups for e in members[g]}
    return set(sorted(allowed, key=lambda e: -biased[e])[: config.num_experts_per_tok])


@pytest.mark.parametrize("config", [V3, V2, V2_LITE], ids=["v3", "v2", "v2-lite"])
@torch.no_grad()
def test_layer_equals_its_definition(config: ModelConfig) -> None:
    """Choice, weights and the sum over experts equal the published formulas evaluated token by token."""
    moe, x = _moe(config), _inputs(config, 1, 40)
    y, report = moe(x)
    router, inner = moe.gate, config.moe_intermediate_size
    load = [0] * router.experts
    for token, out in zip(x[0], y[0], strict=True):
        logits = router.weight @ token
        scores = logits.sigmoid() if config.scoring_func == "sigmoid" else logits.softmax(0)
        chosen = _choose_by_hand(router, scores.tolist(), config)
        total = sum(scores[e] for e in chosen) if config.norm_topk_prob else 1.0
        expected = moe.shared_experts(token)
        for e in chosen:
            load[e] += 1
            up = moe.experts.gate_up_proj[e] @ token
            hidden = F.silu(up[:inner]) * up[inner:]
            expected = expected + scores[e] / total * config.routed_scaling_factor * (moe.experts.down_proj[e] @ hidden)
        assert (out - expected).abs().max() <= 1e-4
    assert report.load.tolist() == load


@torch.no_grad()
def test_no_token_is_dropped() -> None:
    """Even when a bias sends every token to the same experts, each is served by exactly K of them."""
    moe = _moe(V3)
    moe.gate.e_score_correction_bias[:3] += 100.0
    y, report = moe(_inputs(V3, 4, 16))
    assert report.load.sum() == 4 * 16 * V3.num_experts_per_tok
    assert report.load.max() == 4 * 16
    assert y.isfinite().all()


@torch.no_grad()
def test_bias_chooses_but_does_not_weigh() -> None:
    """A bias that keeps the choice keeps the output to the last bit; one that turns it changes the output."""
    moe, x = _moe(V3), _inputs(V3, 1, 8)
    before, _ = moe(x)
    moe.gate.e_score_correction_bias += 0.25  # the same for all: no choice changes
    assert torch.equal(moe(x)[0], before)
    moe.gate.e_score_correction_bias[0] += 100.0
    assert not torch.equal(moe(x)[0], before)


def test_bias_never_meets_a_gradient() -> None:
    """The bias is no parameter, and scores keep their gradient through the weights of the chosen."""
    moe = _moe(V3)
    assert "gate.e_score_correction_bias" not in dict(moe.named_parameters())
    y, _ = moe(_inputs(V3, 1, 8))
    y.square().sum().backward()
    assert not moe.gate.e_score_correction_bias.requires_grad
    assert moe.gate.weight.grad is not None
    assert moe.gate.weight.grad.abs().sum() > 0


def test_bias_rule_is_the_sign_of_the_violation() -> None:
    """b rises by γ below the mean load, falls by γ above it, stays at it; nothing is centred."""
    router = Router(V3.replace(n_routed_experts=4, n_group=1, topk_group=1))
    router.update_bias(torch.tensor([10, 2, 4, 0]), rate=0.125)
    assert router.e_score_correction_bias.tolist() == [-0.125, 0.125, 0.0, 0.125]
    assert router.e_score_correction_bias.dtype == torch.float32


def test_balance_loss_equals_its_equations() -> None:
    """V3 eqs 17–20 written out per sequence; perfectly even routing gives exactly 1."""
    moe = _moe(V3)
    x = _inputs(V3, 3, 10)
    with torch.no_grad():
        routing = moe.gate(x.flatten(0, 1))
    experts, top_k = V3.n_routed_experts, V3.num_experts_per_tok
    expected = 0.0
    for sequence in range(3):
        rows = range(sequence * 10, sequence * 10 + 10)
        for e in range(experts):
            f = experts / (top_k * 10) * sum(int(e in routing.expert_ids[r].tolist()) for r in rows)
            p = sum(float(routing.scores[r, e] / routing.scores[r].sum()) for r in rows) / 10
            expected += f * p / 3
    assert float(router_report(routing, batch=3).balance_loss) == pytest.approx(expected, rel=1e-5)
    even = routing._replace(expert_ids=torch.arange(24).view(8, 3) % experts, scores=torch.full((8, experts), 0.5))
    assert float(router_report(even, batch=1).balance_loss) == pytest.approx(1.0)


def test_bias_rule_evens_out_a_skewed_router() -> None:
    """Repeating the rule on a router that prefers a few experts brings every expert near the mean load."""
    router = Router(V3.replace(n_group=1, topk_group=1))
    torch.nn.init.normal_(router.weight, 0.0, 0.1, generator=torch.Generator().manual_seed(0))
    x = _inputs(V3, 512) + 1.0

    def violation() -> float:
        load = torch.bincount(router(x).expert_ids.flatten(), minlength=router.experts).float()
        return float(load.max() / load.mean() - 1)

    before = violation()
    for _ in range(400):
        router.update_bias(torch.bincount(router(x).expert_ids.flatten(), minlength=router.experts), rate=0.002)
    assert before > 0.5
    assert violation() < 0.1


@pytest.mark.parametrize("config", [V3, V2, V2_LITE], ids=["v3", "v2", "v2-lite"])
def test_own_routes_change_nothing(config: ModelConfig) -> None:
    """Replaying the choice that the routers made gives the same hidden states, reports and gradients, to the bit."""
    model, ids = build(config), tokens(config, 2, 30)
    outcomes = []
    routes = None
    for _ in range(2):
        model.zero_grad()
        hidden, reports = model.hidden_states(ids, routes=routes)
        hidden.square().sum().backward()
        outcomes.append(
            [hidden, *(p.grad for p in model.model.parameters()), *(r for report in reports for r in report)]
        )
        routes = torch.stack([report.expert_ids for report in reports])
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


@pytest.mark.parametrize("config", [V3, V2], ids=["v3", "v2"])
def test_other_routes_are_weighted_by_live_scores(config: ModelConfig) -> None:
    """Given experts replace the chosen; their weights, normalisation included, and the router's gradient are those of
    its own scores for them."""
    router = build(config).model.layers[1].mlp.gate
    x, given = _inputs(config, 20), torch.stack([torch.randperm(router.experts)[: router.top_k] for _ in range(20)])
    routing = router(x, given)
    assert torch.equal(routing.expert_ids, given)
    upstream = torch.randn(20, router.top_k, generator=torch.Generator().manual_seed(1))
    (routing.weights * upstream).sum().backward()
    weight = router.weight.detach().clone().requires_grad_()
    logits = x @ weight.T
    scores = torch.stack(
        [(logits.sigmoid() if router.sigmoid else logits.softmax(-1))[n, e] for n, e in enumerate(given)]
    )
    expected = scores / scores.sum(-1, keepdim=True) if router.normalise else scores
    expected = expected * router.factor
    (expected * upstream).sum().backward()
    assert (routing.weights - expected).abs().max() <= 1e-6
    assert (router.weight.grad - weight.grad).abs().max() <= 1e-5 * weight.grad.abs().max()


def test_other_routes_reach_every_layer() -> None:
    """Replaying other routes in one layer changes the output and that layer's load, and every router has a gradient."""
    model, ids = build(V3), tokens(V3, 2, 30)
    hidden, reports = model.hidden_states(ids)
    own = torch.stack([report.expert_ids for report in reports])
    for layer in range(len(own)):
        routes = own.clone()
        routes[layer] = (routes[layer] + 1) % V3.n_routed_experts
        model.zero_grad()
        replayed, changed = model.hidden_states(ids, routes=routes)
        assert not torch.equal(replayed, hidden)
        assert torch.equal(changed[layer].load, reports[layer].load.roll(1))
        replayed.square().sum().backward()
        assert all(router.weight.grad.abs().sum() > 0 for router in model.routers[: len(own)])


def test_routes_of_another_model_are_a_defect_that_shows() -> None:
    """Routes for fewer layers than there are mixtures are not taken for some of them."""
    model, ids = build(V3), tokens(V3, 1, 4)
    with pytest.raises(AssertionError):
        model.hidden_states(ids, routes=torch.zeros(1, 4, V3.num_experts_per_tok, dtype=torch.int64))
