"""How sequences that begin alike share a forward pass: groups with a common prefix, in batches of like lengths."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# Sharing fewer tokens does not pay for the further pass.
_LEAST_SAVED = 8
# What a batch may waste on rows of other lengths, as a part of its tokens: about what another pass costs.
_WASTED_PART = 64


@dataclass(frozen=True)
class Sequences:
    """Rows that begin with the same ``prefix`` tokens; the prefix ends before the first token that is to be scored."""

    rows: tuple[int, ...]
    prefix: int


def shared_prefixes(inputs: Sequence[Sequence[int]], scored: Sequence[int]) -> list[Sequences]:
    """Divide ``inputs`` into groups that save tokens by computing their common prefix once.

    ``scored`` is the number of last positions of each input whose outputs are needed; they are never in a prefix. A row
    that shares nothing is a group of its own with a prefix of 0.
    """
    groups: list[Sequences] = []
    order = sorted(range(len(inputs)), key=lambda row: (inputs[row], row))
    rows: list[int] = []
    prefix = 0
    for row in order:
        longest = len(inputs[row]) - scored[row]
        common = min(_common(inputs[rows[-1]], inputs[row]), longest, prefix) if rows else 0
        # Joining computes ``common`` once instead of once more; what the group's prefix loses is computed for each row.
        saved = common - (prefix - common) * (len(rows) - 1)
        if rows and saved >= _LEAST_SAVED:
            rows.append(row)
            prefix = common
            continue
        if rows:
            groups.append(_group(rows, prefix))
        rows, prefix = [row], longest
    if rows:
        groups.append(_group(rows, prefix))
    return groups


def _group(rows: list[int], prefix: int) -> Sequences:
    return Sequences(tuple(rows), prefix if len(rows) > 1 else 0)


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    length = min(len(first), len(second))
    if first[:length] == second[:length]:
        return length
    return next(index for index in range(length) if first[index] != second[index])


def batches(lengths: Sequence[int], most_tokens: int, weights: Sequence[int] | None = None) -> Iterator[list[int]]:
    """Indices of ``lengths`` in batches, longest first, that compute at most ``most_tokens`` (at least one row each).

    A batch ends where the rows' differences to the longest, each ``weights`` times (1 by default), would add up to more
    than another pass costs.
    """
    batch: list[int] = []
    waste = 0
    for index in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        longest = lengths[batch[0]] if batch else 0
        more = (longest - lengths[index]) * (weights[index] if weights else 1)
        if batch and ((len(batch) + 1) * longest > most_tokens or waste + more > most_tokens // _WASTED_PART):
            yield batch
            batch, waste, more = [], 0, 0
        batch.append(index)
        waste += more
    if batch:
        yield batch
