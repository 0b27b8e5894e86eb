"""Register tiles of matrix products: a few rows by a few vectors of sums that stay in registers over all steps."""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

# Adds the product of two vectors of 32-bit words to a vector of float32 sums: builder, sums, left, right.
MultiplyAdd = Callable[[Any, Any, Any, Any], Any]


def tile_product(rows: int, vectors: int, lanes: int, multiply_add: MultiplyAdd) -> Callable[..., None]:
    """The function ``multiply_tile(left, right, steps, sums, stride, row_stride, step_stride)`` for compiled code.

    It adds ``sum_k left[k, i] . right[k, j]`` to ``sums[i, j]`` for ``rows`` by ``vectors * lanes`` entries. ``left``,
    ``right`` and ``sums`` are addresses, as integers, of 32-bit words: step k of ``right`` is ``vectors * lanes``
    words, that of ``left`` is ``step_stride`` words behind the one before, and its rows are ``row_stride`` words apart;
    ``sums`` are float32 rows ``stride`` entries apart.
    """

    @intrinsic
    def multiply_tile(
        typing_context: Any,
        left: Any,
        right: Any,
        steps: Any,
        sums: Any,
        stride: Any,
        row_stride: Any,
        step_stride: Any,
    ) -> Any:
        def generate(target: Any, builder: Any, signature: Any, args: Any) -> Any:
            _generate(builder, args, rows, vectors, lanes, multiply_add)
            return target.get_dummy_value()

        return types.void(*[types.intp] * 7), generate

    function: Callable[..., None] = multiply_tile  # compiled code calls it without the typing context
    return function


def _generate(builder: Any, args: Any, rows: int, vectors: int, lanes: int, multiply_add: MultiplyAdd) -> None:
    left_address, right_address, count, sums_address, stride, row_stride, step_stride = args
    word, single, size = ir.IntType(32), ir.FloatType(), count.type
    vector, words = ir.VectorType(single, lanes), ir.VectorType(word, lanes)
    left_pointer = builder.inttoptr(left_address, word.as_pointer())
    right_pointer = builder.inttoptr(right_address, word.as_pointer())
    sums_pointer = builder.inttoptr(sums_address, single.as_pointer())
    starts = [builder.gep(left_pointer, [builder.mul(row_stride, ir.Constant(size, row))]) for row in range(rows)]
    entry, body, done = builder.block, builder.append_basic_block("body"), builder.append_basic_block("done")
    builder.branch(body)

    builder.position_at_end(body)
    step = builder.phi(size)
    step.add_incoming(ir.Constant(size, 0), entry)
    totals = [builder.phi(vector) for _ in range(rows * vectors)]
    for total in totals:
        total.add_incoming(ir.Constant(vector, [0.0] * lanes), entry)
    offset = builder.mul(step, ir.Constant(size, vectors * lanes))
    columns = []
    for index in range(vectors):
        place = builder.gep(right_pointer, [builder.add(offset, ir.Constant(size, index * lanes))])
        columns.append(builder.load(builder.bitcast(place, words.as_pointer()), align=4))
    shift = builder.mul(step, step_stride)
    updated = []
    for row in range(rows):
        value = builder.load(builder.gep(starts[row], [shift]), align=4)
        start = builder.insert_element(ir.Constant(words, ir.Undefined), value, ir.Constant(word, 0))
        spread = builder.shuffle_vector(start, ir.Constant(words, ir.Undefined), ir.Constant(words, [0] * lanes))
        for index in range(vectors):
            updated.append(multiply_add(builder, totals[row * vectors + index], spread, columns[index]))
    following = builder.add(step, ir.Constant(size, 1))
    step.add_incoming(following, body)
    for total, value in zip(totals, updated, strict=True):
        total.add_incoming(value, body)
    builder.cbranch(builder.icmp_signed("<", following, count), body, done)

    builder.position_at_end(done)
    for row in range(rows):
        base = builder.mul(stride, ir.Constant(size, row))
        for index in range(vectors):
            place = builder.gep(sums_pointer, [builder.add(base, ir.Constant(size, index * lanes))])
            pointer = builder.bitcast(place, vector.as_pointer())
            before = builder.load(pointer, align=4)
            builder.store(builder.fadd(before, updated[row * vectors + index]), pointer, align=4)


def function_of(builder: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    """LLVM's function ``name`` in the module that ``builder`` writes to."""
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, arguments), name)  # type: ignore[no-untyped-call]  # numba has no type hints
