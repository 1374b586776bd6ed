"""A model made ready for the engine: the same modules, with weights packed for the kernels.

`packed` walks a model and puts, in the place of every module that has a faster form, that form around the same numbers.
What the kernels cannot take (an odd width, no compiler on the machine) stays as it is.
"""

import copy
from typing import Literal

import torch
from torch import Tensor, nn

from fathom.errors import UserError
from fathom.kernels import ops
from fathom.model.attention import GQA, MLA
from fathom.model.layers import FeedForward, Linear, RMSNorm
from fathom.model.moe import Experts, Router, Routing
from fathom.model.transformer import Transformer

Weights = Literal["as loaded", "int8"]
"""What products read: the model's own numbers, or int8 blocks of 64 (activations are then rounded alike)."""


class PackedLinear(nn.Module):
    """`Linear` over panels; `wide` returns float32."""

    def __init__(self, weight: ops.Packed, bias: Tensor | None, *, wide: bool = False) -> None:
        super().__init__()
        self.weight, self.bias, self.wide = weight, bias, wide

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return ops.linear(x, self.weight, self.bias, wide=self.wide)


class PackedFeedForward(nn.Module):
    """`FeedForward` whose gate and up products are one, activation included."""

    def __init__(self, gate_up: ops.Packed, down: ops.Packed) -> None:
        super().__init__()
        self.gate_up, self.down = gate_up, down

    def forward(self, x: Tensor) -> Tensor:
        """x [..., width] -> the same shape."""
        return ops.linear(ops.swiglu(x, self.gate_up, self.down.inputs), self.down)


class PackedExperts(nn.Module):
    """`Experts` in one kernel."""

    def __init__(self, gate_up: ops.Packed, down: ops.Packed) -> None:
        super().__init__()
        self.gate_up, self.down = gate_up, down

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """x [N, hidden] -> Σ_k weight_k · expert_k(x) [N, hidden]."""
        return ops.experts(x, routing.expert_ids, routing.weights, self.gate_up, self.down)


class KernelRMSNorm(nn.Module):
    """`RMSNorm` in one kernel."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight.detach().float().contiguous(), norm.eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., width] -> the same shape."""
        return ops.rms_norm(x, self.weight, self.eps)


class PackedRouter(Router):
    """`Router` whose scores do not depend on how many tokens are routed at once."""

    def __init__(self, router: Router, weight: ops.Packed) -> None:
        nn.Module.__init__(self)
        self.__dict__ |= copy.copy(router).__dict__
        self.packed = weight

    def logits(self, x: Tensor) -> Tensor:
        """x [N, hidden] float32 -> [N, E] float32."""
        return ops.linear(x, self.packed)

    def affinities(self, logits: Tensor) -> Tensor:
        """The sigmoid; torch's own rounds the last few numbers of a tensor differently from the others."""
        return 1 / (1 + torch.exp(-logits))


