from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibrant.kernels import bfloat16_gram, bfloat16_tile, float32_products, float32_tile
from calibrant.kernels.arrays import array_of
from calibrant.kernels.causal_attention import causal_attention
from calibrant.kernels.column_loop import ColumnProblem, solve_columns
from calibrant.kernels.column_sums import column_magnitudes, column_squares
from calibrant.kernels.decode_attention import decode_attention
from calibrant.kernels.gram import add_gram
from calibrant.kernels.grid_rounding import round_to_grid
from calibrant.kernels.inverse_factor import NotPositiveDefiniteError, inverse_factor
from calibrant.kernels.masks import keep_largest_by_row
from calibrant.kernels.number_types import NumberType
from calibrant.kernels.outlier_columns import OutlierColumns, RangeGrid, leave_one_out_gains
from calibrant.kernels.packed_linear import PackedFloat32Linear, PackedLinear
from calibrant.kernels.range_search import cheapest_range
from calibrant.kernels.rms_norm import rms_norm
from calibrant.methods.solvers.gptq import quantization_problem
from calibrant.methods.solvers.second_order import prepare
from calibrant.quantization.grid_fitting import fit_grid
from calibrant.quantization.grids import GridSpec, decode, encode
from tests import references

needs_bfloat16_tile = pytest.mark.skipif(not bfloat16_tile.available(), reason="this processor has no AVX512-BF16")
needs_float32_tile = pytest.mark.skipif(not float32_tile.available(), reason="this processor has no AVX2")


@pytest.mark.parametrize("size", [1, 7, 64, 193, 400])
def test_one_factorization_gives_the_three_step_factor(size: int) -> None:
    _, hessian = references.problem(1, size, tokens=3 * size + 10)
    factor, used = inverse_factor(hessian.double(), 0.01)
    assert used == 0.01
    expected = references.inverse_factor(hessian, 0.01)
    torch.testing.assert_close(factor, expected, rtol=1e-9, atol=1e-12)
    assert torch.equal(factor, factor.triu())


def test_a_matrix_that_is_not_positive_definite_is_refused() -> None:
    with pytest.raises(NotPositiveDefiniteError):
        inverse_factor(-torch.eye(4), 0.01)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 70),
    groups=st.integers(1, 4),
    pattern=st.sampled_from([None, (2, 4), (3, 6), (8, 16), (9, 12), (1, 2)]),
    share=st.sampled_from([0.0, 0.37]),
    quantize=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_compiled_loop_and_its_twin_give_the_same_bits(
    rows: int, groups: int, pattern: tuple[int, int] | None, share: float, quantize: bool, seed: int
) -> None:
    columns = 48 * groups
    weight, hessian = references.problem(rows, columns, seed)
    prepared = prepare(hessian, 0.01, act_order=False)
    problem = ColumnProblem(weight, prepared.factor)
    if quantize:
        grid = fit_grid(weight, GridSpec(3, False, 24, torch.float32))
        problem = quantization_problem(weight, prepared, grid)
    problem = replace(problem, pruned_of=pattern, sparsity=0.0 if pattern else share)
    compiled, plain = solve_columns(problem), solve_columns(problem, compiled=False)
    for name in ("weight", "codes", "kept"):
        assert torch.equal(vars(compiled)[name], vars(plain)[name]), name


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 70), columns=st.integers(1, 60), width=st.integers(1, 24), seed=st.integers(0, 99))
def test_columns_with_outliers_have_the_bits_of_their_twin(rows: int, columns: int, width: int, seed: int) -> None:
    weight, hessian = references.problem(rows, columns, seed)
    factor, _ = inverse_factor(hessian, 0.01)
    threshold = 0.1 * (weight.var(0, correction=0) / factor.diagonal().square()).mean().expand(rows, 1)
    both = [OutlierColumns(weight, factor, threshold, 3, compiled) for compiled in (True, False)]
    for begin in range(0, columns, width):
        end = min(begin + width, columns)
        assert torch.equal(both[0].columns(begin, end), both[1].columns(begin, end))
        grid = RangeGrid(3, False).fit(both[0].columns(begin, end))
        for one in both:
            one.solve(begin, end, *grid)
    assert all(map(torch.equal, both[0].solution, both[1].solution))


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 70), width=st.integers(2, 24), integer_zero=st.booleans(), seed=st.integers(0, 99))
def test_gains_of_leaving_one_out_are_those_of_the_twin(rows: int, width: int, integer_zero: bool, seed: int) -> None:
    weight, hessian = references.problem(rows, width, seed)
    factor, _ = inverse_factor(hessian, 0.01)
    grid = RangeGrid(4, integer_zero)
    found, expected = (leave_one_out_gains(weight, factor.diagonal(), grid, compiled) for compiled in (True, False))
    # A value halfway between two codes may round to either, which hardly changes its error.
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "width"), [(1, 1), (7, 30), (64, 48), (333, 100), (2049, 131)])
def test_the_symmetric_product(dtype: torch.dtype, tokens: int, width: int) -> None:
    inputs = torch.randn(tokens, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    lower = torch.zeros(width, width)
    for part in inputs.split(700):
        add_gram(lower, part)
    expected = inputs.double().T @ inputs.double()
    torch.testing.assert_close(lower.tril().double(), expected.tril(), rtol=1e-4, atol=1e-4 * tokens**0.5)


@needs_bfloat16_tile
@settings(max_examples=20, deadline=None)
@given(st.integers(1, 60), st.integers(1, 120), st.integers(0, 99))
def test_the_bfloat16_kernel_adds_to_what_is_there(tokens: int, width: int, seed: int) -> None:
    inputs = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed)).bfloat16()
    lower = torch.ones(width, width)
    bfloat16_gram.add_gram_bfloat16(lower, inputs)
    expected = 1 + inputs.double().T @ inputs.double()
    torch.testing.assert_close(lower.tril().double(), expected.tril(), rtol=1e-4, atol=1e-3)


