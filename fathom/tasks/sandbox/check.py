"""What is asked of the sandbox, and what comes back."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Status = Literal["ok", "error", "time", "memory", "output", "exited", "lost", "stopped"]
"""How a check ended:

* `ok`: every input has its output, and the program ended as it should;
* `error`: it raised (one line says what), or returned what is no plain data;
* `time`: too much processor time, or too long by the clock, even if all output had been written;
* `memory`: it asked for more memory than it may have;
* `output`: it printed or returned more than it may;
* `exited`: it ended itself before it was through, or with an exit status other than 0, or crashed;
* `lost`: the worker was killed from outside, twice in a row;
* `stopped`: the sandbox was closed meanwhile.
"""


@dataclass(frozen=True)
class Calls:
    """A program that defines a function, and the arguments to call it with.

    The program is run once, under a `__name__` that is not "__main__"; then its function is called once per element of
    `arguments`, each a tuple of positional arguments. Arguments and returned values are plain data: None, bool, int,
    float, str, bytes, list, tuple, set, frozenset, dict, of exactly these types, nested as one likes.
    """

    program: str
    function: str
    arguments: Sequence[tuple[Any, ...]]


@dataclass(frozen=True)
class Runs:
    """A program that reads standard input and prints; it is run once per element of `inputs`, each time anew."""

    program: str
    inputs: Sequence[str]


Check = Calls | Runs


@dataclass(frozen=True)
class Outcome:
    """What a program gave."""

    outputs: tuple[Any, ...]
    """Returned values, or printed texts (UTF-8, what is none replaced): one per input up to the first that failed."""
    status: Status
    message: str = ""
    """One short printable line where the status is not `ok`; may hold the program's own words."""
