"""A model made ready for the engine: the same modules, with weights packed for the kernels.

`packed` walks a model and puts, in the place of every module that has a faster form, that form around the same numbers.
What the kernels cannot take (an odd width, no compiler on the machine) is computed by modules like the model's own.

The numbers are copies, all of them: norms, embeddings and the router's bias too. A trainer that moves its weights while
an engine writes with them changes nothing of what is written, until it hands them over (`Engine.load_weights`).
"""

import copy
import warnings
from typing import Literal

import torch
from torch import Tensor, nn

from fathom.errors import UserError
from fathom.kernels import ops
from fathom.kernels.panels import DTYPES, Packed, Rounding, pack
from fathom.model.attention import GQA, MLA
from fathom.model.layers import Embedding, FeedForward, Linear, RMSNorm
from fathom.model.moe import Experts, Router, Routing
from fathom.model.transformer import Transformer

Weights = Literal["as loaded", "int8", "fp8"]
"""What products read: the model's own numbers, int8 in blocks of 64 (activations are then rounded alike), or float8 in
DeepSeek's blocks of 128 × 128 (activations stay bfloat16, and so do the matrices that its format leaves alone)."""


NOT_IN_BLOCKS = ("lm_head", "eh_proj")
"""Linear maps that FP8 checkpoints keep in bfloat16. Rounded, the head alone costs most of what all others cost."""


class PackedLinear(nn.Module):
    """`Linear` over panels; `wide` returns float32."""

    def __init__(self, weight: Packed, bias: Tensor | None, *, wide: bool = False) -> None:
        super().__init__()
        self.weight, self.bias, self.wide = weight, bias, wide

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return ops.linear(x, self.weight, self.bias, wide=self.wide)


class PackedFeedForward(nn.Module):
    """`FeedForward` whose gate and up products are one, activation included."""

    def __init__(self, gate_up: Packed, down: Packed) -> None:
        super().__init__()
        self.gate_up, self.down = gate_up, down

    def forward(self, x: Tensor) -> Tensor:
        """x [..., width] -> the same shape."""
        return ops.linear(ops.swiglu(x, self.gate_up, self.down.inputs), self.down)


class PackedExperts(nn.Module):
    """`Experts` in one kernel."""

    def __init__(self, gate_up: Packed, down: Packed) -> None:
        super().__init__()
        self.gate_up, self.down = gate_up, down

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """x [N, hidden] -> Σ_k weight_k · expert_k(x) [N, hidden]."""
        return ops.experts(x, routing.expert_ids, routing.weights, self.gate_up, self.down)


class KernelRMSNorm(nn.Module):
    """`RMSNorm` in one kernel."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight.detach().to(torch.float32, copy=True).contiguous(), norm.eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., width] -> the same shape."""
        return ops.rms_norm(x, self.weight, self.eps)


class PackedRouter(Router):
    """`Router` whose scores do not depend on how many tokens are routed at once."""

    def __init__(self, router: Router, weight: Packed) -> None:
        nn.Module.__init__(self)
        self.__dict__ |= router.__dict__
        del self._parameters["weight"]
        self.packed = weight

    def logits(self, x: Tensor) -> Tensor:
        """x [N, hidden] float32 -> [N, E] float32."""
        return ops.linear(x.float(), self.packed)

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

    def __init__(self, attention: MLA, up_key: Packed, up_value: Packed) -> None:
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
    """`model` with packed weights, in the dtype of its activations; it shares no tensor with the model.

    Raises `UserError` where weights are to be rounded and the machine has no kernels for it; warns of those that stay.
    """
    dtype = model.compute_dtype or model.model.embed_tokens.weight.dtype
    sample = torch.empty(0, dtype=dtype, device=model.model.embed_tokens.weight.device)
    rounding = None if weights == "as loaded" else weights
    if rounding and (dtype is not torch.bfloat16 or not ops.usable(sample)):
        raise UserError(
            f"{weights} weights need a C++ compiler and a model in bfloat16 on the CPU; "
            "install g++, use --dtype bfloat16"
        )
    clone = _Packer(dtype, rounding, has_kernels=ops.usable(sample)).clone(model)
    clone.eval()
    if rounding:
        _say_what_stays(clone, rounding)
    return clone


def _say_what_stays(model: nn.Module, rounding: Rounding) -> None:
    """One warning with the number of matrices that stay as they were loaded because of their width."""
    named = model.named_modules()
    left_alone = NOT_IN_BLOCKS if rounding == "fp8" else ()
    found = [dtype for name, module in named if not name.endswith(left_alone) for dtype in _dtypes_of_matrices(module)]
    stay = sum(dtype is not DTYPES[rounding] for dtype in found)
    if stay:
        width = "no multiple of 64" if rounding == "int8" else "odd"
        warnings.warn(
            f"{rounding}: {stay} of {len(found)} matrices stay in bfloat16, because their width is {width}",
            stacklevel=3,
        )


def _dtypes_of_matrices(module: nn.Module) -> list[torch.dtype]:
    """What the module itself multiplies by, of those that may be rounded."""
    if isinstance(module, Linear):
        return [module.weight.dtype]
    if isinstance(module, Experts):
        return [module.down_proj.dtype] * 2 * module.down_proj.shape[0]
    if isinstance(module, PackedLinear):
        return [module.weight.panels.dtype]
    if isinstance(module, PackedFeedForward):
        return [module.gate_up.panels.dtype, module.down.panels.dtype]
    if isinstance(module, PackedExperts):
        return [module.gate_up.panels.dtype, module.down.panels.dtype] * module.down.panels.shape[0]
    return []


