"""The command line: one verb per line, each a thin call into the library.

A wrong input ends with one line on standard error and exit code 2. A traceback is a bug, or was asked for with
`--debug`.
"""

import argparse
import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import fathom
from fathom.errors import INTERRUPTED, UserError, nearest
from fathom.evaluate.command import add_evaluation, run_evaluation
from fathom.options import DTYPES, add_model, open_for_text, open_model, positive, say_opening
from fathom.recipe_verbs import add_recipe_verbs, recipe_kind
from fathom.serve.command import add_service, serve
from fathom.tasks.command import add_tasks

if TYPE_CHECKING:
    from fathom.config.section import Section


class _Parser(argparse.ArgumentParser):
    def __init__(self, **settings: Any) -> None:
        # An abbreviation would let `--over` delete a run.
        super().__init__(**settings, allow_abbrev=False)

    @property
    def flags(self) -> list[str]:
        """All that this command takes with a dash in front."""
        return [flag for action in self._actions for flag in action.option_strings]

    @property
    def commands(self) -> "dict[str, _Parser]":
        """The commands of this command."""
        return next((dict(a.choices) for a in self._actions if isinstance(a, argparse._SubParsersAction)), {})

    def format_help(self) -> str:
        """As argparse does; of a recipe's fields it says where to find them."""
        if kind := self.get_default("takes_overrides"):
            self.epilog = _sections(kind)
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')}; see '{self.prog} --help'")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without a character shows '?' in its place
    with warnings.catch_warnings(), _kernels_told():
        warnings.showwarning = _show_note
        return _guarded([word for word in words if word != "--debug"], debug=debug)


