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
one. On the command line a stage's fields stand behind its name: `--zero.train.steps 60`, and those of its measurement
behind `evaluation`: `--zero.evaluation.samples 16`.
"""

import hashlib
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import tomli_w
from pydantic import Field, field_validator, model_validator

from fathom.config.evaluation import EvaluationSettings
from fathom.config.recipe import PretrainRecipe, Recipe, flag_pairs, flag_value, override, unset_optional, verb_of
from fathom.config.rewards import Layout
from fathom.config.rl import PromptSection, RLRecipe
from fathom.config.section import Section, field_type
from fathom.config.sft import SFTRecipe
from fathom.config.synth import SynthRecipe
from fathom.errors import UserError, nearest


class ModelRecipe(Recipe):
    """A model as it is: it is measured, and nothing is trained."""

    VERB: ClassVar[str] = "model"
    FREE_TO_CHANGE: ClassVar[tuple[str, ...]] = ("name", "seed")
    FIXED: ClassVar[tuple[str, ...]] = ()

    model: str
    """A run, a model folder, a hub name, a `.gguf` file, or `package:NAME`."""


Verb = Literal["pretrain", "synth", "sft", "rl", "model"]
KINDS: Mapping[str, type[Recipe]] = {
    "pretrain": PretrainRecipe,
    "synth": SynthRecipe,
    "sft": SFTRecipe,
    "rl": RLRecipe,
    "model": ModelRecipe,
}
"""What a stage's recipe is, by its verb."""
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
_STAGE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,99}")
_REFERENCE = re.compile(r"@([A-Za-z0-9_][A-Za-z0-9_.-]*)(/.*)?", re.DOTALL)


class StageSection(Section):
    """One run."""

    name: str
    """Its folder in the pipeline's, and what later stages call it by: `@name`."""
    verb: Verb
    """What is done: `pretrain`, `synth`, `sft` or `rl`; nothing to a `model`, which `@name` then stands for."""
    recipe: str | None = None
    """A recipe file, beside the pipeline's own; none: `set` says everything."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Fields in the place of that recipe's, sections as tables in it."""
    prompt: PromptSection | None = None
    """How its model is asked when it is measured; none: as a stage `rl` asks itself, else as `evaluation.prompt`."""
    layout: Layout | None = None
    """Where answers are looked for then; none: likewise."""
    evaluation: dict[str, Any] = Field(default_factory=dict)
    """Fields in the place of `[evaluation]`'s when it is measured, as in `{ budgets = [0, 8, 16], samples = 16 }`."""
    minutes: float | None = Field(default=None, gt=0)
    """What it takes on a machine of two cores, measuring included. Only the time left is worked out from it."""

    @field_validator("name")
    @classmethod
    def _is_a_folder_name(cls, name: str) -> str:
        if not _STAGE.fullmatch(name):
            raise ValueError("a stage's name is a folder's, and stands before its fields: letters, digits, '-' and '_'")
        return name

    @model_validator(mode="after")
    def _measures_models_alone(self) -> Self:
        if not self.yields_model and (self.evaluation or self.prompt or self.layout):
            raise ValueError("a stage 'synth' yields no model, so leave evaluation, prompt and layout out")
        return self

    @property
    def yields_model(self) -> bool:
        """Whether there is a model afterwards, and so something to measure."""
        return self.verb != "synth"

    def read(self, beside: Path) -> dict[str, Any]:
        """The fields of its recipe file. Raises `UserError`."""
        if self.recipe is None:
            return {}
        where, file = f"stage {self.name}", beside / self.recipe
        try:
            values = tomllib.loads(file.read_text(encoding="utf-8-sig"))
        except OSError as error:
            raise UserError(f"{where}: recipe {file}: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{where}: recipe {file}: not valid TOML ({error})") from None
        return {key: value for key, value in values.items() if key not in ("name", "seed")}

    def resolved(self, places: Mapping[str, str], seed: int, beside: Path) -> Recipe:
        """The recipe that it runs, where `places` are the paths that earlier stages stand for. Raises `UserError`."""
        kind = KINDS[self.verb]
        if kind is SynthRecipe:
            seed = _own_seed(seed, self.name)
        values = {"seed": seed} | override(self.read(beside), _with_paths(self.set, places)) | {"name": self.name}
        return kind.parse(unset_optional(values, kind), where=f"stage {self.name}")

    @property
    def references(self) -> frozenset[str]:
        """Names of the stages that its fields speak of."""
        return frozenset(found[1] for text in _texts(self.set) if (found := _REFERENCE.fullmatch(text)))


