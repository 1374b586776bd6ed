"""A trained tokenizer, made once."""

import pytest

from fathom.data import Tokenizer, train_bpe
from tests.data.texts import text_of


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_bpe((text_of(seed, 100) for seed in range(8)), 400)
