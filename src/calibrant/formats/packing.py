"""Bit packing: values of 2, 4 or 8 bits into int32 words, lowest bits first (formats.md §3.1); 3 bits are read too."""

import numpy as np
import torch

_WORD_BITS = 32


def pack(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Signed codes int8 ``[rows, n]`` to int32 ``[rows, ceil(n bits / 32)]``; each is offset to unsigned."""
    per_word = _WORD_BITS // bits
    unsigned = (values.numpy().astype(np.int16) + (1 << (bits - 1))).astype(np.uint32)
    padding = -unsigned.shape[1] % per_word
    lanes = np.pad(unsigned, ((0, 0), (0, padding))).reshape(unsigned.shape[0], -1, per_word)
    words = np.zeros(lanes.shape[:2], dtype=np.uint32)
    for lane in range(per_word):
        words |= lanes[:, :, lane] << np.uint32(lane * bits)
    return torch.from_numpy(words.view(np.int32))


def unpack(words: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """Inverse of ``pack``: int8 codes ``[rows, columns]``; values of 3 bits lie across words (formats.md §5)."""
    raw = words.numpy().view(np.uint32)
    unsigned = _straddling(raw, bits) if _WORD_BITS % bits else _aligned(raw, bits)
    unsigned = unsigned[:, :columns]
    return torch.from_numpy((unsigned.astype(np.int16) - (1 << (bits - 1))).astype(np.int8))


def _aligned(words: np.ndarray, bits: int) -> np.ndarray:
    mask = np.uint32((1 << bits) - 1)
    lanes = [(words >> np.uint32(lane * bits)) & mask for lane in range(_WORD_BITS // bits)]
    return np.stack(lanes, axis=-1).reshape(words.shape[0], -1)


def _straddling(words: np.ndarray, bits: int) -> np.ndarray:
    """One stream of bits a row, lowest first."""
    little_endian = np.ascontiguousarray(words, dtype="<u4").view(np.uint8)
    stream = np.unpackbits(little_endian, axis=1, bitorder="little")
    whole = stream[:, : stream.shape[1] // bits * bits].reshape(words.shape[0], -1, bits)
    return np.packbits(whole, axis=2, bitorder="little")[:, :, 0]
