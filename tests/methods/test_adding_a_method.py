"""The example of docs/adding-a-method.md: a solver in one file with one registry entry is a complete method."""

import json
import re
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

import calibrant as cb
from calibrant.errors import CalibrantError
from calibrant.methods.method import LayerProblem, LayerSolver, MethodOptions
from calibrant.methods.registry import METHODS
from calibrant.methods.solvers.result import Solution
from calibrant.methods.solvers.rtn import round_layer
from calibrant.quantization.grids import GridSpec
from calibrant.quantization.statistics import HessianDiagonal
from calibrant.recipes.recipe import Recipe
from tests import references
from tests.conftest import random_set

PAGE = (Path(__file__).parents[2] / "docs" / "adding-a-method.md").read_text(encoding="utf-8")


def block_of_page(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    assert found is not None
    return found[1]


FILE: dict[str, Any] = {"__name__": "neighbour"}
exec(compile(block_of_page("python"), "neighbour.py", "exec"), FILE)  # our page, not user input
NEIGHBOUR: LayerSolver = FILE["NEIGHBOUR"]


def test_it_runs_in_a_recipe_and_is_recorded(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, NEIGHBOUR.name, NEIGHBOUR)
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(block_of_page("yaml"))
    cb.compress(llama, output=tmp_path / "out", recipe=recipe, calibration=random_set(llama), dtype="float32")
    record = json.loads((tmp_path / "out" / "calibrant.json").read_text())
    assert record["recipe"]["method"] == {"name": "neighbour", "strength": 0.5}
    assert all(layer["measure"] == "hessian" for layer in record["layers"])
    result = cb.evaluate(tmp_path / "out", against=llama, length=32, limit=2, dtype="float32")
    assert result.divergence is not None
    assert 0 < result.divergence.kl_mean < 1


class Diagonal(MethodOptions):
    """Round-to-nearest that asks for the Hessian's diagonal."""

    name: Literal["diagonal"] = "diagonal"


def test_a_method_gets_its_statistic_also_where_ranges_need_more(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor | None] = []

    def solve(_: Diagonal, problem: LayerProblem) -> Solution:
        seen.append(problem.hessian_diagonal)
        return round_layer(problem)

    method = LayerSolver(Diagonal, solve, round_layer, HessianDiagonal)
    monkeypatch.setitem(METHODS, method.name, method)
    diagonals = {}
    for search in ("none", "clip"):
        seen.clear()
        scheme = {"weights": {"bits": 4, "group_size": 32, "range_search": search}}
        recipe = Recipe.model_validate(
            {"name": "r", "description": "d", "method": {"name": "diagonal"}, "scheme": scheme}
        )
        cb.compress(llama, output=tmp_path / search, recipe=recipe, calibration=random_set(llama), dtype="float32")
        diagonals[search] = seen[0]
    assert diagonals["none"] is not None
    torch.testing.assert_close(diagonals["none"], diagonals["clip"])


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


def test_its_error_is_between_those_of_rounding_and_gptq() -> None:
    weight, hessian = references.problem(64, 48)
    spec = GridSpec(3, True, 16, torch.float32)
    problem = LayerProblem(weight, (64,), spec, None, hessian)
    errors = []
    for name, method in {"rtn": METHODS["rtn"], "neighbour": NEIGHBOUR, "gptq": METHODS["gptq"]}.items():
        difference = weight - method.solve(method.options(name=name), problem).weight
        errors.append(float(((difference @ hessian) * difference).sum()))
    assert errors[0] > errors[1] > errors[2]
