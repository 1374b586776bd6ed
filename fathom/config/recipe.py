"""A run is a recipe: a TOML file whose every field can be overridden on the command line.

Defaults follow the DeepSeek-V3 report (§4.2), with its token counts turned into shares of the run, so that
the same recipe describes ten minutes on a laptop and two months on a cluster.
"""

import re
import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

import tomli_w
from pydantic import BaseModel, Field, field_validator, model_validator

from fathom.config.model import ModelConfig
from fathom.config.presets import preset
from fathom.config.section import Section, field_type, is_optional, section_at, sentence
from fathom.errors import UserError

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(gt=0)]
Precision = Literal["auto", "bf16", "fp32", "fp8"]


class DataSection(Section):
    """What the model reads."""

    path: str = "runs/data/stdlib"
    """Folder of token shards (`fathom data build`). One that does not exist is built from `sources`, unless only the
    folder was named: that is taken for a typo."""
    sources: tuple[str, ...] = ("stdlib",)
    """Folders, files or hub names to build `path` from; `stdlib` is the running Python's own library, `task:NAME`
    synthetic text about a task."""
    vocab_size: int = Field(default=4096, ge=266)
    """Size of the byte-level BPE trained on the sources; 266 are the bytes and control tokens alone."""
    sequence_length: Positive = 512
    """Tokens per sequence."""
    fim_rate: Share = 0.1
    """Share of documents rearranged to prefix-suffix-middle order (V3 §4.1: 0.1)."""


class OptimizerSection(Section):
    """How parameters move."""

    name: Literal["adamw", "muon"] = "adamw"
    """`muon` orthogonalises the updates of hidden matrices; embeddings, head and norms stay with AdamW."""
    lr: float = Field(default=2.2e-4, gt=0)
    """Peak learning rate."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """AdamW: decay of the first moment."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """AdamW: decay of the second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW: added to the root of the second moment (the report does not print its value)."""
    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Muon: decay of the momentum."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled decay, on matrices only."""
    clip_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this norm."""
    state_dtype: Literal["float32", "bfloat16"] = "float32"
    """Storage of the moments (V3 §3.3.2 keeps them in bfloat16)."""

    @model_validator(mode="after")
    def _resolved_by_the_state(self) -> Self:
        slowest = max(self.beta1, self.beta2, self.momentum)
        if self.state_dtype == "bfloat16" and slowest > 0.99:
            raise ValueError(
                f"state_dtype = bfloat16 cannot follow a decay of {slowest}: its steps are lost in rounding; use at "
                "most 0.99, or float32"
            )
        return self


class ScheduleSection(Section):
    """How rates change over the run; shares are of its tokens (V3 §4.2 in parentheses)."""

    warmup_steps: int = Field(default=100, ge=0)
    """Linear from 0 to the peak."""
    decay_start: Share = 0.676
    """Constant until here, then cosine (10 T of 14.8 T tokens)."""
    decay_end: Share = 0.966
    """The cosine reaches `floor` here (14.3 T)."""
    floor: Share = 0.1
    """Learning rate after the cosine, relative to the peak."""
    final_start: Share = 0.989
    """The last constant stretch begins here (the last 167 B)."""
    final: Share = 0.033
    """Learning rate of the last stretch, relative to the peak."""
    batch_ramp: Share = 0.0
    """The batch grows linearly over this share of the run (469 B of 14.8 T: 0.032); 0 is no ramp."""
    batch_start: Share = 0.2
    """Batch at the start of the ramp, relative to the full batch (3072 of 15360)."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if not self.decay_start <= self.decay_end <= self.final_start:
            raise ValueError("decay_start ≤ decay_end ≤ final_start is required")
        return self


class BalanceSection(Section):
    """How experts are kept equally busy (V3 §2.1.2)."""

    bias_rate: float = Field(default=0.001, ge=0, le=1)
    """γ: step of the router bias, by sign, once per training step over the whole batch. Scores lie between 0 and 1."""
    bias_until: Share = 0.966
    """Share of the run after which γ is `late_bias_rate` (14.3 T of 14.8 T)."""
    late_bias_rate: float = Field(default=0.0, ge=0, le=1)
    """γ in the last part."""
    sequence_loss: float = Field(default=1e-4, ge=0)
    """α: weight of the sequence-wise balance loss."""


class MTPSection(Section):
    """Weight of the multi-token-prediction loss (V3 §2.2); no effect without MTP modules."""

    weight: float = Field(default=0.3, ge=0)
    """λ in the first part of the run."""
    late_weight: float = Field(default=0.1, ge=0)
    """λ in the last part."""
    late_start: Share = 0.676
    """Share of the run at which λ changes (10 T of 14.8 T)."""