@needs_float32_tile
@settings(max_examples=20, deadline=None)
@given(st.integers(1, 60) | st.integers(500, 1100), st.integers(1, 120), st.integers(0, 99))
def test_the_float32_kernel_adds_to_what_is_there(tokens: int, width: int, seed: int) -> None:
    inputs = torch.randn(tokens, 2 * width, generator=torch.Generator().manual_seed(seed))[:, ::2]  # not contiguous
    lower = torch.ones(width, width)
    float32_products.add_lower_gram(lower, inputs)
    expected = 1 + inputs.double().T @ inputs.double()
    torch.testing.assert_close(lower.tril().double(), expected.tril(), rtol=1e-4, atol=2e-3)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.data())
def test_short_rows_are_ranked_as_sorting_would(width: int, data: st.DataObject) -> None:
    values = data.draw(st.lists(st.integers(0, 3), min_size=width, max_size=width))
    dropped = data.draw(st.integers(0, width))
    scores = torch.tensor([values], dtype=torch.float32)
    expected = torch.ones(1, width, dtype=torch.bool)
    expected[0, scores[0].argsort(stable=True)[:dropped]] = False
    assert torch.equal(keep_largest_by_row(scores, dropped), expected)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 600), st.sampled_from([1e-6, 1e-5, 0.1]), st.booleans(), st.integers(0, 9))
def test_the_norm_divides_by_the_root_mean_square(
    rows: int, width: int, epsilon: float, rounded_first: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(2, rows, width, generator=generator).bfloat16().transpose(0, 1)
    weight = torch.randn(width, generator=generator).bfloat16()
    wide = inputs.double()
    expected = weight.double() * wide / (wide.square().mean(-1, keepdim=True) + epsilon).sqrt()
    found = rms_norm(inputs, weight.float(), epsilon, rounded_first).double()
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 70), st.integers(1, 80), st.integers(0, 99))
def test_sums_over_rows_are_those_of_float64(rows: int, width: int, seed: int) -> None:
    inputs = torch.randn(rows, 2 * width, generator=torch.Generator().manual_seed(seed)).bfloat16()[:, ::2]
    wide = inputs.double()
    total, largest = column_magnitudes(inputs)
    torch.testing.assert_close(column_squares(inputs).double(), wide.square().sum(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(total.double(), wide.abs().sum(0), rtol=1e-5, atol=1e-6)
    assert torch.equal(largest.double(), wide.abs().amax(0))


def _attention_inputs(batch: int, heads: int, shared: int, length: int, width: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, length, count, width, generator=generator).bfloat16().transpose(1, 2)
        for count in (heads, shared, shared)
    ]


@needs_bfloat16_tile
@settings(max_examples=30, deadline=None)
@given(
    st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 3)),
    st.integers(1, 230),
    st.integers(1, 40),
    st.none() | st.integers(1, 240),
    st.integers(0, 9),
)
def test_causal_attention_is_attention(
    heads: tuple[int, int, int], length: int, half: int, window: int | None, seed: int
) -> None:
    batch, shared, group = heads
    query, key, value = _attention_inputs(batch, shared * group, shared, length, 2 * half, seed)
    seen = torch.ones(length, length, dtype=torch.bool).tril().triu(1 - (window or length))
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.double(), key.double(), value.double(), attn_mask=seen, enable_gqa=True, scale=0.25
    )
    ours = causal_attention(query, key, value, 0.25, window)
    torch.testing.assert_close(ours.double(), expected.transpose(1, 2), rtol=0.01, atol=0.01)


