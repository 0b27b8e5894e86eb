"""AdpQ, HQQ and SpQR, whose results fit no quantized format."""

import pytest
import torch

from calibrant.methods.solvers.adpq import adpq
from calibrant.methods.solvers.gptq import gptq
from calibrant.methods.solvers.hqq import hqq
from calibrant.methods.solvers.result import layer_errors
from calibrant.methods.solvers.rtn import rtn
from calibrant.methods.solvers.spqr import SpqrSettings, spqr
from calibrant.quantization.grids import GridSpec
from tests import references


@pytest.mark.parametrize("share", [0.06, 0.3])
def test_adpq_equals_its_definition(share: float) -> None:
    weight, _ = references.problem(12, 64)
    solved = adpq(weight, GridSpec(4, True, 16, torch.float32), share=share, segments=(8, 4))
    wanted = 0
    for rows in (slice(0, 8), slice(8, 12)):
        count = round(share * weight[rows].numel())
        bound = weight[rows].abs().flatten().sort(descending=True).values[count - 1]
        wanted += count
        for row in range(rows.start, rows.stop):
            for begin in range(0, 64, 16):
                group = weight[row, begin : begin + 16].double()
                for chosen in (group.abs() >= bound, group.abs() < bound):
                    if chosen.any():
                        scale = (group[chosen].abs().max() / 7).float().double()
                        expected = (group[chosen] / scale).round().clamp(-8, 7) * scale
                        found = solved.weight[row, begin : begin + 16][chosen].double()
                        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert solved.record.outliers == wanted


def test_outliers_on_their_own_grid_leave_the_others_finer() -> None:
    weight, _ = references.problem(12, 64)
    weight[:, ::16] *= 20
    spec = GridSpec(4, True, 16, torch.float32)
    others = torch.arange(64) % 16 != 0
    error, plain = (
        (solved.weight - weight)[:, others].square().sum()
        for solved in (adpq(weight, spec, share=1 / 16), rtn(weight, spec))
    )
    assert error < 0.1 * plain


def hqq_reference(group: torch.Tensor, bits: int) -> tuple[torch.Tensor, float, float]:
    """The released iteration on one group in float64 with unsigned codes: best values, first error, best error."""
    inverse = (2**bits - 1) / (group.max() - group.min())
    zero_point, beta, best, errors = -group.min() * inverse, 10.0, None, []
    for _ in range(20):
        codes = (group * inverse + zero_point).round().clamp(0, 2**bits - 1)
        values = (codes - zero_point) / inverse
        error = group - values
        errors.append(float(error.abs().mean()))
        if best is None or errors[-1] < float((group - best).abs().mean()):
            best = values
        shrunk = error.sign() * (error.abs() - error.abs().clamp(min=1e-12) ** -0.3 / beta).clamp(min=0)
        zero_point = (codes - (group - shrunk) * inverse).mean()
        beta *= 1.01
    assert best is not None
    return best, errors[0], min(errors)


def test_hqq_equals_its_definition_and_never_ends_worse_than_it_began() -> None:
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(1)) ** 3
    solved = hqq(weight, GridSpec(3, False, 16, torch.float32)).weight
    close = better = 0
    for row in range(8):
        for begin in (0, 16):
            group, found = weight[row, begin : begin + 16].double(), solved[row, begin : begin + 16].double()
            _, first, least = hqq_reference(group, 3)
            error = float((group - found).abs().mean())
            assert error <= first * (1 + 1e-5)
            close += abs(error - least) < 1e-3 * least
            better += error < first * 0.999
    assert close >= 15
    assert better >= 8


PLAIN = SpqrSettings(
    bits=4, group_size=None, threshold=float("inf"), statistic_bits=None, damping=0.01, integer_zero=True
)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("columns", [64, 200])
def test_spqr_without_outliers_is_gptq(act_order: bool, columns: int) -> None:
    weight, hessian = references.problem(40, columns)
    expected = gptq(weight, hessian, GridSpec(4, False, None, torch.float32), act_order=act_order)
    solved = spqr(weight, hessian, SpqrSettings(**{**vars(PLAIN), "act_order": act_order}))
    same = (solved.weight - expected.weight).abs().amax(1) < 1e-4
    assert (same | expected.rounded).double().mean() >= 0.9


