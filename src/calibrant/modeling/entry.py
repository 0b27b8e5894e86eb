"""Token rows on their way to block 0: micro-batches, embedded, with the further arguments of every block."""

from collections.abc import Callable, Iterator

import torch

from calibrant.errors import CalibrantError
from calibrant.modeling.activations import use_fast_activations
from calibrant.modeling.attention import use_fast_attention
from calibrant.modeling.inputs import BlockCalls, MicroBatch, record_inputs
from calibrant.modeling.lazy_model import LazyModel
from calibrant.modeling.linears import use_fast_linears
from calibrant.modeling.norms import use_fast_norms
from calibrant.modeling.token_rows import TokenRows
from calibrant.ranks import ALONE, Ranks

MICRO_BATCH_TOKENS = 2048
_PROBE_TOKENS = 16


def enter_blocks(
    model: LazyModel,
    blocks: list[str],
    rows: TokenRows | None,
    dtype: torch.dtype,
    add: Callable[[MicroBatch], None],
    with_original: bool = False,
    ranks: Ranks = ALONE,
) -> MicroBatch:
    """A tiny batch to probe structure with; ``add`` gets ``rows`` as micro-batches that enter block 0, in ``dtype``.

    ``with_original`` gives each batch a second copy of its hidden states, for the original model. Each of ``ranks``
    gets some of the batches.

    Raises:
        CalibrantError: no token of ``rows`` counts, there are more ranks than micro-batches, or the model does not call
            its blocks one after the other.
    """
    device = model.device
    use_fast_attention(model.module, dtype, device)
    use_fast_norms(model.module, dtype, device)
    use_fast_activations(model.module, dtype, device)
    use_fast_linears(model.module, dtype, device)
    model.load_outside(blocks)
    model.cast("", dtype)
    tokens = torch.arange(_PROBE_TOKENS, device=device)[None] % model.folder.vocabulary
    hidden, calls = record_inputs(model.module, blocks, tokens)
    probe = MicroBatch(hidden, torch.ones_like(tokens, dtype=torch.bool), calls)
    known: dict[torch.Size, BlockCalls] = {}
    for ids, mask in _micro_batches(rows, ranks) if rows is not None else ():
        hidden, calls = record_inputs(model.module, blocks, ids.to(device))
        # Masks and positions are mostly the same for every batch of a shape; keep one copy.
        first = known.setdefault(ids.shape, calls)
        calls = first if first.same_as(calls) else calls
        original = hidden.clone() if with_original else None  # the engine frees hidden states after their last use
        add(MicroBatch(hidden, mask.to(device), calls, original))
    model.drop(model.module)
    return probe


def _micro_batches(rows: TokenRows, ranks: Ranks) -> Iterator[TokenRows]:
    """This rank's micro-batches: rows of equal counted length together, cut after their last counted token.

    In a causal model later tokens change nothing before them, so cutting them gives the same statistics and no pad
    token is ever computed; adding padding to a set therefore changes no bit of the result.
    """
    lengths = _counted_lengths(rows.counted)
    if not any(lengths):
        raise CalibrantError("the mask counts no token")
    batches = rows_together(rows.counted)
    check_ranks(len(batches), ranks)
    for chosen in batches[ranks.part(len(batches))]:
        length = lengths[chosen[0]]
        yield TokenRows(rows.ids[chosen, :length].long(), rows.counted[chosen, :length])


def check_ranks(batches: int, ranks: Ranks) -> None:
    """Check that each of ``ranks`` gets some of so many micro-batches.

    Raises:
        CalibrantError: there are more ranks.
    """
    if batches < ranks.size:
        raise CalibrantError(
            f"{ranks.size} ranks for {batches} batches of {MICRO_BATCH_TOKENS} tokens in rows of one length; start "
            "fewer processes, or take more samples"
        )


def micro_batch_rows(length: int) -> int:
    """Rows of ``length`` tokens in a micro-batch, at most."""
    return max(1, MICRO_BATCH_TOKENS // length)


def rows_together(counted: torch.Tensor) -> list[list[int]]:
    """Numbers of the rows of each micro-batch; ``counted`` is that of ``TokenRows``."""
    by_length: dict[int, list[int]] = {}
    for row, length in enumerate(_counted_lengths(counted)):
        if length:
            by_length.setdefault(length, []).append(row)
    found = []
    for length, numbers in by_length.items():
        size = micro_batch_rows(length)
        found += [numbers[begin : begin + size] for begin in range(0, len(numbers), size)]
    return found


def _counted_lengths(counted: torch.Tensor) -> list[int]:
    """Tokens of each row up to the last one that counts."""
    padding = counted.flip(1).to(torch.int8).argmax(1)
    lengths: list[int] = torch.where(counted.any(1), counted.shape[1] - padding, 0).tolist()
    return lengths
