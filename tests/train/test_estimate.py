import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

import fathom.train.estimate as estimate
from fathom.config import PretrainRecipe, preset
from fathom.errors import UserError
from fathom.model.transformer import Transformer
from fathom.train.estimate import dry_run, estimate_memory, run_tokens
from fathom.train.machine import GemmSpeed, measure_gemm_peak, use_bf16, use_compiler
from fathom.train.optimizers import build_optimizer
from fathom.train.schedule import micro_batches_at


@pytest.mark.parametrize("optimizer", [{"name": "adamw"}, {"name": "muon", "state_dtype": "bfloat16"}])
def test_optimizer_memory_is_what_the_optimizer_keeps(recipe: PretrainRecipe, optimizer: dict[str, str]) -> None:
    """The estimate of weights, gradients and optimizer state equals the bytes of the real tensors."""
    recipe = recipe.replace(optimizer=optimizer)
    model = Transformer(recipe.model)
    model.init_weights(0)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer_state = build_optimizer(model, recipe.optimizer)
    optimizer_state.step(1e-3)
    memory = estimate_memory(recipe)
    assert memory.weights == memory.gradients == sum(p.nbytes for p in model.parameters())
    kept = sum(t.nbytes for name, t in optimizer_state.state_dict().items() if not name.endswith(".step"))
    assert memory.optimizer == kept
    assert memory.checkpoint_copy == memory.weights + memory.optimizer
    assert memory.total > memory.program > 0


def test_run_tokens_counts_the_ramp(recipe: PretrainRecipe) -> None:
    """Tokens of a run are the sum of its steps' batches."""
    ramped = recipe.replace(
        schedule={"batch_ramp": 0.5, "batch_start": 0.5, "warmup_steps": 0},
        train=recipe.train.replace(steps=100).model_dump(),
    )
    assert run_tokens(recipe) == 8 * 64
    assert run_tokens(ramped) == sum(32 * micro_batches_at(s, 100, 2, ramped.schedule) for s in range(100))
    assert run_tokens(ramped) < 100 * 64


def test_dry_run_of_the_largest_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSeek-V3 itself can be estimated on a small machine: nothing of its size is allocated."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(estimate, "measure_gemm", lambda dtype: GemmSpeed(peak=8e11, sustained=7.9e11, cores=1.0))
    recipe = PretrainRecipe(name="v3", model=preset("deepseek-v3"), data={"sequence_length": 4096},
                            train={"micro_batch": 1, "precision": "bf16"})  # fmt: skip
    output = io.StringIO()
    dry_run(recipe, Console(file=output, width=400))
    for words in ("671,026,419,200", "37,552,297,472 active", "800 GFLOP/s", 'name = "v3"', "GFLOP per token of a",
                  "does not exist and will be built from stdlib", "  # Optimizer steps."):  # fmt: skip
        assert words in output.getvalue()


@pytest.mark.parametrize(
    ("speed", "said"),
    [
        (GemmSpeed(peak=4e11, sustained=3.6e11, cores=0.95), "about 1.0 minutes if"),
        (GemmSpeed(peak=4e11, sustained=2e11, cores=1.0), "1.0 minutes to 2.0 minutes if"),
        (GemmSpeed(peak=2e11, sustained=2e11, cores=0.5), "1.0 minutes to 2.0 minutes if"),
    ],
)
def test_time_on_a_busy_machine_is_a_range(
    speed: GemmSpeed, said: str, recipe: PretrainRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products that scatter, or a process that was not given its cores, make a range and the word busy."""
    monkeypatch.setattr(estimate, "measure_gemm", lambda dtype: speed)
    monkeypatch.setattr(estimate, "flops_per_token", lambda *_: 60 * 4e11 * 0.25 / run_tokens(recipe))
    rows = dict(estimate.estimate_rows(recipe))
    assert rows["time"].startswith(said)
    assert ("busy" in rows["this machine"]) == ("to" in said)


def test_peak_is_a_rate() -> None:
    """The measured peak of this machine lies between a slow core and a large accelerator."""
    assert 1e9 < measure_gemm_peak(torch.float32) < 1e16


def test_precision_and_compile_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Explicit settings are taken as they are; `on` without a compiler is refused."""
    assert (use_bf16("bf16"), use_bf16("fp32"), use_compiler("off")) == (True, False, False)
    monkeypatch.setattr("fathom.train.machine.has_compiler", lambda: False)
    assert use_compiler("auto") is False
    with pytest.raises(UserError, match="no compiler here"):
        use_compiler("on")
