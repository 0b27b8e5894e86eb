"""Zipf score: texts with the rarest words (released code of ZipCal, arXiv 2603.16105)."""

from collections import Counter

import numpy as np

from calibrant.calibration.selection.coverage import SetFamily
from calibrant.calibration.windows import Window
from calibrant.modeling.tokenizer import Tokenizer

_MOST_WORDS = 1 << 32


class ZipfScore:
    """Picks the windows with the largest sum of ``1 / frequency`` over their different words, ties by order.

    Words are lower case, split at white space, without full stops and commas. Long texts with words that occur once
    score high.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._numbers: dict[str, int] = {}
        self._frequencies: Counter[int] = Counter()
        self._family = SetFamily(_MOST_WORDS)

    def see(self, windows: list[Window]) -> None:
        """Count the words of further candidates."""
        for window in windows:
            words = self._tokenizer.decode(window.tokens).lower().replace(".", " ").replace(",", " ").split()
            numbers = [self._numbers.setdefault(word, len(self._numbers)) for word in words]
            self._frequencies.update(numbers)
            members = np.unique(np.array(numbers, dtype=np.int64))
            self._family.append(members, np.array([len(members)]))

    def choose(self, count: int) -> list[int]:
        """Candidates in falling order of the score."""
        rarity = np.zeros(len(self._numbers))
        for number, frequency in self._frequencies.items():
            rarity[number] = 1 / frequency
        bounds, members = self._family.bounds, self._family.members
        scores = [float(rarity[members[bounds[i] : bounds[i + 1]]].sum()) for i in range(len(self._family))]
        return [int(index) for index in np.argsort(-np.array(scores), kind="stable")[:count]]

    def counts(self) -> dict[str, int]:
        """Number of different words in all candidates."""
        return {"different_words": len(self._numbers)}
