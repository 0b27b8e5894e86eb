"""Token windows cut from tokenized documents, with the origin of their tokens."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from calibrant.calibration.calibration_set import Segment

Policy = Literal["pack", "window", "document"]


@dataclass(frozen=True)
class TokenizedDocument:
    """A document's token ids; ``ordinal`` counts the corpus's documents from 0."""

    ordinal: int
    id: str
    tokens: list[int]


@dataclass(frozen=True)
class Window:
    """Token ids and the segments they were cut from (separators belong to no segment).

    The window begins at token ``begin`` of document ``first`` and ends in document ``last``; both are ordinals. Where
    ``begin`` is the document's length, it begins with the separator after the document.
    """

    tokens: list[int]
    segments: list[Segment]
    first: int
    begin: int
    last: int


@dataclass(frozen=True)
class Cutting:
    """How windows of at most ``length`` tokens are cut (ours; docs/methods.md "Ours").

    "pack" puts ``separator`` after every document, joins the documents and cuts the stream. "window" takes one window
    at a uniform position from every document of at least ``length`` tokens, as the loaders of the GPTQ, SparseGPT and
    Wanda code do, and counts shorter documents in ``counts["documents_too_short"]``. "document" takes the first
    ``length`` tokens of every document, or all if there are fewer.
    """

    policy: Policy
    length: int
    separator: int

    def windows(
        self, documents: Iterable[TokenizedDocument], rng: np.random.Generator, counts: dict[str, int]
    ) -> Iterator[Window]:
        """Every window, in the documents' order; ``counts["documents_used"]`` counts the documents read."""
        used = _counted(documents, counts)
        if self.policy == "pack":
            yield from self._packed(used, 0)
            return
        for document in used:
            if self.policy == "document" and document.tokens:
                yield self._slice(document, 0)
            elif self.policy == "document" or len(document.tokens) < self.length:
                counts["documents_too_short"] += 1
            else:
                yield self._slice(document, int(rng.integers(0, len(document.tokens) - self.length + 1)))

    def again(self, begin: int, documents: list[TokenizedDocument]) -> Window:
        """A window that was cut before, cut again from its documents (``first`` to ``last``)."""
        if self.policy == "pack":
            return next(self._packed(documents, begin))
        return self._slice(documents[0], begin)

    def _slice(self, document: TokenizedDocument, begin: int) -> Window:
        tokens = document.tokens[begin : begin + self.length]
        segment = Segment(document=document.id, offset=begin, start=0, length=len(tokens))
        return Window(tokens, [segment], document.ordinal, begin, document.ordinal)

    def _packed(self, documents: Iterable[TokenizedDocument], begin: int) -> Iterator[Window]:
        tokens: list[int] = []
        segments: list[Segment] = []
        start = (0, 0)
        for document in documents:
            offset, begin = begin, 0
            size = len(document.tokens)
            while offset <= size:
                if not tokens:
                    start = (document.ordinal, offset)
                taken = min(self.length - len(tokens), size - offset)
                if taken:
                    segments.append(Segment(document=document.id, offset=offset, start=len(tokens), length=taken))
                    tokens += document.tokens[offset : offset + taken]
                    offset += taken
                if offset == size and len(tokens) < self.length:
                    tokens.append(self.separator)
                    offset += 1
                if len(tokens) == self.length:
                    yield Window(tokens, segments, *start, document.ordinal)
                    tokens, segments = [], []


def _counted(documents: Iterable[TokenizedDocument], counts: dict[str, int]) -> Iterator[TokenizedDocument]:
    for document in documents:
        counts["documents_used"] += 1
        yield document
