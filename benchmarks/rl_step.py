"""One step of GRPO beside TRL: rollouts, rewards, log-probabilities, loss, backward, optimizer. Seconds per step.

    python -m benchmarks.rl_step --against trl --trl-python TRL_ENV/bin/python [--model SMOLLM2.gguf]

Both sides train the same weights in bfloat16 arithmetic on the same chat prompts with the same rule: 8 problems × 8
samples of at most 64 new tokens, temperature 1, no reference policy, one update. The rule gives every completion the
share of its words that begin with a vowel, so that rewards differ in every group, as they must for a gradient. TRL runs
its `GRPOTrainer` with transformers' `generate`, all completions of a step in one batch and in batches of eight with
accumulation; the faster of the two counts. Sides work in turns in one run; the ratio is the median over rounds of
theirs over ours.

TRL's environment: pip install torch==2.13.0 trl transformers accelerate datasets gguf
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

INSTRUCTION = "Work it out step by step, then write the answer after 'Answer:'."
NUMBERS = ((12, 7, 5), (81, 4, 30), (9, 9, 9), (25, 50, 13), (7, 61, 2), (33, 12, 20), (18, 5, 1), (40, 44, 6))
QUESTIONS = [f"What is {a} + {b} - {c}?" for a, b, c in NUMBERS]
TASK = '''
from fathom.tasks import Problem, Task

QUESTIONS = {questions}


class Vowels(Task):
    """The share of words that begin with a vowel."""

    def problem(self, random, level):
        return Problem(random.choice(QUESTIONS), split="train")

    def check(self, problem, answer):
        words = answer.split()
        return sum(word[0].lower() in "aeiou" for word in words) / max(1, len(words))
'''


def reward(text: str) -> float:
    """The rule, for TRL's side."""
    words = text.split()
    return sum(word[0].lower() in "aeiou" for word in words) / max(1, len(words))


def fathom_side(options: dict[str, Any]) -> Callable[[], dict[str, float]]:
    """Our trainer's own step."""
    from fathom.config.rl import RLRecipe
    from fathom.tasks.checker import Checker
    from fathom.train import rl
    from fathom.train.learner import update
    from fathom.train.rollout import Roller, seed_of

    scratch = tempfile.mkdtemp()
    rules = Path(scratch, "vowels.py")
    rules.write_text(TASK.format(questions=QUESTIONS))
    recipe = RLRecipe(
        name="rl_step",
        model=options["model"],
        task={"name": f"{rules}:Vowels"},
        prompt={"style": "chat", "instruction": INSTRUCTION},
        rewards={"layout": {"form": "rest", "thoughts": "optional"}, "format": 0.0},
        rollout={"problems": options["problems"], "samples": options["samples"], "max_tokens": options["tokens"]},
        optimizer={"lr": 1e-6, "weight_decay": 0.0},
        train={"rows": options["rows"]},
    )
    learner = rl._start(recipe, None)
    checker = Checker(recipe.task.name).__enter__()
    engine = rl._engine(learner)
    roller = Roller(recipe, engine, learner.tokenizer, checker)
    problems = [checker.task.problem(_Fixed(index), 1) for index in range(options["problems"])]

    def step() -> dict[str, float]:
        began = time.perf_counter()
        groups = roller.groups(problems, options["samples"], seed=seed_of(learner.progress.step))
        groups = [_scored(group) for group in groups]
        rolled = time.perf_counter()
        values = update(learner, groups)
        engine.load_weights(learner.model)
        ended = time.perf_counter()
        tokens = sum(len(r.drawn.tokens) for group in groups for r in group.rollouts)
        assert not values["skipped"]
        return {
            "seconds": ended - began,
            "rollout": rolled - began,
            "update": ended - rolled,
            "tokens": tokens,
            "kl_sampler": values["kl_sampler"],
        }

    return step


def _scored(group: Any) -> Any:
    """The group with the rule's reward for every text: our reader would give none to a text that was cut off."""
    rollouts = [replace(r, reward=replace(r.reward, total=reward(r.text))) for r in group.rollouts]
    return replace(group, rollouts=rollouts)


class _Fixed:
    """Stands in for a random source: chooses the question of its number."""

    def __init__(self, index: int) -> None:
        self._index = index

    def choice(self, items: list[str]) -> str:
        return items[self._index % len(items)]


