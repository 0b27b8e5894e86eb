"""Runs one compression, from a model folder to a verified output folder."""

import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import nn

from calibrant.allocator import map_large_blocks
from calibrant.calibration.calibration_set import CalibrationSet
from calibrant.clock import Clock
from calibrant.engine import sensitivity
from calibrant.engine.block_solver import LayerReport
from calibrant.engine.budget import SpentBudget, spend_budget
from calibrant.engine.checkpoint_writer import CheckpointWriter
from calibrant.engine.compress_blocks import compress_blocks
from calibrant.engine.round_head import round_head
from calibrant.engine.two_stage_pruning import Pruned, prune_structure
from calibrant.formats.compressed_tensors_config import add_group
from calibrant.formats.quantized import Layout
from calibrant.formats.registry import format_for
from calibrant.formats.safetensors_file import element_bytes
from calibrant.formats.side_files import copy_side_files
from calibrant.hashing import canonical_json
from calibrant.journal import Journal
from calibrant.modeling.checkpoint import ModelFolder
from calibrant.modeling.lazy_model import LazyModel
from calibrant.modeling.token_rows import TokenRows
from calibrant.modeling.weight_files import INDEX_FILE
from calibrant.output_folder import staged
from calibrant.pipeline.memory import peak_memory
from calibrant.pipeline.record import RECORD_NAME, RunReport, Settings, compressed_share, make_record
from calibrant.pipeline.starved_experts import starved_notes
from calibrant.pipeline.write_gguf import GGUF_NAME, GgufExport
from calibrant.progress import Progress
from calibrant.ranks import ALONE, Ranks
from calibrant.recipes.plan import HeadPlan, Plan
from calibrant.report.model_card import model_card
from calibrant.training.distillation import distil
from calibrant.training.quadapter import learn_scales
from calibrant.training.scaled_model import PlacedPair
from calibrant.training.train_model import train_model
from calibrant.training.training_loop import CURVES, Trained

# Names in the journal.
_BUDGET, _PARTS = "budget", "parts"
# Tensors outside the blocks are written together up to this size.
_PART_BYTES = 1 << 30


def run_compression(
    model: LazyModel,
    plan: Plan,
    calibration: CalibrationSet | None,
    output: Path,
    settings: Settings,
    journal: Journal,
    clock: Clock,
    progress: Progress,
    overwrite: bool = False,
    on_disk: bool = False,
    ranks: Ranks = ALONE,
) -> RunReport:
    """Compress ``model`` by ``plan`` into ``output``, which appears only if the whole run succeeds.

    ZSAQ does not train on ``calibration`` but computes its held-out loss on it. An interrupted run leaves its state in
    ``journal``, which is held; running the same compression again continues from there. ``clock`` has the seconds of
    what came before. ``on_disk`` is that of
    ``compress_blocks``. Of several ``ranks`` the first one writes; the others return its report.

    Raises:
        CalibrantError: the set does not fit the model, values are not finite, or the output cannot be written.
        StoppedError: a signal asked to stop; the journal has the state.
    """
    if not ranks.first:
        return _follow(_Run(model, plan, calibration, settings, journal, clock, progress, output, on_disk, ranks))
    with staged(output, overwrite) as folder, torch.inference_mode():
        run = _Run(model, plan, calibration, settings, journal, clock, progress, folder, on_disk, ranks)
        run.check_finite()
        run.spend_budget()
        run.learn()
        # Only after these trainings, which allocate and free large blocks constantly.
        map_large_blocks()
        run.compress()
        files = run.write_weights()
        run.distil(files)
        run.describe()
        report = run.report(output, files)
    journal.remove()
    return ranks.share(report)


@torch.inference_mode()
def _follow(run: "_Run") -> RunReport:
    """The part of a run that ranks take which write nothing; returns the first rank's report."""
    run.spend_budget()
    map_large_blocks()
    run.compress_blocks(None)
    run.ranks.collect(run.clock.seconds)
    report = run.ranks.share(None)
    assert isinstance(report, RunReport)
    return report


