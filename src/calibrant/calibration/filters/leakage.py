"""Overlap of calibration text with evaluation text: runs of words that both hold."""

import hashlib
import re
from collections.abc import Iterable, Iterator

from calibrant.calibration.corpus import Document

# The length of the runs that GPT-3's authors called contamination (arXiv 2005.14165, appendix C).
DEFAULT_RUN = 13
_DIGEST_BYTES = 8


class Leakage:
    """Finds documents that share a run of ``run`` words with evaluation texts; drops them if ``remove``.

    Words are lower case without punctuation. Evaluation texts shorter than a run count as one run. ``leaked`` counts
    what was found, removed or not. 8 bytes are kept for each run of the evaluation texts.
    """

    def __init__(self, evaluation: Iterable[Document], run: int = DEFAULT_RUN, remove: bool = True) -> None:
        self._run, self._remove = run, remove
        self._runs: dict[int, set[bytes]] = {}
        for document in evaluation:
            words = _words(document.text)
            length = min(run, len(words))
            if length:
                self._runs.setdefault(length, set()).update(_digests(words, length))
        self.leaked = 0

    @property
    def count_name(self) -> str:
        """Documents that were dropped."""
        return "documents_leaked"

    def keeps(self, document: Document) -> bool:
        """Whether the document shares no run, or may stay though it does."""
        words = _words(document.text)
        found = any(not runs.isdisjoint(_digests(words, length)) for length, runs in self._runs.items())
        self.leaked += found
        return not (found and self._remove)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _digests(words: list[str], length: int) -> Iterator[bytes]:
    for begin in range(len(words) - length + 1):
        run = " ".join(words[begin : begin + length])
        yield hashlib.blake2b(run.encode(), digest_size=_DIGEST_BYTES).digest()
