"""Tests of one document's text: its length, its repetition, its script."""

import sys
import unicodedata
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

from calibrant.calibration.document import Document

# A script is judged by this many letters, spread over the text.
_LETTERS = 2000


@dataclass(frozen=True)
class LengthBetween:
    """Keeps texts of ``least`` to ``most`` characters."""

    least: int = 0
    most: int | None = None
    count_name: str = "documents_wrong_length"

    def keeps(self, document: Document) -> bool:
        """Whether the text is that long."""
        return self.least <= len(document.text) and (self.most is None or len(document.text) <= self.most)


@dataclass(frozen=True)
class RepetitionBelow:
    """Keeps texts of whose words at most a share ``most`` lies in runs of ten that came before in the text (ours)."""

    most: float
    count_name: str = "documents_repetitive"

    def keeps(self, document: Document) -> bool:
        """Whether the text repeats itself that little."""
        return repeated_share(document.text.split()) <= self.most


def repeated_share(words: list[str], run: int = 10) -> float:
    """Share of the runs of ``run`` words that occur earlier in the text."""
    runs = Counter(tuple(words[i : i + run]) for i in range(len(words) - run + 1))
    total = sum(runs.values())
    return 1 - len(runs) / total if total else 0.0


@dataclass(frozen=True)
class ScriptIs:
    """Keeps texts at least half of whose letters belong to ``script``, the first word of their Unicode names: LATIN,
    CYRILLIC, GREEK, ARABIC, HEBREW, DEVANAGARI, CJK, HIRAGANA, HANGUL, THAI, ...
    """

    script: str
    count_name: str = "documents_other_script"

    def keeps(self, document: Document) -> bool:
        """Whether most letters are of that script."""
        letters = [character for character in document.text if character.isalpha()]
        looked = letters[:: max(1, len(letters) // _LETTERS)]
        return 2 * sum(script_of(letter) == self.script for letter in looked) >= len(looked) > 0


@lru_cache(maxsize=1 << 16)
def script_of(letter: str) -> str:
    """The first word of the letter's Unicode name."""
    return unicodedata.name(letter, "UNNAMED").partition(" ")[0].partition("-")[0]


@lru_cache(maxsize=1)
def scripts() -> frozenset[str]:
    """The first words of the names of all letters."""
    return frozenset(script_of(chr(code)) for code in range(sys.maxunicode + 1) if chr(code).isalpha())
