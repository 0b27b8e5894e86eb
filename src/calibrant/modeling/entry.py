"""A calibration set on its way to block 0: micro-batches of tokens, embedded, with every block's further arguments."""

from collections.abc import Iterator

import torch
from torch import nn

from calibrant.calibration.calibration_set import CalibrationSet
from calibrant.errors import CalibrantError
from calibrant.modeling.activations import use_fast_activations
from calibrant.modeling.attention import use_fast_attention
from calibrant.modeling.inputs import BlockCalls, MicroBatch, record_inputs
from calibrant.modeling.lazy_model import LazyModel
from calibrant.modeling.norms import use_fast_norms

_PROBE_TOKENS = 16


def enter_blocks(
    model: LazyModel,
    blocks: list[str],
    calibration: CalibrationSet | None,
    dtype: torch.dtype,
    device: torch.device,
    micro_batch_tokens: int,
    with_original: bool = False,
) -> tuple[MicroBatch, list[MicroBatch]]:
    """A tiny batch to probe structure with, and the calibration set as it enters block 0."""
    use_fast_attention(model.module, dtype, device)
    use_fast_norms(model.module, dtype, device)
    use_fast_activations(model.module, dtype, device)
    model.load_outside(blocks)
    cast(model.module, dtype)
    vocabulary = model.folder.vocabulary
    tokens = torch.arange(_PROBE_TOKENS, device=device)[None] % vocabulary
    hidden, calls = record_inputs(model.module, blocks, tokens)
    probe = MicroBatch(hidden, torch.ones_like(tokens, dtype=torch.bool), calls)
    batches: list[MicroBatch] = []
    known: dict[torch.Size, BlockCalls] = {}
    for rows, mask in _micro_batches(calibration, micro_batch_tokens) if calibration is not None else ():
        hidden, calls = record_inputs(model.module, blocks, rows.to(device))
        # Masks and positions are mostly the same for every batch of a shape; keep one copy.
        first = known.setdefault(rows.shape, calls)
        calls = first if first.same_as(calls) else calls
        original = hidden.clone() if with_original else None  # the engine frees what it is done with
        batches.append(MicroBatch(hidden, mask.to(device), calls, original))
    model.drop(model.module)
    return probe, batches


def _micro_batches(calibration: CalibrationSet, micro_batch_tokens: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Rows of equal counted length together, cut after their last counted token.

    In a causal model later tokens change nothing before them, so cutting them gives the same statistics and no pad
    token is ever computed; adding padding to a set therefore changes no bit of the result.
    """
    used = calibration.mask.flip(1).to(torch.int8).argmax(1)
    lengths = torch.where(calibration.mask.any(1), calibration.mask.shape[1] - used, 0).tolist()
    if not any(lengths):
        raise CalibrantError("the calibration set's mask counts no token")
    by_length: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        if length:
            by_length.setdefault(length, []).append(row)
    for length, rows in by_length.items():
        size = max(1, micro_batch_tokens // length)
        for begin in range(0, len(rows), size):
            chosen = rows[begin : begin + size]
            yield calibration.tokens[chosen, :length].long(), calibration.mask[chosen, :length]


def cast(module: nn.Module, dtype: torch.dtype, copy: bool = False) -> None:
    """All parameters to ``dtype``; buffers (rotary frequencies) keep theirs."""
    for parameter in module.parameters():
        if parameter.device.type != "meta":
            parameter.data = parameter.data.to(dtype, copy=copy)
