import errno
import io
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import fathom.train.pretrain as module
from fathom.config import PretrainRecipe
from fathom.data import build
from fathom.errors import UserError
from fathom.train.metrics import MetricsLog, read_metrics
from fathom.train.pretrain import RunResult, pretrain
from fathom.train.run import run_folder
from fathom.train.state import damage

TIMES = {"seconds", "tokens_per_second", "gemm_share"}
VARIANTS = {
    "adamw": {},
    "muon": {"optimizer": {"name": "muon", "lr": 1e-2}},
    "bfloat16 state, averaged weights": {
        "optimizer": {"name": "muon", "lr": 1e-2, "state_dtype": "bfloat16"},
        "train": {"ema_decay": 0.9},
    },
    "FP8, bfloat16 state": {
        "optimizer": {"lr": 1e-2, "state_dtype": "bfloat16"},
        "train": {"precision": "fp8", "recompute": True, "compile": "auto"},
    },
    "bfloat16, batch ramp": {"train": {"precision": "bf16"}, "schedule": {"warmup_steps": 2, "batch_ramp": 0.4}},
}


@pytest.fixture(autouse=True)
def _no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "measure_gemm_peak", lambda dtype: 1e12)


def changed(recipe: PretrainRecipe, changes: dict[str, dict[str, Any]]) -> PretrainRecipe:
    sections = {name: getattr(recipe, name).replace(**fields) for name, fields in changes.items()}
    return recipe.replace(**{name: section.model_dump() for name, section in sections.items()})


def run(recipe: PretrainRecipe, runs: Path, **options: Any) -> RunResult:
    return pretrain(recipe, runs=runs, **({"console": Console(quiet=True)} | options))


def content(folder: Path) -> dict[str, Any]:
    """Everything in a run's folder that must not differ: bytes of its files, metrics without times."""
    files = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "tensorboard" not in path.parts
    }
    del files["metrics.jsonl"]
    lines = [{k: v for k, v in line.items() if k not in TIMES} for line in read_metrics(folder / "metrics.jsonl")]
    return files | {"metrics": lines}


