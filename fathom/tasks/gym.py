"""Every dataset of the `reasoning-gym` library as a task: `gym:chain_sum`, `gym:chain_sum?min_terms=2&max_terms=3`.

Without options the levels are those of the library's curriculum for the dataset (1: every attribute at its lowest);
levels that the library itself refuses are left out, and where none is left there is one, its defaults. With options
there is one level: they say how hard it is. Some generators need seconds for a problem of a high level.

The library's scores are its own idea of partial credit: 0.01 to 0.1 for wrong answers that look like one, and a share
for a right answer among other words. Unless `strict=false`, only its full score counts, as 1, and everything else
is 0; with it, its score is given as it is.

What the library's checkers do with a model's text is bounded: they run in a process of their own (`isolation`); those
that *evaluate* the text as Python, and some that are easily fooled, see only text made like an answer (`_READABLE`);
and two that take wrong answers for right (`_OWN_RULES`) are not asked.
"""

import dataclasses
import functools
import pickle
import random
import re
import typing
from collections.abc import Callable, Mapping
from typing import Any

from fathom.errors import UserError, nearest
from fathom.tasks.countdown import makes
from fathom.tasks.isolation import isolated
from fathom.tasks.options import read_options
from fathom.tasks.task import Problem, Task

PREFIX = "gym:"
_SHORTEST_BOUND = 2000
_FORMULA = re.compile(
    r"(?:(?:a?(?:sin|cos|tan)h?|exp|log|ln|sqrt|Abs|pi|[A-Za-z])(?![A-Za-z0-9])|[0-9]+(?:\.[0-9]+)?|[-+*/^() \n])*"
)
_CALCULATION = re.compile(r"(?:[0-9]+(?:\.[0-9]+)?|\*(?!\*)|[-+/() \n])*")
_READABLE = {
    "binary_matrix": re.compile(r"[0-9, \[\]\n]*"),
    "complex_arithmetic": re.compile(r"[-+0-9.ij ()]*"),
    "countdown": _CALCULATION,
    "intermediate_integration": _FORMULA,
    "n_queens": re.compile(r"""[Q_, '"\[\]\n]*"""),
    "polynomial_multiplication": _FORMULA,
    "simple_integration": _FORMULA,
    "sokoban": re.compile(r"[LRUD]*"),
    "spiral_matrix": re.compile(r"[-0-9, \[\]\n]*"),
    "string_insertion": re.compile(r"""[A-Z, '"\[\]]*"""),
}
"""The only answers shown to checkers that evaluate them, take `nan` for right or skip what they cannot read."""
_OWN_RULES: dict[str, Callable[[str, dict[str, Any]], bool]] = {
    "game_of_life_halting": lambda answer, entry: answer.lower() == entry["answer"].lower(),
    "puzzle24": lambda answer, entry: makes(answer, entry["metadata"]["numbers"], 24),
}
"""In place of checkers that take any text for right, or any four numbers."""
_SLOW_TO_MAKE = frozenset(
    {"arc_agi", "codeio", "figlet_font", "group_anagrams", "rearc", "spell_backward", "word_ladder"}
)
"""Datasets that read large files when they are made, and whose problems depend on nothing but seed and options."""
_HASH_ORDERED = frozenset({"codeio", "isomorphic_strings", "knight_swap", "ransom_note", "word_ladder"})
"""Datasets whose problems depend on the order of sets, which differs from run to run but not in the other process."""


class Gym(Task):
    """One dataset of reasoning-gym."""

    def __init__(self, dataset: str, options: Mapping[str, str]) -> None:
        """`options` are the dataset's own, and `strict`, as text. Raises `UserError` for what the library refuses."""
        _require(dataset)
        self.name = PREFIX + dataset
        self._dataset = dataset
        own = dict(options)
        self._strict = read_options({"strict": own.pop("strict", "true")}, {"strict": bool}, where=self.name)["strict"]
        self._configs = [_configured(dataset, own)] if own else _curriculum(dataset)
        self.levels = len(self._configs)

    def problem(self, random: random.Random, level: int) -> Problem:
        """The library's problem for a seed drawn with `random`; a few datasets give no answer of their own."""
        call = (self._dataset, pickle.dumps(self._configs[level - 1]), random.randrange(2**31))
        if self._dataset in _HASH_ORDERED:
            entry = isolated(make_entry, *call, needs=("reasoning_gym",))
        else:
            entry = make_entry(*call)
        answer = entry["answer"]
        return Problem(entry["question"], "" if answer is None else str(answer), level, data={"entry": entry})

    def check(self, problem: Problem, answer: str) -> float:
        """The library's score; raises what its checker raises."""
        if problem.answer and answer == problem.answer:
            return 1.0
        entry = problem.data["entry"]
        source = entry["metadata"].get("source_dataset", self._dataset)
        answer = answer.strip()
        if source in _OWN_RULES:
            return float(_OWN_RULES[source](answer, entry))
        if not answer or len(answer) > max(_SHORTEST_BOUND, 4 * len(problem.answer)):
            return 0.0
        if source in _READABLE and not _READABLE[source].fullmatch(answer):
            return 0.0
        config = pickle.dumps(self._configs[problem.level - 1])
        score = isolated(score_answer, self._dataset, config, entry, answer, needs=("reasoning_gym",))
        return float(score >= 1) if self._strict else score


