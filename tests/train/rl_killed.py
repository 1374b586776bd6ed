"""Train by rewards and be killed in the midst of a step: `python -m tests.train.rl_killed RECIPE RUNS STEP`.

The signal comes when the step's completions are drawn, its weights are not yet changed, and the checkpoint that was due
before it is on disk: what a slow disk would lose is another matter.
"""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import fathom.train.rl as rl
from fathom.config import read_recipe
from fathom.config.rl import RLRecipe
from fathom.train.learner import Learner
from fathom.train.run import RunFolder
from fathom.train.state import checkpoint_name


def main(recipe: Path, runs: Path, step: int) -> None:
    original, settings = rl.update, read_recipe(recipe, [], RLRecipe)
    due = checkpoint_name((step - 1) // settings.checkpoint.every * settings.checkpoint.every)
    checkpoint = RunFolder(runs / settings.name).checkpoints / due

    def update(learner: Learner, groups: Any) -> dict[str, Any]:
        if learner.progress.step + 1 == step:
            give_up = time.monotonic() + 120
            while not checkpoint.is_dir():
                assert time.monotonic() < give_up, f"{checkpoint} is not written"
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return original(learner, groups)

    rl.update = update
    rl.train_rl(settings, runs=runs)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
