"""The command line: one verb per line, each a thin call into the library.

A wrong input ends with one line on standard error and exit code 2. A traceback is a bug, or was asked for with
`--debug`.
"""

import argparse
import contextlib
import io
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import fathom
from fathom.errors import UserError, nearest

if TYPE_CHECKING:
    from fastapi import FastAPI

    from fathom.serve.settings import ServiceSettings


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
        if self.get_default("takes_overrides"):
            self.epilog = _sections()
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
        return 130
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
    if words and words[0] in verbs and verbs[words[0]].get_default("takes_overrides"):
        overrides, words = _take_overrides(words, verbs[words[0]].flags)
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


def _take_overrides(words: list[str], flags: list[str]) -> tuple[list[str], list[str]]:
    """Split off the `--section.field value` pairs, wherever they stand: (pairs, the command's own words)."""
    pairs, own, rest = [], [], list(words)
    while rest:
        word = rest.pop(0)
        name, equals, _ = word.partition("=")
        if not word.startswith("--") or word == "--" or name in flags:
            own.append(word)
            continue
        if "." not in name:
            _refuse_unknown_flag(name, flags)
        pairs.append(word)
        if not equals and rest and not rest[0].startswith("--"):
            pairs.append(rest.pop(0))
    return pairs, own


def _refuse_unknown_flag(name: str, flags: list[str]) -> None:
    """A flag without a section is a typo, unless the recipe has a field of that name."""
    from fathom.config.recipe import PretrainRecipe
    from fathom.config.section import field_paths

    if name[2:].replace("-", "_") not in PretrainRecipe.model_fields:
        known = {f"--{field}": f"--{path}" for field, path in field_paths(PretrainRecipe).items()}
        shortened = [flag for flag in flags if flag.startswith(name)]
        raise UserError(f"unknown flag '{name}'{nearest(name, shortened or [*flags, *known], shown=known)}")


def _build_parser() -> tuple[_Parser, dict[str, _Parser]]:
    parser = _Parser(prog="fathom", description="Train, serve and understand DeepSeek-V3-style language models.")
    parser.add_argument("--version", action="version", version=_version())
    parser.set_defaults(run=lambda _: parser.print_help(), takes_overrides=False, parser=parser)
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=_Parser)

    def verb(name: str, run, help: str, *, of=verbs, overrides: bool = False) -> _Parser:
        added = of.add_parser(name, help=help, description=help + (_OVERRIDES if overrides else "."))
        added.set_defaults(run=run, takes_overrides=overrides, parser=added)
        return added

    run = verb("quickstart", _quickstart, "train a small DeepSeek-V3 on real text and let it write", overrides=True)
    run.add_argument("--fresh", action="store_true", help="start over instead of continuing an interrupted run")

    run = verb("pretrain", _pretrain, "train a model from a recipe", overrides=True)
    run.add_argument("recipe", type=Path, help="a TOML file; see recipes/")
    run.add_argument("--resume", action="store_true", help="continue from the run's newest checkpoint")
    run.add_argument("--overwrite", action="store_true", help="delete an existing run of this name first")
    run.add_argument("--accept-changes", action="store_true", help="resume although the recipe computes something else")
    run.add_argument("--dry-run", action="store_true", help="print every field and what the run will take, and stop")

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

    run = verb("load", _load, "open a model and say what it is")
    _add_model(run)

    run = verb("generate", _generate, "continue a prompt: prints what the model adds, without the prompt")
    _add_model(run)
    run.add_argument("prompt", help="text to continue; '-' reads standard input")
    run.add_argument("--max-tokens", type=_positive, default=128, help="longest continuation (128)")
    run.add_argument("--temperature", type=float, default=0.8, help="0 takes the most likely token (0.8)")
    run.add_argument("--top-p", type=float, default=0.95, help="nucleus to draw from (0.95)")
    run.add_argument("--top-k", type=int, default=0, help="draw from this many most likely tokens (all)")
    run.add_argument("--seed", type=int, help="same seed, same text")
    run.add_argument("--chat", action="store_true", help="wrap the prompt in the model's chat template")

    run = verb("chat", _chat, "talk to a model in the terminal")
    _add_model(run)
    run.add_argument("--system", default="", help="what to tell the model before everything else")
    run.add_argument("--temperature", type=float, default=0.6, help="0 takes the most likely token (0.6)")
    run.add_argument("--top-p", type=float, default=1.0, help="nucleus to draw from (1.0)")
    run.add_argument("--seed", type=int, help="same seed and questions, same answers")
    run.add_argument(
        "--effort", help="how long to think: none, minimal, low, medium, high, xhigh, max (the model's way)"
    )
    run.add_argument("--max-tokens", type=_positive, help="longest answer, thoughts included (what the context leaves)")

    run = verb("serve", _serve, "answer over HTTP: OpenAI's API and a chat page")
    _add_model(run)
    _add_service(run)

    run = verb("export", _export, "write a model as a folder for other programs")
    _add_model(run, default_dtype="the dtype they are stored in")
    run.add_argument("out", type=Path, help="folder to write")
    run.add_argument("--without-mtp", action="store_true", help="leave the multi-token-prediction modules out")
    for added in verbs.choices.values():
        if added.get_default("takes_overrides"):
            added.usage = f"{added.format_usage().removeprefix('usage: ').strip()} [--section.field value ...]"
    return parser, verbs.choices


