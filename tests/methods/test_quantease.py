from collections.abc import Iterable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibrant.kernels.coordinate_descent import sweep
from calibrant.methods.solvers.gptq import gptq
from calibrant.methods.solvers.quantease import descend, quantease, quantease_with_outliers
from calibrant.methods.solvers.result import layer_errors
from calibrant.methods.solvers.rtn import rtn
from calibrant.quantization.grid_fitting import fit_grid
from calibrant.quantization.grids import GridSpec, decode, encode
from tests import references

SPEC = GridSpec(3, True, 16, torch.float32)


def reference(weight: torch.Tensor, hessian: torch.Tensor, spec: GridSpec, sweeps: int) -> torch.Tensor:
    """The released algorithm in float64, with a new full product for every column."""
    target, precise, current = weight.double(), hessian.double(), weight.double().clone()
    grid = fit_grid(weight, spec)
    group = grid.columns(weight.shape[1])
    scale, zero_point = grid.scale.double()[:, group], grid.zero_point.double()[:, group]
    for number in range(sweeps):
        relaxed = number % 3 == 1 and number <= 25 and number != sweeps - 1
        for j in torch.argsort(hessian.diagonal(), descending=True, stable=True).tolist():
            value = current[:, j] + (target - current) @ precise[:, j] / precise[j, j]
            if not relaxed:
                codes = torch.round(torch.clamp(value / scale[:, j] + zero_point[:, j], spec.qmin, spec.qmax))
                value = (codes - zero_point[:, j]) * scale[:, j]
            current[:, j] = value
    return current


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("sweeps", [1, 3, 5])
def test_equals_the_float64_reference(symmetric: bool, sweeps: int) -> None:
    weight, hessian = references.problem(60, 48)
    spec = GridSpec(3, symmetric, 16, torch.float32)
    solved, expected = quantease(weight, hessian, spec, sweeps=sweeps), reference(weight, hessian, spec, sweeps)
    plain = rtn(weight, spec).weight
    # Rows with a larger error than rounding are rounded; a value halfway between two codes may round to either.
    worse = layer_errors(weight, expected.float(), hessian) > layer_errors(weight, plain, hessian)
    assert (solved.rounded == worse).double().mean() >= 0.9
    expected[solved.rounded] = plain[solved.rounded].double()
    same = (solved.weight - expected).abs().amax(1) < 1e-4
    assert same.double().mean() >= 0.9
    assert torch.equal(decode(solved.codes, solved.grid), solved.weight)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 5), st.booleans())
def test_from_a_point_on_the_grid_no_sweep_raises_the_error(seed: int, bits: int, symmetric: bool) -> None:
    weight, hessian = references.problem(20, 32, seed)
    grid = fit_grid(weight, GridSpec(bits, symmetric, 16, torch.float32))
    values = decode(encode(weight, grid), grid)
    before = layer_errors(weight, values, hessian)
    for _ in range(4):
        values, codes = descend(weight, values, hessian, grid, [False])
        after = layer_errors(weight, values, hessian)
        assert (after <= before * (1 + 1e-4) + 1e-3).all()
        assert torch.equal(decode(codes, grid), values)
        before = after


@pytest.mark.parametrize(("sweeps", "relaxed"), [(26, range(1, 25, 3)), (30, range(1, 26, 3))])
def test_every_third_sweep_is_relaxed_but_not_late_and_not_last(sweeps: int, relaxed: range) -> None:
    # Few tokens, so that the descent converges slowly and every sweep shows in the result.
    weight, hessian = references.problem(128, 96, tokens=100)
    solved = quantease(weight, hessian, SPEC, sweeps=sweeps)
    assert solved.rounded is not None

    def follows(expected: Iterable[int]) -> bool:
        values, _ = descend(weight, weight, hessian, fit_grid(weight, SPEC), [n in expected for n in range(sweeps)])
        return torch.equal(values[~solved.rounded], solved.weight[~solved.rounded])

    assert follows(relaxed)
    for other in (1, 22, 25, 28):
        if other < sweeps:
            assert not follows(set(relaxed) ^ {other})


def test_with_uncorrelated_inputs_one_sweep_is_round_to_nearest() -> None:
    weight, _ = references.problem(40, 64)
    assert torch.equal(quantease(weight, 2.0 * torch.eye(64), SPEC, sweeps=1).weight, rtn(weight, SPEC).weight)


def test_a_relaxed_column_leaves_no_slope() -> None:
    weight, hessian = references.problem(20, 32)
    grid = fit_grid(weight, SPEC)
    start = decode(encode(weight, grid), grid)
    values, _ = descend(weight, start, hessian, grid, [True])
    last = int(torch.argsort(hessian.diagonal(), descending=True, stable=True)[-1])
    slope = (weight - values).double() @ hessian[:, last].double()
    assert slope.abs().max() < 1e-3 * ((weight - start).double() @ hessian[:, last].double()).abs().max()


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 70), st.sampled_from([8, 24, 45]), st.booleans(), st.integers(0, 99))
def test_the_compiled_sweep_and_its_twin_give_the_same_bits(rows: int, columns: int, relaxed: bool, seed: int) -> None:
    weight, hessian = references.problem(rows, columns, seed)
    grid = fit_grid(weight, GridSpec(3, False, None, torch.float32))
    problem = (weight, weight, hessian, grid.scale, grid.zero_point, grid.columns(columns), grid.spec.numbers, relaxed)
    for left, right in zip(sweep(*problem), sweep(*problem, compiled=False), strict=True):
        assert torch.equal(left, right)


