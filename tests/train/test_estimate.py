import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

import fathom.train.estimate as estimate
import fathom.train.rl_estimate as rl_estimate
from fathom.config import PretrainRecipe, preset
from fathom.config.hf import to_hf
from fathom.config.recipe import TrainSection
from fathom.config.rl import RLRecipe
from fathom.data import train_bpe
from fathom.engine.engine import Engine
from fathom.errors import UserError
from fathom.model.accounting import activation_bytes
from fathom.model.transformer import Transformer
from fathom.train.estimate import dry_run, estimate_memory, run_tokens
from fathom.train.machine import GemmSpeed, measure_gemm_peak, use_bf16, use_compiler
from fathom.train.optimizers import build_optimizer
from fathom.train.schedule import micro_batches_at
from tests.model.configs import LLAMA
from tests.train.tiny import MODEL


def test_activations_are_those_that_layers_keep(recipe: PretrainRecipe) -> None:
    """Where layers decide it themselves the estimate is the accounting's, MTP module included."""
    batch = {"tokens": 32, "sequences": 2}
    found = []
    for fields in ({"precision": "fp8"}, {"precision": "fp8", "recompute": True}):
        train = recipe.train.model_dump() | fields
        said = estimate_memory(recipe.replace(train=train)).activations
        how = {"precision": "fp8", "recompute": "recompute" in fields}
        assert said == sum(activation_bytes(recipe.model, i, **batch, **how) for i in range(4))
        found.append(said)
    assert found[1] < 0.7 * found[0]


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
    assert (use_bf16("bf16"), use_bf16("fp32"), use_bf16("fp8")) == (True, False, True)
    assert use_compiler(TrainSection(compile="off")) is False
    monkeypatch.setattr("fathom.train.machine.has_compiler", lambda: False)
    assert use_compiler(TrainSection()) is False
    with pytest.raises(UserError, match="no compiler here"):
        use_compiler(TrainSection(compile="on"))


# ---------------------------------------------------------------------------------------------- reinforcement learning

QUIET = GemmSpeed(peak=4e11, sustained=4e11, cores=1.0)


@pytest.fixture
def rl(tmp_path: Path) -> RLRecipe:
    """Two problems with four completions of ten tokens each, and three evaluations in seven steps."""
    return RLRecipe(
        name="rl",
        model=str(tmp_path / "model"),
        task={"name": "modular", "levels": 2},
        prompt={"style": "template"},
        rollout={"problems": 2, "samples": 4, "max_tokens": 10},
        train={"steps": 7, "rows": 41, "precision": "fp32"},
        eval={"every": 4, "problems": 6, "budgets": [0, 2], "probe": True},
    )


def test_the_work_of_a_step_is_what_a_hand_computes(rl: RLRecipe) -> None:
    """Tokens and FLOPs of a small Llama: 53,376 multiplied numbers, 3 layers of 4 heads with 12 + 12 numbers each."""
    work = rl_estimate.step_work(LLAMA, rl, [5, 7])
    assert (work.drawn, work.rows, work.piece) == (2 * 4 * 10, (5 + 4 * 9) + (7 + 4 * 9), 43)
    one, position = 6 * 53_376, 3 * 3 * 2 * 4 * 24  # per token; and per token for each that it sees

    def train(tokens: int, seen: float) -> float:
        return tokens * (one + position * seen)

    update = train(5, 2.5) + train(36, 5 + 5) + train(7, 3.5) + train(36, 7 + 5)
    draw = (train(5, 2.5) + train(7, 3.5) + train(40, 5 + 5) + train(40, 7 + 5)) / 3
    assert work.update_flops == pytest.approx(update)
    assert work.draw_flops == pytest.approx(draw)
    again = rl.replace(
        train=rl.train.replace(mini_batches=2).model_dump(),
        loss={"kl": 0.1},
        rollout=rl.rollout.replace(resample=2).model_dump(),
    )
    more = rl_estimate.step_work(LLAMA, again, [5, 7])
    assert (more.drawn, more.rows, more.piece) == (3 * 80, 84, 43)
    assert more.update_flops == pytest.approx(update * 5 / 3)
    assert more.draw_flops == pytest.approx(3 * draw)


def test_storage_is_what_training_keeps(rl: RLRecipe) -> None:
    """Weights with MTP modules, moments and gradients without, and the engine's cache equal the real ones in bytes."""
    model = Transformer(MODEL)
    model.init_weights(0)
    found = rl_estimate.storage(MODEL, rl, 100)
    trained = sum(p.nbytes for name, p in model.named_parameters() if not name.startswith("mtp."))
    assert found.weights == sum(p.nbytes for p in model.parameters()) > trained
    assert (found.gradients, found.optimizer, found.reference) == (trained, 2 * trained, 0)
    assert found.checkpoint == found.weights + 2 * trained
    settings = rl_estimate.engine_settings(rl, MODEL)
    with Engine(model, train_bpe(["0123456789"], 266), settings) as engine:
        assert found.cache == engine._cache.nbytes()
    elsewhere = rl.replace(rollout=rl.rollout.replace(endpoint="http://127.0.0.1:1/v1").model_dump(), loss={"kl": 0.1})
    remote = rl_estimate.storage(MODEL, elsewhere, 100)
    assert (remote.cache, remote.engine, remote.reference) == (0, 0, found.weights)


def test_evaluations_are_counted(rl: RLRecipe) -> None:
    """At steps 0, 4 and 7; the problems are put twice more for the probe, and once for each budget at the end."""
    found = rl_estimate.measuring(LLAMA, rl, [5] * 6)
    assert (found.times, found.drawn) == (3, (3 + 2 + 2) * 6 * 10)
    assert found.draw_flops == pytest.approx(42 * rl_estimate.draw_flops(LLAMA, 5, 1, 10))


def test_an_estimate_reads_no_weights(rl: RLRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with a config and a tokenizer is enough, and everything that a run takes is in the table."""
    monkeypatch.setattr(rl_estimate, "measure_gemm", lambda dtype: QUIET)
    folder = tmp_path / "model"
    folder.mkdir()
    tokenizer = train_bpe(["0123456789"], 266)
    config = to_hf(MODEL.replace(vocab_size=tokenizer.vocab_size), dtype="float32")
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer.save(folder)
    said = said_by_dry_run(rl)
    for words in ("in MTP modules", "80 tokens, 4 completions of 10 for each of 2", "3 of 6 problems, 420 tokens",
                  "the engine's weights", "a checkpoint (2 kept)", "to draw and", "seconds a step", "an estimate",
                  "  # Per step (R1: 32)."):  # fmt: skip
        assert words in said
    with pytest.raises(UserError, match=r"rollout\.max_tokens = 64"):
        said_by_dry_run(rl.replace(rollout=rl.rollout.replace(max_tokens=64).model_dump()))


def test_a_model_that_is_not_there_yet_is_said(rl: RLRecipe, tmp_path: Path) -> None:
    """The recipe is printed, with what is missing in the place of the estimate; a wrong task is refused as ever."""
    said = said_by_dry_run(rl)
    assert 'name = "rl"' in said
    assert f"{tmp_path / 'model'}: no such model folder; what the run takes can be said once it is there" in said
    assert "nor fetched from a hub" in said_by_dry_run(rl.replace(model="nobody/nothing"))
    with pytest.raises(UserError, match=r"task\.levels = 99"):
        said_by_dry_run(rl.replace(task={"name": "modular", "levels": 99}))


def said_by_dry_run(recipe: RLRecipe) -> str:
    output = io.StringIO()
    rl_estimate.dry_run(recipe, Console(file=output, width=400, soft_wrap=True))
    return output.getvalue()
