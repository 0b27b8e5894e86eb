"""Solving the linears of one block when their inputs are complete, and keeping the results until they are written."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch

from calibrant.clock import Clock
from calibrant.engine import shared_solve
from calibrant.engine.block_engine import Unit, Visitor
from calibrant.engine.cache_scales import observed_caches
from calibrant.errors import CalibrantError
from calibrant.formats.quantized import Codes
from calibrant.kernels.grid_rounding import round_to_grid
from calibrant.kernels.number_types import E4M3
from calibrant.kernels.row_tiles import row_chunks
from calibrant.methods.method import LayerProblem, StructuredPruner
from calibrant.methods.solvers.drift_correction import drift_corrected_target
from calibrant.methods.solvers.result import Solution, SolverRecord, layer_errors, squared_outputs
from calibrant.modeling.block_walk import OpenedBlock
from calibrant.modeling.structure import Linear
from calibrant.quantization.activation_ranges import InputGrid, InputRange
from calibrant.quantization.statistics import Hessian, HessianDiagonal, PairedHessian
from calibrant.ranks import ALONE, Ranks
from calibrant.recipes.plan import LearnedLinear, Plan

# Between these bounds a float16 scale has at least six significant bits: subnormal steps are 2^-24 (ours).
_FLOAT16_STEPS = (2.0**-18, 65504.0 / 2)


@dataclass(frozen=True)
class LayerReport:
    """Result of one linear.

    Attributes:
        name: full name of the module.
        relative_error: squared output error over squared output; with drift correction, relative to the corrected
            target, so comparable only with other runs with drift correction.
        measure: basis of the error: the full Hessian ("hessian"), its diagonal ("diagonal") or the weights ("weights").
        tokens: number of counted calibration tokens that reached the linear.
        routed: of an expert's linear that got all tokens, how many of them the router had sent there; else None.
        reconstructed: error of the block's outputs on held-out rows after its reconstruction, relative to before; else
            None. The other errors are those before.
        zeros: number of zero weights, if it was pruned.
        elements: number of weights.
        bits: bits per weight, None if it was not quantized.
        record: the solver's record.
    """

    name: str
    relative_error: float
    measure: str
    tokens: int
    zeros: int
    elements: int
    bits: int | None
    record: SolverRecord
    routed: int | None = None
    reconstructed: float | None = None


@dataclass
class BlockSolver(Visitor):
    """The ``Visitor`` that gathers statistics and solves linears.

    It replaces values in the block's ``state`` in place. Every solved linear adds its entries to ``codes``,
    ``outliers`` (float32 weights and the mask of the outliers among them) and ``layers``. ``cache_scales`` are those of
    keys and values, by name in the block. Each of ``ranks`` adds inputs of its own, and all get the same results.
    """

    block: OpenedBlock
    plan: Plan
    clock: Clock
    ranks: Ranks = ALONE
    codes: dict[str, Codes] = field(default_factory=dict)
    layers: list[LayerReport] = field(default_factory=list)
    outliers: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    solved_parameters: set[str] = field(default_factory=set)
    cache_scales: dict[str, torch.Tensor] = field(default_factory=dict)
    _statistics: dict[Unit, Hessian | HessianDiagonal] = field(default_factory=dict)
    _ranges: dict[Unit, InputRange] = field(default_factory=dict)
    _routed: dict[Unit, int] = field(default_factory=dict)

    def add(self, unit: Unit, inputs: torch.Tensor, originals: torch.Tensor | None = None) -> None:
        kind, activations = self.plan.recipe.statistic, self.plan.recipe.scheme.activations
        with self.clock.stage("statistics"):
            if activations is not None and activations.observed:
                self._ranges.setdefault(unit, InputRange(inputs.device)).add(inputs)
            if kind is None:
                return
            if unit not in self._statistics:
                self._statistics[unit] = kind(unit[0].in_features, inputs.device)
            statistic = self._statistics[unit]
            if isinstance(statistic, PairedHessian) and originals is not None:
                statistic.add_pair(inputs, originals)
            else:
                statistic.add(inputs)

    def solve(self, unit: Unit) -> None:
        with self.clock.stage("solve"):
            if self.plan.learned.weights is not None:
                for linear in unit:
                    self._take(linear, self.plan.learned.weights[f"{self.block.name}.{linear.name}"])
            else:
                self._solve(unit, self._statistic(unit))
            self._add_input_grids(unit)

    def _statistic(self, unit: Unit) -> Hessian | HessianDiagonal | None:
        """The statistic of all ranks' tokens that reached ``unit``; None if there is none."""
        own, kind = self._statistics.pop(unit, None), self.plan.recipe.statistic
        if self.ranks.alone or kind is None:
            return own
        tokens = self._tokens(own)
        if not tokens:
            return None
        own = own or kind(unit[0].in_features, self.block.probe.hidden.device)
        with self.clock.stage("exchange"):
            for tensor in own.sums:
                self.ranks.add_up(tensor)
        own.tokens = tokens
        return own

    def _tokens(self, statistic: Hessian | HessianDiagonal | None) -> int:
        """Tokens of ``statistic`` in all ranks."""
        return sum(self.ranks.collect(statistic.tokens if statistic is not None else 0))

    def starved(self, group: Unit) -> Unit:
        """The experts of ``group`` that are to get all tokens, by the recipe; what they have seen is forgotten."""
        asked = self.plan.recipe.experts
        if asked is None or asked.starved != "all-tokens":
            return ()
        found = []
        for linear in group:
            tokens = self._tokens(self._statistics.get((linear,)))
            if tokens < asked.least_tokens:
                self._statistics.pop((linear,), None)
                self._routed[linear,] = tokens
                found.append(linear)
        return tuple(found)

    @contextmanager
    def observing_caches(self) -> Iterator[None]:
        """Observe keys and values for ``cache_scales`` in the passes that run within, if the recipe quantizes them."""
        asked = self.plan.recipe.scheme.kv_cache
        if asked is None:
            yield
            return
        with observed_caches(self.block, asked.layout, self.ranks) as scales:
            yield
        self.cache_scales = scales

    def _take(self, linear: Linear, trained: LearnedLinear) -> None:
        """Round a trained linear to its learned grid and keep the result."""
        spec = trained.grid.spec
        codes, values = round_to_grid(trained.weight, trained.grid.scale, trained.grid.zero_point, spec.numbers)
        problem = LayerProblem(trained.weight, (len(trained.weight),), spec, None)
        self._keep(linear, trained.weight, Solution(values, codes, trained.grid), slice(None), problem, 0, None)

    def _solve(self, unit: Unit, statistic: Hessian | HessianDiagonal | None) -> None:
        entry = self.plan.recipe.kind
        stored = [linear.view(self.block.state[linear.parameter]) for linear in unit]
        segments = tuple(len(weight) for weight in stored)
        stacked = stored[0].new_empty(sum(segments), stored[0].shape[1], dtype=torch.float32)
        weights = list(stacked.split(segments))
        for linear, weight, values in zip(unit, weights, stored, strict=True):
            weight.copy_(values)
            largest = float(torch.stack(torch.aminmax(weight)).abs().max())
            if not math.isfinite(largest):
                raise CalibrantError(f"{self.block.name}.{linear.name}: its weights contain values that are not finite")
            self._check_scales(linear, largest)
        problem = self._problem(stacked, segments, statistic, unit)
        share = self.plan.recipe.drift_correction
        fallback = None
        if isinstance(statistic, PairedHessian) and problem.hessian is not None:
            target = drift_corrected_target(problem.weight, problem.hessian, statistic.drift, share)
            if target is None:
                fallback = "Hessian not positive definite, the drift of its inputs is not made up for"
            else:
                problem = replace(problem, weight=target)
                weights = list(problem.weight.split(problem.segments))
        assert not isinstance(entry, StructuredPruner)
        if self.plan.recipe.statistic is not None and statistic is None:
            assert entry.without_data is not None
            solution, fallback = entry.without_data(problem), "saw no calibration token, solved without data"
        else:
            solution = shared_solve.solve(entry, self.plan.recipe.method, problem, self.ranks)
        if fallback is not None and solution.record.fallback is None:
            solution = replace(solution, record=replace(solution.record, fallback=fallback))
        begin = 0
        for linear, weight in zip(unit, weights, strict=True):
            rows = slice(begin, begin + len(weight))
            tokens, routed = statistic.tokens if statistic else 0, self._routed.get(unit)
            self._keep(linear, weight, solution, rows, problem, tokens, routed)
            begin += len(weight)

    def _check_scales(self, linear: Linear, largest: float) -> None:
        """Raise CalibrantError if float16 scales of weights up to ``largest`` would overflow or have too few bits."""
        spec = self.plan.target_of(f"{self.block.name}.{linear.name}").spec
        if spec is None or spec.scale_dtype is not torch.float16 or largest == 0:
            return
        step = largest / (spec.qmax - spec.qmin)
        if not _FLOAT16_STEPS[0] <= step <= _FLOAT16_STEPS[1]:
            size = "small" if step < _FLOAT16_STEPS[0] else "large"
            raise CalibrantError(
                f"{self.block.name}.{linear.name}: its weights are too {size} for scales in float16; "
                "ignore it, or take the default `checkpoint_format`"
            )

    def _add_input_grids(self, unit: Unit) -> None:
        inputs = self._input_grid(unit)
        for linear in unit:
            if inputs is not None and linear.name in self.codes:
                # Every layer gets a copy: safetensors refuses tensors that share memory.
                self.codes[linear.name] = replace(
                    self.codes[linear.name],
                    input_scale=inputs.scale.clone(),
                    input_zero_point=inputs.zero_point.clone() if inputs.zero_point is not None else None,
                )

    def _input_grid(self, unit: Unit) -> InputGrid | None:
        """Grid of the unit's inputs, None unless activations are static."""
        if self.plan.learned.input_grids is not None:
            name = f"{self.block.name}.{unit[0].name}"
            if name not in self.plan.learned.input_grids:
                raise self._unseen(unit)
            return self.plan.learned.input_grids[name]
        activations, own = self.plan.recipe.scheme.activations, self._ranges.pop(unit, None)
        if activations is None or not activations.observed or self.plan.target.spec is None:
            return None
        seen = None
        for one in self.ranks.collect(own):
            if seen is None:
                seen = one
            elif one is not None:
                seen.merge(one)
        if seen is None:
            raise self._unseen(unit)
        if not seen.finite:
            raise self._not_finite(unit)
        if activations.type == "nvfp4":
            return seen.global_scale()
        if activations.type == "fp8":
            return seen.symmetric_scale(E4M3, self.plan.target.spec.scale_dtype)
        return seen.grid(activations.range, activations.percentile, self.plan.target.spec.scale_dtype)

    def _problem(
        self, weight: torch.Tensor, segments: tuple[int, ...], statistic: Hessian | HessianDiagonal | None, unit: Unit
    ) -> LayerProblem:
        hessian = diagonal = None
        if isinstance(statistic, Hessian):
            hessian = statistic.matrix()
            diagonal = hessian.diagonal()
        elif isinstance(statistic, HessianDiagonal):
            diagonal = statistic.values
        # The diagonal is enough to find inputs that are not finite: |S_ij|^2 <= S_ii S_jj.
        if diagonal is not None and not bool(torch.isfinite(diagonal).all()):
            raise self._not_finite(unit)
        target = self.plan.target_of(f"{self.block.name}.{unit[0].name}")
        return LayerProblem(weight, segments, target.spec, target.sparsity, hessian, diagonal)

    def _unseen(self, unit: Unit) -> CalibrantError:
        return CalibrantError(
            f"{self.block.name}.{unit[0].name}: no calibration token reached it, so its static range is unknown; "
            "ignore it, or take dynamic activations"
        )

    def _not_finite(self, unit: Unit) -> CalibrantError:
        return CalibrantError(
            f"{self.block.name}.{unit[0].name}: its inputs contain values that are not finite; "
            'compute in float32 (`dtype="float32"`) or check the model'
        )

    def _keep(
        self,
        linear: Linear,
        weight: torch.Tensor,
        solution: Solution,
        rows: slice,
        problem: LayerProblem,
        tokens: int,
        routed: int | None,
    ) -> None:
        solved, name = solution.weight[rows], f"{self.block.name}.{linear.name}"
        spec = self.plan.target_of(name).spec
        error, measure = relative_error(
            weight, solved, solution.errors[rows] if solution.errors is not None else None, problem
        )
        stored = linear.view(self.block.state[linear.parameter])
        stored.copy_(solved)
        self.solved_parameters.add(linear.parameter)
        linear.view(self.block.module.get_parameter(linear.parameter).data).copy_(stored)
        if solution.codes is not None and solution.grid is not None:
            self.codes[linear.name] = Codes(solution.codes[rows].cpu(), **solution.grid.stored(rows))
        zeros = int((solved == 0).sum()) if solution.kept is not None else 0
        record = solution.record
        if solution.rounded is not None:
            record = replace(record, rows_rounded=int(solution.rounded[rows].sum()))
        if solution.outliers is not None:
            self.outliers[linear.name] = solved.cpu(), solution.outliers[rows].cpu()
            record = replace(record, outliers=int(solution.outliers[rows].sum()))
        self.layers.append(
            LayerReport(
                name,
                error,
                measure,
                tokens,
                zeros,
                weight.numel(),
                spec.bits if spec is not None else None,
                record,
                routed,
            )
        )


