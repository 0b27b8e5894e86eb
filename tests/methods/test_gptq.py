import pytest
import torch

from calibrant.kernels import row_tiles
from calibrant.methods.solvers.gptq import gptq
from calibrant.methods.solvers.quantease import quantease
from calibrant.methods.solvers.result import Solution, layer_errors
from calibrant.methods.solvers.rtn import rtn
from calibrant.quantization.grid_fitting import fit_grid
from calibrant.quantization.grids import GridSpec, decode
from tests import references

SPEC = GridSpec(4, True, 16, torch.float32)


def reference(weight: torch.Tensor, hessian: torch.Tensor, spec: GridSpec, act_order: bool) -> torch.Tensor:
    """GPTQ with static groups in float64; rows with a larger error than round-to-nearest are rounded to nearest."""
    order = hessian.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(len(hessian))
    factor = references.inverse_factor(hessian[order][:, order], 0.01)
    grid = fit_grid(weight, spec)
    group = grid.columns(weight.shape[1])[order]
    scale, zero_point = grid.scale.double()[:, group], grid.zero_point.double()[:, group]

    def quantize(j: int, values: torch.Tensor) -> torch.Tensor:
        codes = torch.round(torch.clamp(values / scale[:, j] + zero_point[:, j], spec.qmin, spec.qmax))
        return (codes - zero_point[:, j]) * scale[:, j]

    solved = references.column_loop(weight[:, order], factor, quantize)[:, order.argsort()]
    rounded = rtn(weight, spec).weight.double()

    def error(candidate: torch.Tensor) -> torch.Tensor:
        difference = weight.double() - candidate
        return ((difference @ hessian.double()) * difference).sum(1)

    return torch.where((error(solved) > error(rounded))[:, None], rounded, solved)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(2, 16), (3, None), (4, 16), (8, 32)])
def test_equals_the_float64_reference(act_order: bool, symmetric: bool, bits: int, group: int | None) -> None:
    weight, hessian = references.problem(40, 64)
    spec = GridSpec(bits, symmetric, group, torch.float32)
    solved = gptq(weight, hessian, spec, act_order=act_order)
    expected = reference(weight, hessian, spec, act_order)
    # A value halfway between two codes may round to either, which moves the later values of its row.
    same_rows = (solved.weight.double() - expected).abs().amax(1) < 1e-4
    assert same_rows.double().mean() >= 0.95
    assert torch.equal(decode(solved.codes, solved.grid), solved.weight)


@pytest.mark.parametrize("act_order", [True, False])
def test_with_uncorrelated_inputs_it_is_round_to_nearest(act_order: bool) -> None:
    weight, _ = references.problem(40, 64)
    solved = gptq(weight, 3.0 * torch.eye(64), SPEC, act_order=act_order)
    assert torch.equal(solved.weight, rtn(weight, SPEC).weight)


@pytest.mark.parametrize("search", ["none", "clip", "importance", "mse"])
@pytest.mark.parametrize("method", ["gptq", "refined", "quantease"])
def test_a_layer_solved_in_parts_is_the_layer(monkeypatch: pytest.MonkeyPatch, method: str, search: str) -> None:
    weight, hessian = references.problem(150, 64)
    spec = GridSpec(3, False, 16, torch.float32, search)

    def solved() -> Solution:
        if method == "quantease":
            return quantease(weight, hessian, spec, sweeps=4)
        return gptq(weight, hessian, spec, refine_sweeps=3 if method == "refined" else 0)

    whole = solved()
    monkeypatch.setattr(row_tiles, "CHUNK_BYTES", 4 * 64 * 64)
    parts = solved()
    assert len(list(row_tiles.row_chunks(weight))) == 3
    assert torch.equal(whole.grid.scale, parts.grid.scale)
    # Matrix products of fewer rows may sum in another order.
    assert (whole.codes != parts.codes).double().mean() < 0.002
    torch.testing.assert_close(whole.errors, parts.errors, rtol=1e-2, atol=1e-2)


def test_scaling_the_hessian_changes_nothing() -> None:
    weight, hessian = references.problem(40, 64)
    assert torch.equal(gptq(weight, hessian, SPEC).codes, gptq(weight, hessian * 4.0, SPEC).codes)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("seed", range(5))
def test_no_row_ends_worse_than_round_to_nearest(bits: int, seed: int) -> None:
    weight, hessian = references.problem(64, 96, seed)
    spec = GridSpec(bits, True, 32, torch.float32)
    solved, rounded = gptq(weight, hessian, spec).weight, rtn(weight, spec).weight
    ours, nearest = layer_errors(weight, solved, hessian), layer_errors(weight, rounded, hessian)
    assert (ours <= nearest * (1 + 1e-4)).all()
    assert ours.sum() < 0.9 * nearest.sum()


def test_reported_errors_are_those_of_the_result() -> None:
    weight, hessian = references.problem(64, 96)
    solved = gptq(weight, hessian, SPEC)
    torch.testing.assert_close(solved.errors, layer_errors(weight, solved.weight, hessian), rtol=1e-3, atol=1e-2)


def test_rows_are_independent() -> None:
    weight, hessian = references.problem(40, 64)
    stacked = gptq(weight, hessian, SPEC).codes
    assert torch.equal(stacked, torch.cat([gptq(part, hessian, SPEC).codes for part in weight.split([7, 33])]))


def test_dead_columns_are_counted_and_cost_nothing() -> None:
    weight, hessian = references.problem(40, 64)
    hessian[5], hessian[:, 5] = 0, 0
    solved = gptq(weight, hessian, SPEC)
    assert solved.record.dead_columns == 1
    assert torch.isfinite(solved.weight).all()
    assert (solved.weight[~solved.rounded, 5] == 0).all()


def test_a_hessian_that_cannot_be_factored_falls_back_to_rounding_and_says_so() -> None:
    weight, hessian = references.problem(40, 64)
    solved = gptq(weight, hessian - 2 * hessian.diagonal().max() * torch.eye(64), SPEC)
    assert solved.record.fallback is not None
    assert torch.equal(solved.weight, rtn(weight, SPEC).weight)


def test_damping_is_raised_where_needed_and_recorded() -> None:
    weight, _ = references.problem(40, 64)
    one = torch.randn(1, 64, generator=torch.Generator().manual_seed(3))
    solved = gptq(weight, (one.T @ one) - 0.02 * torch.eye(64), SPEC, damping=0.001)
    assert solved.record.damping_raised
    assert solved.record.fallback is None


def test_errors_of_one_token_are_not_negative() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(64, 576, generator=generator), torch.randn(1, 576, generator=generator)
    solved = gptq(weight, inputs.T @ inputs, GridSpec(4, True, 64, torch.float32), damping=1e-6)
    assert solved.errors is not None
    exact = ((weight - solved.weight).double() @ inputs.double().T).square().sum(1)
    torch.testing.assert_close(solved.errors.double(), exact, rtol=1e-2, atol=1e-3)
