"""Estimates the time, memory and disk space of a run before any weight is read.

What can be counted is counted: bytes of the output, multiplications of forward passes. What depends on the machine is
measured in a second or two: the rate of matrix products, hashing and copying, and the recipe's own solver and statistic
on a small layer. The factors that remain were fitted to runs on a CPU (benchmarks/estimates.py).
"""

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from calibrant.engine.block_solver import relative_error
from calibrant.formats.gguf_types import GGUF_TYPES
from calibrant.formats.safetensors_file import element_bytes
from calibrant.formats.shards import SHARD_BYTES
from calibrant.hashing import sha256_bytes
from calibrant.kernels.row_tiles import CHUNK_BYTES
from calibrant.methods.method import LayerProblem, LayerSolver
from calibrant.methods.solvers.rtn import RTN
from calibrant.methods.training import HELD_OUT_TOKENS, TrainingOptions, Zsaq
from calibrant.modeling.checkpoint import ModelFolder
from calibrant.modeling.entry import MICRO_BATCH_TOKENS
from calibrant.modeling.hub import model_path
from calibrant.modeling.lazy_model import LazyModel
from calibrant.pipeline import writing_cost
from calibrant.pipeline.memory import resident_memory
from calibrant.quantization.statistics import Hessian, HessianDiagonal
from calibrant.recipes.parts import Awq, Quadapter
from calibrant.recipes.plan import LayerPlan, Plan
from calibrant.training.distillation import distillation_options

# Sizes of the layer that the solver is measured on; wider ones are scaled.
_FEW_ROWS, _MANY_ROWS, _MOST_COLUMNS, _TOKENS = 32, 288, 2048, 2048
# A Llama block has seven linears and four different inputs, and layers that share an input are solved together.
_INPUTS_PER_LINEAR = 4 / 7
# What compiled kernels and their compiler add to the process.
_KERNEL_BYTES = 80 * 2**20
# Hidden widths and inner widths of a token that a Llama block's four suspensions write and read together.
_SUSPENDED = 9, 1
# Seconds of a distillation's products beside what the measured rate gives: attention, norms, logits.
_DISTILLING = 1.8
# How far a run may be from the estimate, either way: the load and clock of the machine, disks slower than memory.
_SPREAD = 1.35


@dataclass(frozen=True)
class Estimate:
    """Estimated cost of a run: seconds, peak memory, the output's size, and peak disk space while it runs, in bytes.

    ``writing_seconds``: what the model takes to write a calibration set first, which ``seconds`` leaves out.
    ``on_disk``: memory is too small for the hidden states of all rows, so they are kept in files.
    """

    seconds: float
    memory_bytes: int
    output_bytes: int
    disk_bytes: int
    on_disk: bool = False
    writing_seconds: float = 0.0

    @property
    def seconds_range(self) -> tuple[float, float]:
        """The least and the most seconds to expect, the writing of a calibration set included."""
        least, most = self.writing_range
        return self.seconds / _SPREAD + least, self.seconds * _SPREAD + most

    @property
    def writing_range(self) -> tuple[float, float]:
        """The least and the most seconds to expect for the writing of a calibration set."""
        return self.writing_seconds / writing_cost.SPREAD, self.writing_seconds * writing_cost.SPREAD


@dataclass(frozen=True)
class MemoryNeed:
    """Peak memory of a run in bytes, without trainings, and whether it keeps hidden states on the disk for that.

    ``distillation`` is the peak of the distillation alone, 0 without one.
    """

    bytes: int
    on_disk: bool
    distillation: int = 0


def estimate(model: LazyModel, plan: Plan, samples: int, length: int, dtype: torch.dtype, memory: int) -> Estimate:
    """Estimate a run on ``samples`` rows of ``length`` tokens; ``dtype`` is that of its forward passes.

    ``memory`` is what the run may use, in bytes.
    """
    size = _Size(model, plan, samples, length, dtype, memory)
    parts = [size.blocks()]
    if plan.recipe.quadapter is not None:
        parts.append(size.quadapter(plan.recipe.quadapter))
    if plan.recipe.training is not None:
        parts.append(size.training(plan.recipe.training))
    parts.append(size.distillation())
    return Estimate(
        sum(part.seconds for part in parts),
        sum(part.memory_bytes for part in parts),
        sum(part.output_bytes for part in parts),
        sum(part.disk_bytes for part in parts),
        size.on_disk,
    )


