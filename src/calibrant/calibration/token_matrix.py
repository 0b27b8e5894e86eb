"""Token ids and masks as tensors, from the forms in which users have them."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from calibrant.errors import CalibrantError, first_line

_INT32 = torch.iinfo(torch.int32)


def token_matrix(ids: Any, mask: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids int32 ``[rows, length]`` and a mask of the same shape, bool; see ``CalibrationSet.from_tokens``.

    Raises:
        CalibrantError: ids or mask have another shape or dtype, ids are negative, or no token counts.
    """
    if isinstance(ids, torch.Tensor | np.ndarray) or _is_nested_list(ids):
        tokens = _integers(ids)
        if tokens.ndim != 2:
            raise CalibrantError(f"token ids have shape {list(tokens.shape)}; they need two dimensions, [rows, length]")
        counted = torch.ones_like(tokens, dtype=torch.bool) if mask is None else _mask(mask, tokens)
    elif mask is not None:
        raise CalibrantError('leave out `mask` for batches: their "attention_mask" says which tokens are padding')
    else:
        tokens, counted = _padded(_rows_of_batches(ids))
    if tokens.numel() == 0 or tokens.shape[1] < 2:
        raise CalibrantError(f"token ids have shape {list(tokens.shape)}; need at least 1 row of 2 tokens")
    if int(tokens.min()) < 0 or int(tokens.max()) > _INT32.max:
        raise CalibrantError(f"token ids range from {tokens.min()} to {tokens.max()}; need 0 to {_INT32.max}")
    if not bool(counted.any()):
        raise CalibrantError("the mask leaves no token of the set; at least one has to count")
    return tokens.to(torch.int32), counted


def _is_nested_list(ids: Any) -> bool:
    # The default collation of a tensor data set makes lists of tensors, which are batches.
    return isinstance(ids, list | tuple) and all(
        isinstance(row, list | tuple) and not isinstance(next(iter(row), None), torch.Tensor | np.ndarray)
        for row in ids
    )


def _integers(values: Any) -> torch.Tensor:
    """``values`` as int64 on the CPU."""
    lengths = {len(row) for row in values if isinstance(row, list | tuple)} if isinstance(values, list | tuple) else ()
    if len(lengths) > 1:
        raise CalibrantError(
            f"rows have {min(lengths)} to {max(lengths)} token ids: pad them to one length "
            "and leave the padding out in `mask`"
        )
    try:
        found = torch.as_tensor(values).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise CalibrantError(f"token ids need to be integers ({first_line(error)})") from error
    if found.numel() and (found.is_floating_point() or found.is_complex() or found.dtype == torch.bool):
        raise CalibrantError(f"token ids need to be integers, not {str(found.dtype).removeprefix('torch.')}")
    return found.to(torch.int64)


def _mask(values: Any, tokens: torch.Tensor) -> torch.Tensor:
    try:
        found = torch.as_tensor(values).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise CalibrantError(f"a mask needs to be true or false for every token ({first_line(error)})") from error
    if found.shape != tokens.shape:
        raise CalibrantError(f"a mask has shape {list(found.shape)}, its token ids have {list(tokens.shape)}")
    return found.to(torch.bool)


def _rows_of_batches(batches: Any) -> list[torch.Tensor]:
    """Every row's tokens without padding, int64."""
    if isinstance(batches, str | bytes) or not isinstance(batches, Iterable):
        raise CalibrantError(f"token ids need to be a tensor, rows or batches, got {type(batches).__name__}")
    rows = []
    for batch in [batches] if isinstance(batches, Mapping) else batches:
        if isinstance(batch, Mapping) and "input_ids" not in batch:
            raise CalibrantError(f'a batch needs "input_ids" (found: {", ".join(map(str, batch))})')
        only = batch[0] if isinstance(batch, list | tuple) and len(batch) == 1 else batch
        ids = _split(batch["input_ids"] if isinstance(batch, Mapping) else only)
        given = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        attended = [None] * len(ids) if given is None else _split(given)
        if len(attended) != len(ids):
            raise CalibrantError(f"an attention mask has {len(attended)} rows, its token ids have {len(ids)}")
        for row, kept in zip(ids, attended, strict=True):
            tokens = _integers(row)
            if tokens.ndim != 1:
                raise CalibrantError(f"a batch has a row of shape {list(tokens.shape)}; rows need one dimension")
            rows.append(tokens if kept is None else tokens[_mask(kept, tokens)])
    return rows


def _split(values: Any) -> list[Any]:
    """The rows of ``values``, which may be a single row."""
    if isinstance(values, torch.Tensor | np.ndarray):
        return [values] if values.ndim < 2 else list(values)
    if not isinstance(values, list | tuple):
        raise CalibrantError(f"a batch needs to be a tensor, rows or a dict of them, got {type(values).__name__}")
    return list(values) if isinstance(next(iter(values), None), list | tuple | torch.Tensor | np.ndarray) else [values]


def _padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows below one another, padded at the end, and a mask that leaves the padding out."""
    if not rows:
        return torch.empty((0, 0), dtype=torch.int64), torch.empty((0, 0), dtype=torch.bool)
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return tokens, torch.arange(tokens.shape[1]) < lengths[:, None]
