"""Run the data factory and be killed in the midst of a write: `python -m tests.synth.killed RECIPE RUNS BATCHES`.

After so many batches the next one is cut short by SIGKILL, with half of its bytes on disk.
"""

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from fathom.config import read_recipe
from fathom.config.synth import SynthRecipe
from fathom.synth.candidates import DrawnFile, Solved
from fathom.synth.factory import synthesize


def main(recipe: Path, runs: Path, batches: int) -> None:
    whole, written = DrawnFile.append, 0

    def append(file: DrawnFile, solved: Sequence[Solved]) -> None:
        nonlocal written
        before = file.path.stat().st_size if file.path.exists() else 0
        whole(file, solved)
        written += 1
        if written > batches:
            os.truncate(file.path, (before + file.path.stat().st_size) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    DrawnFile.append = append
    synthesize(read_recipe(recipe, [], SynthRecipe), runs=runs)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