def test_columns_without_input_are_rounded() -> None:
    weight, hessian = references.problem(20, 32)
    hessian[5], hessian[:, 5] = 0, 0
    solved = quantease(weight, hessian, SPEC, sweeps=4)
    assert solved.record.dead_columns == 1
    assert torch.equal(solved.weight[:, 5], rtn(weight, SPEC).weight[:, 5])


def test_refining_gptq_descends_on_the_hessian_it_was_solved_with() -> None:
    """The float64 descent from GPTQ's result, with GPTQ's damping, strong enough to show."""
    weight, hessian = references.problem(40, 32)
    spec = GridSpec(3, True, 16, torch.float32)
    start, refined = (gptq(weight, hessian, spec, damping=1.0, refine_sweeps=sweeps) for sweeps in (0, 3))
    damped = hessian.double() + hessian.double().diagonal().mean() * torch.eye(32, dtype=torch.float64)
    grid = fit_grid(weight, spec)
    scale, values = grid.scale.double()[:, grid.columns(32)], start.weight.double()
    for _ in range(3):
        for j in torch.argsort(damped.diagonal(), descending=True, stable=True).tolist():
            wanted = values[:, j] + (weight.double() - values) @ damped[:, j] / damped[j, j]
            values[:, j] = (wanted / scale[:, j]).clamp(spec.qmin, spec.qmax).round() * scale[:, j]
    compared = ~(refined.rounded | start.rounded)
    assert compared.sum() > 20
    same = (refined.weight - values).abs().amax(1)[compared] < 1e-4
    assert same.double().mean() >= 0.9


def test_refining_gptq_lowers_its_error() -> None:
    weight, hessian = references.problem(64, 96)
    plain, refined = (gptq(weight, hessian, SPEC, refine_sweeps=sweeps).errors.sum() for sweeps in (0, 5))
    assert refined < 0.97 * plain


def outlier_reference(weight: torch.Tensor, hessian: torch.Tensor, share: float, sweeps: int) -> torch.Tensor:
    """``W = B + O`` in float64: a sweep for B against W - O, then a step for O that keeps its largest entries."""
    target, precise = weight.double(), hessian.double()
    count = round(share * weight.numel())

    def largest(values: torch.Tensor) -> torch.Tensor:
        kept = torch.zeros_like(values).flatten()
        for place in sorted(range(values.numel()), key=lambda i: -abs(float(values.flatten()[i])))[:count]:
            kept[place] = values.flatten()[place]
        return kept.view_as(values)

    outliers = largest(target)
    grid = fit_grid((target - outliers).float(), SPEC, hessian)
    scale = grid.scale.double()[:, grid.columns(weight.shape[1])]

    def near(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return (values / scale).clamp(SPEC.qmin, SPEC.qmax).round() * scale

    # In float32: the least value of a range is halfway between two codes.
    base = decode(encode((target - outliers).float(), grid), grid).double()
    rate = 1 / float(torch.linalg.eigvalsh(precise)[-1])
    for sweep_number in range(sweeps + 1):
        for j in torch.argsort(hessian.diagonal(), descending=True, stable=True).tolist():
            value = base[:, j] + (target - outliers - base) @ precise[:, j] / precise[j, j]
            base[:, j] = near(value, scale[:, j])
        if sweep_number < sweeps:
            outliers = largest(outliers - rate * (base + outliers - target) @ precise)
    return base + outliers


@pytest.mark.parametrize("sweeps", [1, 3])
def test_with_outliers_it_equals_the_float64_reference(sweeps: int) -> None:
    weight, hessian = references.problem(24, 32)
    weight[3, 7], weight[9, 20], weight[20, 1] = 6.0, -5.0, 4.0
    solved = quantease_with_outliers(weight, hessian, SPEC, sweeps=sweeps, share=0.05)
    expected = outlier_reference(weight, hessian, 0.05, sweeps)
    near = (solved.weight - expected).abs() < 1e-4
    # A value halfway between two codes may round to either, which moves the later values of its row.
    assert near.double().mean() >= 0.95
    assert solved.outliers is not None
    assert int(solved.outliers.sum()) == round(0.05 * weight.numel())
    assert solved.outliers[3, 7]


@pytest.mark.parametrize("share", [0.01, 0.05])
def test_outliers_have_the_requested_share_and_lower_the_error(share: float) -> None:
    weight, hessian = references.problem(64, 96)
    weight[3, 7] = 9.0
    segments = (40, 24)
    solved = quantease_with_outliers(weight, hessian, SPEC, sweeps=6, share=share, segments=segments)
    assert [int(part.sum()) for part in solved.outliers.split(segments)] == [round(share * n * 96) for n in segments]
    assert solved.record.outliers == int(solved.outliers.sum())
    error = layer_errors(weight, solved.weight, hessian).sum()
    assert error < 0.9 * quantease(weight, hessian, SPEC, sweeps=6).errors.sum()
