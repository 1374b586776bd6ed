"""What a reinforcement-learning recipe will take before it runs, as if every completion took all of its tokens.

Prompts are those of the run's first step; their length is all that is asked of the task. Of the model nothing but its
config is read, except from a `.gguf` file.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from fathom.config import explain_recipe
from fathom.config.hf import read_config
from fathom.config.model import ModelConfig
from fathom.config.rl import RLRecipe
from fathom.data.tokenizer import Tokenizer
from fathom.engine.engine import EngineSettings
from fathom.errors import UserError
from fathom.kernels.ops import PAGE
from fathom.model.accounting import decode_flops_per_token, flops_per_token
from fathom.model.checkpoint import load
from fathom.model.paged import PagedCache
from fathom.model.transformer import Transformer
from fathom.report.tables import plural, print_rows, quantity
from fathom.train.estimate import (
    PROGRAM_BYTES,
    UTILISATION,
    activation_bytes,
    gigabytes,
    memory_rows,
    optimizer_bytes,
    parameters_in_words,
    rate_in_words,
    time_in_words,
    trained_bytes,
)
from fathom.train.machine import measure_gemm, use_bf16
from fathom.train.rl import engine_settings, require_one_vocabulary, task_of
from fathom.train.rollout import Asker, draw_problems, held_out_problems, seed_of
from fathom.train.run import model_folder

DRAWING_SECONDS = 1e-4
"""Per token that is drawn, for all that is not arithmetic: 0.10 to 0.12 ms measured with 256 completions at once."""


@dataclass(frozen=True)
class StepWork:
    """What one step takes at most."""

    drawn: int
    """Tokens from the engine."""
    rows: int
    """Tokens that the update computes, each prompt once."""
    piece: int
    """Most tokens of one forward pass."""
    draw_flops: float
    update_flops: float
    teacher_flops: float = 0.0
    """Of these, the teacher's."""


@dataclass(frozen=True)
class Storage:
    """Bytes in memory, and of a checkpoint."""

    weights: int
    gradients: int
    optimizer: int
    reference: int
    teacher: int
    engine: int
    """The weights once more as the engine multiplies by them."""
    cache: int
    """The engine's pages for keys and values, and for routes."""
    activations: int
    """Of one piece; rough."""

    @property
    def checkpoint(self) -> int:
        """One checkpoint on disk, and the copy in memory that it is written from."""
        return self.weights + self.optimizer + self.reference


@dataclass(frozen=True)
class Measuring:
    """All evaluations of a run; the first may have the probe, and the last has thoughts cut short too."""

    times: int
    drawn: int
    """Tokens at most."""
    draw_flops: float