_OVERRIDES = ". Every field of the recipe can be changed: --section.field value; 'none' unsets an optional one."


def _sections() -> str:
    """Where the fields of a recipe are listed, for the end of a command's help."""
    from fathom.config import PRESETS, PretrainRecipe, Section

    fields = PretrainRecipe.model_fields.items()
    sections = [name for name, f in fields if isinstance(f.annotation, type) and issubclass(f.annotation, Section)]
    return (
        "'fathom pretrain RECIPE --dry-run' lists every field with its value and a sentence about it. Sections: "
        f"{', '.join(sections)}; and --name, --seed. Presets for --model.preset: {', '.join(PRESETS)}."
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 1")
    return int(text)


def _add_model(parser: argparse.ArgumentParser, *, default_dtype: str = "the machine's best") -> None:
    parser.add_argument("model", help="a model folder, a run, a .gguf file, or a hub name")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help=f"dtype of the weights ({default_dtype})")


def _add_service(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on; the default is reachable from this machine alone")
    add("--port", type=_port, default=8000, help="port to listen on; 0 takes a free one (8000)")
    add("--api-key", action="append", default=[], help="a key that clients must send; can be repeated; 'ps' shows it")
    add("--api-key-file", type=Path, help="file with such keys, one a line; FATHOM_API_KEYS holds more")
    add("--served-model-name", action="append", help="name for requests to give, can be repeated (the model's own)")
    add("--temperature", type=_between(0, 2), help="for requests that give none (the model's, else 1.0)")
    add("--top-p", type=_between(0, 1, open=True), help="for requests that give none (the model's, else 1.0)")
    add(
        "--allow-origin",
        action="append",
        default=[],
        help="origin whose web pages may ask, can be repeated; '*' is all",
    )
    add("--max-context", type=_positive, help="longest prompt and answer together, in tokens (the model's)")
    add("--cache-memory", type=_gigabytes, help="gigabytes for the KV cache (1.07)")
    add("--max-running", type=_positive, help="requests computed at once (256)")
    add("--queue", type=_positive, help="requests that may wait; more get a 503 (1024)")
    add("--weights", choices=["int8", "fp8"], help="round weights for speed; the text changes slightly (as loaded)")
    add("--rate", type=_positive, help="requests a minute for each key; more get a 429 (no bound)")
    add("--concurrency", type=_positive, help="requests at once for each key; more get a 429 (no bound)")
    add("--log-requests", action="store_true", help="a line for each request on standard error; no texts, no keys")
    add("--max-body", type=_positive, default=8, help="megabytes of the longest request (8)")
    add("--drain", type=_positive, default=30, help="seconds that running answers may take after SIGTERM (30)")


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"'{text}' is not a port (0 to 65535)")
    return int(text)


def _between(least: float, most: float, *, open: bool = False) -> Callable[[str], float]:
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


def _gigabytes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of gigabytes above 0")
    return value


def _version() -> str:
    from importlib.metadata import version

    return f"fathom {version('fathom-lm')}"


def _quickstart(options: argparse.Namespace) -> int:
    from fathom.quickstart import quickstart

    return quickstart(options.overrides, fresh=options.fresh)


def _pretrain(options: argparse.Namespace) -> int:
    from fathom.config import read_recipe
    from fathom.train.pretrain import dry_run, pretrain

    recipe = read_recipe(options.recipe, options.overrides)
    if options.dry_run:
        dry_run(recipe)
    else:
        pretrain(recipe, resume=options.resume, overwrite=options.overwrite, accept_changes=options.accept_changes)
    return 0


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

    model, tokenizer = _open(options)
    dtype = str(model.lm_head.weight.dtype).removeprefix("torch.")
    print_rows(options.model, [*describe(model.config, tokenizer), ("weights held in", dtype)])
    return 0


def _generate(options: argparse.Namespace) -> int:
    from fathom.engine.protocol import Sampling

    sampling = Sampling.parse(
        {name: getattr(options, name) for name in ("temperature", "top_p", "top_k", "seed")}, where="generate"
    )
    prompt = _prompt(options.prompt)
    tell = sys.stderr.isatty()
    _say_opening(options, tell=tell)
    from fathom.engine.generate import generate

    model, tokenizer = _open_for_text(options, tell=tell)
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
        _say_opening(options, tell=tell)
        from fathom.engine.engine import Engine, EngineSettings
        from fathom.serve.terminal import ChatSettings, chat

        names = ("system", "temperature", "top_p", "seed", "max_tokens", "effort")
        settings = ChatSettings.parse({name: getattr(options, name) for name in names}, where="chat")
        model, tokenizer = _open_for_text(options, tell=tell)
        engine = Engine(model, tokenizer, EngineSettings())
    with engine:
        return chat(engine, tokenizer, settings)


