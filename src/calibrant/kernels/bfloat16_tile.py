"""Register tile of matrix products in bfloat16, for processors that multiply bfloat16 pairs into float32 (AVX512-BF16).

Products of bfloat16 numbers are exact in float32 and sums are float32, so the result is as precise as after converting
to float32; the instruction does twice the work of a float32 one. Operands are panels: step ``k`` contains, for
``COLUMNS`` rows or columns of the product, entries ``2k`` and ``2k + 1`` of the summed axis as one 32-bit word.
"""

from collections.abc import Callable
from typing import Any

import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

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


@intrinsic
def _tile_product(typing_context: Any, left: Any, right: Any, pairs: Any, sums: Any, stride: Any) -> Any:
    """Add ``sum_k left[k, i] . right[k, j]`` to ``sums[i, j]`` for ``ROWS x COLUMNS`` entries.

    ``left`` and ``right`` are addresses of panels (``pairs`` steps of ``COLUMNS`` uint32, a pair of bfloat16 each),
    ``sums`` is the address of float32 rows ``stride`` entries apart; all three are integers.
    """
    signature = types.void(types.intp, types.intp, types.intp, types.intp, types.intp)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        left_address, right_address, count, sums_address, row_stride = args
        word, single = ir.IntType(32), ir.FloatType()
        vector, pair_vector = ir.VectorType(single, _WIDTH), ir.VectorType(_BFloat(), 2 * _WIDTH)
        words = ir.VectorType(word, _WIDTH)
        dot = cgutils.get_or_insert_function(  # type: ignore[no-untyped-call]  # numba has no type hints
            builder.module,
            ir.FunctionType(vector, [vector, pair_vector, pair_vector]),
            "llvm.x86.avx512bf16.dpbf16ps.512",
        )
        size = count.type
        left_pointer = builder.inttoptr(left_address, word.as_pointer())
        right_pointer = builder.inttoptr(right_address, word.as_pointer())
        sums_pointer = builder.inttoptr(sums_address, single.as_pointer())
        entry, body, done = builder.block, builder.append_basic_block("body"), builder.append_basic_block("done")
        builder.branch(body)

        builder.position_at_end(body)
        step = builder.phi(size)
        step.add_incoming(ir.Constant(size, 0), entry)
        totals = [builder.phi(vector) for _ in range(ROWS * _VECTORS)]
        for total in totals:
            total.add_incoming(ir.Constant(vector, [0.0] * _WIDTH), entry)
        offset = builder.mul(step, ir.Constant(size, COLUMNS))
        columns = []
        for index in range(_VECTORS):
            place = builder.gep(right_pointer, [builder.add(offset, ir.Constant(size, index * _WIDTH))])
            loaded = builder.load(builder.bitcast(place, words.as_pointer()), align=4)
            columns.append(builder.bitcast(loaded, pair_vector))
        updated = []
        for row in range(ROWS):
            value = builder.load(builder.gep(left_pointer, [builder.add(offset, ir.Constant(size, row))]), align=4)
            start = builder.insert_element(ir.Constant(words, ir.Undefined), value, ir.Constant(word, 0))
            spread = builder.shuffle_vector(start, ir.Constant(words, ir.Undefined), ir.Constant(words, [0] * _WIDTH))
            spread = builder.bitcast(spread, pair_vector)
            for index in range(_VECTORS):
                updated.append(builder.call(dot, [totals[row * _VECTORS + index], spread, columns[index]]))
        following = builder.add(step, ir.Constant(size, 1))
        step.add_incoming(following, body)
        for total, value in zip(totals, updated, strict=True):
            total.add_incoming(value, body)
        builder.cbranch(builder.icmp_signed("<", following, count), body, done)

        builder.position_at_end(done)
        for row in range(ROWS):
            base = builder.mul(row_stride, ir.Constant(size, row))
            for index in range(_VECTORS):
                place = builder.gep(sums_pointer, [builder.add(base, ir.Constant(size, index * _WIDTH))])
                pointer = builder.bitcast(place, vector.as_pointer())
                before = builder.load(pointer, align=4)
                builder.store(builder.fadd(before, updated[row * _VECTORS + index]), pointer, align=4)
        return context.get_dummy_value()

    return signature, generate


# Compiled code calls it without the typing context.
multiply_tile: Callable[..., None] = _tile_product


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
