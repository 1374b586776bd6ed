"""Cross entropy of a language-model head without holding the logits, gradients made on the way forward.

Theory
------
For 4096 tokens and 130k words the logits alone take 1 GB in bfloat16, and a float32 softmax and its gradient
several times that. But the loss is a sum over tokens, so a chunk of tokens can be finished before the next
begins: logits, softmax, loss, and at once

    g = softmax(logits) - onehot(target)          dhidden[chunk] = g W          dW += g^T hidden[chunk]

As the result is one sum, backward only multiplies both by the incoming scalar: nothing of size [N, V]
outlives a chunk, and no product is done twice (recomputing the logits in backward would make four products
out of three). The price: the [V, d] float32 weight gradient exists from forward to backward, and no weight
per token can be put on the loss afterwards; the per-token losses are therefore returned detached.

* Tokens with target == ignore_index are dropped first and cost nothing: a prompt in fine-tuning is free.
* Products are in hidden's type, the softmax in float32 from their logits, dW is accumulated in float32.
* The float32 log-sum-exp needs no second exp: it is max(logits) - log(max(p)), and max(p) >= 1/V cannot
  underflow.
* CHUNK = 256 tokens: at a vocabulary of 4096 the float32 chunk (4 MB) stays in cache; at 130k a smaller chunk
  would pay more for the pass over dW (200 MB per chunk) and a larger one takes more memory.
* It is one opaque operator: `torch.compile` meets no graph break, and it runs as it stands here. The products
  take more than four fifths of the time; Inductor's fusion of the whole, unchunked, is no faster.
"""

import torch
from torch import Tensor

CHUNK = 256


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int = -100,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """Cross entropy of softmax(hidden weight^T), summed over the tokens whose target is not ignore_index.

    Args:
        hidden: [N, d], bfloat16 or float32.
        weight: [V, d] in any floating type (cast to hidden's; the gradient is float32, then weight's type).
        targets: [N] int64, in 0..V-1 or ignore_index.
        ignore_index: the target of tokens without loss.
        chunk: tokens per chunk; bounds the memory, V * chunk * 12 bytes at the most.

    Returns:
        (sum of the losses, float32 scalar, differentiable; per-token losses [N] float32, detached, 0 where
        ignored).

    Raises:
        ValueError: if the shapes do not fit together.
    """
    if hidden.shape[1] != weight.shape[1] or targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"chunked_cross_entropy: shapes do not fit: hidden {hidden.shape}, weight {weight.shape}, "
            f"targets {targets.shape}"
        )
    grad = torch.is_grad_enabled()
    need_dhidden, need_dweight = grad and hidden.requires_grad, grad and weight.requires_grad
    token_losses, loss_sum, *_ = _cross_entropy(
        hidden, weight, targets, ignore_index, chunk, need_dhidden, need_dweight
    )
    return loss_sum, token_losses.detach()


@torch.library.custom_op("fathom::chunked_cross_entropy", mutates_args=())
def _cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    chunk: int,
    need_dhidden: bool,
    need_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns (token losses [N], their sum, dhidden, dweight): gradients of the sum, empty if not needed."""
    token_losses = torch.zeros_like(targets, dtype=torch.float32)
    dhidden, dweight = _gradients_like(hidden, weight, need_dhidden, need_dweight)
    head = weight.to(hidden.dtype)
    for rows in (targets != ignore_index).nonzero().squeeze(1).split(chunk):
        hidden_rows, target = hidden.index_select(0, rows), targets.index_select(0, rows)[:, None]
        logits = hidden_rows @ head.t()
        p = torch.softmax(logits, dim=1, dtype=torch.float32)
        log_sum_exp = logits.amax(1).float() - p.amax(1).log()
        token_losses[rows] = log_sum_exp - logits.gather(1, target).squeeze(1).float()
        dlogits = p.scatter_add_(1, target, p.new_full(target.shape, -1.0)).to(hidden.dtype)
        if need_dhidden:
            dhidden[rows] = dlogits @ head
        if need_dweight:
            dweight += dlogits.t() @ hidden_rows
    return token_losses, token_losses.sum(), dhidden, dweight


@_cross_entropy.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    chunk: int,
    need_dhidden: bool,
    need_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    token_losses = torch.empty_like(targets, dtype=torch.float32)
    gradients = _gradients_like(hidden, weight, need_dhidden, need_dweight)
    return token_losses, token_losses.new_empty(()), *gradients


def _gradients_like(hidden: Tensor, weight: Tensor, need_dhidden: bool, need_dweight: bool) -> list[Tensor]:
    """Zeros for dhidden (hidden's type) and dweight (float32); an empty tensor for the one not needed."""
    return [
        hidden.new_zeros(hidden.shape if need_dhidden else 0),
        weight.new_zeros(weight.shape if need_dweight else 0, dtype=torch.float32),
    ]


def _save_for_backward(ctx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.weight_type = inputs[1].dtype
    ctx.need_dhidden, ctx.need_dweight = inputs[5:]
    ctx.save_for_backward(*output[2:])


def _scale_gradients(ctx, _: None, dloss_sum: Tensor, *__: None) -> tuple[Tensor | None, ...]:
    dhidden, dweight = ctx.saved_tensors
    return (
        dhidden * dloss_sum.to(dhidden.dtype) if ctx.need_dhidden else None,
        (dweight * dloss_sum).to(ctx.weight_type) if ctx.need_dweight else None,
        *(None,) * 5,
    )


_cross_entropy.register_autograd(_scale_gradients, setup_context=_save_for_backward)
