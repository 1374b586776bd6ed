"""Reinforcement learning end to end, on a model of a few thousand parameters."""

import io
import itertools
import json
import math
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

import fathom.train.rl as module
from fathom.config.rl import RLRecipe
from fathom.errors import UserError
from fathom.model.checkpoint import save_model
from fathom.tasks.catalogue import open_task
from fathom.train import learner, rl_evaluate
from fathom.train.metrics import read_metrics
from fathom.train.rl import train_rl
from fathom.train.run import RunResult
from fathom.train.state import read_checkpoint
from tests.train.tiny import poison_one_tile, save_talker

TIMES = {"seconds", "tokens_per_second", "rollout_seconds", "update_seconds"}

RULES = '''
from fathom.tasks import Problem, Task


class Odd(Task):
    """Answers of an odd number of bytes are right."""

    levels = 2

    def problem(self, random, level):
        return Problem(f"{random.randrange(10**6)}:{level}", level=level)

    def check(self, problem, answer):
        return float(len(answer.encode()) % 2)


class Raises(Odd):
    def check(self, problem, answer):
        raise RuntimeError("no idea")


class NotANumber(Odd):
    def check(self, problem, answer):
        return float("nan")


class HalfHopeless(Odd):
    def check(self, problem, answer):
        return super().check(problem, answer) * (int(problem.question.partition(":")[0]) % 2)


class Few(Odd):
    def problem(self, random, level):
        return Problem(f"{random.randrange(20)}", level=level)
'''


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny V3 with random weights, its byte tokenizer, and a file of tasks."""
    folder = tmp_path_factory.mktemp("rl")
    save_talker(folder / "model")
    (folder / "rules.py").write_text(RULES)
    return folder


@pytest.fixture
def recipe(start: Path) -> RLRecipe:
    """Four steps of three groups of four short completions, whose length's parity is rewarded."""
    return RLRecipe(
        name="run",
        model=str(start / "model"),
        task={"name": f"{start / 'rules.py'}:Odd", "levels": 2},
        prompt={"style": "template"},
        rewards={"layout": {"form": "rest", "thoughts": "optional"}, "format": 0.0},
        rollout={"problems": 4, "samples": 4, "max_tokens": 6},
        optimizer={"lr": 1e-3, "weight_decay": 0.0},
        train={"steps": 4, "precision": "fp32", "rows": 60},
        checkpoint={"every": 2, "keep": 9},
        eval={"every": 2, "problems": 6},
    )


def changed(recipe: RLRecipe, changes: dict[str, dict[str, Any]]) -> RLRecipe:
    sections = {name: getattr(recipe, name).replace(**fields) for name, fields in changes.items()}
    return recipe.replace(**{name: section.model_dump() for name, section in sections.items()})


def run(recipe: RLRecipe, runs: Path, **options: Any) -> tuple[RunResult, str]:
    said = io.StringIO()
    result = train_rl(recipe, runs=runs, console=Console(file=said, width=200), **options)
    return result, said.getvalue()


def weights(result: RunResult) -> dict[str, bytes]:
    """Every file of numbers in the newest checkpoint."""
    assert result.checkpoint is not None
    files = result.checkpoint.rglob("*.safetensors")
    return {str(file.relative_to(result.checkpoint)): file.read_bytes() for file in files}


def lines(result: RunResult) -> list[dict[str, Any]]:
    """The run's metrics without times."""
    return [{k: v for k, v in line.items() if k not in TIMES} for line in read_metrics(result.folder / "metrics.jsonl")]


