"""One `update` against the formulas of the papers, computed text by text with autograd and torch's own AdamW."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fathom.config.rl import RLRecipe
from fathom.model.transformer import Transformer
from fathom.tasks.reading import Reading
from fathom.tasks.rewards import Reward
from fathom.tasks.task import Problem
from fathom.train.learner import Learner, update
from fathom.train.optimizers import build_optimizer
from fathom.train.rollout import Drawn, Group, Rollout
from fathom.train.state import Progress
from tests.model.configs import LLAMA, build

LOW, HIGH = 0.2, 0.28
OPTIMIZER = {
    "lr": 1e-2,
    "weight_decay": 0.1,
    # A small one magnifies the rounding of gradients that are nearly 0 to steps of the size of lr.
    "eps": 1e-3,
}


def group(prompt: int, lengths: tuple[int, ...], rewards: tuple[float, ...], *, finished: bool = True) -> Group:
    """Random tokens of these lengths."""
    rollouts = [
        Rollout(
            Drawn(torch.randint(LLAMA.vocab_size, (length,)).tolist(), [-1.0] * length, finished),
            "",
            Reward(reward, {}, Reading("", None, False, ""), ""),
        )
        for length, reward in zip(lengths, rewards, strict=True)
    ]
    return Group(Problem("?"), torch.randint(LLAMA.vocab_size, (prompt,)).tolist(), rollouts)


@pytest.fixture
def groups() -> list[Group]:
    """Two groups of unequal sizes and lengths."""
    torch.manual_seed(0)
    return [group(5, (2, 7, 1, 14), (0.0, 1.0, 0.0, 0.5)), group(3, (30, 13, 25), (1.0, 0.0, 0.9))]


def learner(model: Transformer, **sections: dict[str, Any]) -> Learner:
    recipe = RLRecipe(
        name="r",
        model="m",
        task={"name": "modular"},
        **({"rollout": {"problems": 4, "samples": 4}, "optimizer": OPTIMIZER} | sections),
    )
    # No part of an update reads the tokenizer.
    return Learner(recipe, model, None, build_optimizer(model, recipe.optimizer), Progress(), None)  # type: ignore[arg-type]


def logprobs(model: Transformer, texts: list[tuple[list[int], list[int]]], temperature: float) -> list[Tensor]:
    """Of every completion's tokens: each text whole, alone, through the whole vocabulary."""
    found = []
    for prompt, completion in texts:
        hidden, _ = model.hidden_states(torch.tensor([prompt + completion]))
        logits = model.logits(hidden)[0, len(prompt) - 1 : -1] / temperature
        found.append(-F.cross_entropy(logits, torch.tensor(completion), reduction="none"))
    return found


def by_hand(model: Transformer, batches: list[list[Group]], recipe: RLRecipe, reference: Transformer | None) -> None:
    """Change `model` as the update should: an AdamW step for each of `batches`."""
    temperature, section = recipe.rollout.temperature, recipe.optimizer
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": section.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=section.lr,
        betas=(section.beta1, section.beta2),
        eps=section.eps,
    )
    texts = [[(g.prompt_ids, r.drawn.tokens) for g in batch for r in g.rollouts] for batch in batches]
    with torch.no_grad():
        before = [logprobs(model, texts_of_batch, temperature) for texts_of_batch in texts]
    for batch, own, old in zip(batches, texts, before, strict=True):
        advantages = []
        for g in batch:
            rewards = torch.tensor(g.rewards)
            advantages += list((rewards - rewards.mean()) / (rewards.std() + 1e-4))
        tokens = sum(len(completion) for _, completion in own)
        loss = torch.zeros(())
        for place, new in enumerate(logprobs(model, own, temperature)):
            ratio = (new - old[place]).exp()
            terms = torch.minimum(ratio * advantages[place], ratio.clamp(1 - LOW, 1 + HIGH) * advantages[place])
            if reference is not None:
                with torch.no_grad():
                    (other,) = logprobs(reference, [own[place]], temperature)
                terms = terms - recipe.loss.kl * ((other - new).exp() - (other - new) - 1)
            if recipe.loss.normalisation == "token":
                loss = loss - terms.sum() / tokens
            else:
                loss = loss - terms.mean() / len(own)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, section.clip_norm)
        optimizer.step()


