"""Checkpoints beside training: the loop waits for a copy in memory, a thread does the rest.

The copy lives in tensors that are allocated once and used again, so its cost is known from the first save on:
as much memory as weights and optimizer state together. One save is in the air at a time; a second waits for it.
"""

import copy
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from fathom.errors import UserError
from fathom.train.state import Contents, State, checkpoints, remove, write_checkpoint


class CheckpointWriter:
    """Writes checkpoints into `folder` and keeps the newest `keep`. Use as a context: leaving it waits for the disk."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        self._folder, self._keep = folder, keep
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._copies: dict[str, State] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self._executor.shutdown(wait=True)
        if kind is None:
            self.check()

    def save(self, contents: Contents) -> None:
        """Copy `contents` and have them written. Waits for an earlier save; raises `UserError` when that failed."""
        self.wait()
        copied = replace(
            contents,
            weights=self._copy("weights", contents.weights),
            optimizer=self._copy("optimizer", contents.optimizer),
            ema=None if contents.ema is None else self._copy("ema", contents.ema),
            reference=None if contents.reference is None else self._copy("reference", contents.reference),
            progress=copy.deepcopy(contents.progress),
        )
        self._pending = self._executor.submit(self._write, copied)

    def check(self) -> None:
        """Raise `UserError` if the last save has failed; do not wait for it."""
        if self._pending is not None and self._pending.done():
            self._pending.result()

    def wait(self) -> None:
        """Wait for the last save; raise `UserError` if it failed."""
        if self._pending is not None:
            self._pending.result()

    @torch.no_grad()
    def _copy(self, kind: str, source: State) -> State:
        copies = self._copies.setdefault(kind, {})
        for name, tensor in source.items():
            if name not in copies:
                copies[name] = torch.empty_like(tensor, device="cpu", memory_format=torch.contiguous_format)
            copies[name].copy_(tensor)
        return copies

    def _write(self, contents: Contents) -> None:
        try:
            write_checkpoint(self._folder, contents)
            for old in checkpoints(self._folder)[: -self._keep]:
                remove(old)
        except (UserError, OSError) as error:
            earlier = checkpoints(self._folder)
            rest = f"{earlier[-1].name} is intact" if earlier else "there is no earlier one"
            raise UserError(f"checkpoint of step {contents.progress.step}: {error}; {rest}") from None
