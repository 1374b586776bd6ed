"""A pipeline's folder as a run leaves it behind, made by hand: two bases, ways of teaching, and a student."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from fathom.config.evaluation import EvaluationSettings
from fathom.config.hf import to_hf
from fathom.evaluate.evaluate import evaluate
from fathom.tasks.task import Problem
from tests.evaluate.scripted import MODULAR, Scripted
from tests.train.tiny import MODEL

TOML = """
name = "house"
serves = "best"
price_per_hour = 36.0
currency = "€"

[evaluation]
tasks = ["modular"]

[[stages]]
name = "ground"
verb = "pretrain"
set = { data = { path = "data/words" } }

[[stages]]
name = "first-floor"
verb = "rl"
set = { model = "@ground", task = { name = "modular" } }

[[stages]]
name = "bricks"
verb = "synth"
set = { model = "@first-floor" }

[[stages]]
name = "best"
verb = "sft"
set = { model = "@ground", data = { files = ["@bricks/traces.jsonl"] } }

[[stages]]
name = "given"
verb = "model"
set = { model = "package:small" }

[[stages]]
name = "lessons"
verb = "synth"
set = { model = "@best" }

[[stages]]
name = "taught"
verb = "sft"
set = { model = "@given", data = { files = ["@lessons/traces.jsonl"] } }

[[stages]]
name = "judged"
verb = "rl"
set = { model = "@given", teacher = "@best", task = { name = "modular" } }

[[stages]]
name = "alone"
verb = "rl"
set = { model = "@given", task = { name = "modular" } }
"""
STAGES = {"ground": 1, "first-floor": 3, "bricks": None, "best": 4, "given": 0, "lessons": None, "taught": 3,
          "judged": 2, "alone": 1}  # fmt: skip
"""How many samples of four of each problem are right; None: a stage without a model."""
_RECIPES = {
    "ground": '[data]\npath = "data/words"\nsequence_length = 64\n',
    "bricks": '[[tasks]]\nname = "modular"\n',
    "lessons": '[[tasks]]\nname = "modular"\n',
    "best": '[data]\nfiles = ["traces.jsonl"]\n[train]\nbatch = 2\n',
    "taught": '[data]\nfiles = ["traces.jsonl"]\n[train]\nbatch = 2\n',
}
_REWARDS = '[task]\nname = "modular"\n[rollout]\nproblems = 2\nsamples = 4\n'
COUNTS: dict[str, Any] = {
    "total": {"drawn": 40, "right": 20, "kept": 10, "dropped": {"wrong": 20, "duplicate": 10}},
    "rounds": [
        {"round": 0, "drawn": 30, "right": 12, "kept": 6, "dropped": {}},
        {"round": 1, "drawn": 10, "right": 8, "kept": 4, "dropped": {}},
    ],
    "levels": [{"task": "modular", "level": 1, "drawn": 40, "right": 20, "kept": 10, "dropped": {}}],
    "faults": {},
}


def evaluation(right: int, settings: EvaluationSettings = MODULAR) -> dict[str, Any]:
    """Of a model that solves every problem with the first `right` of its samples, unless it must not think."""
    return json.loads(_evaluated(right, settings))


@cache
def _evaluated(right: int, settings: EvaluationSettings) -> str:
    def say(problem: Problem, number: int, budget: int | None) -> str:
        return f"<think>so</think>{problem.answer if number < right and budget != 0 else 'no'}"

    return json.dumps(evaluate(Scripted(say), settings, model="m").as_json())


def build(folder: Path, *, made: int = len(STAGES), under_way: bool = False) -> Path:
    """The first `made` stages finished, and with `under_way` one more begun."""
    folder.mkdir()
    (folder / "pipeline.toml").write_text(TOML)
    states: dict[str, Any] = {}
    for number, (name, right) in enumerate(STAGES.items()):
        if number >= made + under_way:
            break
        verb = TOML.partition(f'name = "{name}"\nverb = "')[2].partition('"')[0]
        states[name] = {"verb": verb, "fingerprint": "f", "finished": number < made, "seconds": 10.0 * (number + 1),
                        "joules": None, "evaluation": None}  # fmt: skip
        if number < made and right is not None:
            states[name]["evaluation"] = evaluation(right)
        if verb != "model":
            _run(folder / name, name, verb)
    write_states(folder, states)
    return folder


def states(folder: Path) -> dict[str, Any]:
    """What `pipeline.json` says."""
    return json.loads((folder / "pipeline.json").read_text())


def write_states(folder: Path, found: dict[str, Any]) -> None:
    """In the place of what it said."""
    (folder / "pipeline.json").write_text(json.dumps(found))


def _run(folder: Path, name: str, verb: str) -> None:
    folder.mkdir()
    (folder / "recipe.toml").write_text(f'name = "{name}"\n{_RECIPES.get(name, _REWARDS)}')
    if verb == "synth":
        (folder / "synth.json").write_text(json.dumps(COUNTS))
        return
    lines = [{"kind": "eval", "step": 0, "loss": 3.0, "pass@1": 0.25}]
    for step in (1, 2):
        line = {"loss": 3.0 - step, "tokens": 1000 * step, "max_vio": 0.5, "entropy": 0.5, "gemm_share": 0.25}
        if verb == "rl":
            line = {"accuracy": 0.5, "reward": 0.5, "completion_tokens": 5.0, "thought_tokens": 3.0, "problems": 2.0}
            line |= {"entropy": 0.5} | ({"teacher_kl": 0.1} if name == "judged" else {})
        lines.append({"kind": "train", "step": step, **line})
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    model = folder / "checkpoints" / "step_00000002"
    model.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps(to_hf(MODEL, dtype="float32")))
