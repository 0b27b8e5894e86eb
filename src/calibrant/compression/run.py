"""One compression, from a model folder to a verified output folder."""

import resource
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

import calibrant
from calibrant.allocator import map_large_blocks, return_freed_memory
from calibrant.calibration.calibration_set import CalibrationSet
from calibrant.clock import Clock
from calibrant.compression.block_engine import OrderDiffersError, sequential_pass, two_passes
from calibrant.compression.block_solver import BlockSolver, LayerReport
from calibrant.compression.plan import Plan
from calibrant.errors import CalibrantError
from calibrant.formats.quantized import Codes, format_for, quantization_config
from calibrant.formats.shards import ShardWriter, copy_side_files
from calibrant.hashing import canonical_json, sha256_bytes
from calibrant.modeling.attention import use_fast_attention
from calibrant.modeling.inputs import BlockCalls, MicroBatch, call_block, record_inputs
from calibrant.modeling.lazy_model import LazyModel, drop
from calibrant.modeling.norms import use_fast_norms
from calibrant.modeling.structure import BlockStructure, probe_block
from calibrant.output_folder import staged
from calibrant.progress import Progress
from calibrant.report.model_card import model_card

_PROBE_TOKENS = 16


@dataclass(frozen=True)
class Settings:
    """How a run computes. ``sequential``: solve inside one suspended pass (else collect, then propagate);
    ``propagate``: feed blocks the outputs of compressed ones; ``micro_batch_tokens``: tokens of one forward.
    """

    dtype: torch.dtype
    device: torch.device
    sequential: bool = True
    propagate: bool = True
    micro_batch_tokens: int = 2048
    overwrite: bool = False

    def describe(self) -> dict[str, Any]:
        """What of this shapes the result."""
        return {
            "compute_dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device.type,
            "sequential": self.sequential and self.propagate,
            "propagate": self.propagate,
            "micro_batch_tokens": self.micro_batch_tokens,
        }


@dataclass(frozen=True)
class RunReport:
    """What a run did and took. ``seconds`` by stage; ``peak_memory_bytes`` of the process so far; sizes in bytes."""

    output: Path
    recipe: str
    layers: list[LayerReport]
    notes: list[str]
    seconds: dict[str, float]
    peak_memory_bytes: int
    bytes_before: int
    bytes_after: int
    tensors_verified: int

    @property
    def fallbacks(self) -> list[LayerReport]:
        """Layers that were not solved as asked."""
        return [layer for layer in self.layers if layer.record.fallback is not None]


def run_compression(
    model: LazyModel,
    plan: Plan,
    calibration: CalibrationSet | None,
    output: Path,
    settings: Settings,
    progress: Progress,
) -> RunReport:
    """Compress ``model`` by ``plan`` into ``output``; nothing appears there unless everything succeeded.

    Raises:
        CalibrantError: the set does not fit the model, values are not finite, or the output cannot be written.
    """
    clock = Clock()
    identity = calibration.sha256 if calibration is not None else "none"
    map_large_blocks()
    with staged(output, settings.overwrite) as folder, torch.inference_mode():
        writer = _Writer(model, plan, ShardWriter(folder, {"format": "pt", "calibrant.set_sha256": identity}))
        notes = list(plan.notes)
        layers = _compress_blocks(model, plan, calibration, settings, writer, clock, notes, progress)
        uncalled = sorted(set(plan.linears) - {layer.name for layer in layers})
        if uncalled:
            notes.append(f"left as they are, since the model does not call them: {', '.join(uncalled)}")
        with clock.stage("write"):
            for name in model.names_outside(plan.blocks):
                writer.write({name: model.folder.read(name)})
            files = writer.shards.finish()
            copy_side_files(model.folder.path, folder)
            _write_config(model, plan, {layer.name for layer in layers}, folder)
            if calibration is not None:
                calibration.save(folder / "calibration")
            record = _record(model, plan, calibration, settings, layers, notes)
            (folder / "calibrant.json").write_text(canonical_json(record), encoding="utf-8")
            (folder / "README.md").write_text(model_card(record), encoding="utf-8")
        with clock.stage("verify"):
            verified = writer.verify(files)
        report = RunReport(
            output,
            plan.recipe.name,
            layers,
            notes,
            {name: round(value, 3) for name, value in clock.seconds.items()},
            _peak_memory(),
            sum({info.file: info.file.stat().st_size for info in model.folder.tensors.values()}.values()),
            sum(file.stat().st_size for file in files),
            verified,
        )
        (folder / "report.json").write_text(canonical_json(report_dict(report)), encoding="utf-8")
    return report


