"""Passes over a corpus: the filtered documents, chosen ones again, and tokens in batches."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from calibrant.calibration.chat import encode_documents
from calibrant.calibration.corpus import Corpus
from calibrant.calibration.document import Document
from calibrant.calibration.filters import Filter
from calibrant.calibration.windows import TokenizedDocument
from calibrant.errors import CalibrantError
from calibrant.modeling.tokenizer import Tokenizer
from calibrant.progress import Progress

# Enough text to keep every core busy, and little enough not to matter for memory.
_BATCH_CHARACTERS, _BATCH_DOCUMENTS = 1 << 20, 512


class DocumentStream:
    """Documents of a corpus that pass every filter and belong to one shard.

    ``shards`` splits the corpus at random into disjoint parts; part ``shard`` is read. Ordinals number the corpus's
    non-empty documents from 0, whether the filters drop them or not.
    """

    def __init__(
        self, corpus: Corpus, filters: Sequence[Filter], rng: np.random.Generator, shard: int = 0, shards: int = 1
    ) -> None:
        self.corpus, self._filters = corpus, filters
        self._rng, self._shard, self._shards = rng, shard, shards
        self.counts = {"documents": 0, "documents_used": 0, "documents_too_short": 0}
        self.has_chat = False

    def kept(self, progress: Progress) -> Iterator[tuple[int, Document]]:
        """One pass over the documents that may become candidates; counts what every filter drops.

        Raises:
            CalibrantError: no document is left.
        """
        self.counts |= {filter_.count_name: 0 for filter_ in self._filters}
        kept, read = 0, 0
        with progress.task("reading corpus", self.corpus.size) as task:
            for ordinal, document in enumerate(self.corpus):
                task.advance(self.corpus.position - read)
                read = self.corpus.position
                self.counts["documents"] += 1
                self.has_chat |= document.messages is not None
                in_shard = self._shards == 1 or int(self._rng.integers(self._shards)) == self._shard
                if in_shard and self._passes(document):
                    kept += 1
                    yield ordinal, document
            if self.corpus.size is not None:
                task.advance(self.corpus.size - read)
        self.counts |= self.corpus.counts
        if not self.counts["documents"]:
            dropped = ", ".join(f"{name} {count}" for name, count in self.corpus.counts.items() if count)
            why = (
                f"none of its documents can be used ({dropped})"
                if dropped
                else "the corpus is empty, no document has text"
            )
            raise CalibrantError(f"{self.corpus.location}: {why}")
        if not kept:
            raise CalibrantError(f"{self.corpus.location}: no document is left {self._dropped()}")

    def _passes(self, document: Document) -> bool:
        for filter_ in self._filters:
            if not filter_.keeps(document):
                self.counts[filter_.count_name] += 1
                return False
        return True

    def _dropped(self) -> str:
        drops = ", ".join(f"{filter_.count_name} {self.counts[filter_.count_name]}" for filter_ in self._filters)
        return f"after the filters ({drops or 'none'}) and shards"

    def fetch(self, ordinals: Iterable[int]) -> dict[int, Document]:
        """The documents with these ordinals, in one pass that ends with the last of them.

        Raises:
            CalibrantError: some are missing.
        """
        wanted = set(ordinals)
        found: dict[int, Document] = {}
        for ordinal, document in enumerate(self.corpus):
            if ordinal in wanted:
                found[ordinal] = document
                if len(found) == len(wanted):
                    return found
        if wanted:
            raise CalibrantError(f"{self.corpus.location}: the corpus changed while it was read; run again")
        return found


def tokenized(documents: Iterable[tuple[int, Document]], tokenizer: Tokenizer) -> Iterator[TokenizedDocument]:
    """The documents' tokens, encoded in batches; the next batch is encoded while the caller uses the current one."""
    with ThreadPoolExecutor(max_workers=1) as worker:
        pending: Future[list[TokenizedDocument]] | None = None
        for batch in _batches(documents):
            following = worker.submit(_encoded, batch, tokenizer)
            if pending is not None:
                yield from pending.result()
            pending = following
        if pending is not None:
            yield from pending.result()


def _batches(documents: Iterable[tuple[int, Document]]) -> Iterator[list[tuple[int, Document]]]:
    batch: list[tuple[int, Document]] = []
    characters = 0
    for ordinal, document in documents:
        batch.append((ordinal, document))
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encoded(batch: list[tuple[int, Document]], tokenizer: Tokenizer) -> list[TokenizedDocument]:
    tokens = encode_documents([document for _, document in batch], tokenizer)
    return [
        TokenizedDocument(ordinal, document.id, ids) for (ordinal, document), ids in zip(batch, tokens, strict=True)
    ]
