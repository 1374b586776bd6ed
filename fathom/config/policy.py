"""Settings of a policy's loss, and the published combinations of them. Their theory stands in `fathom.train.grpo`."""

from typing import Literal

from pydantic import Field

from fathom.config.section import Section


class PolicyLoss(Section):
    """How completions with advantages become a loss.

    The defaults are plain GRPO without a reference policy: token ratios clipped to 1 ± 0.2, every completion counts the
    same.
    """

    ratio: Literal["token", "sequence"] = "token"
    """What the new policy is compared with the old one by: every token, or the geometric mean over a completion's
    tokens (GSPO)."""
    objective: Literal["clip", "cispo"] = "clip"
    """`clip` is PPO's: a token whose ratio has left the range the way its advantage pushes gives no gradient. `cispo`
    clips the ratio as a constant weight and keeps every token's gradient."""
    clip_low: float = Field(default=0.2, ge=0)
    """The ratio is clipped below at 1 − this; from 1 on there is no lower limit."""
    clip_high: float = Field(default=0.2, ge=0)
    """The ratio is clipped above at 1 + this."""
    kl: float = Field(default=0.0, ge=0)
    """Weight of the divergence from the reference policy, per token; at 0 no reference is needed."""
    normalisation: Literal["response", "token", "constant"] = "response"
    """What a token's loss is divided by: its own completion's length and the number of completions (`response`), the
    tokens of all completions (`token`), or the most tokens a completion may have and the number of completions
    (`constant`)."""
    divide_by_deviation: bool = True
    """Whether an advantage is divided by the standard deviation of its group's rewards."""
    drop_truncated: bool = False
    """Completions that ran into the token limit are left out of the loss (DAPO's overlong filtering)."""
    sampler_correction: Literal["none", "truncate", "mask"] = "none"
    """Weigh each token by how much likelier the trainer finds it than the sampler that drew it did: `truncate` limits
    the weight to `sampler_cap`, `mask` leaves out the tokens above it."""
    sampler_cap: float = Field(default=2.0, gt=0)
    """The largest weight of `sampler_correction`."""


def r1() -> PolicyLoss:
    """DeepSeek-R1's first RL stage (arXiv 2501.12948v2): ε = 10, KL 0.001 to a reference renewed every 400 steps.

    For R1-Zero the paper gives the same KL and no ε.
    """
    return PolicyLoss(clip_low=10.0, clip_high=10.0, kl=0.001)


def dapo() -> PolicyLoss:
    """DAPO (arXiv 2503.14476 eq. 8): clip-higher, token-level loss, no KL.

    Its other two parts are not of the loss: dynamic sampling (`rollout.resample` in a recipe) and the soft overlong
    penalty (`rewards.overlong`).
    """
    return PolicyLoss(clip_low=0.2, clip_high=0.28, normalisation="token")


def dr_grpo() -> PolicyLoss:
    """Dr. GRPO (arXiv 2503.20783 §3.2): neither a completion's length nor its group's deviation divides; no KL."""
    return PolicyLoss(normalisation="constant", divide_by_deviation=False)


def gspo() -> PolicyLoss:
    """GSPO (arXiv 2507.18071 eq. 5, §5.1): one length-normalised ratio a completion, clipped to 1 − 3e-4 … 1 + 4e-4."""
    return PolicyLoss(ratio="sequence", clip_low=3e-4, clip_high=4e-4)


def cispo() -> PolicyLoss:
    """CISPO (MiniMax-M1, arXiv 2506.13585 eqs 4–5): clipped ratios as weights, token-level loss, no KL.

    The paper tunes the upper limit alone and does not print it: 0.2, and 10 below (no limit), are verl's defaults.
    """
    return PolicyLoss(objective="cispo", clip_low=10.0, clip_high=0.2, normalisation="token")


PRESETS = {"r1": r1, "dapo": dapo, "dr_grpo": dr_grpo, "gspo": gspo, "cispo": cispo}
"""The published combinations by name."""