def memory_needed(
    model: LazyModel, plan: Plan, samples: int, length: int, dtype: torch.dtype, memory: int
) -> MemoryNeed:
    """What a run that may use ``memory`` bytes needs, for which nothing is measured."""
    size = _Size(model, plan, samples, length, dtype, memory)
    return MemoryNeed(size.memory_bytes(size.on_disk), size.on_disk, size.distillation_bytes())


def disk_bytes(
    model: LazyModel, plan: Plan, samples: int, length: int, dtype: torch.dtype, memory: int
) -> tuple[int, int]:
    """Bytes of the output, and peak disk space while it is made, for which nothing is measured."""
    size = _Size(model, plan, samples, length, dtype, memory)
    training = plan.recipe.training
    journal = size.journal_bytes(training) if training is not None else size.distillation_journal_bytes()
    return size.output_bytes(), size.disk_bytes() + journal


class _Size:
    """Sizes shared by the parts of an estimate; one method per part."""

    def __init__(
        self, model: LazyModel, plan: Plan, samples: int, length: int, dtype: torch.dtype, memory: int
    ) -> None:
        self._model, self._plan, self._dtype = model, plan, dtype
        self._samples, self._length = samples, length
        self._tokens = samples * length if plan.recipe.needs_data else 0
        self._parameters = sum(torch.Size(layer.shape).numel() for layer in plan.layers.values())
        self._widths = {into for _, into in plan.linears.values()}
        self._widths |= {width for shape in plan.fused.values() for width in shape[1:]}
        self._block = max(1, self._parameters // len(plan.blocks))
        self._hidden = int(model.folder.config.get_text_config().hidden_size)
        self._rate = cache(lambda dtype: measured_rate(dtype, model.device))
        self._stored = _stored_bytes(model.folder, list(model.folder.tensors))
        self._copy_seconds = cache(copy_seconds)
        # Trainings hold whole models, and 2SSP a row per candidate: neither walks with states in files.
        walks = plan.recipe.gathers and not plan.recipe.changes_shape
        self.on_disk = walks and self.memory_bytes(on_disk=False) > memory

    def blocks(self) -> Estimate:
        """Forward passes, statistics, searches and solves of all blocks, and the output files."""
        output = self.output_bytes()
        seconds = self._forward_seconds() + self._solving_seconds() + self._file_seconds(self._stored, output)
        # Opening and probing a block, and what a run does once.
        seconds += 0.05 * len(self._plan.blocks) + 2
        return Estimate(seconds, self.memory_bytes(self.on_disk), output, self.disk_bytes())

    def _forward_seconds(self) -> float:
        """Forward passes of the blocks, and of AWQ's searches."""
        recipe = self._plan.recipe
        # A transform's pass is the last one unless solving needs statistics of the transformed block.
        passes = float(recipe.solves_with_data)
        passes += sum(not isinstance(transform, Quadapter) for transform in recipe.transforms)
        passes = max(passes, 1.0)
        if recipe.reconstruction is not None:  # a step costs three passes; then the block runs once more
            passes += 3.5 * recipe.reconstruction.epochs + 1
        work = 1.5 * 2.0 * self._parameters * self._tokens * passes
        # Norms, rotations, softmax and gates write this many numbers per token beside the products' results.
        numbers = 12 * self._hidden + 6 * max(self._widths, default=self._hidden)
        touched = numbers * torch.empty(0, dtype=self._dtype).element_size() * self._tokens * len(self._plan.blocks)
        for transform in recipe.transforms:
            if isinstance(transform, Awq):
                work += transform.steps * 3 * 2.0 * 1024 * self._parameters
        if not work:
            return 0.0
        moved = 2 * self._suspended_bytes(*_SUSPENDED) * len(self._plan.blocks) if self.on_disk else 0
        return work / self._rate(self._dtype) + (passes * touched + moved) * self._copy_seconds()

    def _suspended_bytes(self, hidden: int, inner: int) -> int:
        """Bytes of so many hidden and inner widths of all tokens, and of the original model's beside them."""
        models = 2 if self._plan.recipe.beside_original else 1
        widths = hidden * self._hidden + inner * max(self._widths, default=self._hidden)
        return models * self._tokens * torch.empty(0, dtype=self._dtype).element_size() * widths

    def _solving_seconds(self) -> float:
        """Statistics and solves, from the measured time of a small layer of each width."""
        recipe, seconds = self._plan.recipe, 0.0
        kind = recipe.kind if isinstance(recipe.kind, LayerSolver) else RTN
        options = recipe.method if kind is not RTN else None
        rows: Counter[int] = Counter()
        inputs: Counter[int] = Counter()
        examples: dict[int, LayerPlan] = {}
        for layer in self._plan.layers.values():
            *experts, out, into = layer.shape
            count = torch.Size(experts).numel()
            rows[into] += count * out
            inputs[into] += count
            examples[into] = layer
        for into, layer in examples.items():
            small = min(into, _MOST_COLUMNS)
            if layer.target.spec is not None and layer.target.spec.group_size is not None:
                small -= small % layer.target.spec.group_size
            measured = _Measured(kind, options, layer, small, recipe.statistic, self._dtype, self._model.device)
            wider = into / small
            pairs = 1 if measured.per_token == 0 or recipe.statistic is HessianDiagonal else wider
            groups = inputs[into] * _INPUTS_PER_LINEAR
            seconds += measured.per_input * groups * wider * pairs**2 + measured.per_row * rows[into] * wider * pairs
            seconds += measured.per_token * groups * self._tokens * wider * pairs
        return seconds

    def _file_seconds(self, stored: int, output: int) -> float:
        """Reading, hashing, writing, joining and verifying."""
        codes = self._parameters if self._plan.target.layout is not None else 0
        hashed = stored + 2 * output + 2 * codes
        return hashed * hash_seconds() + (3 * stored + 8 * output + 4 * codes) * self._copy_seconds()

    def output_bytes(self) -> int:
        """Bytes of the output's files of weights."""
        element = torch.empty(0, dtype=self._model.folder.dtype).element_size()
        kept = self._stored - self._parameters * element
        layers = list(self._plan.layers.values())
        if self._plan.head is not None:
            layers.append(self._plan.head.layer)
            kept -= element * math.prod(self._plan.head.layer.shape)
        return max(0, kept) + sum(_layer_bytes(layer, element) for layer in layers)

    def disk_bytes(self) -> int:
        """Most bytes on the disk: the output, its parts unless they are its shards, and the states of the journal."""
        output, state = self.output_bytes(), self._suspended_bytes(1, 0)
        # Beside two states, the outputs of a block and what is suspended before its last solve.
        states = 3 * state + self._suspended_bytes(1, 1) if self.on_disk else 2 * state
        # A distillation replaces shards, which the journal has as parts, by changed copies.
        copied = output <= SHARD_BYTES or self._plan.recipe.distillation is not None
        return output * (2 if copied else 1) + states

    def memory_bytes(self, on_disk: bool) -> int:
        """The process, and what the largest phase adds: embedding, a block, or writing the largest tensor outside."""
        recipe = self._plan.recipe
        element = torch.empty(0, dtype=self._dtype).element_size()
        source = torch.empty(0, dtype=self._model.folder.dtype).element_size()
        folder, widest = self._model.folder, max(self._widths, default=self._hidden)
        outside = self._model.names_outside(self._plan.blocks)
        models = 2 if recipe.beside_original else 1
        hidden = 0 if on_disk else models * self._tokens * element * self._hidden
        together = min(self._tokens, max(MICRO_BATCH_TOKENS, self._length)) if on_disk else self._tokens
        inputs = models * together * element * (2 * self._hidden + 2 * widest)
        solve = max((self._solve_bytes(layer) for layer in self._plan.layers.values()), default=0)
        block = self._block * (source + models * element) + max(solve + inputs, self._reconstruction_bytes(together))
        embedding = sum(_stored_bytes(folder, [name]) for name in outside) * (1 + element / source)
        largest = 2 * max((_stored_bytes(folder, [name]) for name in outside), default=0)
        phase = int(max(block, embedding if self._tokens else 0, largest))
        return resident_memory() + _KERNEL_BYTES + hidden + phase

    def _reconstruction_bytes(self, together: int) -> int:
        """What reconstructing a block takes: its weights eleven times, and what a step keeps for gradients."""
        options = self._plan.recipe.reconstruction
        if options is None:
            return 0
        batch = min(self._tokens, max(min(options.step_tokens, MICRO_BATCH_TOKENS), self._length))
        element, widest = torch.empty(0, dtype=self._dtype).element_size(), max(self._widths, default=self._hidden)
        kept = batch * (4 * 4 * self._hidden + element * (12 * self._hidden + 8 * widest))
        return 11 * 4 * self._block + kept + 2 * together * element * self._hidden

    def _solve_bytes(self, layer: LayerPlan) -> int:
        """What solving a layer takes, with another one of its size that shares its input."""
        *experts, out, into = layer.shape
        weights = out * into * (1 if experts else 2)
        statistic = self._plan.recipe.statistic if self._tokens else None
        hessians = 0
        if statistic is not None and issubclass(statistic, Hessian):
            hessians = (5 if self._plan.recipe.drift_correction else 3) * 4 * into**2
        # Weights, solved weights and codes; then copies of the part that is being solved.
        return hessians + 9 * weights + 6 * min(4 * weights, CHUNK_BYTES)

    def quadapter(self, options: Quadapter) -> Estimate:
        """Learning channel scales block by block."""
        # A step costs three forward passes; one row in eight is evaluated every 25 steps.
        passes = options.steps * (3 + self._samples / (8 * 25))
        seconds = 1.5 * 2.0 * self._parameters * self._length * passes / self._rate(torch.float32)
        seconds += 0.02 * options.steps * len(self._plan.blocks)
        # Float32 inputs and targets of a block; its weights, the intermediates of their rounding, and the gradients.
        return Estimate(seconds, 2 * 4 * self._tokens * self._hidden + 10 * 4 * self._block, 0, 0)

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
        return Estimate(seconds, memory, 0, self.journal_bytes(options))

    def distillation(self) -> Estimate:
        """Training scales and kept weights of the whole model; the memory is what it takes beyond the blocks."""
        asked = self._plan.recipe.distillation
        if asked is None:
            return Estimate(0.0, 0, 0, 0)
        options = distillation_options(asked, self._samples, self._length)
        whole = self._parameters + self._hidden * self._model.folder.vocabulary
        seconds = _DISTILLING * options.flops(whole, 0) / self._rate(self._dtype)
        memory = max(0, self.distillation_bytes() - self.memory_bytes(self.on_disk))
        return Estimate(seconds, memory, 0, self.distillation_journal_bytes())

    def distillation_journal_bytes(self) -> int:
        """Two copies of what learns, its moments and its best values so far."""
        if self._plan.recipe.distillation is None:
            return 0
        learned = 0
        for layer in self._plan.layers.values():
            spec, numbers = layer.target.spec, math.prod(layer.shape)
            learned += numbers if spec is None else numbers // (spec.group_size or layer.shape[-1])
        return 2 * 4 * 4 * learned

    def distillation_bytes(self) -> int:
        """The process, model and head, what learns and its gradients, the original's states, and a step's values."""
        asked = self._plan.recipe.distillation
        if asked is None:
            return 0
        options = distillation_options(asked, self._samples, self._length)
        vocabulary = self._model.folder.vocabulary
        every = sum(parameter.numel() for parameter in self._model.module.parameters())
        rows = options.micro_batch(self._length, vocabulary)
        tokens = min(rows, max(options.batch_size, HELD_OUT_TOKENS // self._length)) * self._length
        widths = len(self._plan.blocks) * (14 * self._hidden + 8 * max(self._widths, default=self._hidden))
        # Codes, twice, and the weights they make, with what their gradients need; or kept weights, those that are
        # rounded, gradients, moments and the best ones so far.
        copies = 3 if self._plan.target.spec is not None else 7
        numbers = every - self._parameters + copies * self._parameters + self._tokens * self._hidden
        # The original is only its head, unless that is not enough.
        numbers += self._hidden * vocabulary if self._model.folder.causal else every
        numbers += tokens * (5 * vocabulary + widths)
        return resident_memory() + 4 * numbers

    def journal_bytes(self, options: TrainingOptions) -> int:
        """Two copies of weights, moments and best weights so far, and of weights and moments of a generator."""
        return 2 * 4 * (4 * self._parameters + 3 * self._generator_parameters(options))

    def _generator_parameters(self, options: TrainingOptions) -> int:
        if not isinstance(options, Zsaq) or options.inputs == "random":
            return 0
        folder = self._model.folder if options.generator is None else ModelFolder(model_path(options.generator))
        return sum(torch.Size(info.shape).numel() for info in folder.tensors.values())


class _Measured:
    """Seconds that the recipe's solver and statistic take here: per input, per row of a weight, and per token.

    ``columns`` is the width of the layer that is measured; the first run of each compiles its kernels.
    """

    def __init__(
        self,
        kind: LayerSolver,
        options: Any,
        layer: LayerPlan,
        columns: int,
        statistic: type[Hessian] | type[HessianDiagonal] | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        numbers = torch.Generator().manual_seed(0)
        seen = None
        self.per_token = 0.0
        if statistic is not None:
            seen = statistic(columns, device)
            inputs = torch.randn(_TOKENS, columns, generator=numbers).to(dtype=dtype, device=device)
            self.per_token = best_seconds(lambda: seen.add(inputs)) / _TOKENS
        hessian = diagonal = None
        if isinstance(seen, Hessian):
            hessian = seen.matrix()
            diagonal = hessian.diagonal()
        elif isinstance(seen, HessianDiagonal):
            diagonal = seen.values

        def solve(weight: torch.Tensor) -> None:
            torch.isfinite(weight).all()
            target = layer.target
            problem = LayerProblem(weight, (len(weight),), target.spec, target.sparsity, hessian, diagonal)
            solution = kind.solve(options, problem)
            relative_error(weight, solution.weight, solution.errors, problem)

        few, many = (torch.randn(rows, columns, generator=numbers).to(device) for rows in (_FEW_ROWS, _MANY_ROWS))
        least, most = best_seconds(lambda: solve(few)), best_seconds(lambda: solve(many))
        self.per_row = max(0.0, most - least) / (_MANY_ROWS - _FEW_ROWS)
        self.per_input = max(0.0, least - _FEW_ROWS * self.per_row)


def _layer_bytes(layer: LayerPlan, element: int) -> int:
    """Bytes of a compressed layer in the output; ``element`` is those of a number that is stored dense."""
    layout, parameters = layer.target.layout, torch.Size(layer.shape).numel()
    if layout is None:
        return parameters * element
    groups = parameters // layer.shape[-1] * (layer.shape[-1] // (layout.group_size or layer.shape[-1]))
    if layout.type in ("mxfp4", "nvfp4"):
        return parameters // 2 + groups
    if layout.format == "gguf":
        known = GGUF_TYPES[layout.type]
        return parameters * known.block_bytes // known.block
    zero_points = 0 if layout.symmetric and layout.format == "compressed-tensors" else groups * layout.stored_bits // 8
    scale = 2 if layout.format != "compressed-tensors" else element
    return parameters * layout.stored_bits // 8 + groups * scale + zero_points


def _stored_bytes(folder: ModelFolder, names: list[str]) -> int:
    tensors = [folder.tensors[name] for name in names]
    return sum(element_bytes(info.dtype) * torch.Size(info.shape).numel() for info in tensors)


def best_seconds(work: Callable[[], object], repeats: int = 2) -> float:
    """The least seconds of ``work`` in ``repeats`` runs after a first one."""
    work()
    best = float("inf")
    for _ in range(repeats):
        begin = time.thread_time()
        work()
        best = min(best, time.thread_time() - begin)
    return best


def hash_seconds(size: int = 8 << 20) -> float:
    """Seconds per byte of SHA-256."""
    data = bytes(size)
    return best_seconds(lambda: sha256_bytes(data)) / size


def copy_seconds(size: int = 36 << 20) -> float:
    """Seconds per byte of a copy to memory that the process has not used yet."""
    data = torch.zeros(size, dtype=torch.uint8)
    return best_seconds(data.clone) / size


def measured_rate(dtype: torch.dtype, device: torch.device, size: int = 1536, repeats: int = 3) -> float:
    """FLOPs per second of ``[size, size]`` matrix products in ``dtype`` on ``device``: the best of ``repeats``."""
    left, right = torch.ones(size, size, dtype=dtype, device=device), torch.ones(size, size, dtype=dtype, device=device)
    best = 0.0
    for _ in range(repeats + 1):
        begin = time.thread_time()
        torch.nn.functional.linear(left, right)[0, 0].item()
        best = max(best, 2.0 * size**3 / (time.thread_time() - begin))
    return best
