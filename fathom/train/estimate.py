"""What a recipe will take before it runs: size, arithmetic, memory, time."""

from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from fathom.config import PretrainRecipe, explain_recipe
from fathom.model.accounting import count_parameters, flops_per_token
from fathom.model.transformer import Transformer
from fathom.report.tables import plural, quantity
from fathom.train.corpus import describe_data
from fathom.train.machine import GemmSpeed, measure_gemm, use_bf16
from fathom.train.optimizers import is_orthogonalised
from fathom.train.schedule import check_schedule, full_micro_batches, micro_batches_at

UTILISATION = 0.25
"""Share of the measured matrix-product peak that the estimated time assumes."""
ACTIVATION_BYTES = 100
"""Bytes kept for backward per token, layer and unit of width in bfloat16: 92 to 150 measured on the house models
without compilation, which keeps less."""
PROGRAM_BYTES = 400 * 10**6
"""Memory of the process before there is a model, measured on a CPU."""
KEPT_BY_ALLOCATOR = 0.4
"""Share on top of all that: what the allocator does not give back between steps, evaluations and checkpoints. The
quickstart's largest process was measured at 1.27 to 1.43 times the sum of the parts."""


@dataclass(frozen=True)
class Memory:
    """Bytes that training takes."""

    weights: int
    gradients: int
    optimizer: int
    checkpoint_copy: int
    """Weights, optimizer and average once more, for checkpoints that are written beside training."""
    average: int
    activations: int
    """Of one micro-batch; rough."""
    program: int = PROGRAM_BYTES
    """Python, PyTorch and the other libraries; as measured here, whatever the model."""

    @property
    def total(self) -> int:
        return (
            self.weights
            + self.gradients
            + self.optimizer
            + self.checkpoint_copy
            + self.average
            + self.activations
            + self.program
        )


def run_tokens(recipe: PretrainRecipe) -> int:
    """Tokens of the whole run, batch ramp included."""
    micro_tokens = recipe.train.micro_batch * recipe.data.sequence_length
    full, steps = full_micro_batches(recipe), recipe.train.steps
    return micro_tokens * sum(micro_batches_at(step, steps, full, recipe.schedule) for step in range(steps))


def estimate_memory(recipe: PretrainRecipe) -> Memory:
    """Memory of training on one device. Nothing is allocated: the model is built on the meta device."""
    with torch.device("meta"):
        model = Transformer(recipe.model)
    matrices = others = 0
    for name, p in model.named_parameters():
        if recipe.optimizer.name == "muon" and is_orthogonalised(name, p):
            matrices += p.numel()
        else:
            others += p.numel()
    weights = 4 * (matrices + others)
    moment = 2 if recipe.optimizer.state_dtype == "bfloat16" else 4
    optimizer = moment * (matrices + 2 * others)
    average = weights if recipe.train.ema_decay is not None else 0
    tokens = recipe.train.micro_batch * recipe.data.sequence_length
    layers = recipe.model.num_hidden_layers + recipe.model.num_nextn_predict_layers
    wide = 1 if use_bf16(recipe.train.precision) else 2
    return Memory(
        weights=weights,
        gradients=weights,
        optimizer=optimizer,
        checkpoint_copy=weights + optimizer + average,
        average=average,
        activations=wide * ACTIVATION_BYTES * tokens * layers * recipe.model.hidden_size,
    )


def dry_run(recipe: PretrainRecipe, console: Console | None = None) -> None:
    """Print the resolved recipe, a sentence to every field, and what it will take on this machine; write nothing.

    Raises `UserError` for data that training would refuse.
    """
    console = console or Console()
    warning = check_schedule(recipe)
    data = describe_data(recipe, console)
    console.print(explain_recipe(recipe), markup=False, highlight=False, soft_wrap=True)
    table = Table(title=f"run '{recipe.name}'", show_header=False, title_justify="left")
    for label, value in [("data", data), *estimate_rows(recipe)]:
        table.add_row(label, value)
    console.print(table)
    if warning:
        console.print(warning, markup=False, highlight=False, soft_wrap=True)


def estimate_rows(recipe: PretrainRecipe) -> list[tuple[str, str]]:
    """Lines of the table: a label and a value each. Measures the machine's peak, about a second."""
    parameters = count_parameters(recipe.model)
    tokens = run_tokens(recipe)
    per_token = flops_per_token(recipe.model, recipe.data.sequence_length)
    memory = estimate_memory(recipe)
    dtype = torch.bfloat16 if use_bf16(recipe.train.precision) else torch.float32
    speed = measure_gemm(dtype)
    mtp = f", and {parameters.mtp:,} in MTP modules" if parameters.mtp else ""
    return [
        ("parameters", f"{parameters.total:,}, of which {parameters.active:,} active per token{mtp}"),
        ("tokens", f"{tokens:,} in {plural(recipe.train.steps, 'step')}"),
        (
            "arithmetic",
            f"{quantity(per_token, 'FLOP')} per token of a sequence of {recipe.data.sequence_length:,}, "
            f"{quantity(tokens * per_token, 'FLOP')} in all",
        ),
        ("memory", f"{_gigabytes(memory.total)}: {_parts(memory)}"),
        (
            "at its peak",
            f"up to {_gigabytes(int(memory.total * (1 + KEPT_BY_ALLOCATOR)))} with what the allocator keeps",
        ),
        ("this machine", f"{_rate(speed)} in {str(dtype).removeprefix('torch.')} products (measured)"),
        ("time", _time(tokens * per_token / UTILISATION, speed)),
    ]


def _rate(speed: GemmSpeed) -> str:
    if not speed.busy:
        return f"{speed.peak / 1e9:,.0f} GFLOP/s"
    return f"busy now: {speed.sustained / 1e9:,.0f} to, left alone, perhaps {speed.undisturbed / 1e9:,.0f} GFLOP/s"


def _time(flop: float, speed: GemmSpeed) -> str:
    """How long so many operations take at the measured speed; a range when the measurement was disturbed."""
    condition = f"if {UTILISATION:.0%} of that is reached"
    if not speed.busy:
        return f"about {_duration(flop / speed.peak)} {condition}"
    return f"{_duration(flop / speed.undisturbed)} to {_duration(flop / speed.sustained)} {condition}"


def _parts(memory: Memory) -> str:
    parts = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "average": memory.average,
        "checkpoint copy": memory.checkpoint_copy,
        "activations (rough)": memory.activations,
        "PyTorch itself": memory.program,
    }
    return ", ".join(f"{name} {_gigabytes(size)}" for name, size in parts.items() if size)


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.2f} GB"


def _duration(seconds: float) -> str:
    hours = seconds / 3600
    if hours < 1:
        return f"{hours * 60:.1f} minutes"
    return f"{hours:.1f} hours" if hours < 48 else f"{hours / 24:,.0f} days"
