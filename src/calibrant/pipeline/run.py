"""One compression, from a model folder to a verified output folder."""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from calibrant.allocator import map_large_blocks, return_freed_memory
from calibrant.calibration.calibration_set import CalibrationSet
from calibrant.clock import Clock
from calibrant.engine.block_engine import OrderDiffersError, sequential_pass, two_passes
from calibrant.engine.block_solver import BlockSolver, LayerReport
from calibrant.engine.block_transforms import transform_block
from calibrant.engine.budget import spend_budget
from calibrant.engine.checkpoint_writer import CheckpointWriter
from calibrant.engine.two_stage_pruning import prune_structure
from calibrant.errors import CalibrantError
from calibrant.formats.quantized import Layout
from calibrant.formats.registry import format_for
from calibrant.formats.shards import copy_side_files
from calibrant.hashing import canonical_json
from calibrant.methods.registry import METHODS
from calibrant.modeling.entry import cast, enter_blocks
from calibrant.modeling.inputs import MicroBatch
from calibrant.modeling.lazy_model import LazyModel
from calibrant.modeling.structure import BlockStructure, Experts, probe_block
from calibrant.output_folder import staged
from calibrant.pipeline.record import (
    RunReport,
    Settings,
    peak_memory,
    report_dict,
    run_record,
    training_identity,
)
from calibrant.progress import Progress
from calibrant.recipes.parts import Quadapter
from calibrant.recipes.plan import Plan
from calibrant.report.model_card import model_card
from calibrant.training.journal import Journal
from calibrant.training.quadapter import learn_scales
from calibrant.training.scaled_model import PlacedPair
from calibrant.training.train_model import train_model
from calibrant.training.training_loop import Trained

_NOT_ASYMMETRIC = "the original model cannot run beside it; take a recipe that is not asymmetric"


def run_compression(
    model: LazyModel,
    plan: Plan,
    calibration: CalibrationSet | None,
    output: Path,
    settings: Settings,
    progress: Progress,
) -> RunReport:
    """Compress ``model`` by ``plan`` into ``output``; nothing appears there unless everything succeeded.

    For ZSAQ ``calibration`` is not trained on: its training is watched on it. A training that is broken off leaves its
    journal beside ``output``, and the same run goes on from it.

    Raises:
        CalibrantError: the set does not fit the model, values are not finite, or the output cannot be written.
    """
    clock = Clock()
    with staged(output, settings.overwrite) as folder, torch.inference_mode():
        spent = journal = training = None
        learning_set = calibration
        if not plan.recipe.needs_data:
            calibration = None
        identity = calibration.sha256 if calibration is not None else "none"
        if plan.recipe.budget is not None and calibration is not None:
            with clock.stage("sensitivity"):
                plan, spent = spend_budget(model, plan, calibration, settings.dtype, progress)
        if plan.recipe.learns:
            if learning_set is None:
                raise CalibrantError(f"recipe {plan.recipe.name} learns, and was given no calibration set")
            journal = Journal(output, training_identity(model, plan, learning_set, settings), settings.overwrite)
            with clock.stage("learn"), journal.left_if_worth_it():
                plan, training = _learn(model, plan, learning_set, settings, journal, progress)
        # Not before something was trained, which frees and takes large blocks all the time.
        map_large_blocks()
        writer = CheckpointWriter(model, plan, folder, {"format": "pt", "calibrant.set_sha256": identity})
        notes = [*plan.notes, *([training.sentence()] if training is not None else [])]
        config, pruned, layers = dict(model.folder.config_dict), None, list[LayerReport]()
        if METHODS[plan.recipe.method.name].changes_shape:
            assert calibration is not None
            with clock.stage("prune"):
                pruned, config = prune_structure(
                    model, plan, calibration, settings.dtype, settings.micro_batch_tokens, writer, progress
                )
            notes.append(pruned.sentence())
        else:
            layers = _compress_blocks(model, plan, calibration, settings, writer, clock, notes, progress)
        uncalled = sorted(set(plan.linears) - {layer.name for layer in layers}) if layers else []
        if uncalled:
            notes.append(f"left as they are, since the model does not call them: {', '.join(uncalled)}")
        with clock.stage("write"):
            record = run_record(model, plan, calibration, settings, layers, notes)
            made = {"budget": spent, "structure": pruned, "training": training}
            record |= {name: what.describe() if what is not None else None for name, what in made.items()}
            files = _write_rest(model, plan, config, layers, writer, folder)
            if calibration is not None:
                calibration.save(folder / "calibration")
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
            peak_memory(),
            sum({info.file: info.file.stat().st_size for info in model.folder.tensors.values()}.values()),
            sum(file.stat().st_size for file in files),
            verified,
        )
        (folder / "report.json").write_text(canonical_json(report_dict(report)), encoding="utf-8")
        if journal is not None:
            journal.keep_curves(folder / "training")
    if journal is not None:
        journal.remove()
    return report


