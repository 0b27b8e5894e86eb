"""Register tile of matrix products in bfloat16, for processors that multiply bfloat16 pairs into float32 (AVX512-BF16).

Products of bfloat16 numbers are exact in float32 and sums are float32, so the result is as precise as after converting
to float32; the instruction does twice the work of a float32 one. Operands are panels: step ``k`` contains, for
``COLUMNS`` rows or columns of the product, entries ``2k`` and ``2k + 1`` of the summed axis as one 32-bit word.
"""

from typing import Any

import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir

from calibrant.kernels.register_tile import function_of, tile_product

ROWS, _VECTORS, _WIDTH = 8, 3, 16
COLUMNS = _VECTORS * _WIDTH


def available() -> bool:
    """Whether this processor has AVX512-BF16."""
    return bool(llvmlite.binding.get_host_cpu_features().get("avx512bf16", False))


class _BFloat(ir.types.Type):  # type: ignore[misc]  # llvmlite has no type hints
    """LLVM's bfloat type, which llvmlite lacks."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


def _multiply_add(builder: Any, sums: Any, left: Any, right: Any) -> Any:
    vector, pairs = ir.VectorType(ir.FloatType(), _WIDTH), ir.VectorType(_BFloat(), 2 * _WIDTH)
    dot = function_of(builder, "llvm.x86.avx512bf16.dpbf16ps.512", vector, [vector, pairs, pairs])
    return builder.call(dot, [sums, builder.bitcast(left, pairs), builder.bitcast(right, pairs)])


_tile_product = tile_product(ROWS, _VECTORS, _WIDTH, _multiply_add)


@numba.njit(forceinline=True, error_model="numpy")
def multiply_tile(left: int | np.intp, right: int | np.intp, pairs: int, sums: int | np.intp, stride: int) -> None:
    """Add ``sum_k left[k, i] . right[k, j]`` to ``sums[i, j]`` for ``ROWS x COLUMNS`` entries.

    ``left`` and ``right`` are addresses of panels (``pairs`` steps of ``COLUMNS`` uint32, a pair of bfloat16 each),
    ``sums`` is the address of float32 rows ``stride`` entries apart; all three are integers.
    """
    _tile_product(left, right, pairs, sums, stride, 1, COLUMNS)


@numba.njit(forceinline=True, error_model="numpy")
def pack_rows(values: np.ndarray, pair: int, first: int, step: np.ndarray) -> None:
    """Write one step of a panel: rows ``2 pair`` and ``2 pair + 1`` of ``values`` from column ``first`` on.

    ``values`` is uint16 ``[rows, width]``, ``step`` uint32 ``[COLUMNS]``; zero past the last row or column.
    """
    rows, width = values.shape
    count = min(COLUMNS, width - first)
    even, odd = values[2 * pair], values[min(2 * pair + 1, rows - 1)]
    kept = np.uint32(0xFFFF0000 if 2 * pair + 1 < rows else 0)
    for column in range(count):
        high = (np.uint32(odd[first + column]) << np.uint32(16)) & kept
        step[column] = np.uint32(even[first + column]) | high
    step[count:] = 0


@numba.njit(forceinline=True, error_model="numpy")
def pack_columns(pairs: np.ndarray, first: int, panel: np.ndarray) -> None:
    """Write a panel: ``panel[k, i] = pairs[first + i, k]``, zero past the last row."""
    count = min(COLUMNS, pairs.shape[0] - first)
    for column in range(count):
        source = pairs[first + column]
        for pair in range(panel.shape[0]):
            panel[pair, column] = source[pair]
    for column in range(count, COLUMNS):
        panel[:, column] = 0
