"""Filters that drop documents equal or nearly equal to an earlier one."""

import hashlib
import re
from dataclasses import dataclass, field

import numpy as np

from calibrant.calibration.document import Document

_DIGEST_BYTES = 16
# Signatures of 128 values in 16 bands of 8: two documents whose shingles overlap by a share s meet in a band with
# probability 1 - (1 - s^8)^16, which is 0.95 at s = 0.8 and 0.06 at s = 0.5 (Broder 1997; banding as in LSH).
_BANDS, _BAND_ROWS = 16, 8
_SHINGLE_WORDS = 5
_CHUNK = 1024


@dataclass
class ExactDuplicates:
    """Drops a document with the text of an earlier one, apart from space around it; keeps 16 bytes per document."""

    count_name: str = "documents_duplicate"
    _seen: set[bytes] = field(default_factory=set)

    def keeps(self, document: Document) -> bool:
        """Whether this text is new."""
        digest = hashlib.blake2b(document.text.strip().encode(), digest_size=_DIGEST_BYTES).digest()
        before = len(self._seen)
        self._seen.add(digest)
        return len(self._seen) > before


class NearDuplicates:
    """Drops a document that shares most runs of five words with an earlier one: MinHash (Broder 1997) with banding.

    Words are lower case without punctuation. Two documents are near duplicates if they share a band (ours): 95 % of
    pairs with an overlap of 80 % are found, 6 % of pairs with an overlap of 50 %. Keeps 16 hashes of 8 bytes per
    document.
    """

    count_name = "documents_near_duplicate"

    def __init__(self, rng: np.random.Generator) -> None:
        size = _BANDS * _BAND_ROWS
        # h(x) = a x + b modulo 2^64 with an odd a permutes the 64-bit numbers.
        self._factors = rng.integers(0, 1 << 63, size, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
        self._offsets = rng.integers(0, 1 << 63, size, dtype=np.uint64)
        self._seen: set[bytes] = set()

    def keeps(self, document: Document) -> bool:
        """Whether no earlier document shares a band of the signature."""
        bands = self._bands(document.text)
        if any(band in self._seen for band in bands):
            return False
        self._seen.update(bands)
        return True

    def _bands(self, text: str) -> list[bytes]:
        shingles = _shingles(text)
        least = np.full(len(self._factors), np.iinfo(np.uint64).max)
        for begin in range(0, len(shingles), _CHUNK):
            part = shingles[begin : begin + _CHUNK, None]
            least = np.minimum(least, (part * self._factors + self._offsets).min(axis=0))
        rows = least.reshape(_BANDS, _BAND_ROWS)
        return [bytes([band]) + hashlib.blake2b(row.tobytes(), digest_size=8).digest() for band, row in enumerate(rows)]


def _shingles(text: str) -> np.ndarray:
    """64-bit hashes of all runs of words, uint64 ``[runs]``; a shorter text is one run."""
    words = re.findall(r"\w+", text.lower())
    runs = {" ".join(words[i : i + _SHINGLE_WORDS]) for i in range(max(1, len(words) - _SHINGLE_WORDS + 1))}
    hashes = [int.from_bytes(hashlib.blake2b(run.encode(), digest_size=8).digest(), "little") for run in runs]
    return np.array(hashes, dtype=np.uint64)
