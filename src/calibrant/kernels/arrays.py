"""Tensors' memory as NumPy arrays, for compiled kernels."""

import ctypes
from typing import Any

import numpy as np
import torch

_DTYPES: dict[torch.dtype, np.dtype[Any]] = {torch.float32: np.dtype(np.float32), torch.bfloat16: np.dtype(np.uint16)}


def array_of(tensor: torch.Tensor) -> np.ndarray:
    """The memory of ``tensor``, float32 or bfloat16 (as uint16) on the CPU, as an array of its shape, without a copy.

    ``Tensor.numpy`` would fix the size of the tensor's storage for good, and storages of a suspended forward pass are
    emptied (``modeling/suspended_tensors.py``).

    Raises:
        TypeError: the tensor is on another device.
    """
    if tensor.device.type != "cpu":
        raise TypeError(f"a tensor on {tensor.device} has no array")
    dtype, storage = _DTYPES[tensor.dtype], tensor.untyped_storage()
    memory: Any = (ctypes.c_ubyte * storage.nbytes()).from_address(storage.data_ptr())
    memory.tensor = tensor  # kept as long as the array
    begin, strides = tensor.storage_offset() * dtype.itemsize, [step * dtype.itemsize for step in tensor.stride()]
    return np.ndarray(tuple(tensor.shape), dtype, memory, begin, strides)
