import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibrant.kernels.column_loop import BLOCK_SIZE
from calibrant.methods.solvers.gptq import gptq
from calibrant.methods.solvers.magnitude import magnitude
from calibrant.methods.solvers.sparsegpt import sparsegpt
from calibrant.methods.solvers.sparsity import Sparsity
from calibrant.methods.solvers.wanda import wanda
from calibrant.quantization.grids import GridSpec, decode
from tests import references

TWO_OF_FOUR = Sparsity.n_of_m(2, 4)
PATTERNS = [TWO_OF_FOUR, Sparsity.n_of_m(1, 4), Sparsity.n_of_m(4, 8), Sparsity.n_of_m(3, 6), Sparsity.n_of_m(5, 16)]


def zeros_by_group(kept: torch.Tensor, of: int) -> torch.Tensor:
    return (~kept).view(kept.shape[0], -1, of).sum(-1)


@pytest.mark.parametrize("sparsity", [*PATTERNS, Sparsity(0.5), Sparsity(0.3)], ids=str)
def test_sparsegpt_equals_the_float64_reference(sparsity: Sparsity) -> None:
    columns = 2 * BLOCK_SIZE + 32
    weight, hessian = references.problem(40, columns)
    solved = sparsegpt(weight, hessian, sparsity)
    factor = references.inverse_factor(hessian, 0.01)
    pattern = (sparsity.pruned, sparsity.of) if sparsity.semi_structured else None
    blocks = None if sparsity.semi_structured else (BLOCK_SIZE, sparsity.share)
    expected = references.column_loop(weight, factor, lambda _, values: values, pattern, blocks)
    assert torch.equal(solved.kept, expected != 0)
    torch.testing.assert_close(solved.weight.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sparsity", PATTERNS, ids=str)
def test_patterns_have_exactly_as_many_zeros_in_every_group(sparsity: Sparsity) -> None:
    weight, hessian = references.problem(40, 96)
    for solved in (
        sparsegpt(weight, hessian, sparsity),
        wanda(weight, hessian.diagonal(), sparsity),
        magnitude(weight, sparsity),
    ):
        assert (zeros_by_group(solved.kept, sparsity.of) == sparsity.pruned).all()
        assert (solved.weight[~solved.kept] == 0).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 40), st.floats(0.01, 0.99), st.integers(0, 99))
def test_shares_are_exact(rows: int, columns: int, share: float, seed: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    expected = int(share * columns + 1e-9)
    assert ((~wanda(weight, torch.ones(columns), Sparsity(share)).kept).sum(1) == expected).all()
    assert (~magnitude(weight, Sparsity(share)).kept).sum() == int(share * rows * columns + 1e-9)


def test_wanda_equals_its_definition_and_keeps_weights_bit_for_bit() -> None:
    weight, hessian = references.problem(40, 96)
    diagonal = hessian.diagonal()
    for sparsity in (TWO_OF_FOUR, Sparsity(0.5)):
        width = sparsity.of or 96
        scores = (weight.double().abs() * diagonal.double().sqrt()).view(-1, width)
        dropped = sparsity.pruned or 48
        expected = torch.ones_like(scores, dtype=torch.bool)
        expected.scatter_(1, torch.argsort(scores, dim=1, stable=True)[:, :dropped], False)
        solved = wanda(weight, diagonal, sparsity)
        assert torch.equal(solved.kept, expected.view(40, 96))
        assert torch.equal(solved.weight[solved.kept], weight[solved.kept])


def test_wanda_with_equal_norms_is_magnitude_by_row() -> None:
    weight, _ = references.problem(40, 96)
    expected = torch.cat([magnitude(row[None], Sparsity(0.5)).kept for row in weight])
    assert torch.equal(wanda(weight, torch.full((96,), 7.0), Sparsity(0.5)).kept, expected)


def test_sparsegpt_with_uncorrelated_inputs_is_magnitude_by_block() -> None:
    columns = 2 * BLOCK_SIZE + 32
    weight, _ = references.problem(40, columns)
    solved = sparsegpt(weight, 5.0 * torch.eye(columns), Sparsity(0.5))
    expected = torch.cat([magnitude(block, Sparsity(0.5)).weight for block in weight.split(BLOCK_SIZE, dim=1)], dim=1)
    assert torch.equal(solved.weight, expected)


def test_stacked_matrices_are_pruned_as_if_alone() -> None:
    weight, hessian = references.problem(40, BLOCK_SIZE + 32)
    weight[:10] *= 100  # a global threshold would spare these rows
    stacked = sparsegpt(weight, hessian, Sparsity(0.5), segments=(10, 30))
    alone = [sparsegpt(part, hessian, Sparsity(0.5)).weight for part in weight.split([10, 30])]
    assert torch.equal(stacked.weight, torch.cat(alone))


def test_joint_pruning_and_quantization() -> None:
    weight, hessian = references.problem(40, 96)
    spec = GridSpec(4, False, 16, torch.float32)
    solved = sparsegpt(weight, hessian, TWO_OF_FOUR, spec)
    assert (solved.weight[~solved.kept] == 0).all()
    assert (zeros_by_group(solved.kept, 4) == 2).all()
    assert torch.equal(decode(solved.codes, solved.grid), solved.weight)


def test_joint_with_nothing_pruned_is_gptq() -> None:
    weight, hessian = references.problem(40, 96)
    spec = GridSpec(4, True, 16, torch.float32)
    joint = sparsegpt(weight, hessian, Sparsity(0.0), spec)
    solved = gptq(weight, hessian, spec, act_order=False)
    same = ~solved.rounded
    assert torch.equal(joint.codes[same], solved.codes[same])


def test_sparsegpt_falls_back_to_magnitude_and_says_so() -> None:
    weight, hessian = references.problem(40, 96)
    solved = sparsegpt(weight, hessian - 2 * hessian.diagonal().max() * torch.eye(96), TWO_OF_FOUR)
    assert solved.record.fallback is not None
    assert torch.equal(solved.weight, magnitude(weight, TWO_OF_FOUR).weight)
