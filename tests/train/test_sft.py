"""Supervised fine-tuning: what is learnt from, in which order, and that nothing else is."""

import io
import itertools
import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import fathom.train.sft as module
from fathom.config.sft import SFTRecipe
from fathom.data import train_bpe
from fathom.data.conversations import Turn
from fathom.engine.protocol import Sampling
from fathom.errors import UserError
from fathom.model.checkpoint import load, save_model
from fathom.model.transformer import Transformer
from fathom.tasks import open_task
from fathom.train.metrics import read_metrics
from fathom.train.optimizers import build_optimizer
from fathom.train.packing import packed
from fathom.train.run import RunResult
from fathom.train.sft import Student, batch_at, loss_of, read_answers, train_sft, update
from fathom.train.state import Progress
from tests.train.tiny import MODEL, poison_one_tile

TIMES = {"seconds", "tokens_per_second"}
ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"{a}+{b}"},
            {"role": "assistant", "reasoning_content": f"{b}+{a}" + "!" * (a == 3), "content": str(a + b)},
        ]
    }
    for a in range(4)
    for b in range(5)
]


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny V3 with random weights, its byte tokenizer, and a file of sums."""
    folder = tmp_path_factory.mktemp("sft")
    tokenizer = train_bpe(["0123456789"], 266)
    model = Transformer(MODEL.replace(vocab_size=tokenizer.vocab_size))
    model.init_weights(1)
    save_model(model, folder / "model", tokenizer=tokenizer)
    (folder / "sums.jsonl").write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    return folder


@pytest.fixture
def recipe(start: Path) -> SFTRecipe:
    """Six steps of six answers each."""
    return SFTRecipe(
        name="run",
        model=str(start / "model"),
        data={"files": (str(start / "sums.jsonl"),), "held_out": 0.2},
        optimizer={"lr": 1e-3},
        train={"epochs": 2.0, "batch": 6, "rows": 40, "precision": "fp32", "warmup_steps": 1},
        checkpoint={"every": 3, "keep": 9},
        eval={"every": 2, "sample_tokens": 4},
    )


def changed(recipe: SFTRecipe, **changes: dict[str, Any]) -> SFTRecipe:
    sections = {name: getattr(recipe, name).replace(**fields).model_dump() for name, fields in changes.items()}
    return recipe.replace(**sections)


def run(recipe: SFTRecipe, runs: Path, **options: Any) -> tuple[RunResult, str]:
    said = io.StringIO()
    return train_sft(recipe, runs=runs, console=Console(file=said, width=200), **options), said.getvalue()


def student(recipe: SFTRecipe) -> Student:
    model, tokenizer = load(recipe.model, dtype="float32")
    assert tokenizer is not None
    return Student(recipe, model, tokenizer, build_optimizer(model, recipe.optimizer), Progress())


def weights(result: RunResult) -> dict[str, bytes]:
    assert result.checkpoint is not None
    files = result.checkpoint.rglob("*.safetensors")
    return {str(file.relative_to(result.checkpoint)): file.read_bytes() for file in files}


def lines(result: RunResult) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in TIMES} for line in read_metrics(result.folder / "metrics.jsonl")]


def one_by_one(model: Transformer, turns: list[Turn]) -> torch.Tensor:
    """The loss by definition: each conversation alone, whole, the mean over the answers' tokens."""
    total = torch.zeros(())
    for turn in turns:
        tokens = torch.tensor([turn.prompt_ids + turn.response_ids])
        logprobs = model.logits(model.hidden_states(tokens[:, :-1])[0]).log_softmax(-1)
        said = logprobs[0, len(turn.prompt_ids) - 1 :].gather(1, tokens[0, len(turn.prompt_ids) :, None])
        total = total - said.sum()
    return total / sum(len(turn.response_ids) for turn in turns)


