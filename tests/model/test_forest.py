"""A forest against its texts, each alone."""

import random

import pytest
import torch

from fathom.config import ModelConfig
from fathom.kernels import training
from fathom.model.forest import Forest, Tree
from fathom.model.transformer import Transformer
from tests.model.configs import FAMILIES, build

every_family = pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES.keys())


def trees(vocab: int) -> list[Tree]:
    """Trunks and branches of unlike lengths, branches of one token, none at all, and texts of one branch: of much the
    same length, of other ones, and apart from them."""
    source = random.Random(1)

    def text(length: int) -> list[int]:
        return [source.randrange(vocab) for _ in range(length)]

    shapes = [(7, (5, 1, 9)), (1, (4, 4)), (12, (6,)), (9, (7,)), (3, (13,)), (1, (2,)), (3, (1, 1)), (2, (1,))]
    shapes.append((5, ()))
    return [Tree(text(trunk), [text(length) for length in branches]) for trunk, branches in shapes]


def one_by_one(model: Transformer, grove: list[Tree]) -> torch.Tensor:
    """Log-probability of every branch's tokens [M], each text computed whole and alone."""
    found = []
    for tree in grove:
        for branch in tree.branches:
            ids = torch.tensor([[*tree.trunk, *branch]])
            logits = model(ids)[0, len(tree.trunk) - 1 : -1]
            found.append(logits.log_softmax(-1).gather(1, torch.tensor(branch)[:, None])[:, 0])
    return torch.cat(found)


def together(model: Transformer, grove: list[Tree]) -> torch.Tensor:
    """The same in one forest."""
    forest = Forest.plant(grove)
    hidden, _ = model.forest_states(forest)
    logits = model.logits(hidden[forest.sources])
    return logits.log_softmax(-1).gather(1, forest.targets[:, None])[:, 0]


@every_family
def test_a_forest_has_the_numbers_of_its_texts(config: ModelConfig) -> None:
    """Log-probabilities and every parameter's gradient equal those of each text computed whole and alone."""
    model = build(config)
    grove = trees(config.vocab_size)
    weights = torch.randn(sum(len(b) for tree in grove for b in tree.branches), generator=torch.manual_seed(0))
    results = []
    for compute in (one_by_one, together):
        model.zero_grad()
        logprobs = compute(model, grove)
        (logprobs * weights).sum().backward()
        results.append(
            (logprobs.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        )
    (alone, gradients), (joined, joined_gradients) = results
    torch.testing.assert_close(joined, alone, rtol=0, atol=1e-4)
    assert gradients.keys() == joined_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(joined_gradients[name], gradient, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.skipif(not training.available(), reason="needs a processor whose vectors multiply bfloat16")
@pytest.mark.parametrize("widths", [(64, 64), (96, 64), (48, 32)])
def test_kernels_and_products_agree_on_a_forest(widths: tuple[int, int]) -> None:
    """In bfloat16 the kernels' output and gradients are as near to float32's as the spelt-out products' are."""
    forest = Forest.plant(trees(100))
    rows = len(forest.token_ids)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, rows, width) for heads, width in ((6, widths[0]), (2, widths[0]), (2, widths[1])))
    upstream = torch.randn(1, 6, rows, widths[1])
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [t.to(dtype, copy=True).requires_grad_() for t in (q, k, v)]
        o = forest.attend(*inputs, 0.1)
        o.backward(upstream.to(dtype))
        results.append([o.detach(), *(t.grad for t in inputs)])
    for exact, rounded in zip(*results, strict=True):
        assert (rounded.float() - exact).norm() < 0.01 * exact.norm()


def test_texts_of_one_branch_attend_together_if_they_are_alike() -> None:
    """Neighbours that fill up to no more than twice their own work are one product; a group of branches ends them."""
    texts = [Tree([1] * trunk, [[2] * branch]) for trunk, branch in ((9, 8), (4, 12), (30, 1), (2, 2))]
    group = Tree([1, 2, 3], [[4, 5], [6, 7]])
    parts = Forest.plant([*texts, group, texts[3]]).parts
    assert [tuple(part.index.shape) for part in parts] == [(3, 30), (1, 3), (1, 3), (2, 1), (1, 3)]
    assert sum(part.rows.stop - part.rows.start for part in parts) == 16 + 15 + 30 + 3 + 3 + 2 + 3


def test_a_forest_says_which_row_predicts_what() -> None:
    """The first token of a branch is predicted by the trunk's last row, the others by the branch's own; a branch's last
    token is not read."""
    forest = Forest.plant([Tree([1, 2], [[3, 4, 5], [6]]), Tree([7], [[8, 9]])])
    assert forest.token_ids.tolist() == [1, 2, 3, 4, 7, 8]
    assert forest.positions.tolist() == [0, 1, 2, 3, 0, 1]
    assert forest.sources.tolist() == [1, 2, 3, 1, 4, 5]
    assert forest.targets.tolist() == [3, 4, 5, 6, 8, 9]
    assert forest.owners.tolist() == [0, 0, 0, 1, 2, 2]
    assert [tree.rows for tree in (Tree([1, 2], [[3, 4, 5], [6]]), Tree([7], [[8, 9]]))] == [4, 2]
