"""One step of the engine: a call of the model over many sequences, and what is drawn from it."""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from fathom.engine.blocks import SINGLES_BELOW, BlockPool
from fathom.engine.protocol import Request
from fathom.engine.sampling import draw, probabilities, sample, speculate, token_logprobs
from fathom.engine.sequence import Sequence
from fathom.errors import UserError
from fathom.kernels.ops import PAGE
from fathom.model.paged import PagedCache, PagedCall, Stretch
from fathom.model.transformer import Transformer


@dataclass(frozen=True)
class Work:
    """Tokens start..stop of a sequence, to be computed in this step."""

    sequence: Sequence
    start: int
    stop: int
    draft: int | None = None
    """A guess at the token behind them, to be computed too."""

    @property
    def is_stretch(self) -> bool:
        """Whether its tokens attend together rather than one by one. It depends on their place in the text alone: the
        two ways round differently, and what a token becomes must not depend on who else is served."""
        return self.start >= SINGLES_BELOW and self.stop <= self.sequence.prompt_length

    @property
    def tokens(self) -> list[int]:
        """Ids of what is computed, the draft at the end."""
        return self.sequence.tokens[self.start : self.stop] + ([] if self.draft is None else [self.draft])

    @property
    def of_prompt(self) -> int:
        """How many of its tokens are the prompt's."""
        return max(0, min(self.stop, self.sequence.prompt_length) - self.start)

    @property
    def reaches_end(self) -> bool:
        """Whether a token is drawn after it."""
        return self.stop == len(self.sequence.tokens)


@dataclass
class Counts:
    """Tokens of a step."""

    read: int = 0
    """Of prompts."""
    drawn: int = 0
    drafted: int = 0
    accepted: int = 0