class TrainSection(Section):
    """How long and in what pieces."""

    steps: Positive = 1000
    """Optimizer steps."""
    batch_tokens: Positive = 4096
    """Tokens per optimizer step; whole micro-batches of sequences."""
    micro_batch: Positive = 8
    """Sequences per forward pass; the rest of the batch is accumulated."""
    precision: Precision = "auto"
    """What linear layers multiply in: `auto` is bf16 where the hardware has it, `fp8` V3's recipe (§3.3)."""
    fp8_gradients: Literal["tiles", "blocks"] = "tiles"
    """With fp8, how gradients of activations are grouped: 1×128, or 128×128, which the paper saw diverge (App. B.2)."""
    recompute: bool = False
    """Make norms, queries, keys and values again in the backward pass instead of keeping them (V3 §3.2.3)."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; `auto` is on where a compiler is present."""
    threads: int = Field(default=0, ge=0, le=1024)
    """CPU threads; 0 leaves PyTorch's choice."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Keep an exponential moving average of the weights with this decay; None keeps none."""
    max_bad_steps: Positive = 5
    """Steps in a row with a non-finite loss or gradient after which the run stops."""

    @model_validator(mode="after")
    def _of_fp8_alone(self) -> Self:
        if self.fp8_gradients == "blocks" and self.precision != "fp8":
            raise ValueError("fp8_gradients is how FP8 groups gradients; it needs precision = fp8")
        return self

    @model_validator(mode="after")
    def _compiled_or_by_hand(self) -> Self:
        if self.compile == "on" and (self.precision == "fp8" or self.recompute):
            what = "precision = fp8" if self.precision == "fp8" else "recompute"
            raise ValueError(f"{what} decides itself what is kept and runs layer by layer; leave compile at auto")
        return self


class CheckpointSection(Section):
    """What survives."""

    every: Positive = 200
    """Steps between checkpoints; one is always written at the end."""
    keep: Positive = 2
    """Newest checkpoints that are kept."""


class EvalSection(Section):
    """What is measured on held-out text."""

    every: Positive = 100
    """Steps between evaluations; one is always made at the end."""
    tokens: Positive = 65536
    """Held-out tokens per evaluation."""
    sample_prompt: str = "def "
    """Prompt of the sample written at every evaluation."""
    sample_tokens: int = Field(default=48, ge=0)
    """Tokens of that sample; 0 writes none."""
    sample_temperature: float = Field(default=0.8, ge=0)
    """0 takes the most likely token."""


class Recipe(Section):
    """What every run has."""

    VERB: ClassVar[str]
    """The command that runs it."""
    FREE_TO_CHANGE: ClassVar[tuple[str, ...]]
    """Fields and sections that do not enter the arithmetic: they may change when a run is resumed."""
    FIXED: ClassVar[tuple[str, ...]]
    """Fields and sections that no one can insist on: weights, optimizer state or the place in the data would not
    fit."""

    name: str
    """The run's folder is `runs/<name>`: at most 100 letters, digits, `-`, `_` and `.`."""
    seed: int = Field(default=1, ge=0, le=2**63 - 1)
    """Seed of weights, data order and samples."""

    @field_validator("name")
    @classmethod
    def _is_a_folder_name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", name):
            raise ValueError(
                "a run's name is a folder's name: 1 to 100 letters, digits, '-', '_' and '.', beginning with a letter, "
                "a digit or '_'"
            )
        return name


class PretrainRecipe(Recipe):
    """Everything a pre-training run is."""

    VERB: ClassVar[str] = "pretrain"
    # The data themselves are compared by fingerprint; the number of threads and compilation may change the last bit of
    # a sum, not what is being computed.
    FREE_TO_CHANGE: ClassVar[tuple[str, ...]] = (
        "name", "train.threads", "train.compile", "train.recompute", "train.max_bad_steps", "checkpoint", "eval",
        "data.path", "data.sources", "data.vocab_size",
    )  # fmt: skip
    FIXED: ClassVar[tuple[str, ...]] = (
        "model", "seed", "data.sequence_length", "data.fim_rate", "optimizer.name", "optimizer.state_dtype",
    )  # fmt: skip

    model: ModelConfig
    """A config, or `preset = "…"` with fields to change; `"none"` unsets an optional field of the preset."""
    data: DataSection = DataSection()
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    balance: BalanceSection = BalanceSection()
    mtp: MTPSection = MTPSection()
    train: TrainSection = TrainSection()
    checkpoint: CheckpointSection = CheckpointSection()
    eval: EvalSection = EvalSection()

    @model_validator(mode="before")
    @classmethod
    def _expand_preset(cls, values: Any) -> Any:
        model = values.get("model") if isinstance(values, dict) else None
        if isinstance(model, dict) and "preset" in model:
            changes = {k: v for k, v in model.items() if k != "preset"}
            try:
                chosen = preset(model["preset"])
            except UserError as error:
                raise ValueError(str(error)) from None  # pydantic then says where, as of every other mistake
            return {**values, "model": chosen.model_dump() | changes}
        return values

    @model_validator(mode="after")
    def _whole_batches(self) -> Self:
        micro_tokens = self.train.micro_batch * self.data.sequence_length
        if self.train.batch_tokens % micro_tokens:
            raise ValueError(
                f"train.batch_tokens = {self.train.batch_tokens} must be a multiple of train.micro_batch × "
                f"data.sequence_length = {micro_tokens}"
            )
        if self.data.sequence_length > self.model.max_position_embeddings:
            raise ValueError(
                f"data.sequence_length = {self.data.sequence_length} exceeds model.max_position_embeddings = "
                f"{self.model.max_position_embeddings}"
            )
        return self


