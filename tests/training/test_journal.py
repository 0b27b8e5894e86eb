"""Trainings that are killed and go on, and damaged journals."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import calibrant as cb
from calibrant import prepare
from calibrant.errors import CalibrantError
from calibrant.journal import Journal
from calibrant.progress import NoProgress
from calibrant.training import training_loop
from tests.abandoned import abandon
from tests.conftest import random_set
from tests.training.common import recipe


class _StoppedError(Exception):
    pass


def _journal_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_loop, "JOURNAL_SECONDS", -1.0)
    monkeypatch.setattr(training_loop, "JOURNAL_SHARE", -1)


class _StopsAfter(NoProgress):
    def __init__(self, steps: int) -> None:
        self.left, self.notes = steps, list[str]()

    @contextmanager
    def task(self, label: str, total: int | None, unit: str = "") -> Iterator[Any]:
        outer = self

        class Handle:
            def advance(self, steps: int = 1) -> None:
                if label == "training":
                    if not outer.left:
                        raise _StoppedError
                    outer.left -= 1

        yield Handle()

    def note(self, text: str) -> None:
        self.notes.append(text)


_DISTILLED = cb.Recipe.model_validate(
    {
        "name": "r",
        "description": "d",
        "method": {"name": "gptq"},
        "scheme": {"weights": {"bits": 2, "group_size": 32}},
        "distillation": {"batch_size": 2},
    }
)


@pytest.mark.parametrize(
    "chosen",
    [
        recipe({"name": "qat", "steps": 8}),
        recipe({"name": "zsaq", "generator_learning_rate": 1e-3, "steps": 8}),
        _DISTILLED,
    ],
    ids=["qat", "zsaq", "distillation"],
)
def test_a_killed_training_goes_on_to_the_same_bytes(
    llama: Path, tmp_path: Path, chosen: cb.Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    _journal_every_step(monkeypatch)
    data = random_set(llama)
    cb.compress(llama, output=tmp_path / "whole", recipe=chosen, calibration=data)
    for steps in (3, 2):
        stopping = _StopsAfter(steps)
        with pytest.raises(_StoppedError):
            cb.compress(llama, output=tmp_path / "parts", recipe=chosen, calibration=data, progress=stopping)
        assert not (tmp_path / "parts").exists()
    ends = _StopsAfter(99)
    cb.compress(llama, output=tmp_path / "parts", recipe=chosen, calibration=data, progress=ends)
    assert any("continues after step 4" in note for note in ends.notes)
    for name in ("model.safetensors", "calibrant.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def test_another_training_begins_anew_and_a_damaged_journal_says_what_to_do(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _journal_every_step(monkeypatch)
    data = random_set(llama)

    def run(steps: int, stops: int, overwrite: bool = True) -> _StopsAfter:
        listener = _StopsAfter(stops)
        chosen = recipe({"name": "qat", "steps": steps})
        cb.compress(
            llama, output=tmp_path / "out", recipe=chosen, calibration=data, progress=listener, overwrite=overwrite
        )
        return listener

    with pytest.raises(_StoppedError):
        run(8, 3)
    with pytest.raises(CalibrantError, match=r"other settings, model or data: recipe\.method\.steps is 8"):
        run(5, 99, overwrite=False)
    other = recipe({"name": "qat", "steps": 5})
    with pytest.raises(CalibrantError, match=r"recipe\.method\.steps is 8 there and 5 here"):
        prepare(llama, output=tmp_path / "out", recipe=other, calibration=data)
    same = recipe({"name": "qat", "steps": 8})
    prepare(llama, output=tmp_path / "out", recipe=same, calibration=data)
    with pytest.raises(CalibrantError, match="model or data: calibration"):
        prepare(llama, output=tmp_path / "out", recipe=same)
    assert not any("continues" in note for note in run(5, 99).notes)
    with pytest.raises(_StoppedError):
        run(8, 3)
    state = tmp_path / "out.journal" / "steps.safetensors"
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(CalibrantError, match=r"steps\.safetensors: damaged .* begin the run anew"):
        run(8, 99)


def test_what_a_killed_write_left_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "out.journal"
    folder.mkdir()
    abandon(folder, "steps.safetensors")
    state = {"learned": [torch.ones(2)], "number": 3, "moments": {0: {"step": torch.tensor(4.0)}}, "none": None}
    with Journal(tmp_path / "out", {"a": 1}, overwrite=False).held() as journal:
        journal.write("steps", state)
        assert sorted(path.name for path in folder.iterdir()) == ["lock", "run.json", "steps.safetensors"]
        found = journal.read("steps")
    assert found is not None
    assert torch.equal(found["learned"][0], state["learned"][0])
    assert (found["number"], float(found["moments"][0]["step"]), found["none"]) == (3, 4.0, None)


def test_an_early_stop_is_the_same_after_a_break(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _journal_every_step(monkeypatch)
    worse = recipe({"name": "qat", "steps": 30, "eval_steps": 1, "patience": 4, "learning_rate": 0.5})
    data = random_set(llama)
    cb.compress(llama, output=tmp_path / "whole", recipe=worse, calibration=data)
    with pytest.raises(_StoppedError):
        cb.compress(llama, output=tmp_path / "parts", recipe=worse, calibration=data, progress=_StopsAfter(2))
    cb.compress(llama, output=tmp_path / "parts", recipe=worse, calibration=data)
    first, second = ((tmp_path / name / "calibrant.json").read_bytes() for name in ("whole", "parts"))
    assert first == second
    training = json.loads(first)["training"]
    assert training["steps"] == training["best"] + 4 < 30


def test_a_damaged_description_of_a_training_says_what_to_do(llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out.journal"
    folder.mkdir()
    (folder / "run.json").write_text('{"recipe": ')
    save_file({"a": torch.zeros(1)}, folder / "steps.safetensors")
    with pytest.raises(CalibrantError, match=r"run\.json: damaged; delete"):
        prepare(llama, output=tmp_path / "out", recipe=recipe({"name": "zsaq"}))
