"""What a run says of itself: its settings, everything that determined its result, and what it took."""

import importlib.metadata as metadata
import resource
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from calibrant.calibration.calibration_set import CalibrationSet
from calibrant.engine.block_solver import LayerReport
from calibrant.formats.registry import format_for
from calibrant.modeling.lazy_model import LazyModel
from calibrant.recipes.plan import Plan
from calibrant.training.train_model import generator_identity
from calibrant.version import __version__


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


def report_dict(report: RunReport) -> dict[str, Any]:
    """The report as plain values."""
    return {**asdict(report), "output": report.output.name}


def run_record(
    model: LazyModel,
    plan: Plan,
    calibration: CalibrationSet | None,
    settings: Settings,
    layers: list[LayerReport],
    notes: list[str],
) -> dict[str, Any]:
    """Everything that determined the result and what came out: ``calibrant.json``. No times, no paths."""
    made_by = model.folder.made_by()
    return {
        "calibrant_version": __version__,
        "recipe": plan.recipe.model_dump(),
        "format": format_for(plan.layout).name if plan.layout else "dense",
        "model": {"name": model.folder.name, **model.folder.identity()},
        "made_by": asdict(made_by) if made_by is not None else None,
        "generator": _generator(model, plan),
        "calibration": calibration.manifest.model_dump(exclude={"rows"}) if calibration is not None else None,
        "settings": settings.describe(),
        "libraries": library_versions(),
        "layers": [asdict(layer) for layer in layers],
        "notes": notes,
    }


def training_identity(
    model: LazyModel, plan: Plan, calibration: CalibrationSet | None, settings: Settings
) -> dict[str, Any]:
    """What a training's outcome depends on, but for the set if that is not made yet (None)."""
    known = {"calibration": calibration.sha256} if calibration is not None else {}
    return {
        **known,
        "calibrant_version": __version__,
        "recipe": plan.recipe.model_dump(),
        "scale_dtype": str(plan.spec.scale_dtype) if plan.spec is not None else None,
        "model": model.folder.identity(),
        "generator": _generator(model, plan),
        "settings": settings.describe(),
        "libraries": library_versions(),
    }


def _generator(model: LazyModel, plan: Plan) -> dict[str, str] | None:
    """The other model that a training used."""
    training = plan.recipe.training
    return generator_identity(model.folder, training) if training is not None else None


def library_versions() -> dict[str, str]:
    """Versions of the libraries whose arithmetic or formats shape a result."""
    return {name: metadata.version(name) for name in ("torch", "transformers", "safetensors", "numba", "numpy")}


def peak_memory() -> int:
    """Bytes; macOS counts them, other systems count units of 1,024."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
