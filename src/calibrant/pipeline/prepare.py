"""Checks a compression before any weight is read; the prepared run can be estimated and run."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from calibrant.calibration.calibration_set import CalibrationSet
from calibrant.calibration.generate import DEFAULT_SAMPLES, check_length, check_size, default_length
from calibrant.calibration.sources.vocabulary import draw_vocabulary
from calibrant.clock import Clock
from calibrant.engine.compress_blocks import Order
from calibrant.engine.two_stage_pruning import check_structure
from calibrant.errors import CalibrantError
from calibrant.formats.quantized import FormatName
from calibrant.formats.registry import FORMATS
from calibrant.journal import SET, Journal, check_same_run, is_unfinished
from calibrant.modeling.checkpoint import ModelFolder
from calibrant.modeling.entry import check_ranks, micro_batch_rows
from calibrant.modeling.find_blocks import find_blocks
from calibrant.modeling.hub import model_path
from calibrant.modeling.lazy_model import LazyModel
from calibrant.modeling.tokenizer import Tokenizer, has_tokenizer, tokenizer_files_sha256
from calibrant.modeling.whole_model import torch_device, torch_dtype
from calibrant.output_folder import check_disk, check_output
from calibrant.pipeline.estimate import Estimate, MemoryNeed, disk_bytes, estimate, memory_needed
from calibrant.pipeline.memory import memory_size, usable_memory
from calibrant.pipeline.own_set import SetSize, corpus_note, forget_rows, own_set, own_set_cost
from calibrant.pipeline.record import RunReport, Settings, made_by, run_identity
from calibrant.pipeline.run import run_compression
from calibrant.pipeline.starved_experts import with_rows_for_experts
from calibrant.pipeline.write_gguf import check_gguf
from calibrant.progress import NoProgress, Progress
from calibrant.ranks import ALONE, Ranks
from calibrant.recipes.make_plan import make_plan
from calibrant.recipes.parts import StarvedExperts
from calibrant.recipes.plan import Plan
from calibrant.recipes.recipe import DEFAULT_RECIPE, Recipe, load_recipe
from calibrant.stopping import check_stop
from calibrant.training.distillation import distillation_options
from calibrant.training.train_model import check_training, split_held_out

_HELD_OUT_ROWS = 16
_ORDERS = ("sequential", "two-pass", "independent")


@dataclass(frozen=True)
class PreparedRun:
    """A checked compression.

    ``plan.notes`` tell the user what may be unexpected; ``calibration`` is the given set, if the recipe uses one;
    ``own_set`` describes the set that the model generates otherwise; ``memory`` is what the run may use, in bytes, None
    for what is free.
    """

    model: LazyModel
    plan: Plan
    settings: Settings
    output: Path
    calibration: CalibrationSet | None
    own_set: SetSize
    overwrite: bool
    memory: int | None = None

    @property
    def recipe(self) -> Recipe:
        """The recipe, fitted to the model."""
        return self.plan.recipe

    @property
    def writes_set(self) -> bool:
        """Whether the model has to generate the calibration set first."""
        return self.calibration is None and self.recipe.needs_data

    def estimate(self) -> Estimate:
        """Rough time, memory and disk space of the run, and of generating its calibration set."""
        found = self.compression_estimate()
        settings, folder, blocks = self.settings, self.model.folder, len(self.plan.blocks)
        for size in self._written_sets():
            seconds, memory = own_set_cost(folder, blocks, size, settings.dtype, settings.device, self._usable)
            # The allocator gives little of the memory back before the blocks are compressed.
            found = replace(
                found,
                writing_seconds=found.writing_seconds + seconds,
                memory_bytes=found.memory_bytes + memory,
            )
        return found

    def compression_estimate(self) -> Estimate:
        """Rough time, memory and disk space of the run once it has a calibration set."""
        return estimate(self.model, self.plan, *self._set_shape, self.settings.dtype, self._usable)

    def _written_sets(self) -> list[SetSize]:
        """The sets that the model writes before it is compressed; rows for experts are not counted."""
        training = self.recipe.training
        if self.writes_set:
            return [self.own_set]
        if training is not None and not self.recipe.needs_data and self.model.folder.causal:
            return [SetSize(_HELD_OUT_ROWS, training.length, training.seed, 0)]
        return []

    def disk_bytes(self) -> tuple[int, int]:
        """Bytes of the output, and peak disk space of the run."""
        return disk_bytes(self.model, self.plan, *self._set_shape, self.settings.dtype, self._usable)

    @property
    def _set_shape(self) -> tuple[int, int]:
        """Rows, at most, and length of the calibration set."""
        given, own = self.calibration, self.own_set
        rows, length = (own.samples, own.length) if given is None else given.tokens.shape
        return (2 if self._extends else 1) * rows, length

    def run(self, progress: Progress | None = None) -> RunReport:
        """Compress; generate the calibration set first if the recipe needs one and none is given.

        An interrupted run continues from its journal, a folder beside the output, when it is run again.

        Raises:
            CalibrantError: values are not finite, the output cannot be written, the disk has no room for it, or another
                run writes it; no output is left behind.
        """
        listener: Progress = progress or NoProgress()
        ranks, clock = Ranks.joined(), Clock()
        self._check_ranks(ranks)
        self.check_distillation()
        journal = Journal(self.output, self.identity(ranks), self.overwrite)
        if not ranks.first:
            return self._run(journal, ranks.share(None), clock, NoProgress(), ranks)
        with journal.held():
            calibration = ranks.share(self._calibration(journal, clock, listener))
            return self._run(journal, calibration, clock, listener, ranks)

    def _run(
        self, journal: Journal, calibration: CalibrationSet | None, clock: Clock, progress: Progress, ranks: Ranks
    ) -> RunReport:
        """Compress with ``calibration``."""
        needed, note = self._memory(ranks)
        if note:
            progress.note(note)
        return run_compression(
            self.model,
            self.plan,
            calibration,
            self.output,
            self.settings,
            journal,
            clock,
            progress,
            self.overwrite,
            ranks.share(needed.on_disk),
            ranks,
        )

    def memory_notes(self) -> list[str]:
        """Sentences on what memory is too small for."""
        self.check_distillation()
        notes = [self._memory(ALONE)[1]]
        if self.writes_set:
            settings = self.settings
            notes.append(
                corpus_note(self.model.folder, self.own_set, settings.dtype, settings.device, self._usable) or ""
            )
        return [note for note in notes if note]

    def _memory(self, ranks: Ranks) -> tuple[MemoryNeed, str]:
        """What each of ``ranks`` needs, and a sentence if that is more than may be used."""
        rows, length = self._set_shape
        usable = self._usable // ranks.size
        needed = memory_needed(self.model, self.plan, -(-rows // ranks.size), length, self.settings.dtype, usable)
        if needed.bytes <= usable:
            return needed, ""
        return needed, (
            f"about {needed.bytes / 1e9:.1f} GB of memory are needed, {usable / 1e9:.1f} GB may be used; "
            "the run may be slow or be killed"
        )

    def check_distillation(self) -> None:
        """Refuse a distillation that would end a run after all its blocks.

        Raises:
            CalibrantError: the set is too small or has too few tokens that count, the model has no head, or memory has
                no room.
        """
        asked = self.recipe.distillation
        if asked is None:
            return
        folder, (rows, length) = self.model.folder, self._set_shape
        if self.model.module.base_model is self.model.module:
            raise CalibrantError(
                f"{folder.path}: {folder.architecture} gives no logits, from which distillation learns; take a model "
                "with a head, or a recipe without distillation"
            )
        if rows < 2:
            raise CalibrantError(f"{self.recipe.name}: distillation needs two rows or more, one of them to be held out")
        if self.calibration is not None:
            split_held_out(
                self.calibration.rows, distillation_options(asked, rows, length), folder.causal, torch.device("cpu")
            )
        needed = memory_needed(self.model, self.plan, rows, length, self.settings.dtype, self._usable).distillation
        if needed > self._usable:
            raise CalibrantError(
                f"{self.recipe.name}: its distillation holds the whole model in float32 and what it learns, about "
                f"{needed / 1e9:.1f} GB, and {self._usable / 1e9:.1f} GB may be used; take a recipe without "
                "distillation (calibrant recipes NAME prints one to change)"
            )

    def _check_ranks(self, ranks: Ranks) -> None:
        recipe = self.recipe
        if not ranks.alone and recipe.distillation is not None:
            raise CalibrantError(
                f"{recipe.name}: its distillation runs in one process; start it without torchrun, or take a recipe "
                "without distillation"
            )
        if not ranks.alone and (recipe.learns or recipe.changes_shape or not recipe.gathers):
            raise CalibrantError(
                f"{recipe.name}: has no rows of a calibration set to share out block by block, so it runs in one "
                "process; start it without torchrun"
            )
        if self.writes_set:  # rows of one length, so that nothing is written in vain
            check_ranks(-(-self.own_set.samples // micro_batch_rows(self.own_set.length)), ranks)

    @property
    def _usable(self) -> int:
        return usable_memory(self.settings.device) if self.memory is None else self.memory

    def identity(self, ranks: Ranks = ALONE) -> dict[str, Any]:
        """Everything that the result depends on; of several ``ranks`` also their number."""
        calibration: dict[str, Any] | None = None
        if self.calibration is not None:
            calibration = {"sha256": self.calibration.sha256}
            if self._extends:
                calibration["rows for experts"] = {"seed": self.own_set.seed, "draw": self.own_set.draw}
        elif self.writes_set:
            calibration = {"written by the model": asdict(self.own_set)}
        found = run_identity(self.model, self.plan, calibration, self.settings)
        return found if ranks.alone else {**found, "ranks": ranks.size}

    def _calibration(self, journal: Journal, clock: Clock, progress: Progress) -> CalibrationSet | None:
        """The given set, or one that the model writes or adds rows to, which the journal keeps."""
        training, experts = self.recipe.training, self.recipe.experts
        held_out = training is not None and not self.recipe.needs_data
        if not held_out and not self.writes_set and not self._extends:
            return self.calibration
        kept = journal.folder / SET
        if kept.is_dir():
            return CalibrationSet.load(kept)
        with clock.stage("generate"):
            if training is not None and held_out:
                made = self._held_out(training.length, training.seed, journal, progress)
            else:
                settings = self.settings
                note = corpus_note(self.model.folder, self.own_set, settings.dtype, settings.device, self._usable)
                if note and self.calibration is None:
                    progress.note(note)
                made = self.calibration or self._generate(self.own_set, journal, progress)
            if experts is not None and self._extends:
                made = self._with_rows_for_experts(made, experts, journal, progress)
        made.save(kept)
        forget_rows(journal)
        check_stop("the calibration set")
        return made

    @property
    def _extends(self) -> bool:
        """Whether rows are added to the set that reach experts."""
        return self.recipe.experts is not None and self.recipe.experts.starved == "more-rows"

    def _with_rows_for_experts(
        self, given: CalibrationSet, experts: StarvedExperts, journal: Journal, progress: Progress
    ) -> CalibrationSet:
        """``given`` with rows of the model's next draw that reach experts."""
        own = self.own_set

        def write(samples: int) -> CalibrationSet:
            return self._generate(SetSize(samples, given.manifest.length, own.seed, own.draw + 1), journal, progress)

        states = journal.folder / "counted" if self._memory(ALONE)[0].on_disk else None
        return with_rows_for_experts(
            self.model, self.plan.blocks, given, experts, self.settings.dtype, write, states, progress
        )

    def _held_out(self, length: int, seed: int, journal: Journal, progress: Progress) -> CalibrationSet:
        """Evaluation set of a training without data: text that the model generates, or random tokens for encoders."""
        folder = self.model.folder
        if not folder.causal:
            return draw_vocabulary(Tokenizer(folder.path), samples=_HELD_OUT_ROWS, length=length, seed=seed, draw=0)
        return self._generate(SetSize(_HELD_OUT_ROWS, length, seed, 0), journal, progress)

    def _generate(self, size: SetSize, journal: Journal, progress: Progress) -> CalibrationSet:
        settings = self.settings
        return own_set(self.model.folder, size, settings.dtype, settings.device, self._usable, journal, progress)


