"""Train by rewards and be killed in the midst of a step: `python -m tests.train.rl_killed RECIPE RUNS STEP`.

The signal comes when the step's completions are drawn and its weights are not yet changed.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import fathom.train.rl as rl
from fathom.config import read_recipe
from fathom.config.rl import RLRecipe
from fathom.train.learner import Learner


def main(recipe: Path, runs: Path, step: int) -> None:
    original = rl.update

    def update(learner: Learner, groups: Any) -> dict[str, Any]:
        if learner.progress.step + 1 == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(learner, groups)

    rl.update = update
    rl.train_rl(read_recipe(recipe, [], RLRecipe), runs=runs)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
