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
from calibrant.calibration.document import Document, Unusable

BUILTIN = "builtin"
MEMORY = "memory"
# Longer texts are cut (text files) or dropped (rows), so that no text fills the memory.
LONGEST_TEXT = 4_000_000


class Corpus:
    """Documents of one origin, in a fixed order; a corpus can be iterated over any number of times.

    ``source`` is a location or the documents themselves:

    - a file (``.txt``, ``.jsonl``, ``.parquet``, each also as ``.gz``), or a folder of such files. A text file is one
      document, or one for every ``LONGEST_TEXT`` characters, cut at a line's end; in JSON Lines and Parquet every row
      is a document, with its text under ``field``. In a folder, files and folders whose names begin with a dot are
      passed over, and so are the folder __pycache__ and text files that are called README, LICENSE, UNLICENSE, COPYING,
      NOTICE, CITATION, CHANGELOG, CONTRIBUTING, AUTHORS, SECURITY, CODE_OF_CONDUCT or dataset_card, requirements and
      checksums (SHA256SUMS.txt), unless such a file is the source itself.
    - "builtin": the Python language reference that ships with the interpreter.
    - a data set on the Hugging Face hub: "hub:owner/name?config=en&split=train"; texts are under ``field``.
    - a list of texts, of ``Document``s or of rows (dicts with the text under ``field``), an iterator over these, which
      is read into a list, or a ``datasets.Dataset``. Ids are the positions "0", "1", ..., unless documents bring their
      own. ``location`` is then "memory". Since a string is a location, texts of your own always come in a list:
      ``Corpus(["first text", "second text"])``.

    Instead of a text there may be a conversation: a list of messages with a "role", and "content", "tool_calls", "name"
    and whatever else the chat template reads. "content" is a text, null or a list of parts of type "text"; descriptions
    of functions come under "tools" beside the conversation, as a list or as JSON. Keys whose value is null are dropped.
    Messages of ShareGPT, with "from" and "value", are renamed: "human" is the user, "gpt" the assistant.

    Several fields are named with commas: "premise,hypothesis" joins their texts by line ends.

    Rows that are neither a text nor a conversation, empty texts, and rows of more than ``LONGEST_TEXT`` characters are
    skipped and counted in ``counts``; ``notes`` says so.

    Raises:
        CalibrantError: the location does not exist or contains nothing readable, or there are no documents. Iterating
            raises where a file cannot be read or has no usable row.
    """

    def __init__(
        self,
        source: str | Path | Iterable[str | Document | Mapping[str, Any] | list[dict[str, Any]]],
        field: str = "text",
    ) -> None:
        self.location = str(source) if isinstance(source, str | Path) else MEMORY
        self.field = field
        self._source = _open(source, field)
        self._first_unusable: Unusable | None = None
        self._unusable = 0
        self._reset()

    def _reset(self) -> None:
        self.counts = {"documents_empty": 0, "documents_too_long": 0, "documents_unusable": 0}

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
        for row in self._source.rows():
            if row.too_long if isinstance(row, Unusable) else len(row.text) > LONGEST_TEXT:
                self.counts["documents_too_long"] += 1
            elif isinstance(row, Unusable):
                self.counts["documents_unusable"] += 1
                self._first_unusable = self._first_unusable or row
            elif not row.has_text:
                self.counts["documents_empty"] += 1
            else:
                yield row
        self._unusable = self.counts["documents_unusable"]

    @property
    def first_unusable(self) -> str | None:
        """The id of the first row that is no document, and why; None before an iteration came to it."""
        first = self._first_unusable
        return None if first is None else f"{first.id}: {first.reason}"

    @property
    def notes(self) -> list[str]:
        """Sentences about what was left out: files of the folder, and rows of the latest whole iteration."""
        notes = []
        if self._source.left_out:
            notes.append(f"{self.location}: left out as no data: {', '.join(self._source.left_out)}")
        if self._first_unusable is not None and self._unusable:
            rows = "1 row" if self._unusable == 1 else f"{self._unusable:,} rows"
            notes.append(
                f"{self.location}: left out {rows} that cannot be used; the first: "
                f"{self._first_unusable.place}: {self._first_unusable.reason}"
            )
        return notes

    def describe(self) -> dict[str, Any]:
        """The corpus's identity for a manifest: names and content hashes, no absolute paths."""
        return self._source.describe()


# What a corpus's entry in a manifest says of the pass over it, not of the corpus.
OF_THE_PASS = ("rows", "first_unusable")


def corpus_record(corpus: Corpus, rows: int, first_unusable: str | None) -> dict[str, Any]:
    """A corpus's entry in a manifest: its identity, its number of rows of the set, and its first unusable row."""
    unusable = {} if first_unusable is None else {"first_unusable": first_unusable}
    return {**corpus.describe(), "rows": rows, **unusable}


def _open(source: Any, field: str) -> CorpusSource:
    if not isinstance(source, str | Path):
        return MemorySource(source, field)
    if str(source) == BUILTIN:
        return BuiltinSource()
    if str(source).startswith(HUB):
        return HubSource(str(source), field)
    return FileSource(Path(source), field, LONGEST_TEXT)
