"""Which documents of a corpus may become candidates at all; filters stack on any selection."""

from typing import Protocol

from calibrant.calibration.document import Document


class Filter(Protocol):
    """One test of documents, in the corpus's order; it may remember what it has seen."""

    @property
    def count_name(self) -> str:
        """Under which name the manifest counts what was dropped."""

    def keeps(self, document: Document) -> bool:
        """Whether the document stays."""
