"""Unigram sample: random words of the corpus, ``words_dataset`` in the released code of ZipCal (arXiv 2603.16105).

No text is chosen: the words of all documents are pooled with their frequencies and drawn in random order.
"""

from array import array

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
    numbers: dict[str, int] = {}
    pool = array("i")
    for _, document in stream.kept(progress):
        pool.extend([numbers.setdefault(word, len(numbers)) for word in document.text.lower().split()])
    stream.counts |= {"words": len(pool), "different_words": len(numbers)}
    words = list(numbers)
    order = np.asarray(pool)[rng.permutation(len(pool))]
    wanted = (draw * stride + samples) * length
    tokens: list[int] = []
    begin = 0
    # Most words are at least one token, so the first part is usually enough.
    while len(tokens) < wanted and begin < len(order):
        part = order[begin : begin + wanted]
        tokens += tokenizer.encode((" " if begin else "") + " ".join(words[number] for number in part))
        begin += wanted
    if len(tokens) < wanted:
        remedy = "a smaller `stride`, " if draw > 0 and stride > samples else ""
        raise CalibrantError(
            f"{stream.corpus.location}: its {len(pool)} words give {len(tokens)} tokens, {wanted} are needed; "
            f"use {remedy}fewer samples, a shorter length or more text"
        )
    first = draw * stride * length
    return [tokens[first + row * length : first + (row + 1) * length] for row in range(samples)]
