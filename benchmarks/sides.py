"""The two sides of a training comparison: Fathom and transformers, each a process that trains on command.

A side builds the same architecture at the same size from the same `ModelConfig`, with fused AdamW, bfloat16
arithmetic and the same batches. A measuring process keeps all sides alive and lets them work in turns, so
that the machine's drift meets them alike; a side that is not working holds memory but no core.
"""

import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fathom.config import ModelConfig, read_config, to_hf
from fathom.config.presets import PRESETS, preset
from fathom.config.recipe import Precision

Step = Callable[[torch.Tensor], float]
"""tokens [B, T+1] int64 -> loss; one optimizer step."""
Evaluate = Callable[[torch.Tensor], float]
"""tokens [B, T+1] int64 -> mean next-token loss in nats, without training."""


def read_model(name: str) -> ModelConfig:
    """A preset's name, or the path of a `config.json`."""
    return preset(name) if name in PRESETS else read_config(Path(name))


def fathom_side(
    config: ModelConfig,
    *,
    optimizer: str = "adamw",
    precision: Precision = "bf16",
    recompute: bool = False,
    compiled: bool,
    lr: float,
    seed: int,
) -> tuple[Step, Evaluate]:
    """Our own step, exactly as the trainer takes it: loss, clipping, optimizer, router bias."""
    from fathom.config.recipe import OptimizerSection
    from fathom.model.transformer import Transformer
    from fathom.train.objective import pretrain_loss
    from fathom.train.optimizers import build_optimizer
    from fathom.train.precision import set_precision

    model = Transformer(config)
    model.init_weights(seed)
    set_precision(model, precision, recompute=recompute)
    if compiled:
        model.compile_blocks()
    rule = build_optimizer(model, OptimizerSection(name=optimizer, lr=lr))

    def step(tokens: torch.Tensor) -> float:
        loss, report = pretrain_loss(model, tokens, mtp_weight=0.3, balance_weight=1e-4)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rule.step(lr)
        rule.zero_grad()
        if report.load.numel():
            model.update_router_bias(report.load, 1e-3)
        return float(report.nll.mean())

    def evaluate(tokens: torch.Tensor) -> float:
        return float(pretrain_loss(model, tokens, mtp_weight=0.0, balance_weight=0.0)[1].nll.mean())

    return step, evaluate


def transformers_side(config: ModelConfig, *, lr: float, compiled: bool, seed: int) -> tuple[Step, Evaluate]:
    """transformers' model in pure bfloat16, its fastest form; eager, or compiled with its grouped expert products."""
    import transformers

    transformers.logging.set_verbosity_error()
    values = to_hf(config, dtype="float32") | {"num_nextn_predict_layers": 0}
    torch.manual_seed(seed)
    kwargs: dict[str, Any] = {"dtype": torch.bfloat16}
    if compiled and config.n_routed_experts is not None:
        kwargs["experts_implementation"] = "grouped_mm"
    hf_config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    model = transformers.AutoModelForCausalLM.from_config(hf_config, **kwargs)
    model.train()
    if compiled:
        model.compile()
    rule = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def forward(tokens: torch.Tensor) -> Any:
        inputs, targets = tokens[:, :-1], tokens[:, 1:].contiguous()
        return model(input_ids=inputs, labels=targets, shift_labels=targets, use_cache=False)

    def step(tokens: torch.Tensor) -> float:
        loss = forward(tokens).loss
        loss.backward()
        rule.step()
        rule.zero_grad(set_to_none=True)
        return float(loss)

    def evaluate(tokens: torch.Tensor) -> float:
        return float(forward(tokens).loss)

    return step, evaluate


FATHOM_SIDES: dict[str, dict[str, Any]] = {
    "fathom": {"compiled": True},
    "fathom-muon": {"compiled": True, "optimizer": "muon"},
    "fathom-eager": {"compiled": False},
    "fathom-recompute": {"compiled": False, "recompute": True},
    "fathom-fp8": {"compiled": False, "precision": "fp8"},
    "fathom-fp8-recompute": {"compiled": False, "precision": "fp8", "recompute": True},
}
"""Ours, in bfloat16 with AdamW unless said."""


def build_side(name: str, config: ModelConfig, *, lr: float, seed: int) -> tuple[Step, Evaluate]:
    """One of `FATHOM_SIDES`, `transformers-eager` or `transformers-compiled`."""
    if name in FATHOM_SIDES:
        return fathom_side(config, lr=lr, seed=seed, **FATHOM_SIDES[name])
    return transformers_side(config, lr=lr, compiled=name == "transformers-compiled", seed=seed)


class Side:
    """A side in its own process, driven by lines of JSON."""

    def __init__(self, name: str, arguments: dict[str, Any]) -> None:
        self.name = name
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.sides", json.dumps({"side": name, **arguments})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, **command: Any) -> dict[str, Any]:
        """Send one command and wait for its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self.name} ended with exit code {self._process.wait()}; its error is above")
        return json.loads(answer)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


@contextmanager
def open_sides(names: list[str], arguments: dict[str, Any]) -> Iterator[dict[str, Side]]:
    """All sides, each in its process; ended when the block is left."""
    sides = {name: Side(name, arguments) for name in names}
    try:
        yield sides
    finally:
        for side in sides.values():
            side.close()


def _work(arguments: dict[str, Any]) -> None:
    """A side's process: `train` (for `steps` or `seconds`) and `evaluate`, one JSON line each."""
    warnings.filterwarnings("ignore")
    config = read_model(arguments["model"])
    step, evaluate = build_side(arguments["side"], config, lr=arguments["lr"], seed=arguments["seed"])
    text, held_out = _text(arguments, config)
    batch, width = arguments["batch"], arguments["sequence"] + 1
    windows = text[: len(text) // (batch * width) * batch * width].view(-1, batch, width)
    done = 0
    for line in sys.stdin:
        command = json.loads(line)
        start = time.perf_counter()
        losses = []
        if command["do"] == "evaluate":
            held = held_out[: len(held_out) // (batch * width) * batch * width].view(-1, batch, width)
            with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # no second compilation for inference
                losses = [evaluate(tokens) for tokens in held]
        else:
            until = command.get("seconds", float("inf"))
            while len(losses) < command.get("steps", float("inf")) and time.perf_counter() - start < until:
                losses.append(step(windows[done % len(windows)]))
                done += 1
        seconds = time.perf_counter() - start
        answer = {"seconds": seconds, "steps": len(losses), "done": done, "loss": sum(losses) / max(1, len(losses))}
        print(json.dumps(answer), flush=True)


def _text(arguments: dict[str, Any], config: ModelConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Training and held-out tokens: of the data folder where one is given, else random."""
    if arguments.get("data") is None:
        generator = torch.Generator().manual_seed(arguments["seed"])
        tokens = torch.randint(
            config.vocab_size, (8, arguments["batch"], arguments["sequence"] + 1), generator=generator
        )
        return tokens.flatten(), tokens[:1].flatten()
    from fathom.data import Loader, TokenDataset

    dataset = TokenDataset(Path(arguments["data"]))
    common = {"sequence_length": arguments["sequence"], "batch": arguments["batch"], "seed": 0, "fim_rate": 0.0}
    training = Loader(dataset, split="train", **common)
    held_out = Loader(dataset, split="heldout", **common)
    batches = [training.next_batch() for _ in range(arguments["train_batches"])]
    held = [held_out.next_batch() for _ in range(arguments["heldout_batches"])]
    return torch.cat(batches).flatten(), torch.cat(held).flatten()


if __name__ == "__main__":
    _work(json.loads(sys.argv[1]))
