"""What rollouts show, beside their reward: whether a model learns to think or to please the rule."""

import re
from collections.abc import Sequence

from fathom.data.tokenizer import Tokenizer
from fathom.tasks.task import Problem
from fathom.train.rollout import Group, Rollout


def rollout_metrics(groups: Sequence[Group], tokenizer: Tokenizer, reflections: Sequence[str]) -> dict[str, float]:
    """Means over all completions of a step.

    problems: how many they are of · reward and its parts · completion_tokens, thought_tokens (the longest thought too)
    truncated: share cut off at the limit · reflections: how often one of those words is in a thought
    uninformative: share of groups whose rewards are all equal · faults: checks that failed, of whatever cause
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    if not rollouts:
        return {}
    equal = sum(not group.informative for group in groups) / len(groups)
    return {"reward": _mean(r.reward.total for r in rollouts), **_of(rollouts, tokenizer, reflections)} | {
        "uninformative": equal,
        "problems": len(groups),
    }


def measured(
    found: Sequence[tuple[Problem, Rollout]], tokenizer: Tokenizer, reflections: Sequence[str]
) -> dict[str, float]:
    """pass@1 (share of answers that are wholly right), the same by level, and what `rollout_metrics` shows."""
    if not found:
        return {"pass@1": 0.0, "accuracy": 0.0}
    right = [(problem.level, float(rollout.reward.parts["accuracy"] >= 1)) for problem, rollout in found]
    levels = sorted({level for level, _ in right})
    values = {"pass@1": _mean(score for _, score in right)}
    if len(levels) > 1:
        values |= {f"pass@1/level_{k}": _mean(score for level, score in right if level == k) for k in levels}
    return values | _of([rollout for _, rollout in found], tokenizer, reflections)


def _of(rollouts: Sequence[Rollout], tokenizer: Tokenizer, reflections: Sequence[str]) -> dict[str, float]:
    thoughts = [rollout.reward.reading.thought for rollout in rollouts]
    lengths = [len(tokenizer.encode(thought)) if thought else 0 for thought in thoughts]
    parts = {name: _mean(rollout.reward.parts[name] for rollout in rollouts) for name in rollouts[0].reward.parts}
    return parts | {
        "completion_tokens": _mean(len(rollout.drawn.tokens) for rollout in rollouts),
        "thought_tokens": _mean(lengths),
        "truncated": _mean(float(not rollout.drawn.finished) for rollout in rollouts),
        "reflections": _mean(len(reflections_in(thought, reflections)) for thought in thoughts),
        "faults": float(sum(bool(rollout.reward.fault) for rollout in rollouts)),
    }


def reflections_in(thought: str, words: Sequence[str]) -> list[re.Match[str]]:
    """Where a thought, in lower case, has one of `words`, whole words where they are made of letters; first to last."""
    lowered = thought.lower()
    found = [
        match
        for word in map(str.lower, filter(None, words))
        for match in re.finditer(
            rf"\b{re.escape(word)}\b" if word.isascii() and word.isalpha() else re.escape(word), lowered
        )
    ]
    return sorted(found, key=re.Match.start)


def _mean(values) -> float:
    listed = list(values)
    return sum(listed) / len(listed)
