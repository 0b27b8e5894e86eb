"""Which choice for each unit, so that measured costs are least and a total is kept: a multiple-choice knapsack."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Allocation:
    """``chosen[u]`` indexes the choices of unit u; ``cost`` is their sum, ``bound`` no allocation's cost is below."""

    chosen: list[int]
    cost: float
    bound: float


def allocate(costs: np.ndarray, sizes: np.ndarray, choices: np.ndarray, average: float, at_most: bool) -> Allocation:
    """The cheapest choice for every unit whose size-weighted mean is at most (else at least) ``average``.

    ``costs`` ``[units, choices]``, ``sizes`` ``[units]`` in weights, ``choices`` in bits or shares of zeros. Solved as
    an integer program to its end (HiGHS).

    Raises:
        ValueError: no allocation keeps the average.
    """
    from scipy import optimize  # heavy, and only budgets need it

    units, count = costs.shape
    one_each = np.kron(np.eye(units), np.ones(count))
    weights = (sizes[:, None] / sizes.sum() * choices[None]).ravel()
    limits = (-np.inf, average + 1e-9) if at_most else (average - 1e-9, np.inf)
    found = optimize.milp(
        costs.ravel(),
        integrality=np.ones(units * count),
        bounds=optimize.Bounds(0, 1),
        constraints=[optimize.LinearConstraint(one_each, 1, 1), optimize.LinearConstraint(weights[None], *limits)],
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        raise ValueError(f"choices {choices.tolist()} cannot average {average:g}")
    chosen = found.x.reshape(units, count).argmax(1)
    cost = float(costs[np.arange(units), chosen].sum())
    return Allocation(chosen.tolist(), cost, min(cost, float(found.mip_dual_bound)))
