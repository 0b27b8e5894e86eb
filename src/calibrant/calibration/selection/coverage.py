"""Greedy maximum coverage: pick the sets that together contain the most different members."""

import tempfile
import weakref
from array import array
from collections.abc import Callable
from dataclasses import dataclass

import numba
import numpy as np

# Sets that one thread evaluates at a time.
_BLOCK = 4096
# Gain of a set that was picked already.
_TAKEN = -1


@dataclass(frozen=True)
class Picks:
    """``chosen`` indices in the order they were picked; ``covered[i]`` members are covered after pick ``i``."""

    chosen: np.ndarray
    covered: np.ndarray


class SetFamily:
    """Many small sets of integers below ``universe``, kept in a temporary file with 8 bytes of memory per set."""

    def __init__(self, universe: int) -> None:
        self.universe = universe
        self._dtype = np.dtype(np.uint16 if universe <= 1 << 16 else np.uint32)
        self._file = tempfile.TemporaryFile(prefix="calibrant-sets-")  # noqa: SIM115  # lives as long as the family
        weakref.finalize(self, self._file.close)
        self._bounds = array("q", [0])

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def append(self, members: np.ndarray, sizes: np.ndarray) -> None:
        """Add sets.

        Args:
            members: the sets' members, one set after the other; those of one set differ.
            sizes: number of members of every set.
        """
        members.astype(self._dtype, copy=False).tofile(self._file)
        last = self._bounds[-1]
        self._bounds.extend((last + np.cumsum(sizes, dtype=np.int64)).tolist())

    @property
    def bounds(self) -> np.ndarray:
        """Set ``i`` is ``members[bounds[i] : bounds[i + 1]]``; int64 ``[sets + 1]``."""
        return np.frombuffer(self._bounds, dtype=np.int64)

    @property
    def members(self) -> np.ndarray:
        """All members, mapped from the file."""
        self._file.flush()
        if self._bounds[-1] == 0:
            return np.empty(0, dtype=self._dtype)
        return np.memmap(self._file, dtype=self._dtype, mode="r", shape=(self._bounds[-1],))


def greedy_cover(family: SetFamily, count: int) -> Picks:
    """Pick ``count`` sets, each time the one with the largest gain; ties go to the larger set, then to the lower index.

    Lazy evaluation (Minoux 1978): gains only shrink while other sets are picked, so an old gain is an upper bound, and
    only sets whose old gain beats the best current one are evaluated again. The result is that of evaluating all sets.
    It covers at least 1 - 1/e of what the best ``count`` sets cover (Nemhauser et al. 1978).
    """
    bounds, members, sizes = family.bounds, family.members, np.diff(family.bounds)
    covered = np.zeros(family.universe, dtype=np.bool_)
    gains = sizes.copy()
    chosen, totals, total = [], [], 0
    for _ in range(min(count, len(family))):
        first = int(np.argmax(gains))
        gains[first] = _gain(bounds, members, first, covered)
        picked = int(_best(bounds, members, covered, gains, sizes, first))
        total += int(gains[picked])
        gains[picked] = _TAKEN
        covered[members[bounds[picked] : bounds[picked + 1]]] = True
        chosen.append(picked)
        totals.append(total)
    return Picks(np.array(chosen, dtype=np.int64), np.array(totals, dtype=np.int64))


def pooled_cover(family: SetFamily, count: int, pool: int, rng: np.random.Generator) -> Picks:
    """Like ``greedy_cover``, but every pick considers ``pool`` sets, drawn without replacement from those left.

    As in the released code of ZipCal (arXiv 2603.16105); with at most ``pool`` sets left, all are considered.
    """
    bounds, members, sizes = family.bounds, family.members, np.diff(family.bounds)
    covered = np.zeros(family.universe, dtype=np.bool_)
    remaining = np.arange(len(family))
    chosen, totals, total = [], [], 0
    for _ in range(min(count, len(family))):
        drawn = np.sort(rng.choice(len(remaining), pool, replace=False)) if len(remaining) > pool else None
        candidates = remaining if drawn is None else remaining[drawn]
        gains = _gains(bounds, members, candidates, covered)
        place = int(np.lexsort((candidates, -sizes[candidates], -gains))[0])
        picked = candidates[place]
        covered[members[bounds[picked] : bounds[picked + 1]]] = True
        remaining = np.delete(remaining, place if drawn is None else drawn[place])
        total += int(gains[place])
        chosen.append(picked)
        totals.append(total)
    return Picks(np.array(chosen, dtype=np.int64), np.array(totals, dtype=np.int64))


@numba.njit(cache=True)
def _gain(bounds: np.ndarray, members: np.ndarray, index: int, covered: np.ndarray) -> int:
    gain = 0
    for place in range(bounds[index], bounds[index + 1]):
        gain += not covered[members[place]]
    return gain


@numba.njit(cache=True)
def _gains(bounds: np.ndarray, members: np.ndarray, candidates: np.ndarray, covered: np.ndarray) -> np.ndarray:
    return np.array([_gain(bounds, members, index, covered) for index in candidates], dtype=np.int64)


@numba.njit(cache=True)
def _leads(left: int, right: int, gains: np.ndarray, sizes: np.ndarray) -> bool:
    if gains[left] != gains[right]:
        return bool(gains[left] > gains[right])
    if sizes[left] != sizes[right]:
        return bool(sizes[left] > sizes[right])
    return left < right


def _best_of_all(
    bounds: np.ndarray, members: np.ndarray, covered: np.ndarray, gains: np.ndarray, sizes: np.ndarray, first: int
) -> int:
    """The set with the largest gain; ``gains`` are upper bounds, updated where they beat the gain of ``first``."""
    blocks = (len(gains) + _BLOCK - 1) // _BLOCK
    leaders = np.empty(blocks, dtype=np.int64)
    for block in numba.prange(blocks):
        leader = first
        for index in range(block * _BLOCK, min((block + 1) * _BLOCK, len(gains))):
            if _leads(index, leader, gains, sizes):
                gains[index] = _gain(bounds, members, index, covered)
                if _leads(index, leader, gains, sizes):
                    leader = index
        leaders[block] = leader
    best = first
    for block in range(blocks):
        if _leads(leaders[block], best, gains, sizes):
            best = leaders[block]
    return best


_best: Callable[..., int] = numba.njit(parallel=True, cache=True)(_best_of_all)
