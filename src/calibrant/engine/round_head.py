"""Rounding of the output matrix, which no block contains and whose inputs are not observed."""

import torch

from calibrant.engine.block_solver import LayerReport
from calibrant.formats.quantized import Codes
from calibrant.kernels.grid_rounding import round_to_grid
from calibrant.methods.solvers.result import SolverRecord
from calibrant.modeling.lazy_model import LazyModel
from calibrant.progress import Progress
from calibrant.quantization.grid_fitting import fit_grid
from calibrant.recipes.plan import HeadPlan

# Searches of ranges hold several copies of the rows that they look at.
_ROWS = 4096


def round_head(model: LazyModel, head: HeadPlan, progress: Progress) -> tuple[Codes, LayerReport]:
    """The output matrix rounded to nearest (ours: on the set, its inputs are not looked at)."""
    spec = head.layer.target.spec
    assert spec is not None
    weight = model.folder.read(model.stored_name(f"{head.name}.weight"))
    parts: list[Codes] = []
    error = total = 0.0
    with progress.task("rounding the output matrix", len(weight), "rows") as task:
        for stored in weight.split(_ROWS):
            rows = stored.to(model.device).float()
            grid = fit_grid(rows, spec)
            codes, values = round_to_grid(rows, grid.scale, grid.zero_point, spec.numbers)
            error += float((values - rows).square().sum(dtype=torch.float64))
            total += float(rows.square().sum(dtype=torch.float64))
            parts.append(Codes(codes.cpu(), **grid.stored(slice(None))))
            task.advance(len(rows))
    relative = error / total if total else 0.0
    report = LayerReport(head.name, relative, "weights", 0, 0, weight.numel(), spec.bits, SolverRecord())
    return Codes.stacked(parts), report