def prepare(
    model: str | Path,
    *,
    output: str | Path,
    recipe: str | Path | Recipe = DEFAULT_RECIPE,
    bits: int | None = None,
    group_size: int | None = None,
    calibration: CalibrationSet | str | Path | None = None,
    samples: int | None = None,
    length: int | None = None,
    seed: int = 0,
    draw: int | None = None,
    device: str = "cpu",
    dtype: str = "auto",
    order: Order = "sequential",
    checkpoint_format: FormatName = "compressed-tensors",
    overwrite: bool = False,
    allow_encoder: bool = False,
    dequantize: bool = False,
    memory: str | int | None = None,
) -> PreparedRun:
    """Check all inputs of a compression without reading weights (2SSP reads the weights of one block).

    The arguments are those of ``compress``.

    Raises:
        CalibrantError: the model, recipe, set and output do not fit together.
    """
    inputs = [place for place in (model, calibration, recipe) if isinstance(place, str | Path)]
    target = check_output(output, overwrite, inputs)
    given = CalibrationSet.load(calibration) if isinstance(calibration, str | Path) else calibration
    chosen = (
        (recipe if isinstance(recipe, Recipe) else load_recipe(recipe)).with_weights(bits, group_size).with_seed(seed)
    )
    folder = ModelFolder(model_path(model), allow_encoder, dequantize=dequantize)
    _check_model(folder, chosen, given)
    own = SetSize(
        samples if samples is not None else DEFAULT_SAMPLES,
        length if length is not None else default_length(folder),
        seed,
        draw if draw is not None else 0,
    )
    for name, value in {"samples": samples, "length": length, "draw": draw}.items():
        if given is not None and value is not None:
            raise CalibrantError(
                f"`{name}` describes the set that the model generates, and `calibration` is a set already; leave it out"
            )
    if given is None:
        check_size(own.samples, own.length, own.seed, own.draw)
        check_length(folder, own.length)
    used = given if chosen.needs_data else None
    if used is not None:
        check_calibration(folder, used)
    goes_on = is_unfinished(target) and not overwrite
    if order not in _ORDERS:
        raise CalibrantError(f"{order}: no such order; there are {', '.join(_ORDERS)}")
    if chosen.beside_original and order != "sequential":
        what = "corrects drift" if chosen.drift_correction else "reconstructs blocks"
        raise CalibrantError(f'recipe {chosen.name} {what}, which needs `order="sequential"`')
    if checkpoint_format not in FORMATS:
        raise CalibrantError(f"{checkpoint_format}: no such format; there are {', '.join(FORMATS)}")
    place = torch_device(device)
    computes = torch_dtype(dtype, place)
    lazy = LazyModel(folder, folder.dtype, place, computes)
    plan = make_plan(lazy, find_blocks(lazy.module), chosen, checkpoint_format)
    plan = replace(plan, notes=[*lazy.notes, *plan.notes])
    if plan.target.layout is not None and plan.target.layout.format == "gguf":
        check_gguf(folder)
    if chosen.changes_shape:
        check_structure(lazy, plan)
    settings = Settings(computes, place, order)
    most = memory_size(memory) if memory is not None else None
    prepared = PreparedRun(lazy, plan, settings, target, used, own, overwrite, most)
    if goes_on:
        check_same_run(target, prepared.identity(Ranks.joined()))
    if Ranks.joined().first:
        check_disk(target, prepared.disk_bytes()[1])
    return prepared


