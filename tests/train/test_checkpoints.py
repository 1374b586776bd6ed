import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fathom.train.state as state
import fathom.train.writer as writer_module
from fathom.config import PretrainRecipe
from fathom.data import TokenDataset
from fathom.errors import UserError
from fathom.model.checkpoint import write_model
from fathom.train.run import RunFolder, latest, model_folder, newest_model
from fathom.train.state import Contents, Progress, checkpoints, damage, read_checkpoint, sweep, write_checkpoint
from fathom.train.writer import CheckpointWriter
from tests.model import configs
from tests.train.tiny import MODEL

ROOT = Path(__file__).parents[2]


@pytest.fixture
def contents(data: Path) -> Contents:
    model = configs.build(MODEL)
    return Contents(
        config=MODEL,
        weights=model.state_dict(),
        optimizer={"lm_head.weight.exp_avg": torch.randn(320, 48), "lm_head.weight.step": torch.tensor(3.0)},
        ema={name: 2 * tensor for name, tensor in model.state_dict().items()},
        progress=Progress(step=1, tokens=9, data={"epoch": 0, "position": 16}),
        recipe=PretrainRecipe(name="run", model=MODEL, data={"sequence_length": 16}),
        tokenizer=TokenDataset(data).tokenizer,
    )


def at(contents: Contents, step: int) -> Contents:
    return replace(contents, progress=replace(contents.progress, step=step))


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_everything_comes_back(contents: Contents, tmp_path: Path) -> None:
    """Weights, averaged weights, optimizer state and progress are read back bit for bit."""
    checkpoint = write_checkpoint(tmp_path, contents)
    resumed = read_checkpoint(checkpoint)
    assert resumed.progress == contents.progress
    assert resumed.ema is not None
    for found, expected in (
        (resumed.model.state_dict(), contents.weights),
        (resumed.ema, contents.ema),
        (resumed.optimizer, contents.optimizer),
    ):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert damage(checkpoint) is None


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut": lambda folder: os.truncate(folder / "model-00001-of-00001.safetensors", 1000),
    "changed": lambda folder: _flip(folder / "training_state/optimizer.safetensors"),
    "missing": lambda folder: (folder / "training_state/progress.json").unlink(),
    "no manifest": lambda folder: (folder / "training_state/manifest.json").unlink(),
    "torn manifest": lambda folder: os.truncate(folder / "training_state/manifest.json", 30),
}


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_checkpoint_is_passed_over(contents: Contents, kind: str, tmp_path: Path) -> None:
    """A file that is cut, changed or gone makes a checkpoint be passed over, with a sentence, for the one before."""
    folder = RunFolder(tmp_path).checkpoints
    for step in (1, 2):
        write_checkpoint(folder, at(contents, step))
    DAMAGES[kind](folder / "step_00000002")
    said: list[str] = []
    assert latest(tmp_path, said.append) == folder / "step_00000001"
    assert len(said) == 1
    assert "step_00000002 is damaged" in said[0]
    DAMAGES[kind](folder / "step_00000001")
    with pytest.raises(UserError, match="every checkpoint is damaged"):
        latest(tmp_path, said.append)


def test_a_damaged_checkpoint_is_written_again(contents: Contents, tmp_path: Path) -> None:
    """Reaching the step of a damaged checkpoint once more replaces it."""
    checkpoint = write_checkpoint(tmp_path, contents)
    DAMAGES["cut"](checkpoint)
    assert write_checkpoint(tmp_path, contents) == checkpoint
    assert damage(checkpoint) is None
    assert names(tmp_path) == ["step_00000001"]