def _learn(
    model: LazyModel,
    plan: Plan,
    calibration: CalibrationSet,
    settings: Settings,
    journal: Journal,
    progress: Progress,
) -> tuple[Plan, Trained | None]:
    """The plan with learned scales, or with what a training of the whole model made, or both."""
    places: list[PlacedPair] = []
    for transform in plan.recipe.transforms:
        if isinstance(transform, Quadapter):
            plan, places = learn_scales(
                model, plan, transform, calibration, settings.dtype, settings.micro_batch_tokens, journal, progress
            )
    if plan.recipe.training is None:
        return plan, None
    return train_model(model.folder, plan, places, calibration, settings.dtype, settings.device, journal, progress)


def _compress_blocks(
    model: LazyModel,
    plan: Plan,
    calibration: CalibrationSet | None,
    settings: Settings,
    writer: CheckpointWriter,
    clock: Clock,
    notes: list[str],
    progress: Progress,
) -> list[LayerReport]:
    layers: list[LayerReport] = []
    with clock.stage("embed"):
        probe, batches = enter_blocks(
            model,
            plan.blocks,
            calibration if plan.recipe.gathers else None,
            settings.dtype,
            settings.device,
            settings.micro_batch_tokens,
            with_original=plan.recipe.drift_correction > 0,
        )
    with progress.task("compressing", len(plan.blocks)) as task:
        for index, prefix in enumerate(plan.blocks):
            solver = _compress_block(model, plan, index, probe, batches, settings, clock, notes)
            with clock.stage("write"):
                writer.write_block(prefix, solver)
            layers += solver.layers
            return_freed_memory()
            task.advance()
    return layers


def _compress_block(
    model: LazyModel,
    plan: Plan,
    index: int,
    probe: MicroBatch,
    batches: list[MicroBatch],
    settings: Settings,
    clock: Clock,
    notes: list[str],
) -> BlockSolver:
    """Solve block ``index`` and move the batches on behind it."""
    prefix = plan.blocks[index]
    sequential = settings.sequential and settings.propagate
    try:
        with (
            _opened(model, plan, index, probe, batches, settings, clock, notes) as (solver, structure, outputs),
            clock.stage("forward"),
        ):
            if not plan.recipe.solves_with_data:
                _solve_without_data(solver, structure)
                if not all(bool(torch.isfinite(output).all()) for output in outputs):
                    raise CalibrantError(
                        f"{prefix}: its output holds values that are not finite; compute in float32 (--dtype float32) "
                        "or check the model"
                    )
                _move(batches, outputs)
            elif plan.recipe.drift_correction:
                _solve_beside_original(solver, index, structure, batches)
            elif sequential:
                _move(batches, sequential_pass(solver.block, index, structure, batches, solver)[0])
            else:
                _move(batches, two_passes(solver.block, index, structure, batches, solver, settings.propagate))
            return solver
    except OrderDiffersError as difference:
        if plan.recipe.drift_correction:
            where = f"{prefix}: sequences reach {difference} in different orders"
            raise CalibrantError(f"{where}, so {_NOT_ASYMMETRIC}") from difference
        notes.append(f"{prefix}: sequences reach {difference} in different orders, solved in two passes")
    with (
        _opened(model, plan, index, probe, batches, settings, clock, notes) as (solver, structure, _),
        clock.stage("forward"),
    ):
        _move(batches, two_passes(solver.block, index, structure, batches, solver, settings.propagate))
        return solver


