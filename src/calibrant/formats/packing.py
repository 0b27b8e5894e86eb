"""Bit packing of codes into int32 words, lowest bits first; 3-bit codes cross the borders of words, as in GPTQ files.

Source: vllm-project/compressed-tensors, ``compressors/pack_quantized/helpers.py``.
"""

import numpy as np
import torch

_WORD_BITS = 32


def pack(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack signed int8 codes ``[rows, n]``, offset to unsigned, into int32 ``[rows, ceil(n bits / 32)]``."""
    unsigned = (values.numpy().astype(np.int16) + (1 << (bits - 1))).astype(np.uint32)
    if _WORD_BITS % bits:
        return torch.from_numpy(_pack_stream(unsigned, bits).view(np.int32))
    per_word = _WORD_BITS // bits
    padding = -unsigned.shape[1] % per_word
    lanes = np.pad(unsigned, ((0, 0), (0, padding))).reshape(unsigned.shape[0], -1, per_word)
    words = np.zeros(lanes.shape[:2], dtype=np.uint32)
    for lane in range(per_word):
        words |= lanes[:, :, lane] << np.uint32(lane * bits)
    return torch.from_numpy(words.view(np.int32))


def unpack(words: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """Inverse of ``pack``: int8 codes ``[rows, columns]``."""
    raw = words.numpy().view(np.uint32)
    unsigned = _unpack_stream(raw, bits) if _WORD_BITS % bits else _unpack_lanes(raw, bits)
    unsigned = unsigned[:, :columns]
    return torch.from_numpy((unsigned.astype(np.int16) - (1 << (bits - 1))).astype(np.int8))


def _unpack_lanes(words: np.ndarray, bits: int) -> np.ndarray:
    mask = np.uint32((1 << bits) - 1)
    lanes = [(words >> np.uint32(lane * bits)) & mask for lane in range(_WORD_BITS // bits)]
    return np.stack(lanes, axis=-1).reshape(words.shape[0], -1)


def _pack_stream(unsigned: np.ndarray, bits: int) -> np.ndarray:
    """Pack each row into one continuous bit stream, lowest bits first."""
    each = np.unpackbits(unsigned.astype(np.uint8)[..., None], axis=2, count=bits, bitorder="little")
    stream = each.reshape(len(unsigned), -1)
    stream = np.pad(stream, ((0, 0), (0, -stream.shape[1] % _WORD_BITS)))
    return np.packbits(stream, axis=1, bitorder="little").view("<u4").astype(np.uint32)


def _unpack_stream(words: np.ndarray, bits: int) -> np.ndarray:
    """Unpack one continuous bit stream per row, lowest bits first."""
    little_endian = np.ascontiguousarray(words, dtype="<u4").view(np.uint8)
    stream = np.unpackbits(little_endian, axis=1, bitorder="little")
    whole = stream[:, : stream.shape[1] // bits * bits].reshape(words.shape[0], -1, bits)
    return np.packbits(whole, axis=2, bitorder="little")[:, :, 0]
