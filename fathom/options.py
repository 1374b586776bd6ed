"""What several verbs of the command line share: reading numbers, naming a model, opening it."""

import argparse
import math
import sys
from collections.abc import Callable

import fathom
from fathom.errors import UserError

DTYPES = ("float32", "bfloat16")
"""What a model can be opened in."""


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 1")
    return int(text)


def port(text: str) -> int:
    """A port, 0 for any."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"'{text}' is not a port (0 to 65535)")
    return int(text)


def between(least: float, most: float, *, open: bool = False) -> Callable[[str], float]:
    """Reads a number from `least` (`open`: above it) to `most`."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most or (open and value == least):
            raise argparse.ArgumentTypeError(
                f"'{text}' is not a number {'above' if open else 'from'} {least} to {most}"
            )
        return value

    return read


def gigabytes(text: str) -> float:
    """A number of gigabytes above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of gigabytes above 0")
    return value


def add_model(
    parser: argparse.ArgumentParser, *, default_dtype: str = "the machine's best", dtypes: tuple[str, ...] = DTYPES
) -> None:
    """The model, and the dtype to open it in."""
    parser.add_argument("model", help="a model folder, a run or pipeline, a .gguf file, or a hub name")
    parser.add_argument("--dtype", choices=dtypes, help=f"dtype of the weights ({default_dtype})")


def say_opening(options: argparse.Namespace, *, tell: bool) -> None:
    """To be called before the first heavy import, for that is part of what a person waits for."""
    if tell:
        print(f"fathom: opening {options.model} …", file=sys.stderr, flush=True)


def open_model(options: argparse.Namespace):
    """The model and tokenizer named on the command line, in this machine's fastest dtype unless one is given."""
    from fathom.train.machine import has_bf16

    dtype = options.dtype or ("bfloat16" if has_bf16() else "float32")
    return fathom.load(options.model, dtype=dtype)


def open_for_text(options: argparse.Namespace, *, tell: bool):
    """As `_open`, for what cannot do without a tokenizer; `tell` says on standard error what was opened."""
    model, tokenizer = open_model(options)
    if tokenizer is None:
        raise UserError(f"{options.model}: the folder has no tokenizer.json, so text cannot be read or written")
    if tell:
        from fathom.serve.prompt import Prompter

        thinks = "thinks visibly" if Prompter(tokenizer).thinks else "no visible thoughts"
        context = getattr(options, "max_context", None) or model.config.max_position_embeddings
        print(f"fathom: {options.model}: context of {context:,} tokens, {thinks}", file=sys.stderr)
    return model, tokenizer
