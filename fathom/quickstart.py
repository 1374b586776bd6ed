"""The first ten minutes: a small DeepSeek-V3, trained on text that every machine has, and what came of it."""

from pathlib import Path

from rich.console import Console

import fathom
from fathom.config import PretrainRecipe, read_recipe
from fathom.engine.generate import generate
from fathom.engine.protocol import Sampling
from fathom.errors import INTERRUPTED, UserError, nearest
from fathom.model.accounting import count_parameters
from fathom.report.command import fathom_command
from fathom.report.tables import count, print_rows
from fathom.train.display import share_of_peak
from fathom.train.metrics import read_metrics
from fathom.train.pretrain import RunResult, pretrain
from fathom.train.run import RunFolder

PROMPTS = ("def read_file(path):\n", "import os\n\nclass ", "# Return the number of ")
SAMPLE_TOKENS = 80


def quickstart(overrides: list[str], *, fresh: bool) -> int:
    """Train `recipes/quickstart.toml`, or go on where it stopped; then samples and a table of results."""
    recipe = read_recipe(shipped_recipe("quickstart"), overrides)
    folder = Path("runs") / recipe.name
    resume = RunFolder(folder).recipe.exists() and not fresh
    result = pretrain(recipe, resume=resume, overwrite=fresh)
    if result.interrupted or result.checkpoint is None:
        return INTERRUPTED
    _show_samples(result.checkpoint)
    print_rows("results", _results(recipe, result))
    console = Console(highlight=False, soft_wrap=True)
    command = fathom_command()
    console.print("\nNow try:")
    for rest in (f'generate {folder} "def main():"', f"serve {folder}", f"load {folder}", "pretrain --help"):
        console.print(f"  {command} {rest}", markup=False)
    return 0


def shipped_recipe(name: str) -> Path:
    """The recipe of that name as shipped: inside an installed package, or beside it in a clone. Raises `UserError`."""
    package = Path(fathom.__file__).parent
    folders = [folder for folder in (package / "recipes", package.parent / "recipes") if folder.is_dir()]
    for folder in folders:
        if (file := folder / f"{name}.toml").is_file():
            return file
    known = sorted(file.stem for folder in folders for file in folder.glob("*.toml"))
    raise UserError(f"recipes: no '{name}'{nearest(name, known)}; there are: {', '.join(known) or 'none'}")


def _show_samples(checkpoint: Path) -> None:
    model, tokenizer = fathom.load(checkpoint, dtype="float32")
    assert tokenizer is not None
    for prompt in PROMPTS:
        print(f"\n─── {prompt.splitlines()[0]}\n{prompt}", end="", flush=True)
        sampling = Sampling(temperature=0.7, top_p=0.9, seed=1)
        for piece in generate(model, tokenizer, prompt, max_tokens=SAMPLE_TOKENS, sampling=sampling):
            print(piece, end="", flush=True)
        print()
    print()


def _results(recipe: PretrainRecipe, result: RunResult) -> list[tuple[str, str]]:
    """What the run's own metrics say, first against last."""
    lines = read_metrics(RunFolder(result.folder).metrics)
    steps = [line for line in lines if line["kind"] == "train"]
    evaluations = [line for line in lines if line["kind"] == "eval"]
    first, last = steps[0], evaluations[-1]
    middle = sorted(line["tokens_per_second"] for line in steps)[len(steps) // 2]
    # Of the largest peak that was measured in the run: earlier steps were compared with earlier measurements.
    share = middle / max(line["tokens_per_second"] / line["gemm_share"] for line in steps)
    parameters = count_parameters(recipe.model)
    seconds = sum(line["seconds"] for line in steps)
    rows = [
        (
            "model",
            f"DeepSeek-V3 type, {count(parameters.total)} parameters, {count(parameters.active)} active per token",
        ),
        ("trained on", f"{count(steps[-1]['tokens'])} tokens in {seconds / 60:.1f} min, {middle:,.0f} tokens/s"),
        ("of this machine", f"{share_of_peak(share)} in matrix products, as measured"),
        ("held-out loss", f"{last['loss']:.3f} nats per token (training loss of step 1: {first['loss']:.3f})"),
        ("bits per byte", f"{last['bits_per_byte']:.3f} held out (training, step 1: {first['bits_per_byte']:.3f})"),
    ]
    if "max_vio" in last:
        worst = max(line["max_vio"] for line in steps)
        batches = f"{steps[-1]['max_vio']:.2f} in the last training batch, {worst:.2f} in the worst (0 is even)"
        rows.append(("expert balance", f"MaxVio {last['max_vio']:.2f} on held-out text, {batches}"))
    if "mtp_acceptance" in last:
        rows.append(
            ("second token", f"{last['mtp_acceptance']:.0%} of the MTP module's drafts are what the model says")
        )
    rows.append(("samples", f"{RunFolder(result.folder).samples}, one of every evaluation"))
    rows.append(("folder", f"{result.checkpoint} (opens in transformers too)"))
    return rows
