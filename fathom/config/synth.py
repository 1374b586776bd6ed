"""What a run of the verified-data factory is: tasks, a teacher, filters, and what is written."""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from fathom.config.recipe import Positive, Recipe, Share
from fathom.config.rewards import Layout
from fathom.config.rl import PromptSection
from fathom.config.section import Section


class SynthTask(Section):
    """Problems of one task."""

    name: str
    """As `fathom tasks` takes it: `modular`, `gym:chain_sum?max_terms=3`, `problems.jsonl`, `mine.py:MyTask`."""
    levels: Positive = 1
    """Problems come from levels 1 to this, equally often."""
    share: float = Field(default=1.0, gt=0, le=1e6)
    """How many of all problems are of this task, relative to the shares of the others."""


class DrawSection(Section):
    """How candidate solutions are drawn."""

    samples: Positive = 4
    """Candidates for each problem."""
    max_tokens: Positive = 2048
    """Longest completion."""
    temperature: float = Field(default=1.0, ge=0, le=100)
    """Of sampling; 0 takes the most likely token, so that all candidates of a problem are alike."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Draw from the smallest set of most likely tokens whose probabilities reach this sum."""
    batch: Positive = 64
    """Problems that are drawn, checked and put on disk together: what a kill can lose."""
    repair_rounds: int = Field(default=0, ge=0, le=2)
    """Wrong answers are asked again so many times, with the answer and the verdict in the conversation."""
    repair_text: str = "Your answer {answer} is wrong. Try again."
    """What the verdict says; `{answer}` is the wrong answer."""
    endpoint: str | None = None
    """Address of an OpenAI-compatible server of `model` that gives token ids; none: the engine of this process."""
    endpoint_model: str | None = None
    """What that server calls the model; none: it has only one."""
    endpoint_key_env: str | None = None
    """Name of the environment variable with that server's key; none: it asks for no key."""
    retries: int = Field(default=2, ge=0)
    """Times that a completion which failed is asked for again."""


class CheckSection(Section):
    """How answers are checked."""

    seconds: float = Field(default=10.0, gt=0, le=86400)
    """Longest time a check may take; then the answer counts as wrong."""
    sandbox: Literal["bubblewrap", "none"] = "bubblewrap"
    """Where a task that runs programs runs them; `none` is for programs you trust."""


class FilterSection(Section):
    """Which of the right answers are kept."""

    finished: bool = True
    """Only completions that the model ended, not those cut off at `draw.max_tokens`."""
    layout: bool = True
    """Only completions that keep the layout to the letter."""
    language: Share = 0.9
    """Least share of the thought's words in the language of the problem."""
    shortest_thought: int = Field(default=0, ge=0)
    """Least characters of a thought; 1 leaves out answers without one."""
    longest_thought: Positive | None = None
    """Most characters of a thought."""
    repetition: Share = 0.8
    """Most of a text's 8-grams that may have stood in it before; 1 lets all pass."""
    compression: float = Field(default=15.0, ge=1, le=1e6)
    """Most times that a text may be longer than zlib makes it: loops that change a number or a name in every turn."""
    duplicates: float = Field(default=1.0, gt=0, le=1)
    """Of rows that have this share of their 5-grams in common (Jaccard, by MinHash), or more, the first is kept; 1: of
    equal texts."""
    per_problem: Positive | None = None
    """Most rows of one problem."""
    choice: Literal["random", "shortest"] = "random"
    """Which of a problem's rows those are."""


class DecontaminationSection(Section):
    """What must not be learnt, for it is measured with."""

    held_out: int = Field(default=256, ge=0)
    """Held-out problems of each task, spread over its levels, with which questions are compared."""
    overlap: Share = 0.5
    """Share of a held-out question's 13-grams that makes another question nearly equal to it; 0: any one of them."""
    files: tuple[str, ...] = ()
    """JSON Lines of more held-out questions: `question`, `problem`, `prompt`, or `messages`."""
    refuse: tuple[str, ...] = ()
    """Files of conversations that will be learnt beside the rows written here: where one asks a held-out question,
    nothing is drawn, and the rows are named."""


class RewriteSection(Section):
    """How a right candidate is written down."""

    thought_template: str = "{thought}"
    """The thought as written; `{thought}` is the candidate's."""
    answer_template: str = "{answer}"
    """The text behind the thought; `{answer}` is the candidate's answer."""
    form: Literal["tags", "boxed", "line", "rest"] | None = None
    """Where a reader shall find the answer in that text (as `layout.form`), and the task checks it again; none: in the
    place of `{answer}`."""
    instruction: str | None = None
    """What follows the question in the user's message; none: `prompt.instruction`."""

    @model_validator(mode="after")
    def _keeps_both(self) -> Self:
        for name in ("thought", "answer"):
            if getattr(self, f"{name}_template").count(f"{{{name}}}") != 1:
                raise ValueError(f"{name}_template must have {{{name}}} in it, once")
        return self


class SynthRecipe(Recipe):
    """Everything a run of the data factory is."""

    VERB: ClassVar[str] = "synth"
    FREE_TO_CHANGE: ClassVar[tuple[str, ...]] = (
        "name", "format", "filters", "decontamination", "rewrite", "check", "draw.batch", "draw.retries",
        "draw.endpoint_key_env",
    )  # fmt: skip
    FIXED: ClassVar[tuple[str, ...]] = ()

    tasks: tuple[SynthTask, ...] = Field(min_length=1)
    """Tables `[[tasks]]` with `name`, `levels` and `share`."""
    problems: Positive = 1000
    """Different training problems of all tasks together."""
    source: Literal["model", "worked"] = "model"
    """Who solves them: `model`, or `worked`, the solutions that tasks write by rule."""
    model: str | None = None
    """The teacher: a run, a model folder, a hub name, a `.gguf` file; with `draw.endpoint`, where its tokenizer is."""
    format: Literal["jsonl", "parquet"] = "jsonl"
    """What the rows are written as: `traces.jsonl` or `traces.parquet`."""
    prompt: PromptSection | None = None
    """How a problem is put to the model; none: as in the recipe of the `fathom rl` run that `model` is, else as a chat
    with DeepSeek-R1's instruction."""
    layout: Layout | None = None
    """Where thought and answer are looked for; none: as in that recipe, else in a box."""
    draw: DrawSection = DrawSection()
    check: CheckSection = CheckSection()
    filters: FilterSection = FilterSection()
    decontamination: DecontaminationSection = DecontaminationSection()
    rewrite: RewriteSection = RewriteSection()

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.source == "model" and self.model is None:
            raise ValueError("'model' is missing: name the teacher, or set source = 'worked'")
        if self.source == "worked" and (self.model, self.draw.endpoint, self.prompt, self.layout) != (None,) * 4:
            raise ValueError("source = worked asks no model; leave model, draw.endpoint, prompt and layout out")
        if self.source == "worked" and self.draw.repair_rounds:
            raise ValueError("source = worked has nothing to repair; leave draw.repair_rounds out")
        names = [task.name for task in self.tasks]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"tasks has '{twice}' twice; give it one share")
        if self.problems < len(self.tasks):
            raise ValueError(f"problems = {self.problems} is less than one for each of {len(self.tasks)} tasks")
        return self
