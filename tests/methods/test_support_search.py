"""The search of zeros after SparseGPT: exact counts, errors that never rise, nothing left to gain by one move."""

import itertools

import pytest
import torch

from calibrant.kernels.support_descent import pattern_sweep, threshold_sweep
from calibrant.methods.solvers.result import layer_errors
from calibrant.methods.solvers.sparsegpt import SparseGpt, sparsegpt
from calibrant.methods.solvers.sparsity import Sparsity
from calibrant.recipes.recipe import Recipe
from tests import references

PATTERNS = [Sparsity.n_of_m(2, 4), Sparsity.n_of_m(1, 4), Sparsity.n_of_m(1, 2), Sparsity.n_of_m(4, 8)]


def damped(hessian: torch.Tensor) -> torch.Tensor:
    return hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))


def error(weight: torch.Tensor, solved: torch.Tensor, hessian: torch.Tensor) -> float:
    return float(layer_errors(weight.double(), solved.double(), damped(hessian).double()).sum())


@pytest.mark.parametrize("sparsity", PATTERNS, ids=str)
def test_patterns_stay_exact_and_no_sweep_raises_the_error(sparsity: Sparsity) -> None:
    weight, hessian = references.problem(40, 96)
    before = error(weight, sparsegpt(weight, hessian, sparsity).weight, hessian)
    for sweeps in range(1, 5):
        solved = sparsegpt(weight, hessian, sparsity, refine_sweeps=sweeps)
        assert ((solved.weight == 0).view(40, -1, sparsity.of).sum(-1) == sparsity.pruned).all()
        now = error(weight, solved.weight, hessian)
        assert now <= before * (1 + 1e-6)
        before = now


def test_a_converged_pattern_cannot_be_bettered_in_any_group() -> None:
    weight, hessian = references.problem(8, 16)
    solved = sparsegpt(weight, hessian, Sparsity.n_of_m(2, 4), refine_sweeps=100).weight.double()
    curvature, target = damped(hessian).double(), weight.double()
    for row, begin in itertools.product(range(8), range(0, 16, 4)):
        mine = float((target[row] - solved[row]) @ curvature @ (target[row] - solved[row]))
        for pair in itertools.combinations(range(begin, begin + 4), 2):
            other = solved[row].clone()
            other[begin : begin + 4] = 0
            places = list(pair)
            missing = curvature[places] @ (target[row] - other)
            other[places] = torch.linalg.solve(curvature[places][:, places], missing)
            theirs = float((target[row] - other) @ curvature @ (target[row] - other))
            assert theirs >= mine * (1 - 1e-5)


@pytest.mark.parametrize("segments", [(), (10, 30)])
def test_a_share_is_exact_in_every_matrix_and_has_less_error(segments: tuple[int, ...]) -> None:
    weight, hessian = references.problem(40, 200)
    plain = sparsegpt(weight, hessian, Sparsity(0.6), segments=segments)
    solved = sparsegpt(weight, hessian, Sparsity(0.6), segments=segments, refine_sweeps=5)
    for matrix in solved.kept.split(list(segments or (40,))):
        assert int((~matrix).sum()) == int(0.6 * matrix.numel())
    assert (solved.weight[~solved.kept] == 0).all()
    assert error(weight, solved.weight, hessian) < 0.9 * error(weight, plain.weight, hessian)


def test_zeros_are_spread_over_rows_by_effect() -> None:
    """After few sweeps more weights are zero than the share asks for; which become others must not go by place."""
    mixing = torch.randn(128, 96, generator=torch.Generator().manual_seed(3))
    weight, _ = references.problem(64, 96)
    hessian = mixing.T @ mixing
    for sweeps in (1, 2, 10):
        solved = sparsegpt(weight, hessian, Sparsity(0.6), refine_sweeps=sweeps)
        assert int(solved.kept.sum(1).max()) < 70
        assert error(weight, solved.weight, hessian) < error(
            weight, sparsegpt(weight, hessian, Sparsity(0.6)).weight, hessian
        )


def test_kept_weights_are_near_their_optimum() -> None:
    weight, hessian = references.problem(12, 40)
    solved = sparsegpt(weight, hessian, Sparsity(0.5), refine_sweeps=30)
    curvature = damped(hessian).double()
    for row, kept in enumerate(solved.kept):
        best = torch.linalg.solve(curvature[kept][:, kept], (curvature @ weight[row].double())[kept])
        exact = torch.zeros(40, dtype=torch.float64)
        exact[kept] = best
        assert error(weight[row : row + 1], solved.weight[row : row + 1], hessian) <= 1.05 * error(
            weight[row : row + 1], exact[None], hessian
        )


@pytest.mark.parametrize("columns", [8, 40, 44])
def test_twins_agree(columns: int) -> None:
    weight, hessian = references.problem(50, columns)
    start = sparsegpt(weight, hessian, Sparsity.n_of_m(2, 4)).weight
    both = [pattern_sweep(weight, start, damped(hessian), 2, 4, compiled) for compiled in (True, False)]
    torch.testing.assert_close(*both, rtol=1e-3, atol=1e-4)
    least = torch.where(start != 0, -1.0, torch.inf)
    both = [threshold_sweep(weight, start, damped(hessian), least, compiled) for compiled in (True, False)]
    torch.testing.assert_close(*both, rtol=1e-3, atol=1e-4)
    assert ((both[0] == 0) == (start == 0)).all()


def test_columns_without_input_are_pruned_first() -> None:
    weight, hessian = references.problem(20, 64)
    hessian[:, ::4] = 0
    hessian[::4] = 0
    for sparsity in (Sparsity.n_of_m(2, 4), Sparsity(0.5)):
        solved = sparsegpt(weight, hessian, sparsity, refine_sweeps=3).weight
        assert (solved[:, ::4] == 0).all()
        assert solved.isfinite().all()


@pytest.mark.parametrize(
    ("scheme", "said"),
    [({"sparsity": "5:16"}, "groups of 2, 4 and 8"), ({"sparsity": "2:4", "weights": {"bits": 4}}, "choose zeros")],
)
def test_what_cannot_be_searched_is_refused(scheme: dict[str, object], said: str) -> None:
    method = SparseGpt(refine_sweeps=2)
    with pytest.raises(ValueError, match=said):
        Recipe(name="x", description="x", method=method, scheme=scheme)
