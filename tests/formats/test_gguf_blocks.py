"""Blocks of llama.cpp's plain types, against the decoder of the package ``gguf``."""

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibrant.errors import CalibrantError
from calibrant.formats.gguf_blocks import block_type, pack_blocks
from calibrant.formats.quantized import Codes


def codes(bits: int, rows: int, columns: int, group_size: int, seed: int, dtype: torch.dtype = torch.float16) -> Codes:
    """Random codes of the whole range, its ends among them."""
    numbers = torch.Generator().manual_seed(seed)
    half = 1 << (bits - 1)
    found = torch.randint(-half, half, (rows, columns), generator=numbers, dtype=torch.int8)
    found[0, :2] = torch.tensor([-half, half - 1])
    scale = (torch.rand(rows, columns // group_size, generator=numbers) + 0.01).to(dtype)
    return Codes(found, scale, torch.zeros(scale.shape, dtype=torch.int8))


def decoded(given: Codes) -> np.ndarray:
    width = given.codes.shape[1] // given.scale.shape[1]
    return (given.codes.float() * given.scale.float().repeat_interleave(width, dim=1)).numpy()


@settings(deadline=None)
@given(
    st.sampled_from([(2, "q4_0"), (3, "q4_0"), (4, "q4_0"), (5, "q5_0"), (6, "q8_0"), (8, "q8_0")]),
    st.integers(1, 5),
    st.sampled_from([(32, 32), (96, 32), (128, 64), (128, 128), (96, 96)]),
    st.integers(0, 1000),
)
def test_blocks_decode_to_the_weights(kind: tuple[int, str], rows: int, shape: tuple[int, int], seed: int) -> None:
    made = codes(kind[0], rows, *shape, seed)
    assert block_type(made) == kind[1]
    blocks = pack_blocks(made, kind[1])
    assert np.array_equal(gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind[1].upper()]), decoded(made))


def test_bfloat16_scales_fit_if_float16_holds_them() -> None:
    made = codes(4, 3, 64, 32, 0, torch.bfloat16)
    assert np.array_equal(gguf.dequantize(pack_blocks(made, "q4_0"), gguf.GGMLQuantizationType.Q4_0), decoded(made))
    made.scale[1, 1] = 2.0**-30
    with pytest.raises(CalibrantError, match="scales that float16 does not hold"):
        block_type(made)


def test_what_blocks_do_not_hold_is_refused() -> None:
    made = codes(4, 3, 64, 32, 0)
    made.zero_point[2, 0] = 1
    with pytest.raises(CalibrantError, match="asymmetric codes"):
        block_type(made)
    with pytest.raises(CalibrantError, match="groups of 16"):
        block_type(codes(4, 3, 64, 16, 0))
