"""Blocks of llama.cpp's types, as GGUF files have them (ggml, ``ggml-quants.c``)."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from calibrant.errors import CalibrantError
from calibrant.formats.gguf_types import GGUF_TYPES, SUPER_BLOCK, GgufType
from calibrant.formats.quantized import Codes, Layout

BLOCK = 32
# The type of each width, which holds all symmetric codes of it and of fewer bits.
_PLAIN = {4: "q4_0", 5: "q5_0", 8: "q8_0"}


class GgufBlocks:
    """Linears as the bytes that a GGUF file has of them, in tensors ``weight_blocks``, uint8 ``[out, bytes]``.

    The checkpoint is our own; ``write_gguf`` makes the file that llama.cpp loads.
    """

    name = "gguf-blocks"

    def refusal(self, layout: Layout) -> str | None:
        return None

    def config(self, layouts: Mapping[Layout, list[str]], ignored: list[str]) -> dict[str, Any]:
        types = {linear: layout.type for layout, linears in layouts.items() for linear in linears}
        return {"quant_method": "calibrant", "format": self.name, "types": types, "ignore": ignored}

    def write(self, codes: Codes, layout: Layout) -> dict[str, torch.Tensor]:
        return {"weight_blocks": torch.from_numpy(pack_blocks(codes, layout.type))}

    def read(self, tensors: dict[str, torch.Tensor], layout: Layout) -> Codes:
        return unpack_blocks(tensors["weight_blocks"].numpy(), layout.type)


def block_type(codes: Codes) -> str:
    """The smallest type that holds symmetric ``codes`` of other formats.

    Raises:
        CalibrantError: zero points, groups that are no whole blocks, or scales that float16 does not hold.
    """
    width = codes.codes.shape[1] // codes.scale.shape[1]
    if bool(codes.zero_point.any()):
        raise CalibrantError("asymmetric codes with whole zero points, which no type has: take the types q4_1 or q4_k")
    if width % BLOCK:
        raise CalibrantError(
            f"groups of {width}, which are no whole blocks of {BLOCK}: take groups that {BLOCK} divides"
        )
    scale = codes.scale.float()
    if not torch.equal(scale.half().float(), scale):
        raise CalibrantError("scales that float16 does not hold: compress to the gptq format, whose scales are float16")
    low, high = int(codes.codes.min()), int(codes.codes.max())
    return next(kind for bits, kind in _PLAIN.items() if -(1 << (bits - 1)) <= low and high < 1 << (bits - 1))


def pack_blocks(codes: Codes, kind: str) -> np.ndarray:
    """``codes`` ``[out, in]`` as blocks of ``kind``, uint8 ``[out, bytes]``; a scale of several blocks is repeated."""
    known = GGUF_TYPES[kind]
    rows, columns = codes.codes.shape
    repeats = columns // codes.scale.shape[1] // known.block
    scale = _halves(codes.scale.repeat_interleave(max(repeats, 1), dim=1))
    values = codes.codes.numpy().astype(np.int16).reshape(-1, known.block)
    unsigned = (values + _offset(known)).astype(np.uint8)
    if known.sub_scale is not None:
        return _super_blocks(codes, known, scale, unsigned).reshape(rows, -1)
    parts = [scale]
    if codes.minimum is not None:  # stored with the sign that it is added with
        parts.append(_halves(-codes.minimum))
    if known.bits == 8:
        parts.append(values.astype(np.int8).view(np.uint8))
    else:
        if known.bits == 5:
            parts.append(np.packbits(unsigned >> 4, axis=1, bitorder="little"))
        parts.append(_nibbles(unsigned & 15))
    return np.concatenate(parts, axis=1).reshape(rows, -1)


def unpack_blocks(data: np.ndarray, kind: str) -> Codes:
    """Inverse of ``pack_blocks``, with a scale for each block."""
    known = GGUF_TYPES[kind]
    rows = len(data)
    if known.sub_scale is not None:
        return _from_super_blocks(data, known)
    blocks = data.reshape(-1, known.block_bytes)
    scale, rest = blocks[:, :2], blocks[:, 2:]
    minimum = None
    if known.minima:
        minimum, rest = -_as_halves(rest[:, :2], rows), rest[:, 2:]
    if known.bits == 8:
        values = rest.view(np.int8)
    else:
        nibbles = rest[:, -BLOCK // 2 :]
        unsigned = np.concatenate([nibbles & 15, nibbles >> 4], axis=1)
        if known.bits == 5:
            unsigned = unsigned | np.unpackbits(rest[:, :4], axis=1, bitorder="little") << 4
        values = unsigned.astype(np.int8) - _offset(known)
    stored = _as_halves(scale, rows)
    codes = torch.from_numpy(np.ascontiguousarray(values, dtype=np.int8).reshape(rows, -1))
    return Codes(codes, stored, torch.zeros(stored.shape, dtype=torch.int8), minimum=minimum)


def _super_blocks(codes: Codes, known: GgufType, scale: np.ndarray, unsigned: np.ndarray) -> np.ndarray:
    """Blocks of 256 codes ``unsigned`` with their float16 ``scale``, integer scales and minima."""
    assert codes.sub_scale is not None
    scales = codes.sub_scale.numpy().reshape(len(unsigned), -1)
    if known.bits == 6:
        low, high = _planes(unsigned & 15, 4, 2, 64), _planes(unsigned >> 4, 2, 4, 32)
        return np.concatenate([low, high, scales.view(np.uint8), scale], axis=1)
    if known.bits == 3:
        # The third bit says that 4 is not taken away.
        return np.concatenate(
            [_high_bits(unsigned >> 2), _planes(unsigned & 3, 2, 4, 32), _six_bits(scales), scale], axis=1
        )
    assert codes.minimum is not None
    assert codes.sub_minimum is not None
    minima = codes.sub_minimum.numpy().reshape(len(unsigned), -1)
    minimum = _halves(codes.minimum)
    if known.bits == 2:
        both = scales.view(np.uint8) | minima << 4
        return np.concatenate([both, _planes(unsigned, 2, 4, 32), scale, minimum], axis=1)
    parts = [scale, minimum, _six_bit_pairs(scales.view(np.uint8), minima)]
    if known.bits == 5:
        parts.append(_high_bits(unsigned >> 4))
    return np.concatenate([*parts, _planes(unsigned & 15, 4, 2, 32)], axis=1)


def _from_super_blocks(data: np.ndarray, known: GgufType) -> Codes:
    """Inverse of ``_super_blocks``."""
    rows = len(data)
    blocks = data.reshape(-1, known.block_bytes)
    minimum = minima = None
    if known.bits == 6:
        low, high, scales, scale = np.split(blocks, [128, 192, 208], axis=1)
        unsigned = _from_planes(low, 4, 2, 64) | _from_planes(high, 2, 4, 32) << 4
        scales = scales.view(np.int8)
    elif known.bits == 3:
        high, low, packed, scale = np.split(blocks, [32, 96, 108], axis=1)
        unsigned, scales = _from_planes(low, 2, 4, 32) | _from_high_bits(high) << 2, _from_six_bits(packed)
    elif known.bits == 2:
        both, low, scale, minimum = np.split(blocks, [16, 80, 82], axis=1)
        unsigned, scales, minima = _from_planes(low, 2, 4, 32), (both & 15).view(np.int8), both >> 4
    else:
        scale, minimum, packed, rest = np.split(blocks, [2, 4, 16], axis=1)
        scales, minima = _from_six_bit_pairs(packed)
        unsigned = _from_planes(rest[:, -128:], 4, 2, 32)
        if known.bits == 5:
            unsigned = unsigned | _from_high_bits(rest[:, :32]) << 4
    values = unsigned.astype(np.int16) - _offset(known)
    stored = _as_halves(scale, rows)
    return Codes(
        torch.from_numpy(values.astype(np.int8).reshape(rows, -1)),
        stored,
        torch.zeros(stored.shape, dtype=torch.int8),
        minimum=None if minimum is None else _as_halves(minimum, rows),
        sub_scale=torch.from_numpy(np.ascontiguousarray(scales).reshape(rows, -1)),
        sub_minimum=None if minima is None else torch.from_numpy(np.ascontiguousarray(minima).reshape(rows, -1)),
    )


def _offset(known: GgufType) -> int:
    """What stored codes are more than those that are multiplied; codes beside minima begin at 0."""
    return 0 if known.minima else 1 << (known.bits - 1)


def _halves(values: torch.Tensor) -> np.ndarray:
    """Float16 ``[rows, blocks]`` as bytes, ``[rows * blocks, 2]``."""
    found: np.ndarray = values.half().contiguous().numpy().reshape(-1, 1).view(np.uint8)
    return found


def _as_halves(data: np.ndarray, rows: int) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(data).view(np.float16).reshape(rows, -1))


def _nibbles(values: np.ndarray) -> np.ndarray:
    """Two values a byte: those of the first half of a block in the low bits, of the second half in the high bits."""
    first, second = np.split(values, 2, axis=1)
    joined: np.ndarray = first | second << 4
    return joined


def _planes(values: np.ndarray, bits: int, count: int, run: int) -> np.ndarray:
    """Values ``[blocks, 256]`` of ``bits`` bits, ``count`` a byte: of ``count`` runs of ``run`` values, one beside the
    other, a byte has one of each, the first in the lowest bits."""
    runs = values.reshape(len(values), -1, count, run)
    found = np.zeros((len(values), runs.shape[1], run), dtype=np.uint8)
    for place in range(count):
        found |= runs[:, :, place] << np.uint8(bits * place)
    return found.reshape(len(values), -1)


def _from_planes(data: np.ndarray, bits: int, count: int, run: int) -> np.ndarray:
    """Inverse of ``_planes``."""
    runs = data.reshape(len(data), -1, 1, run)
    shifts = (np.arange(count, dtype=np.uint8) * bits)[None, None, :, None]
    found: np.ndarray = ((runs >> shifts) & np.uint8((1 << bits) - 1)).reshape(len(data), -1)
    return found


def _high_bits(bits: np.ndarray) -> np.ndarray:
    """Bits ``[blocks, 256]`` in 32 bytes: byte j has those of the weights j, j + 32, ..."""
    found: np.ndarray = np.packbits(bits.reshape(-1, 8, 32).transpose(0, 2, 1), axis=2, bitorder="little")[..., 0]
    return found


def _from_high_bits(data: np.ndarray) -> np.ndarray:
    """Inverse of ``_high_bits``."""
    bits = np.unpackbits(data[..., None], axis=2, bitorder="little")
    found: np.ndarray = bits.transpose(0, 2, 1).reshape(-1, SUPER_BLOCK)
    return found


def _six_bits(scales: np.ndarray) -> np.ndarray:
    """Sixteen scales from -32 to 31 in twelve bytes, as Q3_K has them."""
    values = (scales.astype(np.int16) + 32).astype(np.uint8)
    low = (values[:, :8] & 15) | (values[:, 8:] & 15) << 4
    high = np.zeros((len(values), 4), dtype=np.uint8)
    for place in range(4):
        high |= (values[:, 4 * place : 4 * place + 4] >> 4) << np.uint8(2 * place)
    return np.concatenate([low, high], axis=1)


def _from_six_bits(data: np.ndarray) -> np.ndarray:
    low = np.concatenate([data[:, :8] & 15, data[:, :8] >> 4], axis=1)
    high = np.concatenate([(data[:, 8:] >> np.uint8(2 * place)) & 3 for place in range(4)], axis=1)
    found: np.ndarray = ((low | high << 4).astype(np.int16) - 32).astype(np.int8)
    return found


def _six_bit_pairs(scales: np.ndarray, minima: np.ndarray) -> np.ndarray:
    """Eight scales and eight minima from 0 to 63 in twelve bytes, as Q4_K and Q5_K have them."""
    first = scales[:, :4] | (scales[:, 4:] >> 4) << 6
    second = minima[:, :4] | (minima[:, 4:] >> 4) << 6
    return np.concatenate([first, second, (scales[:, 4:] & 15) | (minima[:, 4:] & 15) << 4], axis=1)


def _from_six_bit_pairs(data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    first, second, last = data[:, :4], data[:, 4:8], data[:, 8:]
    scales = np.concatenate([first & 63, (last & 15) | (first >> 6) << 4], axis=1)
    minima = np.concatenate([second & 63, (last >> 4) | (second >> 6) << 4], axis=1)
    return scales.view(np.int8), minima
