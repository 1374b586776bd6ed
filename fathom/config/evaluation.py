"""What an evaluation is: tasks, how they are asked, how answers are drawn, and what is varied."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from fathom.config.recipe import Positive
from fathom.config.rewards import Layout
from fathom.config.rl import PromptSection
from fathom.config.section import Section

R1_INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
"""What DeepSeek-R1's model card says to ask of it."""


class EvaluationSettings(Section):
    """Which problems, how they are asked, how often, and what is varied. The defaults are DeepSeek-R1's protocol."""

    tasks: tuple[str, ...] = Field(min_length=1)
    """Each as `fathom tasks` takes it: `modular`, `gym:chain_sum?max_terms=3`, `problems.jsonl`, `mine.py:MyTask`."""
    levels: Positive | None = None
    """Problems come from levels 1 to this, as many of each; none: all levels of the task."""
    problems: Positive = 128
    """Held-out problems of each task."""
    samples: int = Field(default=8, ge=1, le=256)
    """Answers drawn for each problem (R1: 4 to 64)."""
    consensus: tuple[Positive, ...] = ()
    """Sizes of the majority vote; empty: 1, 2, 4, … up to `samples`."""
    budgets: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Measure again with thoughts cut at each of these numbers of tokens."""
    temperature: float = Field(default=0.6, ge=0, le=100)
    """Of sampling; 0 takes the most likely token, so that all samples of a problem are alike."""
    top_p: float = Field(default=0.95, gt=0, le=1)
    """Draw from the smallest set of most likely tokens whose probabilities reach this sum."""
    max_tokens: Positive = 32_768
    """Longest completion, thoughts included, where the context leaves so much."""
    prompt: PromptSection = PromptSection(style="chat", instruction=R1_INSTRUCTION)
    """How a problem is put to the model."""
    layout: Layout = Layout(form="boxed", thoughts="optional")
    """Where thought and answer are looked for."""
    seed: int = Field(default=1, ge=0, le=2**63 - 1)
    """Of problems and samples: the same seed, the same problems."""
    check_seconds: float = Field(default=10.0, gt=0)
    """Longest time a check may take; then the answer counts as wrong."""
    sandbox: Literal["bubblewrap", "none"] = "bubblewrap"
    """Where a task that runs programs runs them; `none` is for programs you trust."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.consensus and max(self.consensus) > self.samples:
            raise ValueError(
                f"consensus over {max(self.consensus)} answers needs as many samples, and samples = {self.samples}"
            )
        for name in ("tasks", "budgets", "consensus"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name} has the same value twice: {', '.join(map(str, values))}")
        return self

    @property
    def sizes(self) -> tuple[int, ...]:
        """1, 2, 4, … up to `samples`: the k of pass@k."""
        return tuple(2**power for power in range(self.samples.bit_length()))

    @property
    def votes(self) -> tuple[int, ...]:
        """The k of cons@k."""
        return tuple(sorted(self.consensus)) or self.sizes
