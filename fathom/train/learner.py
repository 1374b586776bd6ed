"""What reinforcement learning changes: a policy, and the update of it that groups of rollouts ask for.

A mini-batch of groups becomes pieces, each a forest (`fathom.model.forest`) for one forward pass. Groups whose rewards
are all equal give no gradient and are left out of it, unless a KL term or a teacher asks for them too.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from fathom.config.rl import RLRecipe
from fathom.errors import UserError
from fathom.model.forest import Forest, Tree
from fathom.model.token_logprobs import Head, logprobs_and_entropy
from fathom.model.transformer import Transformer
from fathom.train.grpo import (
    PolicyBatch,
    PolicyReport,
    completion_weights,
    group_advantages,
    policy_loss,
    teacher_advantages,
)
from fathom.train.numbers import require_numbers
from fathom.train.packing import packed
from fathom.train.precision import take_bad_tiles
from fathom.train.rollout import Asker, Group
from fathom.train.schedule import constant_lr_at
from fathom.train.session import Trainee, frozen_copy


@dataclass
class Learner(Trainee):
    """A policy, with the recipe that says what it learns."""

    recipe: RLRecipe
    teacher: Transformer | None = None
    """Whose judgement of every token stands in the place of rewards; frozen."""

    @property
    def level(self) -> int:
        """The hardest level that problems come from."""
        section = self.recipe.task
        return section.levels if section.start is None else min(self.progress.data["level"], section.levels)


def update(learner: Learner, groups: Sequence[Group]) -> dict[str, Any]:
    """The optimizer steps of one rollout. Returns their metrics; `skipped` says that one was not made, and `updates`
    how many were."""
    recipe, progress, model = learner.recipe, learner.progress, learner.model
    lr = constant_lr_at(progress.step, recipe.train.warmup_steps, recipe.optimizer.lr)
    if recipe.loss.kl > 0 and (learner.reference is None or progress.step % recipe.train.reference_every == 0):
        learner.reference = frozen_copy(model, learner.fp8)
    parts = recipe.train.mini_batches
    # Dealt out like cards, those that teach first: mini-batches are equal in both kinds, but for one.
    dealt = sorted(groups, key=lambda group: not group.informative)
    batches = [batch for part in range(parts) if (batch := _MiniBatch.of(dealt[part::parts], learner))]
    if parts > 1:
        for batch in batches:
            batch.remember_old(_Scorer.of(model, recipe))
    report: PolicyReport | None = None
    loss, norms, updates, bad_tiles = 0.0, [], 0, 0
    reference = None if recipe.loss.kl == 0 else _Scorer.of(learner.reference, recipe)
    teacher = None if learner.teacher is None else _Scorer.of(learner.teacher, recipe)
    for batch in batches:
        own_loss, policy = 0.0, _Scorer.of(model, recipe)
        take_bad_tiles(learner.fp8)  # of what came between two updates
        for place in range(len(batch.pieces)):
            piece_loss, piece_report = batch.loss(place, policy, reference, teacher, recipe)
            piece_loss.backward()
            own_loss += float(piece_loss.detach())
            report = piece_report if report is None else report + piece_report
        parameters = [p for p in model.parameters() if p.grad is not None]
        norm = float(get_total_norm([p.grad for p in parameters]))
        norms.append(norm)
        loss += own_loss / len(batches)
        own_bad_tiles = take_bad_tiles(learner.fp8)
        bad_tiles += own_bad_tiles
        if own_bad_tiles == 0 and math.isfinite(norm) and math.isfinite(own_loss):
            clip_grads_with_norm_(parameters, recipe.optimizer.clip_norm, torch.tensor(norm))
            learner.optimizer.step(lr)
            updates += 1
        learner.optimizer.zero_grad()
    if batches:
        require_numbers(model, progress.step + 1)
    skipped = updates < len(batches)
    progress.step += 1
    progress.tokens += 0 if report is None else int(report.tokens)
    progress.bad_steps += skipped
    if batches:
        progress.bad_in_a_row = progress.bad_in_a_row + 1 if skipped else 0
    metrics = {"loss": loss, "skipped": skipped, "updates": updates, "grad_norm": max(norms, default=0.0), "lr": lr}
    if learner.fp8 is not None:
        metrics["bad_tiles"] = bad_tiles
    return metrics | ({} if report is None else report.means())


@torch.no_grad()
def observe(learner: Learner, groups: Sequence[Group]) -> dict[str, float]:
    """What `update` says of the policy, for a step that has nothing to learn from: entropy, the engine's gap. They are
    of as many of `groups` as one forward pass takes, and what only an update moves is at rest: ratio 1, clipped 0."""
    recipe = learner.recipe
    first = itertools.accumulate((len(group.rollouts) for group in groups), initial=0)
    part = next(_packed(zip(groups, first, strict=False), recipe.train.rows))
    piece = _piece(part, learner)
    logprobs, entropy = _Scorer.of(learner.model, recipe)(piece)
    batch = PolicyBatch(
        owner=piece.completions[piece.forest.owners],
        advantages=torch.zeros_like(logprobs),
        weights=torch.ones(len(piece.completions), device=logprobs.device),
        old_logprobs=logprobs,
        sampler_logprobs=piece.sampler_logprobs if recipe.rollout.gives_logprobs else None,
        entropy=entropy,
    )
    return policy_loss(logprobs, batch, recipe.loss.replace(kl=0.0))[1].means()


@dataclass(frozen=True)
class _Piece:
    """What one forward pass computes: some groups of a mini-batch."""

    forest: Forest
    completions: Tensor
    """[branches] int64: each branch's row in the mini-batch."""
    sampler_logprobs: Tensor
    """[M]: the engine's."""
    routes: Tensor | None
    """[mixtures, S, K] int64."""
    teachers: Forest | None
    """The same completions behind the teacher's prompts, where there is one."""

    @property
    def judged(self) -> "_Piece":
        """What the teacher computes. Routes are of the student's experts, and say nothing of another model's."""
        assert self.teachers is not None, "a recipe with a teacher"
        return replace(self, forest=self.teachers, routes=None)


