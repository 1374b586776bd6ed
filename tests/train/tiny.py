"""The model that the tests of training train: every part of V3, and room for the test data's tokens."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fathom.data import Tokenizer, train_bpe
from fathom.model.checkpoint import save_model
from fathom.model.fp8 import FP8Experts
from fathom.model.transformer import Transformer
from tests.model import configs

MODEL = configs.V3.replace(vocab_size=320)


def save_talker(folder: Path) -> None:
    """Write that model with random weights, and a byte tokenizer for which one token in four ends a text: it ends its
    texts soon."""
    plain = train_bpe(["0123456789"], 266)
    ends = (1, *range(10, 266, 4))
    tokenizer = Tokenizer(plain.backend, bos_token_id=0, eos_token_ids=ends, pad_token_id=2, chat_template=None)
    model = Transformer(MODEL.replace(vocab_size=tokenizer.vocab_size))
    model.init_weights(1)
    save_model(model, folder, tokenizer=tokenizer)


def poison_one_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a NaN into one tile of the first pass that is learnt from, and throw away what it touched: only the count of
    bad tiles can tell."""
    forward, poisoned = FP8Experts.forward, False

    def forward_with_nan(self: FP8Experts, x: torch.Tensor, routing: Any) -> torch.Tensor:
        nonlocal poisoned
        y = forward(self, x, routing)
        if torch.is_grad_enabled() and not poisoned:
            poisoned = True
            bad = x.detach().clone()
            bad[0, 0] = torch.nan
            self._fp8.tiles_of(bad, power_of_two=True)
        return y

    monkeypatch.setattr(FP8Experts, "forward", forward_with_nan)