class Pipeline(Section):
    """Stages, and what is measured after each that yields a model."""

    name: str
    """Its folder is `runs/<name>`."""
    seed: int = Field(default=1, ge=0, le=2**63 - 1)
    """Seed of every stage that does not set its own. Stages `synth` have one each that follows from it and their name,
    so that they draw different problems: what one hands on is not what the next draws again."""
    evaluation: EvaluationSettings
    """The held-out problems, the same after every stage."""
    stages: tuple[StageSection, ...] = Field(min_length=1)
    """In the order in which they run."""
    serves: str | None = None
    """The stage whose model the pipeline's folder stands for; none: the last that has trained one."""
    price_per_hour: float = Field(default=0.10, ge=0)
    """Of this machine."""
    currency: str = "$"
    """Of that price."""

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
            if alike := next((name for name in earlier if _flag(name) == _flag(stage.name)), None):
                raise ValueError(f"stages '{alike}' and '{stage.name}' are one where case, '-' and '_' do not count")
            if (own := _flag(stage.name)) in Pipeline.model_fields:
                raise ValueError(f"a stage cannot be called '{stage.name}': --{own} is the pipeline's")
            if unknown := next(iter(sorted(stage.references - set(earlier))), None):
                raise ValueError(
                    f"stage {stage.name}: '@{unknown}' is no earlier stage{nearest(unknown, earlier)}; there are: "
                    f"{', '.join(earlier) or 'none'}"
                )
            earlier.append(stage.name)
        return self

    @model_validator(mode="after")
    def _serves_a_model(self) -> Self:
        models = [stage.name for stage in self.stages if stage.yields_model]
        if self.serves is not None and self.serves not in models:
            raise ValueError(
                f"serves = '{self.serves}' is no stage that yields a model{nearest(self.serves, models)}; there are: "
                f"{', '.join(models) or 'none'}"
            )
        return self

    def recipes(self, folder: Path, beside: Path) -> dict[str, Recipe]:
        """What every stage runs, by its name, in `folder`; recipe files are read `beside`. Raises `UserError`."""
        found: dict[str, Recipe] = {}
        places: dict[str, str] = {}
        for stage in self.stages:
            recipe = found[stage.name] = stage.resolved(places, self.seed, beside)
            places[stage.name] = recipe.model if isinstance(recipe, ModelRecipe) else str(folder / stage.name)
        return found

    def settings(self, stage: StageSection, recipe: Recipe) -> EvaluationSettings:
        """How a stage's model is measured, which is asked as it was trained to be. Raises `UserError`."""
        asked: dict[str, Any] = {}
        if isinstance(recipe, RLRecipe):
            asked = {"prompt": recipe.prompt.model_dump(), "layout": recipe.rewards.layout.model_dump()}
        asked |= {name: own.model_dump() for name in ("prompt", "layout") if (own := getattr(stage, name)) is not None}
        values = self.evaluation.model_dump() | asked | unset_optional(stage.evaluation, EvaluationSettings)
        return EvaluationSettings.parse(values, where=f"stage {stage.name}: evaluation")


def dump_pipeline(pipeline: Pipeline, beside: Path) -> str:
    """Every field that was set, as TOML for `read_pipeline` that needs no other file: what recipe files `beside` say
    stands in `set`. Raises `UserError`."""
    values = pipeline.model_dump(exclude_unset=True, exclude_none=True)
    values["stages"] = [
        stage.model_dump(exclude_unset=True, exclude_none=True, exclude={"recipe"})
        | {"set": _without_null(override(stage.read(beside), stage.set))}
        for stage in pipeline.stages
    ]
    return tomli_w.dumps(values)


def _flag(name: str) -> str:
    """By which flags and folders tell stages apart, on any machine."""
    return name.lower().replace("-", "_")


def read_pipeline(path: Path, words: list[str]) -> Pipeline:
    """The pipeline in a TOML file, changed by `--section.field value` and `--stage.section.field value` pairs. Raises
    `UserError`."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read as a pipeline ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid TOML ({error})") from None
    if (verb := verb_of(values)) not in (None, "recipe"):
        raise UserError(f"{path}: is a recipe for 'fathom {verb}', not a pipeline's")
    pipeline = Pipeline.parse(unset_optional(values, Pipeline), where=str(path))
    stages = {stage.name: stage for stage in pipeline.stages}
    for key, text in flag_pairs(words):
        first, *rest = names = key.replace("-", "_").split(".")
        stage = next((stage for name, stage in stages.items() if name.replace("-", "_") == first), None)
        if stage is None:
            values = override(values, _nested(names, flag_value(text, field_type(Pipeline, names))))
            continue
        if not rest:
            raise UserError(f"'--{key}': say which field of the stage, as in --{key}.train.steps 10")
        field, kind = "set", KINDS[stage.verb]
        if rest[0] == "evaluation":
            field, kind, rest = "evaluation", EvaluationSettings, rest[1:]
        changed = override(getattr(stage, field), _nested(rest, flag_value(text, field_type(kind, rest))))
        stages[stage.name] = stage.model_copy(update={field: changed})
    listed = [stage.model_dump(exclude_unset=True) for stage in stages.values()]
    return Pipeline.parse(unset_optional(values | {"stages": listed}, Pipeline), where=str(path))


def _own_seed(seed: int, stage: str) -> int:
    digest = hashlib.blake2b(f"{seed} {stage}".encode(), digest_size=4).digest()
    return int.from_bytes(digest)


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


def _with_paths(value: Any, places: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        found = _REFERENCE.fullmatch(value)
        return f"{places[found[1]]}{found[2] or ''}" if found else value
    if isinstance(value, Mapping):
        return {key: _with_paths(item, places) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_with_paths(item, places) for item in value]
    return value


def _without_null(values: Mapping[str, Any]) -> dict[str, Any]:
    """TOML has no null: the text `none` unsets an optional field."""
    return {
        key: _without_null(value) if isinstance(value, Mapping) else "none" if value is None else value
        for key, value in values.items()
    }
