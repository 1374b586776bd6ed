"""Texts that share beginnings, as one row of tokens: every prompt is computed once, forward and backward.

A group of rollouts is a *tree*: one trunk (the prompt) and branches (what was written after it). A *forest* is trees
one behind the other in one row, trunk first and then its branches, without padding:

    rows       trunk 0 | branch 0.0 | branch 0.1 | … | trunk 1 | branch 1.0 | …
    positions  0 … P-1 | P …        | P …        |   | 0 …     | P' …

All of a model but its attention treats tokens apart, and so needs not know. Attention is ordinary causal attention of
the trunk with itself, and of each branch with its trunk and itself: the branches of a tree are filled up to the same
length for that one product. With 8 samples of 64 tokens each behind a prompt of 64, half of the rows that whole
sequences would have are left. A tree of one branch is one text, and neighbouring ones of much the same length are one
product: 64 conversations of some 50 tokens are learnt in half the time that a product for each takes.

A token's keys and values depend on what is before it alone, so the numbers are those of whole sequences.

Legend: S rows, H query heads, G key/value heads, B branches of a tree, P trunk length, T longest branch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fathom.kernels import training
from fathom.model.attention_core import attention_backward, attention_forward


@dataclass(frozen=True)
class Tree:
    """Token ids of one prompt and of what follows it in each of several texts."""

    trunk: Sequence[int]
    """At least one."""
    branches: Sequence[Sequence[int]]
    """Each at least one."""

    @property
    def rows(self) -> int:
        """Rows it takes: a branch's last token is predicted, but never read."""
        return len(self.trunk) + sum(len(branch) - 1 for branch in self.branches)


