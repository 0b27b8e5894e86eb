"""ZipCal: the texts that cover the most normalised sub-words (arXiv 2603.16105, algorithm 1; methods.md §27)."""

import numba
import numpy as np

from calibrant.calibration.selection.coverage import Picks, SetFamily, greedy_cover, pooled_cover
from calibrant.calibration.windows import Window
from calibrant.modeling.tokenizer import Tokenizer

_NO_CLASS = -1


class ZipCal:
    """Picks windows by greedy maximum coverage of sub-word classes.

    ``pool`` looks at that many random windows for every pick, as the released code does (2,000); None looks at all,
    exactly. ``rng`` is used with a pool only.
    """

    def __init__(self, tokenizer: Tokenizer, pool: int | None, rng: np.random.Generator) -> None:
        self._classes = subword_classes(tokenizer)
        self._family = SetFamily(int(self._classes.max(initial=_NO_CLASS)) + 1)
        self._seen = np.zeros(self._family.universe, dtype=np.int64)
        self._stamp = 0
        self._pool, self._rng = pool, rng
        self.covered = 0

    def see(self, windows: list[Window]) -> None:
        """Note the classes of further candidates."""
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
        """Candidates in the order they are picked."""
        picks: Picks = (
            greedy_cover(self._family, count)
            if self._pool is None
            else pooled_cover(self._family, count, self._pool, self._rng)
        )
        self.covered = int(picks.covered[-1]) if len(picks.covered) else 0
        return [int(index) for index in picks.chosen]

    def counts(self) -> dict[str, int]:
        """What the manifest records of the result."""
        return {"classes": self._family.universe, "classes_covered": self.covered}


def subword_classes(tokenizer: Tokenizer) -> np.ndarray:
    """The class of every token id, int64; -1 for special tokens and those that normalise to nothing.

    ``norm = decode(id)`` in lower case without spaces and "Ġ", stripped (methods.md §27).
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
    """The different classes of each run of tokens, one run after the other; ``seen`` holds the last run's number."""
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
