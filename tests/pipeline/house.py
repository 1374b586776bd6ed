"""A small pipeline over a tiny random model: worked solutions, fine-tuning on them, rewards."""

import io
from pathlib import Path

from rich.console import Console

from fathom.config.pipeline import read_pipeline
from fathom.data import train_bpe
from fathom.model.checkpoint import save_model
from fathom.model.transformer import Transformer
from fathom.pipeline.run import PipelineResult, run_pipeline
from tests.train.tiny import MODEL

FILE = """
name = "house"

[evaluation]
tasks = ["modular"]
levels = 1
problems = 4
samples = 2
max_tokens = 6
prompt = {{ style = "chat", opens_thought = true }}
layout = {{ form = "rest", thoughts = "optional" }}

[[stages]]
name = "traces"
verb = "synth"
set = {{ source = "worked", problems = 12, tasks = [{{ name = "modular", levels = 1 }}] }}

[[stages]]
name = "student"
verb = "sft"
recipe = "sft.toml"
set = {{ model = "{model}", data.files = ["@traces/traces.jsonl"] }}

[[stages]]
name = "zero"
verb = "rl"
[stages.set]
model = "@student"
task = {{ name = "modular" }}
prompt = {{ style = "chat", opens_thought = true }}
rewards = {{ layout = {{ form = "rest", thoughts = "optional" }} }}
rollout = {{ problems = 2, samples = 2, max_tokens = 4 }}
train = {{ steps = 2, precision = "fp32" }}
eval = {{ problems = 2, probe = false }}
"""
SFT = """
name = "anything"
model = "replaced"
[data]
files = ["replaced"]
held_out = 0.0
[train]
epochs = 2.0
batch = 6
precision = "fp32"
[checkpoint]
every = 1
"""


def build(folder: Path) -> Path:
    """The pipeline's file, with all that it names beside it."""
    tokenizer = train_bpe(["0123456789"], 266)
    model = Transformer(MODEL.replace(vocab_size=tokenizer.vocab_size))
    model.init_weights(1)
    save_model(model, folder / "model", tokenizer=tokenizer)
    (folder / "house.toml").write_text(FILE.format(model=folder / "model"))
    (folder / "sft.toml").write_text(SFT)
    return folder / "house.toml"


def run(file: Path, runs: Path, *words: str, redo: bool = False, fresh: bool = False) -> tuple[PipelineResult, str]:
    """A session in the folder `runs`: its result, and what was said."""
    said = io.StringIO()
    how = {"console": Console(file=said, width=200), "runs": runs, "redo": redo, "fresh": fresh}
    return run_pipeline(read_pipeline(file, list(words)), file.parent, **how), said.getvalue()


def weights(folder: Path) -> dict[str, bytes]:
    """Every file of numbers of all stages."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}
