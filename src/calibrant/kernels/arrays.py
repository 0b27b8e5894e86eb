"""Tensors' memory as NumPy arrays, for compiled kernels."""

import ctypes

import numpy as np
import torch

_DTYPES = {torch.float32: np.dtype(np.float32), torch.bfloat16: np.dtype(np.uint16)}


def array_of(tensor: torch.Tensor) -> np.ndarray:
    """The memory of ``tensor``, float32 or bfloat16 (as uint16) on the CPU, as an array of its shape, without a copy.

    ``Tensor.numpy`` would fix the size of the tensor's storage for good, and storages of a suspended forward pass are
    emptied (``modeling/suspended_tensors.py``).
    """
    dtype, storage = _DTYPES[tensor.dtype], tensor.untyped_storage()
    memory = (ctypes.c_ubyte * storage.nbytes()).from_address(storage.data_ptr())
    memory.tensor = tensor  # type: ignore[attr-defined]  # kept as long as the array
    begin, strides = tensor.storage_offset() * dtype.itemsize, [step * dtype.itemsize for step in tensor.stride()]
    return np.ndarray(tuple(tensor.shape), dtype, memory, begin, strides)