def trl_side(options: dict[str, Any]) -> Callable[[], dict[str, float]]:
    """TRL's trainer, one optimizer step at a time."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(options["model"])
    model = AutoModelForCausalLM.from_pretrained(options["model"], dtype=torch.bfloat16)
    messages = [[{"role": "user", "content": f"{question}\n{INSTRUCTION}"}] for question in QUESTIONS]
    rows = [{"prompt": messages[place % len(messages)]} for place in range(options["problems"] * 64)]
    completions = options["problems"] * options["samples"]
    batch = completions if options["variant"] == "trl-whole" else options["samples"]
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=True, report_to=[], logging_steps=1, save_strategy="no",
        per_device_train_batch_size=batch, gradient_accumulation_steps=completions // batch,
        num_generations=options["samples"], max_completion_length=options["tokens"], temperature=1.0, beta=0.0,
        learning_rate=1e-6, max_steps=10_000, shuffle_dataset=False, disable_tqdm=True,
        gradient_checkpointing=False,
    )  # fmt: skip
    marks: list[float] = []
    lengths: list[float] = []

    def score(completions: list, **_: Any) -> list[float]:
        texts = [c[0]["content"] if isinstance(c, list) else c for c in completions]
        return [reward(text) for text in texts]

    trainer = GRPOTrainer(
        model=model, reward_funcs=score, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    return _stepwise(trainer, marks, lengths)


def _stepwise(trainer: Any, marks: list[float], lengths: list[float]) -> Callable[[], dict[str, float]]:
    """Runs `trainer.train()` in a thread that stops after every optimizer step until asked for the next."""
    import threading

    from transformers import TrainerCallback

    go, done = threading.Semaphore(0), threading.Semaphore(0)

    class Pause(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            done.release()
            go.acquire()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **__: Any) -> None:
            if logs and "completions/mean_length" in logs:
                lengths.append(logs["completions/mean_length"])

    trainer.add_callback(Pause())
    thread = threading.Thread(target=lambda: (go.acquire(), trainer.train()), daemon=True)
    thread.start()

    def step() -> dict[str, float]:
        began = time.perf_counter()
        go.release()
        done.acquire()
        return {"seconds": time.perf_counter() - began, "tokens": lengths[-1] if lengths else 0.0}

    return step


def _work(options: dict[str, Any]) -> None:
    """A side's process: one step for every line that comes, one JSON line each."""
    side = fathom_side if options["variant"] == "fathom" else trl_side
    out = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no answer
    step = side(options)
    with os.fdopen(out, "w") as answers:
        for _ in sys.stdin:
            print(json.dumps(step()), file=answers, flush=True)


def _folder(model: str) -> str:
    """A model folder with the same weights: transformers trains none that came from a `.gguf` file."""
    if not model.endswith(".gguf"):
        return model
    import fathom
    from fathom.model.checkpoint import save_model

    folder = Path(tempfile.mkdtemp(), "model")
    opened, tokenizer = fathom.load(model, dtype="bfloat16")
    save_model(opened, folder, tokenizer=tokenizer, dtype="bfloat16")
    return str(folder)


def main() -> None:
    """Measure, print a table, and a JSON line with the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--against", choices=["trl"], default="trl")
    parser.add_argument("--trl-python", required=True, help="Python of the environment that has TRL")
    parser.add_argument("--model", default=os.environ.get("FATHOM_SMOLLM2_GGUF"), help="a .gguf file or model folder")
    parser.add_argument("--problems", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens per completion at most")
    parser.add_argument("--rows", type=int, default=2400, help="tokens per forward pass of ours")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--variants", nargs="+", default=["trl-whole", "trl-accumulated"])
    options = parser.parse_args()
    if not options.model:
        parser.error("--model: name a .gguf file or a model folder")
    arguments = {name: getattr(options, name) for name in ("problems", "samples", "tokens", "rows")}
    arguments["model"] = _folder(options.model)
    names = ("fathom", *options.variants)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    with contextlib.ExitStack() as stack:
        sides, logs = {}, {}
        for name in names:
            python = sys.executable if name == "fathom" else options.trl_python
            command = [python, "-m", "benchmarks.rl_step", "--side", json.dumps(arguments | {"variant": name})]
            # What libraries say is of interest only where a side fails.
            logs[name] = stack.enter_context(tempfile.TemporaryFile("w+"))
            sides[name] = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=logs[name], text=True
            )
            stack.callback(sides[name].kill)
        for turn in range(options.rounds + 1):  # the first one warms up
            for name, side in sides.items():
                with contextlib.suppress(BrokenPipeError):
                    side.stdin.write("step\n")
                    side.stdin.flush()
                answer = side.stdout.readline()
                if not answer:
                    logs[name].seek(0)
                    sys.exit(f"{logs[name].read()[-3000:]}\n{name} ended with exit code {side.wait()}")
                if turn:
                    found[name].append(json.loads(answer))
            if turn:
                print(
                    f"round {turn}: " + ", ".join(f"{n} {f[-1]['seconds']:.1f} s" for n, f in found.items()), flush=True
                )
    medians = {name: statistics.median(one["seconds"] for one in values) for name, values in found.items()}
    best = min(options.variants, key=lambda name: medians[name])
    ratios = [t["seconds"] / o["seconds"] for t, o in zip(found[best], found["fathom"], strict=True)]
    ours = found["fathom"]
    print(json.dumps({
        "benchmark": "rl_step",
        "ratio": round(statistics.median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
        "against": best,
        "seconds": {name: round(value, 2) for name, value in medians.items()},
        "ours": {part: round(statistics.median(one[part] for one in ours), 2) for part in ("rollout", "update")},
        "kl_sampler": statistics.median(one["kl_sampler"] for one in ours),
        "mean_tokens": round(statistics.median(one["tokens"] for one in ours) / options.problems / options.samples, 1),
        "mean_tokens_of_peer": round(statistics.median(one["tokens"] for one in found[best]), 1),
    }))  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["--side"]:
        _work(json.loads(sys.argv[2]))
    else:
        main()
