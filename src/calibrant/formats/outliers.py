"""Outlier weights that a method keeps exact, in compressed sparse rows beside a model that is stored dense."""

import torch

# The subfolder of a model folder that contains the outliers.
OUTLIERS = "outliers"


def sparse_part(layer: str, weight: torch.Tensor, exact: torch.Tensor) -> dict[str, torch.Tensor]:
    """Entries of ``weight`` (float32) selected by ``exact`` (bool), both ``[out, in]``, as tensors of ``layer``.

    ``row_offsets`` int64 ``[out + 1]``: row r has the entries from ``row_offsets[r]`` up to, not including,
    ``row_offsets[r + 1]``. ``columns`` int32 and ``values`` float32 ``[entries]``; columns ascend within a row.
    """
    counts = exact.sum(1)
    return {
        f"{layer}.row_offsets": torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]),
        f"{layer}.columns": exact.nonzero()[:, 1].int(),
        f"{layer}.values": weight[exact],
    }
