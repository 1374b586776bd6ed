"""Losses, gradients and weights that have stopped being numbers."""

from typing import Any

from torch.nn.utils import get_total_norm

from fathom.errors import UserError
from fathom.model.transformer import Transformer
from fathom.report.tables import plural
from fathom.train.display import is_part


class NoNumbers(UserError):
    """What was learnt is lost: no checkpoint of it may take the place of a good one."""


def what_was_wrong(values: dict[str, Any]) -> str:
    """Of a step that was skipped: the metrics that may be why, in words."""
    what = f"loss {values['loss']:.3g}, gradient norm {values['grad_norm']:.3g}"
    if bad := values.get("bad_tiles"):
        what += f", {plural(bad, 'FP8 tile')} without a number"
    return what


def require_numbers(model: Transformer, step: int) -> None:
    """Raise `NoNumbers` where a weight is not finite after `step`."""
    if not get_total_norm([p.detach() for p in model.parameters()]).isfinite():
        raise NoNumbers(
            f"step {step}: the weights are no longer numbers; lower optimizer.lr"
            + ("" if is_part() else " and go on from the last checkpoint with --resume --accept-changes")
        )
