"""What an engine may use."""

from typing import Literal

from pydantic import Field

from fathom.config.section import Section
from fathom.engine.packing import Weights

KVCacheKind = Literal["as computed", "fp8"]
"""How what is remembered is kept: in the activations' own numbers, or as latents in FP8 (`fathom.model.latents`)."""


class EngineSettings(Section):
    """What an engine may use."""

    cache_memory: int = 1 << 30
    """Bytes for remembered keys and values; requests wait when it is full."""
    max_running: int = Field(default=256, ge=1)
    """Sequences that are computed at once, at most."""
    queue: int = Field(default=1024, ge=1)
    """Requests that may wait; more are refused."""
    prefill_tokens: int = Field(default=256, ge=1)
    """Tokens of prompts per step: more read prompts faster, and make those who are writing wait longer."""
    context: int | None = Field(default=None, ge=2)
    """Longest prompt and output together; None is what the model was made for."""
    kv_cache: KVCacheKind = "as computed"
    """`fp8` keeps latents in one byte a number, in FlashMLA's layout: little more than half the memory, slightly
    different text. For latent attention in bfloat16 alone."""
    weights: Weights = "as loaded"
    """`int8` and `fp8` round weights to blocks of one byte each: faster where memory is the limit, slightly different
    text. `int8` rounds activations too; `fp8` does not, and keeps the numbers of a folder that is in FP8 already."""
    speculate: bool = True
    """Draft with the model's multi-token-prediction module, if it has one."""
    record_routes: bool = False
    """Give with every output the experts that computed its tokens (`Chunk.routes`), to be replayed by a trainer."""
