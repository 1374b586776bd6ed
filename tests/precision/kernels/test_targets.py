"""Every kernel for every target, compiled without a GPU, and held to what its binary took when it was last looked at.

The budget is rewritten by `python -m fathom.precision.kernels.targets --json > tests/precision/kernels/budget.json`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.precision.kernels.conftest import triton

assert triton
from fathom.precision.kernels.targets import SHARED_LIMIT, TARGETS, _unpacked, builds  # noqa: E402 (imports Triton)

BUDGET = json.loads((Path(__file__).parent / "budget.json").read_text())
SLACK = 1.1
"""Another compiler release may allocate a little otherwise."""


def test_the_budget_names_every_kernel() -> None:
    """None is left out, and none that is gone is kept."""
    assert set(BUDGET) == set(builds("cuda:90"))
    assert all(set(usage) == set(TARGETS) for usage in BUDGET.values())


@pytest.mark.parametrize("kernel", BUDGET)
def test_compiles_within_its_budget(kernel: str) -> None:
    """For four targets: registers and shared memory as before, nothing spilled that was not, and room on the device."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fathom.precision.kernels.targets", kernel, "--json"]
    told = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert told.returncode == 0, told.stderr
    for target, found in json.loads(told.stdout)[kernel].items():
        budget = BUDGET[kernel][target]
        assert 0 < found["registers"] <= SLACK * budget["registers"], (target, found)
        assert found["shared"] <= min(SLACK * budget["shared"] + 64, SHARED_LIMIT[target]), (target, found)
        assert found["spills"] <= budget["spills"], (target, found)


def test_nothing_spills() -> None:
    """No kernel keeps registers in memory on any target."""
    assert not [(kernel, t) for kernel, usage in BUDGET.items() for t in usage if usage[t]["spills"]]


def test_interpreting_is_not_compiling() -> None:
    """With the interpreter switched on there is nothing to compile, and that is said."""
    command = [sys.executable, "-m", "fathom.precision.kernels.targets"]
    told = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "1"}, check=False
    )
    assert told.returncode == 2
    assert "unset it" in told.stderr


def test_metadata_is_read_as_messagepack_is_written() -> None:
    """The kinds of value that compilers write: small and large, signed, text, lists, maps, nothing."""
    written = b"\x84\xa1a\x01\xa1b\x93\xff\xcd\x01\x00\xd1\xff\x00\xa1c\xd9\x02hi\xa1d\x92\xc0\xc3"
    (value, end) = next(_unpacked(written, 0))
    assert value == {"a": 1, "b": [-1, 256, -256], "c": "hi", "d": [None, True]}
    assert end == len(written)
