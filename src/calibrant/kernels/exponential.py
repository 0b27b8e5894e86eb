"""Powers of two in a form that compilers vectorize."""

import numba
import numpy as np

LOG2_E = 1.4426950408889634
# The least exponent of a normal float32; smaller probabilities become zero.
_LEAST_EXPONENT = -126.0
# The Taylor polynomial of degree 6 of 2^f for f in [-1/2, 1/2]; its relative error is below 2e-7.
_C1, _C2, _C3, _C4, _C5, _C6 = (np.log(2.0) ** k / f for k, f in ((1, 1), (2, 2), (3, 6), (4, 24), (5, 120), (6, 720)))


@numba.njit(forceinline=True, error_model="numpy")
def power_of_two(exponent: np.float32) -> np.float32:
    """``2^exponent`` for exponents up to 0; zero for exponents of -126 or less."""
    kept = max(exponent, np.float32(_LEAST_EXPONENT))
    whole = np.floor(kept + np.float32(0.5))
    part = kept - whole
    result = np.float32(_C6)
    result = result * part + np.float32(_C5)
    result = result * part + np.float32(_C4)
    result = result * part + np.float32(_C3)
    result = result * part + np.float32(_C2)
    result = result * part + np.float32(_C1)
    result = result * part + np.float32(1.0)
    power = np.int32((np.int32(whole) + 127) << 23).view(np.float32)
    return result * power if exponent > np.float32(_LEAST_EXPONENT) else np.float32(0.0)
