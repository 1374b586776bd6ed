"""Reinforcement learning looks at held-out problems: pass@1, samples for people to read, the best model so far."""

import time
from collections.abc import Callable, Sequence

from fathom.config.rl import RLRecipe
from fathom.data.tokenizer import Tokenizer
from fathom.errors import UserError
from fathom.model.checkpoint import new_folder, write_model
from fathom.tasks.task import Problem
from fathom.train.display import Display, describe
from fathom.train.honesty import measured
from fathom.train.learner import Learner
from fathom.train.metrics import MetricsLog, read_metrics
from fathom.train.rollout import Roller, Rollout, seed_of
from fathom.train.run import RunFolder
from fathom.train.state import checkpoint_name, checkpoints, remove, sweep


class HeldOut:
    """The same held-out problems, put to the model again and again as it learns."""

    def __init__(
        self,
        learner: Learner,
        roller: Roller,
        problems: Sequence[Problem],
        run: RunFolder,
        log: MetricsLog,
        display: Display,
    ) -> None:
        self._learner, self._roller, self._problems = learner, roller, problems
        self._run, self._log, self._display = run, log, display
        self._best = _best_so_far(run)
        self.values: dict[str, float] = {}
        """The last evaluation of this session."""

    def take_if_due(self) -> None:
        """At the end, and every `eval.every` steps: measure, write metrics and samples, keep the model if it is the
        best."""
        recipe, progress, say = self._learner.recipe, self._learner.progress, self._display.say
        last = progress.step == recipe.train.steps
        if not last and progress.step % recipe.eval.every:
            return
        began, tokenizer = time.perf_counter(), self._learner.tokenizer
        self.values, found = _evaluate(self._roller, recipe, self._problems, tokenizer, last=last)
        if progress.step == 0 and recipe.eval.probe:
            self.values |= _probe(self._roller, recipe, self._problems, tokenizer, say)
        for problem, rollout in found[:: max(1, len(found) - 1)]:  # of the lowest level and of the highest
            self._log.write_answer(progress.step, _sample(self._roller.prompt(problem), rollout))
        self._log.write("eval", progress.step, self.values | {"seconds": time.perf_counter() - began})
        say(f"step {progress.step}: held out  {_told(self.values)}")
        if recipe.eval.budgets and last:
            say(_told_of_budgets(self.values, recipe.eval.budgets))
        if too_long := self._roller.too_long:
            self._display.say_once(
                "too long",
                f"{too_long} problems so far had prompts that leave no room for rollout.max_tokens = "
                f"{recipe.rollout.max_tokens} in this model's context, and were left out; lower it or the level",
            )
        if self.values["pass@1"] > self._best:
            self._best = self.values["pass@1"]
            if progress.step:  # at the start it is the model that training begins with
                _save_best(self._run, self._learner)


def _evaluate(
    roller: Roller, recipe: RLRecipe, problems: Sequence[Problem], tokenizer: Tokenizer, *, last: bool
) -> tuple[dict[str, float], list[tuple[Problem, Rollout]]]:
    """pass@1 over held-out problems and by level, and the answers; at the end pass@1 with thoughts cut short, too."""
    seed = seed_of(recipe.seed, "held-out")
    found = roller.measure(problems, temperature=recipe.eval.temperature, seed=seed)
    values = measured(found, tokenizer, recipe.eval.reflections)
    for budget in recipe.eval.budgets if last else ():
        cut = roller.measure(problems, temperature=recipe.eval.temperature, seed=seed, budget=budget)
        values[f"pass@1/budget_{budget}"] = measured(cut, tokenizer, ())["pass@1"]
    return values, found


def _probe(
    roller: Roller, recipe: RLRecipe, problems: Sequence[Problem], tokenizer: Tokenizer, say: Callable[[str], None]
) -> dict[str, float]:
    """The base made to think, and made to guess: without a gap between them there is no reason to learn to think.

    Nothing, and `say` why, where the prompt itself opens a thought, or where a guess cannot be asked for: a layout
    without a mark before the answer, in a vocabulary whose think tag is ordinary text.
    """
    guess = {"tags": "<answer>", "boxed": "\\boxed{", "line": "Answer:", "rest": ""}[recipe.rewards.layout.form]
    opening = tokenizer.encode("<think>", special=True)
    why = None
    if recipe.prompt.opens_thought:
        why = "the prompt opens the thought (prompt.opens_thought)"
    elif not guess and len(opening) > 1:
        why = "rewards.layout.form = rest has no mark to begin a guess with, and <think> is no token to be forbidden"
    if why is not None:
        say(f"not measured made to think and made to guess (eval.probe): {why}")
        return {}
    seed = seed_of(recipe.seed, "probe")
    thinks = roller.measure(problems, temperature=recipe.eval.temperature, seed=seed, begin="<think>")
    bias = None if guess else {opening[0]: -100.0}
    guesses = roller.measure(problems, temperature=recipe.eval.temperature, seed=seed, begin=guess, bias=bias)
    return {f"probe_{name}": measured(found, tokenizer, ())["accuracy"] for name, found in
            (("thinking", thinks), ("guessing", guesses))}  # fmt: skip


def _told(values: dict[str, float]) -> str:
    """An evaluation in words."""
    probe = ""
    if "probe_thinking" in values:
        probe = f"  made to think {values['probe_thinking']:.3f}, made to guess {values['probe_guessing']:.3f}"
    return describe(values) + probe


def _told_of_budgets(values: dict[str, float], budgets: Sequence[int]) -> str:
    cut, shares = ", ".join(map(str, budgets)), ", ".join(f"{values[f'pass@1/budget_{b}']:.3f}" for b in budgets)
    return f"pass@1 with thoughts cut at {cut} tokens: {shares}"


def _sample(prompt: str, rollout: Rollout) -> dict[str, str]:
    """What the log shows of a held-out answer."""
    parts = ", ".join(f"{name} {value + 0.0:g}" for name, value in rollout.reward.parts.items())
    return {"Prompt": prompt, "Completion": rollout.text, "Reward": parts}


def _best_so_far(run: RunFolder) -> float:
    """The best pass@1 that the run has measured."""
    return max((line["pass@1"] for line in read_metrics(run.metrics) if line["kind"] == "eval"), default=-1.0)


def _save_best(run: RunFolder, learner: Learner) -> None:
    """The weights as a model folder `best/step_…`, in the place of an earlier best."""
    best = run.path / "best"
    target = best / checkpoint_name(learner.progress.step)
    try:
        remove(target)
        with new_folder(target) as scratch:
            write_model(
                scratch, learner.model.config, learner.model.state_dict(), tokenizer=learner.tokenizer, dtype="float32"
            )
        for old in checkpoints(best):
            if old != target:
                remove(old)
        sweep(best)
    except OSError as error:
        raise UserError(f"{run.path}: the best model cannot be written ({error.strerror or error})") from None
