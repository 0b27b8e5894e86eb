"""``S += X^T X`` for bfloat16 ``X`` on processors that multiply bfloat16 pairs into float32 (AVX512-BF16).

Products of bfloat16 numbers are exact in float32 and sums are float32, so nothing is lost against converting first;
the instruction only does twice the work, and only the lower triangle is computed, which matrix libraries' general
products cannot do. The micro-kernel keeps ``_ROWS x _COLUMNS`` sums in registers; pairs of tokens are interleaved as
the instruction wants them, in panels of ``_COLUMNS`` channels.
"""

from collections.abc import Callable
from typing import Any

import llvmlite.binding
import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

_ROWS, _VECTORS, _WIDTH = 8, 3, 16
_COLUMNS = _VECTORS * _WIDTH
# Pairs of tokens summed in registers before they are added to S: a panel of them stays in a core's cache.
_PAIRS = 512


def available() -> bool:
    """Whether this processor has the instruction."""
    return bool(llvmlite.binding.get_host_cpu_features().get("avx512bf16", False))


def add_gram_bfloat16(lower: torch.Tensor, inputs: torch.Tensor) -> None:
    """Add ``inputs^T inputs`` to the lower triangle of ``lower``, in place.

    ``lower`` float32 ``[in, in]``, ``inputs`` bfloat16 ``[tokens, in]``. Entries above the
    diagonal hold unspecified values afterwards.
    """
    tokens, width = inputs.shape
    values = inputs.contiguous().view(torch.int16).numpy().view(np.uint16)
    # Chunk by chunk, so that the packed copy is small enough to stay in the cache until it is used.
    packed = np.empty((-(-width // _COLUMNS), min(_PAIRS, -(-tokens // 2)), _COLUMNS), dtype=np.uint32)
    for begin in range(0, tokens, 2 * _PAIRS):
        chunk = values[begin : begin + 2 * _PAIRS]
        _pack(chunk, packed)
        _accumulate(packed, -(-len(chunk) // 2), lower.numpy())


class _BFloat(ir.types.Type):  # type: ignore[misc]  # llvmlite has no type hints
    """The LLVM type, which llvmlite does not name."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


@intrinsic
def _tile_product(typing_context: Any, left: Any, right: Any, pairs: Any, sums: Any, stride: Any) -> Any:
    """Add ``sum_k left[k, i] . right[k, j]`` to ``sums[i, j]`` for ``_ROWS x _COLUMNS`` entries.

    ``left`` and ``right`` address panels (uint32, one pair of bfloat16 each, ``_COLUMNS`` a step), ``sums`` float32
    rows that are ``stride`` apart; all three are addresses as integers.
    """
    signature = types.void(types.intp, types.intp, types.intp, types.intp, types.intp)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        left_address, right_address, count, sums_address, row_stride = args
        word, single = ir.IntType(32), ir.FloatType()
        vector, pair_vector = ir.VectorType(single, _WIDTH), ir.VectorType(_BFloat(), 2 * _WIDTH)
        words = ir.VectorType(word, _WIDTH)
        dot = cgutils.get_or_insert_function(  # type: ignore[no-untyped-call]
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
        totals = [builder.phi(vector) for _ in range(_ROWS * _VECTORS)]
        for total in totals:
            total.add_incoming(ir.Constant(vector, [0.0] * _WIDTH), entry)
        offset = builder.mul(step, ir.Constant(size, _COLUMNS))
        columns = []
        for index in range(_VECTORS):
            place = builder.gep(right_pointer, [builder.add(offset, ir.Constant(size, index * _WIDTH))])
            loaded = builder.load(builder.bitcast(place, words.as_pointer()), align=4)
            columns.append(builder.bitcast(loaded, pair_vector))
        updated = []
        for row in range(_ROWS):
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
        for row in range(_ROWS):
            base = builder.mul(row_stride, ir.Constant(size, row))
            for index in range(_VECTORS):
                place = builder.gep(sums_pointer, [builder.add(base, ir.Constant(size, index * _WIDTH))])
                pointer = builder.bitcast(place, vector.as_pointer())
                before = builder.load(pointer, align=4)
                builder.store(builder.fadd(before, updated[row * _VECTORS + index]), pointer, align=4)
        return context.get_dummy_value()

    return signature, generate


# Called from compiled code, where the typing context is not passed.
_multiply_tile: Callable[..., None] = _tile_product


def _pack_panels(values: np.ndarray, packed: np.ndarray) -> None:
    """Interleave tokens ``2k`` and ``2k + 1``; what is missing at the edges is zero."""
    tokens, width = values.shape
    pairs = (tokens + 1) // 2
    for panel in numba.prange(packed.shape[0]):
        first = panel * _COLUMNS
        count = min(_COLUMNS, width - first)
        for pair in range(pairs):
            target = packed[panel, pair]
            even = values[2 * pair]
            if 2 * pair + 1 < tokens:
                odd = values[2 * pair + 1]
                for column in range(count):
                    target[column] = np.uint32(even[first + column]) | (np.uint32(odd[first + column]) << np.uint32(16))
            else:
                for column in range(count):
                    target[column] = np.uint32(even[first + column])
            for column in range(count, _COLUMNS):
                target[column] = np.uint32(0)


def _accumulate_panels(packed: np.ndarray, pairs: int, lower: np.ndarray) -> None:
    """All tiles on or below the diagonal; panels are paired first with last, so that threads have equal work."""
    panels = packed.shape[0]
    width = lower.shape[0]
    for iteration in numba.prange((panels + 1) // 2):
        index = np.intp(iteration)  # prange counts unsigned, which would turn differences into floats
        edge = np.empty((_ROWS, _COLUMNS), dtype=np.float32)
        for side in range(2):
            column_panel = index if side == 0 else panels - 1 - index
            if side == 1 and column_panel == index:
                continue
            first = column_panel * _COLUMNS
            right = np.intp(packed[column_panel].ctypes.data)
            for row in range(first, width, _ROWS):
                left = np.intp(packed[row // _COLUMNS].ctypes.data) + 4 * (row % _COLUMNS)
                if row + _ROWS <= width and first + _COLUMNS <= width:
                    sums = np.intp(lower[row, first:].ctypes.data)
                    _multiply_tile(left, right, pairs, sums, width)
                else:
                    edge[:] = 0
                    _multiply_tile(left, right, pairs, np.intp(edge.ctypes.data), _COLUMNS)
                    for i in range(min(_ROWS, width - row)):
                        for j in range(min(_COLUMNS, width - first)):
                            lower[row + i, first + j] += edge[i, j]


_pack: Callable[..., None] = numba.njit(parallel=True, error_model="numpy", cache=True)(_pack_panels)
_accumulate: Callable[..., None] = numba.njit(parallel=True, error_model="numpy", cache=True)(_accumulate_panels)
