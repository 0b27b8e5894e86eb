"""The record of a run, stored as ``calibrant.json``: everything that determined the result, and the result itself."""

import importlib.metadata as metadata
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from calibrant.calibration.calibration_set import CalibrationSet, Manifest
from calibrant.engine.block_solver import LayerReport
from calibrant.engine.budget import SpentBudget
from calibrant.engine.compress_blocks import Order
from calibrant.engine.two_stage_pruning import Pruned
from calibrant.errors import CalibrantError, first_line
from calibrant.formats.registry import format_for
from calibrant.hashing import canonical_json, sha256_file
from calibrant.modeling.checkpoint import ModelFolder
from calibrant.modeling.lazy_model import LazyModel
from calibrant.pipeline.proof import Proof
from calibrant.recipes.plan import Plan
from calibrant.recipes.recipe import Recipe
from calibrant.report.model_card import model_card
from calibrant.training.train_model import generator_identity
from calibrant.training.training_loop import Trained
from calibrant.version import __version__

_Kind = TypeVar("_Kind")
RECORD_NAME, REPORT_NAME = "calibrant.json", "report.json"


@dataclass(frozen=True)
class Settings:
    """Settings of a run: the ``dtype`` of forward passes, the device, and the ``order`` in which layers are solved."""

    dtype: torch.dtype
    device: torch.device
    order: Order = "sequential"

    def recorded(self) -> "RecordedSettings":
        """The settings as the record stores them."""
        name = str(self.dtype).removeprefix("torch.")
        return RecordedSettings(compute_dtype=name, device=self.device.type, order=self.order)


