"""What a distillation is: a teacher, a student, tasks, and the ways in which one learns from the other.

Every way is made of runs that there are anyway: `[traces]` has fields of a recipe for `fathom synth`, `[sft]` of one
for `fathom sft`, `[on_policy]` and `[rewards_only]` of one for `fathom rl`. Their defaults here suit a student of a
million parameters on two cores; what they are about, model and task, comes from the fields above them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from fathom.config.evaluation import EvaluationSettings
from fathom.config.recipe import Recipe, override
from fathom.config.rl import RLRecipe
from fathom.config.sft import SFTRecipe
from fathom.config.synth import SynthRecipe, SynthTask

TEACHER, STUDENT, TRACES, DISTILLED, ON_POLICY, REWARDS = (
    "teacher", "student", "traces", "distilled", "on-policy", "rewards",
)  # fmt: skip
"""The stages of its pipeline."""

_TOKENS = 128
"""Longest completion, in all that draws."""
_RL = {
    "rollout": {"max_tokens": _TOKENS},
    "optimizer": {"lr": 2e-4},
    "train": {"steps": 60, "rows": 8192},
    "eval": {"every": 60, "probe": False},
}
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "traces": {
        "problems": 3000,
        "draw": {"samples": 2, "max_tokens": _TOKENS, "batch": 128},
        "filters": {"shortest_thought": 1, "per_problem": 1, "choice": "shortest"},
    },
    "sft": {
        "optimizer": {"lr": 4e-3},
        "train": {"batch": 64, "rows": 8192, "warmup_steps": 5},
    },
    "on_policy": override(
        _RL,
        {"rollout": {"problems": 64, "samples": 4}, "loss": {"normalisation": "token"}, "optimizer": {"lr": 1e-3}},
    ),
    "rewards_only": override(_RL, {"rollout": {"problems": 16, "samples": 16}, "loss": {"preset": "dapo"}}),
    "evaluation": {"problems": 256, "samples": 4, "temperature": 1.0, "top_p": 1.0, "max_tokens": _TOKENS},
}
_MAY_DIFFER = frozenset({"data"})
"""What a section may say for itself all the same: there may be more files to learn from."""
_UNKNOWN = [{"name": "unknown"}]
"""In the place of tasks that are none, so that the mistake is told of where it was made, and once."""


class DistillRecipe(Recipe):
    """Everything a distillation is."""

    VERB: ClassVar[str] = "distill"
    FREE_TO_CHANGE: ClassVar[tuple[str, ...]] = ()
    FIXED: ClassVar[tuple[str, ...]] = ()

    teacher: str
    """Who can do it: a run, a model folder, a hub name, a `.gguf` file."""
    model: str
    """Who shall learn it: the student, named likewise."""
    tasks: tuple[SynthTask, ...] = Field(min_length=1)
    """Tables `[[tasks]]` with `name`, `levels` and `share`."""
    way: Literal["traces", "on-policy", "both"] = "traces"
    """`traces`: the teacher solves problems, and what a rule finds right is learnt; `on-policy`: the student solves
    them, and the teacher judges each of its tokens; `both`: the second after the first."""
    compare_rewards: bool = False
    """Also teach the same student by rewards alone, without the teacher."""
    traces: SynthRecipe
    """What the teacher writes."""
    sft: SFTRecipe
    """How it is learnt. `data.files` may name more conversations beside `@traces/traces.jsonl`."""
    on_policy: RLRecipe
    """How the student draws for the teacher's judgement, and learns from it."""
    rewards_only: RLRecipe
    """How it learns from rewards alone."""
    evaluation: EvaluationSettings
    """The held-out problems, the same for all."""

    @model_validator(mode="before")
    @classmethod
    def _fill_sections(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        handed = _handed_down(values)
        filled = {}
        for name, defaults in _DEFAULTS.items():
            given = values.get(name, {})
            if isinstance(given, dict):
                if name != "evaluation" and (field := _contradiction(handed[name], given)):
                    raise ValueError(f"{name}.{field} follows from the fields above the sections; leave it out")
                filled[name] = override(override(defaults, handed[name]), given)
        return values | filled

    @model_validator(mode="after")
    def _teaches_another(self) -> Self:
        if Path(self.teacher) == Path(self.model):
            raise ValueError(f"teacher and model are both {self.model}; a model learns nothing from itself")
        return self


def training_task(tasks: Sequence[SynthTask]) -> tuple[str, int]:
    """Name and levels of the one task that reinforcement learning draws from: of several, their mixture."""
    if len(tasks) == 1:
        return tasks[0].name, tasks[0].levels
    return " + ".join(map(_with_levels, tasks)), max(task.levels for task in tasks)


def _with_levels(task: SynthTask) -> str:
    """The task without its levels above those that are taught."""
    return f"{task.name}{'&' if '?' in task.name else '?'}levels={task.levels}"


def _handed_down(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Fields of the sections that follow from those above them. What these are worth is not looked at here."""
    given = values.get("tasks")
    tasks = given if given and isinstance(given, list | tuple) else _UNKNOWN
    try:
        parsed = [SynthTask.model_validate(task) for task in tasks]
    except ValueError:  # pydantic's own: the field says it, and so the sections need not
        tasks, parsed = _UNKNOWN, [SynthTask.model_validate(task) for task in _UNKNOWN]
    name, levels = training_task(parsed)
    alike = len({task.levels for task in parsed}) == 1
    measured = (
        {"tasks": [task.name for task in parsed], "levels": parsed[0].levels}
        if alike
        else {"tasks": [_with_levels(task) for task in parsed]}
    )
    rl = {"model": f"@{STUDENT}", "task": {"name": name, "levels": levels}}
    return {
        "traces": {"name": TRACES, "source": "model", "model": f"@{TEACHER}", "tasks": tasks},
        "sft": {"name": DISTILLED, "model": f"@{STUDENT}", "data": {"files": [f"@{TRACES}/traces.{_format(values)}"]}},
        "on_policy": {"name": ON_POLICY, "teacher": f"@{TEACHER}"} | rl,
        "rewards_only": {"name": REWARDS, "teacher": None} | rl,
        "evaluation": measured,
    }


def _format(values: Mapping[str, Any]) -> Any:
    """Of the teacher's file."""
    traces = values.get("traces")
    return traces.get("format", "jsonl") if isinstance(traces, dict) else "jsonl"


def _contradiction(handed: Mapping[str, Any], given: Mapping[str, Any]) -> str | None:
    """The first field of `given` that says something else than `handed`."""
    for name in handed.keys() & given.keys() - _MAY_DIFFER:
        own, other = handed[name], given[name]
        if isinstance(own, Mapping) and isinstance(other, Mapping):
            if inner := _contradiction(own, other):
                return f"{name}.{inner}"
        elif own != other:
            return name
    return None
