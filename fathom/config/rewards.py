"""Where an answer stands in a completion, and what each part of its reward weighs."""

from typing import Literal, Self

from pydantic import Field, model_validator

from fathom.config.section import Section


class Layout(Section):
    """How a completion is laid out."""

    form: Literal["tags", "boxed", "line", "rest"] = "tags"
    """Where the answer stands: `tags`, in `<answer>…</answer>` (R1-Zero); `boxed`, in `\\boxed{…}` of the text after
    the thought; `line`, on the last line, after "Answer:" (or "答案:"); `rest`, all that follows the thought."""
    thoughts: Literal["required", "optional"] = "required"
    """Whether a completion is well-formed only with a thought in `<think>…</think>` that says something."""


class Rewards(Section):
    """How completions are laid out, and what each part of the reward weighs."""

    layout: Layout = Layout()
    """Where thought and answer are looked for."""
    accuracy: float = Field(default=1.0, ge=0, le=1e6)
    """Weight of the task's own score of the answer, 0 to 1."""
    format: float = Field(default=1.0, ge=0, le=1e6)
    """Weight of keeping the layout to the letter, 0 or 1 (R1-Zero: equal to accuracy)."""
    language: float = Field(default=0.0, ge=0, le=1e6)
    """Weight of the share of the thought's words that are in the problem's language, 0 to 1 (R1: 1)."""
    overlong: float = Field(default=0.0, ge=0, le=1e6)
    """Weight of the punishment for nearing the token limit, -1 to 0 (DAPO: 1)."""
    overlong_share: float = Field(default=0.2, gt=0, le=1)
    """The last share of the token limit, over which that punishment grows from 0 to -1 (DAPO: 4,096 of 20,480)."""

    @model_validator(mode="after")
    def _rewards_something(self) -> Self:
        if not (self.accuracy or self.format or self.language or self.overlong):
            raise ValueError(
                "accuracy, format, language and overlong all weigh 0, so there is nothing to learn; give one a weight, "
                "such as accuracy = 1.0"
            )
        return self