@dataclass
class _Run:
    """The phases of a run, called in order; each stores the results that later phases need."""

    model: LazyModel
    plan: Plan
    given: CalibrationSet | None
    settings: Settings
    journal: Journal
    clock: Clock
    progress: Progress
    folder: Path
    on_disk: bool
    ranks: Ranks
    spent: SpentBudget | None = None
    pruned: Pruned | None = None
    trained: Trained | None = None
    layers: list[LayerReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.config: dict[str, Any] = dict(self.model.folder.config_dict)
        # A set that only evaluates a training without data is not recorded as the calibration set.
        self.calibration = self.given if self.plan.recipe.needs_data else None
        identity = self.calibration.sha256 if self.calibration is not None else "none"
        self._metadata = {"format": "pt", "calibrant.set_sha256": identity}

    @property
    def rows(self) -> TokenRows | None:
        """The calibration set's tokens and mask."""
        return self.calibration.rows if self.calibration is not None else None

    def check_finite(self) -> None:
        """Refuse weights outside the blocks that are not finite; those of blocks are checked when they are solved."""
        ids = self.rows.ids if self.rows is not None else None
        self.notes += self.model.check_finite(self.plan.blocks, ids)

    def spend_budget(self) -> None:
        """Choose every layer's bits or share of zeros, if the recipe has a budget."""
        if self.plan.recipe.budget is None or self.rows is None:
            return
        if self.ranks.first:
            known = self.journal.read(_BUDGET)
            if known is not None:
                self.spent = TypeAdapter(SpentBudget).validate_python(known)
            else:
                with self.clock.stage("sensitivity"):
                    self.spent = spend_budget(
                        self.model, self.plan, self.rows, self.settings.dtype, self.journal, self.progress
                    )
                self.journal.write(_BUDGET, asdict(self.spent))
                self.journal.drop(sensitivity.NAME)
        self.spent = self.ranks.share(self.spent)
        assert self.spent is not None
        self.plan = self.spent.applied_to(self.plan)

    def learn(self) -> None:
        """Learn Quadapter's scales and train the whole model, if the recipe says so."""
        if not self.plan.recipe.learns:
            return
        assert self.given is not None
        rows, journal = self.given.rows, self.journal
        places: list[PlacedPair] = []
        recipe, settings = self.plan.recipe, self.settings
        with self.clock.stage("learn"):
            if recipe.quadapter is not None:
                self.plan, places = learn_scales(
                    self.model, self.plan, recipe.quadapter, rows, settings.dtype, journal, self.progress
                )
            if recipe.training is not None:
                self.plan, self.trained = train_model(
                    self.model.folder, self.plan, places, rows, settings.dtype, settings.device, journal, self.progress
                )

    def compress(self) -> None:
        """Compress and write the blocks."""
        self._writer = CheckpointWriter(self.model, self.plan, self.journal.folder / _PARTS, self._metadata)
        self.notes += [*self.plan.notes, *([self.trained.sentence()] if self.trained is not None else [])]
        if self.plan.recipe.changes_shape:
            assert self.rows is not None
            with self.clock.stage("prune"):
                self.pruned, self.config = prune_structure(
                    self.model, self.plan, self.rows, self.settings.dtype, self._writer, self.journal, self.progress
                )
            self.notes.append(self.pruned.sentence())
            return
        self.compress_blocks(self._writer)
        experts = self.plan.recipe.experts
        if self.rows is not None:
            self.notes += starved_notes(self.layers, self.plan.fused, experts.least_tokens if experts else 1)
        if self.plan.head is not None:
            self._compress_head(self.plan.head)
        uncalled = sorted(set(self.plan.linears) - {layer.name for layer in self.layers})
        if uncalled and self.layers:
            self.notes.append(f"left as they are, since the model does not call them: {', '.join(uncalled)}")

    def compress_blocks(self, writer: CheckpointWriter | None) -> None:
        """Compress the blocks; the first rank writes them with ``writer``."""
        self.layers, notes = compress_blocks(
            self.model,
            self.plan,
            self.rows,
            self.settings.dtype,
            self.settings.order,
            writer,
            self.journal,
            self.clock,
            self.progress,
            self.on_disk,
            self.ranks,
        )
        self.notes += notes

    def _compress_head(self, head: HeadPlan) -> None:
        layout = head.layer.target.layout
        assert layout is not None
        with self.clock.stage("solve"):
            codes, report = round_head(self.model, head, self.progress)
        with self.clock.stage("write"):
            self._writer.write_head(head.name, codes, layout)
        self.layers.append(report)

    def write_weights(self) -> list[Path]:
        """Write what a loader reads, and return the tensor files."""
        with self.clock.stage("write"):
            read = {info.file.name for info in self.model.folder.tensors.values()}
            left_out = set(copy_side_files(self.model.folder.path, self.folder)) - read - {INDEX_FILE}
            if left_out:
                named = ", ".join(sorted(left_out))
                self.notes.append(f"not copied, since they look like weights or are over 64 MiB: {named}")
            head = self.plan.head
            compressed = self.model.stored_name(f"{head.name}.weight") if head is not None else None
            outside = [*self.model.names_outside(self.plan.blocks), *self.model.unused]
            for names in self._in_parts([name for name in outside if name != compressed]):
                self._writer.write({name: self.model.folder.read(name) for name in names})
            files = self._writer.finish(self.folder)
            self._writer.write_input_rounding(self.folder)
            self._write_config()
        return files

    def distil(self, files: list[Path]) -> None:
        """Train what the written ``files`` hold as floating-point numbers, if the recipe says so."""
        if self.plan.recipe.distillation is None or self.rows is None:
            return
        solved = [layer.name for layer in self.layers if layer.name in self.plan.linears]
        codes = self._writer.codes(solved, files)
        pruned = {
            name: self.model.stored_dtype(f"{name}.weight")
            for name in solved
            if (zeros := self.plan.target_of(name).sparsity) is not None
            and zeros.share > 0
            and name not in codes
            and self.model.is_stored_alone(f"{name}.weight")
        }
        if not codes and not pruned:
            self.notes.append("nothing was distilled: no scales or kept weights are stored by themselves")
            return
        with self.clock.stage("distil"):
            done = distil(
                self.model.folder,
                ModelFolder(self.folder, allow_encoder=True, allow_quantized=True),
                self.plan,
                codes,
                pruned,
                self.rows,
                self.settings.dtype,
                self.settings.device,
                self.journal,
                self.progress,
            )
        with self.clock.stage("write"):
            self._writer.replace(done.codes, done.weights, files)
        self.trained = done.training
        self.notes.append(self.trained.sentence())

    def describe(self) -> None:
        """Write the record of the run, its calibration set, the model's card and the training's curves."""
        record = make_record(
            self.model,
            self.plan,
            self.calibration,
            self.settings,
            self.layers,
            self.notes,
            budget=self.spent,
            structure=self.pruned,
            training=self.trained,
        )
        with self.clock.stage("write"):
            if self.calibration is not None:
                self.calibration.save(self.folder / "calibration")
            (self.folder / "README.md").write_text(model_card(record.as_dict()), encoding="utf-8")
            written = [path.relative_to(self.folder) for path in self.folder.rglob("*") if path.is_file()]
            names = sorted([*(path.as_posix() for path in written), RECORD_NAME])
            record.model_copy(update={"files": names}).write(self.folder)
            if (self.journal.folder / CURVES).is_dir():  # whose files have the time in their names
                shutil.copytree(self.journal.folder / CURVES, self.folder / "training")

    def _in_parts(self, names: list[str]) -> Iterator[list[str]]:
        """``names`` of stored tensors in groups of at most ``_PART_BYTES``, or of one tensor."""
        part: list[str] = []
        size = 0
        for name in names:
            info = self.model.folder.tensors[name]
            own = element_bytes(info.dtype) * math.prod(info.shape)
            if part and size + own > _PART_BYTES:
                yield part
                part, size = [], 0
            part.append(name)
            size += own
        if part:
            yield part

    def _write_config(self) -> None:
        config, layout = self.config, self.plan.target.layout
        config.pop("transformers_weights", None)  # names a file of the source
        if layout is not None:
            layouts: dict[Layout, list[str]] = {}
            for name in sorted({layer.name for layer in self.layers} & self.plan.layers.keys()):
                of_layer = self.plan.target_of(name).layout
                if of_layer is not None:
                    # Engines look for names of modules; the files' own names are for our formats alone.
                    stored = self.model.stored_name(f"{name}.weight") if layout.format == "gguf" else f"{name}.weight"
                    layouts.setdefault(of_layer, []).append(stored.removesuffix(".weight"))
            config["quantization_config"] = format_for(layout).config(layouts, self._kept_dense())
            head = self.plan.head
            if head is not None and head.layer.target.layout is not None:
                add_group(config["quantization_config"], head.layer.target.layout, head.name)
            if self.plan.recipe.scheme.kv_cache is not None:
                config["quantization_config"]["kv_cache_scheme"] = self.plan.recipe.scheme.kv_cache.layout.scheme()
            if layout.format == "gptq":  # older GPTQ loaders read this file
                settings = canonical_json(config["quantization_config"])
                (self.folder / "quantize_config.json").write_text(settings, encoding="utf-8")
        (self.folder / "config.json").write_text(canonical_json(config, allow_nan=True), encoding="utf-8")

    def _kept_dense(self) -> list[str]:
        """Linears stored dense: those of the model, and matrices that engines may build but transformers does not."""
        solved, model = {layer.name for layer in self.layers}, self.model
        modules = dict(model.module.named_modules())
        kept = {name for name, module in modules.items() if isinstance(module, nn.Linear) and name not in solved}
        tables = [f"{name}.weight" for name, module in modules.items() if isinstance(module, nn.Embedding)]
        embeddings = {model.stored_name(name) for name in tables if model.is_stored_alone(name)}
        return sorted(kept | (self._writer.dense_matrices() - {name.removesuffix(".weight") for name in embeddings}))

    def report(self, output: Path, files: list[Path]) -> RunReport:
        """Verify the tensor files, then write and return the report."""
        with self.clock.stage("verify"):
            verified = self._writer.verify(files)
        if self.plan.target.layout is not None and self.plan.target.layout.format == "gguf":
            with self.clock.stage("write"):
                export = GgufExport(ModelFolder(self.folder, allow_quantized=True), "Q8_0", self.progress)
                self.notes += export.write(self.folder / GGUF_NAME).notes
        seconds = [_rounded(one) for one in self.ranks.collect(self.clock.seconds)]
        sources = {info.file: info.file.stat().st_size for info in self.model.folder.tensors.values()}
        report = RunReport(
            output,
            self.plan.recipe.name,
            compressed_share(self.plan, self.layers),
            self.layers,
            self.notes,
            seconds[0],
            peak_memory(),
            sum(sources.values()),
            sum(file.stat().st_size for file in files),
            verified,
            [] if self.ranks.alone else seconds,
        )
        report.write(self.folder)
        return report


def _rounded(seconds: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in seconds.items()}
