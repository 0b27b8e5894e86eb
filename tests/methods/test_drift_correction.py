"""Drift correction: the target's formula, and runs whose layers follow the original model."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
import transformers
from safetensors.torch import load_file

import calibrant as cb
from calibrant.engine import block_solver
from calibrant.errors import CalibrantError
from calibrant.methods.method import LayerProblem, LayerSolver, MethodOptions
from calibrant.methods.registry import METHODS
from calibrant.methods.solvers.drift_correction import drift_corrected_target
from calibrant.methods.solvers.result import Solution
from calibrant.methods.solvers.rtn import round_layer
from calibrant.quantization.statistics import Hessian, PairedHessian
from calibrant.recipes.recipe import Recipe
from tests.conftest import random_set


def pairs(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight, inputs = torch.randn(10, 16, generator=generator), torch.randn(400, 16, generator=generator)
    return weight, inputs, inputs + 0.1 * inputs @ torch.randn(16, 16, generator=generator)


def test_the_target_is_the_damped_least_squares_answer() -> None:
    weight, inputs, originals = pairs()
    statistic = PairedHessian(16, torch.device("cpu"))
    for begin in (0, 150):
        rows = slice(begin, 150 if begin == 0 else None)
        statistic.add_pair(inputs[rows], originals[rows])
    found = drift_corrected_target(weight, statistic.matrix(), statistic.drift)
    x, y, w = inputs.double(), originals.double(), weight.double()
    hessian = x.T @ x
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(16, dtype=torch.float64)
    torch.testing.assert_close(found.double(), w + w @ ((y - x).T @ x) @ hessian.inverse(), rtol=1e-4, atol=1e-4)

    def error(candidate: torch.Tensor) -> float:
        return float((y @ w.T - x @ candidate.double().T).square().sum())

    assert error(found) < 0.5 * error(weight)


def test_a_share_corrects_that_share_of_the_drift() -> None:
    weight, inputs, originals = pairs()
    hessian, drift = inputs.T @ inputs, (originals - inputs).T @ inputs
    whole, quarter = (drift_corrected_target(weight, hessian, drift, share) - weight for share in (1.0, 0.25))
    assert whole.norm() > 0.1 * weight.norm()
    torch.testing.assert_close(quarter, 0.25 * whole, rtol=1e-4, atol=1e-5)


def test_without_drift_the_target_is_the_weight() -> None:
    weight, inputs, _ = pairs()
    assert torch.equal(drift_corrected_target(weight, inputs.T @ inputs, torch.zeros(16, 16)), weight)


def test_columns_without_inputs_keep_their_weights() -> None:
    weight, inputs, originals = pairs()
    inputs, originals = inputs.clone(), originals.clone()
    inputs[:, [2, 9]] = 0
    found = drift_corrected_target(weight, inputs.T @ inputs, (originals - inputs).T @ inputs)
    live = [column for column in range(16) if column not in (2, 9)]
    x, missed = inputs[:, live].double(), (originals - inputs).double() @ weight.double().T
    hessian = x.T @ x
    # Damping is relative to the mean diagonal, in which dead columns count as 1.
    hessian += 0.01 * (hessian.diagonal().sum() + 2) / 16 * torch.eye(14, dtype=torch.float64)
    assert torch.equal(found[:, [2, 9]], weight[:, [2, 9]])
    expected = weight[:, live].double() + missed.T @ x @ hessian.inverse()
    torch.testing.assert_close(found[:, live].double(), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(drift_corrected_target(weight, torch.zeros(16, 16), torch.zeros(16, 16)), weight)


def test_where_the_hessian_does_not_factor_the_record_says_so(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    indefinite = torch.tensor([[1.0, 1e6], [1e6, 1.0]])
    assert drift_corrected_target(torch.ones(3, 2), indefinite, torch.zeros(2, 2)) is None
    monkeypatch.setattr(block_solver, "drift_corrected_target", lambda *_: None)
    report = cb.compress(llama, output=tmp_path / "out", recipe=recipe(0.25), calibration=random_set(llama))
    assert all("drift" in str(layer.record.fallback) for layer in report.layers)


def recipe(share: float, method: str = "gptq") -> Recipe:
    scheme = {"weights": {"bits": 3, "group_size": 32}}
    return Recipe.model_validate(
        {"name": "r", "description": "d", "method": {"name": method}, "scheme": scheme, "drift_correction": share}
    )


def test_a_recipe_s_share_reaches_the_layers(llama: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight_packed"
    packed = []
    for share in (0.0, 0.25, 1.0):
        output = tmp_path / str(share)
        cb.compress(llama, output=output, recipe=recipe(share), calibration=random_set(llama), dtype="float32")
        packed.append(load_file(output / "model.safetensors")[name])
    assert not any(torch.equal(packed[i], packed[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_follow_the_original_model(llama: Path, tmp_path: Path, dtype: str) -> None:
    calibration = random_set(llama, samples=32)
    states = {}
    for corrected in (False, True):
        output = tmp_path / str(corrected)
        cb.compress(llama, output=output, recipe=recipe(float(corrected)), calibration=calibration, dtype=dtype)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(output).eval()
        with torch.no_grad():
            states[corrected] = loaded(calibration.tokens.long(), output_hidden_states=True).hidden_states[-1]
    original = transformers.AutoModelForCausalLM.from_pretrained(llama).eval()
    with torch.no_grad():
        expected = original(calibration.tokens.long(), output_hidden_states=True).hidden_states[-1]
    errors = {kind: float((found - expected).square().sum()) for kind, found in states.items()}
    assert errors[True] < 0.97 * errors[False]
    left, right = (load_file(tmp_path / str(kind) / "model.safetensors") for kind in (True, False))
    # The first layers' inputs are the same in both models.
    for name in ("q_proj", "k_proj", "v_proj"):
        packed = f"model.layers.0.self_attn.{name}.weight_packed"
        assert torch.equal(left[packed], right[packed])
    assert not torch.equal(
        left["model.layers.1.mlp.down_proj.weight_packed"], right["model.layers.1.mlp.down_proj.weight_packed"]
    )


class Observed(MethodOptions):
    """Round-to-nearest that asks for the Hessian."""

    name: Literal["observed"] = "observed"


def test_the_drift_is_between_the_compressed_and_the_original_path(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The target of the second block's q, k, v, from its inputs behind the compressed and the original first block."""
    problems: list[LayerProblem] = []

    def solve(_: Observed, problem: LayerProblem) -> Solution:
        problems.append(replace(problem, weight=problem.weight.clone()))
        return round_layer(problem)

    monkeypatch.setitem(METHODS, "observed", LayerSolver(Observed, solve, round_layer, Hessian))
    calibration = random_set(llama, masked=5)
    chosen = recipe(1.0, "observed")
    cb.compress(llama, output=tmp_path / "out", recipe=chosen, calibration=calibration, dtype="float32")
    inputs = []
    for folder in (tmp_path / "out", llama):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        seen: list[torch.Tensor] = []
        attention = loaded.model.layers[1].self_attn
        attention.q_proj.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            loaded(calibration.tokens.long())
        inputs.append(seen[0][calibration.mask].double())
    x, y = inputs
    weight = torch.cat([getattr(attention, name).weight.detach().double() for name in ("q_proj", "k_proj", "v_proj")])
    problem = problems[4]  # the first block has four groups of layers
    hessian = x.T @ x
    torch.testing.assert_close(problem.hessian.double(), hessian, rtol=1e-3, atol=1e-3)
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    correction = weight @ ((y - x).T @ x) @ hessian.inverse()
    torch.testing.assert_close(problem.weight.double(), weight + correction, rtol=1e-3, atol=1e-3)
    assert correction.norm() > 0.01 * weight.norm()


def test_requirements_of_drift_correction(llama: Path, model_folder, tmp_path: Path) -> None:
    options = {"calibration": random_set(llama), "output": tmp_path / "out"}
    with pytest.raises(CalibrantError, match="corrects drift, which needs"):
        cb.compress(llama, recipe=recipe(1.0), order="two-pass", **options)
    with pytest.raises(CalibrantError, match="fused experts, beside which the original model cannot run"):
        cb.compress(model_folder("mixtral"), recipe=recipe(1.0), **options)
    with pytest.raises(ValueError, match="which rtn does not gather"):
        recipe(1.0, "rtn")
    assert not (tmp_path / "out").exists()
