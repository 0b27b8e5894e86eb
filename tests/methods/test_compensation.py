"""The identity of all column loops: ``Q = W - E U`` with the errors ``E`` of the compensated values."""

import pytest
import torch

from calibrant.methods.solvers.gptq import gptq
from calibrant.methods.solvers.sparsegpt import sparsegpt
from calibrant.methods.solvers.sparsity import Sparsity
from calibrant.methods.solvers.spqr import SpqrSettings, spqr
from calibrant.quantization.grids import GridSpec
from tests import references

COLUMNS, DAMPING = 200, 0.01


def compensated(weight: torch.Tensor, solved: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """The compensated value of each column before it was solved, float64, recovered from the solution."""
    factor = references.inverse_factor(hessian, DAMPING)
    change = weight.double() - solved.double()
    errors = torch.linalg.solve_triangular(factor, change, upper=True, left=False)
    return weight.double() - errors @ factor.triu(1)


def test_gptq_rounds_compensated_values_to_the_nearest() -> None:
    weight, hessian = references.problem(24, COLUMNS)
    spec = GridSpec(4, False, None, torch.float32)
    solved = gptq(weight, hessian, spec, act_order=False)
    values = compensated(weight, solved.weight, hessian)
    inside = (solved.codes > spec.qmin) & (solved.codes < spec.qmax) & ~solved.rounded[:, None]
    assert inside.double().mean() > 0.5
    distance = (values - solved.weight.double()).abs() / solved.grid.scale.double()
    assert float(distance[inside].max()) <= 0.5 + 1e-3


@pytest.mark.parametrize("sparsity", [Sparsity(0.5), Sparsity.n_of_m(2, 4)])
def test_sparsegpt_keeps_compensated_values(sparsity: Sparsity) -> None:
    weight, hessian = references.problem(24, COLUMNS)
    solved = sparsegpt(weight, hessian, sparsity)
    values = compensated(weight, solved.weight, hessian)
    torch.testing.assert_close(values[solved.kept].float(), solved.weight[solved.kept], rtol=1e-4, atol=1e-4)


def test_spqr_keeps_compensated_outliers() -> None:
    weight, hessian = references.problem(24, COLUMNS)
    solved = spqr(weight, hessian, SpqrSettings(bits=3, damping=DAMPING, act_order=False))
    values = compensated(weight, solved.weight, hessian)
    assert 0 < int(solved.outliers.sum()) < solved.outliers.numel() / 4
    torch.testing.assert_close(values[solved.outliers].float(), solved.weight[solved.outliers], rtol=1e-4, atol=1e-4)
