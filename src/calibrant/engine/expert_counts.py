"""How many tokens of each row of a calibration set reach each expert of a mixture."""

import shutil
from pathlib import Path
from typing import Any

import torch

from calibrant.errors import CalibrantError
from calibrant.modeling.block_walk import BlockWalk, OpenedBlock
from calibrant.modeling.entry import rows_together
from calibrant.modeling.hooks import Hook, hooked
from calibrant.modeling.inputs import MicroBatch
from calibrant.modeling.lazy_model import LazyModel
from calibrant.modeling.routing import find_routing
from calibrant.modeling.structure import Experts
from calibrant.modeling.token_rows import TokenRows
from calibrant.progress import Progress


@torch.inference_mode()
def expert_counts(
    model: LazyModel,
    blocks: list[str],
    rows: TokenRows,
    dtype: torch.dtype,
    states: Path | None,
    progress: Progress,
) -> torch.Tensor:
    """Counted tokens by row of ``rows`` and expert, int64 ``[rows, experts of all blocks]``, in the original model.

    ``states`` is a folder for hidden states that memory has no room for, which is removed at the end.

    Raises:
        CalibrantError: the model has no fused experts, or they get no router's choices.
    """
    together = rows_together(rows.counted)
    parts: list[torch.Tensor] = []
    for block in BlockWalk(model, blocks, rows, dtype, states=states).visit("counting tokens of experts", progress):
        for stage in block.structure.stages:
            if isinstance(stage, Experts):
                parts.append(_counts(block, stage, together, len(rows.ids)))
        block.advance()
    if states is not None:
        shutil.rmtree(states)
    if not parts:
        raise CalibrantError(f"{model.folder.path}: has no fused experts; leave `experts` out of the recipe")
    return torch.cat(parts, dim=1)


def _counts(block: OpenedBlock, stage: Experts, together: list[list[int]], rows: int) -> torch.Tensor:
    experts = len(stage.groups[0])
    found = torch.zeros(rows, experts, dtype=torch.int64)

    def counter(batch: MicroBatch, numbers: list[int]) -> Hook:
        def count(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            routing = find_routing((args, kwargs), experts)
            if routing is None or len(routing.index) != batch.mask.numel():
                raise CalibrantError(
                    f"{block.name}.{stage.module}: its experts get no router's choices, so their tokens cannot be "
                    "counted; leave `experts` out of the recipe"
                )
            chosen = routing.index.view(*batch.mask.shape, -1).cpu()
            for number, row, mask in zip(numbers, chosen, batch.mask.cpu(), strict=True):
                found[number] += torch.bincount(row[mask].flatten(), minlength=experts)[:experts]

        return count

    module = block.module.get_submodule(stage.module)
    for batch, numbers in zip(block.batches, together, strict=True):
        with hooked([(module, counter(batch, numbers))]):
            block.run(batch)
    return found


def rows_that_reach(counts: torch.Tensor, have: torch.Tensor, least_tokens: int, most: int) -> list[int]:
    """Up to ``most`` rows of ``counts`` that bring experts with ``have`` tokens to ``least_tokens``, the best first.

    ``counts`` int64 ``[rows, experts]``, ``have`` int64 ``[experts]``. Each row is the one that takes most of what is
    missing (ours: greedy, at least 63 % of the best choice of as many rows).
    """
    chosen: list[int] = []
    have = have.clone()
    left = counts.clone()
    while len(chosen) < most:
        missing = (least_tokens - have).clamp(min=0)
        gains = torch.minimum(left, missing).sum(1)
        best = int(gains.argmax())
        if int(gains[best]) == 0:
            break
        chosen.append(best)
        have += counts[best]
        left[best] = 0
    return chosen