def test_packed_is_one_by_one(recipe: SFTRecipe) -> None:
    """Loss and gradients of packed answers are those of whole conversations one at a time, in which only answers count;
    packing into smaller pieces changes neither."""
    plain = student(recipe)
    turns = read_answers(recipe, plain.tokenizer, context=512).train
    loss = one_by_one(plain.model, turns)
    loss.backward()
    wanted = {name: p.grad for name, p in plain.model.named_parameters() if p.grad is not None}
    for rows in (1, 60, 4096):
        own = student(changed(recipe, train={"rows": rows}))
        own.optimizer.step = lambda lr: None  # the gradients are looked at instead
        found: dict[str, torch.Tensor] = {}
        own.optimizer.zero_grad = lambda own=own, found=found: found.update(
            {name: p.grad for name, p in own.model.named_parameters() if p.grad is not None}
        )
        module.clip_grads_with_norm_, clip = lambda *_: None, module.clip_grads_with_norm_
        try:
            values = update(own, turns, 1e-3)
        finally:
            module.clip_grads_with_norm_ = clip
        assert values["loss"] == pytest.approx(loss.item(), abs=1e-5)
        assert found.keys() == wanted.keys()
        for name, gradient in found.items():
            assert torch.allclose(gradient, wanted[name], atol=2e-5), name
    assert loss_of(plain, turns) == pytest.approx(loss.item(), abs=1e-5)


def test_pieces_hold_every_answer_once(recipe: SFTRecipe) -> None:
    """Packing keeps the order, loses nothing, and only a single answer may take more than its share of rows."""
    turns = [Turn([1] * size, [2, 3]) for size in (5, 1, 9, 2, 30, 4)]
    pieces = list(packed(turns, lambda turn: turn.rows, 14))
    assert [turn for piece in pieces for turn in piece] == turns
    assert all(len(piece) == 1 or sum(turn.rows for turn in piece) <= 14 for piece in pieces)
    assert len(pieces) < len(turns)


def test_every_answer_once_an_epoch() -> None:
    """Over whole epochs each answer comes equally often, in another order each time; the last step takes what is left
    of a part of one."""
    turns = [Turn([place], [0]) for place in range(10)]
    steps = [[turn.prompt_ids[0] for turn in batch_at(turns, step, 4, seed=1, of=20)] for step in range(5)]
    seen = [place for step in steps for place in step]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]
    assert [len(batch_at(turns, step, 8, seed=1, of=13)) for step in range(2)] == [8, 5]


