"""The commands that run a recipe: which they are, what each reads, and what it calls."""

import argparse
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fathom.errors import INTERRUPTED, UserError

if TYPE_CHECKING:
    from fathom.config.section import Section


@dataclass(frozen=True)
class RecipeVerb:
    """One command. Code is named as `module:name` and imported when it is needed."""

    help: str
    recipe: str
    """What its file is read as."""
    run: str
    dry_run: str
    resume: str = "continue from the run's newest checkpoint"
    accepts_changes: bool = True
    """Whether a run can be resumed although its recipe has changed."""


RECIPE_VERBS = {
    "pretrain": RecipeVerb(
        "train a model from a recipe",
        "fathom.config.recipe:PretrainRecipe",
        "fathom.train.pretrain:pretrain",
        "fathom.train.pretrain:dry_run",
    ),
    "rl": RecipeVerb(
        "teach a model by rewards that a rule gives, as R1-Zero was",
        "fathom.config.rl:RLRecipe",
        "fathom.train.rl:train_rl",
        "fathom.train.rl_estimate:dry_run",
    ),
    "sft": RecipeVerb(
        "teach a model to say what conversations say",
        "fathom.config.sft:SFTRecipe",
        "fathom.train.sft:train_sft",
        "fathom.train.sft_estimate:dry_run",
    ),
    "synth": RecipeVerb(
        "write solutions to problems, and keep what a rule proves right",
        "fathom.config.synth:SynthRecipe",
        "fathom.synth.factory:synthesize",
        "fathom.synth.plan:dry_run",
        resume="go on without drawing again; filters may have changed",
        accepts_changes=False,
    ),
}


def add_recipe_verbs(verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Those of the table, and `recipe` and `distill` for several of them in a row; `verb` adds one."""
    for name, told in RECIPE_VERBS.items():
        run = verb(name, run_recipe, told.help, overrides=name)
        run.set_defaults(verb=name)
        run.add_argument("recipe", type=Path, help="a TOML file; see recipes/")
        run.add_argument("--resume", action="store_true", help=told.resume)
        run.add_argument("--overwrite", action="store_true", help="delete an existing run of this name first")
        if told.accepts_changes:
            run.add_argument("--accept-changes", action="store_true", help="resume although the recipe has changed")
        run.add_argument("--dry-run", action="store_true", help="print the recipe and what it will take, and stop")
    run = verb("recipe", run_stages, "make all stages of a pipeline, and measure after each", overrides="recipe")
    run.add_argument("name", help="one of the pipelines in recipes/, such as r1, or a TOML file")
    run.add_argument("file", type=Path, nargs="?", help="a TOML file in its place, whose run then has that name")
    run.add_argument("--redo", action="store_true", help="make stages again whose recipe has changed")
    run.add_argument("--dry-run", action="store_true", help="print what each stage does and where it stands, and stop")
    run = verb("distill", run_distillation, "teach a small model what a large one can do", overrides="distill")
    run.add_argument("recipe", type=Path, help="a TOML file; see recipes/")
    run.add_argument("--redo", action="store_true", help="make stages again whose recipe has changed")
    run.add_argument("--dry-run", action="store_true", help="print the recipe and what its stages do, and stop")


def recipe_kind(verb: str) -> "type[Section]":
    """What a command's file is read as."""
    several = {"recipe": "fathom.config.pipeline:Pipeline", "distill": "fathom.config.distill:DistillRecipe"}
    return _named(several[verb] if verb in several else RECIPE_VERBS[verb].recipe)


def run_recipe(options: argparse.Namespace) -> int:
    """A command of the table."""
    from fathom.config import read_recipe

    if options.resume and options.overwrite:
        raise UserError("--resume goes on with a run and --overwrite deletes it; leave one out")
    told = RECIPE_VERBS[options.verb]
    recipe = read_recipe(options.recipe, options.overrides, recipe_kind(options.verb))
    if options.dry_run:
        _named(told.dry_run)(recipe)
        return 0
    how = {"accept_changes": options.accept_changes} if told.accepts_changes else {}
    result = _named(told.run)(recipe, resume=options.resume, overwrite=options.overwrite, **how)
    add_report(result.folder)
    return INTERRUPTED if result.interrupted else 0


def run_stages(options: argparse.Namespace) -> int:
    """All stages of a file."""
    from fathom.config.pipeline import read_pipeline
    from fathom.quickstart import shipped_recipe

    named = Path(options.name) if options.name.endswith(".toml") else None
    file = options.file or named or shipped_recipe(options.name)
    pipeline = read_pipeline(file, [*(["--name", options.name] if options.file else []), *options.overrides])
    if options.dry_run:
        from fathom.pipeline.dry_run import dry_run

        dry_run(pipeline, file.parent)
        return 0
    from fathom.pipeline.run import run_pipeline

    result = run_pipeline(pipeline, file.parent, redo=options.redo)
    add_report(result.folder)
    return INTERRUPTED if result.interrupted else 0


def run_distillation(options: argparse.Namespace) -> int:
    """A teacher, a student, and the ways between them."""
    from fathom.config import read_recipe
    from fathom.pipeline.distill import distill, dry_run

    recipe = read_recipe(options.recipe, options.overrides, recipe_kind("distill"))
    if options.dry_run:
        dry_run(recipe)
        return 0
    result = distill(recipe, redo=options.redo)
    add_report(result.folder)
    return INTERRUPTED if result.interrupted else 0


def add_report(run: Path) -> None:
    """Write the page on a run or a pipeline that has just ended. It has not failed where that cannot be written."""
    from fathom.report.page import write_report

    try:
        print(f"wrote {write_report(run)}")
    except Exception as error:
        print(f"fathom: no report was written: {str(error) or type(error).__name__}", file=sys.stderr)


def _named(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)
