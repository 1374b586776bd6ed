"""What tests of several rooms share."""

import os

import pytest
import torch

from fathom.kernels.library import library

if not torch.accelerator.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton


@pytest.fixture(scope="session")
def kernels() -> None:
    """Kernels are tested where there are some."""
    if library() is None:
        pytest.skip("no C++ compiler on this machine")
