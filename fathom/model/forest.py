"""Texts that share beginnings, as one row of tokens: every prompt is computed once, forward and backward.

A group of rollouts is a *tree*: one trunk (the prompt) and branches (what was written after it). A *forest* is trees
one behind the other in one row, trunk first and then its branches, without padding:

    rows       trunk 0 | branch 0.0 | branch 0.1 | … | trunk 1 | branch 1.0 | …
    positions  0 … P-1 | P …        | P …        |   | 0 …     | P' …

All of a model but its attention treats tokens apart, and so needs not know. Attention is ordinary causal attention of
the trunk with itself, and of each branch with its trunk and itself: the branches of a tree are filled up to the same
length for that one product. With 8 samples of 64 tokens each behind a prompt of 64, half of the rows that whole
sequences would have are left.

A token's keys and values depend on what is before it alone, so the numbers are those of whole sequences.

Legend: S rows, H query heads, G key/value heads, B branches of a tree, P trunk length, T longest branch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

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
    spans: Tensor
    """[trees + branches, 3] int64, on the CPU: tree, first row, row behind the last; trunks before their branches."""
    sources: Tensor
    """[M] int64: the rows that predict the branches' tokens, branch by branch."""
    targets: Tensor
    """[M] int64: the tokens that they should predict."""
    owners: Tensor
    """[M] int64: the branch that each belongs to, counted over all trees."""

    @classmethod
    def plant(cls, trees: Sequence[Tree], device: torch.device | None = None) -> Self:
        """Lay out `trees` in their order."""
        ids: list[int] = []
        positions: list[int] = []
        spans, sources, targets, owners = [], [], [], []
        owner = 0
        for number, tree in enumerate(trees):
            assert all((tree.trunk, *tree.branches)), "a trunk and its branches have tokens"
            spans.append((number, len(ids), len(ids) + len(tree.trunk)))
            ids.extend(tree.trunk)
            positions.extend(range(len(tree.trunk)))
            trunk_end = len(ids) - 1
            for branch in tree.branches:
                first = len(ids)
                spans.append((number, first, first + len(branch) - 1))
                ids.extend(branch[:-1])
                positions.extend(range(len(tree.trunk), len(tree.trunk) + len(branch) - 1))
                sources += [trunk_end, *range(first, len(ids))]
                targets += branch
                owners += [owner] * len(branch)
                owner += 1
        on_device = [torch.tensor(values, device=device) for values in (ids, positions)]
        rest = [torch.tensor(values, device=device) for values in (sources, targets, owners)]
        return cls(*on_device, torch.tensor(spans), *rest)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Attention inside of each tree: q [1, H, S, Dk], k [1, G, S, Dk], v [1, G, S, Dv] -> [1, H, S, Dv]."""
        rows = (t.squeeze(0).transpose(0, 1) for t in (q, k, v))
        o, _ = _attention(*rows, self.spans, scale, training.attention_fits(q, v))
        return o.transpose(0, 1).unsqueeze(0)


@dataclass(frozen=True)
class _Part:
    """What one call of the attention computes: a trunk, or all branches of a tree."""

    trunk: slice
    """Rows that all of its texts begin with; empty for a trunk itself."""
    rows: list[slice]
    """Each text's own rows."""
    index: Tensor
    """[B, T] int64: the same, filled up with a text's last row (or the trunk's)."""

    def own(self, x: Tensor) -> Tensor:
        """x [S, heads, D] -> [B, heads, T, D]."""
        return x[self.index].transpose(1, 2)

    def seen(self, x: Tensor) -> Tensor:
        """x [S, heads, D] -> [B, heads, P + T, D]."""
        if self.trunk.stop == self.trunk.start:
            return self.own(x)
        shared = x[self.trunk].expand(len(self.rows), -1, -1, -1)
        return torch.cat((shared, x[self.index]), dim=1).transpose(1, 2)

    def put(self, values: Tensor, into: Tensor) -> None:
        """values [B, heads, T, D] into their rows of [S, heads, D]; what fills up is left out."""
        for value, rows in zip(values.transpose(1, 2), self.rows, strict=True):
            into[rows] = value[: rows.stop - rows.start]


