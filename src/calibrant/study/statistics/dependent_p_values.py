"""One p-value of several that depend on each other in any way."""

from collections.abc import Sequence

from calibrant.errors import CalibrantError


def combined_p_value(p_values: Sequence[float]) -> float:
    """The p-value that more than half of ``p_values`` do not exceed, made valid: Rüger's combination.

    If no hypothesis is false, the chance that it is at most ``alpha`` is at most ``alpha``, however the ``n`` p-values
    depend on each other: the ``k``-th smallest is multiplied by ``n / k``, with ``k = n // 2 + 1`` (Rüger, Metrika 25,
    1978). One p-value stays as it is.

    Raises:
        CalibrantError: there is no p-value.
    """
    if not p_values:
        raise CalibrantError("there are no p-values to combine")
    needed = len(p_values) // 2 + 1
    return min(1.0, sorted(p_values)[needed - 1] * len(p_values) / needed)
