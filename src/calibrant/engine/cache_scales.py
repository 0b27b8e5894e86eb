"""Scales of quantized keys and values, from the largest ones that counted calibration tokens have."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from calibrant.errors import CalibrantError
from calibrant.formats.kv_cache import KvCacheLayout
from calibrant.modeling.attention_caches import Change, cache_hook, cached_attentions
from calibrant.modeling.block_walk import OpenedBlock
from calibrant.modeling.hooks import hooked
from calibrant.modeling.inputs import RUNNING_MASK
from calibrant.ranks import ALONE, Ranks


@contextmanager
def observed_caches(
    block: OpenedBlock, layout: KvCacheLayout, ranks: Ranks = ALONE
) -> Iterator[dict[str, torch.Tensor]]:
    """Observe the keys and values of every pass, in all ``ranks``, while the context lasts.

    At its end the dict has the scales (float32): ``ATTENTION.k_scale`` and ``ATTENTION.v_scale`` by name in the block.

    Raises:
        CalibrantError: an attention keeps nothing, other positions than the tokens', or values that are not finite.
    """
    attentions = cached_attentions(block.module)
    largest: dict[str, torch.Tensor] = {}
    scales: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Change:
        def seen(keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            for part, tensor in (("k_scale", keys), ("v_scale", values)):
                magnitudes = _of_counted(f"{block.name}.{name}", tensor)
                before = largest.get(f"{name}.{part}", magnitudes)
                largest[f"{name}.{part}"] = torch.maximum(before, magnitudes)
            return keys, values

        return seen

    with hooked(cache_hook(attention, watch(name)) for name, attention in attentions.items()):
        yield scales
    for name in attentions:
        if f"{name}.k_scale" not in largest:
            raise CalibrantError(f"{block.name}.{name}: it keeps no keys and values of its own; leave kv_cache out")
    for name, magnitudes in sorted(largest.items()):
        ranks.largest(magnitudes)
        if not bool(magnitudes.isfinite().all()):
            raise CalibrantError(
                f"{block.name}.{name}: keys or values are not finite; compute in float32 "
                '(`dtype="float32"`) or check the model'
            )
        scales[name] = layout.scales(magnitudes.cpu())


def _of_counted(attention: str, tensor: torch.Tensor) -> torch.Tensor:
    """Largest magnitudes (float32 ``[heads]``) of ``tensor`` ``[rows, heads, length, size]`` at counted tokens."""
    mask = RUNNING_MASK.get()
    if tensor.ndim != 4 or (tensor.shape[0], tensor.shape[2]) != mask.shape:
        raise CalibrantError(
            f"{attention}: keeps keys and values of shape {tuple(tensor.shape)} for tokens of shape "
            f"{tuple(mask.shape)}; leave kv_cache out"
        )
    return tensor.abs().amax(-1).masked_fill(~mask[:, None], 0).amax((0, 2)).float()
