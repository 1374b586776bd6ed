"""The table that the first ten minutes end with."""

import json
from pathlib import Path

from fathom.config import read_recipe
from fathom.quickstart import _results, shipped_recipe
from fathom.train.pretrain import RunResult


def test_results_name_what_they_are_of(tmp_path: Path) -> None:
    """Held-out and last batch's balance are told apart, and the share is of the largest peak measured in the run."""
    train = {"kind": "train", "tokens": 10, "seconds": 1.0, "bits_per_byte": 3.6}
    lines = [
        train | {"step": 1, "loss": 8.3, "tokens_per_second": 1000.0, "gemm_share": 1.25, "max_vio": 2.8},
        train | {"step": 2, "loss": 4.5, "tokens_per_second": 1000.0, "gemm_share": 0.4, "max_vio": 0.43},
        {"kind": "eval", "step": 2, "loss": 4.38, "bits_per_byte": 1.83, "max_vio": 0.14},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    result = RunResult(tmp_path, 2, tmp_path / "checkpoints/step_00000002")
    rows = dict(_results(read_recipe(shipped_recipe("quickstart"), []), result))
    assert rows["expert balance"].startswith("MaxVio 0.14 on held-out text, 0.43 in the last training batch, 2.80 in")
    assert rows["of this machine"].startswith("40% of peak")
    assert rows["held-out loss"] == "4.380 nats per token (training loss of step 1: 8.300)"
    assert rows["samples"].startswith(str(tmp_path / "samples.md"))
