"""The exercise of docs/adding-a-method.md: a solver in one file and one line of registry is a method like any other."""

import json
from pathlib import Path
from typing import Literal

import pytest
import torch
from pydantic import Field

import calibrant as cb
from calibrant.compression.grid_fitting import fit_grid
from calibrant.compression.grids import GridSpec
from calibrant.compression.methods import METHODS
from calibrant.compression.recipe import Recipe
from calibrant.compression.solvers.method import Method, MethodOptions, Task
from calibrant.compression.solvers.result import Solution
from calibrant.compression.solvers.rtn import round_task
from calibrant.compression.statistics import Hessian
from calibrant.errors import CalibrantError
from tests.conftest import random_set


def neighbour(weight: torch.Tensor, hessian: torch.Tensor, spec: GridSpec, strength: float) -> Solution:
    """Round column by column; the next column makes up for the error as far as the two inputs go together."""
    grid = fit_grid(weight, spec, hessian)
    work, codes = weight.clone(), torch.zeros_like(weight, dtype=torch.int8)
    group = grid.columns(weight.shape[1])
    for j in range(weight.shape[1]):
        scale, zero = grid.scale[:, group[j]], grid.zero[:, group[j]]
        code = torch.round(torch.clamp(work[:, j] / scale + zero, spec.lowest, spec.highest))
        error = work[:, j] - (code - zero) * scale
        codes[:, j], work[:, j] = code.to(torch.int8), (code - zero) * scale
        if j + 1 < weight.shape[1]:
            work[:, j + 1] += strength * error * hessian[j, j + 1] / hessian[j + 1, j + 1].clamp(min=1e-12)
    return Solution(work, codes, grid)


class Neighbour(MethodOptions):
    """Rounding that the next column makes up for."""

    name: Literal["neighbour"] = "neighbour"
    strength: float = Field(default=1.0, ge=0)


NEIGHBOUR = Method(
    Neighbour,
    lambda options, task: neighbour(task.weight, task.full_moments, task.grid_spec, options.strength),
    round_task,
    Hessian,
)


def test_it_runs_in_a_recipe_and_is_recorded(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, NEIGHBOUR.name, NEIGHBOUR)
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "name: mine\ndescription: the exercise\ntransforms: [{name: awq, steps: 3}]\n"
        "method: {name: neighbour, strength: 0.5}\nscheme: {weights: {bits: 4, group_size: 32, range_search: clip}}\n"
    )
    cb.compress(llama, output=tmp_path / "out", recipe=recipe, calibration=random_set(llama), dtype="float32")
    record = json.loads((tmp_path / "out" / "calibrant.json").read_text())
    assert record["recipe"]["method"] == {"name": "neighbour", "strength": 0.5}
    assert all(layer["measure"] == "hessian" for layer in record["layers"])
    result = cb.evaluate(tmp_path / "out", against=llama, length=32, limit=2, dtype="float32")
    assert result.divergence is not None
    assert 0 < result.divergence.kl_mean < 1


def test_its_options_are_checked(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"name": "r", "description": "d", "scheme": {"weights": {"bits": 4}}}
    with pytest.raises(ValueError, match="no method 'neighbour'; there are rtn, gptq"):
        Recipe.model_validate({**fields, "method": {"name": "neighbour"}})
    monkeypatch.setitem(METHODS, NEIGHBOUR.name, NEIGHBOUR)
    file = tmp_path / "mine.yaml"
    for options, said in (("strength: -1", "method: strength: Input should be"), ("force: 1", "force: no such key")):
        file.write_text(
            f"name: r\ndescription: d\nmethod: {{name: neighbour, {options}}}\nscheme: {{weights: {{bits: 4}}}}\n"
        )
        with pytest.raises(CalibrantError, match=said):
            cb.compress(llama, output=tmp_path / "out", recipe=file)


def test_it_lies_between_rounding_and_gptq() -> None:
    from tests import references

    weight, hessian = references.problem(64, 48)
    spec = GridSpec(3, True, 16, torch.float32)
    task = Task(weight, (64,), spec, None, hessian)
    errors = []
    for name, method in {"rtn": METHODS["rtn"], "neighbour": NEIGHBOUR, "gptq": METHODS["gptq"]}.items():
        difference = weight - method.solve(method.options(name=name), task).weight
        errors.append(float(((difference @ hessian) * difference).sum()))
    assert errors[0] > errors[1] > errors[2]