def report_dict(report: RunReport) -> dict[str, Any]:
    """The report as plain values."""
    return {**asdict(report), "output": report.output.name}


def _compress_blocks(
    model: LazyModel,
    plan: Plan,
    calibration: CalibrationSet | None,
    settings: Settings,
    writer: "_Writer",
    clock: Clock,
    notes: list[str],
    progress: Progress,
) -> list[LayerReport]:
    layers: list[LayerReport] = []
    with clock.stage("embed"):
        probe, batches = _enter(model, plan, calibration, settings)
    with progress.task("compressing", len(plan.blocks)) as task:
        for index, prefix in enumerate(plan.blocks):
            solver, outputs = _compress_block(model, plan, index, probe, batches, settings, clock, notes)
            for batch, hidden in zip(batches, outputs, strict=True):
                batch.hidden = hidden
            with clock.stage("write"):
                writer.write_block(prefix, solver)
            layers += solver.layers
            return_freed_memory()
            task.advance()
    return layers


def _peak_memory() -> int:
    """Bytes; macOS counts them, other systems count units of 1,024."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _enter(
    model: LazyModel, plan: Plan, calibration: CalibrationSet | None, settings: Settings
) -> tuple[MicroBatch, list[MicroBatch]]:
    """A tiny batch to probe structure with, and the calibration set as it enters block 0."""
    use_fast_attention(model.module, settings.dtype, settings.device)
    use_fast_norms(model.module, settings.dtype, settings.device)
    model.load_outside(plan.blocks)
    _cast(model.module, settings.dtype)
    vocabulary = model.folder.vocabulary
    tokens = torch.arange(_PROBE_TOKENS, device=settings.device)[None] % vocabulary
    hidden, calls = record_inputs(model.module, plan.blocks, tokens)
    probe = MicroBatch(hidden, torch.ones_like(tokens, dtype=torch.bool), calls)
    batches: list[MicroBatch] = []
    known: dict[torch.Size, BlockCalls] = {}
    for rows, mask in _micro_batches(calibration, settings) if calibration is not None else ():
        hidden, calls = record_inputs(model.module, plan.blocks, rows.to(settings.device))
        # Masks and positions are mostly the same for every batch of a shape; keep one copy.
        first = known.setdefault(rows.shape, calls)
        calls = first if first.same_as(calls) else calls
        batches.append(MicroBatch(hidden, mask.to(settings.device), calls))
    drop(model.module)
    return probe, batches


def _micro_batches(calibration: CalibrationSet, settings: Settings) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Rows of equal counted length together, cut after their last counted token.

    In a causal model later tokens change nothing before them, so cutting them gives the same statistics and no pad
    token is ever computed; adding padding to a set therefore changes no bit of the result.
    """
    used = calibration.mask.flip(1).to(torch.int8).argmax(1)
    lengths = torch.where(calibration.mask.any(1), calibration.mask.shape[1] - used, 0).tolist()
    if not any(lengths):
        raise CalibrantError("the calibration set's mask counts no token")
    by_length: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        if length:
            by_length.setdefault(length, []).append(row)
    for length, rows in by_length.items():
        size = max(1, settings.micro_batch_tokens // length)
        for begin in range(0, len(rows), size):
            chosen = rows[begin : begin + size]
            yield calibration.tokens[chosen, :length].long(), calibration.mask[chosen, :length]


def _compress_block(
    model: LazyModel,
    plan: Plan,
    index: int,
    probe: MicroBatch,
    batches: list[MicroBatch],
    settings: Settings,
    clock: Clock,
    notes: list[str],
) -> tuple[BlockSolver, list[torch.Tensor]]:
    prefix = plan.blocks[index]
    sequential = settings.sequential and settings.propagate
    try:
        with _opened(model, plan, index, probe, settings, clock, notes) as (solver, structure), clock.stage("forward"):
            if not batches:
                _solve_without_data(solver, structure)
                return solver, []
            if sequential:
                return solver, sequential_pass(solver.block, index, structure, batches, solver)
            return solver, two_passes(solver.block, index, structure, batches, solver, settings.propagate)
    except OrderDiffersError as difference:
        notes.append(f"{prefix}: sequences reach {difference} in different orders, solved in two passes")
    with _opened(model, plan, index, probe, settings, clock, notes) as (solver, structure), clock.stage("forward"):
        return solver, two_passes(solver.block, index, structure, batches, solver, settings.propagate)


def _solve_without_data(solver: BlockSolver, structure: BlockStructure) -> None:
    for linear in structure.linears():
        solver.solve((linear,))


@contextmanager
def _opened(
    model: LazyModel,
    plan: Plan,
    index: int,
    probe: MicroBatch,
    settings: Settings,
    clock: Clock,
    notes: list[str],
) -> Iterator[tuple[BlockSolver, BlockStructure]]:
    """A block in memory, its structure and its solver; dropped on leaving."""
    prefix = plan.blocks[index]
    with ExitStack() as stack:
        with clock.stage("load"):
            block = stack.enter_context(model.loaded(prefix))
            state = {name: value.data for name, value in block.state_dict().items()}
            _cast(block, settings.dtype, copy=True)
            structure = probe_block(block, probe.hidden, lambda: call_block(block, index, probe))
            if structure.unseen:
                notes.append(
                    f"{prefix}: {', '.join(structure.unseen)} left as they are, no product with one expert was seen"
                )
            for text in structure.partly(lambda name: plan.ignored(f"{prefix}.{name}")):
                if text not in notes:
                    notes.append(text)
            structure = structure.without(lambda name: plan.ignored(f"{prefix}.{name}"))
        yield BlockSolver(prefix, block, state, plan.recipe, plan.spec, plan.sparsity, clock), structure


def _cast(module: nn.Module, dtype: torch.dtype, copy: bool = False) -> None:
    """All parameters to ``dtype``; buffers (rotary frequencies) keep theirs."""
    for parameter in module.parameters():
        if parameter.device.type != "meta":
            parameter.data = parameter.data.to(dtype, copy=copy)


class _Writer:
    """Writes checkpoint tensors as they are finished and knows what must be on disk in the end."""

    def __init__(self, model: LazyModel, plan: Plan, shards: ShardWriter) -> None:
        self.shards = shards
        self._model, self._plan = model, plan
        self._hashes: dict[str, str] = {}
        self._codes: dict[str, str] = {}

    def write(self, tensors: dict[str, torch.Tensor]) -> None:
        """Write tensors under their checkpoint names."""
        self._hashes.update({name: _tensor_hash(tensor) for name, tensor in tensors.items()})
        self.shards.write_part(tensors)

    def write_block(self, prefix: str, solver: BlockSolver) -> None:
        """Write a solved block: codes in the quantized layout if the plan has one, everything else dense."""
        packed: dict[str, torch.Tensor] = {}
        dense = {f"{prefix}.{name}": value for name, value in solver.state.items()}
        solved = {f"{prefix}.{linear}" for linear in solver.solved_parameters}
        untouched = [name for name in dense if name not in solved and self._model.is_stored_alone(name)]
        for name in untouched:
            del dense[name]
            stored_name = self._model.stored_name(name)
            packed[stored_name] = self._model.folder.read(stored_name)  # in its own dtype, bit for bit
        if self._plan.layout is not None:
            layout_format = format_for(self._plan.layout)
            for name, codes in solver.codes.items():
                parameter = f"{prefix}.{name}.weight"
                base = self._model.stored_name(parameter).removesuffix("weight")
                self._codes[base] = _codes_hash(codes)
                written = layout_format.write(codes, self._plan.layout)
                packed.update({base + suffix: tensor for suffix, tensor in written.items()})
                del dense[parameter]
        stored = self._model.to_checkpoint({name: value.contiguous() for name, value in dense.items()})
        self.write({**stored, **packed})

    def verify(self, files: list[Path]) -> int:
        """Open the written files again and compare them with what was solved; returns the number of tensors.

        Raises:
            CalibrantError: something on disk differs.
        """
        places: dict[str, Path] = {}
        for file in files:
            with safe_open(file, framework="pt") as opened:
                places.update(dict.fromkeys(opened.keys(), file))
        for name, file in places.items():
            # Opened anew for each tensor: what a mapped file has shown counts as memory until it is closed.
            if self._hashes.get(name) != _tensor_hash(_read(file, name)):
                raise CalibrantError(f"{file}: tensor {name} is not what was solved; the disk may be failing")
        if set(places) != set(self._hashes):
            raise CalibrantError(f"{files[0].parent}: tensors are missing after writing; the disk may be failing")
        for base, expected in self._codes.items():
            self._verify_codes(base, expected, places)
        return len(places)

    def _verify_codes(self, base: str, expected: str, places: dict[str, Path]) -> None:
        assert self._plan.layout is not None
        tensors = {}
        for name, file in places.items():
            if name.startswith(base) and "." not in name.removeprefix(base):
                tensors[name.removeprefix(base)] = _read(file, name)
        if _codes_hash(format_for(self._plan.layout).read(tensors, self._plan.layout)) != expected:
            raise CalibrantError(f"{places[base + 'weight_scale']}: {base}* does not unpack to what was solved")


def _read(file: Path, name: str) -> torch.Tensor:
    with safe_open(file, framework="pt") as opened:
        tensor: torch.Tensor = opened.get_tensor(name)
    return tensor


def _tensor_hash(tensor: torch.Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return sha256_bytes(str((tensor.dtype, tuple(tensor.shape))).encode(), flat.tobytes())


def _codes_hash(codes: Codes) -> str:
    return "".join(map(_tensor_hash, (codes.codes, codes.scale, codes.zero)))


def _write_config(model: LazyModel, plan: Plan, solved: set[str], folder: Path) -> None:
    config = dict(model.folder.config_dict)
    if plan.layout is not None:
        kept = [
            name
            for name, module in model.module.named_modules()
            if isinstance(module, nn.Linear) and name not in solved
        ]
        config["quantization_config"] = quantization_config(plan.layout, sorted(kept))
    (folder / "config.json").write_text(canonical_json(config), encoding="utf-8")


def _record(
    model: LazyModel,
    plan: Plan,
    calibration: CalibrationSet | None,
    settings: Settings,
    layers: list[LayerReport],
    notes: list[str],
) -> dict[str, Any]:
    """Everything that determined the result and what came out: ``calibrant.json``. No times, no paths."""
    return {
        "calibrant_version": calibrant.__version__,
        "recipe": plan.recipe.model_dump(),
        "format": format_for(plan.layout).name if plan.layout else "dense",
        "model": {"name": model.folder.name, **model.folder.identity()},
        "calibration": calibration.manifest.model_dump(exclude={"rows"}) if calibration is not None else None,
        "settings": settings.describe(),
        "libraries": library_versions(),
        "layers": [asdict(layer) for layer in layers],
        "notes": notes,
    }


def library_versions() -> dict[str, str]:
    """Versions of the libraries whose arithmetic or formats shape a result."""
    import importlib.metadata as metadata

    return {name: metadata.version(name) for name in ("torch", "transformers", "safetensors", "numba", "numpy")}
