"""The verb `fathom tasks`: which tasks there are, what their problems look like, and how one does oneself."""

import argparse
import inspect
import itertools
import random
import sys
import typing
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.table import Table

from fathom.config.section import sentence
from fathom.errors import UserError
from fathom.options import positive
from fathom.tasks.catalogue import BUILT_IN, FORMS, open_task
from fathom.tasks.task import Problem, Split, Task, judge

# A problem that came again so often in a row says that there is no other.
_PATIENCE = 1000


def add_tasks(verb: Callable[..., argparse.ArgumentParser]) -> None:
    """The three commands; `verb` adds one."""
    verb("list", list_tasks, "name every task")
    run = verb("show", show, "print problems of a task, their answers and worked solutions")
    _add_choice(run)
    run.add_argument("--count", type=positive, default=3, help="how many problems (3)")
    run = verb("try", try_task, "answer problems yourself; end with Ctrl-D")
    _add_choice(run)
    run.add_argument("--count", type=positive, help="how many problems (until you end it)")
    run.add_argument(
        "--sandbox",
        choices=("bubblewrap", "none"),
        default="bubblewrap",
        help="where a task that runs programs runs them; none is for programs you trust (bubblewrap)",
    )


def _add_choice(parser: argparse.ArgumentParser) -> None:
    """Which problems."""
    parser.add_argument("task", metavar="NAME", help=f"{FORMS}; options follow a question mark: NAME?key=value&...")
    parser.add_argument("--level", type=positive, default=1, help="how hard, from 1 (1)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same problems (0)")
    parser.add_argument("--split", choices=typing.get_args(Split), default="train", help="which problems (train)")


def list_tasks(options: argparse.Namespace) -> int:
    """A table of the built-in tasks, and the names of reasoning-gym's."""
    console = Console(highlight=False, markup=False, emoji=False)  # brackets and colons are the tasks' own
    table = Table("name", "levels", "a problem of the first", box=None, pad_edge=False)
    for name in BUILT_IN:
        task = open_task(name)
        table.add_row(name, str(task.levels), _short(next(task.problems("train")).question))
    console.print(table)
    console.print("\nOptions follow a question mark: 'modular?corrections=0.1'. Your own: FILE.jsonl, FILE.py:CLASS.")
    try:
        from fathom.tasks.gym import PREFIX, dataset_names

        names = dataset_names()
    except UserError as error:
        console.print(f"\n{error}", soft_wrap=True)
        return 0
    console.print(f"\n{len(names)} datasets of reasoning-gym, each named {PREFIX}NAME:\n{', '.join(names)}")
    return 0


def show(options: argparse.Namespace) -> int:
    """What the task is, then problems, none of them twice."""
    task, problems = _open(options)
    shown = list(itertools.islice(_different(problems), options.count))
    print(_headline(task))
    for number, problem in enumerate(shown, 1):
        print(f"\n{number}. {problem.question}")
        worked = task.solution(problem, random.Random(f"{options.seed} {number}"))
        for title, text in (("worked", worked), ("answer", problem.answer)):
            if text:
                print(f"{title}: {text}" if "\n" not in text else f"{title}:\n{_indented(text)}")
    return 0


def try_task(options: argparse.Namespace) -> int:
    """Ask, read, say whether it was right; at the end how many were."""
    from fathom.tasks.mixture import uses_sandbox
    from fathom.tasks.programs import shared_sandbox, use_sandbox

    task, problems = _open(options)
    if uses_sandbox(task):
        use_sandbox(options.sandbox)
        shared_sandbox()  # where there is none, the person hears of it now, and not as wrong answers
    print(_headline(task))
    asked = right = 0
    try:
        for problem in itertools.islice(problems, options.count):
            print(f"\n{problem.question}")
            asked, right = asked + 1, right + _ask(task, problem)
    except (EOFError, KeyboardInterrupt):
        print()
    print(f"{right} of {asked} right")
    return 0


def _ask(task: Task, problem: Problem) -> bool:
    """Whether the next line of standard input answers it; raises `EOFError` where there is none."""
    if sys.stdin.isatty():
        answer = input("> ")
    elif not (answer := sys.stdin.readline()):
        raise EOFError
    verdict = judge(task, problem, answer.strip())
    if verdict.fault:
        print(verdict.fault)
    if verdict.score == 1:
        print("right")
    else:
        partly = f"partly right ({verdict.score:g})" if verdict.score else "wrong"
        print(f"{partly}: {problem.answer}" if problem.answer else partly)
    return verdict.score == 1


def _open(options: argparse.Namespace) -> tuple[Task, Iterator[Problem]]:
    task = open_task(options.task)
    return task, task.problems(options.split, level=options.level, seed=options.seed)


def _different(problems: Iterator[Problem]) -> Iterator[Problem]:
    """Each problem once, until no more are found."""
    seen: set[str] = set()
    repeated = 0
    while repeated < _PATIENCE:
        problem = next(problems)
        key = problem.key or problem.question
        repeated = repeated + 1 if key in seen else 0
        if not repeated:
            seen.add(key)
            yield problem


def _headline(task: Task) -> str:
    """Its name, the first paragraph of its class's docstring, and its levels."""
    levels = "1 level" if task.levels == 1 else f"levels 1 to {task.levels}"
    about = sentence(inspect.cleandoc(type(task).__doc__ or "").split("\n\n")[0])
    return f"{task.called} ({levels}){': ' if about else ''}{about}"


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 100 else f"{text[:99]}…"


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
