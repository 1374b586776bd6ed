"""An evaluation as its JSON holds it: looked over once, so that whoever shows it need not, and summed up over tasks."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fathom.errors import UserError

_Share = Annotated[float, Field(ge=0, le=1)]
_Finite = Annotated[float, Field(allow_inf_nan=False)]
_Count = Annotated[int, Field(ge=1)]
_Number = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
"""JSON has no other keys than text."""


class _Part(BaseModel):
    model_config = ConfigDict(strict=True)


class _Estimate(_Part):
    value: _Share
    low: _Share
    high: _Share


class _Spread(_Part):
    mean: _Finite


class _Transcript(_Part):
    question: str
    thought: str
    answer: str
    right: bool
    level: int


class _Level(_Part):
    problems: _Count


class _Measurement(_Part):
    """What is shown of it; fields of later versions have defaults."""

    task: str
    budget: int | None
    problems: _Count
    samples: _Count
    shares: dict[_Number, _Estimate] = Field(alias="pass@k")
    votes: dict[_Number, _Estimate] = Field(alias="cons@k", min_length=1)
    levels: dict[_Number, _Level] = {}
    thought_tokens: _Spread | None
    left_out: int = Field(default=0, ge=0)
    unread: _Share | None = None
    language: _Share | None = None
    language_thoughts: int = Field(default=0, ge=0)
    transcripts: list[_Transcript] = []


class _Settings(_Part):
    """Of `EvaluationSettings`, what stages are told apart by."""

    seed: int | None = None
    levels: int | None = None
    samples: int | None = None
    temperature: _Finite | None = None
    top_p: _Finite | None = None
    max_tokens: int | None = None


class _Evaluation(_Part):
    settings: _Settings
    complete: bool = True
    stopped: str = ""
    measurements: list[_Measurement]


def looked_over(values: Any, where: str | Path) -> dict[str, Any]:
    """`values`, if they are what `fathom eval` writes, of this version or an older one. Raises `UserError` that begins
    with `where`."""
    try:
        found = _Evaluation.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{where}: is not what 'fathom eval' writes ({first_mistake(error)}); measure again") from None
    if any("1" not in one.shares for one in found.measurements):
        raise UserError(f"{where}: is not what 'fathom eval' writes (no pass@1); measure again")
    return values


def first_mistake(error: ValidationError) -> str:
    """Where in a file, and what."""
    mistake = error.errors()[0]
    place = ".".join(map(str, mistake["loc"])) or "all of it"
    return f"{place}: {mistake['msg'].partition(' or instance of')[0]}"


def is_replaced_by(file: Path, new: Mapping[str, Any]) -> bool:
    """Whether nothing is lost where `new` takes the place of the evaluation in `file`: it asked as many problems of the
    same levels as often, for every task and budget, and is whole if that one is. What cannot be read may go."""
    try:
        old = looked_over(json.loads(file.read_text(encoding="utf-8")), file)
    except (OSError, ValueError, UserError):
        return True
    if old.get("complete", True) and not new["complete"]:
        return False
    found = {(one["task"], one["budget"]): one for one in new["measurements"]}
    return all(_covers(found.get((one["task"], one["budget"])), one) for one in old["measurements"])


def over_answers(
    measurements: Sequence[Mapping[str, Any]], value: Callable[[Mapping[str, Any]], float | None], count: str = ""
) -> float | None:
    """The mean of `value` over all answers of these measurements, or over as many as each says under `count`; None
    where it is known of none."""
    known = [
        (own, one[count] if count in one else one["problems"] * one["samples"])
        for one in measurements
        if (own := value(one)) is not None
    ]
    total = sum(answers for _, answers in known)
    return sum(own * answers for own, answers in known) / total if total else None


def mean_thought(measurements: Sequence[Mapping[str, Any]]) -> float | None:
    """Tokens of thought of an answer, over all answers whose endpoint told."""
    return over_answers(measurements, lambda one: None if (said := one["thought_tokens"]) is None else said["mean"])


def mean_language(measurements: Sequence[Mapping[str, Any]]) -> float | None:
    """Share of a thought's words that are in the problem's language, over all thoughts that have words."""
    return over_answers(measurements, lambda one: one.get("language"), "language_thoughts")


def _covers(new: Mapping[str, Any] | None, old: Mapping[str, Any]) -> bool:
    return (
        new is not None
        and new["problems"] >= old["problems"]
        and new["samples"] >= old["samples"]
        and new["levels"].keys() >= old.get("levels", {}).keys()
    )
