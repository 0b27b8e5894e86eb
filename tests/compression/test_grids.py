import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibrant.compression.grids import GridSpec, decode, encode, fit_grid

SPECS = st.builds(
    GridSpec,
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    group_size=st.sampled_from([None, 4, 8]),
    scale_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    mse_search=st.booleans(),
)


def weights(seed: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(5, 16, generator=torch.Generator().manual_seed(seed)) * scale


@settings(max_examples=60, deadline=None)
@given(SPECS, st.integers(0, 1000))
def test_decoding_and_encoding_again_changes_nothing(spec: GridSpec, seed: int) -> None:
    grid = fit_grid(weights(seed), spec)
    codes = encode(weights(seed), grid)
    assert torch.equal(encode(decode(codes, grid), grid), codes)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 8), st.booleans(), st.integers(0, 1000))
def test_error_is_at_most_half_a_step_inside_the_range(bits: int, symmetric: bool, seed: int) -> None:
    spec = GridSpec(bits, symmetric, 8, torch.float32)
    weight = weights(seed)
    grid = fit_grid(weight, spec)
    step = grid.scale.repeat_interleave(8, dim=1)
    low = (spec.lowest - grid.zero).repeat_interleave(8, dim=1) * step
    high = (spec.highest - grid.zero).repeat_interleave(8, dim=1) * step
    error = (decode(encode(weight, grid), grid) - weight).abs()
    inside = (weight >= low) & (weight <= high)
    assert (error[inside] <= step[inside] / 2 * (1 + 1e-5)).all()


@settings(max_examples=30, deadline=None)
@given(SPECS, st.integers(0, 1000), st.integers(-3, 3))
def test_scaling_by_a_power_of_two_leaves_codes(spec: GridSpec, seed: int, power: int) -> None:
    weight = weights(seed)
    grid, scaled = fit_grid(weight, spec), fit_grid(weight * 2.0**power, spec)
    assert torch.equal(encode(weight, grid), encode(weight * 2.0**power, scaled))
    assert torch.equal(grid.scale * 2.0**power, scaled.scale)


def test_the_scale_formula_of_the_reference() -> None:
    weight = torch.tensor([[-1.0, 0.5, 0.25, 2.0]])
    symmetric = fit_grid(weight, GridSpec(4, True, None, torch.float32))
    assert symmetric.scale.item() == pytest.approx(2.0 / 7.5)
    asymmetric = fit_grid(weight, GridSpec(4, False, None, torch.float32))
    assert asymmetric.scale.item() == pytest.approx(3.0 / 15)
    assert asymmetric.zero.item() == -3  # -8 + 1.0 / 0.2


def test_scales_are_exact_in_their_storage_dtype() -> None:
    grid = fit_grid(weights(0), GridSpec(4, True, 4, torch.bfloat16))
    assert torch.equal(grid.scale, grid.scale.bfloat16().float())


@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_is_on_every_grid_and_a_group_of_zeros_has_scale_one(symmetric: bool) -> None:
    weight = weights(1)
    weight[0] = 0
    grid = fit_grid(weight, GridSpec(3, symmetric, 4, torch.float32))
    assert torch.equal(grid.scale[0], torch.ones(4))
    assert torch.equal(grid.zero[0], torch.zeros(4))
    assert torch.equal(decode(encode(torch.zeros_like(weight), grid), grid), torch.zeros_like(weight))


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 5), st.booleans(), st.integers(0, 1000))
def test_the_search_never_increases_its_own_error(bits: int, symmetric: bool, seed: int) -> None:
    weight = weights(seed)
    errors = []
    for search in (False, True):
        grid = fit_grid(weight, GridSpec(bits, symmetric, 8, torch.float32, search))
        difference = (decode(encode(weight, grid), grid) - weight).abs() ** 2.4
        errors.append(difference.view(5, 2, 8).sum(-1))
    assert (errors[1] <= errors[0] * (1 + 1e-6)).all()
