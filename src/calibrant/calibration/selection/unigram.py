"""Random words of a corpus: "unigram", and "words_dataset" as the released code of ZipCal makes it (arXiv 2603.16105).

No text is chosen: the words of all documents are pooled with their frequencies and drawn in random order.
"""

from array import array
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from calibrant.calibration.document_stream import DocumentStream
from calibrant.errors import CalibrantError
from calibrant.modeling.tokenizer import Tokenizer
from calibrant.progress import Progress


def unigram_rows(
    stream: DocumentStream,
    tokenizer: Tokenizer,
    samples: int,
    length: int,
    draw: int,
    stride: int,
    rng: np.random.Generator,
    progress: Progress,
) -> list[list[int]]:
    """Rows of exactly ``length`` tokens: words of a seeded permutation of the pool, joined by spaces.

    Words are lower case, split at white space. All draws are cut from one permutation, so they share no occurrence of a
    word if ``stride``, the rows between the beginnings of draws, is at least ``samples``. Sets of one draw and stride
    are nested, unless tokens reach across words. Keeps four bytes per word of the corpus, and each different word once.

    Raises:
        CalibrantError: the corpus has too few words; the message says how many tokens they give.
    """
    words = _ShuffledWords(stream, (document.text for _, document in stream.kept(progress)), rng)
    wanted = (draw * stride + samples) * length
    tokens: list[int] = []
    begin = 0
    # Most words are at least one token, so the first part is usually enough.
    while len(tokens) < wanted and begin < len(words):
        tokens += tokenizer.encode((" " if begin else "") + words.joined(begin, wanted))
        begin += wanted
    if len(tokens) < wanted:
        found = f"its {len(words)} words give {len(tokens)} tokens, {wanted} are needed"
        raise words.too_few(found, smaller_stride=draw > 0 and stride > samples)
    first = draw * stride * length
    return [tokens[first + row * length : first + (row + 1) * length] for row in range(samples)]


def words_dataset_rows(
    stream: DocumentStream,
    tokenizer: Tokenizer,
    samples: int,
    length: int,
    draw: int,
    stride: int,
    rng: np.random.Generator,
    progress: Progress,
) -> list[list[int]]:
    """Rows of at most ``length`` tokens: each the first tokens of as many words as a row has tokens, joined by spaces.

    In the released code both numbers are 128, of which about 93 words are left. As there, the pool holds the words of
    every document's first ``length`` tokens, decoded. A row has the words of its own run of the permutation alone, so
    sets of one draw and ``stride`` are nested and draws share no occurrence of a word. The released code starts the
    pool over when it is used up; here that is an error.

    Raises:
        CalibrantError: the corpus has too few words; the message says how many.
    """
    # Conversations are read as their text, as for "unigram".
    documents = ((ordinal, replace(document, messages=None)) for ordinal, document in stream.kept(progress))
    beginnings = (tokenizer.decode(one.tokens[:length]) for one in stream.tokenized(documents, tokenizer))
    words = _ShuffledWords(stream, beginnings, rng)
    per_row = len(tokenizer.prefix) + length
    wanted = (draw * stride + samples) * per_row
    if len(words) < wanted:
        found = f"the beginnings of its documents have {len(words)} words, {wanted} are needed"
        raise words.too_few(found, smaller_stride=draw > 0 and stride > samples)
    runs = [words.joined((draw * stride + row) * per_row, per_row) for row in range(samples)]
    return [tokens[:length] for tokens in tokenizer.encode_batch(runs)]


class _ShuffledWords:
    """All words of ``texts``, lower case and split at white space, in the random order of ``rng``."""

    def __init__(self, stream: DocumentStream, texts: Iterable[str], rng: np.random.Generator) -> None:
        numbers: dict[str, int] = {}
        pool = array("i")
        for text in texts:
            pool.extend([numbers.setdefault(word, len(numbers)) for word in text.lower().split()])
        stream.counts |= {"words": len(pool), "different_words": len(numbers)}
        self._stream, self._words = stream, list(numbers)
        self._order = np.asarray(pool)[rng.permutation(len(pool))]

    def __len__(self) -> int:
        return len(self._order)

    def joined(self, begin: int, count: int) -> str:
        """``count`` words from number ``begin`` on, joined by spaces; fewer at the end."""
        return " ".join(self._words[number] for number in self._order[begin : begin + count])

    def too_few(self, found: str, *, smaller_stride: bool) -> CalibrantError:
        """The error for a corpus with too few words; ``found`` says how many it has."""
        remedy = "a smaller `stride`, " if smaller_stride else ""
        return CalibrantError(
            f"{self._stream.corpus.location}: {found}; use {remedy}fewer samples, a shorter length or more text"
        )
