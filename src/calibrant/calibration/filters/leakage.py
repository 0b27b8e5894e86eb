"""Overlap of calibration text with evaluation text: runs of words in both."""

import hashlib
import re
from collections.abc import Iterable, Iterator

from calibrant.calibration.document import Document
from calibrant.errors import CalibrantError

# Length of the runs that count as contamination in arXiv 2005.14165, appendix C.
DEFAULT_RUN = 13
SHORTEST = 5
_DIGEST_BYTES = 8


class Leakage:
    """Finds documents that share a run of ``run`` words with evaluation texts; drops them if ``remove``.

    Words are lower case without punctuation. An evaluation text shorter than a run is one run; texts of fewer than
    ``SHORTEST`` words would be found everywhere, so they are only counted, in ``too_short`` (ours). ``leaked`` counts
    the documents found, dropped or not. Keeps 8 bytes per run of the evaluation texts.

    Raises:
        CalibrantError: all evaluation texts are too short.
    """

    def __init__(self, evaluation: Iterable[Document], run: int = DEFAULT_RUN, remove: bool = True) -> None:
        self._run, self._remove = run, remove
        self._runs: dict[int, set[bytes]] = {}
        self.leaked = self.too_short = 0
        for document in evaluation:
            words = _words(document.text)
            length = min(run, len(words))
            if length < min(run, SHORTEST):
                self.too_short += 1
            else:
                self._runs.setdefault(length, set()).update(_digests(words, length))
        if not self._runs:
            raise CalibrantError(
                f"the evaluation texts contain nothing to search for: {self.too_short} have fewer than {SHORTEST} words"
            )

    @property
    def count_name(self) -> str:
        """See ``Filter``."""
        return "documents_leaked"

    def keeps(self, document: Document) -> bool:
        """Whether the document shares no run, or leaking documents are kept."""
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
