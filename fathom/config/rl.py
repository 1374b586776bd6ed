"""What a reinforcement-learning run is: a model, a task, rewards, and a loss."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from fathom.config.policy import PRESETS, PolicyLoss
from fathom.config.recipe import OptimizerSection, Positive, Precision, Recipe
from fathom.config.rewards import Rewards
from fathom.config.section import Section
from fathom.errors import nearest

R1_ZERO_TEMPLATE = (
    "A conversation between User and Assistant. The user asks a question and the assistant solves it. The assistant "
    "first reasons in its mind and then gives the answer. The reasoning is written between <think> and </think>, the "
    "answer between <answer> and </answer>: <think> reasoning here </think> <answer> answer here </answer>. "
    "User: {question} Assistant:"
)


class TaskSection(Section):
    """What is to be learnt."""

    name: str
    """A task as `fathom tasks` takes it: `modular`, `gym:chain_sum?max_terms=3`, `problems.jsonl`, `mine.py:MyTask`."""
    levels: Positive = 1
    """Problems come from levels 1 to this, equally often; with a curriculum, in the end."""
    start: Positive | None = None
    """A curriculum begins with levels 1 to this; none: there is no curriculum."""
    raise_at: float = Field(default=0.8, gt=0, le=1)
    """A curriculum adds a level when the hardest one so far is solved this often in a step's samples."""
    check_seconds: float = Field(default=10.0, gt=0, le=86400)
    """Longest time a check may take; then the answer counts as wrong."""
    sandbox: Literal["bubblewrap", "none"] = "bubblewrap"
    """Where a task that runs programs runs them; `none` is for programs you trust."""


class PromptSection(Section):
    """How a problem is put to the model."""

    style: Literal["zero", "chat", "template"] = "zero"
    """`zero`: R1-Zero's dialogue in plain text; `chat`: the model's own chat template; `template`: as you write it."""
    template: str = "{question}"
    """For `template`: the text, with `{question}` in it. Control tokens spelled in it are tokens."""
    instruction: str = ""
    """For `chat`: what follows the question in the user's message, such as how to lay out the answer."""
    opens_thought: bool = False
    """The prompt ends with an opening think tag, so that the model cannot but think."""

    @model_validator(mode="after")
    def _asks_the_question(self) -> Self:
        if self.style == "template" and self.template.count("{question}") != 1:
            raise ValueError("template must have {question} in it, once")
        return self

    @property
    def text(self) -> str:
        """The template of `zero` and `template`."""
        return R1_ZERO_TEMPLATE if self.style == "zero" else self.template

    @property
    def template_switches(self) -> dict[str, bool]:
        """Variables of a chat template that opens thoughts itself where it is told to."""
        return {"thinking": True, "enable_thinking": True} if self.opens_thought else {}


class RolloutSection(Section):
    """How answers are drawn."""

    problems: Positive = 16
    """Per step (R1: 32)."""
    samples: int = Field(default=16, ge=2)
    """Per problem: the group (R1: 16)."""
    max_tokens: Positive = 256
    """Longest completion."""
    temperature: float = Field(default=1.0, gt=0, le=10)
    """Of sampling, and of the policy that is trained."""
    resample: int = Field(default=0, ge=0)
    """Dynamic sampling (DAPO §3.2): where all rewards of a group are equal, other problems are drawn, so many times."""
    endpoint: str | None = None
    """Address of an OpenAI-compatible server that serves this model; none: the engine of this process. Its weights are
    not changed by training: correct for that with `loss.sampler_correction`."""
    endpoint_model: str | None = None
    """What that server calls the model; none: it has only one."""
    endpoint_key_env: str | None = None
    """Name of the environment variable with that server's key; none: it asks for no key."""
    retries: int = Field(default=2, ge=0)
    """Times that a completion which failed is asked for again."""
    replay_routes: bool = True
    """Train a mixture of experts on the experts that the engine chose (R3, arXiv 2510.11370)."""

    @property
    def gives_logprobs(self) -> bool:
        """Whether the sampler's log-probabilities are of the temperature drawn at: an endpoint's are always of 1."""
        return self.endpoint is None or self.temperature == 1


class RLTrainSection(Section):
    """How long and in what pieces."""

    steps: Positive = 100
    """Rollouts with their updates."""
    mini_batches: Positive = 1
    """Updates per rollout, each on its share of the groups (R1: 16)."""
    rows: Positive = 2048
    """Tokens per forward pass, but at least a whole group."""
    warmup_steps: int = Field(default=0, ge=0)
    """Linear from 0 to the learning rate, which then stays."""
    reference_every: Positive = 400
    """Steps after which the reference policy of `loss.kl` is replaced by the current one (R1: 400)."""
    precision: Precision = "auto"
    """What linear layers multiply in: `auto` is bf16 where the hardware has it, `fp8` V3's recipe (§3.3)."""
    threads: int = Field(default=0, ge=0, le=1024)
    """CPU threads; 0 leaves PyTorch's choice."""
    max_bad_steps: Positive = 5
    """Steps in a row with a non-finite loss or gradient after which the run stops."""