def _guarded(words: list[str], *, debug: bool) -> int:
    """The exit code of a command, with every way it can fail put in one line."""
    try:
        code = _run(words)
        sys.stdout.flush()
        return code
    except UserError as error:
        if debug:
            raise
        print(f"fathom: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fathom: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has left (`| head`), which is no failure.
        _discard_output()
        return 0
    except SystemExit as exit:
        if isinstance(exit.__context__, BrokenPipeError):  # rich's way of saying the same
            _discard_output()
            return 0
        raise
    except OSError as error:
        if debug:
            raise
        print(f"fathom: {error.filename or 'output'}: {error.strerror or error}", file=sys.stderr)
        _discard_output()
        return 2


def _discard_output() -> None:
    """What standard output still buffers must not raise once more at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _show_note(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """In place of `warnings.showwarning`: the sentence, without the place in our source that said it."""
    print(f"fathom: note: {' '.join(str(message).split())}", file=sys.stderr)


class _Teller(logging.Handler):
    """Says what the library logs as this program says things."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"fathom: {record.getMessage()}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _kernels_told() -> Iterator[None]:
    """Meanwhile a person is told that kernels are being compiled, which takes a while."""
    log, teller = logging.getLogger("fathom.kernels"), _Teller()
    level = log.level
    log.addHandler(teller)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.setLevel(level)
        log.removeHandler(teller)


def _run(words: list[str]) -> int:
    parser, verbs = _build_parser()
    _refuse_unknown_command(words, parser)
    overrides: list[str] = []
    if words and words[0] in verbs and (kind := verbs[words[0]].get_default("takes_overrides")):
        overrides, words = _take_overrides(words, verbs[words[0]].flags, kind)
    options, rest = parser.parse_known_args(words)
    if rest:
        verb = options.parser
        raise UserError(f"unexpected '{rest[0]}'{nearest(rest[0], verb.flags)}; see '{verb.prog} --help'")
    options.overrides = overrides
    return options.run(options) or 0


def _refuse_unknown_command(words: list[str], parser: _Parser) -> None:
    """Follow the commands that `words` begin with; raise `UserError` for one that there is not."""
    for word in words:
        if word.startswith("-") or not (known := parser.commands):
            return
        if word not in known:
            listed = ", ".join(known)
            raise UserError(f"unknown command '{word}'{nearest(word, known)}; commands of {parser.prog}: {listed}")
        parser = known[word]


def _take_overrides(words: list[str], flags: list[str], kind: str) -> tuple[list[str], list[str]]:
    """Split off the `--section.field value` pairs, wherever they stand: (pairs, the command's own words)."""
    pairs, own, rest = [], [], list(words)
    while rest:
        word = rest.pop(0)
        name, equals, _ = word.partition("=")
        if not word.startswith("--") or word == "--" or name in flags:
            own.append(word)
            continue
        if "." not in name:
            _refuse_unknown_flag(name, flags, recipe_kind(kind))
        pairs.append(word)
        if not equals and rest and not rest[0].startswith("--"):
            pairs.append(rest.pop(0))
    return pairs, own


def _refuse_unknown_flag(name: str, flags: list[str], kind: "type[Section]") -> None:
    """A flag without a section is a typo, unless the recipe has a field of that name."""
    from fathom.config.section import field_paths

    if name[2:].replace("-", "_") not in kind.model_fields:
        known = {f"--{field}": f"--{path}" for field, path in field_paths(kind).items()}
        shortened = [flag for flag in flags if flag.startswith(name)]
        raise UserError(f"unknown flag '{name}'{nearest(name, shortened or [*flags, *known], shown=known)}")


def _build_parser() -> tuple[_Parser, dict[str, _Parser]]:
    parser = _Parser(prog="fathom", description="Train, serve and understand DeepSeek-V3-style language models.")
    parser.add_argument("--version", action="version", version=_version())
    parser.set_defaults(run=lambda _: parser.print_help(), takes_overrides="", parser=parser)
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=_Parser)

    def verb(name: str, run, help: str, *, of=verbs, overrides: str = "") -> _Parser:
        added = of.add_parser(name, help=help, description=help + (_OVERRIDES if overrides else "."))
        added.set_defaults(run=run, takes_overrides=overrides, parser=added)
        return added

    run = verb("quickstart", _quickstart, "from nothing to a model that reasons: all stages of R1", overrides="recipe")
    run.add_argument("--fresh", action="store_true", help="start over instead of going on where it stopped")

    add_recipe_verbs(verb)

    data = verb("data", lambda _: data.print_help(), "build and check token shards")
    data_verbs = data.add_subparsers(title="commands", metavar="COMMAND", parser_class=_Parser)
    run = verb("build", _data_build, "turn text into token shards", of=data_verbs)
    run.add_argument("sources", nargs="+", help="folders, files, 'stdlib', or hub:owner/name")
    run.add_argument("--out", type=Path, required=True, help="folder to write")
    run.add_argument("--vocab-size", type=int, default=4096, help="size of the byte-level BPE to train (4096)")
    run.add_argument("--tokenizer", type=Path, help="folder of an existing tokenizer, instead of training one")
    run.add_argument("--holdout", type=float, default=0.02, help="share of documents held out (0.02)")
    run.add_argument("--text-field", default="text", help="field of JSONL, Parquet and hub rows to read (text)")
    run.add_argument("--shard-tokens", type=int, default=100_000_000, help="tokens in a file at most (100000000)")
    run = verb("verify", _data_verify, "check every shard against the manifest", of=data_verbs)
    run.add_argument("path", type=Path, help="a folder that 'fathom data build' wrote")

    tasks = verb("tasks", lambda _: tasks.print_help(), "see and try the problems that can be checked by rule")
    task_verbs = tasks.add_subparsers(title="commands", metavar="COMMAND", parser_class=_Parser)
    add_tasks(partial(verb, of=task_verbs))

    run = verb("load", _load, "open a model and say what it is")
    add_model(run)

    run = verb("generate", _generate, "continue a prompt: prints what the model adds, without the prompt")
    add_model(run)
    run.add_argument("prompt", help="text to continue; '-' reads standard input")
    run.add_argument("--max-tokens", type=positive, default=128, help="longest continuation (128)")
    run.add_argument("--temperature", type=float, default=0.8, help="0 takes the most likely token (0.8)")
    run.add_argument("--top-p", type=float, default=0.95, help="nucleus to draw from (0.95)")
    run.add_argument("--top-k", type=int, default=0, help="draw from this many most likely tokens (all)")
    run.add_argument("--seed", type=int, help="same seed, same text")
    run.add_argument("--chat", action="store_true", help="wrap the prompt in the model's chat template")

    run = verb("chat", _chat, "talk to a model in the terminal")
    add_model(run)
    run.add_argument("--system", default="", help="what to tell the model before everything else")
    run.add_argument("--temperature", type=float, default=0.6, help="0 takes the most likely token (0.6)")
    run.add_argument("--top-p", type=float, default=1.0, help="nucleus to draw from (1.0)")
    run.add_argument("--seed", type=int, help="same seed and questions, same answers")
    run.add_argument(
        "--effort", help="how long to think: none, minimal, low, medium, high, xhigh, max (the model's way)"
    )
    run.add_argument("--max-tokens", type=positive, help="longest answer, thoughts included (what the context leaves)")

    run = verb("serve", serve, "answer over HTTP: OpenAI's API and a chat page")
    add_model(run)
    add_service(run)

    run = verb("eval", run_evaluation, "measure a model on held-out problems: how good, how sure, at what cost")
    add_evaluation(run)

    run = verb("report", _report, "write what a run or a pipeline has measured as a page to read")
    run.add_argument("run_folder", metavar="RUN", type=Path, help="a run's or a pipeline's folder, finished or not")
    run.add_argument(
        "--out", type=Path, help="file to write (RUN/report.html); one that ends in .svg or .png gets one figure alone"
    )
    run.add_argument("--figure", metavar="NAME", help="which one that is (the main one); a wrong name lists all")

    run = verb("export", _export, "write a model as a folder for other programs")
    add_model(run, default_dtype="the dtype they are stored in", dtypes=(*DTYPES, "fp8"))
    run.add_argument("out", type=Path, help="folder to write")
    run.add_argument("--without-mtp", action="store_true", help="leave the multi-token-prediction modules out")
    for added in verbs.choices.values():
        if added.get_default("takes_overrides"):
            added.usage = f"{added.format_usage().removeprefix('usage: ').strip()} [--section.field value ...]"
    return parser, verbs.choices


