"""Mean squares of every layer's input in the original model, gathered block by block."""

from dataclasses import dataclass, field

import torch

from calibrant.calibration.calibration_set import CalibrationSet
from calibrant.compression.block_engine import Unit, two_passes
from calibrant.compression.entry import enter_blocks
from calibrant.compression.statistics import ColumnNorm
from calibrant.errors import CalibrantError
from calibrant.modeling.lazy_model import LazyModel
from calibrant.modeling.structure import Experts, probe_block
from calibrant.progress import Progress

_MICRO_BATCH_TOKENS = 2048


@dataclass
class _Gathering:
    """A ``Visitor`` that takes note and changes nothing."""

    prefix: str
    found: dict[str, ColumnNorm] = field(default_factory=dict)

    def add(self, unit: Unit, inputs: torch.Tensor, originals: torch.Tensor | None = None) -> None:
        first = f"{self.prefix}.{unit[0].name}"
        if first not in self.found:
            norm = ColumnNorm(unit[0].in_features, inputs.device)
            self.found |= {f"{self.prefix}.{linear.name}": norm for linear in unit}
        self.found[first].add(inputs)

    def solve(self, unit: Unit) -> None:
        pass


@torch.inference_mode()
def input_norms(
    model: LazyModel, blocks: list[str], calibration: CalibrationSet, progress: Progress
) -> dict[str, ColumnNorm]:
    """Sums of squared inputs of every linear in ``blocks`` by module name; layers that share an input share theirs.

    Raises:
        CalibrantError: a block holds fused experts, whose layers have no names of their own.
    """
    probe, batches = enter_blocks(model, blocks, calibration, model.dtype, model.device, _MICRO_BATCH_TOKENS)
    found: dict[str, ColumnNorm] = {}
    with progress.task("gathering", len(blocks)) as task:
        for index, prefix in enumerate(blocks):
            with model.loaded(prefix) as block:
                structure = probe_block(block, index, probe)
                if any(isinstance(stage, Experts) for stage in structure.stages):
                    raise CalibrantError(f"{prefix}: importance matrices of fused experts are not written")
                gathering = _Gathering(prefix)
                outputs = two_passes(block, index, structure, batches, gathering, propagate=False)
            for batch, hidden in zip(batches, outputs, strict=True):
                batch.hidden = hidden
            found |= gathering.found
            task.advance()
    return found
