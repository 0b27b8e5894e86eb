"""llama.cpp's types: the package gguf decodes our blocks to the values that were solved."""

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibrant.formats.gguf_blocks import pack_blocks, unpack_blocks
from calibrant.formats.gguf_types import GGUF_TYPES, SUPER_BLOCK
from calibrant.formats.quantized import Codes, Layout
from calibrant.formats.stored_codes import dequantized
from calibrant.quantization.block_scales import BlockScales
from calibrant.quantization.grid_fitting import fit_grid
from calibrant.quantization.grids import GridSpec, decode, encode
from calibrant.recipes.gguf_spec import gguf_spec

COLUMNS = 2 * SUPER_BLOCK


def problem(seed: int, rows: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights of rows of very different size, and the Hessian of inputs of very different size."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, COLUMNS, generator=generator) * torch.rand(rows, 1, generator=generator) ** 4
    inputs = torch.randn(64, COLUMNS, generator=generator) * torch.rand(COLUMNS, generator=generator) * 3
    return weight, inputs.T @ inputs


def solved(kind: str, weight: torch.Tensor, hessian: torch.Tensor | None) -> tuple[Codes, torch.Tensor]:
    grid = fit_grid(weight, gguf_spec(kind, "importance"), hessian)
    codes = encode(weight, grid)
    return Codes(codes, **grid.stored(slice(None))), decode(codes, grid)


@pytest.mark.parametrize("kind", GGUF_TYPES)
@given(st.integers(0, 1000))
@settings(max_examples=5, deadline=None)
def test_blocks_hold_what_was_solved(kind: str, seed: int) -> None:
    codes, values = solved(kind, *problem(seed))
    data = pack_blocks(codes, kind)
    known = GGUF_TYPES[kind]
    layout = Layout(known.bits, not known.minima, known.group_size, format="gguf", type=known.name)
    assert data.shape == (9, COLUMNS // known.block * known.block_bytes)
    theirs = torch.from_numpy(gguf.dequantize(data, gguf.GGMLQuantizationType[kind.upper()]))
    assert torch.equal(dequantized(codes, layout), theirs)
    torch.testing.assert_close(values, theirs, rtol=1e-5, atol=1e-6)
    back = unpack_blocks(data, kind)
    assert torch.equal(back.codes, codes.codes)
    assert torch.equal(dequantized(back, layout), theirs)


@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0"])
def test_fitted_scales_beat_those_of_the_largest_weight(kind: str) -> None:
    """In the squared error weighted by the inputs, beside the package's own rounding."""
    weight, hessian = problem(0, 40)
    _, values = solved(kind, weight, hessian)
    numbers = gguf.GGMLQuantizationType[kind.upper()]
    theirs = torch.from_numpy(gguf.dequantize(gguf.quantize(weight.numpy(), numbers), numbers))
    ours, plain = (((weight - one).square() @ hessian.diagonal()).sum() for one in (values, theirs))
    assert ours < 0.9 * plain


@pytest.mark.parametrize("kind", ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k"])
def test_super_blocks_are_nearly_as_good_as_scales_of_their_own(kind: str) -> None:
    """Integers of six bits (Q2_K: four, Q6_K: eight) cost little beside the rounding of the weights."""
    weight, hessian = problem(1, 40)
    known = GGUF_TYPES[kind]
    own = GridSpec(
        known.bits, not known.minima, known.group_size, torch.float16, "importance", blocks=BlockScales(known.minima)
    )
    free = decode(encode(weight, grid := fit_grid(weight, own, hessian)), grid)
    _, values = solved(kind, weight, hessian)
    ours, least = (((weight - one).square() @ hessian.diagonal()).sum() for one in (values, free))
    assert ours < (1.5 if kind == "q2_k" else 1.15) * least


@pytest.mark.parametrize("kind", GGUF_TYPES)
def test_zeros_and_tiny_weights_become_finite_blocks(kind: str) -> None:
    weight = torch.zeros(4, COLUMNS)
    weight[1], weight[2, 0], weight[3, ::7] = 1e-12, 3.0, -2.0
    codes, values = solved(kind, weight, None)
    theirs = gguf.dequantize(pack_blocks(codes, kind), gguf.GGMLQuantizationType[kind.upper()])
    assert np.isfinite(theirs).all()
    assert bool((values[0] == 0).all())
    assert (values - weight).abs().max() < 1.1


@pytest.mark.parametrize("kind", ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k"])
def test_a_group_of_zeros_does_not_change_its_super_block(kind: str) -> None:
    weight, hessian = problem(2)
    rest = torch.arange(COLUMNS) >= 32
    _, whole = solved(kind, weight, hessian)
    zeroed = torch.where(rest, weight, 0.0)
    _, values = solved(kind, zeroed, hessian)
    assert not values[:, ~rest].any()
    before, after = (((one - weight)[:, rest].square() @ hessian.diagonal()[rest]).sum() for one in (whole, values))
    assert after < 1.2 * before


@pytest.mark.parametrize("kind", GGUF_TYPES)
def test_scales_beyond_float16_are_its_smallest_or_largest(kind: str) -> None:
    weight, _ = problem(3)
    for size in (2e-7, 1e6):
        scaled = weight / weight.abs().amax() * size
        _, values = solved(kind, scaled, None)
        assert bool(values.isfinite().all())
        assert (values - scaled).norm() < scaled.norm()