_OVERRIDES = ". Every field of the recipe can be changed: --section.field value; 'none' unsets an optional one."


def _sections(kind: str) -> str:
    """Where the fields of a recipe are listed, for the end of a command's help."""
    from fathom.config import PRESETS
    from fathom.config.policy import PRESETS as LOSSES
    from fathom.config.section import section_at

    recipe = recipe_kind(kind)
    if kind == "recipe":
        return "A stage's fields stand behind its name, as in --zero.train.steps 60; see docs/guides/stages.md."
    sections = [name for name in recipe.model_fields if section_at(recipe, [name])]
    told = {"pretrain": ("model", PRESETS), "rl": ("loss", LOSSES)}.get(kind)
    presets = f" Presets for --{told[0]}.preset: {', '.join(told[1])}." if told else ""
    return (
        f"'fathom {kind} RECIPE --dry-run' lists every field with its value and a sentence about it. Sections: "
        f"{', '.join(sections)}; and --name, --seed.{presets}"
    )


def _version() -> str:
    from importlib.metadata import version

    return f"fathom {version('fathom-lm')}"


def _quickstart(options: argparse.Namespace) -> int:
    from fathom.quickstart import quickstart

    return quickstart(options.overrides, fresh=options.fresh)


def _data_build(options: argparse.Namespace) -> int:
    from rich.console import Console

    from fathom.data import build
    from fathom.report.tables import print_rows

    report = build(
        options.sources,
        options.out,
        vocab_size=options.vocab_size,
        holdout=options.holdout,
        tokenizer=options.tokenizer,
        text_field=options.text_field,
        shard_tokens=options.shard_tokens,
        console=Console(stderr=True),
    )
    print_rows(f"data in {options.out}", report.rows())
    return 0