def relative_error(
    weight: torch.Tensor, solved: torch.Tensor, errors: torch.Tensor | None, problem: LayerProblem
) -> tuple[float, str]:
    """Relative squared error of ``solved`` and what it is based on, as in ``LayerReport``; ``errors`` are known ones.

    Raises:
        CalibrantError: values are too large for float32.
    """
    if problem.hessian is not None:
        known = errors if errors is not None else layer_errors(weight, solved, problem.hessian)
        error = known.double().sum()
        whole, measure = squared_outputs(weight, problem.hessian).double().sum(), "hessian"
    else:
        columns = problem.hessian_diagonal
        error = weight.new_zeros((), dtype=torch.float64)
        whole, measure = error.clone(), "diagonal" if columns is not None else "weights"
        for rows in row_chunks(weight):
            error += _weighted_squares(weight[rows] - solved[rows], columns)
            whole += _weighted_squares(weight[rows], columns)
    relative = float(error / whole) if whole > 0 else 0.0
    if not math.isfinite(relative):
        raise CalibrantError("a layer's weights or inputs are too large for float32; check the model")
    return relative, measure


def _weighted_squares(values: torch.Tensor, columns: torch.Tensor | None) -> torch.Tensor:
    """The sum of ``values ** 2`` ``[rows, n]``, each times its entry of ``columns`` ``[n]``, in float64."""
    squares = values.square()
    return (squares if columns is None else squares @ columns).sum(dtype=torch.float64)