@dataclass(frozen=True)
class Forest:
    """Trees as one row of tokens, and which row predicts what."""

    token_ids: Tensor
    """[S] int64."""
    positions: Tensor
    """[S] int64: place of each row's token in its own text."""
    sources: Tensor
    """[M] int64: the rows that predict the branches' tokens, branch by branch."""
    targets: Tensor
    """[M] int64: the tokens that they should predict."""
    owners: Tensor
    """[M] int64: the branch that each belongs to, counted over all trees."""
    parts: "tuple[_Part, ...]"
    """What attends together; a trunk comes before its branches."""

    @classmethod
    def plant(cls, trees: Sequence[Tree], device: torch.device | None = None) -> Self:
        """Lay out `trees` in their order."""
        ids: list[int] = []
        positions: list[int] = []
        sources, targets, owners, parts = [], [], [], []
        owner = 0
        single: list[int] = []  # lengths of the last texts, each a tree of one branch, that are no part yet

        def end_single() -> None:
            if single:
                parts.append(_Part.of(_NONE, len(ids) - sum(single), single, device))
                single.clear()

        for tree in trees:
            assert all((tree.trunk, *tree.branches)), "a trunk and its branches have tokens"
            alone = len(tree.branches) == 1
            if not (alone and _alike([*single, tree.rows])):
                end_single()
            trunk = slice(len(ids), len(ids) + len(tree.trunk))
            ids.extend(tree.trunk)
            positions.extend(range(len(tree.trunk)))
            if alone:
                single.append(tree.rows)
            else:
                parts.append(_Part.of(_NONE, trunk.start, [len(tree.trunk)], device))
            for branch in tree.branches:
                sources += [trunk.stop - 1, *range(len(ids), len(ids) + len(branch) - 1)]
                targets += branch
                owners += [owner] * len(branch)
                ids.extend(branch[:-1])
                positions.extend(range(len(tree.trunk), len(tree.trunk) + len(branch) - 1))
                owner += 1
            longer = [len(branch) - 1 for branch in tree.branches if len(branch) > 1]
            if longer and not alone:
                parts.append(_Part.of(trunk, trunk.stop, longer, device))
        end_single()
        tensors = [torch.tensor(values, device=device) for values in (ids, positions, sources, targets, owners)]
        return cls(*tensors, tuple(parts))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Attention inside of each tree: q [1, H, S, Dk], k [1, G, S, Dk], v [1, G, S, Dv] -> [1, H, S, Dv]."""
        rows = (t.squeeze(0).transpose(0, 1) for t in (q, k, v))
        return _Attention.apply(*rows, self.parts, scale).transpose(0, 1).unsqueeze(0)


_NONE = slice(0, 0)
"""No trunk."""


def _alike(lengths: Sequence[int]) -> bool:
    """Whether texts of `lengths`, filled up to the longest, make no more than twice the work that they are."""
    return len(lengths) * max(lengths) ** 2 <= 2 * sum(length**2 for length in lengths)


@dataclass(frozen=True)
class _Part:
    """What one call of the attention computes: a trunk, all branches of a tree, or whole texts of one branch each."""

    trunk: slice
    """Rows that all of its texts begin with; empty for a trunk itself."""
    rows: slice
    """The texts' own rows, one text behind the other."""
    index: Tensor
    """[B, T] int64: the row of each place, texts filled up at their ends with whichever rows follow."""
    places: Tensor
    """[rows] int64: where each of the rows stands in the flattened index."""

    @classmethod
    def of(cls, trunk: slice, first: int, lengths: Sequence[int], device: torch.device | None) -> "_Part":
        """For texts of `lengths` that lie one behind the other from row `first` on."""
        counts = torch.tensor(lengths, device=device)
        firsts = first + counts.cumsum(0) - counts
        steps = torch.arange(max(lengths), device=device)
        rows = slice(first, first + sum(lengths))
        index = (firsts[:, None] + steps).clamp(max=rows.stop - 1)
        return cls(trunk, rows, index, (steps < counts[:, None]).flatten().nonzero().squeeze(1))

    def own(self, x: Tensor) -> Tensor:
        """x [S, heads, D] -> [B, heads, T, D]."""
        return x[self.index].transpose(1, 2)

    def seen(self, x: Tensor) -> Tensor:
        """x [S, heads, D] -> [B, heads, P + T, D]."""
        if self.trunk.stop == self.trunk.start:
            return self.own(x)
        shared = x[self.trunk].expand(len(self.index), -1, -1, -1)
        return torch.cat((shared, x[self.index]), dim=1).transpose(1, 2)

    def put(self, values: Tensor, into: Tensor) -> None:
        """values [B, heads, T, D] into their rows of [S, heads, D]; what fills up is left out."""
        into[self.rows] = values.transpose(1, 2).flatten(0, 1)[self.places]

    def take(self, x: Tensor) -> Tensor:
        """x [S, heads, D] -> [B, heads, T, D], where what fills up is 0."""
        taken = x.new_zeros(self.index.numel(), *x.shape[1:])
        taken[self.places] = x[self.rows]
        return taken.unflatten(0, self.index.shape).transpose(1, 2)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, parts: tuple[_Part, ...], scale: float) -> Tensor:
        kernels = training.attention_fits(q, v)
        o = q.new_empty(*q.shape[:2], v.shape[-1])
        log_sums = []
        for part in parts:
            values, sums = attention_forward(part.own(q), part.seen(k), part.seen(v), scale, kernels)
            part.put(values, o)
            log_sums.append(sums)
        ctx.parts, ctx.scale, ctx.kernels = parts, scale, kernels
        ctx.save_for_backward(q, k, v, *log_sums)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *log_sums = ctx.saved_tensors
        dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
        for part, sums in zip(ctx.parts, log_sums, strict=True):
            # Rows that fill up ask for nothing, or their keys would be given a gradient.
            gradients = attention_backward(
                part.take(do), part.own(q), part.seen(k), part.seen(v), sums, ctx.scale, ctx.kernels
            )
            part.put(gradients[0], dq)
            shared = part.trunk.stop - part.trunk.start
            for gradient, into in zip(gradients[1:], (dk, dv), strict=True):
                part.put(gradient[:, :, shared:], into)
                if shared:
                    asked = gradient[:, :, :shared].sum(0, dtype=torch.float32).transpose(0, 1)
                    into[part.trunk] += asked.to(into.dtype)
        return dq, dk, dv, None, None
