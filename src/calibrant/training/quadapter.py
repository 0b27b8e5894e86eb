"""Quadapter's first phase: channel scales learned block by block (arXiv 2211.16912, section 3).

A norm's gain is multiplied by ``alpha`` and the columns of the linears that read the norm are divided by ``alpha``,
which changes nothing until weights and inputs are rounded. ``alpha = exp(a)`` stays positive. Every block is fitted
independently: its input is the original model's hidden states, and the rounded block's target is the original block's
output. Ours, because the paper's choices are not known to us: training on the folded tensors as they will be stored,
``exp``, the restriction to norms, and the hyperparameters.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch

from calibrant.errors import CalibrantError
from calibrant.journal import Journal
from calibrant.modeling.block_walk import BlockWalk, OpenedBlock
from calibrant.modeling.foldable import FoldablePair, find_foldable, held
from calibrant.modeling.lazy_model import LazyModel
from calibrant.modeling.module_call import ModuleCall
from calibrant.modeling.structure import InputGroup, Linear
from calibrant.modeling.token_rows import TokenRows
from calibrant.modeling.trainable_block import TrainableBlock, trainable
from calibrant.progress import Progress
from calibrant.quantization.activation_ranges import ACTIVATION_BITS
from calibrant.quantization.grids import GridSpec
from calibrant.recipes.parts import Quadapter
from calibrant.recipes.plan import Plan
from calibrant.stopping import check_stop
from calibrant.training.fake_quantization import fake_quantize_tensor, fake_quantize_tokens, fake_quantize_weight
from calibrant.training.scaled_model import PlacedPair

# One row in ``_HELD_OUT`` is held out and evaluated every ``_EVAL_STEPS`` steps (ours).
_HELD_OUT = 8
_EVAL_STEPS = 25
_NAME = "scales"


@torch.inference_mode()
def learn_scales(
    model: LazyModel,
    plan: Plan,
    options: Quadapter,
    rows: TokenRows,
    dtype: torch.dtype,
    journal: Journal,
    progress: Progress,
) -> tuple[Plan, list[PlacedPair]]:
    """Learn scales for every foldable pair of a norm and linears; return the plan with them, and the pairs.

    Blocks found in ``journal`` are not learned again.

    Raises:
        CalibrantError: values are not finite, or a linear's input does not have one row per token.
    """
    walk = BlockWalk(model, plan.blocks, rows, dtype)
    known = journal.read(_NAME) or {"blocks": 0, "scales": {}}
    scales: dict[str, torch.Tensor] = {name: scale.to(model.device) for name, scale in known["scales"].items()}
    if known["blocks"]:
        progress.note(f"learning continues after block {known['blocks']}, from {journal.folder}")
    places: list[PlacedPair] = []
    for block in walk.visit("learning scales", progress):
        pairs = [pair for pair in find_foldable(block) if pair.producer.norm is not None]
        stored = {name: value.dtype for name, value in block.state.items()}
        placed = [PlacedPair(block.name, pair, stored) for pair in pairs]
        if block.index >= known["blocks"]:
            found = _learn_block(block, pairs, stored, plan, options)
            scales |= {place.name: scale for place, scale in zip(placed, found, strict=True)}
            journal.write(_NAME, {"blocks": block.index + 1, "scales": scales})
            check_stop(f"the scales of block {block.index + 1}")
        for batch in block.batches:
            batch.advance(block.run(batch))
            if not bool(torch.isfinite(batch.hidden).all()):
                raise CalibrantError(f"{block.name}: its output contains values that are not finite; check the model")
        places += placed
    return replace(plan, learned=replace(plan.learned, scales=scales)), places


def _learn_block(
    block: OpenedBlock, pairs: list[FoldablePair], stored: dict[str, torch.dtype], plan: Plan, options: Quadapter
) -> list[torch.Tensor]:
    groups = [stage for stage in block.structure.stages if isinstance(stage, InputGroup)]
    linears = [linear for group in groups for linear in group.linears]
    with trainable(block.module, linears, block.state) as student:
        calls = student.calls(block.index, list(block.batches))
        return ScaleFit(student, block.name, pairs, stored, plan).learn(calls, options)


class ScaleFit:
    """Fits the channel scales of one block."""

    def __init__(
        self,
        student: TrainableBlock,
        prefix: str,
        pairs: list[FoldablePair],
        stored: dict[str, torch.dtype],
        plan: Plan,
    ) -> None:
        self._student, self._prefix, self._pairs, self._stored, self._plan = student, prefix, pairs, stored, plan
        self._pair_of = {linear: number for number, pair in enumerate(pairs) for linear in pair.group.linears}
        # Per channel rather than per tensor: the range of the scaled tensor follows from the scaled channel bounds.
        self._low: dict[Linear, torch.Tensor] = {}
        self._high: dict[Linear, torch.Tensor] = {}
        # Weights that no scale affects are rounded only once.
        unscaled = [linear for linear in student.linears if linear not in self._pair_of]
        self._fixed = {linear.parameter: self._rounded(linear, student.tensors) for linear in unscaled}

    def learn(self, calls: list[ModuleCall], options: Quadapter) -> list[torch.Tensor]:
        """Column multipliers ``1 / alpha`` ``[in]`` for each pair, from the step with the least held-out loss."""
        if not self._pairs:
            return []
        targets = [self._target(call) for call in calls]
        held = calls[::_HELD_OUT], targets[::_HELD_OUT]
        rest = [number for number in range(len(calls)) if number % _HELD_OUT] or list(range(len(calls)))
        sizes = [pair.group.linears[0].in_features for pair in self._pairs]
        logs = [torch.zeros(size, device=calls[0].mask.device, requires_grad=True) for size in sizes]
        optimizer = torch.optim.Adam(logs, lr=options.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
        best, kept = self._held_out_loss(logs, *held), [log.detach().clone() for log in logs]
        for step in range(options.steps):
            number = rest[step % len(rest)]
            optimizer.zero_grad()
            self.loss(logs, calls[number], targets[number]).backward()
            optimizer.step()
            schedule.step()
            if (step + 1) % _EVAL_STEPS == 0 or step + 1 == options.steps:
                loss = self._held_out_loss(logs, *held)
                if loss < best:
                    best, kept = loss, [log.detach().clone() for log in logs]
        return [torch.exp(-log) for log in kept]

    @torch.no_grad()
    def _target(self, call: ModuleCall) -> torch.Tensor:
        """Output of the original block; also records the ranges of its linears' inputs over counted tokens."""

        def note(linear: Linear, inputs: torch.Tensor) -> torch.Tensor:
            if inputs.shape[:-1].numel() != call.mask.numel():
                raise CalibrantError(
                    f"{self._prefix}.{linear.name}: is given other rows than the tokens, which quadapter cannot follow"
                )
            rows = inputs.reshape(*call.mask.shape, -1)[call.mask]
            low, high = rows.amin(0), rows.amax(0)
            self._low[linear] = torch.minimum(self._low.get(linear, low), low)
            self._high[linear] = torch.maximum(self._high.get(linear, high), high)
            return inputs

        with self._student.watched(note):
            return call.output()

    @torch.no_grad()
    def _held_out_loss(self, logs: list[torch.Tensor], calls: list[ModuleCall], targets: list[torch.Tensor]) -> float:
        losses = [float(self.loss(logs, call, target)) for call, target in zip(calls, targets, strict=True)]
        return sum(losses) / len(losses)

    def loss(self, logs: list[torch.Tensor], call: ModuleCall, target: torch.Tensor) -> torch.Tensor:
        """Squared error of the rounded block's output relative to the squared norm of ``target``."""
        tensors, scales = dict(self._fixed), []
        for pair, log in zip(self._pairs, logs, strict=True):
            scale, folded = pair.folded(self._student.tensors, torch.exp(-log), self._stored)
            tensors |= dict(folded)
            scales.append(scale)
        tensors |= {linear.parameter: self._rounded(linear, tensors) for linear in self._pair_of}
        change = self._student.changed(tensors, lambda linear, inputs: self._rounded_input(linear, inputs, scales))
        rounded = ModuleCall(change, call.args, call.kwargs, call.mask).output()
        return (rounded - target).square().sum() / target.square().sum()

    def _rounded(self, linear: Linear, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The linear's parameter with the values that will be stored."""
        weight, spec = linear.view(tensors[linear.parameter]), self._spec(linear)
        if spec is not None:
            weight = held(fake_quantize_weight(weight, spec), self._plan.target.value_dtype)
        return weight.T if linear.transposed else weight

    def _rounded_input(self, linear: Linear, inputs: torch.Tensor, scales: list[torch.Tensor]) -> torch.Tensor:
        pair, low, high = self._pair_of.get(linear), self._low[linear], self._high[linear]
        if pair is not None:
            low, high = low / scales[pair], high / scales[pair]
        spec, activations = self._spec(linear), self._plan.recipe.scheme.activations
        if spec is None or activations is None:
            return inputs
        if activations.dynamic:
            return fake_quantize_tokens(inputs)
        return fake_quantize_tensor(
            inputs, low.amin(), high.amax(), GridSpec(ACTIVATION_BITS, False, None, spec.scale_dtype)
        )

    def _spec(self, linear: Linear) -> GridSpec | None:
        """The grid of the linear's weights; None if the recipe ignores the linear."""
        name = f"{self._prefix}.{linear.name}"
        return None if self._plan.leaves(name) else self._plan.target_of(name).spec