def dataset_names() -> list[str]:
    """All that may stand after `gym:`; raises `UserError` where the library is not installed."""
    return sorted(_datasets())


def make_entry(dataset: str, config: bytes, seed: int) -> dict[str, Any]:
    """The library's problem for `seed`. Its dataset is made anew: only so does every problem depend on `seed` alone."""
    if dataset not in _SLOW_TO_MAKE:
        return _make(dataset, config, seed)[0]
    kept = _kept(dataset, config)
    kept.seed = seed
    return kept[0]


def score_answer(dataset: str, config: bytes, entry: dict[str, Any], answer: str) -> float:
    """What the library thinks of `answer`."""
    return float(_kept(dataset, config).score_answer(answer, entry))


@functools.lru_cache(maxsize=8)
def _kept(dataset: str, config: bytes) -> Any:
    return _make(dataset, config, seed=0)


def _make(dataset: str, config: bytes, seed: int) -> Any:
    """A dataset of the library that holds one problem."""
    return _datasets()[dataset][0](dataclasses.replace(pickle.loads(config), seed=seed, size=1))


def _datasets() -> dict[str, tuple[type, type]]:
    """The library's datasets: class and class of configuration."""
    try:
        import reasoning_gym  # noqa: F401 (fills the table)
        from reasoning_gym.factory import DATASETS
    except ModuleNotFoundError as error:
        raise UserError(
            f"tasks of reasoning-gym need the package {error.name}: pip install 'fathom-lm[tasks]'"
        ) from None
    return DATASETS


def _require(dataset: str) -> None:
    if dataset not in _datasets():
        raise UserError(
            f"task {PREFIX}{dataset}: reasoning-gym has no such dataset{nearest(dataset, _datasets())}; "
            "'fathom tasks list' names them"
        )


def _configured(dataset: str, options: Mapping[str, str]) -> Any:
    """The dataset's configuration with `options`."""
    make = _datasets()[dataset][1]
    hints = typing.get_type_hints(make)
    kinds = {field.name: hints[field.name] for field in dataclasses.fields(make) if field.name not in ("seed", "size")}
    where = PREFIX + dataset
    if dataset == "composite" and "datasets" in options:
        return _checked(make(datasets=_mixture(options["datasets"])), where)
    return _checked(make(**read_options(options, kinds, where=where)), where)


def _mixture(names: str) -> list[Any]:
    """What `composite` draws from: datasets with their defaults, each as often."""
    from reasoning_gym.composite import DatasetSpec

    for name in names.split(","):
        _require(name)
    return [DatasetSpec(name, 1.0, {}) for name in names.split(",")]


def _checked(config: Any, where: str) -> Any:
    if fault := _fault(config):
        raise UserError(f"task {where}: {fault}")
    return config


def _curriculum(dataset: str) -> list[Any]:
    """A configuration for every level that the library has and accepts; its defaults where that is none."""
    from reasoning_gym.factory import CURRICULA

    configs = []
    if dataset in CURRICULA:
        curriculum = CURRICULA[dataset]()
        for level in range(max((len(attribute.levels) for attribute in curriculum.attributes.values()), default=0)):
            curriculum.set_global_level(level)
            config = curriculum.generate_configuration({"seed": 0, "size": 1})
            if not _fault(config):
                configs.append(config)
    return configs or [_configured(dataset, {})]


def _fault(config: Any) -> str:
    """What the library has against a configuration; nothing where it has no check."""
    if not hasattr(config, "validate"):
        return ""
    try:
        config.validate()
    except (AssertionError, ValueError, TypeError) as error:
        return str(error) or "the library refuses these options"
    return ""
