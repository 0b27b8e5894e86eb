"""Training curves, with and without the library that writes them."""

import sys
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from calibrant.journal import Journal
from calibrant.methods.training import Qat
from calibrant.progress import NoProgress, Task
from calibrant.training.training_loop import CURVES, train


class _Lesson:
    """Moves one parameter by 0.1 per step; the held-out loss falls with it."""

    def __init__(self) -> None:
        self.parameter = torch.ones(1)
        self.student: Any = SimpleNamespace(
            learned=[self.parameter], held_out=lambda: float(self.parameter), sharpness=lambda: None
        )

    def step(self, number: int, rate: float) -> dict[str, float]:
        self.parameter -= 0.1
        return {"loss": float(self.parameter)}

    def state(self) -> dict[str, Any]:
        return {}

    def load(self, state: dict[str, Any]) -> None:
        pass


class _Notes:
    def __init__(self) -> None:
        self.notes: list[str] = []

    def task(self, label: str, total: int | None, unit: str = "") -> AbstractContextManager[Task]:
        return NoProgress().task(label, total)

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.parametrize("installed", [True, False])
def test_training_runs_without_the_library_for_curves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    if not installed:
        monkeypatch.setitem(sys.modules, "tensorboardX", None)
    progress, journal = _Notes(), Journal(tmp_path / "out", {}, overwrite=False)
    with journal.held():
        trained = train(_Lesson(), Qat(steps=4, eval_steps=2), journal, progress)
        assert (trained.steps, trained.best) == (4, 4)
        assert (journal.folder / CURVES).exists() == installed
    said = [note for note in progress.notes if "pip install 'calibrant[training]'" in note]
    assert len(said) == (0 if installed else 1)
