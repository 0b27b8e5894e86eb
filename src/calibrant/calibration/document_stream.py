"""Passes over a corpus: the filtered documents, chosen ones again, and tokens in batches."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from calibrant.calibration.chat import encode_documents
from calibrant.calibration.corpus import Corpus
from calibrant.calibration.document import Document
from calibrant.calibration.filters import Filter
from calibrant.calibration.filters.content import TEXTS_ALONE
from calibrant.calibration.windows import TokenizedDocument
from calibrant.errors import CalibrantError
from calibrant.modeling.chat_template import RefusedError
from calibrant.modeling.tokenizer import Tokenizer
from calibrant.progress import Progress

# Enough text to keep every core busy, and little enough not to matter for memory.
_BATCH_CHARACTERS, _BATCH_DOCUMENTS = 1 << 20, 512


@dataclass(frozen=True)
class Findings:
    """What passes over a corpus found beside its documents.

    Attributes:
        has_chat: conversations were among the documents.
        notes: sentences about what was left out for being unusable.
        first_unusable: the first row that is no document, and why.
    """

    has_chat: bool = False
    notes: tuple[str, ...] = ()
    first_unusable: str | None = None


def together(findings: Iterable[Findings]) -> Findings:
    """The findings of several passes over one corpus."""
    found = list(findings)
    return Findings(
        any(one.has_chat for one in found),
        tuple(dict.fromkeys(note for one in found for note in one.notes)),
        next((one.first_unusable for one in found if one.first_unusable), None),
    )


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
        self._has_chat = False
        self._first_refusal: str | None = None

    def kept(self, progress: Progress) -> Iterator[tuple[int, Document]]:
        """One pass over the documents that may become candidates; counts what every filter drops.

        Raises:
            CalibrantError: no document is left.
        """
        self.counts |= {filter_.count_name: 0 for filter_ in self._filters}
        kept, read = 0, 0
        with progress.task("reading corpus", self.corpus.size, "bytes") as task:
            for ordinal, document in enumerate(self.corpus):
                task.advance(self.corpus.position - read)
                read = self.corpus.position
                self.counts["documents"] += 1
                self._has_chat |= document.messages is not None
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

    def tokenized(self, documents: Iterable[tuple[int, Document]], tokenizer: Tokenizer) -> Iterator[TokenizedDocument]:
        """The documents' tokens, encoded in batches; the next batch is encoded while the caller uses the current one.

        Conversations that the chat template refuses are left out and counted.
        """
        for encoded in _in_batches(documents, tokenizer):
            if isinstance(encoded, TokenizedDocument):
                yield encoded
            else:
                self.counts["conversations_refused"] = self.counts.get("conversations_refused", 0) + 1
                self._first_refusal = self._first_refusal or str(encoded)

    @property
    def refusals(self) -> str:
        """What the chat template refused, as a phrase; "" if nothing."""
        if self._first_refusal is None:
            return ""
        count = self.counts["conversations_refused"]
        return f"{count:,} conversation{'s' * (count != 1)} (the first: {self._first_refusal})"

    @property
    def findings(self) -> Findings:
        """What the passes found until now."""
        refused = f"{self.corpus.location}: left out {self.refusals} that the chat template refuses"
        texts = self.counts.get(TEXTS_ALONE, 0)
        what = "a text that is no conversation" if texts == 1 else f"{texts:,} texts that are no conversations"
        no_talk = f"{self.corpus.location}: left out {what}, of which no part is an assistant's"
        notes = (
            *self.corpus.notes,
            *([refused] if self.refusals else []),
            *([no_talk] if texts else []),
        )
        return Findings(self._has_chat, notes, self.corpus.first_unusable)

    def _passes(self, document: Document) -> bool:
        for filter_ in self._filters:
            if not filter_.keeps(document):
                self.counts[filter_.count_name] += 1
                return False
        return True

    def _dropped(self) -> str:
        drops = ", ".join(
            f"{filter_.count_name.replace('_', ' ')} {self.counts[filter_.count_name]}" for filter_ in self._filters
        )
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


def _in_batches(
    documents: Iterable[tuple[int, Document]], tokenizer: Tokenizer
) -> Iterator[TokenizedDocument | RefusedError]:
    with ThreadPoolExecutor(max_workers=1) as worker:
        pending: Future[list[TokenizedDocument | RefusedError]] | None = None
        for batch in _batches(documents):
            following = worker.submit(encoded_batch, batch, tokenizer)
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


def encoded_batch(
    batch: Sequence[tuple[int, Document]], tokenizer: Tokenizer
) -> list[TokenizedDocument | RefusedError]:
    """The documents' tokens; in place of a conversation that the chat template refuses stands the refusal."""
    tokens = encode_documents([document for _, document in batch], tokenizer)
    return [
        ids if isinstance(ids, RefusedError) else TokenizedDocument(ordinal, document.id, ids)
        for (ordinal, document), ids in zip(batch, tokens, strict=True)
    ]
