"""The token shards a recipe names: built where there are none, else checked against what the recipe asks for."""

import os
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape

from fathom.config import PretrainRecipe
from fathom.config.recipe import DataSection
from fathom.data import TokenDataset, build, check_vocabulary
from fathom.data.dataset import is_data_folder
from fathom.errors import UserError, nearest
from fathom.train.evaluate import check_sample

SILENT_BYTES = 2 * 10**9
"""Shards larger than this take seconds to check, which is said."""


def open_data(recipe: PretrainRecipe, console: Console) -> TokenDataset:
    """The recipe's token shards, every byte checked, built first where there are none.

    A folder that exists is never built again. Where the recipe asks for other sources or a smaller vocabulary than it
    holds, that is an error: a field that differs from its default asks, and under the default `data.path` all do. So a
    recipe that names only a folder takes it as it is, and a folder that is not there is then no order to build one.
    Raises `UserError`, also for corrupt shards, for a folder without held-out text, and for a tokenizer that makes
    tokens the model has no embedding for.
    """
    dataset = find_data(recipe, console)
    if dataset is None:
        build(recipe.data.sources, recipe.data.path, vocab_size=recipe.data.vocab_size, console=console)
        dataset = _check(TokenDataset(recipe.data.path), recipe)
    manifest = dataset.manifest
    size = (manifest.train.tokens + manifest.heldout.tokens) * np.dtype(manifest.dtype).itemsize
    if size > SILENT_BYTES:
        console.print(f"checking {size / 1e9:.1f} GB of token shards", highlight=False)
    dataset.verify()
    return dataset


def find_data(recipe: PretrainRecipe, console: Console) -> TokenDataset | None:
    """The recipe's token shards where there are some, compared with the recipe; None where they are to be built.

    Raises `UserError` as `open_data` does. Reads no tokens and writes nothing.
    """
    path, default = Path(recipe.data.path), DataSection()
    if path.exists():
        dataset = TokenDataset(path)
        _compare(dataset, recipe.data, console)
        return _check(dataset, recipe)
    if recipe.data.path != default.path and recipe.data.sources == default.sources:
        beside = [str(folder) for folder in _folders(path.parent) if is_data_folder(folder)]
        raise UserError(
            f"data.path {path}: does not exist{nearest(str(path), beside)}; to build it from your text, add "
            f"--data.sources and the text's folder, or run 'fathom data build SOURCES --out {path}' first"
        )
    return None


def describe_data(recipe: PretrainRecipe, console: Console) -> str:
    """What the recipe would be trained on: in the folder already, or still to be built. Raises as `find_data`."""
    dataset = find_data(recipe, console)
    if dataset is None:
        sources = ", ".join(recipe.data.sources)
        return f"{recipe.data.path}, which does not exist and will be built from {sources}"
    manifest = dataset.manifest
    return (
        f"{recipe.data.path}, built from {', '.join(manifest.sources)}: {manifest.train.tokens:,} tokens to train on, "
        f"{manifest.heldout.tokens:,} held out"
    )


def _check(dataset: TokenDataset, recipe: PretrainRecipe) -> TokenDataset:
    """The same, when the recipe's model can be trained and evaluated on it."""
    check_vocabulary(dataset.tokenizer, recipe.model)
    check_sample(dataset.tokenizer, recipe)
    if not dataset.manifest.heldout.documents:
        raise UserError(
            f"{dataset.path}: no document is held out, so nothing can be evaluated; build it with 'fathom data build' "
            "from two documents or more and a --holdout above 0"
        )
    return dataset


def _folders(path: Path) -> list[Path]:
    return sorted(folder for folder in path.iterdir() if folder.is_dir()) if path.is_dir() else []


def _compare(dataset: TokenDataset, data: DataSection, console: Console) -> None:
    """Raise `UserError` when the folder does not hold what `data` asks for."""
    manifest, default = dataset.manifest, DataSection()
    named = data.path != default.path
    way_out = f"set data.{{}} to what it holds, name another data.path, or remove {dataset.path} to build it anew"
    if not (named and data.sources == default.sources) and _places(data.sources) != _places(manifest.sources):
        raise UserError(
            f"{dataset.path}: was built from {', '.join(manifest.sources)}, but data.sources asks for "
            f"{', '.join(data.sources)}; {way_out.format('sources')}"
        )
    if named and data.vocab_size == default.vocab_size:
        return
    if manifest.vocab_size > data.vocab_size:
        raise UserError(
            f"{dataset.path}: has a vocabulary of {manifest.vocab_size}, but data.vocab_size asks for "
            f"{data.vocab_size}; {way_out.format('vocab_size')}"
        )
    if manifest.vocab_size < data.vocab_size:
        # Not an error: a text with no more to merge gives a smaller vocabulary than was asked for.
        console.print(
            f"{escape(str(dataset.path))}: has a vocabulary of {manifest.vocab_size}, data.vocab_size = "
            f"{data.vocab_size} is without effect; remove the folder to build it anew",
            highlight=False,
            soft_wrap=True,
        )


def _places(sources: tuple[str, ...]) -> list[str]:
    """Sources in one spelling and order."""
    return sorted(os.path.abspath(source) for source in sources)