@dataclass
class _MiniBatch:
    """Groups that one optimizer step is made of."""

    advantages: Tensor | None
    """[N], by rewards; None where a teacher judges each token."""
    weights: Tensor
    """[N]."""
    pieces: list[_Piece]
    """Without the groups that no gradient comes from."""
    old_logprobs: list[Tensor] = field(default_factory=list)
    """[M] per piece, where later mini-batches compare with the policy before the first."""

    @classmethod
    def of(cls, groups: Sequence[Group], learner: Learner) -> "_MiniBatch | None":
        """None where there is nothing to learn."""
        if not groups:
            return None
        recipe, on = learner.recipe, learner.model.model.embed_tokens.weight.device
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        owner = torch.tensor([place for place, group in enumerate(groups) for _ in group.rollouts], device=on)
        rewards = torch.tensor([rollout.reward.total for rollout in rollouts], device=on)
        advantages = group_advantages(rewards, owner, recipe.loss) if recipe.teacher is None else None
        weights = completion_weights(
            torch.tensor([len(rollout.drawn.tokens) for rollout in rollouts], device=on),
            recipe.loss,
            max_tokens=recipe.rollout.max_tokens,
            truncated=torch.tensor([not rollout.drawn.finished for rollout in rollouts], device=on),
        )
        teaches = weights > 0
        if advantages is not None and recipe.loss.kl == 0:
            teaches &= advantages != 0
        teaching, first = [], 0
        for group in groups:
            end = first + len(group.rollouts)
            if teaches[first:end].any():
                teaching.append((group, first))
            first = end
        pieces = [_piece(part, learner) for part in _packed(teaching, recipe.train.rows)]
        return cls(advantages, weights, pieces) if pieces else None

    def remember_old(self, policy: "_Scorer") -> None:
        """Keep the policy's log-probabilities as they are now."""
        with torch.no_grad():
            self.old_logprobs = [policy(piece)[0] for piece in self.pieces]

    def loss(
        self,
        place: int,
        policy: "_Scorer",
        reference: "_Scorer | None",
        teacher: "_Scorer | None",
        recipe: RLRecipe,
    ) -> tuple[Tensor, PolicyReport]:
        """The part of the mini-batch's loss that comes from the piece at `place`."""
        piece = self.pieces[place]
        logprobs, entropy = policy(piece)
        with torch.no_grad():
            reference_logprobs = None if reference is None else reference(piece)[0]
            teacher_logprobs = None if teacher is None else teacher(piece.judged)[0]
        old = self.old_logprobs[place] if self.old_logprobs else logprobs.detach()
        owner = piece.completions[piece.forest.owners]
        if teacher_logprobs is not None:
            advantages = teacher_advantages(teacher_logprobs, old)
        else:
            assert self.advantages is not None, "without a teacher, rewards judge"
            advantages = self.advantages[owner]
        batch = PolicyBatch(
            owner=owner,
            advantages=advantages,
            weights=self.weights,
            old_logprobs=old,
            reference_logprobs=reference_logprobs,
            sampler_logprobs=piece.sampler_logprobs if recipe.rollout.gives_logprobs else None,
            entropy=entropy,
            teacher_logprobs=teacher_logprobs,
        )
        return policy_loss(logprobs, batch, recipe.loss)