VARIANTS = {
    "plain": {},
    "mini-batches, reference": {
        "train": {"mini_batches": 2, "reference_every": 3},
        "loss": {"kl": 0.1, "clip_low": 0.2, "clip_high": 0.28, "normalisation": "token"},
    },
    "dynamic sampling, curriculum": {"rollout": {"resample": 2}, "task": {"start": 1, "raise_at": 0.3}},
    "muon": {"optimizer": {"name": "muon"}},
    "FP8": {"train": {"precision": "fp8"}},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_a_resumed_run_is_the_unbroken_one(
    recipe: RLRecipe, changes: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps, a stop and two more give the bytes and metrics of four."""
    recipe = changed(recipe, changes)
    unbroken, _ = run(recipe, tmp_path / "one")
    stop_after(monkeypatch, 2)
    halted, said = run(recipe, tmp_path / "two")
    assert halted.interrupted
    assert halted.step == 2
    assert "--resume" in said
    monkeypatch.undo()
    resumed, _ = run(recipe, tmp_path / "two", resume=True)
    assert weights(resumed) == weights(unbroken)
    assert lines(resumed) == lines(unbroken)


MOMENTS = {
    # Which call of which method, and the steps that are finished then.
    "the first evaluation": ("measure", 1, 0),
    "the probe": ("measure", 3, 0),
    "the first rollout": ("groups", 1, 0),
    "a rollout": ("groups", 4, 3),
    "an evaluation": ("measure", 4, 3),
    "the last evaluation": ("measure", 5, 4),
}


@pytest.mark.parametrize(("method", "call", "steps"), MOMENTS.values(), ids=MOMENTS.keys())
def test_a_signal_cuts_short_what_only_draws(
    recipe: RLRecipe, method: str, call: int, steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rollout or evaluation that a signal came into leaves nothing behind; what was learnt before is saved, and the
    resumed run is the unbroken one: weights, metrics, samples."""
    recipe = changed(recipe, {"checkpoint": {"every": 99}, "eval": {"every": 3}})
    unbroken, _ = run(recipe, tmp_path / "one")
    counter, original = itertools.count(1), getattr(module.Roller, method)

    def interrupted(*arguments: Any, **named: Any) -> Any:
        if next(counter) == call:
            os.kill(os.getpid(), signal.SIGINT)
            monkeypatch.setattr(module.Roller, "score", None)  # cut before anything of it can be scored
        return original(*arguments, **named)

    monkeypatch.setattr(module.Roller, method, interrupted)
    halted, said = run(recipe, tmp_path / "two")
    assert (halted.interrupted, halted.step) == (True, steps)
    assert f"stopped at step {steps}; go on with: " in said
    assert (halted.checkpoint and halted.checkpoint.name) == (f"step_{steps:08d}" if steps else None)
    assert max((line["step"] for line in lines(halted)), default=0) == steps
    assert (("eval", steps) in {(line["kind"], line["step"]) for line in lines(halted)}) == (method == "groups")
    monkeypatch.undo()
    resumed, _ = run(recipe, tmp_path / "two", resume=True)
    assert not resumed.interrupted
    assert weights(resumed) == weights(unbroken)
    assert lines(resumed) == lines(unbroken)
    samples = [(result.folder / "samples.md").read_text() for result in (unbroken, resumed)]
    assert samples[0] == samples[1]
    assert [f"## Step {step}\n" in samples[0] for step in range(5)] == [True, False, False, True, True]


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Have SIGTERM come during that step."""
    counter = itertools.count(1)
    original = module.update

    def update(*arguments: Any) -> dict[str, Any]:
        if next(counter) == steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    monkeypatch.setattr(module, "update", update)


@pytest.mark.parametrize("loss", [{"normalisation": n} for n in ("response", "token", "constant")])
def test_the_update_does_not_depend_on_how_rows_are_packed(recipe: RLRecipe, loss: dict, tmp_path: Path) -> None:
    """One forward pass for all groups and one for each give the same weights, up to the order of sums."""
    recipe = changed(recipe, {"loss": loss, "train": {"steps": 1}, "eval": {"probe": False}})
    results = [run(changed(recipe, {"train": {"rows": rows}}), tmp_path / str(rows))[0] for rows in (1, 10_000)]
    # Weights alone would not show a wrong scale: AdamW divides by it.
    first, second = (next(line for line in lines(result) if line["kind"] == "train") for result in results)
    for name in ("loss", "grad_norm", "kl_sampler", "entropy"):
        assert second[name] == pytest.approx(first[name], rel=1e-3, abs=1e-6)
    one, other = (read_checkpoint(result.checkpoint).model.state_dict() for result in results)
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=2e-5, msg=name)


def test_what_is_rewarded_becomes_likelier(recipe: RLRecipe, tmp_path: Path) -> None:
    """After some steps completions of odd length, which the rule rewards, are more frequent than before."""
    recipe = changed(
        recipe,
        {
            "train": {"steps": 25},
            "rollout": {"problems": 8, "samples": 8, "max_tokens": 3},
            "optimizer": {"lr": 5e-3},
            "eval": {"every": 100, "problems": 64, "probe": False},
        },
    )
    result, _ = run(recipe, tmp_path)
    rewards = [line["reward"] for line in lines(result) if line["kind"] == "train"]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.2


@pytest.mark.parametrize("task", ["Raises", "NotANumber"])
def test_a_broken_check_scores_zero_and_is_counted(recipe: RLRecipe, start: Path, task: str, tmp_path: Path) -> None:
    """A check that raises, or gives no number, ends no run: its answers score 0, and the first fault is said, once.

    The faults are in the metrics, and no advice is given that would only help with a check that works.
    """
    result, said = run(changed(recipe, {"task": {"name": f"{start / 'rules.py'}:{task}"}}), tmp_path)
    assert result.step == 4
    found = [line for line in lines(result) if line["kind"] == "train"]
    assert all(line["reward"] == 0 for line in found)
    assert any(line["faults"] > 0 for line in found)
    assert (
        said.count(f"checks of task {start / 'rules.py'}:{task} failed, and count as wrong answers; the first: ") == 1
    )
    assert "easier or harder levels" not in said


def test_a_step_that_is_no_number_changes_nothing(
    recipe: RLRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss of NaN is said and skipped; after too many in a row the run stops with everything saved."""
    original = learner.policy_loss
    monkeypatch.setattr(learner, "policy_loss", lambda *a: (original(*a)[0] * math.nan, original(*a)[1]))
    with pytest.raises(UserError, match="2 in a row"):
        run(changed(recipe, {"train": {"max_bad_steps": 2}, "eval": {"probe": False}}), tmp_path)
    (folder,) = (tmp_path / "run" / "checkpoints").iterdir()
    before = module.load(recipe.model, dtype="float32")[0].state_dict()
    after = read_checkpoint(folder).model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_endpoint_that_goes_away_costs_no_step(
    recipe: RLRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When nothing can be drawn any more the run ends with a sentence and a checkpoint of the last good step."""
    original, calls = module.Roller.groups, itertools.count()

    def groups(*arguments: Any, **named: Any) -> Any:
        if next(calls) == 3:
            raise UserError("no completion could be drawn: gone")
        return original(*arguments, **named)

    monkeypatch.setattr(module.Roller, "groups", groups)
    with pytest.raises(UserError, match="gone"):
        run(changed(recipe, {"eval": {"probe": False}}), tmp_path)
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names[-1] == "step_00000003"


def test_a_model_that_cannot_be_asked_is_refused_before_anything_is_written(recipe: RLRecipe, tmp_path: Path) -> None:
    """Without a chat template the sentence says which other styles there are; no folder is left behind."""
    folder = tmp_path / "model"
    model, tokenizer = module.load(recipe.model, dtype="float32")
    save_model(model, folder, tokenizer=tokenizer)
    with pytest.raises(UserError, match=r"prompt\.style"):
        run(changed(recipe.replace(model=str(folder)), {"prompt": {"style": "chat"}}), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_every_step_is_measured(recipe: RLRecipe, temperature: float, tmp_path: Path) -> None:
    """The metrics that tell learning from gaming are there for every step, and the engine agrees with the trainer, at
    any temperature."""
    loss = {"sampler_correction": "truncate"}
    result, _ = run(changed(recipe, {"rollout": {"temperature": temperature}, "loss": loss}), tmp_path)
    for line in lines(result):
        if line["kind"] == "train":
            assert {"accuracy", "format", "entropy", "kl_sampler", "thought_tokens", "truncated", "reflections"} <= set(
                line
            )
            assert abs(line["kl_sampler"]) < 1e-6
            assert line["sampler_gap_max"] < 1e-4
    first = json.loads((result.folder / "metrics.jsonl").read_text().splitlines()[0])
    assert {"pass@1", "probe_thinking", "probe_guessing"} <= set(first)
    assert (result.folder / "samples.md").read_text().count("## Step") == 2 * 3


@pytest.mark.parametrize(
    ("changes", "tag", "why"),
    [
        ({"prompt": {"opens_thought": True}}, [5], "the prompt opens the thought"),
        ({}, [5, 6], "<think> is no token to be forbidden"),
    ],
)
def test_a_probe_that_cannot_be_made_says_why(recipe: RLRecipe, changes: dict, tag: list[int], why: str) -> None:
    """Where the base cannot be made to think and to guess nothing is drawn, and one line has the reason."""
    tokenizer = SimpleNamespace(encode=lambda text, special: tag)
    said: list[str] = []
    assert rl_evaluate._probe(None, changed(recipe, changes), [], tokenizer, said.append) == {}
    (line,) = said
    assert why in line


@pytest.fixture
def tags_are_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """No vocabulary has think tags as tokens, as most that were made before R1."""
    for room in ("train.rollout", "engine.engine"):
        monkeypatch.setattr(f"fathom.{room}.find_think_tags", lambda *_: None)


@pytest.mark.parametrize("opens", [False, True])
@pytest.mark.usefixtures("tags_are_text")
def test_a_model_whose_think_tags_are_text_runs_all_the_same(recipe: RLRecipe, opens: bool, tmp_path: Path) -> None:
    """It is probed as any other where its answers have a mark, and its prompt may open the thought."""
    changes = {"rewards": {"layout": {"form": "line"}}, "prompt": {"opens_thought": opens}, "train": {"steps": 1}}
    result, _ = run(changed(recipe, changes), tmp_path)
    assert result.step == 1
    assert ("probe_thinking" in lines(result)[0]) is not opens


@pytest.mark.usefixtures("tags_are_text")
def test_thoughts_that_cannot_be_cut_short_are_refused_before_the_first_step(recipe: RLRecipe, tmp_path: Path) -> None:
    """Budgets for a model without think tags are refused by the field's name, and not after hours."""
    with pytest.raises(UserError, match=r"eval\.budgets: .* leave it out"):
        run(changed(recipe, {"eval": {"budgets": (0, 8)}}), tmp_path)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_fewer_held_out_problems_than_wanted_are_said(recipe: RLRecipe, start: Path, tmp_path: Path) -> None:
    """A task that has only so many different problems: the run says how many it measures with."""
    task = {"task": {"name": f"{start / 'rules.py'}:Few", "levels": 1}}
    _, said = run(changed(recipe, task | {"eval": {"problems": 60}, "train": {"steps": 1}}), tmp_path)
    assert "different held-out problems were found where eval.problems = 60" in " ".join(said.split())


def test_missing_updates_are_said_once(recipe: RLRecipe, start: Path, tmp_path: Path) -> None:
    """With as many mini-batches as groups, those without anything to learn make no update: it is counted at every step,
    and said at the first."""
    changes = {
        "task": {"name": f"{start / 'rules.py'}:HalfHopeless"},
        "train": {"mini_batches": 4},
        "eval": {"probe": False},
    }
    result, said = run(changed(recipe, changes), tmp_path)
    trained = [line for line in lines(result) if line["kind"] == "train"]
    assert [line["updates"] for line in trained] == [round(4 * (1 - line["uninformative"])) for line in trained]
    assert sum(line["updates"] < 4 for line in trained) > 1
    assert said.count("mini-batches (train.mini_batches) had something to learn from") == 1


@pytest.mark.parametrize("resample", [0, 1])
def test_a_task_with_few_problems_says_how_many(recipe: RLRecipe, start: Path, resample: int, tmp_path: Path) -> None:
    """A step that finds fewer different problems than it is to ask goes on with those, counts them, says so once."""
    task = open_task(name := f"{start / 'rules.py'}:Few")
    known = {problem.question for problem in itertools.islice(task.problems("train"), 200)}
    changes = {
        "task": {"name": name, "levels": 1},
        "rollout": {"problems": 30, "samples": 2, "resample": resample},
        "train": {"steps": 2},
        "eval": {"probe": False, "problems": 1},
    }
    result, said = run(changed(recipe, changes), tmp_path)
    assert [line["problems"] for line in lines(result) if line["kind"] == "train"] == [len(known)] * 2
    assert said.count("different problems") == 1
    assert f"has given {len(known)} different problems where 30 were wanted" in said


def test_a_reference_wanted_later_is_taken_then(
    recipe: RLRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A KL term turned on at resume compares with the policy of that moment, and one turned off leaves no reference."""
    stop_after(monkeypatch, 2)
    run(recipe, tmp_path)
    monkeypatch.undo()
    stop_after(monkeypatch, 1)
    result, _ = run(changed(recipe, {"loss": {"kl": 0.1}}), tmp_path, resume=True, accept_changes=True)
    assert read_checkpoint(result.checkpoint).reference is not None
    monkeypatch.undo()
    result, _ = run(recipe, tmp_path, resume=True, accept_changes=True)
    assert read_checkpoint(result.checkpoint).reference is None


def test_weights_that_are_no_numbers_replace_no_checkpoint(recipe: RLRecipe, tmp_path: Path) -> None:
    """A learning rate that destroys the weights ends the run at once, and leaves no checkpoint of them."""
    with pytest.raises(UserError, match="no longer numbers"):
        run(changed(recipe, {"optimizer": {"lr": 1e38}, "checkpoint": {"every": 1}}), tmp_path)
    for folder in (tmp_path / "run" / "checkpoints").iterdir():
        assert all(t.isfinite().all() for t in read_checkpoint(folder).model.state_dict().values())


def test_one_bad_mini_batch_costs_no_other(recipe: RLRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the first of two mini-batches is no number, the second still makes its step."""
    original, calls = learner.policy_loss, itertools.count()

    def sometimes(*arguments: Any) -> Any:
        loss, report = original(*arguments)
        return (loss * math.nan if next(calls) == 0 else loss), report

    monkeypatch.setattr(learner, "policy_loss", sometimes)
    changes = {"train": {"mini_batches": 2, "steps": 1, "rows": 10_000}, "eval": {"probe": False}}
    result, _ = run(changed(recipe, changes), tmp_path)
    before = module.load(recipe.model, dtype="float32")[0].state_dict()
    after = read_checkpoint(result.checkpoint).model.state_dict()
    assert all(t.isfinite().all() for t in after.values())
    assert not all(torch.equal(before[name], after[name]) for name in before)


def test_whatever_ends_a_run_costs_no_step(recipe: RLRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that nobody expected, in the last evaluation, leaves a checkpoint of the last step."""
    calls = itertools.count()

    def fails(*_: Any, **__: Any) -> tuple[dict[str, float], list]:
        if next(calls) == 2:
            raise MemoryError
        return {"pass@1": 0.0, "accuracy": 0.0}, []

    monkeypatch.setattr(rl_evaluate, "_evaluate", fails)
    with pytest.raises(MemoryError):
        run(changed(recipe, {"checkpoint": {"every": 99}, "eval": {"probe": False}}), tmp_path)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000004"]


def test_an_overwritten_run_leaves_nothing_of_its_models(recipe: RLRecipe, tmp_path: Path) -> None:
    """What an earlier run of the name found best is gone with it, and what was measured of it."""
    old, measured = tmp_path / "run" / "best" / "step_00000009", tmp_path / "run" / "evaluation.json"
    run(changed(recipe, {"train": {"steps": 1}}), tmp_path)
    old.mkdir(parents=True)
    measured.write_text("{}")
    run(changed(recipe, {"train": {"steps": 1}}), tmp_path, overwrite=True)
    assert not old.exists()
    assert not measured.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval": {"budgets": (-1,)}}, "budgets"),
        (
            {"rollout": {"temperature": 0.7, "endpoint": "http://x"}, "loss": {"sampler_correction": "truncate"}},
            "needs rollout.temperature = 1",
        ),
        ({"train": {"mini_batches": 3}}, "mini_batches"),
        ({"task": {"start": 3}}, "start"),
        ({"prompt": {"template": "no question"}}, "question"),
        ({"rewards": {"accuracy": 1e39}}, "accuracy"),
        ({"rewards": {"accuracy": 0.0}}, "nothing to learn; give one a weight"),
        ({"rewards": {"layout": "boxed"}}, "'rewards.layout' is a table, not 'boxed'; .*: form, thoughts"),
        ({"loss": {"preset": ["dapo"]}}, "loss.preset .* is unknown.*: r1, dapo"),
        ({"task": {"check_seconds": 1e9}}, "check_seconds"),
    ],
)
def test_what_does_not_fit_together_is_refused(recipe: RLRecipe, changes: dict, message: str) -> None:
    """A recipe that could only fail later is refused when it is read, naming the field."""
    values = recipe.model_dump()
    for section, fields in changes.items():
        values[section] |= fields
    with pytest.raises(UserError, match=message):
        RLRecipe.parse(values, where="recipe")


def test_completions_longer_than_the_context_are_refused(recipe: RLRecipe, tmp_path: Path) -> None:
    """More tokens than the model has room for are named before the first step."""
    with pytest.raises(UserError, match=r"rollout\.max_tokens"):
        run(changed(recipe, {"rollout": {"max_tokens": 64}}), tmp_path)


def test_a_bad_tile_skips_the_update(recipe: RLRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In FP8 a tile without a number is counted and said, and the mini-batch that it was in changes nothing."""
    poison_one_tile(monkeypatch)
    own = changed(recipe, {"train": {"precision": "fp8", "mini_batches": 2, "steps": 2}})
    result, said = run(own, tmp_path)
    steps = [line for line in lines(result) if line["kind"] == "train"]
    assert [line["bad_tiles"] for line in steps] == [1, 0]
    assert [(line["skipped"], line["updates"]) for line in steps] == [(True, 1), (False, 2)]
    assert "linear layers multiply in FP8" in said
    assert "1 FP8 tile without a number" in said