def _check_model(folder: ModelFolder, recipe: Recipe, calibration: CalibrationSet | None) -> None:
    origin = made_by(folder)
    if origin is not None and origin.quantized and not folder.decoded:
        raise CalibrantError(
            f"{folder.path}: {origin.recipe} quantized the model already; start from its original weights"
        )
    if recipe.training is not None:
        check_training(folder, recipe.training)
    if calibration is None and recipe.needs_data and not folder.causal:
        raise CalibrantError(f"{folder.path}: cannot write its own calibration set; pass one as `calibration`")


def check_calibration(folder: ModelFolder, calibration: CalibrationSet) -> None:
    """Check that ``calibration`` fits the model in ``folder``, as far as the folder says; it may lack a tokenizer.

    Raises:
        CalibrantError: the set's tokenizer, length or token ids do not fit the model.
    """
    check_length(folder, calibration.tokens.shape[1])
    manifest = calibration.manifest
    # Loading a large tokenizer takes seconds, so compare file hashes first.
    known = manifest.tokenizer_files_sha256
    if (known is None or known != tokenizer_files_sha256(folder.path)) and has_tokenizer(folder.path):
        tokenizer = Tokenizer(folder.path)
        # A set made from given token ids may lack the tokenizer's hash.
        if manifest.tokenizer_sha256 not in ("", tokenizer.sha256):
            raise CalibrantError(
                f"the calibration set was made with another tokenizer than {folder.path}'s "
                f"({manifest.tokenizer_sha256[:12]} instead of {tokenizer.sha256[:12]}); make it again for this model"
            )
    vocabulary = folder.vocabulary
    if int(calibration.tokens.max()) >= vocabulary or int(calibration.tokens.min()) < 0:
        raise CalibrantError(f"the calibration set has token ids outside {folder.path}'s vocabulary of {vocabulary}")
