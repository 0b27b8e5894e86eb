"""Register tile of matrix products in float32, for processors with AVX2 or AVX-512."""

from typing import Any

import llvmlite.binding
from llvmlite import ir

from calibrant.kernels.register_tile import function_of, tile_product

_FEATURES = llvmlite.binding.get_host_cpu_features()
# All registers but a few are sums: 32 of 16 numbers with AVX-512, 16 of 8 with AVX2.
ROWS, _VECTORS, _LANES = (8, 3, 16) if _FEATURES.get("avx512f", False) else (4, 3, 8)
COLUMNS = _VECTORS * _LANES


def available() -> bool:
    """Whether this processor has AVX2 and fused multiply-add."""
    return bool(_FEATURES.get("avx2", False) and _FEATURES.get("fma", False))


def _multiply_add(builder: Any, sums: Any, left: Any, right: Any) -> Any:
    vector = ir.VectorType(ir.FloatType(), _LANES)
    fused = function_of(builder, f"llvm.fma.v{_LANES}f32", vector, [vector, vector, vector])
    return builder.call(fused, [builder.bitcast(left, vector), builder.bitcast(right, vector), sums])


multiply_tile = tile_product(ROWS, _VECTORS, _LANES, _multiply_add)
