"""Block reconstruction: what a solved block still holds as floating-point numbers learns the original block's outputs.

After the layers of a block are solved, the kept weights of the pruned ones and the scales of the quantized ones are
trained together on the block's output, as blocks are in BRECQ (arXiv 2102.05426); zeros and codes stay. The block reads
what the compressed blocks before it give, and its target is what the original block gives in the original model. Ours:
the error of each token is relative to its target, so that a few tokens with very large states do not decide; a step
takes a few rows. One step in eight is held out, and the values with the least error there are kept.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from calibrant.engine.block_solver import BlockSolver
from calibrant.formats.quantized import Codes
from calibrant.modeling.inputs import MicroBatch
from calibrant.modeling.learned_values import changed_scale, kept_weight, numbers_and_scale, scaled_weight
from calibrant.modeling.module_call import ModuleCall
from calibrant.modeling.structure import BlockStructure, Linear
from calibrant.modeling.trainable_block import TrainableBlock, trainable
from calibrant.quantization.grids import GridSpec
from calibrant.ranks import Ranks
from calibrant.recipes.parts import Reconstruction

# Of so many parts one is held out, that of most counted tokens.
_HELD_OUT = 8
# Changes of scales learn at this share of the rate that weights have relative to their size (ours).
_SCALE_RATE = 0.3
# Steps until the full learning rate, and Adam's averages, short since a block may have a few dozen steps in all (ours).
_WARM_UP, _BETAS = 3, (0.9, 0.95)
# Gradients of single weights of a wide layer are far below Adam's default.
_EPSILON = 1e-15


class _Learned(Protocol):
    """What is trained of a linear: ``tensor``, at ``rate`` times the schedule."""

    linear: Linear
    tensor: torch.Tensor
    rate: float

    def weight(self) -> torch.Tensor:
        """The linear's parameter as it would be stored now; gradients go straight through the rounding."""

    def keep(self, solver: BlockSolver) -> None:
        """Put what was learned where the solver has put its result."""


class _Scales:
    """Scales of a quantized linear, as factors ``1 + tensor`` of those that it was solved with."""

    def __init__(self, linear: Linear, codes: Codes, spec: GridSpec, like: torch.Tensor, rate: float) -> None:
        self.linear, self.rate, self._codes, self._spec = linear, rate * _SCALE_RATE, codes, spec
        self._numbers, self._scale = (one.to(like.device) for one in numbers_and_scale(codes))
        self._dtype = like.dtype
        self.tensor = torch.zeros_like(self._scale, dtype=torch.float32).requires_grad_(True)

    def weight(self) -> torch.Tensor:
        found = scaled_weight(self._numbers, self._stored(), self._dtype)
        return found.T if self.linear.transposed else found

    def keep(self, solver: BlockSolver) -> None:
        scale = self._stored().detach()
        name, stored = self.linear.name, self._codes.scale
        solver.codes[name] = replace(self._codes, scale=scale.to(stored.device, stored.dtype))
        _put(solver, self.linear, (self._numbers * scale[..., None]).flatten(1))

    def _stored(self) -> torch.Tensor:
        """Scales as they are stored, float32 ``[rows, groups]``."""
        return changed_scale(self._scale, self.tensor, self._spec)


class _KeptWeights:
    """The weights of a pruned linear that are not zero."""

    def __init__(self, linear: Linear, like: torch.Tensor, rate: float) -> None:
        self.linear, self._dtype = linear, like.dtype
        weight = like.detach().clone().float()
        self.rate = rate * float(weight.square().mean().sqrt())
        self._kept = weight != 0
        self.tensor = weight.requires_grad_(True)

    def weight(self) -> torch.Tensor:
        return kept_weight(self.tensor, self._kept, self._dtype)

    def keep(self, solver: BlockSolver) -> None:
        _put(solver, self.linear, self.linear.view(self.weight().detach()))


def reconstruct(
    solver: BlockSolver, structure: BlockStructure, originals: Sequence[torch.Tensor], options: Reconstruction
) -> float:
    """Train the solved block and put the result where the solver has put its own.

    ``originals`` are the original model's hidden states behind the block, per batch. Returns the error on held-out
    rows relative to the error before, 1 if training did not lower it. A set of a single step is both trained and
    measured on.
    """
    block = solver.block
    linears = list(structure.linears())
    dtype = block.probe.hidden.dtype
    with trainable(block.module, linears, block.state) as student:
        learned = list(_learned(solver, linears, options.learning_rate))
        if not learned:
            return 1.0
        parts = _parts(student, block.index, block.batches, options.step_tokens, dtype)
        fit = _Fit(student, block.index, block.batches, originals, parts, learned, dtype, solver.ranks)
        share = fit.learn(options.epochs)
    if share < 1:
        with torch.no_grad():
            for one in learned:
                one.keep(solver)
    return share


def _learned(solver: BlockSolver, linears: list[Linear], rate: float) -> Iterator[_Learned]:
    """What is trained of each linear."""
    for linear in linears:
        target = solver.plan.target_of(f"{solver.block.name}.{linear.name}")
        stored = solver.block.state[linear.parameter]
        if linear.name in solver.codes:
            assert target.spec is not None
            yield _Scales(linear, solver.codes[linear.name], target.spec, stored, rate)
        elif target.sparsity is not None and target.sparsity.share > 0:
            yield _KeptWeights(linear, stored, rate)


