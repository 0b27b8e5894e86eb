"""Overlap of calibration text with evaluation text: runs of words that both hold."""

import hashlib
import re
from collections.abc import Iterable, Iterator

from calibrant.calibration.document import Document
from calibrant.errors import CalibrantError

# The length of the runs that GPT-3's authors called contamination (arXiv 2005.14165, appendix C).
DEFAULT_RUN = 13
SHORTEST = 5
_DIGEST_BYTES = 8


class Leakage:
    """Finds documents that share a run of ``run`` words with evaluation texts; drops them if ``remove``.

    Words are lower case without punctuation. Evaluation texts shorter than a run count as one run, those of fewer than
    ``SHORTEST`` words are not looked for, since they are found everywhere, and counted in ``too_short`` (ours).
    ``leaked`` counts what was found, removed or not. 8 bytes are kept for each run of the evaluation texts.

    Raises:
        CalibrantError: the evaluation texts hold nothing to look for.
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
                f"the evaluation texts hold nothing to look for ({self.too_short} are shorter than {SHORTEST} words)"
            )

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
