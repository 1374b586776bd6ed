"""What tests of several rooms share."""

import pytest

from fathom.kernels.library import library


@pytest.fixture(scope="session")
def kernels() -> None:
    """Kernels are tested where there are some."""
    if library() is None:
        pytest.skip("no C++ compiler on this machine")
