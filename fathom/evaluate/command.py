"""The verb `fathom eval`: its options, from them the settings, and what is done with the result."""

import argparse
import json
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fathom.errors import UserError
from fathom.options import between, open_for_text, positive, say_opening
from fathom.scratch import partial

if TYPE_CHECKING:
    from fathom.config.evaluation import EvaluationSettings
    from fathom.config.rl import RLRecipe
    from fathom.evaluate.answers import Answers
    from fathom.evaluate.results import Evaluation

RESULT = "evaluation.json"
"""In the folder of a run that is evaluated."""
SMALLER = "evaluation-smaller.json"
"""In its place where the other says more."""
_MODELS = ("best", "checkpoints")
"""Folders of a run that hold model folders."""
_ENDPOINT_SECONDS = 600.0
"""An endpoint says nothing until a completion is whole."""
_PRICE = between(0, 1e9)
_PLAIN = (
    "levels", "problems", "samples", "consensus", "budgets", "temperature", "top_p", "max_tokens", "seed",
    "check_seconds", "sandbox",
)  # fmt: skip
"""Options that are fields of `EvaluationSettings` by the same name."""
_LEARNT = ("tasks", "levels", "check_seconds", "sandbox", "max_tokens", "prompt", "layout")
"""Fields of `EvaluationSettings` that belong to a model, and not to how it is measured."""


def add_evaluation(parser: argparse.ArgumentParser) -> None:
    """All options."""
    add = parser.add_argument
    add("model", nargs="?", help="a run or pipeline, a model folder, a .gguf file, or a hub name")
    add("--dtype", choices=["float32", "bfloat16"], help="dtype of the weights (the machine's best)")
    add("--endpoint", metavar="URL", help="an OpenAI-compatible server, in the place of MODEL")
    add("--model-name", metavar="NAME", help="what that server calls the model (the only one it has)")
    add("--key-env", metavar="VARIABLE", help="name of the environment variable with that server's key")
    add("--connections", type=positive, default=32, help="requests to that server at once (32)")
    add("--patience", type=between(1, 1e6), default=_ENDPOINT_SECONDS, help="seconds that one may take (600)")
    add("--task", action="append", help="what to measure, can be repeated; see 'fathom tasks list' (the run's own)")
    add("--levels", type=positive, help="problems of levels 1 to this (the run's, else all)")
    add("--problems", type=positive, help="held-out problems of each task (128)")
    add("--samples", type=positive, help="answers drawn for each problem (8)")
    add("--consensus", type=int, nargs="+", metavar="K", help="sizes of the majority vote (1 2 4 ... up to --samples)")
    add("--budgets", type=int, nargs="+", metavar="N", help="measure again with thoughts cut at so many tokens")
    add("--temperature", type=float, help="0 takes the most likely token (0.6)")
    add("--top-p", type=float, help="nucleus to draw from (0.95)")
    add("--max-tokens", type=positive, help="longest completion (the run's, else 32768 or what the context leaves)")
    add("--style", choices=["zero", "chat", "template"], help="how the model is asked (the run's, else chat)")
    add("--template", help="for --style template: the text, with {question} in it")
    add("--instruction", help="for --style chat: what follows the question")
    add("--opens-thought", action="store_true", default=None, help="the prompt ends with an open think tag")
    add("--layout", choices=["tags", "boxed", "line", "rest"], help="where the answer stands (the run's, else boxed)")
    add("--seed", type=int, help="same seed, same problems and samples (1)")
    add("--check-seconds", type=float, help="longest time a check may take (10)")
    add("--sandbox", choices=["bubblewrap", "none"], help="where a task that runs programs runs them (bubblewrap)")
    add("--price-input", type=_PRICE, metavar="MONEY", help="of a million tokens read; needs --price-output")
    add("--price-output", type=_PRICE, metavar="MONEY", help="of a million tokens written; needs --price-input")
    add("--json", type=Path, metavar="FILE", help=f"where to write the numbers (RUN/{RESULT}); a chart goes beside")


