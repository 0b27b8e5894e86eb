"""Distribution of a recipe's budget over groups of layers by their measured sensitivities."""

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import torch

from calibrant.engine.allocation import allocate
from calibrant.engine.sensitivity import Compress, Sensitivity, measure_sensitivities
from calibrant.errors import CalibrantError
from calibrant.methods.solvers.rtn import rtn
from calibrant.methods.solvers.sparsity import Sparsity
from calibrant.methods.solvers.wanda import wanda
from calibrant.modeling.lazy_model import LazyModel
from calibrant.modeling.token_rows import TokenRows
from calibrant.progress import Progress
from calibrant.recipes.plan import Plan


@dataclass(frozen=True)
class SpentBudget:
    """Distribution of a budget over groups of layers.

    Attributes:
        choices: available bits or shares of zeros.
        average: mean of the chosen values, weighted by numbers of weights.
        chosen: chosen value of each entry of ``sensitivities``.
        divergence: sum of the measured divergences in nats.
        bound: lower bound on that sum for every distribution within the budget.
        uniform: the sum with the scheme's value in all groups; None if that is not a choice or exceeds the budget.
        sensitivities: measured sensitivities of the groups.
    """

    choices: list[float]
    average: float
    chosen: list[float]
    divergence: float
    bound: float
    uniform: float | None
    sensitivities: list[Sensitivity]


def spend_budget(
    model: LazyModel, plan: Plan, rows: TokenRows, dtype: torch.dtype, progress: Progress
) -> tuple[Plan, SpentBudget]:
    """Add a choice for every layer to ``plan`` (docs/methods.md "budgets"; ours).

    The sum of divergences neglects interactions between groups. Bits are measured with round-to-nearest on ranges
    weighted by the inputs' second moments, shares of zeros with Wanda.

    Raises:
        CalibrantError: no choices satisfy the average, or the model's layers cannot be measured.
    """
    budget = plan.recipe.budget
    assert budget is not None
    quantizes = plan.target.spec is not None
    nominal = plan.target.nominal
    average = budget.average if budget.average is not None else nominal
    measured = measure_sensitivities(
        model, plan.blocks, plan.leaves, budget.choices, _compress(plan), rows, dtype, progress
    )
    costs, sizes = np.array([one.divergences for one in measured]), np.array([float(one.elements) for one in measured])
    try:
        best = allocate(costs, sizes, np.array(budget.choices), average, at_most=quantizes)
    except ValueError as error:
        raise CalibrantError(f"recipe {plan.recipe.name}: {error}") from error
    chosen = [budget.choices[index] for index in best.chosen]
    by_layer = {layer: choice for one, choice in zip(measured, chosen, strict=True) for layer in one.layers}
    uniform = None
    within = nominal <= average if quantizes else nominal >= average
    if nominal in budget.choices and within:
        uniform = float(costs[:, budget.choices.index(nominal)].sum())
    reached = float((np.array(chosen) * sizes).sum() / sizes.sum())
    spent = SpentBudget(budget.choices, reached, chosen, best.cost, best.bound, uniform, measured)
    return replace(plan.with_choices(by_layer), notes=[*plan.notes, _sentence(spent, quantizes)]), spent


def _compress(plan: Plan) -> Compress:
    spec = plan.target.spec
    if spec is None:
        return lambda weight, sums, share: wanda(weight, sums, Sparsity(share)).weight
    return lambda weight, sums, bits: rtn(weight, replace(spec, bits=int(bits), range_search="importance"), sums).weight


def _sentence(spent: SpentBudget, quantizes: bool) -> str:
    counts = sorted(Counter(spent.chosen).items())
    what = ", ".join(f"{count} at {choice:g}" for choice, count in counts)
    unit = "bits" if quantizes else "zeros"
    said = f"budget: {unit} of groups of layers: {what}; {spent.average:.3g} on average; sum of divergences "
    said += f"{spent.divergence:.4f}, the least possible {spent.bound:.4f}"
    return said if spent.uniform is None else f"{said}, uniformly {spent.uniform:.4f}"
