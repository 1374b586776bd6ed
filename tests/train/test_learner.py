"""The update's pieces against the texts that they are made of."""

from types import SimpleNamespace

import torch

from fathom.config.rl import RLRecipe
from fathom.model.transformer import Transformer
from fathom.tasks.reading import Reading
from fathom.tasks.rewards import Reward
from fathom.tasks.task import Problem
from fathom.train import learner as module
from fathom.train.rollout import Drawn, Group, Rollout
from tests.model.configs import V3, build

MIXTURES, EXPERTS, CHOSEN = V3.num_hidden_layers - V3.first_k_dense_replace, V3.n_routed_experts, V3.num_experts_per_tok


def rollout(prompt_routes: torch.Tensor, length: int, reward: float) -> Rollout:
    """Random tokens, and experts that no router would choose."""
    rows = torch.rand(length - 1, MIXTURES, EXPERTS).topk(CHOSEN).indices
    drawn = Drawn(
        tokens=torch.randint(V3.vocab_size, (length,)).tolist(),
        logprobs=torch.rand(length).neg().tolist(),
        finished=True,
        routes=torch.cat((prompt_routes, rows)).to(torch.int16),
    )
    return Rollout(drawn, "", Reward(reward, {}, Reading("", None, False, ""), ""))


def groups() -> list[Group]:
    torch.manual_seed(0)
    found = []
    for prompt, lengths in ((3, (2, 4, 1)), (2, (3, 2))):
        routes = torch.rand(prompt, MIXTURES, EXPERTS).topk(CHOSEN).indices
        rollouts = [rollout(routes, length, float(place)) for place, length in enumerate(lengths)]
        found.append(Group(Problem("?"), torch.randint(V3.vocab_size, (prompt,)).tolist(), rollouts))
    return found


def logprobs_alone(model: Transformer, *, replayed: bool) -> torch.Tensor:
    """Of every token of every completion, each text computed whole and alone."""
    found = []
    for group in groups():
        for one in group.rollouts:
            ids = torch.tensor([group.prompt_ids + one.drawn.tokens[:-1]])
            routes = one.drawn.routes.transpose(0, 1).long() if replayed else None
            hidden, _ = model.hidden_states(ids, routes=routes)
            logits = model.logits(hidden)[0, len(group.prompt_ids) - 1 :]
            found.append(logits.log_softmax(-1).gather(1, torch.tensor(one.drawn.tokens)[:, None])[:, 0])
    return torch.cat(found)


def stub(model: Transformer, **rollout_fields: object) -> SimpleNamespace:
    recipe = RLRecipe(name="r", model="m", task={"name": "modular"}, rollout=rollout_fields)
    return SimpleNamespace(model=model, recipe=recipe)


def test_every_row_is_computed_by_the_experts_of_its_own_token() -> None:
    """A piece's log-probabilities are those of each text under its own recorded routes, and not the router's."""
    model = build(V3)
    for replay in (True, False):
        learner = stub(model, replay_routes=replay)
        piece = module._piece([(group, 0) for group in groups()], learner)
        logprobs, _ = module._Scorer.of(model, learner.recipe)(piece)
        torch.testing.assert_close(logprobs, logprobs_alone(model, replayed=replay), rtol=0, atol=1e-4)
    assert (logprobs_alone(model, replayed=True) - logprobs_alone(model, replayed=False)).abs().max() > 0.01


def test_every_token_meets_its_own_advantage_and_the_samplers_logprob() -> None:
    """Owners and sampler log-probabilities stand in the order of the tokens, and advantages in that of completions."""
    learner = stub(build(V3))
    batch = module._MiniBatch.of(groups(), learner)
    assert batch is not None
    owners = torch.cat([piece.completions[piece.forest.owners] for piece in batch.pieces])
    assert owners.tolist() == [0] * 2 + [1] * 4 + [2] + [3] * 3 + [4] * 2
    drawn = [one.drawn for group in groups() for one in group.rollouts]
    sampled = torch.cat([piece.sampler_logprobs for piece in batch.pieces])
    torch.testing.assert_close(sampled, torch.tensor([value for one in drawn for value in one.logprobs]))
    targets = torch.cat([piece.forest.targets for piece in batch.pieces])
    assert targets.tolist() == [token for one in drawn for token in one.tokens]
    assert batch.advantages[0] < batch.advantages[1] < batch.advantages[2]
    assert batch.advantages[3] < 0 < batch.advantages[4]
