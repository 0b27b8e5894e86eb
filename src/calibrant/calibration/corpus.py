"""Corpora: documents with stable ids, from files, folders, the hub, Python's own documentation or memory."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from calibrant.calibration.corpus_sources import (
    HUB,
    BuiltinSource,
    CorpusSource,
    FileSource,
    HubSource,
    MemorySource,
)
from calibrant.calibration.document import Document

BUILTIN = "builtin"
MEMORY = "memory"
# Longer texts are cut (text files) or dropped (rows), so that no text fills the memory.
LONGEST_TEXT = 4_000_000


class Corpus:
    """Documents of one origin, in a fixed order; a corpus can be iterated over any number of times.

    ``source`` is a location or the documents themselves:

    - a file (``.txt``, ``.jsonl``, ``.parquet``, each also as ``.gz``), or a folder of such files. A text file is one
      document, or one for every ``LONGEST_TEXT`` characters, cut at a line's end; in JSON Lines and Parquet every row
      is a document, with its text under ``field``.
    - "builtin": the Python language reference that ships with the interpreter.
    - a data set on the Hugging Face hub: "hub:owner/name?config=en&split=train"; texts are under ``field``.
    - a list of texts, of ``Document``s or of rows (dicts with the text under ``field``), an iterator over these, which
      is read into a list, or a ``datasets.Dataset``. Ids are the positions "0", "1", ..., unless documents bring their
      own. ``location`` is then "memory". Since a string is a location, texts of your own always come in a list:
      ``Corpus(["first text", "second text"])``.

    Instead of a text there may be a conversation: a list of messages with "role" and "content". Empty texts, and rows
    of more than ``LONGEST_TEXT`` characters, are skipped and counted in ``counts``.

    Raises:
        CalibrantError: the location does not exist or contains nothing readable, or there are no documents.
    """

    def __init__(
        self,
        source: str | Path | Iterable[str | Document | Mapping[str, Any] | list[dict[str, str]]],
        field: str = "text",
    ) -> None:
        self.location = str(source) if isinstance(source, str | Path) else MEMORY
        self.field = field
        self._source = _open(source, field)
        self._reset()

    def _reset(self) -> None:
        self.counts = {"documents_empty": 0, "documents_too_long": 0}

    @property
    def size(self) -> int | None:
        """Bytes on disk, None if the corpus is not in files."""
        return self._source.size

    @property
    def position(self) -> int:
        """Bytes of ``size`` that the current iteration has read."""
        return self._source.position

    def __iter__(self) -> Iterator[Document]:
        """Yield the documents that have text; count the others in ``counts``."""
        self._reset()
        for document in self._source.documents():
            if len(document.text) > LONGEST_TEXT:
                self.counts["documents_too_long"] += 1
            elif not document.text or document.text.isspace():
                self.counts["documents_empty"] += 1
            else:
                yield document

    def describe(self) -> dict[str, Any]:
        """The corpus's identity for a manifest: names and content hashes, no absolute paths."""
        return self._source.describe()


def _open(source: Any, field: str) -> CorpusSource:
    if not isinstance(source, str | Path):
        return MemorySource(source, field)
    if str(source) == BUILTIN:
        return BuiltinSource()
    if str(source).startswith(HUB):
        return HubSource(str(source), field)
    return FileSource(Path(source), field, LONGEST_TEXT)
