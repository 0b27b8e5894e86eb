"""The small study, in a folder of its own and run once."""

from collections.abc import Callable
from pathlib import Path

import pytest

import calibrant as cb

from .small_study import fill


@pytest.fixture
def folder(llama: Path, tmp_path: Path) -> Path:
    """A folder with recipes, a short text, and a study of four cells and two repeats."""
    return fill(tmp_path, llama)


@pytest.fixture(scope="session")
def whole(model_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of that study, run without interruption; its cache lies beside it."""
    folder = fill(tmp_path_factory.mktemp("whole"), model_folder("llama"))
    ran = cb.run_study(folder / "study.yaml", cache=folder / "cache")
    assert ran.failures == []
    return ran.folder
