"""Training in FP8 by recipe: what it says, what it skips, what it refuses, and that it goes on as if never stopped."""

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import fathom.train.pretrain as module
from fathom.config import PretrainRecipe
from fathom.data import TokenDataset
from fathom.errors import UserError
from fathom.model.checkpoint import load_model
from fathom.model.fp8 import FP8Experts
from fathom.model.transformer import Transformer
from fathom.train.metrics import read_metrics
from fathom.train.precision import require_fp8, set_precision
from fathom.train.pretrain import pretrain, train_step
from fathom.train.session import frozen_copy
from tests.model.configs import build
from tests.train.tiny import MODEL, poison_one_tile


@pytest.fixture(autouse=True)
def _no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "measure_gemm_peak", lambda dtype: 1e12)


def with_train(recipe: PretrainRecipe, **fields: Any) -> PretrainRecipe:
    return recipe.replace(train=recipe.train.model_dump() | fields)


@pytest.fixture
def eight(recipe: PretrainRecipe) -> PretrainRecipe:
    return with_train(recipe, precision="fp8", compile="auto")


def said(recipe: PretrainRecipe, runs: Path) -> list[dict[str, Any]]:
    result = pretrain(recipe, console=Console(quiet=True), runs=runs)
    return [line for line in read_metrics(result.folder / "metrics.jsonl") if line["kind"] == "train"]


def test_a_run_in_fp8_learns_and_says_so(eight: PretrainRecipe, tmp_path: Path) -> None:
    """The loss falls as in bfloat16, and every step says how many tiles held no number."""
    lines = said(eight, tmp_path)
    plain = said(with_train(eight, precision="bf16", compile="off").replace(name="plain"), tmp_path)
    assert [line["bad_tiles"] for line in lines] == [0] * 8
    assert "bad_tiles" not in plain[0]
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.3
    assert lines[-1]["loss"] == pytest.approx(plain[-1]["loss"], rel=0.05)
    assert lines[-1]["loss"] != plain[-1]["loss"]


def test_what_is_saved_is_the_master_weights(eight: PretrainRecipe, tmp_path: Path) -> None:
    """The checkpoint holds float32 and opens as any other."""
    result = pretrain(eight, console=Console(quiet=True), runs=tmp_path)
    assert result.checkpoint is not None
    weight = load_model(result.checkpoint, dtype="float32").lm_head.weight
    assert not torch.equal(weight, weight.bfloat16().float())


def test_recomputing_changes_no_bit_of_a_run(eight: PretrainRecipe, tmp_path: Path) -> None:
    """Two runs that differ in `recompute` say the same losses and gradient norms."""
    told = [
        [
            (line["loss"], line["grad_norm"])
            for line in said(with_train(eight, recompute=on).replace(name=str(on)), tmp_path)
        ]
        for on in (False, True)
    ]
    assert told[0] == told[1]


def test_a_tile_without_a_number_skips_the_step(
    eight: PretrainRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A NaN that meets one tile, and no loss: it is counted, nothing is changed, and the next step is as ever."""
    training = module._start(eight, TokenDataset(eight.data.path), None)
    assert training.fp8 is not None
    before = {name: p.detach().clone() for name, p in training.model.named_parameters()}
    poison_one_tile(monkeypatch)
    values = train_step(training, eight)
    assert values["skipped"]
    assert values["bad_tiles"] == 1
    assert all(torch.equal(p, before[name]) for name, p in training.model.named_parameters())
    values = train_step(training, eight)
    assert (values["skipped"], values["bad_tiles"]) == (False, 0)


def test_compiling_what_decides_itself_is_refused(recipe: PretrainRecipe) -> None:
    """FP8 and recomputing run layer by layer: compile = on contradicts them, auto gives way."""
    for fields in ({"precision": "fp8"}, {"precision": "bf16", "recompute": True}):
        with pytest.raises(UserError, match="layer by layer; leave compile at auto"):
            PretrainRecipe.parse(with_train(recipe).model_dump() | {"train": {**fields, "compile": "on"}}, where="x")
        assert not module.use_compiler(with_train(recipe, compile="auto", **fields).train)


def test_blocks_of_gradients_without_fp8_are_refused(recipe: PretrainRecipe) -> None:
    """A setting that would change nothing is a mistake."""
    with pytest.raises(UserError, match="needs precision = fp8"):
        PretrainRecipe.parse(recipe.model_dump() | {"train": {"fp8_gradients": "blocks"}}, where="x")


def test_without_the_dtype_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A PyTorch without float8, and a device that cannot convert to it: one line each, with what to do."""

    class Old:
        __version__ = "2.0.0"

    monkeypatch.setattr("fathom.train.precision.torch", Old())
    with pytest.raises(UserError, match=r"torch\.float8_e4m3fn, which PyTorch 2\.0\.0 lacks; set train\.precision"):
        require_fp8(torch.device("cpu"))
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"float8_e4m3fn, which is missing on \w+ \(.*\); set train\.precision to bf16"):
        require_fp8(torch.device("meta"))


def test_gradients_in_blocks_are_asked_for_by_recipe(eight: PretrainRecipe) -> None:
    """`fp8_gradients` reaches the layers."""
    for kind, blocks in (("tiles", False), ("blocks", True)):
        training = module._start(with_train(eight, fp8_gradients=kind), TokenDataset(eight.data.path), None)
        assert training.fp8 is not None
        assert training.fp8.gradient_blocks == blocks


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_the_policy_sets_what_activations_are(precision: Any) -> None:
    """float32 or bfloat16 between layers; FP8 only inside of products."""
    model = Transformer(MODEL)
    fp8 = set_precision(model, precision)
    assert model.compute_dtype == (torch.float32 if precision == "fp32" else torch.bfloat16)
    assert (fp8 is not None) == (precision == "fp8")
    assert any(isinstance(module, FP8Experts) for module in model.modules()) == (precision == "fp8")


def test_a_reference_multiplies_as_its_policy_does() -> None:
    """A frozen copy of a model in FP8 says the same to the bit, so that nothing but learning parts them."""
    model = build(MODEL)
    fp8 = set_precision(model, "fp8")
    ids = torch.arange(12)[None]
    assert torch.equal(frozen_copy(model, fp8)(ids), model(ids))
    assert not torch.equal(frozen_copy(model)(ids), model(ids))
