"""Made again in the backward pass instead of kept: what costs little next to the memory it takes (DeepSeek-V3 §3.2.3).

Whoever makes such a tensor says how (`made`): the outputs of RMSNorm, their FP8 tiles, and queries, keys and values out
of the latents. Where a `Recompute` is active, autograd then keeps the instructions in the place of these tensors, and
their inputs, which are kept anyway or made again themselves. The first layer of the backward pass that asks runs them;
the result lives until the last one that will ask has had it.

This is the model's own forward code once more, on the same numbers: gradients are the same to the bit.
"""

import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef


class _OfThread(threading.local):
    """Of the calling thread, as autograd's hooks are: two that train do not hear each other."""

    def __init__(self) -> None:
        self.active: list[Recompute] = []
        self.running = 0
        """How many instructions are being followed."""


_here = _OfThread()


def made(outputs: Tensor | Sequence[Tensor], function: Callable[..., Any], *inputs: Any) -> None:
    """Say that `function(*inputs)` gives `outputs` again, in memory laid out alike. Nothing where no one listens."""
    if _here.active:
        _here.active[-1].learn((outputs,) if isinstance(outputs, Tensor) else outputs, function, inputs)


def is_made(x: Tensor) -> bool:
    """Whether `x` will be made again, so that what is made of it may be too."""
    return bool(_here.active) and _here.active[-1].knows(x)


def making_again() -> bool:
    """Whether what runs now is a part of the forward pass run once more."""
    return _here.running > 0


class _Instructions:
    """How to make some tensors again, and how often that will be asked."""

    def __init__(self, function: Callable[..., Any], inputs: list[Any]) -> None:
        self.function, self.inputs = function, inputs
        self.expected = 0
        self._left = 0
        self._results: tuple[Tensor, ...] | None = None

    def result(self, index: int) -> Tensor:
        if self._results is None:
            _here.running += 1
            try:
                with torch.no_grad():
                    results = self.function(*(x() if isinstance(x, _Kept) else x for x in self.inputs))
            finally:
                _here.running -= 1
            self._results = (results,) if isinstance(results, Tensor) else tuple(results)
            self._left = self.expected
        found = self._results[index]
        self._left -= 1
        if self._left <= 0:
            self._results = None
        return found


class _Kept:
    """A tensor that is kept, or a view of one that is made again."""

    def __init__(self, tensor: Tensor | None, origin: tuple[_Instructions, int] | None, view: tuple[Any, ...]) -> None:
        self._tensor, self._origin, self._view = tensor, origin, view
        self._version = 0 if tensor is None else _version(tensor)

    def __call__(self) -> Tensor:
        if self._origin is None:
            assert self._tensor is not None
            if _version(self._tensor) != self._version:  # autograd leaves this check to whoever keeps tensors for it
                raise RuntimeError("a tensor that the backward pass needs was changed in place since the forward pass")
            return self._tensor
        instructions, index = self._origin
        return instructions.result(index).as_strided(*self._view)


class Recompute(saved_tensors_hooks):
    """While active, autograd keeps instructions instead of tensors that were `made`.

    `on_keep` is called with every tensor that is kept all the same.
    """

    def __init__(self, on_keep: Callable[[Tensor], None] | None = None) -> None:
        super().__init__(self._pack, lambda kept: kept())
        self._on_keep = on_keep
        # A storage that is known here keeps its address until it is forgotten, so that no other can be taken for it.
        self._known: dict[int, tuple[StorageWeakRef, _Instructions, int, int]] = {}

    def __enter__(self) -> None:
        super().__enter__()
        _here.active.append(self)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _here.active.remove(self)
        self._known.clear()
        super().__exit__(kind, error, trace)

    def knows(self, x: Tensor) -> bool:
        """Whether `x` lies in memory that was said to be made again."""
        return x.untyped_storage()._cdata in self._known

    def learn(self, outputs: Sequence[Tensor], function: Callable[..., Any], inputs: Sequence[Any]) -> None:
        """See `made`."""
        kept = [self._reference(x) if isinstance(x, Tensor) else x for x in inputs]
        instructions = _Instructions(function, kept)
        for index, output in enumerate(outputs):
            storage = output.untyped_storage()
            self._known[storage._cdata] = (StorageWeakRef(storage), instructions, index, _version(output))

    def _pack(self, x: Tensor) -> _Kept:
        kept = self._reference(x)
        if self._on_keep is not None and kept._origin is None:
            self._on_keep(x)
        return kept

    def _reference(self, x: Tensor) -> _Kept:
        found = self._known.get(x.untyped_storage()._cdata)
        if found is None or found[3] != _version(x):  # what was changed since would be made as it was
            return _Kept(x.detach(), None, ())
        _, instructions, index, _ = found
        instructions.expected += 1
        return _Kept(None, (instructions, index), (x.shape, x.stride(), x.storage_offset()))


def _version(x: Tensor) -> int:
    """How often `x` was changed in place; inference tensors do not count it."""
    return 0 if x.is_inference() else x._version
