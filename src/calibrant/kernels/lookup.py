"""Elementwise functions of bfloat16 numbers as tables of all 65,536 values."""

from collections.abc import Callable

import numba
import numpy as np
import torch

from calibrant.kernels.bfloat16_words import words

# Numbers per piece of work of a thread.
_PART = 4096


def every_number() -> torch.Tensor:
    """All bfloat16 numbers in the order of their words, ``[65536]``, infinities and NaN included."""
    return torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def look_up(inputs: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The entry of ``table`` ``[65536]`` for every number of ``inputs`` ``[...]``, both bfloat16 on the CPU."""
    numbers = inputs.contiguous()
    output = torch.empty_like(numbers)
    _look_up(words(numbers.view(-1)), words(table), words(output.view(-1)))
    return output


def _look_up_parts(numbers: np.ndarray, table: np.ndarray, output: np.ndarray) -> None:
    for part in numba.prange((len(numbers) + _PART - 1) // _PART):
        for index in range(part * _PART, min(len(numbers), (part + 1) * _PART)):
            output[index] = table[numbers[index]]


_look_up: Callable[..., None] = numba.njit(parallel=True, error_model="numpy", cache=True)(_look_up_parts)