@needs_bfloat16_tile
def test_causal_attention_never_looks_ahead() -> None:
    query, key, value = _attention_inputs(1, 2, 1, 100, 16, 0)
    before = causal_attention(query, key, value, 0.25)
    key[:, :, 60:], value[:, :, 60:] = 1e4, -1e4
    after = causal_attention(query, key, value, 0.25)
    assert torch.equal(before[:, :60], after[:, :60])


@needs_bfloat16_tile
def test_causal_attention_of_scores_far_apart_is_the_largest() -> None:
    query, key, value = _attention_inputs(1, 1, 1, 64, 16, 0)
    query[:], key[:] = 1, -100
    key[:, :, 0] = 100
    torch.testing.assert_close(causal_attention(query, key, value, 1.0)[0, :, 0], value[0, 0, :1].expand(64, -1))


@needs_bfloat16_tile
def test_causal_attention_takes_views_that_no_pair_of_numbers_fits() -> None:
    query, key, value = _attention_inputs(1, 1, 1, 20, 16, 0)
    expected = causal_attention(query, key, value, 0.25)
    wide = torch.empty(1, 1, 20, 17, dtype=torch.bfloat16)[..., 1:]
    shifted = torch.empty(20 * 16 + 1, dtype=torch.bfloat16)[1:].view(1, 1, 20, 16)
    for odd in (wide, shifted):
        odd.copy_(query)
        assert torch.equal(causal_attention(odd, key, value, 0.25), expected)


@needs_bfloat16_tile
@settings(max_examples=25, deadline=None)
@given(st.integers(1, 70), st.integers(1, 40), st.integers(1, 130), st.booleans(), st.integers(0, 9))
def test_a_packed_linear_is_a_linear(rows: int, half: int, outputs: int, bias: bool, seed: int) -> None:
    torch.manual_seed(seed)
    linear = torch.nn.Linear(2 * half, outputs, bias=bias).bfloat16()
    inputs = torch.randn(rows, 1, 2 * half).bfloat16()
    expected = torch.nn.functional.linear(
        inputs.double(), linear.weight.detach().double(), linear.bias.detach().double() if bias else None
    )
    packed = PackedLinear(linear)
    found = packed(inputs)
    torch.testing.assert_close(found.double(), expected, rtol=2**-7, atol=1e-5)
    assert torch.equal(packed(inputs[-1:]), found[-1:])


@needs_float32_tile
@settings(max_examples=25, deadline=None)
@given(st.integers(1, 70), st.integers(1, 700), st.integers(1, 130), st.booleans(), st.integers(0, 9))
def test_a_packed_float32_linear_is_a_linear(rows: int, inputs: int, outputs: int, bias: bool, seed: int) -> None:
    torch.manual_seed(seed)
    linear = torch.nn.Linear(inputs, outputs, bias=bias).double()
    values = torch.randn(rows, 1, inputs)
    expected = linear(values.double())
    packed = PackedFloat32Linear(linear.float())
    found = packed(values)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(packed(values[-1:]), found[-1:])


