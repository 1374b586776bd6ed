"""What a recipe will take before it runs: size, arithmetic, memory, time."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from fathom.config import PretrainRecipe, explain_recipe
from fathom.config.model import ModelConfig
from fathom.config.recipe import OptimizerSection
from fathom.model import accounting
from fathom.model.accounting import count_parameters, flops_per_token
from fathom.model.transformer import Transformer
from fathom.report.tables import plural, quantity
from fathom.train.corpus import describe_data
from fathom.train.machine import GemmSpeed, measure_gemm, resolved_precision, use_bf16, use_compiler
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
largest process of recipes/stdlib.toml was measured at 1.27 to 1.43 times the sum of the parts."""


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
    """Of one micro-batch; rough where layers are compiled."""
    program: int = PROGRAM_BYTES
    """Python, PyTorch and the other libraries; as measured here, whatever the model."""


def run_tokens(recipe: PretrainRecipe) -> int:
    """Tokens of the whole run, batch ramp included."""
    micro_tokens = recipe.train.micro_batch * recipe.data.sequence_length
    full, steps = full_micro_batches(recipe), recipe.train.steps
    return micro_tokens * sum(micro_batches_at(step, steps, full, recipe.schedule) for step in range(steps))


def estimate_memory(recipe: PretrainRecipe) -> Memory:
    """Memory of training on one device. Nothing is allocated: the model is built on the meta device."""
    with torch.device("meta"):
        model = Transformer(recipe.model)
    weights = trained_bytes(model)
    optimizer = optimizer_bytes(model, recipe.optimizer)
    average = weights if recipe.train.ema_decay is not None else 0
    tokens = recipe.train.micro_batch * recipe.data.sequence_length
    layers = recipe.model.num_hidden_layers + recipe.model.num_nextn_predict_layers
    return Memory(
        weights=weights,
        gradients=weights,
        optimizer=optimizer,
        checkpoint_copy=weights + optimizer + average,
        average=average,
        activations=_kept_by_layers(recipe)
        or activation_bytes(tokens * layers * recipe.model.hidden_size, recipe.train.precision),
    )


def _kept_by_layers(recipe: PretrainRecipe) -> int:
    """Bytes that the layers keep of one micro-batch where they decide it themselves; 0 where the compiler does."""
    config, train = recipe.model, recipe.train
    if use_compiler(train):
        return 0
    batch = {"tokens": train.micro_batch * recipe.data.sequence_length, "sequences": train.micro_batch}
    how = {"precision": resolved_precision(train.precision), "recompute": train.recompute}
    layers = range(config.num_hidden_layers + config.num_nextn_predict_layers)
    return sum(accounting.activation_bytes(config, index, **batch, **how) for index in layers)


def trained_bytes(model: Transformer) -> int:
    """Bytes in float32 of the parameters that are trained, and so of their gradients."""
    return 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)


def optimizer_bytes(model: Transformer, section: OptimizerSection) -> int:
    """Bytes of the moments that the optimizer keeps: one for what Muon moves, two for the rest."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    muon = section.name == "muon"
    numbers = sum(p.numel() * (1 if muon and is_orthogonalised(name, p) else 2) for name, p in trained)
    return numbers * (2 if section.state_dtype == "bfloat16" else 4)


def activation_bytes(units: int, precision: str) -> int:
    """Bytes kept for backward by so many tokens × layers × width; rough."""
    return (1 if use_bf16(precision) else 2) * ACTIVATION_BYTES * units


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
    tokens = run_tokens(recipe)
    per_token = flops_per_token(recipe.model, recipe.data.sequence_length)
    memory = estimate_memory(recipe)
    dtype = torch.bfloat16 if use_bf16(recipe.train.precision) else torch.float32
    speed = measure_gemm(dtype)
    return [
        ("parameters", parameters_in_words(recipe.model)),
        ("tokens", f"{tokens:,} in {plural(recipe.train.steps, 'step')}"),
        (
            "arithmetic",
            f"{quantity(per_token, 'FLOP')} per token of a sequence of {recipe.data.sequence_length:,}, "
            f"{quantity(tokens * per_token, 'FLOP')} in all",
        ),
        *memory_rows(
            {
                "weights": memory.weights,
                "gradients": memory.gradients,
                "optimizer": memory.optimizer,
                "average": memory.average,
                "checkpoint copy": memory.checkpoint_copy,
                "activations (rough)" if use_compiler(recipe.train) else "activations of layers": memory.activations,
                "PyTorch itself": memory.program,
            }
        ),
        ("this machine", f"{rate_in_words(speed)} in {str(dtype).removeprefix('torch.')} products (measured)"),
        ("time", f"{time_in_words(tokens * per_token, speed)} if {UTILISATION:.0%} of that is reached"),
    ]


def parameters_in_words(config: ModelConfig) -> str:
    """How many there are, and how many of them a token meets."""
    parameters = count_parameters(config)
    mtp = f", and {parameters.mtp:,} in MTP modules" if parameters.mtp else ""
    return f"{parameters.total:,}, of which {parameters.active:,} active per token{mtp}"


def memory_rows(parts: Mapping[str, int]) -> list[tuple[str, str]]:
    """The sum of `parts`, in bytes, and what a process takes at its peak."""
    total = sum(parts.values())
    listed = ", ".join(f"{name} {gigabytes(size)}" for name, size in parts.items() if size)
    peak = gigabytes(int(total * (1 + KEPT_BY_ALLOCATOR)))
    return [
        ("memory", f"{gigabytes(total)}: {listed}"),
        ("at its peak", f"up to {peak} with what the allocator keeps"),
    ]


def rate_in_words(speed: GemmSpeed) -> str:
    if not speed.busy:
        return f"{speed.peak / 1e9:,.0f} GFLOP/s"
    return f"busy now: {speed.sustained / 1e9:,.0f} to, left alone, perhaps {speed.undisturbed / 1e9:,.0f} GFLOP/s"


def time_in_words(flop: float, speed: GemmSpeed, *, beside: float = 0.0) -> str:
    """How long so many operations take at `UTILISATION` of the measured speed, and `beside` seconds; a range when the
    measurement was disturbed."""
    flop /= UTILISATION
    if not speed.busy:
        return f"about {_duration(flop / speed.peak + beside)}"
    return f"{_duration(flop / speed.undisturbed + beside)} to {_duration(flop / speed.sustained + beside)}"


def gigabytes(size: int) -> str:
    """Bytes, in units of 10⁹."""
    return f"{size / 1e9:,.2f} GB"


def _duration(seconds: float) -> str:
    hours = seconds / 3600
    if seconds < 59.95:
        return f"{seconds:.1f} seconds"
    if hours < 1:
        return f"{hours * 60:.1f} minutes"
    return f"{hours:.1f} hours" if hours < 48 else f"{hours / 24:,.0f} days"