def _move(batches: list[MicroBatch], outputs: list[torch.Tensor]) -> None:
    for batch, hidden in zip(batches, outputs, strict=True):
        batch.hidden = hidden


def _solve_beside_original(
    solver: BlockSolver, index: int, structure: BlockStructure, batches: list[MicroBatch]
) -> None:
    if any(isinstance(stage, Experts) for stage in structure.stages):
        raise CalibrantError(f"{solver.prefix}: its experts are fused, so {_NOT_ASYMMETRIC}")
    outputs, originals = sequential_pass(
        solver.block, index, structure, batches, solver, original=copy.deepcopy(solver.block)
    )
    _move(batches, outputs)
    for batch, hidden in zip(batches, originals, strict=True):
        batch.original = hidden


def _solve_without_data(solver: BlockSolver, structure: BlockStructure) -> None:
    for linear in structure.linears():
        solver.solve((linear,))


@contextmanager
def _opened(
    model: LazyModel,
    plan: Plan,
    index: int,
    probe: MicroBatch,
    batches: list[MicroBatch],
    settings: Settings,
    clock: Clock,
    notes: list[str],
) -> Iterator[tuple[BlockSolver, BlockStructure, list[torch.Tensor]]]:
    """A block in memory, dropped on leaving: its solver, its structure, and what it gave before its transforms."""
    prefix = plan.blocks[index]
    with ExitStack() as stack:
        with clock.stage("load"):
            block = stack.enter_context(model.loaded(prefix))
            state = {name: value.data for name, value in block.state_dict().items()}
            cast(block, settings.dtype, copy=True)
            structure = probe_block(block, index, probe)
            if structure.unseen:
                notes.append(
                    f"{prefix}: {', '.join(structure.unseen)} left as they are, no product with one expert was seen"
                )
            for text in structure.partly(lambda name: plan.recipe.ignores(f"{prefix}.{name}")):
                if text not in notes:
                    notes.append(text)
        solver = BlockSolver(prefix, block, state, plan, clock)
        outputs: list[torch.Tensor] = []
        if plan.recipe.transforms and (batches or plan.scales is not None):
            with clock.stage("transform"):
                done = transform_block(block, index, structure, probe, batches, state, prefix, plan)
            solver.solved_parameters |= done.changed
            notes += [text for text in done.notes if text not in notes]
            outputs = done.outputs
        yield solver, structure.without(lambda name: plan.recipe.ignores(f"{prefix}.{name}")), outputs


def _write_rest(
    model: LazyModel,
    plan: Plan,
    config: dict[str, Any],
    layers: list[LayerReport],
    writer: CheckpointWriter,
    folder: Path,
) -> list[Path]:
    """Tensors outside the blocks, config and tokenizer; returns the files of tensors."""
    for name in model.names_outside(plan.blocks):
        writer.write({name: model.folder.read(name)})
    files = writer.finish()
    copy_side_files(model.folder.path, folder)
    writer.write_input_rounding(folder)
    _write_config(model, plan, config, {layer.name for layer in layers}, folder)
    return files


def _write_config(model: LazyModel, plan: Plan, config: dict[str, Any], solved: set[str], folder: Path) -> None:
    if plan.layout is not None:
        kept = [
            name
            for name, module in model.module.named_modules()
            if isinstance(module, nn.Linear) and name not in solved
        ]
        layouts: dict[Layout, list[str]] = {}
        for name in sorted(solved):
            layout = plan.layout_for(name)
            if layout is not None:
                layouts.setdefault(layout, []).append(name)
        config["quantization_config"] = format_for(plan.layout).config(layouts, sorted(kept))
        if plan.layout.format == "gptq":  # its older readers look here
            settings = canonical_json(config["quantization_config"])
            (folder / "quantize_config.json").write_text(settings, encoding="utf-8")
    (folder / "config.json").write_text(canonical_json(config), encoding="utf-8")