def assert_same(one: Path, other: Path) -> None:
    first, second = content(one), content(other)
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send this process a SIGTERM in the middle of a step."""
    real = module.train_step

    def train_step(training: Any, recipe: PretrainRecipe) -> dict[str, Any]:
        if training.progress.step == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(training, recipe)

    monkeypatch.setattr(module, "train_step", train_step)


@pytest.mark.parametrize("variant", VARIANTS)
def test_resumed_equals_uninterrupted(recipe: PretrainRecipe, variant: str, tmp_path: Path) -> None:
    """N steps and N more after a kill give the same weights, optimizer state and metrics as 2N, bit for bit."""
    recipe = changed(recipe, VARIANTS[variant])
    run(recipe, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    # Killed after its last metrics were written and before the checkpoint was: the metrics have to be cut back.
    shutil.rmtree(tmp_path / "killed/run/checkpoints/step_00000008")
    assert run(recipe, tmp_path / "killed", resume=True).step == 8
    assert_same(tmp_path / "whole/run", tmp_path / "killed/run")


def test_one_seed_one_folder(recipe: PretrainRecipe, tmp_path: Path) -> None:
    """Two runs with one seed write the same bytes; another seed writes others."""
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        run(recipe.replace(seed=seed), tmp_path / name)
    assert_same(tmp_path / "one/run", tmp_path / "same/run")
    weights = [
        (tmp_path / n / "run/checkpoints/step_00000008/model-00001-of-00001.safetensors").read_bytes()
        for n in ("one", "other")
    ]
    assert weights[0] != weights[1]


def test_a_signal_saves_and_the_rest_is_the_same(
    recipe: PretrainRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM in a step ends the run after it with a checkpoint, and resuming from there changes nothing."""
    recipe = changed(recipe, {"checkpoint": {"every": 100}})
    run(recipe, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        result = run(recipe, tmp_path / "stopped")
    assert (result.interrupted, result.step) == (True, 3)
    assert result.checkpoint == tmp_path / "stopped/run/checkpoints/step_00000003"
    finished = run(recipe, tmp_path / "stopped", resume=True)
    assert (finished.interrupted, finished.step) == (False, 8)
    shutil.rmtree(result.checkpoint)
    assert_same(tmp_path / "whole/run", tmp_path / "stopped/run")


def test_signal_handlers_are_given_back(recipe: PretrainRecipe, tmp_path: Path) -> None:
    """After a run the process handles signals as it did before."""
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    run(changed(recipe, {"train": {"steps": 1}}), tmp_path)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_only_the_newest_checkpoints_stay(recipe: PretrainRecipe, tmp_path: Path) -> None:
    """`checkpoint.keep` checkpoints stay, the newest ones, and no leftovers."""
    run(changed(recipe, {"checkpoint": {"every": 2, "keep": 2}}), tmp_path)
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == ["step_00000006", "step_00000008"]


def test_existing_run_is_refused(recipe: PretrainRecipe, tmp_path: Path) -> None:
    """A second run of one name is refused with the ways out, and leaves the first as it was."""
    short = changed(recipe, {"train": {"steps": 1}})
    run(short, tmp_path)
    before = content(tmp_path / "run")
    with pytest.raises(UserError, match=r"--resume.*--overwrite.*--name"):
        run(short, tmp_path)
    assert content(tmp_path / "run") == before
    assert run(short, tmp_path, overwrite=True).step == 1


def test_nothing_to_resume_is_said(recipe: PretrainRecipe, tmp_path: Path) -> None:
    """`--resume` without a run says so and makes nothing."""
    with pytest.raises(UserError, match="no run to resume"):
        run(recipe, tmp_path, resume=True)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_run_is_left_alone(recipe: PretrainRecipe, tmp_path: Path) -> None:
    """Not even `--overwrite` deletes a folder that Fathom did not write."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="is not a run"):
        run(recipe, tmp_path, overwrite=True)
    assert (tmp_path / "run" / "thesis.txt").exists()


def test_changed_arithmetic_is_refused_by_name(recipe: PretrainRecipe, tmp_path: Path) -> None:
    """Resuming with other arithmetic names the fields and the rates; other bookkeeping is accepted."""
    run(changed(recipe, {"train": {"steps": 4}}), tmp_path)
    different = changed(recipe, {"optimizer": {"lr": 5e-3}, "train": {"batch_tokens": 32}})
    with pytest.raises(UserError, match=r"optimizer\.lr, train\.batch_tokens, train\.steps;.*--accept-changes"):
        run(different, tmp_path, resume=True)
    with pytest.raises(UserError, match=r"train\.steps"):
        run(changed(recipe, {"train": {"steps": 3}}), tmp_path, resume=True)
    with pytest.raises(UserError, match=r"train\.steps;.*learning rate 0\.00863 in step 4, 0\.01 in the next"):
        run(recipe, tmp_path, resume=True)
    bookkeeping = changed(recipe, {"train": {"steps": 4}, "checkpoint": {"every": 1}, "eval": {"every": 2}})
    assert run(bookkeeping, tmp_path, resume=True).step == 4
    output = io.StringIO()
    assert run(different, tmp_path, resume=True, accept_changes=True, console=Console(file=output)).step == 8
    assert "learning rate 0.00863 in step 4, 0.005 in the next" in output.getvalue()


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("model.rms_norm_eps", {"model": {"rms_norm_eps": 1e-5}}),
        ("data.fim_rate", {"data": {"fim_rate": 0.5}}),
        ("optimizer.name", {"optimizer": {"name": "muon"}}),
        ("optimizer.state_dtype", {"optimizer": {"state_dtype": "bfloat16"}}),
    ],
)
def test_what_nobody_can_insist_on(
    recipe: PretrainRecipe, field: str, changes: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    """A change that the saved state cannot follow is refused as such, and --accept-changes is not offered."""
    run(changed(recipe, {"train": {"steps": 4}}), tmp_path)
    for accept in (False, True):
        with pytest.raises(UserError, match=rf"{field} changed, which cannot be insisted on") as error:
            run(changed(recipe, changes), tmp_path, resume=True, accept_changes=accept)
        assert "--accept-changes" not in str(error.value)


def test_one_process_per_run(recipe: PretrainRecipe, tmp_path: Path) -> None:
    """While a process trains in a folder another is refused, whatever it asks for; afterwards it is not."""
    run(recipe, tmp_path)
    before = content(tmp_path / "run")
    with run_folder(tmp_path / "run"):
        for way in ({"resume": True}, {"overwrite": True}, {}):
            with pytest.raises(UserError, match="another process is training here"):
                run(recipe, tmp_path, **way)
        assert content(tmp_path / "run") == before
    assert run(recipe, tmp_path, resume=True).step == 8


def test_overwrite_refused_keeps_the_old_run(
    recipe: PretrainRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever refuses a run, the one it was to replace is untouched: no compiler, no ramp, a full disk."""
    run(changed(recipe, {"train": {"steps": 1}}), tmp_path)
    before = content(tmp_path / "run")
    ramp = changed(recipe, {"train": {"batch_tokens": 32}, "schedule": {"batch_ramp": 0.5}})
    with pytest.raises(UserError, match="one micro-batch, which cannot grow"):
        run(ramp, tmp_path, overwrite=True)
    monkeypatch.setattr("fathom.train.machine.has_compiler", lambda: False)
    with pytest.raises(UserError, match="no compiler"):
        run(changed(recipe, {"train": {"compile": "on"}}), tmp_path, overwrite=True)
    monkeypatch.setattr(os, "replace", _full_disk)
    with pytest.raises(UserError, match="No space left"):
        run(recipe, tmp_path, overwrite=True)
    assert content(tmp_path / "run") == before


def test_full_disk_at_the_start_leaves_nothing(
    recipe: PretrainRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that could not be begun leaves no folder, and can be started when there is room."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", _full_disk)
        with pytest.raises(UserError, match="No space left"):
            run(recipe, tmp_path / "runs")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "runs/run").mkdir(parents=True)
    (tmp_path / "runs/run/.recipe.toml.partial").touch()  # of a start that was killed
    assert run(recipe, tmp_path / "runs").step == 8


