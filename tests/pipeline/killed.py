"""Run the pipeline in a file and be killed, as by kill -9, in its midst.

python -m tests.pipeline.killed FILE RUNS inside|between
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import fathom.pipeline.run as pipelines
import fathom.train.sft as sft
from tests.pipeline.house import run

original = sft.update


def kill(*_: Any, **__: Any) -> None:
    """This process."""
    os.kill(os.getpid(), signal.SIGKILL)


def update(student: sft.Student, *arguments: Any) -> dict[str, Any]:
    """A step, but the second is the last."""
    if student.progress.step == 2:
        kill()
    return original(student, *arguments)


if __name__ == "__main__":
    if sys.argv[3] == "inside":
        sft.update = update
    else:
        pipelines.train_sft = pipelines._TRAINERS["sft"] = kill
    run(Path(sys.argv[1]), Path(sys.argv[2]))