class _Recorded(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RecordedSettings(_Recorded):
    """Settings of a run in its record."""

    compute_dtype: str
    device: str
    order: Order


@dataclass(frozen=True)
class MadeBy:
    """The compression that produced a model folder: recipe, whether the recipe quantized, and the record's hash."""

    recipe: str
    quantized: bool
    record_sha256: str


class RunRecord(_Recorded):
    """Contents of ``calibrant.json``, without times and paths, so that equal runs write equal bytes.

    ``format`` is the checkpoint format's name, or "dense"; ``model`` and ``generator`` contain names and hashes;
    ``calibration`` is the set's manifest, written without its rows; ``share`` is the share of the blocks' weights
    that was compressed, from 0 to 1. ``proofs`` are of engines that the output was loaded in afterwards. ``files`` are
    those of the output, which ``overwrite`` replaces.
    """

    format_version: Literal[2] = 2
    calibrant_version: str
    recipe: Recipe
    format: str
    model: dict[str, str]
    made_by: MadeBy | None
    generator: dict[str, str] | None
    calibration: Manifest | None
    settings: RecordedSettings
    libraries: dict[str, str]
    share: float
    layers: list[LayerReport]
    notes: list[str]
    budget: SpentBudget | None
    structure: Pruned | None
    training: Trained | None
    proofs: list[Proof] = []
    files: list[str] = []

    def as_dict(self) -> dict[str, Any]:
        """As plain values."""
        return self.model_dump(mode="json", exclude={"calibration": {"rows"}})

    def write(self, folder: Path) -> None:
        """Write ``calibrant.json`` into ``folder``."""
        (folder / RECORD_NAME).write_text(canonical_json(self.as_dict()), encoding="utf-8")

    @classmethod
    def read(cls, folder: str | Path) -> "RunRecord":
        """Read the record of an output folder.

        Raises:
            CalibrantError: there is no record, or this version cannot read it.
        """
        return _read(Path(folder) / RECORD_NAME, cls)


def keep_proof(folder: Path, proof: Proof) -> None:
    """Put ``proof`` into the record and the model card of ``folder``, in place of earlier ones of that engine.

    Raises:
        CalibrantError: there is no record, or this version cannot read it.
    """
    record = RunRecord.read(folder)
    others = [one for one in record.proofs if one.engine != proof.engine]
    kept = record.model_copy(update={"proofs": sorted([*others, proof], key=lambda one: one.engine)})
    kept.write(folder)
    (folder / "README.md").write_text(model_card(kept.as_dict()), encoding="utf-8")


def _read(file: Path, kind: type[_Kind]) -> _Kind:
    try:
        return TypeAdapter(kind).validate_python(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        said = "keys are missing or wrong" if isinstance(error, ValidationError) else first_line(error)
        raise CalibrantError(f"{file}: no record that calibrant {__version__} reads ({said})") from error


def made_by(folder: ModelFolder) -> MadeBy | None:
    """The compression that produced ``folder``; None if the folder has no record of ours.

    Raises:
        CalibrantError: the record is of another version, so whether the model is quantized is not known.
    """
    file = folder.path / RECORD_NAME
    if not file.is_file():
        return None
    try:
        record = RunRecord.read(folder.path)
    except CalibrantError:
        if b'"calibrant_version"' in file.read_bytes():
            raise
        return None
    return MadeBy(record.recipe.name, record.recipe.scheme.weights is not None, sha256_file(file))


def make_record(
    model: LazyModel,
    plan: Plan,
    calibration: CalibrationSet | None,
    settings: Settings,
    layers: list[LayerReport],
    notes: list[str],
    *,
    budget: SpentBudget | None,
    structure: Pruned | None,
    training: Trained | None,
) -> RunRecord:
    """Make the record of a run of ``plan`` on ``model``, before its files are listed."""
    return RunRecord(
        calibrant_version=__version__,
        recipe=plan.recipe,
        format=format_for(plan.target.layout).name if plan.target.layout else "dense",
        model={"name": model.folder.name, **model.folder.identity},
        made_by=made_by(model.folder),
        generator=_generator(model, plan),
        calibration=calibration.manifest if calibration is not None else None,
        settings=settings.recorded(),
        libraries=library_versions(),
        share=compressed_share(plan, layers),
        layers=layers,
        notes=notes,
        budget=budget,
        structure=structure,
        training=training,
    )


def compressed_share(plan: Plan, layers: list[LayerReport]) -> float:
    """Share of the blocks' weights in the solved ``layers``, or in the plan if no layer was solved one by one."""
    blocks = [layer.elements for layer in layers if plan.head is None or layer.name != plan.head.name]
    return plan.share_of(sum(blocks)) if blocks else plan.share


def run_identity(
    model: LazyModel, plan: Plan, calibration: dict[str, Any] | None, settings: Settings
) -> dict[str, Any]:
    """Everything that determines the result of a run; ``calibration`` describes the set that it uses."""
    spec = plan.target.spec
    return {
        "calibration": calibration,
        "calibrant_version": __version__,
        "recipe": plan.recipe.model_dump(),
        "scale_dtype": str(spec.scale_dtype) if spec is not None else None,
        "format": plan.target.layout.format if plan.target.layout is not None else None,
        "model": model.folder.identity,
        "generator": _generator(model, plan),
        "settings": settings.recorded().model_dump(),
        "libraries": library_versions(),
    }


def _generator(model: LazyModel, plan: Plan) -> dict[str, str] | None:
    """Identity of the other model that a training uses as its generator, if any."""
    training = plan.recipe.training
    return generator_identity(model.folder, training) if training is not None else None


def library_versions() -> dict[str, str]:
    """Versions of the libraries whose arithmetic or formats affect a result."""
    return {name: metadata.version(name) for name in ("torch", "transformers", "safetensors", "numba", "numpy")}


@dataclass(frozen=True)
class RunReport:
    """Result and cost of a run.

    ``share`` of the blocks' weights was compressed; ``seconds`` are by stage; ``peak_memory_bytes`` is that of the
    process so far. ``rank_seconds`` are those of every rank, where there are several.
    """

    output: Path
    recipe: str
    share: float
    layers: list[LayerReport]
    notes: list[str]
    seconds: dict[str, float]
    peak_memory_bytes: int
    bytes_before: int
    bytes_after: int
    tensors_verified: int
    rank_seconds: list[dict[str, float]] = field(default_factory=list)

    @property
    def fallbacks(self) -> list[LayerReport]:
        """Layers that the solver could not solve as asked and solved another way."""
        return [layer for layer in self.layers if layer.record.fallback is not None]

    def as_dict(self) -> dict[str, Any]:
        """As plain values, with the output's name instead of its path."""
        return {**asdict(self), "output": self.output.name}

    def write(self, folder: Path) -> None:
        """Write ``report.json`` into ``folder``."""
        (folder / REPORT_NAME).write_text(canonical_json(self.as_dict()), encoding="utf-8")

    @classmethod
    def read(cls, folder: str | Path) -> "RunReport":
        """Read the report of an output folder.

        Raises:
            CalibrantError: there is no report, or this version cannot read it.
        """
        return replace(_read(Path(folder) / REPORT_NAME, cls), output=Path(folder))
