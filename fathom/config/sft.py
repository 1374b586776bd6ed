"""What a supervised fine-tuning run is: a model, conversations, and how often they are read."""

from typing import ClassVar

from pydantic import Field

from fathom.config.recipe import CheckpointSection, OptimizerSection, Positive, Precision, Recipe, Share
from fathom.config.section import Section


class ConversationsSection(Section):
    """What is learnt."""

    files: tuple[str, ...] = Field(min_length=1)
    """JSON Lines or Parquet files of conversations (`messages`, ShareGPT's `conversations`, or `prompt` and
    `completion`); what assistants say in them is learnt, the rest is read."""
    held_out: Share = 0.02
    """Share of the conversations that is not trained on: their loss is measured. Equal questions are on one side."""
    max_tokens: Positive = 4096
    """Answers that end further than this from the beginning of their conversation are left out."""
    default_system: str = ""
    """System message of conversations that have none."""


class SFTTrainSection(Section):
    """How long and in what pieces."""

    epochs: float = Field(default=2.0, gt=0, le=1000)
    """Times that every answer is learnt (R1: 2 to 3)."""
    batch: Positive = 128
    """Answers per optimizer step (R1: 128)."""
    rows: Positive = 2048
    """Tokens per forward pass, but at least one answer with what comes before it."""
    warmup_steps: int = Field(default=0, ge=0)
    """Linear from 0 to the peak."""
    floor: Share = 0.1
    """The learning rate falls by a cosine to this share of its peak (R1: 5e-5 to 5e-6)."""
    precision: Precision = "auto"
    """What linear layers multiply in: `auto` is bf16 where the hardware has it, `fp8` V3's recipe (§3.3)."""
    threads: int = Field(default=0, ge=0, le=1024)
    """CPU threads; 0 leaves PyTorch's choice."""
    max_bad_steps: Positive = 5
    """Steps in a row with a non-finite loss or gradient after which the run stops."""


class SFTEvalSection(Section):
    """What is measured on held-out conversations."""

    every: Positive = 50
    """Steps between evaluations; one is made before the first step and one at the end."""
    answers: Positive = 256
    """Held-out answers whose loss is measured."""
    sample_tokens: int = Field(default=256, ge=0)
    """Tokens of the sample that is written at every evaluation; 0 writes none."""


class SFTRecipe(Recipe):
    """Everything a supervised fine-tuning run is."""

    VERB: ClassVar[str] = "sft"
    FREE_TO_CHANGE: ClassVar[tuple[str, ...]] = (
        "name", "train.threads", "train.max_bad_steps", "checkpoint", "eval",
    )  # fmt: skip
    FIXED: ClassVar[tuple[str, ...]] = ("model", "seed", "optimizer.name", "optimizer.state_dtype")

    model: str
    """What training begins with: a run, a model folder, a hub name, a `.gguf` file."""
    data: ConversationsSection
    optimizer: OptimizerSection = OptimizerSection(lr=5e-5, weight_decay=0.0)
    train: SFTTrainSection = SFTTrainSection()
    checkpoint: CheckpointSection = CheckpointSection()
    eval: SFTEvalSection = SFTEvalSection()
