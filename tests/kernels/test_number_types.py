"""The numbers of grids: the nearest ones are those of PyTorch's own types and of compressed-tensors."""

import pytest
import torch
from compressed_tensors.quantization.utils.fp4_utils import cast_to_fp4
from hypothesis import given, settings
from hypothesis import strategies as st

from calibrant.kernels.column_loop import ColumnProblem, solve_columns
from calibrant.kernels.coordinate_descent import sweep
from calibrant.kernels.grid_rounding import round_to_grid
from calibrant.kernels.number_types import E2M1, E4M3, NumberType, decoded_floats
from calibrant.kernels.range_search import cheapest_range
from tests import references

E2M1_NUMBERS = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
TYPES = st.sampled_from([E2M1, E4M3, NumberType.integers(3)])


def values(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * 10 ** torch.randn(shape, generator=generator)


@given(st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_the_nearest_eight_bit_float_is_that_of_pytorch(seed: int) -> None:
    found = E4M3.nearest(values(seed, 1000))
    assert torch.equal(found, values(seed, 1000).clamp(-448, 448).to(torch.float8_e4m3fn).float())


def test_the_nearest_four_bit_float_is_that_of_compressed_tensors() -> None:
    """Ties too: every multiple of an eighth."""
    given_ = torch.arange(-80, 81) / 8
    assert torch.equal(E2M1.nearest(given_), cast_to_fp4(given_.clone()))
    assert set(E2M1.nearest(given_).abs().tolist()) == set(E2M1_NUMBERS.tolist())


def test_codes_of_floats_are_their_bits() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(torch.int8)
    numbers = decoded_floats(every)
    real = numbers.isfinite()
    assert int(real.sum()) == 254
    assert torch.equal(E4M3.codes_of(numbers[real]), every[real])
    assert torch.equal(decoded_floats(E2M1.codes_of(E2M1_NUMBERS)), E2M1_NUMBERS)


@given(TYPES, st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_compiled_kernels_and_their_twins_agree_on_every_type(numbers: NumberType, seed: int) -> None:
    weight, hessian = references.problem(37, 32, seed)
    scale, zero_point = weight.view(37, 2, 16).abs().amax(-1) / numbers.qmax, torch.zeros(37, 2)
    group = torch.arange(32) // 16
    pairs = [
        [round_to_grid(weight, scale, zero_point, numbers, compiled) for compiled in (True, False)],
        [
            sweep(weight, weight, hessian, scale, zero_point, group, numbers, compiled=compiled)
            for compiled in (True, False)
        ],
    ]
    factor = torch.linalg.cholesky(hessian + torch.eye(32), upper=True)
    problem = ColumnProblem(weight, factor, scale, zero_point, group, numbers)
    solved = [solve_columns(problem, compiled) for compiled in (True, False)]
    pairs.append([(one.codes, one.weight) for one in solved])
    for one, other in pairs:
        for left, right in zip(one, other, strict=True):
            assert torch.equal(left, right)
        codes = next(tensor for tensor in one if tensor.dtype is torch.int8)
        stored = next(tensor for tensor in one if tensor.dtype is torch.float32)
        decoded = decoded_floats(codes) if numbers.floating else codes.float()
        assert torch.equal((decoded.view(37, 2, 16) * scale[..., None]).view(37, 32), stored)


def test_the_range_search_counts_the_errors_of_floats() -> None:
    weight, hessian = references.problem(9, 16, 3)
    plain = weight.abs().amax(1, keepdim=True) / E2M1.qmax
    scales = torch.stack([plain * factor for factor in (1.0, 1.5, 0.5)], dim=1)
    for compiled in (True, False):
        best = cheapest_range(weight, scales, torch.zeros_like(scales), hessian[None], E2M1, compiled)
        for row in range(9):
            errors = [(E2M1.nearest(weight[row] / scale) * scale - weight[row]).double() for scale in scales[row, :, 0]]
            costs = torch.stack([error @ hessian.double() @ error for error in errors])
            assert costs[best[row, 0]] <= costs.min() * (1 + 1e-5)


@pytest.mark.parametrize("bits", range(2, 9))
def test_integers_are_rounded_half_to_even_inside_their_range(bits: int) -> None:
    given_ = torch.arange(-600, 601) / 4
    expected = given_.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).round()
    assert torch.equal(NumberType.integers(bits).nearest(given_), expected)