def _data_verify(options: argparse.Namespace) -> int:
    from fathom.data import TokenDataset

    TokenDataset(options.path).verify()
    print(f"{options.path}: every shard is whole")
    return 0


def _load(options: argparse.Namespace) -> int:
    from fathom.report.describe import describe
    from fathom.report.tables import print_rows
    from fathom.train.run import model_folder

    model, tokenizer = open_model(options)
    dtype = str(model.lm_head.weight.dtype).removeprefix("torch.")
    if _stored_dtype(model_folder(options.model)) == "fp8":
        dtype += ", stored in fp8 (e4m3 in blocks of 128 × 128)"
    print_rows(options.model, [*describe(model.config, tokenizer), ("weights held in", dtype)])
    return 0


def _generate(options: argparse.Namespace) -> int:
    from fathom.engine.protocol import Sampling

    sampling = Sampling.parse(
        {name: getattr(options, name) for name in ("temperature", "top_p", "top_k", "seed")}, where="generate"
    )
    prompt = _prompt(options.prompt)
    tell = sys.stderr.isatty()
    say_opening(options, tell=tell)
    from fathom.engine.generate import generate

    model, tokenizer = open_for_text(options, tell=tell)
    for piece in generate(
        model, tokenizer, prompt, max_tokens=options.max_tokens, sampling=sampling, chat=options.chat
    ):
        print(piece, end="", flush=True)
    print()
    return 0


def _chat(options: argparse.Namespace) -> int:
    from fathom.serve.screen import keyboard_kept

    tell = sys.stderr.isatty()
    with keyboard_kept():
        say_opening(options, tell=tell)
        from fathom.engine.engine import Engine, EngineSettings
        from fathom.serve.terminal import ChatSettings, chat

        names = ("system", "temperature", "top_p", "seed", "max_tokens", "effort")
        settings = ChatSettings.parse({name: getattr(options, name) for name in names}, where="chat")
        model, tokenizer = open_for_text(options, tell=tell)
        engine = Engine(model, tokenizer, EngineSettings())
    with engine:
        return chat(engine, tokenizer, settings)


def _prompt(word: str) -> str:
    """The prompt on the command line, or on standard input where that is '-'."""
    try:
        text = sys.stdin.read() if word == "-" else word
        text.encode()
    except UnicodeError:
        raise UserError("the prompt is not valid UTF-8 text") from None
    return text


def _report(options: argparse.Namespace) -> int:
    from fathom.report.page import write_report

    print(f"wrote {write_report(options.run_folder, options.out, figure=options.figure)}")
    return 0


def _export(options: argparse.Namespace) -> int:
    from fathom.model.checkpoint import save_model
    from fathom.train.run import model_folder

    folder = model_folder(options.model)
    stored = _stored_dtype(folder)
    dtype = options.dtype or stored
    # Blocks are made of all that is stored; those of an FP8 folder come back bit for bit only through float32.
    blocks_of = "bfloat16" if stored == "bfloat16" else "float32"
    model, tokenizer = fathom.load(folder, dtype=blocks_of if dtype == "fp8" else dtype)
    if options.without_mtp:
        model = model.without_mtp()
    save_model(model, options.out, tokenizer=tokenizer, dtype=dtype)
    print(f"wrote {options.out} ({dtype})")
    return 0


def _stored_dtype(source: Path) -> str:
    """What holds the stored weights without loss: fp8 where any is, else float32, unless the embedding is bfloat16."""
    from fathom.model.naming import EMBEDDING
    from fathom.model.shards import open_shards

    if source.suffix == ".gguf":
        return "float32"
    with open_shards(source) as shards:
        if any(shards.dtype(name) == "F8_E4M3" for name in shards):
            return "fp8"
        return "bfloat16" if EMBEDDING in shards and shards.dtype(EMBEDDING) == "BF16" else "float32"


if __name__ == "__main__":
    sys.exit(main())
