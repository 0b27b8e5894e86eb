"""bfloat16 numbers as 16-bit words: NumPy and Numba have no bfloat16."""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from numba.core import types
from numba.extending import overload

from calibrant.kernels.arrays import array_of


def words(tensor: torch.Tensor) -> np.ndarray:
    """The bfloat16 tensor's memory as uint16, without a copy."""
    return array_of(tensor)


def pairs(tensor: torch.Tensor) -> np.ndarray:
    """Neighbours on the last axis of a bfloat16 tensor as uint32 words; a tensor not aligned to pairs is copied."""
    even = tensor.storage_offset() % 2 == 0 and all(stride % 2 == 0 for stride in tensor.stride()[:-1])
    aligned = tensor if even and tensor.stride(-1) == 1 else tensor.clone(memory_format=torch.contiguous_format)
    return array_of(aligned).view(np.uint32)


@numba.njit(forceinline=True, error_model="numpy")
def widened(word: np.uint16) -> np.float32:
    """The bfloat16 number as float32, exactly."""
    return np.uint32(np.uint32(word) << np.uint32(16)).view(np.float32)


def in_float32(number: np.uint16 | np.float32) -> np.float32:
    """A bfloat16 number's word as float32; float32 numbers are returned as they are. For compiled code."""
    raise NotImplementedError


@overload(in_float32, strict=False)
def _in_float32(number: types.Type) -> Callable[[Any], Any]:
    return (lambda number: widened(number)) if number == types.uint16 else (lambda number: number)


@numba.njit(forceinline=True, error_model="numpy")
def rounded(number: np.float32) -> np.uint32:
    """32 bits whose upper half is the bfloat16 nearest to ``number``, ties to even; the lower half is unspecified."""
    bits = np.float32(number).view(np.uint32)
    return np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
