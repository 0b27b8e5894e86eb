"""Calibration sets mixed from others, whatever made those: a model's own text beside web text, say."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from calibrant.calibration.calibration_set import EMPTY_ROWS, CalibrationSet, Manifest, Segment
from calibrant.calibration.selection.request import check_weights
from calibrant.errors import CalibrantError
from calibrant.randomness import make_rng

STRATEGY = "mix"
# What says how a set was made; its rows' segments go to the rows of the mix.
_NOT_RECORDED = {"format_version", "rows", "versions"}


def mix_sets(
    sets: Sequence[CalibrationSet | str | Path],
    *,
    weights: Sequence[float] | None = None,
    samples: int | None = None,
    seed: int | None = None,
) -> CalibrationSet:
    """Mix the rows of several calibration sets into one set.

    Rows take turns: every row comes from the set that is furthest behind its share, so the first rows of a mix are a
    mix too, and smaller mixes are the first rows of larger ones. The manifest's ``parameters`` say of every set its
    share, how many of its rows are in the mix, and its manifest with its hash; a segment's document begins with the
    number of its set.

    Args:
        sets: at least two sets, or their folders, of one tokenizer and one length.
        weights: shares of the sets, equal by default.
        samples: number of rows; by default all until a set whose turn it is has no further row.
        seed: takes the rows of each set in random order; by default in their own.

    Raises:
        CalibrantError: a set cannot be read, is named twice or does not fit the first, or the sets have too few rows.
    """
    names = [f"set {index + 1}" if isinstance(one, CalibrationSet) else str(one) for index, one in enumerate(sets)]
    opened = [one if isinstance(one, CalibrationSet) else CalibrationSet.load(one) for one in sets]
    _check_alike(opened, names)
    shares = _shares(weights, len(opened))
    if samples is not None and samples < 1:
        raise CalibrantError(f"{samples} samples: a mix needs at least 1; use another number of `samples`")
    places = _places(shares, [one.manifest.samples for one in opened], samples, names)
    orders = [_order(one.manifest.samples, index, seed) for index, one in enumerate(opened)]
    rows = [(index, orders[index][row]) for index, row in places]
    parameters = {
        "order": "as they are" if seed is None else "random",
        "sets": [
            {
                "share": share,
                "rows": sum(place[0] == index for place in places),
                "manifest": one.manifest.model_dump(mode="json", exclude=_NOT_RECORDED),
            }
            for index, (share, one) in enumerate(zip(shares, opened, strict=True))
        ],
    }
    return _of_rows(opened, rows, STRATEGY, parameters, seed or 0)


def joined_rows(
    parts: Sequence[tuple[CalibrationSet, Sequence[int]]], strategy: str, parameters: dict[str, Any]
) -> CalibrationSet:
    """The chosen rows of each set, one set after the other, of one tokenizer and length.

    The manifest has the ``strategy``, its ``parameters``, and for each set its rows and its manifest.
    """
    sets = [one for one, _ in parts]
    described = [
        {"rows": list(rows), "manifest": one.manifest.model_dump(mode="json", exclude=_NOT_RECORDED)}
        for one, rows in parts
    ]
    rows = [(index, row) for index, (_, chosen) in enumerate(parts) for row in chosen]
    return _of_rows(sets, rows, strategy, {**parameters, "sets": described}, 0)


def _of_rows(
    sets: Sequence[CalibrationSet],
    rows: Sequence[tuple[int, int]],
    strategy: str,
    parameters: dict[str, Any],
    seed: int,
) -> CalibrationSet:
    """A set of ``rows``, pairs of a set's number and a row."""
    mask = torch.stack([sets[index].mask[row] for index, row in rows])
    empty = int((~mask.any(1)).sum())
    first = sets[0].manifest
    files = {one.manifest.tokenizer_files_sha256 for one in sets}
    manifest = Manifest(
        strategy=strategy,
        parameters=parameters,
        seed=seed,
        draw=0,
        samples=len(rows),
        length=first.length,
        tokenizer_sha256=first.tokenizer_sha256,
        tokenizer_files_sha256=first.tokenizer_files_sha256 if len(files) == 1 else None,
        rows=[_segments(sets[index].manifest, index, row) for index, row in rows],
        counts={EMPTY_ROWS: empty} if empty else {},
    )
    tokens = torch.stack([sets[index].tokens[row] for index, row in rows])
    return CalibrationSet.build(tokens, mask, manifest).with_origin(None, [])


def _check_alike(sets: Sequence[CalibrationSet], names: Sequence[str]) -> None:
    if len(sets) < 2:
        raise CalibrantError(f"a mix is of at least two sets, {len(sets)} given; name more")
    first = sets[0].manifest
    seen = {first.set_sha256: names[0]}
    for name, one in zip(names[1:], sets[1:], strict=True):
        other = one.manifest
        if other.length != first.length:
            raise CalibrantError(
                f"{name}: has rows of {other.length} tokens, {names[0]} of {first.length}; make them of one length"
            )
        if other.tokenizer_sha256 != first.tokenizer_sha256:
            raise CalibrantError(
                f"{name}: was made with another tokenizer than {names[0]}, or with one that it does not name; make "
                "both with the tokenizer of one model"
            )
        if other.set_sha256 in seen:
            raise CalibrantError(f"{name}: is the same set as {seen[other.set_sha256]}; name each set once")
        seen[other.set_sha256] = name


def _shares(weights: Sequence[float] | None, count: int) -> list[float]:
    """Shares of ``count`` sets, which add up to 1."""
    given = tuple(weights) if weights is not None else (1.0,) * count
    if len(given) != count:
        raise CalibrantError(f"{len(given)} weights for {count} sets; give one for each with `weights`")
    try:
        check_weights(given)
    except ValueError as error:
        raise CalibrantError(f"weights {list(given)}: {error}") from error
    return [weight / sum(given) for weight in given]


def _places(
    shares: Sequence[float], available: Sequence[int], samples: int | None, names: Sequence[str]
) -> list[tuple[int, int]]:
    """Set and row of every row of the mix."""
    taken = [0] * len(shares)
    places: list[tuple[int, int]] = []
    for index in _turns(shares):
        if len(places) == samples:
            break
        if taken[index] == available[index]:
            if samples is None:
                break
            raise CalibrantError(
                f"{names[index]}: its {available[index]} rows are used up after {len(places)} rows of the mix, "
                f"{samples} are wanted; use `samples={len(places)}` or fewer, other `weights`, or a larger set"
            )
        places.append((index, taken[index]))
        taken[index] += 1
    return places


def _turns(shares: Sequence[float]) -> Iterator[int]:
    """Endlessly, the set that is furthest behind its share; ties go to the first."""
    behind = np.zeros(len(shares))
    while True:
        behind += shares
        # Sums of equal shares differ in their last bits.
        index = int(np.argmax(np.round(behind, 9)))
        behind[index] -= 1
        yield index


def _order(rows: int, index: int, seed: int | None) -> list[int]:
    return list(range(rows)) if seed is None else make_rng(seed, STRATEGY, index).permutation(rows).tolist()


def _segments(manifest: Manifest, index: int, row: int) -> list[Segment]:
    found = manifest.rows[row] if manifest.rows else []
    return [one.model_copy(update={"document": f"{index}/{one.document}"}) for one in found]
