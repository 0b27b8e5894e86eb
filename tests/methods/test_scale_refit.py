"""Scales fitted to frozen codes are the least-squares solution, and the best that GPTQ's own alternation finds."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import calibrant as cb
from calibrant.kernels import row_tiles
from calibrant.methods.solvers import scale_refit
from calibrant.methods.solvers.gptq import gptq
from calibrant.methods.solvers.result import layer_errors
from calibrant.methods.solvers.rtn import rtn
from calibrant.methods.solvers.scale_refit import refit_scales
from calibrant.quantization.grid_fitting import fit_grid
from calibrant.quantization.grids import Grid, GridSpec, decode, encode
from tests import references
from tests.conftest import random_set


def damped(hessian: torch.Tensor) -> torch.Tensor:
    found = hessian.clone()
    found.diagonal().add_(0.01 * hessian.diagonal().mean())
    return found


def start(symmetric: bool, bits: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Grid]:
    weight, hessian = references.problem(40, 64)
    grid = fit_grid(weight, GridSpec(bits, symmetric, 16, torch.float32))
    return weight, damped(hessian), encode(weight, grid), grid


@pytest.mark.parametrize("symmetric", [True, False])
def test_they_are_the_least_squares_solution(monkeypatch: pytest.MonkeyPatch, symmetric: bool) -> None:
    """Of each row in float64: the outputs of its groups at scale 1 against the outputs of the weights."""
    monkeypatch.setattr(scale_refit, "_RIDGE", 0.0)
    weight, hessian, codes, grid = start(symmetric)
    found, changed = refit_scales(weight, codes, hessian, grid)
    assert changed == 40
    assert torch.equal(found.zero_point, grid.zero_point)
    root = np.linalg.cholesky(hessian.double().numpy()).T
    unit = decode(codes, replace(grid, scale=torch.ones_like(grid.scale))).double().numpy()
    for row in range(40):
        groups = np.stack([np.where(np.arange(64) // 16 == group, unit[row], 0) for group in range(4)], axis=1)
        expected = np.linalg.lstsq(root @ groups, root @ weight[row].double().numpy(), rcond=None)[0]
        np.testing.assert_allclose(found.scale[row], expected, rtol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_row_gets_worse_and_scales_are_as_stored(dtype: torch.dtype) -> None:
    weight, hessian, codes, grid = start(True)
    grid = replace(grid, spec=replace(grid.spec, scale_dtype=dtype), scale=grid.scale.to(dtype).float())
    found, _ = refit_scales(weight, codes, hessian, grid)
    before, after = (layer_errors(weight, decode(codes, one), hessian) for one in (grid, found))
    assert bool((after <= before * (1 + 1e-5)).all())
    assert after.sum() < 0.98 * before.sum()
    assert torch.equal(found.scale, found.scale.to(dtype).float())


def test_groups_of_zeros_and_signs_stay() -> None:
    weight, hessian, codes, grid = start(True)
    codes[:, :16] = 0
    grid = replace(grid, spec=replace(grid.spec, signed_scales=True), scale=-grid.scale)
    codes = (-codes.int()).clamp(-4, 3).to(torch.int8)
    found, _ = refit_scales(weight, codes, hessian, grid)
    assert torch.equal(found.scale[:, 0], grid.scale[:, 0])
    assert bool((found.scale < 0).all())


def test_a_layer_fitted_in_parts_is_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian, codes, grid = start(False)
    whole, _ = refit_scales(weight, codes, hessian, grid)
    monkeypatch.setattr(scale_refit, "CHUNK_BYTES", 4 * 64 * 7)
    parts, _ = refit_scales(weight, codes, hessian, grid)
    torch.testing.assert_close(whole.scale, parts.scale, rtol=1e-4, atol=0)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_ends_with_less_error_by_each_of_them(bits: int, symmetric: bool) -> None:
    weight, hessian = references.problem(64, 128)
    spec = GridSpec(bits, symmetric, 32, torch.bfloat16, "clip")
    errors = [float(gptq(weight, hessian, spec, refine_sweeps=4, scale_refits=n).errors.sum()) for n in (0, 1, 3)]
    assert errors[2] < errors[1] < errors[0]
    if symmetric:
        signed = gptq(weight, hessian, replace(spec, signed_scales=True), refine_sweeps=4, scale_refits=3)
        assert float(signed.errors.sum()) < errors[2]
        assert 0.2 < (signed.grid.scale < 0).double().mean() < 0.8
        assert torch.equal(decode(signed.codes, signed.grid), signed.weight)


@pytest.mark.parametrize("search", ["mse", "importance", "clip"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_signed_scales_use_the_code_without_an_opposite(search: str, bits: int) -> None:
    weight, hessian = references.problem(64, 128)
    spec = GridSpec(bits, True, 32, torch.float32, search)  # type: ignore[arg-type]
    signed = replace(spec, signed_scales=True)
    plain, both = (rtn(weight, one, hessian) for one in (spec, signed))
    diagonal = torch.diag(hessian.diagonal())
    measured = {"mse": torch.eye(128), "importance": diagonal, "clip": hessian}[search]
    before, after = (float(layer_errors(weight, one.weight, measured).sum()) for one in (plain, both))
    assert after < before
    grid = fit_grid(torch.tensor([[3.0, 0.1, 0.2, -1.0]]), replace(signed, group_size=None, range_search="mse"))
    assert float(grid.scale) < 0
    assert int(encode(torch.tensor([[3.0, 0.1, 0.2, -1.0]]), grid)[0, 0]) == -(1 << (bits - 1))
    monotone = fit_grid(weight, spec, hessian)
    assert bool((monotone.scale > 0).all())


def test_a_layer_in_parts_keeps_its_fitted_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = references.problem(150, 64)
    spec = GridSpec(3, True, 16, torch.float32, "clip", signed_scales=True)
    whole = gptq(weight, hessian, spec, refine_sweeps=3, scale_refits=2)
    monkeypatch.setattr(row_tiles, "CHUNK_BYTES", 4 * 64 * 64)
    parts = gptq(weight, hessian, spec, refine_sweeps=3, scale_refits=2)
    torch.testing.assert_close(whole.errors.sum(), parts.errors.sum(), rtol=1e-2, atol=0)


@pytest.mark.parametrize("bits", [2, 4])
def test_transformers_computes_with_signed_scales(llama: Path, tmp_path: Path, bits: int) -> None:
    recipe = cb.Recipe.model_validate(
        {
            "name": "signed",
            "description": "d",
            "method": {"name": "gptq", "refine_sweeps": 2, "scale_refits": 2},
            "scheme": {
                "weights": {"bits": bits, "group_size": 16, "range_search": "clip", "signed_scales": True},
            },
        }
    )
    cb.compress(llama, output=tmp_path / "out", recipe=recipe, calibration=random_set(llama), dtype="float32")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    scales = torch.cat([tensor.flatten() for name, tensor in stored.items() if name.endswith("weight_scale")])
    assert 0.2 < (scales < 0).double().mean() < 0.8
    assert cb.prove(tmp_path / "out", dtype="float32", length=32, windows=1, new_tokens=4).agrees
