"""Block reconstruction: what a solved block still holds as floating-point numbers learns the original block's outputs.

After the layers of a block are solved, the kept weights of the pruned ones and the scales of the quantized ones are
trained together on the block's output, as blocks are in BRECQ (arXiv 2102.05426); zeros and codes stay. The block reads
what the compressed blocks before it give, and its target is what the original block gives in the original model. Ours:
the error of each token is relative to its target, so that a few tokens with very large states do not decide; a step is
one micro-batch; every eighth micro-batch is held out, and the values with the least error there are kept.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from calibrant.engine.block_solver import BlockSolver
from calibrant.modeling.inputs import MicroBatch
from calibrant.modeling.module_call import ModuleCall
from calibrant.modeling.structure import BlockStructure, Linear
from calibrant.modeling.trainable_block import TrainableBlock, trainable
from calibrant.quantization.grids import GridSpec, stored_scale
from calibrant.ranks import Ranks
from calibrant.recipes.parts import Reconstruction

# One micro-batch in ``_HELD_OUT`` is held out.
_HELD_OUT = 8
# Steps until the full learning rate, and Adam's averages: a block has a few dozen steps in all (ours).
_WARM_UP, _BETAS = 3, (0.9, 0.95)
# Factors of scales learn at this share of the rate that weights have relative to their size (ours).
_SCALE_RATE = 0.1


@dataclass(frozen=True)
class _Learned:
    """One trained tensor of a linear; ``weight`` gives the linear's parameter as it is now."""

    linear: Linear
    tensor: torch.Tensor
    rate: float
    weight: Callable[[], torch.Tensor]


def reconstruct(
    solver: BlockSolver, structure: BlockStructure, originals: Sequence[torch.Tensor], options: Reconstruction
) -> float:
    """Train the solved block and put the result where the solver has put its own.

    ``originals`` are the original model's hidden states behind the block, per batch. Returns the error on held-out
    micro-batches (with a single one, on that) relative to the error before; 1 if training did not lower it.
    """
    block = solver.block
    linears = list(structure.linears())
    dtype = block.probe.hidden.dtype
    with trainable(block.module, linears, block.state) as student:
        learned = list(_learned(solver, student, options.learning_rate))
        if not learned:
            return 1.0
        fit = _Fit(student, block.index, block.batches, originals, learned, dtype, solver.ranks)
        share = fit.learn(options.epochs)
    if share < 1:
        for one in learned:
            _put_back(solver, one)
    return share


def _learned(solver: BlockSolver, student: TrainableBlock, rate: float) -> Iterator[_Learned]:
    """What is trained of each linear."""
    for linear in student.linears:
        target = solver.plan.target_of(f"{solver.block.name}.{linear.name}")
        weight = student.tensors[linear.parameter]
        if linear.name in solver.codes:
            shape = solver.codes[linear.name].scale.shape
            factors = weight.new_zeros(*shape, 1).requires_grad_(True)
            yield _Learned(linear, factors, rate * _SCALE_RATE, _scaled(linear, weight, factors))
        elif target.sparsity is not None:
            size = float(weight.square().mean().sqrt())
            values = weight.clone().requires_grad_(True)
            yield _Learned(linear, values, rate * size, _masked(values, weight != 0))


def _scaled(linear: Linear, weight: torch.Tensor, factors: torch.Tensor) -> Callable[[], torch.Tensor]:
    """The weight with its scales times ``1 + factors`` ``[rows, groups, 1]``."""
    rows = linear.view(weight)
    groups = rows.reshape(*factors.shape[:2], -1)

    def scaled() -> torch.Tensor:
        found = (groups * (1 + factors)).reshape(rows.shape)
        return found.T if linear.transposed else found

    return scaled


def _masked(values: torch.Tensor, kept: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: values * kept


class _Fit:
    """The training of one block."""

    def __init__(
        self,
        student: TrainableBlock,
        index: int,
        batches: Sequence[MicroBatch],
        originals: Sequence[torch.Tensor],
        learned: list[_Learned],
        dtype: torch.dtype,
        ranks: Ranks,
    ) -> None:
        self._student, self._index, self._batches, self._originals = student, index, batches, originals
        self._learned, self._dtype, self._ranks = learned, dtype, ranks
        numbers = list(range(len(batches)))
        self._held = numbers[::_HELD_OUT]
        self._rest = [number for number in numbers if number % _HELD_OUT] or numbers

    def learn(self, epochs: int) -> float:
        """Train, and leave the best values in the trained tensors; returns their held-out error over the first."""
        groups = [{"params": [one.tensor], "lr": one.rate, "rate": one.rate} for one in self._learned]
        optimizer = torch.optim.Adam(groups, betas=_BETAS)
        generator = torch.Generator().manual_seed(self._index)
        first = best = self._held_out_error()
        kept = self._values()
        each = max(self._ranks.collect(len(self._rest)))  # a rank of fewer batches runs some twice
        step, steps = 0, epochs * each
        for _ in range(epochs):
            order = torch.randperm(len(self._rest), generator=generator).tolist()
            for place in range(each):
                factor = min(1.0, (step + 1) / _WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))
                for group in optimizer.param_groups:
                    group["lr"] = group["rate"] * factor
                optimizer.zero_grad()
                self._error(self._rest[order[place % len(order)]]).backward()
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
        own = sum(float(self._error(number)) for number in self._held) / len(self._held)
        found = self._ranks.collect(own)
        return sum(found) / len(found)

    def _error(self, number: int) -> torch.Tensor:
        """Mean over a micro-batch's counted tokens of the squared error relative to the squared target."""
        batch = self._batches[number]
        # Copied: autograd saves no tensors of inference mode.
        target = self._originals[number].clone()[batch.mask].float()
        call = self._student.call(self._index, batch)
        weights = {one.linear.parameter: one.weight() for one in self._learned}
        run = self._student.changed(weights, lambda _, inputs: inputs)
        with torch.autocast(target.device.type, self._dtype, enabled=self._dtype is not torch.float32):
            output = ModuleCall(run, call.args, call.kwargs, call.mask).output()
        each = (output - target).square().sum(-1) / target.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
        return each.mean()


@torch.no_grad()
def _put_back(solver: BlockSolver, one: _Learned) -> None:
    """Store what was learned, in the block's state, its module and its codes."""
    linear, block = one.linear, solver.block
    stored = linear.view(block.state[linear.parameter])
    if linear.name in solver.codes:
        codes = solver.codes[linear.name]
        spec = solver.plan.target_of(f"{block.name}.{linear.name}").spec
        assert spec is not None
        scale = _learned_scale(codes.scale, one.tensor, spec)
        solver.codes[linear.name] = replace(codes, scale=scale.to(codes.scale.dtype))
        groups = codes.codes.reshape(*scale.shape, -1).float() - codes.zero_point[..., None].float()
        stored.copy_((groups * scale[..., None]).reshape(codes.codes.shape))
    else:
        stored.copy_(linear.view(one.weight()))
    linear.view(block.module.get_parameter(linear.parameter).data).copy_(stored)


def _learned_scale(scale: torch.Tensor, factors: torch.Tensor, spec: GridSpec) -> torch.Tensor:
    """Scales as they are stored, float32 ``[rows, groups]``; a sign never changes."""
    before = scale.float()
    changed = before * (1 + factors[..., 0].cpu()).clamp(min=0.1)
    return stored_scale(changed, spec)
