"""ZipCal: the texts that cover the most normalized sub-words (arXiv 2603.16105, algorithm 1)."""

import numba
import numpy as np

from calibrant.calibration.selection.coverage import Picks, SetFamily, greedy_cover, pooled_cover
from calibrant.calibration.windows import Window
from calibrant.modeling.tokenizer import Tokenizer

_NO_CLASS = -1


class ZipCal:
    """Picks windows by greedy maximum coverage of sub-word classes.

    Every pick considers ``pool`` random windows, as in the released code (2,000), or all if ``pool`` is None. ``rng``
    is only used with a pool.
    """

    def __init__(self, tokenizer: Tokenizer, pool: int | None, rng: np.random.Generator) -> None:
        self._classes = subword_classes(tokenizer)
        self._family = SetFamily(int(self._classes.max(initial=_NO_CLASS)) + 1)
        self._seen = np.zeros(self._family.universe, dtype=np.int64)
        self._stamp = 0
        self._pool, self._rng = pool, rng
        self.covered = 0

    def see(self, windows: list[Window]) -> None:
        """Store the classes of further candidates."""
        lengths = np.array([len(window.tokens) for window in windows], dtype=np.int64)
        tokens = np.empty(int(lengths.sum()), dtype=np.int64)
        place = 0
        for window in windows:
            tokens[place : place + len(window.tokens)] = window.tokens
            place += len(window.tokens)
        members, sizes = _distinct(tokens, lengths, self._classes, self._seen, self._stamp)
        self._stamp += len(windows)
        self._family.append(members, sizes)

    def choose(self, count: int) -> list[int]:
        """See ``Selector``."""
        picks: Picks = (
            greedy_cover(self._family, count)
            if self._pool is None
            else pooled_cover(self._family, count, self._pool, self._rng)
        )
        self.covered = int(picks.covered[-1]) if len(picks.covered) else 0
        return [int(index) for index in picks.chosen]

    def counts(self) -> dict[str, int]:
        """Numbers of classes, and of those that the picks cover."""
        return {"classes": self._family.universe, "classes_covered": self.covered}


def subword_classes(tokenizer: Tokenizer) -> np.ndarray:
    """The class of every token id, int64 ``[ids]``; -1 for special tokens and those that normalize to nothing.

    A class is an id's text in lower case without spaces and "Ġ", stripped (arXiv 2603.16105 and its released code).
    """
    numbers: dict[str, int] = {}
    classes = np.full(tokenizer.size, _NO_CLASS, dtype=np.int64)
    for index, piece in enumerate(tokenizer.pieces()):
        text = piece.lower().replace(" ", "").replace("Ġ", "").strip()
        if text:
            classes[index] = numbers.setdefault(text, len(numbers))
    return classes


@numba.njit(cache=True)
def _distinct(
    tokens: np.ndarray, lengths: np.ndarray, classes: np.ndarray, seen: np.ndarray, stamp: int
) -> tuple[np.ndarray, np.ndarray]:
    """Each window's different classes, one window after the other, and their numbers.

    ``seen`` ``[classes]`` is the number of the last window with a class, counted from ``stamp + 1``.
    """
    members, sizes = np.empty(len(tokens), dtype=np.int64), np.zeros(len(lengths), dtype=np.int64)
    used, place = 0, 0
    for row in range(len(lengths)):
        begin = used
        for _ in range(lengths[row]):
            member = classes[tokens[place]]
            place += 1
            if member >= 0 and seen[member] != stamp + row + 1:
                seen[member] = stamp + row + 1
                members[used] = member
                used += 1
        sizes[row] = used - begin
    return members[:used], sizes
