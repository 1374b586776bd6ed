"""One prompt in, text out as it is drawn: the plain form of generation that faster ones must equal."""

from collections.abc import Iterator

import torch

from fathom.data.tokenizer import Tokenizer
from fathom.engine.protocol import Sampling
from fathom.engine.sampling import SamplerState, sample
from fathom.errors import UserError
from fathom.model.cache import KVCache
from fathom.model.transformer import Transformer


@torch.inference_mode()
def generate_ids(
    model: Transformer, prompt_ids: list[int], *, max_tokens: int, sampling: Sampling, stop_ids: tuple[int, ...] = ()
) -> Iterator[int]:
    """Token ids drawn after `prompt_ids`, one by one; ends before a stop id or after `max_tokens`.

    Raises `UserError` for an empty prompt, or one that leaves no room in the model's context.
    """
    if not prompt_ids:
        raise UserError("the prompt has no tokens; give some text to continue")
    if len(prompt_ids) >= model.config.max_position_embeddings:
        raise UserError(
            f"the prompt has {len(prompt_ids)} tokens, but the model's context is "
            f"{model.config.max_position_embeddings}; shorten it"
        )
    length = min(len(prompt_ids) + max_tokens, model.config.max_position_embeddings)
    weight = model.model.embed_tokens.weight
    state = SamplerState.start(sampling, prompt_ids, model.config.vocab_size)
    cache = KVCache(
        model.config, batch=1, length=length, dtype=model.compute_dtype or weight.dtype, device=weight.device
    )
    new = torch.tensor([prompt_ids], device=weight.device)
    for _ in range(length - len(prompt_ids)):
        hidden, _ = model.hidden_states(new, cache=cache)
        new = sample(model.logits(hidden[:, -1]), [state])[:, None]
        token = int(new)
        if token in stop_ids:
            return
        state.advance(token)
        yield token


def generate(
    model: Transformer, tokenizer: Tokenizer, prompt: str, *, max_tokens: int, sampling: Sampling, chat: bool = False
) -> Iterator[str]:
    """Pieces of text that continue `prompt`, whole characters only; ends at the model's end-of-text token.

    With `chat` the prompt is a user's message in the tokenizer's chat template, else plain text behind the token that
    begins one.
    """
    if chat:
        message = {"role": "user", "content": prompt}
        ids = tokenizer.encode(tokenizer.apply_chat_template([message]), special=True)
    else:
        start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        ids = start + tokenizer.encode(prompt)
    stream = tokenizer.stream()
    for token in generate_ids(
        model, ids, max_tokens=max_tokens, sampling=sampling, stop_ids=tuple(tokenizer.eos_token_ids)
    ):
        if piece := stream.push(token):
            yield piece
    if rest := stream.flush():
        yield rest
