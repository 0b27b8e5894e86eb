"""Experts of a mixture that few calibration tokens reach: sentences on them, and rows that reach them."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from calibrant.calibration.calibration_set import CalibrationSet
from calibrant.calibration.mix_sets import joined_rows
from calibrant.engine.block_solver import LayerReport
from calibrant.engine.expert_counts import expert_counts, rows_that_reach
from calibrant.modeling.lazy_model import LazyModel
from calibrant.progress import Progress
from calibrant.recipes.parts import StarvedExperts
from calibrant.wording import and_more

# The model writes so many times the set's rows, from which those that reach experts are chosen (ours).
_POOL = 3
STRATEGY = "experts"


def with_rows_for_experts(
    model: LazyModel,
    blocks: list[str],
    given: CalibrationSet,
    asked: StarvedExperts,
    dtype: torch.dtype,
    write: Callable[[int], CalibrationSet],
    states: Path | None,
    progress: Progress,
) -> CalibrationSet:
    """``given`` with further rows, at most as many again, that bring experts to ``asked.least_tokens`` tokens.

    ``write`` makes a pool of so many rows; it is called only if an expert lacks tokens. ``states`` is a folder for
    hidden states that memory has no room for.

    Raises:
        CalibrantError: the model has no fused experts, or their tokens cannot be counted.
    """
    counts = expert_counts(model, blocks, given.rows, dtype, states, progress).sum(0)
    lacking = int((counts < asked.least_tokens).sum())
    if not lacking:
        return given
    pool = write(_POOL * len(given.tokens))
    of_pool = expert_counts(model, blocks, pool.rows, dtype, states, progress)
    chosen = rows_that_reach(of_pool, counts, asked.least_tokens, len(given.tokens))
    still = int((counts + of_pool[chosen].sum(0) < asked.least_tokens).sum())
    progress.note(
        f"{lacking} of {len(counts)} experts saw fewer than {asked.least_tokens} tokens; {len(chosen)} rows of "
        f"{len(pool.tokens)} further ones were added, with which {still} still do"
    )
    if not chosen:
        return given
    found = {"least_tokens": asked.least_tokens, "lacking_before": lacking, "lacking_after": still}
    return joined_rows([(given, range(len(given.tokens))), (pool, chosen)], STRATEGY, found)


def starved_notes(layers: Sequence[LayerReport], fused: Iterable[str], least_tokens: int) -> list[str]:
    """A sentence on the experts of the ``fused`` parameters that fewer than ``least_tokens`` tokens were routed to."""
    parameters = set(fused)
    experts: dict[str, int] = {}
    for layer in layers:
        parameter, _, expert = layer.name.rpartition(".")
        if parameter in parameters:
            name = f"{parameter.rpartition('.')[0]}.{expert}"
            routed = layer.tokens if layer.routed is None else layer.routed
            experts[name] = min(routed, experts.get(name, routed))
    few = [name for name, tokens in experts.items() if tokens < least_tokens]
    if not few:
        return []
    tokens = "no token" if least_tokens == 1 else f"fewer than {least_tokens} tokens"
    return [
        f"{len(few)} of {len(experts)} experts were reached by {tokens}: {few[0]}{and_more(len(few) - 1, 'expert')}"
    ]
