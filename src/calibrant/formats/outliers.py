"""Weights that a method keeps exactly, listed beside a model that is stored dense: compressed sparse rows."""

import torch

# The folder of that file, in a model's.
OUTLIERS = "outliers"


def sparse_part(layer: str, weight: torch.Tensor, exact: torch.Tensor) -> dict[str, torch.Tensor]:
    """The ``exact`` entries (bool) of ``weight`` (float32, both ``[out, in]``) under the names of ``layer``.

    ``row_offsets`` int64 ``[out + 1]``: those of row r lie from ``row_offsets[r]`` to before ``row_offsets[r + 1]``;
    ``columns`` int32 and ``values`` float32 ``[count]``, columns ascending in a row.
    """
    counts = exact.sum(1)
    return {
        f"{layer}.row_offsets": torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]),
        f"{layer}.columns": exact.nonzero()[:, 1].int(),
        f"{layer}.values": weight[exact],
    }