def _parts(spans: Tensor, device: torch.device) -> Iterator[_Part]:
    """A forest's trunks and branches, so that a trunk comes before its branches."""
    trees: dict[int, list[slice]] = {}
    for tree, first, last in spans.tolist():
        trees.setdefault(tree, []).append(slice(first, last))
    for trunk, *branches in trees.values():
        yield _part(slice(0, 0), [trunk], device)
        if longer := [branch for branch in branches if branch.stop > branch.start]:
            yield _part(trunk, longer, device)


def _part(trunk: slice, rows: list[slice], device: torch.device) -> _Part:
    first = torch.tensor([part.start for part in rows], device=device)
    last = torch.tensor([part.stop - 1 for part in rows], device=device)
    longest = max(part.stop - part.start for part in rows)
    steps = torch.arange(longest, device=device)
    return _Part(trunk, rows, torch.minimum(first[:, None] + steps, last[:, None]))


@torch.library.custom_op("fathom::forest_attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, spans: Tensor, scale: float, kernels: bool) -> tuple[Tensor, Tensor]:
    """Returns (o [S, H, Dv], log(sum(exp(scores))) [S, H, 1] float32; the latter empty without kernels)."""
    o, log_sums = _like_output(q, v, kernels)
    for part in _parts(spans, q.device):
        values, sums = attention_forward(part.own(q), part.seen(k), part.seen(v), scale, kernels)
        part.put(values, o)
        if kernels:
            part.put(sums.unsqueeze(-1), log_sums)
    return o, log_sums


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, spans: Tensor, scale: float, kernels: bool) -> tuple[Tensor, Tensor]:
    return _like_output(q, v, kernels)


def _like_output(q: Tensor, v: Tensor, kernels: bool) -> tuple[Tensor, Tensor]:
    log_sums = q.new_empty((*q.shape[:2], 1) if kernels else 0, dtype=torch.float32)
    return q.new_empty(*q.shape[:2], v.shape[-1]), log_sums


@torch.library.custom_op("fathom::forest_attention_backward", mutates_args=())
def _attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, log_sums: Tensor, spans: Tensor, scale: float, kernels: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv) in the shapes of q, k, v. A trunk's keys gather what all of its branches ask of them."""
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (k, v))
    for part in _parts(spans, q.device):
        # Rows that fill up ask for nothing, or their keys would be given a gradient.
        upstream = do.new_zeros(len(part.rows), *part.index.shape[1:], *do.shape[1:])
        for row, rows in zip(upstream, part.rows, strict=True):
            row[: rows.stop - rows.start] = do[rows]
        sums = part.own(log_sums).squeeze(-1).contiguous() if kernels else log_sums
        gradients = attention_backward(
            upstream.transpose(1, 2), part.own(q), part.seen(k), part.seen(v), sums, scale, kernels
        )
        part.put(gradients[0], dq)
        shared = part.trunk.stop - part.trunk.start
        for gradient, into in zip(gradients[1:], (dk, dv), strict=True):
            part.put(gradient[:, :, shared:], into)
            if shared:
                into[part.trunk] += gradient[:, :, :shared].sum(0, dtype=torch.float32).transpose(0, 1).to(into.dtype)
    return dq, dk, dv


@_attention_backward.register_fake
def _(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, log_sums: Tensor, spans: Tensor, scale: float, kernels: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))


def _save_for_backward(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, spans, ctx.scale, ctx.kernels = inputs
    ctx.save_for_backward(q, k, v, output[1], spans)


def _differentiate(ctx, do: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, log_sums, spans = ctx.saved_tensors
    gradients = _attention_backward(do, q, k, v, log_sums, spans, ctx.scale, ctx.kernels)
    return (*gradients, None, None, None)


_attention.register_autograd(_differentiate, setup_context=_save_for_backward)