CASES = {
    "DAPO": {"loss": {"normalisation": "token"}},
    "DAPO, two mini-batches": {"loss": {"normalisation": "token"}, "train": {"mini_batches": 2}},
    "KL, per response, two mini-batches, a pass per group": {
        "loss": {"normalisation": "response", "kl": 0.5},
        "train": {"mini_batches": 2, "rows": 1},
        "rollout": {"problems": 4, "samples": 4, "temperature": 0.8},
    },
    "KL, per response": {"loss": {"normalisation": "response", "kl": 0.5}},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_an_update_is_the_one_computed_by_hand(groups: list[Group], case: dict[str, Any]) -> None:
    """The weights afterwards are those of the formula over whole texts, autograd and AdamW, to 1e-6."""
    case = case | {"loss": case["loss"] | {"clip_low": LOW, "clip_high": HIGH}}
    ours = learner(build(LLAMA), **case)
    expected, reference = copy.deepcopy(ours.model), None
    if ours.recipe.loss.kl > 0:
        # A reference of its own, taken some steps ago: where it is the policy itself, its term has no gradient.
        ours.reference = reference = build(LLAMA, seed=1).requires_grad_(False)
        ours.progress.step = 3
    parts = ours.recipe.train.mini_batches
    by_hand(expected, [groups] if parts == 1 else [[one] for one in groups], ours.recipe, reference)
    before = [p.detach().clone() for p in ours.model.parameters()]
    values = update(ours, groups)
    assert (values["updates"], values["skipped"]) == (parts, False)
    for name, p in expected.named_parameters():
        torch.testing.assert_close(ours.model.get_parameter(name), p, rtol=0, atol=1e-6, msg=name)
    assert max(float((p - q).detach().abs().max()) for p, q in zip(before, ours.model.parameters(), strict=True)) > 1e-3


def test_the_second_mini_batch_is_held_back_by_the_ratio_to_the_first_policy(groups: list[Group]) -> None:
    """Two mini-batches of one rollout meet the clip: their old log-probabilities are from before the first."""
    values = update(learner(build(LLAMA), train={"mini_batches": 2}), groups)
    assert values["clip_low"] + values["clip_high"] > 0
    assert values["kl_old"] > 1e-4


def test_groups_that_teach_are_dealt_out_evenly() -> None:
    """Where every second group has nothing to teach, each of two mini-batches still has one that does, and makes its
    step; three groups for four mini-batches make three."""
    torch.manual_seed(0)
    teaches, equal = ((2, 3), (0.0, 1.0)), ((2, 3), (1.0, 1.0))
    mixed = [group(3, *kind) for kind in (teaches, equal, teaches, equal)]
    assert update(learner(build(LLAMA), train={"mini_batches": 2}), mixed)["updates"] == 2
    few = [group(3, *teaches) for _ in range(3)]
    assert update(learner(build(LLAMA), train={"mini_batches": 4}), few)["updates"] == 3


def test_the_reference_is_renewed_when_the_recipe_says(groups: list[Group]) -> None:
    """At step 0 and every `reference_every` steps it becomes the policy as it is before that step's update, and in
    between it stays the same."""
    ours = learner(build(LLAMA), loss={"kl": 0.1}, train={"reference_every": 3})
    known = None
    for step in range(7):
        before = copy.deepcopy(ours.model.state_dict())
        update(ours, groups)
        found = ours.reference.state_dict()
        if step % 3 == 0:
            known = before
        assert all(torch.equal(found[name], known[name]) for name in known)


@pytest.mark.parametrize("kl", [0.0, 0.1])
def test_what_has_no_weight_moves_nothing(kl: float) -> None:
    """A mini-batch of which all is left out, or whose advantages are 0, makes no step: after one that has made its own,
    neither momentum nor weight decay moves a weight."""
    torch.manual_seed(0)
    ours = learner(build(LLAMA), loss={"drop_truncated": True, "kl": kl})
    assert update(ours, [group(3, (2, 3), (0.0, 1.0))])["updates"] == 1
    empty = [[], [group(3, (2, 3), (0.0, 1.0), finished=False)]]
    if kl == 0:
        empty.append([group(3, (2, 3), (1.0, 1.0))])
    for batch in empty:
        before = [p.detach().clone() for p in ours.model.parameters()]
        values = update(ours, batch)
        assert (values["updates"], values["skipped"]) == (0, False)
        assert all(torch.equal(p, q) for p, q in zip(before, ours.model.parameters(), strict=True))
