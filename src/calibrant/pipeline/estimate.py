"""Seconds, memory and disk of a run, estimated before any weight is read."""

import time
from dataclasses import dataclass

import torch

from calibrant.methods.registry import METHODS
from calibrant.modeling.checkpoint import ModelFolder
from calibrant.modeling.hub import model_path
from calibrant.modeling.lazy_model import LazyModel
from calibrant.quantization.statistics import Hessian, PairedHessian
from calibrant.recipes.parts import WATCHED_TOKENS, Awq, Quadapter, Training, Zsaq
from calibrant.recipes.plan import Plan

# Ranges that a search by output error compares.
_CLIP_CANDIDATES = 10


@dataclass(frozen=True)
class Estimate:
    """What a run will take: seconds of work, bytes of memory at the peak, bytes on disk while it runs."""

    seconds: float
    memory_bytes: int
    disk_bytes: int


def estimate(model: LazyModel, plan: Plan, samples: int, length: int, dtype: torch.dtype) -> Estimate:
    """Estimate a run from FLOPs and a short measurement of this machine's matrix products.

    The factor over the floor and the fixed part are measured ones for this engine on a CPU (ours; they are rough).
    """
    tokens = samples * length if plan.recipe.needs_data else 0
    parameters = sum(out * into for out, into in plan.linears.values()) + sum(
        torch.Size(shape).numel() for shape in plan.fused.values()
    )
    widths = {into for _, into in plan.linears.values()} | {
        width for shape in plan.fused.values() for width in shape[1:]
    }
    groups = 4 * len(plan.blocks)
    hessian = 0.0
    if plan.recipe.statistic in (Hessian, PairedHessian):
        per_block = sum(sorted(widths)[:1]) ** 2 * 3 + max(widths) ** 2
        hessian = per_block * len(plan.blocks) * float(tokens)
    flops = 2.0 * parameters * tokens + hessian
    seconds = 1.5 * flops / measured_rate(dtype, model.device) + 0.02 * groups + 5
    seconds += _solving_flops(plan, parameters) / measured_rate(dtype, model.device)
    for transform in plan.recipe.transforms:
        if isinstance(transform, Quadapter):
            # Three times a forward pass a step; one row in eight is looked at every 25 steps.
            passes = transform.steps * (3 + samples / (8 * 25))
            seconds += 1.5 * 2.0 * parameters * length * passes / measured_rate(torch.float32, model.device)
            seconds += 0.02 * transform.steps * len(plan.blocks)
    hidden = _hidden_width(model)
    if plan.recipe.training is not None:
        whole = parameters + hidden * model.folder.vocabulary
        # Products of a few hundred rows, and the head in float32, are further from the best rate.
        generator = _generator_parameters(model, plan.recipe.training)
        seconds += 2.5 * _training_flops(plan.recipe.training, whole, generator) / measured_rate(dtype, model.device)
    element = torch.empty(0, dtype=dtype).element_size()
    block = max(1, parameters // len(plan.blocks))
    widest = max(widths, default=hidden)
    memory = 600 * 2**20 + tokens * element * (3 * hidden + 2 * widest) + block * 16 + 3 * 4 * widest**2
    if any(isinstance(transform, Quadapter) for transform in plan.recipe.transforms):
        # Float32 inputs and targets of a block; its weights, rounded and on the way there, with their gradients.
        memory += 2 * 4 * tokens * hidden + 10 * 4 * block
    if plan.recipe.training is not None:
        # Teacher, weights, rounded weights, their gradients, two moments, the best so far; a generator with its own.
        options = plan.recipe.training
        generator = _generator_parameters(model, options)
        rows = max(options.batch_size, WATCHED_TOKENS // options.length)
        rows = min(rows, options.micro_batch(options.length, model.folder.vocabulary))
        logits = rows * options.length * model.folder.vocabulary
        memory += 4 * (8 * (parameters + hidden * model.folder.vocabulary) + 5 * generator + 6 * logits)
    disk = 2 * sum(_info_bytes(info.dtype, info.shape) for info in model.folder.tensors.values())
    if plan.recipe.training is not None:
        # The journal, and the one before it: weights, moments, the best so far; a generator's.
        disk += 2 * 4 * (4 * parameters + 3 * _generator_parameters(model, plan.recipe.training))
    return Estimate(seconds, memory, disk)


def _solving_flops(plan: Plan, parameters: int) -> float:
    """Work of solves and searches, as products at the best rate that take as long (measured on SmolLM2-135M; ours)."""
    recipe, work = plan.recipe, 0.0
    pairs = sum(out * into**2 for out, into in plan.linears.values()) + sum(
        torch.Size(shape).numel() * max(shape[1:]) for shape in plan.fused.values()
    )
    # Loops over columns reach about a tenth of that rate.
    work += 10 * 2.0 * pairs * METHODS[recipe.method.name].passes(recipe.method)
    weights = recipe.scheme.weights
    if weights is not None and weights.range_search == "clip":
        work += 30 * 2.0 * _CLIP_CANDIDATES * (plan.spec.group_size or 512 if plan.spec is not None else 0) * parameters
    for transform in recipe.transforms:
        if isinstance(transform, Awq):
            work += transform.steps * 3 * 2.0 * 1024 * parameters
    return work


def _generator_parameters(model: LazyModel, options: Training) -> int:
    if not isinstance(options, Zsaq) or options.inputs == "random":
        return 0
    folder = model.folder if options.generator is None else ModelFolder(model_path(options.generator))
    return sum(torch.Size(info.shape).numel() for info in folder.tensors.values())


def _training_flops(options: Training, parameters: int, generator: int) -> float:
    """A backward pass is two forward ones; student and teacher run twice where steps look around."""
    times = 2 if options.sam_rho else 1
    passes = (3 + options.gradient_checkpointing) * times + (1 if isinstance(options, Zsaq) else times)
    generator_passes = 1
    if isinstance(options, Zsaq) and options.generator_learning_rate:
        # Its own step goes through student and teacher and back to what they read.
        passes, generator_passes = passes + 4, 4
    looks = 2 * (1 + options.steps / options.eval_steps) * WATCHED_TOKENS
    work = passes * parameters + generator_passes * generator
    return 2.0 * (options.batch_size * options.length * options.steps * work + looks * parameters)


def _hidden_width(model: LazyModel) -> int:
    """Width of the hidden states."""
    return int(model.folder.config.get_text_config().hidden_size)


def _info_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a stored tensor."""
    width = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2}.get(dtype, 1)
    return width * torch.Size(shape).numel()


def measured_rate(dtype: torch.dtype, device: torch.device, size: int = 1536, repeats: int = 3) -> float:
    """FLOPs a second of ``[size, size]`` matrix products in ``dtype`` on this machine: the best of ``repeats``."""
    left, right = torch.ones(size, size, dtype=dtype, device=device), torch.ones(size, size, dtype=dtype, device=device)
    best = 0.0
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        torch.nn.functional.linear(left, right)[0, 0].item()
        best = max(best, 2.0 * size**3 / (time.perf_counter() - begin))
    return best