@pytest.mark.parametrize("file", [1, 4, 9, 15])
def test_full_disk_leaves_the_earlier_checkpoint(
    contents: Contents, file: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the disk is full at some file, one line says so, nothing half-written stays, the earlier one is whole."""
    calls = 0
    real = state.sync

    def full(path: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == file:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path)

    with CheckpointWriter(tmp_path, keep=1) as writer:
        writer.save(contents)
    monkeypatch.setattr(state, "sync", full)
    writer = CheckpointWriter(tmp_path, keep=1)
    writer.save(at(contents, 2))
    with pytest.raises(UserError, match=r"step 2.*No space left on device.*step_00000001 is intact") as error:
        writer.wait()
    assert "\n" not in str(error.value)
    assert names(tmp_path) == ["step_00000001"]
    assert damage(tmp_path / "step_00000001") is None


_SMALL_DISK = """
import sys, torch
from pathlib import Path
from fathom.errors import UserError
from fathom.train.state import _save_tensors, new_folder
try:
    with new_folder(Path(sys.argv[1]) / "step_00000001") as scratch:
        _save_tensors({"x": torch.zeros(10_000_000)}, scratch / "optimizer.safetensors")
except UserError as error:
    print(error)
"""


def test_the_kernel_refuses_bytes(tmp_path: Path) -> None:
    """A write that the operating system really refuses (a limit on file size) is one line and leaves nothing."""
    result = subprocess.run(
        [sys.executable, "-c", _SMALL_DISK, str(tmp_path)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000)),
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    assert "cannot be written" in result.stdout
    assert result.stdout.count("\n") == 1
    assert names(tmp_path) == []


def test_training_may_go_on_while_a_checkpoint_is_written(
    contents: Contents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written is the state at `save`, whatever happens to the tensors while it waits for the disk."""
    before = {name: tensor.clone() for name, tensor in contents.weights.items()}
    go_on = threading.Event()

    def slow(folder: Path, copied: Contents) -> Path:
        assert go_on.wait(timeout=60)
        return write_checkpoint(folder, copied)

    monkeypatch.setattr(writer_module, "write_checkpoint", slow)
    with CheckpointWriter(tmp_path, keep=1) as writer:
        writer.save(contents)
        for tensor in [*contents.weights.values(), *contents.ema.values(), *contents.optimizer.values()]:
            tensor.fill_(-1)
        contents.progress.step = 99
        contents.progress.data["position"] = 99
        go_on.set()
    written = read_checkpoint(tmp_path / "step_00000001")
    assert all(torch.equal(written.model.state_dict()[name], tensor) for name, tensor in before.items())
    assert all(torch.equal(written.ema[name], 2 * tensor) for name, tensor in before.items())
    assert written.optimizer["lm_head.weight.step"] == 3
    assert written.progress.data["position"] == 16


def test_leftovers_are_swept(tmp_path: Path) -> None:
    """Half-written and half-removed folders go, checkpoints and other hidden files stay."""
    for name in (".step_00000002.partial-12", ".step_00000001.removed-12", "step_00000003", ".keep"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    assert checkpoints(tmp_path) == [tmp_path / "step_00000003"]
    sweep(tmp_path)
    assert names(tmp_path) == [".keep", "step_00000003"]


def test_newest_model_of_a_run(contents: Contents, tmp_path: Path) -> None:
    """A run's folder stands for its newest checkpoint without missing or cut files; any other folder is no run."""
    assert newest_model(tmp_path) is None
    for step in (9, 10):
        write_checkpoint(RunFolder(tmp_path).checkpoints, at(contents, step))
    assert newest_model(tmp_path) == tmp_path / "checkpoints/step_00000010"
    DAMAGES["cut"](tmp_path / "checkpoints/step_00000010")
    assert newest_model(tmp_path) == tmp_path / "checkpoints/step_00000009"
    DAMAGES["no manifest"](tmp_path / "checkpoints/step_00000009")
    assert newest_model(tmp_path) == tmp_path / "checkpoints/step_00000010"


def test_best_model_of_a_run(contents: Contents, tmp_path: Path) -> None:
    """A run's folder `best` stands for the model in it, and the run itself still for its newest checkpoint."""
    write_checkpoint(RunFolder(tmp_path).checkpoints, at(contents, 10))
    target = tmp_path / "best" / "step_00000009"
    target.mkdir(parents=True)
    write_model(target, contents.config, contents.weights, tokenizer=contents.tokenizer, dtype="float32")
    assert model_folder(tmp_path / "best") == target
    assert model_folder(tmp_path) == tmp_path / "checkpoints/step_00000010"


def test_twenty_kills_while_writing(data: Path, tmp_path: Path) -> None:
    """After kill -9 at 20 random moments of writing, the newest checkpoint is whole, consistent, and no older."""
    shutil.copytree(data, tmp_path / "shards")
    result = subprocess.run(
        [sys.executable, "-m", "tests.train.kill_while_writing", str(tmp_path), "20"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    counts = json.loads(result.stdout.splitlines()[-1])
    assert counts["whole"] == 20
    assert counts["interrupted"] >= 5, "the kills came between writes: the test shows nothing"
    assert counts["last_step"] > 5