class _Packer:
    def __init__(self, dtype: torch.dtype, rounding: Rounding | None, *, has_kernels: bool) -> None:
        self.dtype, self.rounding, self.has_kernels = dtype, rounding, has_kernels
        self._copies: dict[int, nn.Parameter] = {}
        """By the id of the original: tied weights stay tied."""

    def clone(self, module: nn.Module) -> nn.Module:
        """A copy of the tree, packed or not, that shares no tensor."""
        faster = self._faster(module) if self.has_kernels else None
        if faster is not None:
            return faster
        clone = self._copied(module)
        clone._modules = {name: self._child(name, child) for name, child in module._modules.items()}
        if not self.has_kernels:
            return clone
        if isinstance(module, MLA):
            return self._with_absorbed(clone, module)
        if isinstance(module, GQA):
            return self._with_one_projection(clone, module)
        if isinstance(module, Transformer) and isinstance(clone.lm_head, PackedLinear):
            clone.lm_head.wide = True
        return clone

    def _child(self, name: str, child: nn.Module | None) -> nn.Module | None:
        if child is None:
            return None
        if self.rounding == "fp8" and name in NOT_IN_BLOCKS and self.has_kernels:
            return _Packer(self.dtype, None, has_kernels=True).clone(child)
        return self.clone(child)

    def _copied(self, module: nn.Module) -> nn.Module:
        """A copy of the module itself with tensors of its own and the same children."""
        clone = copy.copy(module)
        # What is rounded whenever it is used may as well be kept so.
        dtype = self.dtype if isinstance(module, Linear | Embedding) else None
        clone._parameters = {name: self._copy(parameter, dtype) for name, parameter in module._parameters.items()}
        clone._buffers = {name: None if b is None else b.detach().clone() for name, b in module._buffers.items()}
        return clone

    def _copy(self, parameter: nn.Parameter | None, dtype: torch.dtype | None) -> nn.Parameter | None:
        if parameter is None:
            return None
        if id(parameter) not in self._copies:
            copied = parameter.detach().to(dtype or parameter.dtype, copy=True)
            self._copies[id(parameter)] = nn.Parameter(copied, requires_grad=False)
        return self._copies[id(parameter)]

    def _faster(self, module: nn.Module) -> nn.Module | None:
        """The faster form of a module that has one here."""
        if isinstance(module, RMSNorm):
            return KernelRMSNorm(module)
        if isinstance(module, Linear):
            weight = self._pack(module.weight)
            bias = None if module.bias is None else module.bias.detach().to(self.dtype, copy=True)
            return None if weight is None else PackedLinear(weight, bias)
        if isinstance(module, Router):
            weight = pack(module.weight.detach().float())
            return None if weight is None else PackedRouter(self._copied(module), weight)
        pair = self._gate_up_and_down(module)
        if pair is None:
            return None
        gate_up, down = pair
        return PackedExperts(gate_up, down) if isinstance(module, Experts) else PackedFeedForward(gate_up, down)

    def _gate_up_and_down(self, module: nn.Module) -> tuple[Packed, Packed] | None:
        if isinstance(module, Experts):
            gate, up = module.gate_up_proj.detach().chunk(2, dim=1)
            down = module.down_proj
        elif isinstance(module, FeedForward) and module.gate_proj.bias is None:
            gate, up, down = module.gate_proj.weight, module.up_proj.weight, module.down_proj.weight
        else:
            return None
        pair = self._pack(gate, up, interleaved=True), self._pack(down)
        # One kernel multiplies by both, so both are packed alike.
        if len({packed.panels.dtype for packed in pair if packed is not None}) > 1:
            if isinstance(module, FeedForward):
                return None  # map by map, each as well as it can be
            pair = self._as_loaded(gate, up, interleaved=True), self._as_loaded(down)
        gate_up, down_packed = pair
        return None if gate_up is None or down_packed is None else (gate_up, down_packed)

    def _with_one_projection(self, clone: GQA, original: GQA) -> GQA:
        parts = (original.q_proj, original.k_proj, original.v_proj)
        weight = self._pack(*(part.weight for part in parts))
        has_bias = original.q_proj.bias is not None
        bias = torch.cat([part.bias.detach() for part in parts]).to(self.dtype) if has_bias else None
        if weight is None:
            return clone
        for name in ("q_proj", "k_proj", "v_proj"):
            del clone._modules[name]
        return PackedGQA(clone, PackedLinear(weight, bias))

    def _with_absorbed(self, clone: MLA, original: MLA) -> MLA:
        up_key, up_value = (matrix.detach().to(self.dtype) for matrix in original.up_projections())
        key, value = pack(up_key.mT.contiguous()), pack(up_value.contiguous())
        return clone if key is None or value is None else PackedMLA(clone, key, value)

    def _pack(self, *parts: Tensor, interleaved: bool = False) -> Packed | None:
        """Rounded where it can be, else as loaded, else None."""
        converted = [part.detach().to(self.dtype) for part in parts]
        rounded = pack(*converted, rounding=self.rounding, interleaved=interleaved) if self.rounding else None
        return rounded or self._as_loaded(*parts, interleaved=interleaved)

    def _as_loaded(self, *parts: Tensor, interleaved: bool = False) -> Packed | None:
        return pack(*(part.detach().to(self.dtype) for part in parts), interleaved=interleaved)
