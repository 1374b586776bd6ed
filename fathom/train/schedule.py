"""How rates and the batch change over a run: pure functions of the step and the total number of steps.

Shares in a recipe are shares of the run's *tokens*, as in the DeepSeek-V3 report (§4.2). Without a batch ramp that is
the same as a share of its steps; with one, the first steps are smaller and count for less.

`step` is the index of the step about to be made, 0 for the first; `full` the micro-batches of the full batch.
"""

import functools
import itertools
import math

from fathom.config.recipe import BalanceSection, MTPSection, PretrainRecipe, ScheduleSection
from fathom.errors import UserError


def constant_lr_at(step: int, warmup: int, peak: float) -> float:
    """Linear to the peak over `warmup` steps, then constant."""
    return peak * min(1.0, (step + 1) / (warmup + 1))


def cosine_lr_at(step: int, total: int, warmup: int, floor: float, peak: float) -> float:
    """Linear to the peak over `warmup` steps, then a cosine to the share `floor` of it at the last of `total` steps."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    part = (step - warmup) / max(1, total - 1 - warmup)
    return peak * (floor + (1 - floor) * (1 + math.cos(math.pi * part)) / 2)


def full_micro_batches(recipe: PretrainRecipe) -> int:
    """Micro-batches of the full batch."""
    return recipe.train.batch_tokens // (recipe.train.micro_batch * recipe.data.sequence_length)


def check_schedule(recipe: PretrainRecipe) -> str | None:
    """Raise `UserError` for a batch ramp that cannot be made; return a sentence about a warm-up that never ends."""
    steps, section = recipe.train.steps, recipe.schedule
    if section.batch_ramp and section.batch_start < 1 and full_micro_batches(recipe) == 1:
        raise UserError(
            f"schedule.batch_ramp = {section.batch_ramp}, but the full batch is one micro-batch, which cannot grow; "
            "lower train.micro_batch, or set schedule.batch_ramp to 0"
        )
    if section.warmup_steps > steps:
        return (
            f"schedule.warmup_steps = {section.warmup_steps} is longer than the run of {steps} steps: "
            "the learning rate never reaches its peak"
        )
    return None


def ramp_steps(total: int, section: ScheduleSection) -> float:
    """Steps after which the batch is full, so that the ramp takes `batch_ramp` of the run's tokens."""
    share, mean_batch = section.batch_ramp, (1 + section.batch_start) / 2
    return share * total / ((1 - share) * mean_batch + share)


def batch_share_at(step: int, total: int, section: ScheduleSection) -> float:
    """The batch of this step relative to the full batch: from `batch_start` linearly to 1."""
    ramp = ramp_steps(total, section)
    if step >= ramp:
        return 1.0
    return section.batch_start + (1 - section.batch_start) * step / ramp


def micro_batches_at(step: int, total: int, full: int, section: ScheduleSection) -> int:
    """Micro-batches of this step: the batch ramp in whole micro-batches, at least one, at most `full`."""
    return max(1, round(full * batch_share_at(step, total, section)))


def progress_at(step: int, total: int, full: int, section: ScheduleSection) -> float:
    """Share of the run's tokens that lie before this step, 0 to 1, in the micro-batches that are really trained."""
    if not section.batch_ramp:
        return step / total
    before = _ramped_micro_batches(total, full, section)

    def micro_batches(steps: int) -> int:
        return before[min(steps, len(before) - 1)] + full * max(0, steps - len(before) + 1)

    return micro_batches(step) / micro_batches(total)


@functools.lru_cache(maxsize=8)
def _ramped_micro_batches(total: int, full: int, section: ScheduleSection) -> tuple[int, ...]:
    """Micro-batches before each step of the ramp, and before the first step after it."""
    steps = range(min(total, math.ceil(ramp_steps(total, section))))
    sizes = (micro_batches_at(step, total, full, section) for step in steps)
    return tuple(itertools.accumulate(sizes, initial=0))


def lr_at(step: int, total: int, full: int, section: ScheduleSection, peak: float) -> float:
    """Learning rate: linear warm-up, constant, cosine to `floor`, constant, and a last stretch at `final` (V3 §4.2)."""
    if step < section.warmup_steps:
        return peak * (step + 1) / section.warmup_steps
    progress = progress_at(step, total, full, section)
    if progress < section.decay_start:
        return peak
    if progress < section.decay_end:
        part = (progress - section.decay_start) / (section.decay_end - section.decay_start)
        return peak * (section.floor + (1 - section.floor) * (1 + math.cos(math.pi * part)) / 2)
    return peak * (section.floor if progress < section.final_start else section.final)


def mtp_weight_at(step: int, total: int, full: int, schedule: ScheduleSection, section: MTPSection) -> float:
    """λ, the weight of the multi-token-prediction loss (V3 §4.2)."""
    late = progress_at(step, total, full, schedule) >= section.late_start
    return section.late_weight if late else section.weight


def bias_rate_at(step: int, total: int, full: int, schedule: ScheduleSection, section: BalanceSection) -> float:
    """γ, the step of the router bias (V3 §4.2)."""
    late = progress_at(step, total, full, schedule) >= section.bias_until
    return section.late_bias_rate if late else section.bias_rate