def spqr_reference(
    weight: torch.Tensor, hessian: torch.Tensor, width: int, threshold: float, second: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Column by column in float64, in the order given; outliers are found one by one."""
    factor = references.inverse_factor(hessian, 0.01)
    work, diagonal = weight.double().clone(), factor.diagonal()
    bound = threshold * float((work.var(0) / diagonal.square()).mean())
    exact = torch.zeros_like(work, dtype=torch.bool)

    def fitted(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale = (values.max() - values.min()) / 15
        return scale, -values.min() / scale

    def rounded(values: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
        return ((values / scale + zero_point).round().clamp(0, 15) - zero_point) * scale

    def coarse(values: list[torch.Tensor]) -> list[torch.Tensor]:
        """Rounded to second-level grids, one per 16 rows."""
        if second is None:
            return values
        found = []
        for begin in range(0, len(values), 16):
            run = values[begin : begin + 16]
            step = (max(run) - min(run)) / (2**second - 1)
            found += [((value - min(run)) / step).round() * step + min(run) for value in run]
        return found

    grids: list[tuple[torch.Tensor, torch.Tensor]] = []
    for column in range(work.shape[1]):
        if column % width == 0:
            grids = []
            for row in range(len(work)):
                group, weights = work[row, column : column + width].clone(), diagonal[column : column + width]
                whole = ((group - rounded(group, *fitted(group))) / weights).square().sum()
                likely = []
                for left in range(width):
                    rest = [i for i in range(width) if i != left]
                    cost = ((group[rest] - rounded(group[rest], *fitted(group[rest]))) / weights[rest]).square().sum()
                    likely.append(bool(whole - cost > bound))
                chosen = torch.tensor(likely)
                if chosen.any():
                    group[chosen] = group[~chosen].mean()
                grids.append(fitted(group))
            grids = list(zip(*(coarse(list(one)) for one in zip(*grids, strict=True)), strict=True))
        for row in range(len(work)):
            value = work[row, column].clone()
            near = rounded(value, *grids[row])
            exact[row, column] = ((value - near) / diagonal[column]).square() > bound
            work[row, column] = value if exact[row, column] else near
            work[row, column + 1 :] -= (value - work[row, column]) / diagonal[column] * factor[column, column + 1 :]
    return work, exact


@pytest.mark.parametrize("second", [None, 3])
# Groups of 48 columns do not end where blocks of 128 do.
@pytest.mark.parametrize(("columns", "width"), [(32, 16), (160, 16), (192, 48)])
@pytest.mark.parametrize("act_order", [False, True])
def test_spqr_equals_the_float64_reference(columns: int, width: int, second: int | None, act_order: bool) -> None:
    weight, hessian = references.problem(32, columns)
    weight[2, 5], weight[7, 20] = 12.0, -9.0
    settings = SpqrSettings(4, width, 0.05, statistic_bits=second, damping=0.01, act_order=act_order)
    solved = spqr(weight, hessian, settings)
    order = torch.arange(columns)
    if act_order:
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    expected, exact = spqr_reference(weight[:, order], hessian[order][:, order], width, 0.05, second)
    assert solved.outliers is not None
    near = (solved.weight[:, order] - expected).abs() < 1e-3
    # A value halfway between two codes may round to either, which moves the later values of its row.
    assert near.double().mean() >= 0.85
    assert (solved.outliers[:, order] == exact).double().mean() >= 0.97
    assert int(solved.outliers.sum()) == solved.record.outliers > 0


def test_spqr_treats_stacked_matrices_as_if_alone() -> None:
    """With a common threshold, a matrix with weights a tenth as large would have no outliers."""
    weight, hessian = references.problem(40, 64)
    weight[24:] *= 0.1
    settings = SpqrSettings(bits=3)
    stacked = spqr(weight, hessian, settings, (24, 16))
    alone = [spqr(part, hessian, settings) for part in weight.split([24, 16])]
    torch.testing.assert_close(stacked.weight, torch.cat([one.weight for one in alone]))
    assert torch.equal(stacked.outliers, torch.cat([one.outliers for one in alone]))
    assert stacked.outliers[24:].any()


def test_spqr_keeps_more_as_its_threshold_falls_and_errs_less() -> None:
    weight, hessian = references.problem(40, 64)
    settings = [SpqrSettings(3, 16, threshold, damping=0.01) for threshold in (1e9, 0.3, 0.05)]
    solved = [spqr(weight, hessian, one) for one in settings]
    counts = [one.record.outliers for one in solved]
    assert counts[0] == 0 < counts[1] < counts[2] < weight.numel()
    errors = [layer_errors(weight, one.weight, hessian).sum() for one in solved]
    assert errors[0] > errors[1] > errors[2]


def test_spqr_quantizes_its_statistics() -> None:
    """Sixteen rows share eight possible scales, so without outliers few step sizes are left."""
    weight, hessian = references.problem(16, 16)
    exact, coarse = (
        spqr(weight, hessian, SpqrSettings(4, 16, 1e9, statistic_bits=bits, damping=0.01)).weight for bits in (None, 3)
    )

    def steps(values: torch.Tensor) -> int:
        found = set()
        for row in values:
            gaps = row.double().unique().diff()
            found.add(round(float(gaps[gaps > 1e-5].min()), 4))
        return len(found)

    assert steps(coarse) <= 8 < steps(exact)
