"""Selections in two passes: a selector sees every window, then the chosen windows are read again."""

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from calibrant.calibration.document import Document
from calibrant.calibration.document_stream import DocumentStream, encoded_batch
from calibrant.calibration.selection.request import SelectionRequest
from calibrant.calibration.windows import Cutting, TokenizedDocument, Window
from calibrant.errors import CalibrantError
from calibrant.modeling.tokenizer import Tokenizer
from calibrant.progress import Progress

# Windows that a selector gets at a time: enough for a forward pass.
_BATCH = 64


class Selector(Protocol):
    """Sees every candidate once, in order, keeps what the choice needs, and then chooses."""

    def see(self, windows: list[Window]) -> None:
        """Read the next candidates."""

    def choose(self, count: int) -> list[int]:
        """The indices of ``count`` different candidates, in the order of the picks.

        Raises:
            CalibrantError: fewer can be chosen.
        """

    def counts(self) -> dict[str, int]:
        """Numbers about the choice for the manifest."""


def cutting_of(request: SelectionRequest, tokenizer: Tokenizer) -> Cutting:
    """How the request cuts windows; only packed documents need a separator."""
    separator = tokenizer.separator_id if request.windows == "pack" else tokenizer.padding_id
    return Cutting(request.windows, request.length, separator)


class _Positions:
    """Positions of all candidates, 24 bytes each, and ordinals of the kept documents, 8 bytes each."""

    def __init__(self) -> None:
        self.kept = array("q")
        self._first, self._begin, self._last = array("q"), array("q"), array("q")

    def __len__(self) -> int:
        return len(self._first)

    def note_documents(self, documents: Iterator[tuple[int, Document]]) -> Iterator[tuple[int, Document]]:
        """Pass documents on and remember their ordinals."""
        for ordinal, document in documents:
            self.kept.append(ordinal)
            yield ordinal, document

    def note(self, window: Window) -> None:
        self._first.append(window.first)
        self._begin.append(window.begin)
        self._last.append(window.last)

    def of(self, candidate: int) -> tuple[int, list[int]]:
        """The position of a candidate's first token in its first document, and the ordinals of its documents."""
        begin = bisect_left(self.kept, self._first[candidate])
        end = bisect_right(self.kept, self._last[candidate])
        return self._begin[candidate], list(self.kept[begin:end])


def select_windows(
    stream: DocumentStream,
    tokenizer: Tokenizer,
    cutting: Cutting,
    selector: Selector,
    samples: int,
    rng: np.random.Generator,
    progress: Progress,
    all_if_fewer: bool = False,
) -> list[Window]:
    """The windows that ``selector`` chooses, in its order.

    ``all_if_fewer`` takes all candidates if there are fewer than ``samples``.

    Raises:
        CalibrantError: the corpus has fewer candidates than ``samples``; the message says how many.
    """
    positions = _Positions()
    documents = stream.tokenized(positions.note_documents(stream.kept(progress)), tokenizer)
    batch: list[Window] = []
    for window in cutting.windows(documents, rng, stream.counts):
        positions.note(window)
        batch.append(window)
        if len(batch) == _BATCH:
            selector.see(batch)
            batch = []
    if batch:
        selector.see(batch)
    stream.counts["candidates"] = len(positions)
    if len(positions) < samples and not all_if_fewer:
        raise too_few(stream, cutting, len(positions), samples)
    chosen = selector.choose(samples)
    stream.counts |= selector.counts()
    return _read_again(stream, tokenizer, cutting, [positions.of(candidate) for candidate in chosen])


def _read_again(
    stream: DocumentStream, tokenizer: Tokenizer, cutting: Cutting, places: list[tuple[int, list[int]]]
) -> list[Window]:
    found = stream.fetch(ordinal for _, ordinals in places for ordinal in ordinals)
    encoded = encoded_batch(sorted(found.items()), tokenizer)
    # Conversations that the chat template refuses lie between others of a window.
    tokens = {one.ordinal: one for one in encoded if isinstance(one, TokenizedDocument)}
    return [
        cutting.again(begin, [tokens[ordinal] for ordinal in ordinals if ordinal in tokens])
        for begin, ordinals in places
    ]


def too_few(
    stream: DocumentStream, cutting: Cutting, found: int, wanted: int, *, smaller_stride: bool = False
) -> CalibrantError:
    """The error for a corpus with fewer windows than wanted; ``smaller_stride`` says that one could help."""
    short = stream.counts["documents_too_short"]
    is_short_text = cutting.policy != "document" and stream.counts["documents"] >= wanted
    remedy = "a smaller `stride`, " if smaller_stride else ""
    remedy += '`windows="pack"`, ' if cutting.policy == "window" and short else ""
    remedy += '`windows="document"` (a shorter row for each), ' if is_short_text else ""
    return CalibrantError(
        f"{stream.corpus.location}: only {found} windows of {cutting.length} tokens in "
        f"{stream.counts['documents']} documents"
        + (f" ({short} are too short)" if short else "")
        + (f" (the chat template refuses {stream.refusals})" if stream.refusals else "")
        + f", {wanted} are needed; use {remedy}fewer samples, a shorter length or more text"
    )
