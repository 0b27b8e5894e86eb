"""Estimates the time, memory and disk space of a run before any weight is read.

The overhead factors and the constant terms were measured for this engine on a CPU (ours; they are rough).
"""

import time
from dataclasses import dataclass
from functools import cache

import torch

from calibrant.methods.training import HELD_OUT_TOKENS, TrainingOptions, Zsaq
from calibrant.modeling.checkpoint import ModelFolder
from calibrant.modeling.hub import model_path
from calibrant.modeling.lazy_model import LazyModel
from calibrant.quantization.statistics import Hessian, PairedHessian
from calibrant.recipes.parts import Awq, Quadapter
from calibrant.recipes.plan import Plan

# Number of ranges that the search by output error (``clip``) compares.
_CLIP_CANDIDATES = 10
_PROCESS_BYTES = 600 * 2**20


@dataclass(frozen=True)
class Estimate:
    """Estimated cost of a run: seconds, peak memory in bytes, disk space in bytes while it runs."""

    seconds: float
    memory_bytes: int
    disk_bytes: int


def estimate(model: LazyModel, plan: Plan, samples: int, length: int, dtype: torch.dtype) -> Estimate:
    """Estimate a run on ``samples`` rows of ``length`` tokens from its FLOPs and this machine's measured FLOP rate."""
    size = _Size(model, plan, samples, length, dtype)
    parts = [size.blocks()]
    if plan.recipe.quadapter is not None:
        parts.append(size.quadapter(plan.recipe.quadapter))
    if plan.recipe.training is not None:
        parts.append(size.training(plan.recipe.training))
    return Estimate(
        sum(part.seconds for part in parts),
        sum(part.memory_bytes for part in parts),
        sum(part.disk_bytes for part in parts),
    )


class _Size:
    """Sizes shared by the parts of an estimate; one method per part."""

    def __init__(self, model: LazyModel, plan: Plan, samples: int, length: int, dtype: torch.dtype) -> None:
        self._model, self._plan, self._dtype = model, plan, dtype
        self._samples, self._length = samples, length
        self._tokens = samples * length if plan.recipe.needs_data else 0
        self._parameters = sum(torch.Size(layer.shape).numel() for layer in plan.layers.values())
        self._widths = {into for _, into in plan.linears.values()}
        self._widths |= {width for shape in plan.fused.values() for width in shape[1:]}
        self._block = max(1, self._parameters // len(plan.blocks))
        self._hidden = int(model.folder.config.get_text_config().hidden_size)
        self._rate = cache(lambda dtype: measured_rate(dtype, model.device))

    def blocks(self) -> Estimate:
        """Forward passes, statistics, searches and solves of all blocks, and the output files."""
        blocks, tokens = len(self._plan.blocks), self._tokens
        hessian = 0.0
        if self._plan.recipe.statistic in (Hessian, PairedHessian):
            hessian = (min(self._widths) ** 2 * 3 + max(self._widths) ** 2) * blocks * float(tokens)
        flops = 1.5 * (2.0 * self._parameters * tokens + hessian) + self._solving_flops()
        seconds = flops / self._rate(self._dtype) + 0.02 * 4 * blocks + 5
        element = torch.empty(0, dtype=self._dtype).element_size()
        widest = max(self._widths, default=self._hidden)
        memory = tokens * element * (3 * self._hidden + 2 * widest) + self._block * 16 + 3 * 4 * widest**2
        stored = sum(_stored_bytes(info.dtype, info.shape) for info in self._model.folder.tensors.values())
        return Estimate(seconds, _PROCESS_BYTES + memory, 2 * stored)

    def _solving_flops(self) -> float:
        """FLOPs of matrix products that take as long as solves and searches (factors measured on SmolLM2-135M)."""
        recipe, spec, work = self._plan.recipe, self._plan.target.spec, 0.0
        pairs = sum(out * into**2 for out, into in self._plan.linears.values())
        pairs += sum(torch.Size(shape).numel() * max(shape[1:]) for shape in self._plan.fused.values())
        # Loops over columns reach about a tenth of the rate of matrix products.
        work += 10 * 2.0 * pairs * recipe.kind.passes(recipe.method)
        if spec is not None and spec.range_search == "clip":
            work += 30 * 2.0 * _CLIP_CANDIDATES * (spec.group_size or 512) * self._parameters
        for transform in recipe.transforms:
            if isinstance(transform, Awq):
                work += transform.steps * 3 * 2.0 * 1024 * self._parameters
        return work

    def quadapter(self, options: Quadapter) -> Estimate:
        """Learning channel scales block by block."""
        # A step costs three forward passes; one row in eight is evaluated every 25 steps.
        passes = options.steps * (3 + self._samples / (8 * 25))
        seconds = 1.5 * 2.0 * self._parameters * self._length * passes / self._rate(torch.float32)
        seconds += 0.02 * options.steps * len(self._plan.blocks)
        # Float32 inputs and targets of a block; its weights, the intermediates of their rounding, and the gradients.
        return Estimate(seconds, 2 * 4 * self._tokens * self._hidden + 10 * 4 * self._block, 0)

    def training(self, options: TrainingOptions) -> Estimate:
        """Training the whole model."""
        vocabulary = self._model.folder.vocabulary
        whole, generator = self._parameters + self._hidden * vocabulary, self._generator_parameters(options)
        # Matrix products of a few hundred rows, and the float32 head, are further below the measured rate.
        seconds = 2.5 * options.flops(whole, generator) / self._rate(self._dtype)
        rows = max(options.batch_size, HELD_OUT_TOKENS // options.length)
        rows = min(rows, options.micro_batch(options.length, vocabulary))
        logits = rows * options.length * vocabulary
        # Teacher, weights, rounded weights, gradients of both, two moments, best weights so far; a generator's weights,
        # gradients and moments.
        memory = 4 * (8 * whole + 5 * generator + 6 * logits)
        # Two copies of the journal: weights, moments and best weights so far; weights and moments of a generator.
        return Estimate(seconds, memory, 2 * 4 * (4 * self._parameters + 3 * generator))

    def _generator_parameters(self, options: TrainingOptions) -> int:
        if not isinstance(options, Zsaq) or options.inputs == "random":
            return 0
        folder = self._model.folder if options.generator is None else ModelFolder(model_path(options.generator))
        return sum(torch.Size(info.shape).numel() for info in folder.tensors.values())


def _stored_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a stored tensor."""
    width = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2}.get(dtype, 1)
    return width * torch.Size(shape).numel()


def measured_rate(dtype: torch.dtype, device: torch.device, size: int = 1536, repeats: int = 3) -> float:
    """FLOPs per second of ``[size, size]`` matrix products in ``dtype`` on ``device``: the best of ``repeats``."""
    left, right = torch.ones(size, size, dtype=dtype, device=device), torch.ones(size, size, dtype=dtype, device=device)
    best = 0.0
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        torch.nn.functional.linear(left, right)[0, 0].item()
        best = max(best, 2.0 * size**3 / (time.perf_counter() - begin))
    return best