def _put(solver: BlockSolver, linear: Linear, weight: torch.Tensor) -> None:
    """Store ``weight`` ``[out, in]`` in the block's state and module."""
    stored = linear.view(solver.block.state[linear.parameter])
    stored.copy_(weight)
    linear.view(solver.block.module.get_parameter(linear.parameter).data).copy_(stored)


@dataclass(frozen=True)
class _Part:
    """What a step runs: ``rows`` of micro-batch ``batch``, with so many counted tokens."""

    batch: int
    rows: slice
    tokens: int


def _computing(like: torch.Tensor, dtype: torch.dtype) -> torch.autocast:
    """Products of the block in the run's ``dtype``."""
    return torch.autocast(like.device.type, dtype, enabled=dtype is not torch.float32)


def _parts(
    student: TrainableBlock, index: int, batches: Sequence[MicroBatch], tokens: int, dtype: torch.dtype
) -> list[_Part]:
    """The rows of each step; whole micro-batches if the block gives other outputs for fewer rows."""
    found: list[_Part] = []
    separable: bool | None = None
    for number, batch in enumerate(batches):
        rows, length = batch.mask.shape
        together = max(1, tokens // length)
        if separable is None and together < rows:
            with torch.no_grad(), _computing(batch.hidden, dtype):
                separable = len(student.call(index, batch).shortened(together).mask) < rows
        together = rows if separable is False else together
        for begin in range(0, rows, together):
            chosen = slice(begin, begin + together)
            found.append(_Part(number, chosen, int(batch.mask[chosen].sum())))
    return found


class _Fit:
    """The training of one block."""

    def __init__(
        self,
        student: TrainableBlock,
        index: int,
        batches: Sequence[MicroBatch],
        originals: Sequence[torch.Tensor],
        parts: list[_Part],
        learned: list[_Learned],
        dtype: torch.dtype,
        ranks: Ranks,
    ) -> None:
        self._student, self._index, self._batches, self._originals = student, index, batches, originals
        self._learned, self._dtype, self._ranks = learned, dtype, ranks
        runs = (parts[begin : begin + _HELD_OUT] for begin in range(0, len(parts), _HELD_OUT))
        self._held = [max(run, key=lambda part: part.tokens) for run in runs]
        self._rest = [part for part in parts if part not in self._held] or parts

    def learn(self, epochs: int) -> float:
        """Train, and leave the best values in the trained tensors; returns their held-out error over the first."""
        groups = [{"params": [one.tensor], "lr": one.rate, "rate": one.rate} for one in self._learned]
        optimizer = torch.optim.Adam(groups, betas=_BETAS, eps=_EPSILON)
        generator = torch.Generator().manual_seed(self._index)
        first = best = self._held_out_error()
        kept = self._values()
        each = max(self._ranks.collect(len(self._rest)))  # a rank of fewer parts runs some twice
        typical = max(self._ranks.collect(max(part.tokens for part in self._rest)))
        step, steps = 0, epochs * each
        for _ in range(epochs):
            order = torch.randperm(len(self._rest), generator=generator).tolist()
            for place in range(each):
                factor = min(1.0, (step + 1) / _WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))
                for group in optimizer.param_groups:
                    group["lr"] = group["rate"] * factor
                optimizer.zero_grad()
                part = self._rest[order[place % len(order)]]
                (self._error(part) * part.tokens / typical).backward()
                self._share_gradients()
                optimizer.step()
                step += 1
            error = self._held_out_error()
            if error < best:
                best, kept = error, self._values()
        with torch.no_grad():
            for one, value in zip(self._learned, kept, strict=True):
                one.tensor.copy_(value)
        return best / first if first > 0 else 1.0

    def _values(self) -> list[torch.Tensor]:
        return [one.tensor.detach().clone() for one in self._learned]

    def _share_gradients(self) -> None:
        """Average the gradients of all ranks."""
        for one in () if self._ranks.alone else self._learned:
            assert one.tensor.grad is not None
            self._ranks.add_up(one.tensor.grad)
            one.tensor.grad /= self._ranks.size

    @torch.no_grad()
    def _held_out_error(self) -> float:
        own = sum(float(self._error(part)) * part.tokens for part in self._held)
        found = self._ranks.collect((own, sum(part.tokens for part in self._held)))
        return sum(error for error, _ in found) / sum(tokens for _, tokens in found)

    def _error(self, part: _Part) -> torch.Tensor:
        """Mean over a part's counted tokens of the squared error relative to the squared target."""
        batch = self._batches[part.batch]
        # Copied: autograd saves no tensors of inference mode.
        target = self._originals[part.batch][part.rows].clone()[batch.mask[part.rows]].float()
        call = self._student.call(self._index, batch).part(part.rows)
        weights = {one.linear.parameter: one.weight() for one in self._learned}
        run = self._student.changed(weights, lambda _, inputs: inputs)
        with _computing(target, self._dtype):
            output = ModuleCall(run, call.args, call.kwargs, call.mask).output()
        each = (output - target).square().sum(-1) / target.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
        return each.mean()
