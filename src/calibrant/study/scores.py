"""Scores: one number that was measured on one compressed model, the rows of the table that statistics read."""

from dataclasses import dataclass

from calibrant.study.cells import Cell


@dataclass(frozen=True)
class Score:
    """One measured number of one cell of a study.

    Attributes:
        model: name of the model.
        recipe: name of the recipe it was compressed by.
        source: name of the source or selection of the calibration set.
        draw: number of the set among the sets of ``seed``.
        samples, length: rows of the set, tokens per row.
        seed: seed of the set.
        repeat: 0, or 1 for the second run of a cell on the same set.
        measure: what was measured: "kl", "log_perplexity_ratio", "perplexity", "accuracy", "seconds", ...
        on: the text or task it was measured on, "" if none.
        value: the number.
    """

    model: str
    recipe: str
    source: str
    draw: int
    samples: int
    length: int
    seed: int
    repeat: int
    measure: str
    on: str
    value: float

    @property
    def cell(self) -> Cell:
        """The cell that it was measured on."""
        return Cell(self.model, self.recipe, self.source, self.draw, self.samples, self.length, self.seed, self.repeat)
