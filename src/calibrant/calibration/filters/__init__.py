"""Filters: which documents of a corpus may become candidates of any selection."""

from typing import Protocol

from calibrant.calibration.document import Document


class Filter(Protocol):
    """A test of documents in the corpus's order; it may remember earlier documents."""

    @property
    def count_name(self) -> str:
        """Name under which the manifest counts dropped documents."""

    def keeps(self, document: Document) -> bool:
        """Whether the document stays."""
