"""bfloat16 numbers as the 16-bit words that compiled code sees."""

import numba
import numpy as np
import torch


def words(tensor: torch.Tensor) -> np.ndarray:
    """The bfloat16 tensor's memory as uint16, not copied."""
    return tensor.view(torch.int16).numpy().view(np.uint16)


def pairs(tensor: torch.Tensor) -> np.ndarray:
    """Neighbours on the last axis as one 32-bit word."""
    even = tensor.storage_offset() % 2 == 0 and all(stride % 2 == 0 for stride in tensor.stride()[:-1])
    fitting = tensor if even and tensor.stride(-1) == 1 else tensor.clone(memory_format=torch.contiguous_format)
    return fitting.view(torch.int32).numpy().view(np.uint32)


@numba.njit(forceinline=True, error_model="numpy")
def widened(word: np.uint16) -> np.float32:
    """The number as float32, exactly."""
    return np.uint32(np.uint32(word) << np.uint32(16)).view(np.float32)


@numba.njit(forceinline=True, error_model="numpy")
def rounded(number: np.float32) -> np.uint32:
    """Bits of a float32 whose upper half is the nearest bfloat16, ties to even."""
    bits = np.float32(number).view(np.uint32)
    return np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