class Stepper:
    """Runs a model over work, draws, and drafts."""

    def __init__(self, model: Transformer, cache: PagedCache, pool: BlockPool, *, speculates: bool) -> None:
        self._model, self._cache, self._pool, self._speculates = model, cache, pool, speculates

    def step(self, work: list[Work]) -> Counts:
        """Compute `work`, for which sequences have pages, and push what is drawn to the sequences."""
        counts = Counts(read=sum(item.of_prompt for item in work))
        # Single tokens go first in a call.
        work = sorted(work, key=lambda item: item.is_stretch)
        hidden = self._hidden(work)
        first_rows = list(itertools.accumulate((len(item.tokens) for item in work[:-1]), initial=0))
        ends = [
            (item, first + item.stop - item.start - 1)
            for item, first in zip(work, first_rows, strict=True)
            if item.reaches_end
        ]
        rows = [row for item, row in ends for row in range(row, row + 1 + (item.draft is not None))]
        logits = None
        if rows:
            every = len(rows) == len(hidden)  # which they then are, in order
            logits = self._model.logits(hidden if every else hidden[torch.tensor(rows)])
        for item in work:
            item.sequence.computed = item.stop
        if logits is not None:
            self._draw([item.sequence for item, _ in ends], [item.draft for item, _ in ends], logits, counts)
        if self._cache.routes is not None:
            self._keep_routes([item.sequence for item in work])
        if self._speculates:
            self._draft_next(work, first_rows, hidden)
        for item in work:
            item.sequence.publish_blocks(self._pool)
        return counts

    def _hidden(self, work: list[Work]) -> Tensor:
        """Hidden states [T, D] of all tokens of `work`."""
        ids = torch.tensor([token for item in work for token in item.tokens])
        call = self._call([(item.sequence, item.start, len(item.tokens), item.is_stretch) for item in work])
        hidden, reports = self._model.hidden_states(ids[None], cache=call)
        call.record([report.expert_ids for report in reports])
        return hidden[0]

    def _keep_routes(self, sequences: list[Sequence]) -> None:
        """Read the routes of those who have come to their end, while they still hold their pages."""
        for sequence in sequences:
            if sequence.output.finish_reason in ("stop", "length"):
                sequence.routes = self._cache.routes_of(sequence.pages, len(sequence.tokens) - 1)

    def _call(self, parts: list[tuple[Sequence, int, int, bool]]) -> PagedCall:
        """The call for (sequence, first position, tokens, is a stretch), stretches last."""
        positions, places, tables, stretches = [], [], [], []
        for sequence, start, count, is_stretch in parts:
            if is_stretch:
                own = torch.tensor(sequence.pages[: -(-(start + count) // PAGE)])
                stretches.append(Stretch(len(positions), len(positions) + count, own, past=start))
            else:
                tables.extend([sequence.pages] * count)
            for position in range(start, start + count):
                positions.append(position)
                places.append(sequence.pages[position // PAGE] * PAGE + position % PAGE)
        width = max(map(len, tables), default=0)
        table = torch.tensor([row + [0] * (width - len(row)) for row in tables], dtype=torch.int32)
        visible = torch.tensor([position + 1 for position in positions[: len(tables)]], dtype=torch.int32)
        return PagedCall(
            self._cache, torch.tensor(positions), torch.tensor(places), len(tables), table, visible, stretches
        )

    def _draw(self, sequences: list[Sequence], drafts: list[int | None], logits: Tensor, counts: Counts) -> None:
        """Draw after every sequence's last token, and again where that confirmed its draft."""
        rows, places = [], 0
        for draft in drafts:
            rows.append(places)
            places += 1 + (draft is not None)
        counts.drafted += places - len(drafts)
        drawn = self._push_drawn(
            sequences, drafts, logits[torch.tensor(rows)] if places > len(rows) else logits, counts
        )
        confirmed = [
            (sequence, row + 1)
            for sequence, draft, row, token in zip(sequences, drafts, rows, drawn, strict=True)
            if draft is not None and token == draft and not sequence.finished
        ]
        if confirmed:
            counts.accepted += len(confirmed)
            for sequence, _ in confirmed:
                sequence.computed += 1
            again = [sequence for sequence, _ in confirmed]
            self._push_drawn(again, [None] * len(again), logits[torch.tensor([row for _, row in confirmed])], counts)

    def _push_drawn(
        self, sequences: list[Sequence], drafts: list[int | None], logits: Tensor, counts: Counts
    ) -> list[int | None]:
        """Draw from logits [R, V] a token for each sequence, and push it; None for one that could not go on."""
        able, masks = [], []
        for row, sequence in enumerate(sequences):
            try:
                masks.append(sequence.mask())
                able.append(row)
            except UserError as error:  # its grammar gave up
                sequence.end("error", str(error), "request")
        if len(able) < len(sequences):
            logits = logits[torch.tensor(able, dtype=torch.int64)]
        chosen = [sequences[row] for row in able]
        tokens: list[int | None] = [None] * len(sequences)
        if not chosen:
            return tokens
        ids = self._choose(chosen, [drafts[row] for row in able], logits, masks)
        logprobs = self._logprobs(chosen, logits, ids)
        for row, sequence, token, logprob in zip(able, chosen, ids.tolist(), logprobs, strict=True):
            counts.drawn += 1
            tokens[row] = token
            try:
                sequence.push(token, logprob)
            except UserError as error:
                sequence.end("error", str(error), "request")
        return tokens

    def _choose(
        self, sequences: list[Sequence], drafts: list[int | None], logits: Tensor, masks: list[Tensor | None]
    ) -> Tensor:
        """The next token of each: forced, verified against its draft, or drawn."""
        states = [sequence.sampler for sequence in sequences]
        ids = sample(logits, states, masks if any(mask is not None for mask in masks) else None)
        checked = [
            row
            for row, (s, draft) in enumerate(zip(sequences, drafts, strict=True))
            if draft is not None and not _repeats(s)
        ]
        if checked:
            ids[torch.tensor(checked)] = self._verify(
                [sequences[row] for row in checked], logits[torch.tensor(checked)], [masks[row] for row in checked]
            )
        for row, sequence in enumerate(sequences):
            if (forced := sequence.forced()) is not None:
                ids[row] = forced
        return ids

    def _verify(self, sequences: list[Sequence], logits: Tensor, masks: list[Tensor | None]) -> Tensor:
        """Speculative sampling of one token each, against the draft and what it was drawn from."""
        states = [sequence.sampler for sequence in sequences]
        target = probabilities(logits, states, masks)
        draft = torch.stack([s.draft_probabilities for s in sequences if s.draft_probabilities is not None])
        drafted = torch.tensor([sequence.draft for sequence in sequences])
        accept = torch.tensor([state.uniform("accept") for state in states], dtype=torch.float64)
        residual = torch.tensor([state.uniform("residual") for state in states], dtype=torch.float64)
        return speculate(target, draft, drafted, accept, residual)[1]

    def _logprobs(self, sequences: list[Sequence], logits: Tensor, ids: Tensor) -> list:
        wanted = [row for row, sequence in enumerate(sequences) if sequence.request.logprobs is not None]
        result = [None] * len(sequences)
        if wanted:
            most = max(sequences[row].request.logprobs or 0 for row in wanted)
            index = torch.tensor(wanted)
            temperatures = [_logprobs_temperature(sequences[row].request) for row in wanted]
            given = token_logprobs(logits[index], ids[index], most, temperatures)
            for row, found in zip(wanted, given, strict=True):
                top = found.top[: sequences[row].request.logprobs]
                result[row] = type(found)(found.token_id, found.logprob, top)
        return result

    def _draft_next(self, work: list[Work], first_rows: list[int], hidden: Tensor) -> None:
        """Run the MTP module over what has become certain, and guess the token after each sequence's next.

        At position i the module reads the hidden state there and the token at i + 1.
        """
        parts, rows, ids, last_rows, drafting = [], [], [], [], []
        for item, first in zip(work, first_rows, strict=True):
            sequence = item.sequence
            sequence.draft = sequence.draft_probabilities = None
            count = min(len(item.tokens), len(sequence.tokens) - 1 - item.start)
            if sequence.finished or count < 1:
                continue
            parts.append((sequence, item.start, count, item.is_stretch))
            rows.extend(range(first, first + count))
            ids.extend(sequence.tokens[item.start + 1 : item.start + 1 + count])
            if item.start + count == len(sequence.tokens) - 1 and self._may_draft(sequence):
                drafting.append(sequence)
                last_rows.append(len(rows) - 1)
        if not parts:
            return
        states = hidden[torch.tensor(rows)][None]
        call = self._call(parts)
        further, _ = self._model.mtp_hidden_states(0, states, torch.tensor(ids)[None], cache=call)
        if drafting:
            logits = self._model.logits(further[0, torch.tensor(last_rows)])
            self._draw_drafts(drafting, logits)

    def _may_draft(self, sequence: Sequence) -> bool:
        """A draft is for a token that will be drawn freely, and leaves room for one behind it."""
        left = sequence.request.max_tokens - sequence.output.completion
        return left > 1 and sequence.matcher is None and sequence.forced() is None and sequence.mask() is None

    def _draw_drafts(self, sequences: list[Sequence], logits: Tensor) -> None:
        repeating = [row for row, sequence in enumerate(sequences) if _repeats(sequence)]
        drawn = [row for row in range(len(sequences)) if row not in set(repeating)]
        if repeating:
            tokens = sample(logits[torch.tensor(repeating)], [sequences[row].sampler for row in repeating]).tolist()
            for row, token in zip(repeating, tokens, strict=True):
                sequences[row].draft = token
        if drawn:
            states = [sequences[row].sampler for row in drawn]
            chances = probabilities(logits[torch.tensor(drawn)], states)
            uniforms = torch.tensor([state.uniform("draft") for state in states], dtype=torch.float64)
            tokens = draw(chances, uniforms).tolist()
            for row, token, chance in zip(drawn, tokens, chances, strict=True):
                sequences[row].draft, sequences[row].draft_probabilities = token, chance


def _logprobs_temperature(request: Request) -> float:
    return request.sampling.temperature if request.tempered_logprobs else 1.0


def _repeats(sequence: Sequence) -> bool:
    """Whether the next token is one that drafting cannot change: the likeliest, or that of a seed.

    A seeded draft is drawn with the token's own uniform number, and right if the token drawn is the same. Rejection
    sampling would accept more drafts, but its text depends on which positions had one.
    """
    return sequence.sampler.greedy or sequence.request.sampling.seed is not None
