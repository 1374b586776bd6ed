"""From logits to tokens, many requests at once.

Three properties carry this file. A request's n-th token depends on its seed, n and its own logits, and on nothing else
that happens to be in the batch: uniform numbers come from a counter (`uniform`), and every operation treats its rows
apart, to the bit. A token of probability 0 is never drawn. And drawing costs little more than the softmax: filters look
at a few candidates before they sort a vocabulary, and the inverse of the distribution function is taken in two levels.

Names: `R` rows (one per position to be drawn), `V` vocabulary, `C` candidates, in descending order of probability.
"""

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from fathom.engine.protocol import Sampling, TokenLogprob
from fathom.errors import UserError
from fathom.kernels import ops as kernels

Purpose = Literal["token", "draft", "accept", "residual"]
Masks = Sequence[Tensor | None] | None
"""One per row: bool [V], true where a token is allowed, or None where all are."""

_BLOCK = 64
_CANDIDATES = (64, 512)
_GREEDY_BELOW = 1e-5  # dividing by less could overflow float32, and no other token has a chance
_LARGEST = 1e30  # divided by _GREEDY_BELOW still finite: an extreme penalty or bias must not become inf − inf


def uniform(seed: int, position: int, purpose: Purpose) -> float:
    """A number in [0, 1) that depends on its arguments alone."""
    digest = hashlib.blake2b(f"{seed} {position} {purpose}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


@dataclass(slots=True)
class SamplerState:
    """What drawing a request's next token needs to know beside its logits."""

    sampling: Sampling
    seed: int
    """`sampling.seed`, or a fresh one."""
    position: int
    """Tokens drawn so far."""
    bias: tuple[Tensor, Tensor] | None
    """Token ids int64 [N] and what is added to their logits, float32 [N]."""
    counts: Tensor | None
    """float32 [V]: how often the output holds each token; None where no penalty asks."""
    seen: Tensor | None
    """bool [V]: tokens that prompt or output hold; None where no repetition penalty asks."""

    @classmethod
    def start(cls, sampling: Sampling, prompt_ids: Sequence[int], vocab_size: int) -> Self:
        """The state before the first token. Raises `UserError` for a bias on a token that does not exist."""
        outside = [token for token in sampling.logit_bias if not 0 <= token < vocab_size]
        if outside:
            raise UserError(f"logit_bias: there is no token {outside[0]}; ids go from 0 to {vocab_size - 1}")
        bias, counts, seen = None, None, None
        if sampling.logit_bias:
            values = torch.tensor(list(sampling.logit_bias.values()), dtype=torch.float64)
            bias = (torch.tensor(list(sampling.logit_bias)), values.clamp(-_LARGEST, _LARGEST).float())
        if sampling.presence_penalty or sampling.frequency_penalty:
            counts = torch.zeros(vocab_size)
        if sampling.repetition_penalty != 1:
            seen = torch.zeros(vocab_size, dtype=torch.bool)
            seen[torch.tensor(prompt_ids, dtype=torch.int64)] = True
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        return cls(sampling, seed, 0, bias, counts, seen)

    def advance(self, token: int) -> None:
        """Take `token` as drawn."""
        self.position += 1
        if self.counts is not None:
            self.counts[token] += 1
        if self.seen is not None:
            self.seen[token] = True

    def uniform(self, purpose: Purpose) -> float:
        """The uniform number of this position."""
        return uniform(self.seed, self.position, purpose)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.sampling.temperature < _GREEDY_BELOW

    @property
    def filters(self) -> bool:
        """Whether some tokens are left out for being unlikely."""
        return self.sampling.top_p < 1 or self.sampling.top_k > 0 or self.sampling.min_p > 0

    @property
    def adjusts(self) -> bool:
        """Whether logits change before the temperature divides them."""
        return self.bias is not None or self.counts is not None or self.seen is not None

    def adjust(self, row: Tensor) -> None:
        """Bias and penalties on `row` float32 [V], in place."""
        if self.bias is not None:
            tokens, values = self.bias
            row[tokens.to(row.device)] += values.to(row.device)
        if self.seen is not None:
            penalty = self.sampling.repetition_penalty
            row.copy_(torch.where(self.seen.to(row.device), torch.where(row > 0, row / penalty, row * penalty), row))
        if self.counts is not None:
            counts = self.counts.to(row.device)
            row -= counts * self.sampling.frequency_penalty + (counts > 0) * self.sampling.presence_penalty
        row.clamp_(-_LARGEST, _LARGEST)


def sample(logits: Tensor, states: Sequence[SamplerState], masks: Masks = None) -> Tensor:
    """logits [R, V] float32 -> token ids [R] int64, each of its own distribution: see `probabilities`.

    `logits` is left as it is; the states are not advanced.
    """
    logits = _adjusted(logits, states, masks)
    ids, kinds = torch.empty(len(states), dtype=torch.int64, device=logits.device), _kinds(states)
    for rows, kind in kinds:
        part, chosen = _take(logits, rows), [states[row] for row in rows]
        if kind == "greedy":
            drawn = _argmax(part)
        elif kind == "plain":
            drawn = _draw_plain(part, chosen)
        else:
            drawn = _draw_filtered(_softmax(part, chosen), chosen)
        if len(kinds) == 1:
            return drawn
        ids[torch.tensor(rows, device=ids.device)] = drawn
    return ids


def probabilities(logits: Tensor, states: Sequence[SamplerState], masks: Masks = None) -> Tensor:
    """logits [R, V] float32 -> the probabilities [R, V] float32 that `sample` draws by.

    In this order: logit bias, penalties, mask, temperature, top-k, top-p (of what top-k left), min-p. Greedy rows have
    a 1 at the most likely token. A mask must allow at least one token.
    """
    logits = _adjusted(logits, states, masks)
    result, kinds = torch.empty_like(logits), _kinds(states)
    for rows, kind in kinds:
        part, chosen = _take(logits, rows), [states[row] for row in rows]
        if kind == "greedy":
            dense = torch.zeros_like(part).scatter_(1, _argmax(part)[:, None], 1.0)
        elif kind == "plain":
            dense = _softmax(part, chosen)
        else:
            dense = _softmax(part, chosen)
            for group, values, tokens in _candidates(dense, chosen):
                kept = torch.zeros_like(dense[group]).scatter_(1, tokens, _normalised(values))
                dense[group] = kept
        if len(kinds) == 1:
            return dense
        result[torch.tensor(rows, device=result.device)] = dense
    return result


def draw(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """probabilities [R, V], each row of any positive sum, and uniforms [R] float64 in [0, 1) -> token ids [R] int64.

    Inverts the distribution function, first over sums of blocks, then inside the block that was hit. A token of
    probability 0 is never drawn: every step looks for the first place where the running sum rises above its target,
    and a target lies below the sum that it is a share of.
    """
    blocks = _blocks(probabilities, 0.0)
    block, within = _invert(blocks.sum(-1), uniforms)
    inside = blocks[torch.arange(len(blocks), device=blocks.device), block]
    place, _ = _invert(inside, within)
    # Only a row of NaN can come to the padding; it must not name a token that does not exist.
    return (block * _BLOCK + place).clamp_(max=probabilities.shape[1] - 1)


def speculate(
    target: Tensor, draft: Tensor, drafted: Tensor, accept: Tensor, residual: Tensor
) -> tuple[Tensor, Tensor]:
    """Speculative sampling (arXiv 2211.17192, algorithm 1): the outcome is distributed as `target`, whoever drafted.

    target, draft: probabilities [R, V]; drafted: ids [R], drawn from `draft`; accept, residual: uniforms [R] float64 of
    distinct purposes. Returns accepted [R] bool and ids [R]: the drafted one where accepted, else one drawn from
    max(target − draft, 0). With a one-hot `target`, ids are its argmax.
    """
    p = target.gather(1, drafted[:, None])[:, 0]
    q = draft.gather(1, drafted[:, None])[:, 0]
    accepted = accept * q.double() < p.double()
    ids = drafted.clone()
    rejected = (~accepted).nonzero()[:, 0]
    if len(rejected):
        left = (target[rejected] - draft[rejected]).clamp_(min=0)
        # Where both agree but for rounding nothing is left; the target itself is then the right distribution.
        left = torch.where(left.amax(-1, keepdim=True) > 0, left, target[rejected])
        ids[rejected] = draw(left, residual[rejected])
    return accepted, ids


def token_logprobs(logits: Tensor, ids: Tensor, top: int, temperatures: Sequence[float]) -> list[TokenLogprob]:
    """Log-probability of each of ids [R] with the `top` likeliest others; logits [R, V] float32 as the model gave them.

    At temperatures [R] (one too low to divide by counts as the lowest that is not), before bias, penalties, masks and
    filters. The alternatives are in descending order and hold the token itself where it is among them.
    """
    scale = torch.tensor([1 / max(temperature, _GREEDY_BELOW) for temperature in temperatures], device=logits.device)
    wide = scale.double()[:, None]
    total = kernels.log_sum_exp(logits, scale) if kernels.usable(logits) else (logits * wide).logsumexp(dim=-1)
    own = (logits.gather(1, ids[:, None]) * wide)[:, 0] - total
    best = logits.topk(min(top, logits.shape[1]), dim=-1)
    alternatives = zip(best.indices.tolist(), (best.values * wide - total[:, None]).tolist(), strict=True)
    return [
        TokenLogprob(token, logprob, list(zip(tokens, values, strict=True)))
        for token, logprob, (tokens, values) in zip(ids.tolist(), own.tolist(), alternatives, strict=True)
    ]


def _adjusted(logits: Tensor, states: Sequence[SamplerState], masks: Masks) -> Tensor:
    """Bias, penalties and masks; the same tensor when no row has any."""
    assert logits.shape[0] == len(states), f"{logits.shape=} {len(states)=}"
    masked = [] if masks is None else [row for row, mask in enumerate(masks) if mask is not None]
    adjusting = [row for row, state in enumerate(states) if state.adjusts]
    if not masked and not adjusting:
        return logits
    logits = logits.clone()
    for row in adjusting:
        states[row].adjust(logits[row])
    for row in masked:
        logits[row].masked_fill_(~masks[row].to(logits.device), float("-inf"))
    return logits


def _kinds(states: Sequence[SamplerState]) -> list[tuple[list[int], str]]:
    """Rows by what has to be done for them."""
    rows: dict[str, list[int]] = {}
    for row, state in enumerate(states):
        rows.setdefault("greedy" if state.greedy else "filtered" if state.filters else "plain", []).append(row)
    return [(members, kind) for kind, members in rows.items()]


def _take(tensor: Tensor, rows: list[int]) -> Tensor:
    return tensor if len(rows) == len(tensor) else tensor[torch.tensor(rows, device=tensor.device)]


def _uniforms(states: Sequence[SamplerState], device: torch.device) -> Tensor:
    return torch.tensor([state.uniform("token") for state in states], dtype=torch.float64, device=device)


def _softmax(logits: Tensor, states: Sequence[SamplerState]) -> Tensor:
    temperatures = [state.sampling.temperature for state in states]
    if any(temperature != 1 for temperature in temperatures):
        logits = logits / torch.tensor(temperatures, device=logits.device)[:, None]
    return logits.softmax(dim=-1)


def _blocks(rows: Tensor, filler: float) -> Tensor:
    """[R, V] -> [R, ⌈V / _BLOCK⌉, _BLOCK], a view where V allows."""
    missing = -rows.shape[1] % _BLOCK
    return (F.pad(rows, (0, missing), value=filler) if missing else rows).view(len(rows), -1, _BLOCK)


def _argmax(rows: Tensor) -> Tensor:
    """The first of the largest in each row [R, V]; on a CPU an order of magnitude faster than `Tensor.argmax`."""
    blocks = _blocks(rows, float("-inf"))
    block = blocks.amax(-1).argmax(-1)
    return block * _BLOCK + blocks[torch.arange(len(rows), device=rows.device), block].argmax(-1)


def _invert(weights: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """weights [R, N] and uniforms [R] -> the place [R] where the running sum passes that share of it.

    Also how far inside that place's own weight the share lies, in [0, 1).
    """
    running = weights.double().cumsum(-1)
    total = running[:, -1]
    zero = torch.zeros_like(total)
    target = torch.minimum(uniforms * total, torch.nextafter(total, zero))[:, None]
    place = torch.searchsorted(running, target, right=True).clamp_(max=weights.shape[1] - 1)
    upper = running.gather(1, place)
    lower = torch.where(place > 0, running.gather(1, (place - 1).clamp_(min=0)), 0.0)
    within = ((target - lower) / (upper - lower))[:, 0]
    return place[:, 0], within.clamp_(0.0, 1 - 2**-53)


def _normalised(values: Tensor) -> Tensor:
    # A running sum, because `sum` over one long row may be split among threads, and then depends on R.
    return (values / values.double().cumsum(-1)[:, -1:]).float()


def _draw_plain(logits: Tensor, states: Sequence[SamplerState]) -> Tensor:
    """logits [R, V] -> ids [R] by the softmax at each row's temperature."""
    uniforms = _uniforms(states, logits.device)
    if not kernels.usable(logits):
        return draw(_softmax(logits, states), uniforms)
    temperatures = torch.tensor([state.sampling.temperature for state in states], dtype=torch.float64)
    return kernels.draw_rows(logits, temperatures, uniforms)


def _draw_filtered(dense: Tensor, states: Sequence[SamplerState]) -> Tensor:
    """dense [R, V] -> ids [R], from the candidates alone."""
    ids = torch.empty(len(states), dtype=torch.int64, device=dense.device)
    uniforms = _uniforms(states, dense.device)
    for group, values, tokens in _candidates(dense, states):
        place, _ = _invert(values, uniforms[group])
        ids[group] = tokens.gather(1, place[:, None])[:, 0]
    return ids


def _candidates(dense: Tensor, states: Sequence[SamplerState]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Groups of rows: which [G], their kept probabilities [G, C], 0 where left out, and token ids [G, C].

    Few candidates settle most rows; the others try more, the last ones a sorted vocabulary. How many a row comes to
    see depends on that row alone, and so does the order of equally likely tokens.
    """
    vocab = dense.shape[1]
    settings = torch.tensor(
        [(min(s.sampling.top_k or vocab, vocab), s.sampling.top_p, s.sampling.min_p) for s in states],
        dtype=torch.float64,
        device=dense.device,
    )
    rows = torch.arange(len(states), device=dense.device)
    groups = []
    for size in (*(size for size in _CANDIDATES if size < vocab), vocab):
        values, tokens = _largest(dense if len(rows) == len(dense) else dense[rows], size)
        kept, settled = _filter(values, vocab, *settings[rows].T[:, :, None])
        if settled.any():
            groups.append((rows[settled], kept[settled], tokens[settled]))
        rows = rows[~settled]
        if not len(rows):
            break
    return groups


def _filter(values: Tensor, vocab: int, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> tuple[Tensor, Tensor]:
    """values [R, C] with those outside the filters at 0, and whether a row [R] needs no more candidates to know them.

    top_k (the vocabulary's size where not asked for), top_p and min_p are [R, 1]. The nucleus is the smallest set of
    likeliest tokens that reaches `top_p`, so a token is in it while the sum before it is below.
    """
    candidates = values.shape[1]
    exact = values.double()
    running = exact.cumsum(-1)
    ranks = torch.arange(candidates, device=values.device)
    last = top_k.clamp(max=candidates).long() - 1
    wanted = top_p * torch.where(top_k < vocab, running.gather(1, last), 1.0)
    nucleus = (running - exact < wanted) | (top_p >= 1)
    likely = exact >= min_p * exact[:, :1]
    ended = ((top_p < 1) & (running[:, -1:] >= wanted)) | ~likely[:, -1:]
    settled = torch.where(top_k < vocab, top_k <= candidates, ended | (candidates == vocab))
    return torch.where((ranks < top_k) & nucleus & likely, values, 0.0), settled[:, 0]


def _largest(rows: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The `size` largest of each row [R, V] in descending order, and where they stand.

    They lie in the `size` blocks with the largest maxima, so the selection looks only there.
    """
    if size == rows.shape[1]:
        return rows.sort(dim=-1, descending=True, stable=True)
    blocks = _blocks(rows, 0.0)
    if blocks.shape[1] < 2 * size:
        return rows.topk(size, dim=-1)
    best = blocks.amax(-1).topk(size, dim=-1).indices
    first = torch.arange(len(rows), device=rows.device)[:, None] * blocks.shape[1]
    inside = blocks.reshape(-1, _BLOCK).index_select(0, (best + first).view(-1)).view(len(rows), -1)
    values, places = inside.topk(size, dim=-1)
    return values, best.gather(1, places // _BLOCK) * _BLOCK + places % _BLOCK
