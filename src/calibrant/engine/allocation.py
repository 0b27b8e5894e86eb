"""Choosing one setting per unit at the least total cost within a budget: a multiple-choice knapsack problem (ours)."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Allocation:
    """An allocation and its cost.

    Attributes:
        chosen: index of the choice for every unit.
        cost: sum of the chosen costs.
        bound: lower bound on the cost of every allocation within the budget.
    """

    chosen: list[int]
    cost: float
    bound: float


def allocate(costs: np.ndarray, sizes: np.ndarray, choices: np.ndarray, average: float, at_most: bool) -> Allocation:
    """Choose one setting per unit with the least total cost, by an integer program solved to optimality (HiGHS).

    Args:
        costs: ``[units, choices]``.
        sizes: numbers of weights ``[units]``.
        choices: values of the settings ``[choices]``, or of those of each unit ``[units, choices]``, in bits or
            shares of zeros.
        average: bound on the mean of the chosen values, weighted by ``sizes``.
        at_most: whether ``average`` is an upper bound; otherwise it is a lower bound.

    Raises:
        ValueError: no allocation satisfies the bound.
    """
    from scipy import optimize  # slow to import, and only budgets need it

    units, count = costs.shape
    one_each = np.kron(np.eye(units), np.ones(count))
    weights = (sizes[:, None] / sizes.sum() * np.broadcast_to(choices, costs.shape)).ravel()
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
