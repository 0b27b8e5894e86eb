"""Self-contained HTML page about one compressed model, which opens from disk without a network."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from calibrant.report.page import render
from calibrant.report.shown_table import shown_table
from calibrant.report.tables import Table, number_text

# The template contains the same line. A file with this line may be replaced by a newer page.
PAGE_MARK = '<meta name="generator" content="calibrant report">'
_STAGES = {
    "generate": "generating the calibration set",
    "sensitivity": "sensitivities of layers",
    "learn": "training",
    "embed": "embeddings",
    "load": "reading weights",
    "transform": "searching scales",
    "forward": "forward passes",
    "statistics": "statistics of inputs",
    "solve": "solving layers",
    "reconstruct": "reconstructing blocks",
    "prune": "removing modules",
    "distil": "distillation",
    "exchange": "exchange between processes",
    "write": "writing",
    "journal": "saving states",
    "verify": "reading back and comparing",
}
# Text stays readable on the strongest colour, in the light and in the dark.
_STRONGEST = 0.6


@dataclass(frozen=True)
class HeatMap:
    """Errors by block and kind of layer: ``values[row][column]``, None where a block has no such layer."""

    rows: list[str]
    columns: list[str]
    values: list[list[float | None]]


@dataclass(frozen=True)
class ShownSet:
    """What the page shows of a calibration set: facts and numbers by name, its first rows, or why it shows no rows."""

    facts: dict[str, str]
    numbers: dict[str, str]
    rows: list[str]
    no_rows: str = ""


@dataclass(frozen=True)
class Sample:
    """A prompt, and what the original and the compressed model write after it."""

    prompt: str
    original: str
    compressed: str


@dataclass(frozen=True)
class RunPage:
    """All that the page shows.

    Attributes:
        name: of the output.
        summary: what came of the run, in a few sentences.
        warnings: what readers must know first.
        facts: numbers of the run, by label.
        errors: errors by block and kind; None if no layer was solved one by one.
        measures: what the errors are measured by.
        seconds: time by stage.
        calibration: the set; None if the method uses none.
        samples: continuations of prompts; empty if no original was given.
        notes: of the run.
        tables: the tables.
        recipe: the recipe as YAML.
        versions: versions of libraries.
    """

    name: str
    summary: list[str]
    warnings: list[str]
    facts: dict[str, str]
    errors: HeatMap | None
    measures: list[str]
    seconds: dict[str, float]
    calibration: ShownSet | None
    samples: list[Sample]
    notes: list[str]
    tables: list[Table]
    recipe: str
    versions: dict[str, str]


def run_page(page: RunPage) -> str:
    """The page as HTML."""
    total = sum(page.seconds.values())
    return render(
        "run.html",
        page=page,
        heat=None if page.errors is None else _heat(page.errors),
        stages=[(label, value, value / total if total else 0.0) for label, value in _stages(page.seconds)],
        samples=[(one, _alike(one.original, one.compressed)) for one in page.samples],
        tables=[shown_table(table, {}) for table in page.tables],
    )


def _stages(seconds: Mapping[str, float]) -> list[tuple[str, float]]:
    """Stages in the order of a run, by the names that readers know; those without a time of their own are left out."""
    known = [(label, seconds[name]) for name, label in _STAGES.items() if seconds.get(name, 0.0) > 0]
    return known + [(name, value) for name, value in seconds.items() if name not in _STAGES]


def _heat(errors: HeatMap) -> dict[str, object]:
    """Cells with text and strength of colour: errors are squares, their roots are what readers compare."""
    largest = max((value for row in errors.values for value in row if value is not None), default=0.0)
    cells = [
        [
            None
            if value is None
            else (number_text(float(f"{value:.2g}")), _STRONGEST * math.sqrt(value / largest) if largest else 0.0)
            for value in row
        ]
        for row in errors.values
    ]
    return {"cells": cells, "largest": number_text(largest), "strongest": _STRONGEST}


def _alike(one: str, other: str) -> int:
    """Number of characters at which both begin alike."""
    pairs: Sequence[tuple[str, str]] = list(zip(one, other, strict=False))
    return next((number for number, (left, right) in enumerate(pairs) if left != right), len(pairs))
