"""Where kernels run: in Triton's interpreter on CPU tensors, or, with `-m gpu`, for real."""

import os

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed: pip install 'fathom-lm[gpu]'")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(params=[pytest.param("cpu", id="interpreter"), pytest.param("cuda", id="gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The interpreter's CPU; a GPU where one is asked for and there."""
    if request.param == "cpu" and not INTERPRETED:
        pytest.skip("there is a GPU, which Triton then uses; its interpreter is for machines without one")
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU on this machine")
    return torch.device(request.param)
