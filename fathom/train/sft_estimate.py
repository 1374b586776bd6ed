"""What a recipe of supervised fine-tuning will take before it runs.

Its conversations are read; of the model nothing but config and tokenizer is, except from a `.gguf` file.
"""

import math

import torch
from rich.console import Console

from fathom.config import explain_recipe
from fathom.config.model import ModelConfig
from fathom.config.sft import SFTRecipe
from fathom.model.accounting import flops_per_token
from fathom.model.transformer import Transformer
from fathom.report.tables import plural, print_rows, quantity
from fathom.train.estimate import (
    PROGRAM_BYTES,
    UTILISATION,
    activation_bytes,
    memory_rows,
    optimizer_bytes,
    parameters_in_words,
    rate_in_words,
    time_in_words,
    trained_bytes,
)
from fathom.train.machine import measure_gemm, use_bf16
from fathom.train.rl_estimate import model_here, read_described
from fathom.train.sft import Answers, packed, read_answers


def dry_run(recipe: SFTRecipe, console: Console | None = None) -> None:
    """Print the resolved recipe, a sentence to every field, and what it will take on this machine; write nothing.

    Raises `UserError` for what training would refuse.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    console.print(explain_recipe(recipe), markup=False, highlight=False, soft_wrap=True)
    config, tokenizer = read_described(model_here(recipe.model), recipe.model)
    answers = read_answers(recipe, tokenizer, context=config.max_position_embeddings)
    print_rows(f"run '{recipe.name}'", estimate_rows(recipe, config, answers), console)


def estimate_rows(recipe: SFTRecipe, config: ModelConfig, answers: Answers) -> list[tuple[str, str]]:
    """Lines of the table: a label and a value each. Measures the machine's peak, about a second."""
    read = answers.in_epochs(recipe.train.epochs)
    flops = sum(turn.rows * flops_per_token(config, turn.rows, mtp=False) for turn in answers.train)
    flops *= read / len(answers.train)
    largest = max(sum(turn.rows for turn in piece) for piece in packed(answers.train, recipe.train.rows))
    with torch.device("meta"):
        model = Transformer(config)
    model.mtp.requires_grad_(False)
    weights = 4 * sum(p.numel() for p in model.parameters())
    optimizer = optimizer_bytes(model, recipe.optimizer)
    memory = {
        "weights": weights,
        "gradients": trained_bytes(model),
        "optimizer": optimizer,
        "checkpoint copy": weights + optimizer,
        "activations (rough)": activation_bytes(
            largest * config.num_hidden_layers * config.hidden_size, recipe.train.precision
        ),
        "PyTorch itself": PROGRAM_BYTES,
    }
    dtype = torch.bfloat16 if use_bf16(recipe.train.precision) else torch.float32
    speed = measure_gemm(dtype)
    learnt = sum(len(turn.response_ids) for turn in answers.train)
    left_out = f"; {answers.too_long:,} are too long" if answers.too_long else ""
    steps = plural(math.ceil(read / recipe.train.batch), "step")
    return [
        ("parameters", parameters_in_words(config)),
        ("answers", f"{len(answers.train):,} of {learnt:,} tokens, {len(answers.held_out):,} held out{left_out}"),
        ("read", f"{read:,} in {steps} of {recipe.train.batch}"),
        ("arithmetic", f"{quantity(flops, 'FLOP')} in all"),
        *memory_rows(memory),
        ("this machine", f"{rate_in_words(speed)} in {str(dtype).removeprefix('torch.')} products (measured)"),
        ("time", f"{time_in_words(flops, speed)} if {UTILISATION:.0%} of that is reached"),
    ]