class PackedGQA(GQA):
    """`GQA` whose three projections are one product."""

    def __init__(self, attention: GQA, projection: PackedLinear) -> None:
        nn.Module.__init__(self)
        self.__dict__ |= attention.__dict__
        self.projection = projection

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, hidden] -> q [T, H, D], k and v [T, G, D]."""
        heads = self.projection(x).view(-1, self.heads + 2 * self.groups, self.head_dim)
        return heads.split((self.heads, self.groups, self.groups), dim=1)


class PackedMLA(MLA):
    """`MLA` whose absorbed projections are packed, a matrix per head."""

    def __init__(self, attention: MLA, up_key: ops.Packed, up_value: ops.Packed) -> None:
        nn.Module.__init__(self)
        self.__dict__ |= attention.__dict__
        self.up_key, self.up_value = up_key, up_value

    def absorb_queries(self, q_nope: Tensor) -> Tensor:
        """q [T, H, N] -> W^UKᵀ q [T, H, C]."""
        return ops.heads_linear(q_nope, self.up_key)

    def expand_values(self, mixed: Tensor) -> Tensor:
        """Mixed latents [T, H, C] -> values W^UV c [T, H, V]."""
        return ops.heads_linear(mixed, self.up_value)


def packed(model: Transformer, weights: Weights = "as loaded") -> Transformer:
    """`model` with packed weights, in the dtype of its activations; it keeps no reference to what it could pack.

    Raises `UserError` where int8 is asked for and the machine has no kernels for it.
    """
    dtype = model.compute_dtype or model.model.embed_tokens.weight.dtype
    sample = torch.empty(0, dtype=dtype, device=model.model.embed_tokens.weight.device)
    if weights == "int8" and (dtype is not torch.bfloat16 or not ops.usable(sample)):
        raise UserError(
            "int8 weights need a C++ compiler and a model in bfloat16 on the CPU; install g++, use --dtype bfloat16"
        )
    if not ops.usable(sample):
        return model
    clone = _Packer(dtype, int8=weights == "int8").clone(model)
    clone.eval()
    return clone


class _Packer:
    def __init__(self, dtype: torch.dtype, *, int8: bool) -> None:
        self.dtype, self.int8 = dtype, int8

    def clone(self, module: nn.Module) -> nn.Module:
        """A copy of the tree that shares every tensor which is not packed."""
        faster = self._faster(module)
        if faster is not None:
            return faster
        clone = copy.copy(module)
        clone._modules = {name: None if child is None else self.clone(child) for name, child in module._modules.items()}
        if isinstance(module, MLA):
            return self._with_absorbed(clone, module)
        if isinstance(module, GQA):
            return self._with_one_projection(clone, module)
        if isinstance(module, Transformer) and isinstance(clone.lm_head, PackedLinear):
            clone.lm_head.wide = True
        return clone

    def _faster(self, module: nn.Module) -> nn.Module | None:
        """The faster form of a module that has one here."""
        if isinstance(module, RMSNorm):
            return KernelRMSNorm(module)
        if isinstance(module, Linear):
            weight = self._pack(module.weight)
            bias = None if module.bias is None else module.bias.detach().to(self.dtype)
            return None if weight is None else PackedLinear(weight, bias)
        if isinstance(module, Router):
            weight = ops.pack(module.weight.detach().float())
            return None if weight is None else PackedRouter(module, weight)
        pair = self._gate_up_and_down(module)
        if pair is None:
            return None
        gate_up, down = pair
        return PackedExperts(gate_up, down) if isinstance(module, Experts) else PackedFeedForward(gate_up, down)

    def _gate_up_and_down(self, module: nn.Module) -> tuple[ops.Packed, ops.Packed] | None:
        if isinstance(module, Experts):
            gate, up = module.gate_up_proj.detach().chunk(2, dim=1)
            down = module.down_proj
        elif isinstance(module, FeedForward) and module.gate_proj.bias is None:
            gate, up, down = module.gate_proj.weight, module.up_proj.weight, module.down_proj.weight
        else:
            return None
        gate_up, down = self._pack(ops.interleave(gate.detach(), up.detach())), self._pack(down)
        # One kernel multiplies by both, so both are packed alike or neither is.
        if gate_up is None or down is None or gate_up.panels.dtype is not down.panels.dtype:
            return None
        return gate_up, down

    def _with_one_projection(self, clone: GQA, original: GQA) -> GQA:
        parts = (original.q_proj, original.k_proj, original.v_proj)
        weight = self._pack(torch.cat([part.weight.detach() for part in parts]))
        has_bias = original.q_proj.bias is not None
        bias = torch.cat([part.bias.detach() for part in parts]).to(self.dtype) if has_bias else None
        if weight is None:
            return clone
        for name in ("q_proj", "k_proj", "v_proj"):
            del clone._modules[name]
        return PackedGQA(clone, PackedLinear(weight, bias))

    def _with_absorbed(self, clone: MLA, original: MLA) -> MLA:
        up_key, up_value = (matrix.detach().to(self.dtype) for matrix in original.up_projections())
        key, value = ops.pack(up_key.mT.contiguous()), ops.pack(up_value.contiguous())
        return clone if key is None or value is None else PackedMLA(clone, key, value)

    def _pack(self, weight: Tensor) -> ops.Packed | None:
        weight = weight.detach().to(self.dtype)
        return (ops.pack(weight, int8=True) if self.int8 else None) or ops.pack(weight)
