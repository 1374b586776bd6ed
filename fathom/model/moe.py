"""DeepSeekMoE: a router, many small experts, and shared ones (arXiv 2401.06066; DeepSeek-V3 §2.1.2).

**Routing.** Every expert has a score for a token: sigmoid(u·e) in V3, softmax over experts in V2. The best k are
chosen, at most `topk_group` groups of experts being reachable per token (groups live on nodes; node-limited
routing bounds the traffic). No token is dropped: an expert takes as many as choose it.

**Balance without a loss.** V3 adds a bias b to the scores *for choosing only*; the weights of the chosen come from
the plain scores, so the bias never meets a gradient. Once per training step, over the load of the whole
batch, b rises by γ for experts below the mean load and falls by γ for those above (arXiv 2408.15664).

**The sequence-wise loss** (V3 eqs 17–20) is a small complement against extremes within one sequence. The report prints
f with the plain top-k of the scores; here it counts the experts that were actually chosen, which is what has to
be balanced (the two agree when bias and groups decide nothing).

**Replay.** Trainer and engine round differently, and for some tokens that turns the choice of an expert, which makes
their probabilities incomparable. So a choice can be given (rollout routing replay, arXiv 2510.11370): the chosen are
replaced, their weights are taken from the scores of this pass, and the router keeps its gradient.

Shapes: B batch, T tokens of a sequence, N = B·T tokens, E experts, K experts per token.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fathom.config.model import ModelConfig
from fathom.model.experts import routed_experts
from fathom.model.layers import FeedForward


class Routing(NamedTuple):
    """What a router decided for N tokens."""

    expert_ids: Tensor
    """[N, K] int64."""
    weights: Tensor
    """[N, K] float32, differentiable."""
    scores: Tensor
    """[N, E] float32: the unbiased scores."""


class RouterReport(NamedTuple):
    """What balancing needs to know of one layer's forward pass."""

    load: Tensor
    """[E] int64: tokens per expert."""
    balance_loss: Tensor
    """Scalar float32: the sequence-wise loss before its weight α, averaged over sequences."""
    expert_ids: Tensor
    """[N, K] int64: the choice for every token."""


class Router(nn.Module):
    """Scores experts and chooses K per token, within the best groups. Everything in float32."""

    e_score_correction_bias: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.n_routed_experts is not None
        self.experts, self.top_k = config.n_routed_experts, config.num_experts_per_tok
        self.groups, self.top_groups = config.n_group, config.topk_group
        self.sigmoid, self.method = config.scoring_func == "sigmoid", config.topk_method
        self.normalise, self.factor = config.norm_topk_prob, config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(self.experts, config.hidden_size))
        if self.method == "noaux_tc":
            self.register_buffer("e_score_correction_bias", torch.zeros(self.experts, dtype=torch.float32))

    def forward(self, x: Tensor, expert_ids: Tensor | None = None) -> Routing:
        """x [N, hidden] -> the choice for every token; `expert_ids` [N, K] int64 makes it, None leaves it to scores."""
        logits = self.logits(x)
        scores = self.affinities(logits) if self.sigmoid else logits.softmax(dim=-1)
        if expert_ids is None:
            with torch.no_grad():
                expert_ids = self._choose(scores)
        weights = scores.gather(1, expert_ids)
        if self.normalise:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return Routing(expert_ids, weights * self.factor, scores)

    def logits(self, x: Tensor) -> Tensor:
        """x [N, hidden] -> [N, E] float32."""
        return _WideLinear.apply(x, self.weight)

    def affinities(self, logits: Tensor) -> Tensor:
        """V3's scores of logits [N, E]."""
        return logits.sigmoid()

    def _choose(self, scores: Tensor) -> Tensor:
        """scores [N, E] -> the chosen experts [N, K]."""
        if self.method == "noaux_tc":
            scores = scores + self.e_score_correction_bias
        if self.method != "greedy" and self.top_groups < self.groups:
            scores = scores.masked_fill(~self._reachable(scores), float("-inf"))
        return scores.topk(self.top_k, dim=-1, sorted=False).indices

    def _reachable(self, scores: Tensor) -> Tensor:
        """Mask [N, E] of the experts in the best groups: by their two best (V3) or their best (V2) score."""
        grouped = scores.unflatten(-1, (self.groups, -1))
        best = 2 if self.method == "noaux_tc" else 1
        group_scores = grouped.topk(best, dim=-1).values.sum(dim=-1)
        chosen = group_scores.topk(self.top_groups, dim=-1, sorted=False).indices
        mask = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(1, chosen, True)
        return mask.unsqueeze(-1).expand_as(grouped).flatten(1)

    @torch.no_grad()
    def update_bias(self, load: Tensor, rate: float) -> None:
        """b += rate · sign(mean load − load), once per step; `load` [E] counts the whole batch."""
        wide = load.to(torch.float32)
        self.e_score_correction_bias += rate * torch.sign(wide.mean() - wide)


class _WideLinear(torch.autograd.Function):
    """x Wᵀ in float32, of which no float32 copy of `x` is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x.float(), weight.float())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx = (dy @ weight.float()).to(x.dtype) if ctx.needs_input_grad[0] else None
        return dx, (dy.T @ x.float()).to(weight.dtype) if ctx.needs_input_grad[1] else None


class Experts(nn.Module):
    """The routed experts' weights, stacked so that one grouped product serves all of them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.n_routed_experts is not None
        experts, width, inner = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, width))
        self.down_proj = nn.Parameter(torch.empty(experts, width, inner))

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """x [N, hidden] -> Σ_k weight_k · expert_k(x) [N, hidden]."""
        return routed_experts(x, routing.expert_ids, routing.weights, self.gate_up_proj, self.down_proj)


class MoE(nn.Module):
    """Router, routed experts and shared experts in the place of a feed-forward layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        shared = config.n_shared_experts * config.moe_intermediate_size
        self.shared_experts = FeedForward(config.hidden_size, shared) if shared else None

    def forward(self, x: Tensor, expert_ids: Tensor | None = None) -> tuple[Tensor, RouterReport]:
        """x [B, T, hidden] -> (the same shape, the router's report); `expert_ids` [B·T, K] as in `Router.forward`."""
        flat = x.flatten(0, 1)
        routing = self.gate(flat, expert_ids)
        y = self.experts(flat, routing)
        if self.shared_experts is not None:
            y = y + self.shared_experts(flat)
        return y.view_as(x), router_report(routing, batch=x.shape[0])


def router_report(routing: Routing, batch: int) -> RouterReport:
    """Load per expert and the sequence-wise balance loss of `batch` sequences (V3 eqs 17–20, α left out)."""
    experts, top_k = routing.scores.shape[1], routing.expert_ids.shape[1]
    chosen = routing.expert_ids.reshape(batch, -1)  # [B, T·K]
    counts = torch.zeros(batch, experts, dtype=torch.int64, device=chosen.device)
    counts = counts.scatter_add(1, chosen, torch.ones_like(chosen))
    time = chosen.shape[1] // top_k
    frequency = counts * (experts / (top_k * time))  # f: 1 for every expert when balanced
    shares = routing.scores / routing.scores.sum(dim=-1, keepdim=True)
    mean_share = shares.view(batch, time, experts).mean(dim=1)  # P
    return RouterReport(counts.sum(dim=0), (frequency * mean_share).sum(dim=1).mean(), routing.expert_ids)