@pytest.mark.parametrize(
    "changes",
    [{"optimizer": {"name": "adamw"}}, {"optimizer": {"name": "muon"}}, {"train": {"precision": "fp8"}}],
    ids=["adamw", "muon", "FP8"],
)
def test_a_resumed_run_is_the_unbroken_one(
    recipe: SFTRecipe, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three steps, a stop and the rest give the bytes and metrics of all in one."""
    recipe = changed(recipe, **changes)
    unbroken, _ = run(recipe, tmp_path / "one")
    original = module.update

    def stopping(own: Student, *arguments: Any) -> dict[str, Any]:
        if own.progress.step == 2:
            signal.raise_signal(signal.SIGINT)
        return original(own, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, "update", stopping)
        stopped, said = run(recipe, tmp_path / "two")
    assert stopped.interrupted
    assert "stopped at step 3; go on with" in said
    resumed, _ = run(recipe, tmp_path / "two", resume=True)
    assert not resumed.interrupted
    assert weights(resumed) == weights(unbroken)
    assert lines(resumed) == lines(unbroken)
    assert (resumed.folder / "samples.md").read_bytes() == (unbroken.folder / "samples.md").read_bytes()


def test_a_stop_between_checkpoints_loses_nothing(
    recipe: SFTRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is stopped at a step without a checkpoint writes one before it ends."""
    recipe, original = changed(recipe, checkpoint={"every": 100}), module.update

    def stopping(own: Student, *arguments: Any) -> dict[str, Any]:
        if own.progress.step == 1:
            signal.raise_signal(signal.SIGINT)
        return original(own, *arguments)

    monkeypatch.setattr(module, "update", stopping)
    stopped, _ = run(recipe, tmp_path)
    assert stopped.checkpoint is not None
    assert stopped.checkpoint.name == "step_00000002"


def test_gradients_are_clipped(recipe: SFTRecipe) -> None:
    """The optimizer is given gradients no longer than clip_norm; the metric is their length before."""
    own = student(changed(recipe, optimizer={"clip_norm": 1e-3}))
    seen: list[float] = []
    own.optimizer.step = lambda lr: seen.append(
        float(torch.cat([p.grad.flatten() for p in own.model.parameters() if p.grad is not None]).norm())
    )
    values = update(own, read_answers(recipe, own.tokenizer, context=512).train, 1e-3)
    assert values["grad_norm"] > 1e-2
    assert seen == [pytest.approx(1e-3, rel=1e-3)]


def test_a_good_step_ends_a_row_of_bad_ones(recipe: SFTRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that are not finite are counted in a row only until one is."""
    own, original, broken = student(recipe), module.logprobs_and_entropy, [True, False, True]

    def sometimes(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs, entropy = original(*arguments)
        return (logprobs * math.nan if broken[own.progress.step] else logprobs), entropy

    monkeypatch.setattr(module, "logprobs_and_entropy", sometimes)
    turns = read_answers(recipe, own.tokenizer, context=512).train[:4]
    rows = []
    for _ in broken:
        update(own, turns, 1e-4)
        rows.append(own.progress.bad_in_a_row)
    assert rows == [1, 0, 1]


def test_weights_that_are_no_numbers_are_never_saved(
    recipe: SFTRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step after which weights are no numbers ends the run, and the checkpoint before it is the newest."""
    original = module.update

    def poisoned(own: Student, *arguments: Any) -> dict[str, Any]:
        if own.progress.step == 3:
            step = own.optimizer.step

            def poison(lr: float) -> None:
                step(lr)
                with torch.no_grad():
                    own.model.lm_head.weight[0, 0] = math.nan

            own.optimizer.step = poison
        return original(own, *arguments)

    monkeypatch.setattr(module, "update", poisoned)
    with pytest.raises(UserError, match="step 4: the weights are no longer numbers"):
        run(changed(recipe, data={"held_out": 0.0}), tmp_path)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*")] == ["step_00000003"]


def test_settings_of_the_data_are_followed(recipe: SFTRecipe) -> None:
    """A default system message stands in every prompt, and no answer is longer than the model's context."""
    own = student(recipe)
    with_system = read_answers(changed(recipe, data={"default_system": "Be brief."}), own.tokenizer, context=512)
    assert all("Be brief." in own.tokenizer.decode(turn.prompt_ids) for turn in with_system.train)
    short = read_answers(recipe, own.tokenizer, context=12)
    assert short.too_long == 5
    assert short.longest == 12


def test_it_learns_to_say_what_was_said(recipe: SFTRecipe, tmp_path: Path) -> None:
    """After many epochs the model thinks and answers as the conversations do, and stops where they do."""
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(map(json.dumps, ROWS[:4])), encoding="utf-8")
    settings = {"epochs": 200.0, "batch": 4, "floor": 1.0, "warmup_steps": 0}
    data = {"files": (str(few),), "held_out": 0.0}
    learning = changed(recipe, train=settings, data=data, optimizer={"lr": 5e-3}, checkpoint={"every": 100})
    result, _ = run(learning, tmp_path / "runs")
    model, tokenizer = load(result.checkpoint, dtype="float32")
    for row in ROWS[:4]:
        user, assistant = row["messages"]
        prompt = tokenizer.apply_chat_template([user], thinking=True)
        ids = module.generate_ids(
            model,
            tokenizer.encode(prompt, special=True),
            max_tokens=20,
            sampling=Sampling(temperature=0.0),
            stop_ids=tokenizer.eos_token_ids,
        )
        assert tokenizer.decode(list(ids)) == f"{assistant['reasoning_content']}</think>{assistant['content']}"


def test_one_question_is_on_one_side(recipe: SFTRecipe, tmp_path: Path) -> None:
    """Rows about the same question, however it is spaced, are all trained on or all held out, and both sides exist."""
    rows = [
        {"messages": [{"role": "user", "content": text.format(number)}, {"role": "assistant", "content": str(place)}]}
        for number in range(40)
        for place, text in enumerate(("what is {}?", "What  is {}? "))
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    own = student(recipe)
    answers = read_answers(changed(recipe, data={"files": (str(file),)}), own.tokenizer, context=512)
    sides = [
        {"".join(c for c in own.tokenizer.decode(turn.prompt_ids) if c.isdigit()) for turn in turns}
        for turns in (answers.train, answers.held_out)
    ]
    assert not sides[0] & sides[1]
    assert sides[0]
    assert sides[1]
    assert len(answers.train) + len(answers.held_out) == 80


def test_rows_of_a_task_s_training_problems_are_held_out_too(recipe: SFTRecipe, tmp_path: Path) -> None:
    """The share is that of the rows, though the task itself holds none of their questions out."""
    problems = itertools.islice(open_task("modular").problems("train", level=3), 400)
    rows = [
        {"messages": [{"role": "user", "content": p.question}, {"role": "assistant", "content": p.answer}]}
        for p in problems
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    changes = {"files": (str(file),), "held_out": 0.1}
    answers = read_answers(changed(recipe, data=changes), student(recipe).tokenizer, context=512)
    assert 20 <= len(answers.held_out) <= 60


def test_long_answers_are_left_out_and_said(recipe: SFTRecipe, tmp_path: Path) -> None:
    """Answers beyond data.max_tokens are counted and not learnt; where none is left, the run says so and stops."""
    _, said = run(changed(recipe, data={"max_tokens": 12}), tmp_path)
    assert "of more than 12 tokens (data.max_tokens" in said
    with pytest.raises(UserError, match="nothing to train on: all 20 have more than 3"):
        run(changed(recipe, data={"max_tokens": 3}), tmp_path / "none")


def test_other_answers_are_not_resumed_with(recipe: SFTRecipe, start: Path, tmp_path: Path) -> None:
    """A run whose files have changed is refused, and goes on with them where the person insists."""
    file = tmp_path / "sums.jsonl"
    file.write_text((start / "sums.jsonl").read_text(), encoding="utf-8")
    own = changed(recipe, data={"files": (str(file),)})
    run(own, tmp_path / "runs")
    rows = file.read_text().splitlines()
    held_out = next(row for row in map(json.loads, rows) if module._is_held_out(row["messages"][0]["content"], 0.2))
    held_out["messages"][1]["content"] = "no"  # what is measured counts, too
    file.write_text("\n".join([*rows, json.dumps(held_out)]), encoding="utf-8")
    with pytest.raises(UserError, match="not those that this run began with"):
        run(own, tmp_path / "runs", resume=True)
    run(own, tmp_path / "runs", resume=True, accept_changes=True)


def test_a_step_without_numbers_changes_nothing(recipe: SFTRecipe, tmp_path: Path, monkeypatch) -> None:
    """A non-finite loss is skipped and said, and too many of them end the run."""
    original = module.logprobs_and_entropy

    def broken(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs, entropy = original(*arguments)
        return logprobs * math.nan if torch.is_grad_enabled() else logprobs, entropy

    monkeypatch.setattr(module, "logprobs_and_entropy", broken)
    own = student(recipe)
    before = {name: p.clone() for name, p in own.model.state_dict().items()}
    turns = read_answers(recipe, own.tokenizer, context=512).train
    assert update(own, turns[:4], 1e-3)["skipped"]
    assert all(torch.equal(p, before[name]) for name, p in own.model.state_dict().items())
    with pytest.raises(UserError, match=r"not finite .*, 2 in a row; lower optimizer.lr"):
        run(changed(recipe, train={"max_bad_steps": 2}), tmp_path)


def test_models_that_cannot_learn_conversations(recipe: SFTRecipe, tmp_path: Path) -> None:
    """A model without a chat template, and one that is not there, are refused in one line and leave nothing behind."""
    model = Transformer(MODEL)
    model.init_weights(1)
    save_model(model, tmp_path / "bare")
    for path, said in ((tmp_path / "bare", "has no tokenizer"), (tmp_path / "none", "none")):
        with pytest.raises(UserError, match=said):
            run(recipe.replace(model=str(path)), tmp_path / "runs")
    assert not (tmp_path / "runs" / "run").exists()


def test_a_bad_tile_skips_the_step(recipe: SFTRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In FP8 a tile without a number is counted and said, its step changes nothing, and the run goes on."""
    poison_one_tile(monkeypatch)
    result, said = run(changed(recipe, train={"precision": "fp8"}), tmp_path)
    steps = [line for line in lines(result) if line["kind"] == "train"]
    assert [line["bad_tiles"] for line in steps] == [1, 0, 0, 0, 0, 0]
    assert [line["skipped"] for line in steps] == [True] + [False] * 5
    assert "linear layers multiply in FP8" in said
    assert "1 FP8 tile without a number" in said