def _full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("step", [6, 8])
def test_an_evaluation_that_fails_costs_no_checkpoint(
    recipe: PretrainRecipe, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ended between checkpoint and evaluation, with half of it written, a run has both when it is resumed."""
    recipe = changed(recipe, {"checkpoint": {"every": 2}})
    run(recipe, tmp_path / "whole")

    def fail(log: Any, kind: str, at: int, values: dict[str, Any]) -> None:
        if (kind, at) == ("eval", step):
            raise UserError("ended")
        real(log, kind, at, values)

    real = MetricsLog.write
    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "write", fail)
        with pytest.raises(UserError, match="ended"):
            run(recipe, tmp_path / "ended")
    assert damage(tmp_path / f"ended/run/checkpoints/step_{step:08d}") is None
    assert run(recipe, tmp_path / "ended", resume=True).evaluation
    assert_same(tmp_path / "whole/run", tmp_path / "ended/run")


@pytest.mark.parametrize("line", ["{", "[]", '{"kind": "train"}'])
def test_a_bad_line_of_metrics_is_named(recipe: PretrainRecipe, line: str, tmp_path: Path) -> None:
    """A line that is none is an error with file and number, and nothing is cut."""
    run(recipe, tmp_path)
    file = tmp_path / "run/metrics.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:3], line, *lines[3:]]) + "\n")
    before = file.read_bytes()
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 4 is not a line of metrics"):
        run(recipe, tmp_path, resume=True)
    assert file.read_bytes() == before


def test_data_may_move_but_not_change(recipe: PretrainRecipe, data: Path, tmp_path: Path) -> None:
    """Resuming from a copy of the data elsewhere works; other data under the same recipe are refused."""
    run(changed(recipe, {"train": {"steps": 4}}), tmp_path / "runs")
    resumed = {"resume": True, "accept_changes": True}
    (tmp_path / "text").mkdir()
    for number in range(40):
        (tmp_path / "text" / f"{number}.txt").write_text(f"other words {number} " * 20)
    build([tmp_path / "text"], tmp_path / "other", vocab_size=300, holdout=0.1)
    with pytest.raises(UserError, match="was saved with dataset"):
        run(changed(recipe, {"data": {"path": str(tmp_path / "other")}}), tmp_path / "runs", **resumed)
    shutil.copytree(data, tmp_path / "moved")
    assert run(changed(recipe, {"data": {"path": str(tmp_path / "moved")}}), tmp_path / "runs", **resumed).step == 8


def test_tokenizer_too_large_for_the_model(recipe: PretrainRecipe, tmp_path: Path) -> None:
    """Data whose tokens the model has no embedding for is refused before a run folder exists."""
    with pytest.raises(UserError, match="vocab_size"):
        run(changed(recipe, {"model": {"vocab_size": 200}}), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_accumulated_micro_batches_are_one_large_batch(recipe: PretrainRecipe, tmp_path: Path) -> None:
    """Two micro-batches of two sequences are a batch of four: the same loss, gradient norm and expert load."""
    lines = []
    for size in (2, 4):
        folder = run(changed(recipe, {"train": {"micro_batch": size, "steps": 3}}), tmp_path / str(size)).folder
        lines.append([line for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "train"])
    for several, one in zip(*lines, strict=True):
        for name in ("tokens", "loss", "bits_per_byte", "mtp_loss", "balance", "max_vio", "grad_norm"):
            assert several[name] == pytest.approx(one[name], rel=1e-4), name