@pytest.mark.parametrize(("kind", "dtype"), [(PackedLinear, torch.bfloat16), (PackedFloat32Linear, torch.float32)])
@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 70), st.booleans())
def test_unpacking_gives_the_linear_that_was_packed(
    kind: type[PackedLinear | PackedFloat32Linear], dtype: torch.dtype, half: int, outputs: int, bias: bool
) -> None:
    linear = torch.nn.Linear(2 * half, outputs, bias=bias).to(dtype)
    found = kind(linear).unpacked()
    assert found.state_dict().keys() == linear.state_dict().keys()
    assert all(torch.equal(found.state_dict()[name], value) for name, value in linear.state_dict().items())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.01), (torch.float32, 1e-5)])
@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 60), st.integers(1, 40), st.integers(0, 9)
)
def test_decode_attention_is_attention_over_a_rows_own_positions(
    dtype: torch.dtype, tolerance: float, batch: int, shared: int, group: int, count: int, width: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    query, keys, values = (
        torch.randn(batch, heads, length, width, generator=generator).to(dtype)
        for heads, length in ((shared * group, 1), (shared, 70), (shared, 70))
    )
    first = torch.randint(0, count, (batch,), generator=generator)
    found = decode_attention(query, keys.transpose(2, 3).contiguous(), values, first, count, 0.3)
    for row in range(batch):
        part = slice(int(first[row]), count)
        expected = torch.nn.functional.scaled_dot_product_attention(
            query[row].double(), keys[row, :, part].double(), values[row, :, part].double(), enable_gqa=True, scale=0.3
        )
        torch.testing.assert_close(found[row].double(), expected.transpose(0, 1), rtol=tolerance, atol=tolerance)


def test_decode_attention_hides_no_nan() -> None:
    query, keys, values = torch.ones(1, 1, 1, 4), torch.ones(1, 1, 4, 8), torch.ones(1, 1, 8, 4)
    keys[0, 0, 0, 3] = torch.nan
    found = decode_attention(query, keys, values, torch.zeros(1, dtype=torch.long), 5, 0.5)
    assert bool(found.isnan().all())


def test_tensors_of_other_devices_have_no_array() -> None:
    with pytest.raises(TypeError, match="meta"):
        array_of(torch.empty(3, device="meta"))


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 70), groups=st.integers(1, 4), symmetric=st.booleans(), seed=st.integers(0, 99))
def test_rounding_and_its_twin_give_the_same_bits(rows: int, groups: int, symmetric: bool, seed: int) -> None:
    weight, _ = references.problem(rows, 12 * groups, seed)
    grid = fit_grid(weight, GridSpec(3, symmetric, 12, torch.float32))
    arguments = (weight, grid.scale, grid.zero_point, grid.spec.numbers)
    codes, values = round_to_grid(*arguments)
    plain_codes, plain_values = round_to_grid(*arguments, compiled=False)
    assert torch.equal(codes, plain_codes)
    assert torch.equal(values, plain_values)
    assert torch.equal(values, decode(encode(weight, grid), grid))


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 70),
    groups=st.integers(1, 3),
    width=st.sampled_from([1, 6, 17]),
    candidates=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_the_range_search_finds_the_least_cost(rows: int, groups: int, width: int, candidates: int, seed: int) -> None:
    weight, hessian = references.problem(rows, groups * width, seed)
    blocks = torch.stack([hessian[i : i + width, i : i + width] for i in range(0, groups * width, width)])
    generator = torch.Generator().manual_seed(seed)
    scales = torch.rand(rows, candidates, groups, generator=generator) + 0.1
    zero_points = torch.randint(-4, 4, scales.shape, generator=generator).float()

    def costs() -> torch.Tensor:
        by_group, found = weight.double().view(rows, groups, width), []
        for scale, zero_point in zip(scales.double().unbind(1), zero_points.double().unbind(1), strict=True):
            codes = torch.round(torch.clamp(by_group / scale[..., None] + zero_point[..., None], -8, 7))
            errors = (codes - zero_point[..., None]) * scale[..., None] - by_group
            found.append(torch.einsum("rgi,gij,rgj->rg", errors, blocks.double(), errors))
        return torch.stack(found, 1)

    expected = costs()
    for compiled in (True, False):
        best = cheapest_range(weight, scales, zero_points, blocks, NumberType.integers(4), compiled)
        chosen = expected.gather(1, best[:, None])[:, 0]
        torch.testing.assert_close(chosen, expected.amin(1), rtol=1e-4, atol=1e-6 * float(expected.amax()))
