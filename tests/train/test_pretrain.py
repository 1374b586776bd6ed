import errno
import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import fathom.train.metrics as metrics
import fathom.train.pretrain as module
import fathom.train.state as state
from fathom.config import PretrainRecipe, dump_recipe
from fathom.data import Loader, TokenDataset
from fathom.errors import UserError
from fathom.train.evaluate import evaluate
from fathom.train.metrics import MetricsLog, read_metrics
from fathom.train.objective import pretrain_loss
from fathom.train.pretrain import Training, max_violation, pretrain, train_step
from fathom.train.run import RunFolder
from fathom.train.state import damage

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "measure_gemm_peak", lambda dtype: 1e12)


def make_training(recipe: PretrainRecipe) -> Training:
    return module._start(recipe, TokenDataset(recipe.data.path), None)


def with_train(recipe: PretrainRecipe, **fields: Any) -> PretrainRecipe:
    return recipe.replace(train=recipe.train.replace(**fields).model_dump())


def break_loss(monkeypatch: pytest.MonkeyPatch, bad_calls: set[int]) -> None:
    """Multiply the loss of these calls (one per micro-batch, from 0) by infinity."""
    calls = -1

    def broken(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        loss, report = pretrain_loss(*args, **kwargs)
        return (loss * float("inf") if calls in bad_calls else loss), report

    monkeypatch.setattr(module, "pretrain_loss", broken)


def test_bad_step_changes_nothing_but_the_place(recipe: PretrainRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """One bad micro-batch skips the step: weights, router bias, optimizer and average stay, the data go on."""
    recipe = with_train(recipe, ema_decay=0.5)
    training = make_training(recipe)
    train_step(training, recipe)
    dataset = TokenDataset(recipe.data.path)
    before = training.contents(recipe, dataset)
    tensors = {**before.weights, **before.optimizer, **{f"ema {n}": t for n, t in before.ema.items()}}
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    place = training.loader.state()
    break_loss(monkeypatch, {1})
    assert train_step(training, recipe)["skipped"]
    assert [name for name, tensor in tensors.items() if not torch.equal(tensor, copies[name])] == []
    assert (training.progress.step, training.progress.bad_steps, training.progress.bad_in_a_row) == (2, 1, 1)
    assert training.loader.state() != place
    assert not train_step(training, recipe)["skipped"]
    assert training.progress.bad_in_a_row == 0
    assert not torch.equal(training.model.lm_head.weight, copies["lm_head.weight"])


def test_bad_steps_in_a_row_stop_the_run(
    recipe: PretrainRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bad steps are said one by one; the third in a row ends the run and names the last checkpoint, which is whole."""
    recipe = with_train(recipe, max_bad_steps=3)
    break_loss(monkeypatch, {2, 8, 10, 12})  # steps 2, then 5, 6, 7; a checkpoint is due at step 4
    output = io.StringIO()
    with pytest.raises(UserError, match=r"step 7: 3 steps in a row.*step_00000004 is the last good checkpoint"):
        pretrain(recipe, console=Console(file=output, width=200), runs=tmp_path)
    assert damage(tmp_path / "run/checkpoints/step_00000004") is None
    assert re.findall(r"step (\d): skipped", output.getvalue()) == ["2", "5", "6", "7"]
    lines = [line for line in read_metrics(tmp_path / "run/metrics.jsonl") if line["kind"] == "train"]
    assert [line["step"] for line in lines if line["skipped"]] == [2, 5, 6, 7]


def test_full_disk_stops_the_run(recipe: PretrainRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint that cannot be written ends the run in one line; the one before it resumes to the end."""
    real = state.write_model

    def full(folder: Path, *arguments: Any, **options: Any) -> None:
        if "step_00000004" in folder.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(folder, *arguments, **options)

    recipe = recipe.replace(checkpoint={"every": 2})
    with monkeypatch.context() as patch:
        patch.setattr(state, "write_model", full)
        with pytest.raises(UserError, match=r"step 4: .*No space left on device.*step_00000002 is intact"):
            pretrain(recipe, console=Console(quiet=True), runs=tmp_path)
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["step_00000002"]
    assert pretrain(recipe, console=Console(quiet=True), runs=tmp_path, resume=True).step == 8


def test_router_bias_follows_the_load_of_the_whole_batch(recipe: PretrainRecipe) -> None:
    """After a step every router's bias has moved by the rate, by the sign of the load summed over micro-batches."""
    training = make_training(recipe)
    place = training.loader.state()
    loads = []
    for _ in range(2):
        _, report = pretrain_loss(training.model, training.loader.next_batch(), mtp_weight=0.3, balance_weight=0.0)
        loads.append(report.load)
    assert not torch.equal(loads[0], loads[1])
    load = (loads[0] + loads[1]).float()
    training.loader.load_state(place)
    train_step(training, recipe)
    for router, row in zip(training.model.routers, load, strict=True):
        expected = recipe.balance.bias_rate * torch.sign(row.mean() - row)
        torch.testing.assert_close(router.e_score_correction_bias, expected)


def test_max_violation() -> None:
    """MaxVio is the busiest expert's excess over the mean, averaged over routers."""
    assert max_violation(torch.tensor([[2, 2, 2, 2], [8, 0, 0, 0]])) == pytest.approx((0 + 3) / 2)


def test_average_follows_the_weights(recipe: PretrainRecipe) -> None:
    """The average moves by 1 − decay of its distance to the weights after each step."""
    recipe = with_train(recipe, ema_decay=0.75)
    training = make_training(recipe)
    start = training.model.lm_head.weight.detach().clone()
    train_step(training, recipe)
    expected = 0.75 * start + 0.25 * training.model.lm_head.weight.detach()
    torch.testing.assert_close(training.ema["lm_head.weight"], expected)


def test_evaluation_is_of_held_out_text(recipe: PretrainRecipe) -> None:
    """Loss and bits per byte are those of the held-out windows, special tokens outside the second, always the same."""
    data = recipe.data.replace(sequence_length=64).model_dump()
    recipe = recipe.replace(data=data, train=recipe.train.replace(batch_tokens=128).model_dump())
    training = make_training(recipe)
    dataset = TokenDataset(recipe.data.path)
    values = evaluate(training.model, dataset, recipe)
    assert evaluate(training.model, dataset, recipe) == values
    loader = Loader(dataset, split="heldout", sequence_length=64, batch=2, seed=1, fim_rate=0)
    tokens = loader.next_batch()
    logits = training.model(tokens[:, :-1]).detach()
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    sizes = torch.from_numpy(dataset.tokenizer.token_bytes()).long()[tokens[:, 1:].flatten()]
    assert (sizes == 0).any(), "the window has no special token: the test shows nothing"
    assert values["loss"] == pytest.approx(float(nll.mean()), rel=1e-5)
    bits = float(nll[sizes > 0].sum()) / float(torch.tensor(2.0).log()) / int(sizes.sum())
    assert values["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    assert 0 <= values["mtp_acceptance"] <= 1


def test_training_learns(recipe: PretrainRecipe, tmp_path: Path) -> None:
    """Forty steps bring the held-out loss well below that of the first."""
    recipe = with_train(recipe, steps=40).replace(eval={"every": 20, "tokens": 256, "sample_tokens": 0})
    result = pretrain(recipe, console=Console(quiet=True), runs=tmp_path)
    first = read_metrics(result.folder / "metrics.jsonl")[0]["loss"]
    assert result.evaluation["loss"] < 0.7 * first


def test_run_folder_holds_what_was_measured(recipe: PretrainRecipe, tmp_path: Path) -> None:
    """One line per step and evaluation, the same numbers in TensorBoard, a sample per evaluation, the recipe as run."""
    output = io.StringIO()
    folder = pretrain(recipe, console=Console(file=output, width=250), runs=tmp_path).folder
    lines = read_metrics(folder / "metrics.jsonl")
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, 9))
    assert [line["step"] for line in lines if line["kind"] == "eval"] == [3, 6, 8]
    board = EventAccumulator(str(folder / "tensorboard")).Reload()
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert [event.value for event in board.Scalars("train/loss")] == pytest.approx(losses)
    assert re.findall(r"^## Step (\d+)$", (folder / "samples.md").read_text(), re.MULTILINE) == ["3", "6", "8"]
    assert (folder / "recipe.toml").read_text() == dump_recipe(recipe)
    for words in ("step 8/8", "loss", "bits/byte", "tokens/s", "of peak", "MaxVio", "MTP accepts", "held out"):
        assert words in output.getvalue()


def test_run_says_what_it_is_before_the_first_step(recipe: PretrainRecipe, tmp_path: Path) -> None:
    """Name, folder and size come first; a resumed run says where it goes on; nothing compiles without saying so."""
    said = []
    for steps, resume in ((3, False), (4, True)):
        output = io.StringIO()
        changed = with_train(recipe, steps=steps)
        console = Console(file=output, width=250)
        pretrain(changed, console=console, runs=tmp_path, resume=resume, accept_changes=resume)
        said.append(output.getvalue()[: output.getvalue().index("loss")])
    assert all(f"run 'run' in {tmp_path / 'run'}" in lines and "active per token" in lines for lines in said)
    assert ["resuming from step 3 of 4" in lines for lines in said] == [False, True]
    assert "compiling" not in said[0]


def test_share_is_of_the_largest_peak_so_far(
    recipe: PretrainRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A peak measured too low is corrected at the next evaluation, and one that is lower then is not believed."""
    peaks = iter([1e9, 8e9, 2e9, 2e9])
    monkeypatch.setattr(module, "measure_gemm_peak", lambda dtype: next(peaks))
    folder = pretrain(recipe, console=Console(quiet=True), runs=tmp_path).folder
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "train"]
    ratios = [line["tokens_per_second"] / line["gemm_share"] for line in lines]  # evaluations after steps 3, 6, 8
    assert [ratio / ratios[0] for ratio in ratios] == pytest.approx([1, 1, 1, 8, 8, 8, 8, 8])


def test_metrics_after_the_step_are_cut(tmp_path: Path) -> None:
    """Opened at step 2, metrics and samples end there, a torn last line and a sample that looks like a heading too."""
    run = RunFolder(tmp_path)
    with MetricsLog(run, step=0) as log:
        for step in (1, 2, 3):
            log.write("train", step, {"loss": float("nan") if step == 1 else 0.5})
            log.write_sample(step, "", "a\n## Step 1\n")
            if step == 2:
                log.write("eval", step, {"loss": 0.75})
    with run.metrics.open("a") as file:
        file.write('{"kind": "tr')
    with MetricsLog(run, step=2) as log:
        log.write("train", 3, {"loss": 0.25})
    assert [(line["step"], line["loss"]) for line in read_metrics(run.metrics)] == [
        (1, None),
        (2, 0.5),
        (2, 0.75),
        (3, 0.25),
    ]
    assert re.findall(r"^## Step (\d+)$", run.samples.read_text(), re.MULTILINE) == ["1", "2"]


_SMALL_DISK = """
import sys
from pathlib import Path
from fathom.errors import UserError
from fathom.train.metrics import MetricsLog
from fathom.train.run import RunFolder
try:
    with MetricsLog(RunFolder(Path(sys.argv[1])), step=0) as log:
        for step in range(1, 10_000):
            # Many names and few digits: TensorBoard's file is the first to be full.
            log.write("train", step, {f"{number}": 1 for number in range(9)})
except UserError as error:
    print(error)
"""


def test_the_kernel_refuses_metrics(tmp_path: Path) -> None:
    """Files that the operating system really lets grow no further are one line, and nothing on standard error."""
    result = subprocess.run(
        [sys.executable, "-c", _SMALL_DISK, str(tmp_path)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    assert "metrics cannot be written" in result.stdout
    assert (result.stdout.count("\n"), result.stderr) == (1, "")
    (board,) = (tmp_path / "tensorboard").iterdir()
    assert board.stat().st_size == 100_000 > (tmp_path / "metrics.jsonl").stat().st_size


def test_metrics_on_a_full_disk_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that takes no more metrics is a sentence, not a traceback."""

    def full(*_: object, **__: object) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with MetricsLog(RunFolder(tmp_path), step=0) as log:
        monkeypatch.setattr(metrics.json, "dumps", full)
        with pytest.raises(UserError, match=r"metrics cannot be written .No space left on device"):
            log.write("train", 1, {})


def test_sequence_longer_than_the_context_is_refused(recipe: PretrainRecipe) -> None:
    """A recipe whose sequences do not fit the model names both numbers."""
    values = recipe.model_dump()
    values["data"]["sequence_length"] = 128
    values["train"]["batch_tokens"] = 256
    with pytest.raises(UserError, match=r"128 exceeds model\.max_position_embeddings = 64"):
        PretrainRecipe.parse(values, where="recipe.toml")


def test_sigterm_says_how_to_go_on_and_begins_nothing_else(recipe: PretrainRecipe, tmp_path: Path) -> None:
    """The command, told to stop, leaves a whole checkpoint, says which command resumes, and exits 130 for `&&`."""
    recipe = with_train(recipe, steps=100_000).replace(eval={"every": 100_000, "sample_tokens": 0})
    file = tmp_path / "recipe.toml"
    file.write_text(dump_recipe(recipe.replace(checkpoint={"every": 100_000})))
    command = [sys.executable, "-m", "fathom.cli", "pretrain", str(file)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as process:
        written = tmp_path / "runs/run/metrics.jsonl"
        deadline = time.monotonic() + 60
        while not (written.exists() and written.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    last = json.loads(written.read_text().splitlines()[-1])["step"]
    assert damage(tmp_path / f"runs/run/checkpoints/step_{last:08d}") is None
    assert re.search(r"go on with: .*fathom(\.cli)? pretrain runs/run/recipe\.toml --resume", said)


_TWICE = """
import os, signal
from fathom.train.signals import StopRequest
with StopRequest() as stop:
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.asked
    os.kill(os.getpid(), signal.SIGINT)
    print("still here")
"""


def test_a_second_signal_stops_at_once() -> None:
    """The first Ctrl-C only asks, the second ends the process."""
    result = subprocess.run([sys.executable, "-c", _TWICE], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (result.returncode, result.stdout) == (128 + signal.SIGINT, "")
    assert "once more to stop at once" in result.stderr