class RLCheckpointSection(Section):
    """What survives."""

    every: Positive = 25
    """Steps between checkpoints; one is always written at the end."""
    keep: Positive = 2
    """Newest checkpoints that are kept; the best by held-out accuracy is kept beside them."""


class RLEvalSection(Section):
    """What is measured on held-out problems."""

    every: Positive = 20
    """Steps between evaluations; one is made before the first step and one at the end."""
    problems: Positive = 128
    """Held-out problems, spread over the levels."""
    temperature: float = Field(default=1.0, ge=0, le=10)
    """Of sampling, one answer a problem; 0 takes the most likely token."""
    probe: bool = True
    """Before the first step, also measure the model made to think and made to guess."""
    reflections: tuple[str, ...] = (
        "wait", "check", "recheck", "verify", "mistake", "wrong", "again", "actually", "however", "hmm", "等等", "检查",
        "不对",
    )  # fmt: skip
    """Words that are counted in thoughts as signs of reflection."""
    budgets: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """At the end, also measure with thoughts cut at each of these numbers of tokens."""


class RLRecipe(Recipe):
    """Everything a reinforcement-learning run is."""

    VERB: ClassVar[str] = "rl"
    FREE_TO_CHANGE: ClassVar[tuple[str, ...]] = (
        "name", "train.threads", "train.steps", "train.max_bad_steps", "checkpoint", "eval", "rollout.retries",
        "rollout.endpoint_key_env", "task.check_seconds", "task.sandbox",
    )  # fmt: skip
    FIXED: ClassVar[tuple[str, ...]] = ("model", "seed", "optimizer.name", "optimizer.state_dtype")

    model: str
    """What training begins with: a run, a model folder, a hub name, a `.gguf` file."""
    teacher: str | None = None
    """On-policy distillation: a model of the same vocabulary, named as `model` is, judges every token that is drawn, in
    the place of rewards; these are then only measured."""
    teacher_prompt: PromptSection | None = None
    """How the teacher is asked; none: as this model is. What this one answers is judged behind that prompt."""
    task: TaskSection
    prompt: PromptSection = PromptSection()
    rewards: Rewards = Rewards()
    rollout: RolloutSection = RolloutSection()
    loss: PolicyLoss = PolicyLoss()
    """Choices of the policy's loss, or `preset = "r1"`, `"dapo"`, `"dr_grpo"`, `"gspo"`, `"cispo"` with fields to
    change."""
    optimizer: OptimizerSection = OptimizerSection(lr=1e-6, weight_decay=0.0)
    train: RLTrainSection = RLTrainSection()
    checkpoint: RLCheckpointSection = RLCheckpointSection()
    eval: RLEvalSection = RLEvalSection()

    @model_validator(mode="before")
    @classmethod
    def _expand_preset(cls, values: Any) -> Any:
        loss = values.get("loss") if isinstance(values, dict) else None
        if isinstance(loss, dict) and "preset" in loss:
            name = loss["preset"]
            if not isinstance(name, str) or name not in PRESETS:
                raise ValueError(f"loss.preset '{name}' is unknown{nearest(str(name), PRESETS)}: {', '.join(PRESETS)}")
            return {**values, "loss": PRESETS[name]().model_dump() | {k: v for k, v in loss.items() if k != "preset"}}
        return values

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.rollout.problems % self.train.mini_batches:
            raise ValueError(
                f"rollout.problems = {self.rollout.problems} must be a multiple of train.mini_batches = "
                f"{self.train.mini_batches}"
            )
        if self.loss.sampler_correction != "none" and not self.rollout.gives_logprobs:
            raise ValueError(
                f"loss.sampler_correction = {self.loss.sampler_correction} with rollout.endpoint needs "
                "rollout.temperature = 1, the only one at which endpoints give log-probabilities"
            )
        if self.teacher is not None and Path(self.teacher) == Path(self.model):
            raise ValueError(f"teacher = {self.teacher} is the model itself, which it cannot teach; name another")
        if self.teacher is None and self.teacher_prompt is not None:
            raise ValueError("teacher_prompt without a teacher; name one, or leave it out")
        if self.teacher is not None and self.rollout.resample:
            raise ValueError(
                f"rollout.resample = {self.rollout.resample} with a teacher: every problem is learnt from, whatever "
                "its rewards, so that none is to be drawn again; set it to 0"
            )
        if self.task.start is not None and self.task.start > self.task.levels:
            raise ValueError(f"task.start = {self.task.start} is above task.levels = {self.task.levels}")
        return self