def _packed(groups: Iterable[tuple[Group, int]], rows: int) -> Iterator[list[tuple[Group, int]]]:
    return packed(groups, lambda pair: _tree(pair[0]).rows, rows)


def _tree(group: Group) -> Tree:
    return Tree(group.prompt_ids, [rollout.drawn.tokens for rollout in group.rollouts])


def _piece(groups: Sequence[tuple[Group, int]], learner: Learner) -> _Piece:
    on = learner.model.model.embed_tokens.weight.device
    forest = Forest.plant([_tree(group) for group, _ in groups], on)
    rollouts = [rollout for group, _ in groups for rollout in group.rollouts]
    completions = [first + place for group, first in groups for place in range(len(group.rollouts))]
    sampled = [logprob for rollout in rollouts for logprob in rollout.drawn.logprobs]
    routes = None
    if learner.recipe.rollout.replay_routes and all(rollout.drawn.routes is not None for rollout in rollouts):
        routes = torch.cat([part for group, _ in groups for part in _routes(group)]).transpose(0, 1).long().to(on)
    teachers = None if learner.recipe.teacher is None else _teachers_forest([g for g, _ in groups], forest, learner)
    return _Piece(forest, torch.tensor(completions, device=on), torch.tensor(sampled, device=on), routes, teachers)


def _teachers_forest(groups: Sequence[Group], forest: Forest, learner: Learner) -> Forest:
    """The completions of `forest` as the teacher reads them. Raises `UserError` where its context is too short."""
    assert learner.teacher is not None, "opened where a recipe names it"
    if (prompt := learner.recipe.teacher_prompt) is not None:
        ask = Asker(learner.tokenizer, prompt)
        trees = [_tree(replace(group, prompt_ids=ask(group.problem))) for group in groups]
        forest = Forest.plant(trees, forest.token_ids.device)
    longest, context = int(forest.positions.max()) + 1, learner.teacher.config.max_position_embeddings
    if longest > context:
        raise UserError(
            f"teacher: reads {context} tokens at most, and a prompt with its completion has {longest}; lower "
            "rollout.max_tokens or the level"
        )
    return forest


def _routes(group: Group) -> Iterator[Tensor]:
    """The routes of a tree's rows, [rows, mixtures, K] each: of its trunk, then of every branch."""
    length = len(group.prompt_ids)
    found = [rollout.drawn.routes for rollout in group.rollouts if rollout.drawn.routes is not None]
    yield found[0][:length]
    for routes in found:
        yield routes[length:]


@dataclass(frozen=True)
class _Scorer:
    """A policy as it is now, between two optimizer steps."""

    model: Transformer
    head: Head
    temperature: float

    @classmethod
    def of(cls, model: Transformer, recipe: RLRecipe) -> "_Scorer":
        return cls(model, Head.of_model(model), recipe.rollout.temperature)

    def __call__(self, piece: _Piece) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy [M] of every token that was drawn."""
        forest = piece.forest
        hidden, _ = self.model.forest_states(forest, routes=piece.routes)
        return logprobs_and_entropy(hidden[forest.sources], self.head, forest.targets, self.temperature)