def run_evaluation(options: argparse.Namespace) -> int:
    """Measure, show, write. The exit code is 130 where Ctrl-C ended it early, and 2 where an error did."""
    _refuse_contradictions(options)
    settings = _settings(options)
    target = _target(options)
    from rich.console import Console

    from fathom.evaluate.evaluate import INTERRUPTED, evaluate, held_out
    from fathom.evaluate.results import Prices
    from fathom.evaluate.screen import ProgressView, notes, show
    from fathom.train.signals import sigterm_interrupts

    problems = held_out(settings)  # what is wrong with a task should not be learnt after minutes of loading
    errors = Console(stderr=True, highlight=False, markup=False, emoji=False)
    prices = None if options.price_input is None else Prices(options.price_input, options.price_output)
    with sigterm_interrupts(), _answers(options) as answers:
        name = options.model or f"{options.endpoint} {answers.model.id}"
        with ProgressView(errors) as view:
            found = evaluate(answers, settings, model=name, problems=problems, prices=prices, tell=view.tell)
    show(found, Console(highlight=False, markup=False, emoji=False))
    for line in notes(found):
        errors.print(f"fathom: {line}", soft_wrap=True)
    if target is not None:
        _write(found, target if options.json is not None else _own_place(found, target))
    if found.stopped:
        ended = sum(measurement.problems for measurement in found.measurements)
        errors.print(f"fathom: {found.stopped}; above is what {ended} problems gave until then", soft_wrap=True)
        return 130 if found.stopped == INTERRUPTED else 2
    return 0


def _refuse_contradictions(options: argparse.Namespace) -> None:
    if (options.model is None) == (options.endpoint is None):
        raise UserError("give either MODEL or --endpoint URL; see 'fathom eval --help'")
    for name in ("model_name", "key_env"):
        if options.endpoint is None and getattr(options, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} is about --endpoint, which is not given; leave it out")
    if options.endpoint is not None and options.dtype is not None:
        raise UserError("--dtype is about MODEL: a server has chosen its own; leave it out")
    if (options.price_input is None) != (options.price_output is None):
        raise UserError("--price-input and --price-output go together; give both")


def _settings(options: argparse.Namespace) -> "EvaluationSettings":
    """What the run or pipeline says, if it has a task, and before it what the options say."""
    from fathom.config.evaluation import EvaluationSettings

    given = {name: value for name in _PLAIN if (value := getattr(options, name)) is not None}
    values = {} if options.model is None else _asked_before(Path(options.model).expanduser())
    if options.task is not None and options.task != list(values.get("tasks", ())):
        values.pop("levels", None)  # they are those of the run's own task
        values["tasks"] = options.task
    if "tasks" not in values:
        raise UserError("which task? give --task NAME; 'fathom tasks list' names them")
    prompt = {"style": options.style, "template": options.template, "instruction": options.instruction}
    prompt["opens_thought"] = options.opens_thought
    if said := {name: value for name, value in prompt.items() if value is not None}:
        begun = values.get("prompt", EvaluationSettings.model_fields["prompt"].default.model_dump())
        values["prompt"] = begun | said
    if options.layout is not None:
        values["layout"] = values.get("layout", {"thoughts": "optional"}) | {"form": options.layout}
    return EvaluationSettings.parse(values | given, where="eval")


def _asked_before(path: Path) -> dict[str, Any]:
    """Fields of `EvaluationSettings` under which a pipeline measured the model at `path`, its own or a stage's, or
    under which it learnt; none where nothing tells. Raises `UserError`."""
    from fathom.config.evaluation import EvaluationSettings
    from fathom.evaluate.written import looked_over
    from fathom.pipeline.state import measured_stage, served

    stage = measured_stage(path) if (whole := served(path)) is None else whole.state
    if stage is not None and stage.evaluation is not None:
        settings = looked_over(stage.evaluation, path)["settings"]
        measured = EvaluationSettings.parse(settings, where=str(path))
        return {name: value for name, value in measured.model_dump().items() if name in _LEARNT}
    return {} if (recipe := recipe_of(path)) is None else of_recipe(recipe)


