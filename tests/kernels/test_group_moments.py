"""The compiled moments are those of the PyTorch twin, and both are those of a float64 reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibrant.kernels.group_moments import WeightedGroups
from calibrant.kernels.number_types import E2M1, E4M3, NumberType

NUMBERS = {
    "int4": NumberType.integers(4),
    "int8": NumberType.integers(8),
    "two bits from 0": NumberType.naturals(2),
    "E2M1": E2M1,
    "E4M3": E4M3,
}


@pytest.mark.parametrize("name", NUMBERS)
@given(
    rows=st.integers(1, 9), groups=st.integers(1, 9), width=st.integers(1, 40), centred=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=20, deadline=None)
def test_moments_are_those_of_float64(name: str, rows: int, groups: int, width: int, centred: bool, seed: int) -> None:
    numbers, generator = NUMBERS[name], torch.Generator().manual_seed(seed)
    weights = torch.randn(rows, groups, width, generator=generator)
    importance = torch.rand(rows, groups, width, generator=generator)
    sign = torch.where(torch.rand(rows, groups, generator=generator) < 0.5, -1.0, 1.0)
    scale = sign * (weights.abs().amax(-1) / numbers.qmax + 1e-3)
    zero_point = torch.zeros(rows, groups)
    if not numbers.floating:
        zero_point = torch.randint(-3, 4, (rows, groups), generator=generator).float()
    kernel = WeightedGroups(weights, importance, numbers).moments(scale, zero_point, centred)
    twin = WeightedGroups(weights, importance, numbers, compiled=False).moments(scale, zero_point, centred)
    # The numbers themselves in float32, as both compute them; sums in float64.
    step = numbers.nearest(weights / scale[..., None] + zero_point[..., None])
    value = ((step - zero_point[..., None]) * scale[..., None]).double()
    code = (step - zero_point[..., None] if centred else step).double()
    weighted = importance.double() * code
    expected = {
        "ones": weighted,
        "products": weighted * weights.double(),
        "squares": weighted * code,
        "error": importance.double() * (weights.double() - value).square(),
    }
    for name_of, terms in expected.items():
        bound = 1e-5 * float(terms.abs().sum(-1).max()) + 1e-9
        for found in (kernel, twin):
            torch.testing.assert_close(vars(found)[name_of].double(), terms.sum(-1), rtol=0, atol=bound)
