"""Rounding with gradients: the very values that are stored, and the gradients that it says it has."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibrant.methods.solvers.rtn import rtn
from calibrant.quantization.activation_ranges import InputRange
from calibrant.quantization.grids import GridSpec
from calibrant.training.fake_quantization import (
    fake_quantize,
    fake_quantize_tensor,
    fake_quantize_tokens,
    fake_quantize_weight,
)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 8),
    st.booleans(),
    st.sampled_from([None, 8, 24]),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    st.integers(0, 99),
)
def test_weights_are_what_round_to_nearest_stores(
    bits: int, symmetric: bool, group: int | None, dtype: torch.dtype, seed: int
) -> None:
    weight = torch.randn(5, 24, generator=torch.Generator().manual_seed(seed))
    weight[0] = 0
    spec = GridSpec(bits, symmetric, group, dtype)
    assert torch.equal(fake_quantize_weight(weight, spec), rtn(weight, spec).weight)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([torch.bfloat16, torch.float32]), st.floats(-2, 2), st.integers(0, 99))
def test_static_activations_are_what_the_stored_grid_says(dtype: torch.dtype, shift: float, seed: int) -> None:
    inputs = torch.randn(40, 6, generator=torch.Generator().manual_seed(seed)) + shift
    seen = InputRange(torch.device("cpu"))
    seen.add(inputs)
    grid = seen.grid("minmax", 99.0, dtype)
    scale, zero_point = grid.scale.float(), grid.zero_point.float()
    expected = (torch.clamp(inputs / scale + zero_point, -128, 127).round() - zero_point) * scale
    found = fake_quantize_tensor(inputs, inputs.amin(), inputs.amax(), GridSpec(8, False, None, dtype))
    assert torch.equal(found, expected)


def test_dynamic_activations_are_what_compressed_tensors_makes_of_them() -> None:
    helpers = pytest.importorskip("compressed_tensors.quantization.utils.helpers")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize as theirs

    inputs = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(0))
    inputs[0, 0] = 0
    settings_ = QuantizationArgs(num_bits=8, symmetric=True, strategy="token", dynamic=True)
    scale, zero_point = helpers.compute_dynamic_scales_and_zp(inputs, settings_, torch.nn.Identity())
    torch.testing.assert_close(fake_quantize_tokens(inputs), theirs(inputs, scale, zero_point, settings_))


def test_gradients_go_straight_through_inside_and_stop_outside() -> None:
    values = torch.tensor([-9.0, -0.3, 0.26, 0.74, 9.0], requires_grad=True)
    scale = torch.tensor(0.5, requires_grad=True)
    fake_quantize(values, scale, torch.tensor(0.0), -8, 7).sum().backward()
    assert values.grad is not None
    assert scale.grad is not None
    assert values.grad.tolist() == [0, 1, 1, 1, 0]
    inside = values.detach()[1:4] / 0.5
    assert scale.grad.item() == pytest.approx(-8 + 7 + float((inside.round() - inside).sum()), rel=1e-6)


def test_gradients_reach_weights_through_their_range() -> None:
    """The largest weight of a row sets the scale of all others."""
    weight = torch.tensor([[0.13, 1.0, -0.37]], requires_grad=True)
    spec = GridSpec(3, True, None, torch.float32)
    fake_quantize_weight(weight, spec)[0, 0].backward()
    assert weight.grad is not None
    assert weight.grad[0, 0] == 1.0
    assert weight.grad[0, 1] != 0.0
    assert weight.grad[0, 2] == 0.0


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 8), st.sampled_from([(6, 1), (1, 1), ()]), st.integers(0, 99))
def test_gradients_are_those_of_autograd(bits: int, shape: tuple[int, ...], seed: int) -> None:
    """Of the same rounding written down with detached differences, in float64."""
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(4, 6, 9, generator=draw, requires_grad=True)
    scale = (torch.rand(shape, generator=draw) * 0.5 + 0.05).requires_grad_(True)
    zero_point = torch.randint(-2, 2, shape, generator=draw).float()
    qmin, qmax = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    weights = torch.randn(4, 6, 9, generator=draw)
    found = fake_quantize(values, scale, zero_point, qmin, qmax)
    (found * weights).sum().backward()
    wide, wide_scale = values.detach().double().requires_grad_(True), scale.detach().double().requires_grad_(True)
    clamped = torch.clamp(wide / wide_scale + zero_point, qmin, qmax)
    expected = (clamped + (clamped.round() - clamped).detach() - zero_point) * wide_scale
    (expected * weights).sum().backward()
    assert values.grad is not None
    assert scale.grad is not None
    assert wide.grad is not None
    assert wide_scale.grad is not None
    torch.testing.assert_close(found.detach().double(), expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(values.grad.double(), wide.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scale.grad.double(), wide_scale.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("low", "high"), [(-2.0, 2.0), (-0.2, 3.0), (-0.1, 1.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_either_end_of_a_range_is_moved_by_what_is_clipped_there(low: float, high: float, dtype: torch.dtype) -> None:
    """Finite differences of the squared error; zeros are whole numbers, so the ends move in steps of a hundredth."""
    inputs = torch.linspace(-1.0, 4.0, 20001)
    spec = GridSpec(8, False, None, torch.float32)

    def error(ends: list[torch.Tensor], spec: GridSpec) -> torch.Tensor:
        return (fake_quantize_tensor(inputs, *ends, spec) - inputs).square().mean()

    ends = [torch.tensor(end, requires_grad=True) for end in (low, high)]
    found = torch.autograd.grad(error(ends, GridSpec(8, False, None, dtype)), ends)
    for number in range(2):
        values = []
        for step in (0.05, -0.05):
            moved = [torch.tensor(end) for end in (low, high)]
            moved[number] += step
            values.append(float(error(moved, spec)))
        assert float(found[number]) == pytest.approx((values[0] - values[1]) / 0.1, rel=0.05, abs=0.03)


@pytest.mark.parametrize("scale", [1e6, 1e-9])
def test_gradients_do_not_pass_through_the_dtype_of_scales(scale: float) -> None:
    """Of loss values that float16 could not hold."""
    inputs = torch.linspace(-1.0, 4.0, 1001)
    gradients = []
    for factor in (1.0, scale):
        high = torch.tensor(3.0, requires_grad=True)
        rounded = fake_quantize_tensor(inputs, torch.tensor(-0.5), high, GridSpec(8, False, None, torch.float16))
        (factor * (rounded - inputs).square().sum()).backward()
        gradients.append(float(high.grad) / factor)  # type: ignore[arg-type]
    assert gradients[1] == pytest.approx(gradients[0], rel=1e-4)


def test_the_kernel_and_its_plain_twin_have_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(0)
    results = []
    values = torch.randn(6, 40, generator=draw)
    weights = torch.randn(6, 40, generator=draw)
    for compiled in (True, False):
        given = [values.clone(), torch.full((6, 1), 0.02), torch.full((6, 1), 3.0)]
        for one in given:
            one.requires_grad_(True)
        with monkeypatch.context() as patched:
            if not compiled:
                patched.setattr("calibrant.training.fake_quantization._on_cpu", lambda _: False)
            (fake_quantize(*given, -128, 127) * weights).sum().backward()
        results.append([one.grad for one in given])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
