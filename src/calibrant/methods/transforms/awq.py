"""AWQ's channel scales: candidates are powers of the mean input magnitude (arXiv 2306.00978)."""

from collections.abc import Callable, Iterator

import torch

_SMALLEST = 1e-4


def awq_candidates(
    input_mean: torch.Tensor, weights: list[torch.Tensor], steps: int, duo: bool, group_size: int | None
) -> Iterator[torch.Tensor]:
    """Scales, float32 ``[in]``: the identity, then ``a^r``, or with ``duo`` ``a^r / w^(1 - r)``, for r = i / steps.

    ``input_mean`` a ``[in]`` is the mean magnitude of the inputs; w is the mean over the rows of ``weights``
    (each ``[out, in]``) of ``|W|`` relative to the group's maximum (AutoAWQ's "duo scaling"). Scales are divided by
    ``sqrt(max min)``, which keeps weights in range and changes no result. A channel whose input is always 0 gets the
    smallest scale of the others, so that its weights widen no range (ours; with the released code's 1e-4 the division
    would make all other scales large).
    """
    yield torch.ones_like(input_mean)
    nonzero = input_mean > 0
    if not bool(nonzero.any()):
        return
    relative = _relative_magnitude(weights, group_size) if duo else None
    for step in range(0 if duo else 1, steps):
        ratio = step / steps
        scale = input_mean.pow(ratio)
        if relative is not None:
            scale = scale / (relative.pow(1 - ratio) + _SMALLEST)
        scale = scale.clamp(min=_SMALLEST)
        smallest, largest = scale[nonzero].aminmax()
        yield torch.where(nonzero, scale, smallest) / (smallest * largest).sqrt()


def _relative_magnitude(weights: list[torch.Tensor], group_size: int | None) -> torch.Tensor:
    stacked = torch.cat(weights)
    groups = stacked.abs().view(len(stacked), -1, group_size or stacked.shape[1])
    return (groups / groups.amax(-1, keepdim=True).clamp(min=1e-12)).view_as(stacked).mean(0)


def best_scale(candidates: Iterator[torch.Tensor], loss: Callable[[torch.Tensor], float]) -> torch.Tensor:
    """The candidate with the smallest ``loss``; ties go to the first."""
    return min(candidates, key=loss)
