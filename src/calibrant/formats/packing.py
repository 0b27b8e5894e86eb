"""Bit packing of compressed-tensors: values of 2, 4 or 8 bits into int32 words, lowest bits first (formats.md §3.1)."""

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
    """Inverse of ``pack``: int8 codes ``[rows, columns]``."""
    raw = words.numpy().view(np.uint32)
    mask = np.uint32((1 << bits) - 1)
    lanes = [(raw >> np.uint32(lane * bits)) & mask for lane in range(_WORD_BITS // bits)]
    unsigned = np.stack(lanes, axis=-1).reshape(raw.shape[0], -1)[:, :columns]
    return torch.from_numpy((unsigned.astype(np.int16) - (1 << (bits - 1))).astype(np.int8))
