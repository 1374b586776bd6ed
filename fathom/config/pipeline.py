"""What a pipeline is: stages one after another, each a run of its own, and what is measured after each.

    name = "r1"

    [evaluation]
    tasks = ["modular"]

    [[stages]]
    name = "base"                      # its folder is runs/r1/base
    verb = "pretrain"
    recipe = "zero-base.toml"          # beside this file; the fields below are put in its place

    [[stages]]
    name = "zero"
    verb = "rl"
    recipe = "zero-arithmetic.toml"
    set = { model = "@base", train.steps = 60 }

In a stage's fields, `@base` stands for the folder of the earlier stage `base`, and `@traces/traces.jsonl` for a file in
one. On the command line a stage's fields stand behind its name: `--zero.train.steps 60`.
"""

import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from fathom.config.evaluation import EvaluationSettings
from fathom.config.recipe import PretrainRecipe, Recipe, flag_pairs, flag_value, override
from fathom.config.rewards import Layout
from fathom.config.rl import PromptSection, RLRecipe
from fathom.config.section import Section, field_type
from fathom.config.sft import SFTRecipe
from fathom.config.synth import SynthRecipe
from fathom.errors import UserError, nearest

Verb = Literal["pretrain", "synth", "sft", "rl"]
KINDS: Mapping[str, type[Recipe]] = {"pretrain": PretrainRecipe, "synth": SynthRecipe, "sft": SFTRecipe, "rl": RLRecipe}
"""What a stage's recipe is, by its verb."""
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
_REFERENCE = re.compile(r"@([A-Za-z0-9_][A-Za-z0-9_.-]*)(/.*)?", re.DOTALL)


class StageSection(Section):
    """One run."""

    name: str
    """Its folder in the pipeline's, and what later stages call it by: `@name`."""
    verb: Verb
    """What is done: `pretrain`, `synth`, `sft` or `rl`."""
    recipe: str | None = None
    """A recipe file, beside the pipeline's own; none: `set` says everything."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Fields in the place of that recipe's, sections as tables in it."""
    prompt: PromptSection | None = None
    """How its model is asked when it is measured; none: as a stage `rl` asks itself, else as `evaluation.prompt`."""
    layout: Layout | None = None
    """Where answers are looked for then; none: likewise."""

    @field_validator("name")
    @classmethod
    def _is_a_folder_name(cls, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise ValueError("a stage's name is a folder's name: letters, digits, '-', '_' and '.'")
        return name

    def resolved(self, folder: Path, seed: int, beside: Path) -> Recipe:
        """The recipe that it runs, with references to earlier stages in `folder` as paths. Raises `UserError`."""
        where, values = f"stage {self.name}", {}
        if self.recipe is not None:
            file = beside / self.recipe
            try:
                values = tomllib.loads(file.read_text(encoding="utf-8"))
            except OSError as error:
                raise UserError(f"{where}: recipe {file}: {error.strerror}") from None
            except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
                raise UserError(f"{where}: recipe {file}: not valid TOML ({error})") from None
        values = override({"seed": seed} | values if self.recipe is None else values | {"seed": seed}, self.set)
        values = _with_paths(values, folder) | {"name": self.name}
        return KINDS[self.verb].parse(values, where=where)

    @property
    def references(self) -> frozenset[str]:
        """Names of the stages that its fields speak of."""
        return frozenset(found[1] for text in _texts(self.set) if (found := _REFERENCE.fullmatch(text)))


class Pipeline(Section):
    """Stages, and what is measured after each that yields a model."""

    name: str
    """Its folder is `runs/<name>`."""
    seed: int = Field(default=1, ge=0, le=2**63 - 1)
    """Seed of every stage that does not set its own."""
    evaluation: EvaluationSettings
    """The held-out problems, the same after every stage."""
    stages: tuple[StageSection, ...] = Field(min_length=1)
    """In the order in which they run."""

    @field_validator("name")
    @classmethod
    def _is_a_folder_name(cls, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise ValueError("a pipeline's name is a folder's name: letters, digits, '-', '_' and '.'")
        return name

    @model_validator(mode="after")
    def _refers_backwards(self) -> Self:
        earlier: list[str] = []
        for stage in self.stages:
            if stage.name in earlier:
                raise ValueError(f"two stages are called '{stage.name}'")
            if unknown := next(iter(sorted(stage.references - set(earlier))), None):
                raise ValueError(
                    f"stage {stage.name}: '@{unknown}' is no earlier stage{nearest(unknown, earlier)}; there are: "
                    f"{', '.join(earlier) or 'none'}"
                )
            earlier.append(stage.name)
        return self


def read_pipeline(path: Path, words: list[str]) -> Pipeline:
    """The pipeline in a TOML file, changed by `--section.field value` and `--stage.section.field value` pairs. Raises
    `UserError`."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid TOML ({error})") from None
    pipeline = Pipeline.parse(values, where=str(path))
    stages = {stage.name: stage for stage in pipeline.stages}
    for key, text in flag_pairs(words):
        first, *rest = names = key.replace("-", "_").split(".")
        stage = next((stage for name, stage in stages.items() if name.replace("-", "_") == first), None)
        if stage is None:
            values = override(values, _nested(names, flag_value(text, field_type(Pipeline, names))))
            continue
        if not rest:
            raise UserError(f"'--{key}': say which field of the stage, as in --{key}.train.steps 10")
        value = None if text == "none" else flag_value(text, field_type(KINDS[stage.verb], rest))
        stages[stage.name] = stage.model_copy(update={"set": override(stage.set, _nested(rest, value))})
    listed = [stage.model_dump(exclude_unset=True) for stage in stages.values()]
    return Pipeline.parse(values | {"stages": listed}, where=str(path))


def _nested(names: list[str], value: Any) -> dict[str, Any]:
    for name in reversed(names):
        value = {name: value}
    return value


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _with_paths(value: Any, folder: Path) -> Any:
    if isinstance(value, str):
        found = _REFERENCE.fullmatch(value)
        return f"{folder / found[1]}{found[2] or ''}" if found else value
    if isinstance(value, Mapping):
        return {key: _with_paths(item, folder) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_with_paths(item, folder) for item in value]
    return value
