"""Codes as blocks of llama.cpp's plain types: 32 codes of a row after their float16 scale (ggml, ``ggml-quants.c``)."""

import numpy as np
import torch

from calibrant.errors import CalibrantError
from calibrant.formats.quantized import Codes

BLOCK = 32
# The type of each width, which holds all symmetric codes of it and of fewer bits.
_TYPES = {4: "Q4_0", 5: "Q5_0", 8: "Q8_0"}


def block_type(codes: Codes) -> str:
    """The smallest type that holds ``codes``.

    Raises:
        CalibrantError: zero points, groups that are no whole blocks, or scales that float16 does not hold.
    """
    width = codes.codes.shape[1] // codes.scale.shape[1]
    if bool(codes.zero_point.any()):
        raise CalibrantError("asymmetric codes, which blocks with a scale alone do not hold: take symmetric weights")
    if width % BLOCK:
        raise CalibrantError(
            f"groups of {width}, which are no whole blocks of {BLOCK}: take groups that {BLOCK} divides"
        )
    scale = codes.scale.float()
    if not torch.equal(scale.half().float(), scale):
        raise CalibrantError("scales that float16 does not hold: compress to the gptq format, whose scales are float16")
    low, high = int(codes.codes.min()), int(codes.codes.max())
    return next(kind for bits, kind in _TYPES.items() if -(1 << (bits - 1)) <= low and high < 1 << (bits - 1))


def pack_blocks(codes: Codes, kind: str) -> np.ndarray:
    """``codes`` ``[out, in]`` as blocks of ``kind``, uint8 ``[out, bytes]``; a scale of several blocks is repeated."""
    rows, columns = codes.codes.shape
    repeats = columns // codes.scale.shape[1] // BLOCK
    scales = codes.scale.half().repeat_interleave(repeats, dim=1).cpu().numpy().reshape(-1, 1).view(np.uint8)
    values = codes.codes.cpu().numpy().reshape(-1, BLOCK)
    if kind == "Q8_0":
        parts = [scales, values.view(np.uint8)]
    elif kind == "Q5_0":
        unsigned = (values + np.int8(16)).view(np.uint8)
        parts = [scales, np.packbits(unsigned >> 4, axis=1, bitorder="little"), _nibbles(unsigned & 15)]
    else:
        parts = [scales, _nibbles((values + np.int8(8)).view(np.uint8))]
    return np.concatenate(parts, axis=1).reshape(rows, -1)


def _nibbles(values: np.ndarray) -> np.ndarray:
    """Two values a byte: those of the first half of a block in the low bits, of the second half in the high bits."""
    first, second = np.split(values, 2, axis=1)
    joined: np.ndarray = first | second << 4
    return joined
