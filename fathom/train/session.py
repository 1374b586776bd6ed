"""What every kind of training begins with: its run's folder, what it goes on from, and a model that is to change."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console

from fathom.config.recipe import PretrainRecipe
from fathom.config.rl import RLRecipe
from fathom.config.sft import SFTRecipe
from fathom.data.tokenizer import Tokenizer
from fathom.errors import UserError
from fathom.model.checkpoint import load
from fathom.model.fp8 import train_in_fp8
from fathom.model.transformer import Transformer
from fathom.precision.fp8 import FP8
from fathom.train.display import Display
from fathom.train.machine import device
from fathom.train.optimizers import Optimizer, build_optimizer
from fathom.train.precision import set_precision
from fathom.train.run import RunFolder, find_checkpoint, model_folder, run_folder
from fathom.train.signals import sigterm_interrupts
from fathom.train.state import Contents, Progress, State, read_checkpoint


@dataclass(frozen=True)
class Session:
    """A run whose folder is held."""

    run: RunFolder
    checkpoint: Path | None
    """Where it goes on from."""
    console: Console
    told: Display
    """For what is said before the steps have a display of their own."""


@contextmanager
def training_session(
    recipe: PretrainRecipe | SFTRecipe | RLRecipe,
    runs: Path,
    console: Console | None,
    *,
    resume: bool,
    overwrite: bool,
    accept_changes: bool,
) -> Iterator[Session]:
    """Hold the folder `runs/<recipe.name>`, and find what the run goes on from; nothing is written yet. SIGTERM is
    Ctrl-C meanwhile. Raises `UserError`."""
    console = console or Console(stderr=True)
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    told = Display(console, total=1, done=0)
    with sigterm_interrupts(), run_folder(runs / recipe.name) as run:
        how = {"resume": resume, "overwrite": overwrite, "accept_changes": accept_changes}
        yield Session(run, find_checkpoint(run, recipe, say=told.say, **how), console, told)


@dataclass
class Trainee:
    """A model that goes on learning, and everything that a step reads and changes."""

    recipe: SFTRecipe | RLRecipe
    model: Transformer
    tokenizer: Tokenizer
    optimizer: Optimizer
    progress: Progress
    reference: Transformer | None = None
    """The policy that a KL term keeps near to."""
    fp8: FP8 | None = None
    """What the layers share if they multiply in FP8."""

    def contents(self) -> Contents:
        """What a checkpoint of this moment holds."""
        return Contents(
            config=self.model.config,
            weights=self.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
            ema=None,
            progress=self.progress,
            recipe=self.recipe,
            tokenizer=self.tokenizer,
            reference=None if self.reference is None else self.reference.state_dict(),
        )


Kind = TypeVar("Kind", bound=Trainee)


def open_trainee(kind: type[Kind], recipe: SFTRecipe | RLRecipe, checkpoint: Path | None, *, unable: str) -> Kind:
    """The recipe's model at a run's beginning, or as `checkpoint` left it. Raises `UserError`, with what it is `unable`
    to where it has no tokenizer."""
    if checkpoint is None:
        model, tokenizer = load(model_folder(recipe.model), dtype="float32")
        progress, optimizer_state, reference_state = Progress(), None, None
    else:
        resumed = read_checkpoint(checkpoint)
        model, progress = resumed.model, resumed.progress
        optimizer_state, reference_state = resumed.optimizer, resumed.reference
        tokenizer = Tokenizer.from_folder(checkpoint)
    if tokenizer is None:
        raise UserError(f"{recipe.model}: has no tokenizer, without which {unable}")
    model = model.to(device())
    fp8 = set_precision(model, recipe.train.precision)
    # A multi-token-prediction module takes no part in the loss: it drafts for the engine, and stays as it is.
    for module in model.mtp:
        module.requires_grad_(False)
    optimizer = build_optimizer(model, recipe.optimizer)
    if optimizer_state is not None:
        optimizer.load_state_dict(optimizer_state)
    reference = None
    if reference_state is not None:
        reference = frozen_copy(model, fp8)
        reference.load_state_dict(reference_state)
    return kind(recipe, model, tokenizer, optimizer, progress, reference, fp8)


def frozen_copy(model: Transformer, fp8: FP8 | None = None) -> Transformer:
    """The same numbers in tensors of their own, not to be trained; they are multiplied as those of `model` are, which
    share `fp8`."""
    with torch.device("meta"):
        copy = Transformer(model.config)
    state: State = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    copy.load_state_dict(state, assign=True)
    copy.compute_dtype = model.compute_dtype
    if fp8 is not None:
        train_in_fp8(copy, fp8)
    return copy.requires_grad_(False)
