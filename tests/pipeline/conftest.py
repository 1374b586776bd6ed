"""The pipeline that several tests run."""

from pathlib import Path

import pytest

from tests.pipeline.house import build, run, weights


@pytest.fixture(scope="session")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of the pipeline `house`."""
    return build(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="session")
def unbroken(file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Every file of numbers of `house`, made without a break."""
    result, _ = run(file, tmp_path_factory.mktemp("unbroken"))
    return weights(result.folder)