def _serve(options: argparse.Namespace) -> int:
    try:
        from fathom.serve.server import announcement, check_origins, listen, read_keys, run, served_hosts
    except ModuleNotFoundError as error:
        raise UserError(f"serve needs the package {error.name}: pip install 'fathom-lm[serve]'") from None
    from fathom.serve.machine import check_cache_memory
    from fathom.serve.settings import ServiceSettings

    if options.cache_memory is not None:
        check_cache_memory(options.cache_memory)
    settings = ServiceSettings(
        names=tuple(options.served_model_name or [_served_name(options.model)]),
        api_keys=read_keys(options.api_key, options.api_key_file),
        allow_origins=check_origins(options.allow_origin),
        log_requests=options.log_requests,
        requests_per_minute=options.rate,
        concurrent_requests=options.concurrency,
        max_body_bytes=options.max_body * 10**6,
        drain_seconds=options.drain,
    )
    # The address first: that it is taken should not be learnt after minutes of loading.
    with listen(options.host, options.port) as listener:
        hosts = served_hosts(listener, options.host, settings.allow_origins)
        app = _service(options, settings.replace(hosts=hosts))
        for line in announcement(listener, app.state.service.settings):
            print(f"fathom: {line}", file=sys.stderr)
        run(app, listener)
    return 0


def _service(options: argparse.Namespace, settings: "ServiceSettings") -> "FastAPI":
    """The application over the model that the command line names."""
    _say_opening(options, tell=True)
    from fathom.engine.engine import Engine, EngineSettings
    from fathom.serve.app import create_app
    from fathom.serve.defaults import default_sampling
    from fathom.train.run import model_folder

    model, tokenizer = _open_for_text(options, tell=True)
    sampling = default_sampling(model_folder(options.model), temperature=options.temperature, top_p=options.top_p)
    sizes = {
        "context": options.max_context,
        "cache_memory": None if options.cache_memory is None else int(options.cache_memory * 1e9),
        "max_running": options.max_running,
        "queue": options.queue,
        "weights": options.weights,
    }
    given = {name: value for name, value in sizes.items() if value is not None}
    engine = Engine(model, tokenizer, EngineSettings.parse(given, where="serve"))
    return create_app(engine, tokenizer, settings.replace(sampling=sampling))


def _served_name(model: str) -> str:
    """What requests call a model by: the folder's or file's name, or all of a hub name."""
    path = Path(model)
    return path.resolve().name.removesuffix(".gguf") if path.exists() else model


def _prompt(word: str) -> str:
    """The prompt on the command line, or on standard input where that is '-'."""
    try:
        text = sys.stdin.read() if word == "-" else word
        text.encode()
    except UnicodeError:
        raise UserError("the prompt is not valid UTF-8 text") from None
    return text


def _export(options: argparse.Namespace) -> int:
    from fathom.model.checkpoint import save_model
    from fathom.train.run import model_folder

    folder = model_folder(options.model)
    dtype = options.dtype or _stored_dtype(folder)
    model, tokenizer = fathom.load(folder, dtype=dtype)
    if options.without_mtp:
        model = model.without_mtp()
    save_model(model, options.out, tokenizer=tokenizer, dtype=dtype)
    print(f"wrote {options.out} ({dtype})")
    return 0


def _open(options: argparse.Namespace):
    """The model and tokenizer named on the command line, in this machine's fastest dtype unless one is given."""
    from fathom.train.machine import has_bf16

    dtype = options.dtype or ("bfloat16" if has_bf16() else "float32")
    return fathom.load(options.model, dtype=dtype)


def _say_opening(options: argparse.Namespace, *, tell: bool) -> None:
    """To be called before the first heavy import, for that is part of what a person waits for."""
    if tell:
        print(f"fathom: opening {options.model} …", file=sys.stderr, flush=True)


def _open_for_text(options: argparse.Namespace, *, tell: bool):
    """As `_open`, for what cannot do without a tokenizer; `tell` says on standard error what was opened."""
    model, tokenizer = _open(options)
    if tokenizer is None:
        raise UserError(f"{options.model}: the folder has no tokenizer.json, so text cannot be read or written")
    if tell:
        from fathom.serve.prompt import Prompter

        thinks = "thinks visibly" if Prompter(tokenizer).thinks else "no visible thoughts"
        context = getattr(options, "max_context", None) or model.config.max_position_embeddings
        print(f"fathom: {options.model}: context of {context:,} tokens, {thinks}", file=sys.stderr)
    return model, tokenizer


def _stored_dtype(source: Path) -> str:
    """What holds the stored weights without loss: float32, unless the embedding is bfloat16 (FP8 folders' is too)."""
    from fathom.model.naming import EMBEDDING
    from fathom.model.shards import open_shards

    if source.suffix == ".gguf":
        return "float32"
    with open_shards(source) as shards:
        return "bfloat16" if EMBEDDING in shards and shards.dtype(EMBEDDING) == "BF16" else "float32"


if __name__ == "__main__":
    sys.exit(main())