def override(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with `changes` in the place of what they name, table by table."""
    result = dict(values)
    for key, value in changes.items():
        inner = result.get(key)
        both = isinstance(inner, Mapping) and isinstance(value, Mapping)
        result[key] = override(inner, value) if both else value
    return result


AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)


def read_recipe(path: Path, overrides: list[str], kind: type[AnyRecipe] = PretrainRecipe) -> AnyRecipe:
    """The recipe of a `kind` in a TOML file, changed by `--section.field value` pairs. Raises `UserError`.

    In both, the text `none` unsets an optional field (TOML has no null): `--model.q_lora_rank none`.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such recipe") from None
    except OSError as error:
        inside = path / "recipe.toml"
        hint = f"; the recipe of this run is {inside}" if inside.exists() else ""
        raise UserError(f"{path}: cannot be read as a recipe ({error.strerror}){hint}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid TOML ({error})") from None
    if (verb := verb_of(values)) not in (None, kind.VERB):
        raise UserError(f"{path}: is a recipe for 'fathom {verb}'")
    flags = {key.replace("-", "_"): text for key, text in flag_pairs(overrides)}
    for key, text in flags.items():
        _set(values, key, text, kind)
    return kind.parse(unset_optional(values, kind), where=str(path), flags=flags)


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as TOML, every field written out."""
    return tomli_w.dumps(recipe.model_dump(exclude_none=True))


def explain_recipe(recipe: Recipe) -> str:
    """The recipe as TOML with the sentence of every field behind it; optional fields that are unset are `"none"`."""
    return "\n".join(_explain_section(recipe, "")) + "\n"


def _explain_section(section: Section, path: str) -> list[str]:
    fields = {name: getattr(section, name) for name in type(section).model_fields}
    # In TOML a section's own fields must come before the sections inside it.
    lines = [f"[{path}]"] if path else []
    for name, value in fields.items():
        if not isinstance(value, Section):
            about = sentence(type(section).model_fields[name].description)
            lines.append(f"{f'{name} = {_toml(value)}':<32}  # {about}")
    for name, value in fields.items():
        if isinstance(value, Section):
            lines += ["", *_explain_section(value, f"{path}.{name}" if path else name)]
    return lines


def _toml(value: Any) -> str:
    """One value on one line."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, Section):
        return f"{{ {', '.join(f'{name} = {_toml(own)}' for name, own in value)} }}"
    return tomli_w.dumps({"value": "none" if value is None else value}).removeprefix("value = ").rstrip("\n")


def verb_of(values: Mapping[str, Any]) -> str | None:
    """The command that a file is for, by what no other command's recipe has; None where nothing tells."""
    data = values.get("data")
    marks = {
        "recipe": "stages" in values,
        "distill": "teacher" in values and "task" not in values,
        "rl": "task" in values,
        "synth": "tasks" in values,
        "sft": isinstance(data, dict) and "files" in data,
        "pretrain": isinstance(values.get("model"), dict),
    }
    return next((verb for verb, found in marks.items() if found), None)


def flag_pairs(words: list[str]) -> list[tuple[str, str]]:
    """`--section.field value` and `--section.field=value` as pairs of field and text. Raises `UserError`."""
    pairs, rest = [], list(words)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            raise UserError(f"'{flag}': expected --section.field value")
        key, equals, text = flag[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"'{flag}': a value must follow")
            text = rest.pop(0)
        pairs.append((key, text))
    return pairs


def flag_value(text: str, annotation: Any) -> Any:
    """A TOML value where the text is one (numbers, true, lists) and the field can take it, else the text itself.

    A field that takes a list takes one item as a list of one.
    """
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    if annotation is str:
        return value if isinstance(value, str) else text
    if typing.get_origin(annotation) is tuple and not isinstance(value, list):
        return [text if typing.get_args(annotation)[0] is str and not isinstance(value, str) else value]
    return value


def unset_optional(values: dict[str, Any], section: type[BaseModel]) -> dict[str, Any]:
    """`values` with None for the text `none` in optional fields of `section` and of the sections inside it."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        inner = section_at(section, [key])
        if isinstance(value, dict) and inner is not None:
            value = unset_optional(value, inner)
        elif value == "none" and is_optional(field_type(section, [key])):
            value = None
        result[key] = value
    return result


def _set(values: dict[str, Any], key: str, text: str, kind: type[Recipe]) -> None:
    *parents, field = path = key.replace("-", "_").split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise UserError(f"'--{key}': '{parent}' is not a section")
    values[field] = flag_value(text, field_type(kind, path))
