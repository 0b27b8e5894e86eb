"""Uniform selection: non-overlapping sets cut from one shuffle of the corpus (arXiv 2311.09755)."""

from array import array
from collections.abc import Iterator

import numpy as np

from calibrant.calibration.document import Document
from calibrant.calibration.document_stream import DocumentStream
from calibrant.calibration.selection.selector import too_few
from calibrant.calibration.windows import Cutting, Window
from calibrant.modeling.tokenizer import Tokenizer
from calibrant.progress import Progress


def uniform_windows(
    stream: DocumentStream,
    tokenizer: Tokenizer,
    cutting: Cutting,
    samples: int,
    draw: int,
    stride: int,
    rng: np.random.Generator,
    offsets: np.random.Generator,
    progress: Progress,
) -> list[Window]:
    """``samples`` windows of one shuffle of the documents, from window ``draw * stride`` on.

    Draws share no window if ``stride`` is at least ``samples``, and sets of one draw and stride are nested. The corpus
    is read once to count it and once for every doubling of the documents needed; only those are kept in memory.

    Raises:
        CalibrantError: the corpus is empty or too small for this draw; the message says how many windows it has.
    """
    kept = array("q", (ordinal for ordinal, _ in stream.kept(progress)))
    order = np.asarray(kept)[rng.permutation(len(kept))]
    begin = draw * stride
    wanted = begin + samples
    documents = stream.tokenized(_shuffled(stream, order, 2 * wanted), tokenizer)
    chosen: list[Window] = []
    found = 0
    with progress.task("selecting windows", wanted, "windows") as task:
        for found, window in enumerate(cutting.windows(documents, offsets, stream.counts), start=1):
            if found > begin:
                chosen.append(window)
            task.advance()
            if found == wanted:
                return chosen
    raise too_few(stream, cutting, found, wanted, smaller_stride=draw > 0 and stride > samples)


def _shuffled(stream: DocumentStream, order: np.ndarray, size: int) -> Iterator[tuple[int, Document]]:
    """The documents in shuffled order, fetched in parts, each twice as large as the one before."""
    begin = 0
    while begin < len(order):
        part = [int(ordinal) for ordinal in order[begin : begin + size]]
        found = stream.fetch(part)
        yield from ((ordinal, found[ordinal]) for ordinal in part)
        begin, size = begin + size, 2 * size