def recipe_of(path: Path) -> "RLRecipe | None":
    """The recipe by which the model at `path` learnt from rewards; None where it is no such model.

    `path` is a run's folder, its folder `best` or `checkpoints`, or a model folder in one of these. Raises `UserError`
    for a recipe that cannot be read.
    """
    from fathom.config import read_recipe
    from fathom.config.rl import RLRecipe

    inside = path if path.name in _MODELS else path.parent
    file = (inside.parent if inside.name in _MODELS else path) / "recipe.toml"
    if not file.is_file():
        return None
    try:
        by_rewards = {"task", "rollout"} <= tomllib.loads(file.read_text(encoding="utf-8")).keys()
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as a recipe ({error})") from None
    return read_recipe(file, [], RLRecipe) if by_rewards else None


def of_recipe(recipe: "RLRecipe") -> dict[str, Any]:
    """Fields of `EvaluationSettings` under which a model is asked as it has learnt to be."""
    return {
        "tasks": [recipe.task.name],
        "levels": recipe.task.levels,
        "check_seconds": recipe.task.check_seconds,
        "sandbox": recipe.task.sandbox,
        "max_tokens": recipe.rollout.max_tokens,
        "prompt": recipe.prompt.model_dump(),
        "layout": recipe.rewards.layout.model_dump(),
    }


def _target(options: argparse.Namespace) -> Path | None:
    """The file to write. Raises `UserError` now, and not after the work, where it cannot be."""
    if options.json is None:
        run = None if options.model is None else Path(options.model).expanduser()
        if run is None or not (run / "recipe.toml").is_file():
            return None
        target = run / RESULT
    else:
        target = options.json
    if target.suffix == ".svg":
        raise UserError(f"{target}: the chart goes there; give a name that ends in .json")
    if target.is_dir():
        raise UserError(f"{target}: is a folder; give the name of a file")
    if not target.absolute().parent.is_dir():
        raise UserError(f"{target.parent}: no such folder; make it first")
    for file in (target, target.with_suffix(".svg")):
        if file.is_dir():
            raise UserError(f"{file}: is a folder, and the chart goes there; give another name")
        try:
            partial(file).touch()
            partial(file).unlink()
        except OSError as error:
            raise UserError(
                f"{file}: cannot be written ({error.strerror or error}); give --json another FILE"
            ) from None
    return target


def _own_place(found: "Evaluation", target: Path) -> Path:
    """`target`, or a place beside it where the run's own measurement says something that these numbers do not."""
    from fathom.evaluate.written import is_replaced_by

    if is_replaced_by(target, found.as_json()):
        return target
    print(
        f"fathom: {target} holds what these numbers do not, and stays; they go beside it (--json FILE: elsewhere)",
        file=sys.stderr,
    )
    return target.with_name(SMALLER)


@contextmanager
def _answers(options: argparse.Namespace) -> "Iterator[Answers]":
    """The model, ready to be asked."""
    if options.endpoint is not None:
        from fathom.engine.endpoint import RemoteSettings
        from fathom.evaluate.endpoint import EndpointAnswers

        settings = RemoteSettings(
            url=options.endpoint,
            model=options.model_name,
            api_key_env=options.key_env,
            connections=options.connections,
            stall_seconds=options.patience,
        )
        with EndpointAnswers(settings) as answers:
            yield answers
        return
    tell = sys.stderr.isatty()
    say_opening(options, tell=tell)
    from fathom.engine.engine import Engine, EngineSettings
    from fathom.evaluate.answers import EngineAnswers

    model, tokenizer = open_for_text(options, tell=tell)
    with Engine(model, tokenizer, EngineSettings()) as engine:
        yield EngineAnswers(engine, tokenizer)


def _write(found: "Evaluation", target: Path) -> None:
    """The numbers, and the charts beside them."""
    from fathom.evaluate.figures import draw_evaluation
    from fathom.scratch import replace_text

    texts = {target: json.dumps(found.as_json(), indent=2, ensure_ascii=False) + "\n"}
    if chart := draw_evaluation(found):
        texts[target.with_suffix(".svg")] = chart
    for file, text in texts.items():
        try:
            replace_text(file, text)
        except OSError as error:
            raise UserError(f"{file}: cannot be written ({error.strerror or error})") from None
    print(f"\nwrote {' and '.join(map(str, texts))}")
