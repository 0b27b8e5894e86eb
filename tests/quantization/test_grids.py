import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibrant.quantization.grid_fitting import fit_grid
from calibrant.quantization.grids import GridSpec, decode, encode

SPECS = st.builds(
    GridSpec,
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    group_size=st.sampled_from([None, 4, 8]),
    scale_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    range_search=st.sampled_from(["none", "mse"]),
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
    low = (spec.qmin - grid.zero_point).repeat_interleave(8, dim=1) * step
    high = (spec.qmax - grid.zero_point).repeat_interleave(8, dim=1) * step
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
    assert asymmetric.zero_point.item() == -3  # -8 + 1.0 / 0.2


def test_scales_are_exact_in_their_storage_dtype() -> None:
    grid = fit_grid(weights(0), GridSpec(4, True, 4, torch.bfloat16))
    assert torch.equal(grid.scale, grid.scale.bfloat16().float())


@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_is_on_every_grid_and_a_group_of_zeros_has_scale_one(symmetric: bool) -> None:
    weight = weights(1)
    weight[0] = 0
    grid = fit_grid(weight, GridSpec(3, symmetric, 4, torch.float32))
    assert torch.equal(grid.scale[0], torch.ones(4))
    assert torch.equal(grid.zero_point[0], torch.zeros(4))
    assert torch.equal(decode(encode(torch.zeros_like(weight), grid), grid), torch.zeros_like(weight))


def power_cost(errors: torch.Tensor, weight: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    return errors.abs() ** 2.4


def importance_cost(errors: torch.Tensor, weight: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    spread = weight.double().square().mean(1, keepdim=True)
    return hessian.diagonal() * (spread + weight.double().square()).sqrt() * errors.square()


def output_cost(errors: torch.Tensor, weight: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    block = torch.arange(16) // 8
    return (errors @ (hessian * (block[:, None] == block))) * errors


COSTS = {"mse": power_cost, "importance": importance_cost, "clip": output_cost}


@pytest.mark.parametrize("search", COSTS)
@settings(max_examples=30, deadline=None)
@given(bits=st.integers(2, 5), symmetric=st.booleans(), seed=st.integers(0, 1000))
def test_a_search_never_increases_its_own_cost(search: str, bits: int, symmetric: bool, seed: int) -> None:
    weight = weights(seed)
    inputs = torch.randn(64, 16, generator=torch.Generator().manual_seed(seed + 1)) @ torch.rand(16, 16)
    hessian = (inputs.T @ inputs).double()
    costs = []
    for kind in ("none", search):
        grid = fit_grid(weight, GridSpec(bits, symmetric, 8, torch.float32, kind), hessian.float())
        errors = (decode(encode(weight, grid), grid) - weight).double()
        costs.append(COSTS[search](errors, weight, hessian).view(5, 2, 8).sum(-1))
    assert (costs[1] <= costs[0] * (1 + 1e-4)).all()


def candidate_scales(search: str, group: torch.Tensor, bits: int, importance: torch.Tensor) -> list[float]:
    """The candidate scales of a search of symmetric ranges for one group, in float64."""
    levels = 2**bits - 1
    largest = float(group.abs().max())
    plain = 2 * largest / levels
    if search == "mse":
        return [plain * (1 - step / 100) for step in range(80)]
    if search == "clip":
        return [plain * (1 - step / 20) for step in range(10)]
    found = [plain]
    for step in range(-9, 10):
        scale = plain * (levels / 2) / (levels / 2 + step / 10)
        codes = (group / scale).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).round()
        found.append(float((importance * group * codes).sum() / (importance * codes.square()).sum()))
    return found


@pytest.mark.parametrize("search", COSTS)
@pytest.mark.parametrize("bits", [2, 3])
def test_a_search_finds_the_least_of_its_candidates(search: str, bits: int) -> None:
    """Compared with all candidates in float64, on weights with outliers."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(40, 16, generator=generator)
    weight[:, 3] *= torch.rand(40, generator=generator) * 8
    inputs = torch.randn(64, 16, generator=generator) @ torch.rand(16, 16, generator=generator)
    hessian = inputs.T @ inputs
    grid = fit_grid(weight, GridSpec(bits, True, 8, torch.float32, search), hessian)
    spread = weight.double().square().mean(1, keepdim=True)
    importance = hessian.double().diagonal() * (spread + weight.double().square()).sqrt()

    def cost(row: int, group: int, scale: float) -> float:
        columns = slice(8 * group, 8 * group + 8)
        values = weight[row, columns].double()
        # In float32, since the least value of a plain range is halfway between two codes.
        codes = (values.float() / torch.tensor(scale)).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).round().double()
        errors = codes * scale - values
        if search == "mse":
            return float((errors.abs() ** 2.4).sum())
        if search == "importance":
            return float((importance[row, columns] * errors.square()).sum())
        return float(errors @ hessian[columns, columns].double() @ errors)

    for row in range(40):
        for group in range(2):
            columns = slice(8 * group, 8 * group + 8)
            tried = candidate_scales(search, weight[row, columns].double(), bits, importance[row, columns])
            least = min(cost(row, group, scale) for scale in tried)
            assert cost(row, group, float(grid.scale[row, group])) == pytest.approx(least, rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("search", COSTS)
def test_a_search_lowers_its_cost(search: str) -> None:
    """At three bits with outliers, every search costs far less than the plain range."""
    weight = weights(3).repeat(20, 1) * torch.rand(100, 16, generator=torch.Generator().manual_seed(0)).add(0.1)
    hessian = torch.diag(torch.linspace(0.01, 3, 16))
    plain, found = (fit_grid(weight, GridSpec(3, True, 8, torch.float32, kind), hessian) for kind in ("none", search))
    costs = [
        COSTS[search]((decode(encode(weight, grid), grid) - weight).double(), weight, hessian.double()).sum()
        for grid in (plain, found)
    ]
    assert costs[1] < 0.9 * costs[0]
