"""From documents to fixed-length token windows, each remembering where its tokens came from."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from calibrant.calibration.calibration_set import Segment
from calibrant.calibration.corpus import Document
from calibrant.calibration.tokenizer import Tokenizer

Policy = Literal["pack", "window"]


@dataclass(frozen=True)
class Window:
    """``length`` token ids and the segments they were cut from (separators belong to no segment)."""

    tokens: list[int]
    segments: list[Segment]


def windows(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    length: int,
    policy: Policy,
    rng: np.random.Generator,
    counts: dict[str, int],
) -> Iterator[Window]:
    """Cut windows of ``length`` tokens from documents, in their order.

    ``pack`` joins the documents with a separator after each and cuts the stream; ``window`` takes one window at a
    uniform position of every document of at least ``length`` tokens and counts the shorter ones as dropped in
    ``counts["documents_too_short"]`` (methods.md §21).
    """
    cut = _packed if policy == "pack" else _one_per_document
    return cut(documents, tokenizer, length, rng, counts)


def _one_per_document(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    length: int,
    rng: np.random.Generator,
    counts: dict[str, int],
) -> Iterator[Window]:
    for document in documents:
        counts["documents_used"] += 1
        ids = tokenizer.encode(document.text)
        if len(ids) < length:
            counts["documents_too_short"] += 1
            continue
        offset = int(rng.integers(0, len(ids) - length + 1))
        segment = Segment(document=document.id, offset=offset, start=0, length=length)
        yield Window(ids[offset : offset + length], [segment])


def _packed(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    length: int,
    rng: np.random.Generator,
    counts: dict[str, int],
) -> Iterator[Window]:
    tokens: list[int] = []
    segments: list[Segment] = []
    for document in documents:
        counts["documents_used"] += 1
        ids = tokenizer.encode(document.text)
        offset = 0
        while offset < len(ids):
            taken = min(length - len(tokens), len(ids) - offset)
            segments.append(Segment(document=document.id, offset=offset, start=len(tokens), length=taken))
            tokens += ids[offset : offset + taken]
            offset += taken
            if len(tokens) == length:
                yield Window(tokens, segments)
                tokens, segments = [], []
        tokens.append(tokenizer.separator_id)
        if len(tokens) == length:
            yield Window(tokens, segments)
            tokens, segments = [], []
