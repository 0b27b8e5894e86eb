"""Filters by a document's text: length, repetition, script."""

import sys
import unicodedata
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

from calibrant.calibration.document import Document

# Count of texts that are no conversations where conversations are asked for.
TEXTS_ALONE = "documents_without_messages"
# Letters that decide a text's script, spread over the text.
_LETTERS = 2000


@dataclass(frozen=True)
class LengthBetween:
    """Keeps texts of ``least`` to ``most`` characters, both included."""

    least: int = 0
    most: int | None = None
    count_name: str = "documents_wrong_length"

    def keeps(self, document: Document) -> bool:
        """Whether the length is in the range."""
        return self.least <= len(document.text) and (self.most is None or len(document.text) <= self.most)


@dataclass(frozen=True)
class IsConversation:
    """Keeps conversations: of a text nobody knows who wrote it."""

    count_name: str = TEXTS_ALONE

    def keeps(self, document: Document) -> bool:
        """Whether the document has messages."""
        return document.messages is not None


@dataclass(frozen=True)
class RepetitionBelow:
    """Keeps texts in which at most a share ``most`` of the runs of ten words occur earlier in the text (ours)."""

    most: float
    count_name: str = "documents_repetitive"

    def keeps(self, document: Document) -> bool:
        """Whether the repeated share is at most ``most``."""
        return repeated_share(document.text.split()) <= self.most


def repeated_share(words: list[str], run: int = 10) -> float:
    """Share of the runs of ``run`` words that occur earlier in the text."""
    runs = Counter(tuple(words[i : i + run]) for i in range(len(words) - run + 1))
    total = sum(runs.values())
    return 1 - len(runs) / total if total else 0.0


@dataclass(frozen=True)
class ScriptIs:
    """Keeps texts with at least half of their letters in ``script``.

    A letter's script is the first word of its Unicode name: LATIN, CYRILLIC, GREEK, ARABIC, HEBREW, DEVANAGARI, CJK,
    HIRAGANA, HANGUL, THAI, ...
    """

    script: str
    count_name: str = "documents_other_script"

    def keeps(self, document: Document) -> bool:
        """Whether at least half of the letters are in the script."""
        letters = [character for character in document.text if character.isalpha()]
        sampled = letters[:: max(1, len(letters) // _LETTERS)]
        return 2 * sum(script_of(letter) == self.script for letter in sampled) >= len(sampled) > 0


@lru_cache(maxsize=1 << 16)
def script_of(letter: str) -> str:
    """The first word of the letter's Unicode name."""
    return unicodedata.name(letter, "UNNAMED").partition(" ")[0].partition("-")[0]


@lru_cache(maxsize=1)
def scripts() -> frozenset[str]:
    """The scripts of all letters."""
    return frozenset(script_of(chr(code)) for code in range(sys.maxunicode + 1) if chr(code).isalpha())
