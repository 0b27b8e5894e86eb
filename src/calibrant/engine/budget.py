"""Distribution of a recipe's budget over groups of layers by their measured sensitivities."""

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import torch

from calibrant.engine.allocation import allocate
from calibrant.engine.sensitivity import Compress, Sensitivity, measure_sensitivities
from calibrant.errors import CalibrantError
from calibrant.formats.gguf_types import GGUF_TYPES, fitting_type
from calibrant.journal import Journal
from calibrant.methods.solvers.rtn import rtn
from calibrant.methods.solvers.sparsity import Sparsity
from calibrant.methods.solvers.wanda import wanda
from calibrant.modeling.lazy_model import LazyModel
from calibrant.modeling.token_rows import TokenRows
from calibrant.progress import Progress
from calibrant.recipes.gguf_spec import gguf_spec
from calibrant.recipes.parts import Choice
from calibrant.recipes.plan import Plan


@dataclass(frozen=True)
class SpentBudget:
    """Distribution of a budget over groups of layers.

    Attributes:
        choices: available bits, types or shares of zeros.
        average: mean of the chosen values, of types of their bits in the file, weighted by numbers of weights.
        chosen: chosen value of each entry of ``sensitivities``.
        divergence: sum of the measured divergences in nats.
        bound: lower bound on that sum for every distribution within the budget.
        uniform: the sum with the scheme's value in all groups; None if that is not a choice or exceeds the budget.
        sensitivities: measured sensitivities of the groups.
    """

    choices: list[Choice]
    average: float
    chosen: list[Choice]
    divergence: float
    bound: float
    uniform: float | None
    sensitivities: list[Sensitivity]

    def applied_to(self, plan: Plan) -> Plan:
        """``plan`` with the chosen value of every layer, and a note."""
        chosen = zip(self.sensitivities, self.chosen, strict=True)
        choices = {layer: choice for one, choice in chosen for layer in one.layers}
        return replace(plan.with_choices(choices), notes=[*plan.notes, _sentence(self, plan.target.spec is not None)])


def spend_budget(
    model: LazyModel, plan: Plan, rows: TokenRows, dtype: torch.dtype, journal: Journal, progress: Progress
) -> SpentBudget:
    """Choose a value for every layer of ``plan`` (docs/methods.md "budgets"; ours).

    The sum of divergences neglects interactions between groups. Bits are measured with round-to-nearest on ranges
    weighted by the inputs' second moments, shares of zeros with Wanda.

    Raises:
        CalibrantError: no choices satisfy the average, or the model's layers cannot be measured.
    """
    budget = plan.recipe.budget
    assert budget is not None
    quantizes = plan.target.spec is not None
    measured = measure_sensitivities(
        model, plan.blocks, plan.leaves, budget.choices, _compress(plan), rows, dtype, journal, progress
    )
    costs, sizes = np.array([one.divergences for one in measured]), np.array([float(one.elements) for one in measured])
    columns = [plan.layers[one.layers[0]].shape[-1] for one in measured]
    values = np.array([[_value(choice, width) for choice in budget.choices] for width in columns])
    nominal = _nominal(plan)
    of_nominal = _mean([_value(nominal, width) for width in columns], sizes)
    average = budget.average if budget.average is not None else of_nominal
    try:
        best = allocate(costs, sizes, values, average, at_most=quantizes)
    except ValueError as error:
        raise CalibrantError(f"recipe {plan.recipe.name}: {error}") from error
    chosen = [budget.choices[index] for index in best.chosen]
    uniform = None
    within = of_nominal <= average if quantizes else of_nominal >= average
    if nominal in budget.choices and within:
        uniform = float(costs[:, budget.choices.index(nominal)].sum())
    reached = _mean([row[index] for row, index in zip(values, best.chosen, strict=True)], sizes)
    return SpentBudget(budget.choices, reached, chosen, best.cost, best.bound, uniform, measured)


def _nominal(plan: Plan) -> Choice:
    """The scheme's own bits, type or share of zeros."""
    weights = plan.recipe.scheme.weights
    return plan.target.nominal if weights is None or weights.gguf is None else weights.gguf.name


def _value(choice: Choice, columns: int) -> float:
    """What ``choice`` costs a layer of ``columns`` inputs: bits, or a share of zeros."""
    return GGUF_TYPES[fitting_type(choice, columns)].bits_per_weight if isinstance(choice, str) else choice


def _mean(values: list[float], sizes: np.ndarray) -> float:
    return float((np.array(values) * sizes).sum() / sizes.sum())


def _compress(plan: Plan) -> Compress:
    spec = plan.target.spec

    def compress(weight: torch.Tensor, sums: torch.Tensor, choice: Choice) -> torch.Tensor:
        if isinstance(choice, str):
            return rtn(weight, gguf_spec(fitting_type(choice, weight.shape[1]), "importance"), sums).weight
        if spec is None:
            return wanda(weight, sums, Sparsity(choice)).weight
        return rtn(weight, replace(spec, bits=int(choice), range_search="importance"), sums).weight

    return compress


def _sentence(spent: SpentBudget, quantizes: bool) -> str:
    counts = Counter(spent.chosen)
    named = {choice: choice if isinstance(choice, str) else f"{choice:g}" for choice in spent.choices}
    what = ", ".join(f"{counts[choice]} at {name}" for choice, name in named.items() if counts[choice])
    of_types = any(isinstance(choice, str) for choice in spent.choices)
    unit, measure = ("types", " bits") if of_types else ("bits" if quantizes else "zeros", "")
    said = f"budget: {unit} of groups of layers: {what}; {spent.average:.3g}{measure} on average; sum of divergences "
    said += f"{spent.divergence:.4f}, the least possible {spent.bound:.4f}"
    return said if spent.uniform is None else f"{said}, uniformly {spent.uniform:.4f}"