def dry_run(recipe: RLRecipe, console: Console | None = None) -> None:
    """Print the resolved recipe, a sentence to every field, and what it will take on this machine; fetch and write
    nothing. Where the model is not there yet, say so in the place of what depends on it.

    Raises `UserError` for what training would refuse.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    task_of(recipe)
    console.print(explain_recipe(recipe), markup=False, highlight=False, soft_wrap=True)
    try:
        folders = [(name, model_here(name)) for name in (recipe.model, recipe.teacher) if name is not None]
    except UserError as error:
        rows = [("model", f"{error}; what the run takes can be said once it is there")]
    else:
        model, *teacher = (read_described(folder, name) for name, folder in folders)
        rows = estimate_rows(recipe, *model, *teacher)
    print_rows(f"run '{recipe.name}', at most", rows, console)


def step_work(
    config: ModelConfig, recipe: RLRecipe, prompts: Sequence[int], teacher: ModelConfig | None = None
) -> StepWork:
    """A step over prompts of these lengths, drawn as often as dynamic sampling may."""
    rollout, train = recipe.rollout, recipe.train
    written = rollout.samples * (rollout.max_tokens - 1)
    rows = [prompt + written for prompt in prompts]
    batches = [part for first in range(train.mini_batches) if (part := rows[first :: train.mini_batches])]
    update, judged = (0.0 if own is None else _passes_flops(own, recipe, prompts) for own in (config, teacher))
    # Passes forward alone, a third of one with its backward: the policy before several updates, and the reference.
    more = (train.mini_batches > 1) + (recipe.loss.kl > 0)
    rounds = 1 + rollout.resample
    return StepWork(
        drawn=rounds * len(prompts) * rollout.samples * rollout.max_tokens,
        rows=sum(rows),
        piece=max(min(sum(batch), max(train.rows, *batch)) for batch in batches),
        draw_flops=rounds * sum(draw_flops(config, prompt, rollout.samples, rollout.max_tokens) for prompt in prompts),
        update_flops=update * (1 + more / 3) + judged / 3,
        teacher_flops=judged / 3,
    )


def _passes_flops(config: ModelConfig, recipe: RLRecipe, prompts: Sequence[int]) -> float:
    """FLOPs forward and backward of all groups of a step, each prompt once."""
    rollout, total = recipe.rollout, 0.0
    for prompt in prompts:
        # A token of a completion sees the prompt and half of the completion: as in a sequence of twice that.
        seen = 2 * prompt + rollout.max_tokens
        total += prompt * flops_per_token(config, prompt, mtp=False)
        total += rollout.samples * (rollout.max_tokens - 1) * flops_per_token(config, seen, mtp=False)
    return total


def draw_flops(config: ModelConfig, prompt: int, samples: int, tokens: int) -> float:
    """FLOPs to read a prompt of this length once, and to write so many completions of so many tokens."""
    read = prompt * flops_per_token(config, prompt, mtp=False) / 3
    return read + samples * tokens * decode_flops_per_token(config, prompt + tokens // 2)


def storage(config: ModelConfig, recipe: RLRecipe, piece: int, teacher: ModelConfig | None = None) -> Storage:
    """Memory of training with pieces of so many tokens. Nothing is allocated: models are built on the meta device."""
    with torch.device("meta"):
        model = Transformer(config)
        judge = None if teacher is None else Transformer(teacher)
    weights = 4 * sum(p.numel() for p in model.parameters())
    for module in model.mtp:  # as in training
        module.requires_grad_(False)
    engine = cache = 0
    if recipe.rollout.endpoint is None:
        dtype = torch.bfloat16 if use_bf16(recipe.train.precision) else torch.float32
        engine = weights // 4 * dtype.itemsize
        cache = cache_bytes(config, engine_settings(recipe, config), dtype)
    return Storage(
        weights=weights,
        gradients=trained_bytes(model),
        optimizer=optimizer_bytes(model, recipe.optimizer),
        reference=weights if recipe.loss.kl > 0 else 0,
        teacher=0 if judge is None else 4 * sum(p.numel() for p in judge.parameters()),
        engine=engine,
        cache=cache,
        activations=activation_bytes(piece * config.num_hidden_layers * config.hidden_size, recipe.train.precision),
    )


def cache_bytes(config: ModelConfig, settings: EngineSettings, dtype: torch.dtype) -> int:
    """What an engine with these settings reserves for keys, values and routes; touched only as far as it is needed."""
    drafts = int(settings.speculate and config.num_nextn_predict_layers > 0)
    with torch.device("meta"):
        kept = {"routes": settings.record_routes, "fp8": settings.kv_cache == "fp8"}
        page = PagedCache(config, pages=1, dtype=dtype, mtp_layers=drafts, **kept).nbytes()
    most = settings.max_running * -(-config.max_position_embeddings // PAGE)
    return page * min(settings.cache_memory // page, most)


def measuring(config: ModelConfig, recipe: RLRecipe, held_out: Sequence[int]) -> Measuring:
    """All evaluations of a run over held-out prompts of these lengths."""
    steps, most = recipe.train.steps, recipe.rollout.max_tokens
    times = 1 + sum(step % recipe.eval.every == 0 or step == steps for step in range(1, steps + 1))
    probes = 2 if recipe.eval.probe and not recipe.prompt.opens_thought else 0
    askings = times + probes + len(recipe.eval.budgets)
    return Measuring(
        times=times,
        drawn=askings * len(held_out) * most,
        draw_flops=askings * sum(draw_flops(config, prompt, 1, most) for prompt in held_out),
    )


def estimate_rows(
    recipe: RLRecipe, config: ModelConfig, tokenizer: Tokenizer, teacher: tuple[ModelConfig, Tokenizer] | None = None
) -> list[tuple[str, str]]:
    """Lines of the table: a label and a value each. Measures the machine's peak, about a second.

    Raises `UserError` where the model cannot be asked, or has no room for a prompt and a completion, and where the
    teacher has another vocabulary.
    """
    if teacher is not None:
        require_one_vocabulary(str(recipe.teacher), teacher, (config, tokenizer))
    judge = teacher and teacher[0]
    prompts, held_out = _prompt_lengths(recipe, config, tokenizer)
    work, evaluations = step_work(config, recipe, prompts, judge), measuring(config, recipe, held_out)
    return [
        ("parameters", parameters_in_words(config)),
        *([] if judge is None else [("teacher", _teacher_in_words(recipe, judge, work))]),
        (
            "a step draws",
            f"{work.drawn:,} tokens, {plural(recipe.rollout.samples, 'completion')} of {recipe.rollout.max_tokens:,} "
            f"for each of {plural(len(prompts), 'problem')}"
            + (f", up to {1 + recipe.rollout.resample} times" if recipe.rollout.resample else ""),
        ),
        (
            "and learns from",
            f"{work.rows:,} tokens, each prompt of {min(prompts)} to {max(prompts)} computed once, {work.piece:,} in "
            "one pass",
        ),
        (
            "evaluations",
            f"{evaluations.times} of {plural(len(held_out), 'problem')}, {evaluations.drawn:,} tokens with the probe "
            "and with thoughts cut short",
        ),
        *_storage_rows(recipe, storage(config, recipe, work.piece, judge)),
        *_time_rows(recipe, work, evaluations),
    ]


def _teacher_in_words(recipe: RLRecipe, judge: ModelConfig, work: StepWork) -> str:
    judging = f"{quantity(work.teacher_flops, 'FLOP')} a step to judge every token"
    return f"{recipe.teacher}: {parameters_in_words(judge)}; {judging}"


def _storage_rows(recipe: RLRecipe, kept: Storage) -> list[tuple[str, str]]:
    parts = {
        "weights": kept.weights,
        "gradients": kept.gradients,
        "optimizer": kept.optimizer,
        "reference": kept.reference,
        "teacher": kept.teacher,
        "checkpoint copy": kept.checkpoint,
        "the engine's weights": kept.engine,
        "its cache": kept.cache,
        "activations (rough)": kept.activations,
        "PyTorch itself": PROGRAM_BYTES,
    }
    disk = f"{gigabytes(kept.checkpoint)} a checkpoint ({recipe.checkpoint.keep} kept), best model "
    return [*memory_rows(parts), ("on disk", disk + gigabytes(kept.weights))]


def _time_rows(recipe: RLRecipe, work: StepWork, evaluations: Measuring) -> list[tuple[str, str]]:
    dtype = torch.bfloat16 if use_bf16(recipe.train.precision) else torch.float32
    speed, steps = measure_gemm(dtype), recipe.train.steps
    step, whole = work.update_flops, steps * work.update_flops
    beside = beside_whole = 0.0
    where = " (without what the endpoint computes)"
    if recipe.rollout.endpoint is None:
        step, whole = step + work.draw_flops, whole + steps * work.draw_flops + evaluations.draw_flops
        beside = DRAWING_SECONDS * work.drawn
        beside_whole = steps * beside + DRAWING_SECONDS * evaluations.drawn
        where = ""
    return [
        (
            "arithmetic",
            f"{quantity(work.draw_flops, 'FLOP')} to draw and {quantity(work.update_flops, 'FLOP')} forward and "
            f"backward in a step, {quantity(whole, 'FLOP')} in all{where}",
        ),
        ("this machine", f"{rate_in_words(speed)} in {str(dtype).removeprefix('torch.')} products (measured)"),
        (
            "time",
            f"{time_in_words(step, speed, beside=beside)} a step, "
            f"{time_in_words(whole, speed, beside=beside_whole)} in all{where}, if {UTILISATION:.0%} of that is "
            "reached; an estimate, and less where completions end before their limit",
        ),
    ]


def _prompt_lengths(recipe: RLRecipe, config: ModelConfig, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Tokens of the first step's prompts, and of the held-out ones; without those that leave a completion no room."""
    task, ask = task_of(recipe), Asker(tokenizer, recipe.prompt)
    level = recipe.task.start or recipe.task.levels
    first = draw_problems(task, "train", level, recipe.rollout.problems, seed=seed_of(recipe.seed, 0, 0))
    held_out = held_out_problems(task, recipe.task.levels, recipe.eval.problems, seed=recipe.seed)
    context, most = config.max_position_embeddings, recipe.rollout.max_tokens
    found = [
        [length for problem in part if (length := len(ask(problem))) + most <= context] for part in (first, held_out)
    ]
    if not all(found):
        raise UserError(
            f"rollout.max_tokens = {most} leaves no room for a prompt in the {context} tokens of this model; lower it"
        )
    return found[0], found[1]


def model_here(name: str) -> Path:
    """Where the model lies. Raises `UserError` where it does not; what is at the hub is not fetched."""
    path = Path(name).expanduser()
    if name.startswith("package:") or path.exists() or path.parent.is_dir():
        return model_folder(name)
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, local_files_only=True))
    except Exception:  # the client is an extra, and raises errors of several libraries
        raise UserError(f"{name}: no such folder here, nor fetched from a hub before") from None


def read_described(folder: Path, name: str) -> tuple[ModelConfig, Tokenizer]:
    """Config and tokenizer of the model called `name`. Raises `UserError`."""
    if folder.suffix == ".gguf":
        model, tokenizer = load(folder)
        config = model.config
    else:
        config, tokenizer = read_config(folder), Tokenizer.from_folder(folder)
    if tokenizer is None:
        raise UserError(f"{name}: has no tokenizer, without which no problem can be put to it")
    return config, tokenizer
