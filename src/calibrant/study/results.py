"""Reads a study's store: scores, failures, the analysis, the report, and tables for other programs."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from calibrant.errors import CalibrantError
from calibrant.evaluation.tasks.results import TaskComparison, compare_items
from calibrant.output_folder import whole_file
from calibrant.study.analysis import analyse
from calibrant.study.cells import ORIGINAL, Cell, original
from calibrant.study.findings import Analysis
from calibrant.study.plan import GeneratedSource, StudyPlan
from calibrant.study.scores import Score
from calibrant.study.store import PLACE, STORE_NAME, Failure, read_only, rows
from calibrant.study.task_findings import TaskFinding, task_findings

# The costs that are compared as scores are; times of stages and memory stay in the store.
SECONDS, SET_SECONDS = "seconds", "set_seconds"
OUTPUT_BYTES = "output_bytes"
LOWER_IS_BETTER = ("kl", "perplexity", "log_perplexity_ratio", OUTPUT_BYTES, SECONDS, SET_SECONDS)
# Costs that the analysis leaves out: parts of the seconds, and memory, which is that of the worker so far.
_LEFT_OUT = ("seconds of ", "peak_memory")
# The unweighted mean over tasks of each one's main metric, the papers' number.
ACCURACY = "accuracy"
TABLES = ("cells", "scores", "items")


@dataclass(frozen=True)
class CellState:
    """A cell that is done, failed or waiting, its error if it failed, and notes of its compression if it is done."""

    cell: Cell
    state: str
    error: str | None
    notes: tuple[str, ...]


class Study:
    """The results of a study in its folder, as they are now.

    Raises:
        CalibrantError: the folder has no store; messages name it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._file = self.folder / STORE_NAME
        about = {row["name"]: row["value"] for row in self._rows("SELECT name, value FROM study")}
        if "plan" not in about:
            raise CalibrantError(f"{self._file}: has no cells yet; run the study first")
        self.plan = StudyPlan.model_validate_json(about["plan"])
        self.versions: dict[str, str] = {"calibrant": about["calibrant"], **json.loads(about["libraries"])}
        self.tasks: dict[str, dict[str, Any]] = json.loads(about.get("tasks", "{}"))
        self._data_free = tuple(json.loads(about["data_free"]))

    def scores(self) -> list[Score]:
        """Scores of all compressed models, with the mean accuracy over tasks."""
        return self._with_mean(self._scores("recipe <> ?"))

    def originals(self) -> list[Score]:
        """Scores of the original models, with the mean accuracy over tasks."""
        return self._with_mean(self._scores("recipe = ?"))

    def task_comparisons(self) -> list[tuple[Cell, TaskComparison]]:
        """Every compressed model against its original on the same items of each task, by McNemar's test."""
        # One row a cell and task: a study may have millions of items.
        query = (
            f"SELECT {PLACE}, dataset, measure, json_group_array(item) AS items, json_group_array(value) AS scores "
            "FROM items JOIN cells USING (cell) WHERE dataset IN (SELECT value FROM json_each(?)) "
            "GROUP BY cell, dataset, measure ORDER BY cell, dataset, measure"
        )
        scores: dict[tuple[str, str], dict[Cell, list[float]]] = {}
        for row in self._rows(query, json.dumps([*self.tasks])):
            items, values = json.loads(row["items"]), json.loads(row["scores"])
            own = [value for _, value in sorted(zip(items, values, strict=True))]
            scores.setdefault((row["dataset"], row["measure"]), {})[_cell(row)] = own
        return [
            (cell, compare_items(task, metric, own, of_cells[original(cell.model)]))
            for (task, metric), of_cells in sorted(scores.items())
            for cell, own in of_cells.items()
            if cell.recipe != ORIGINAL and original(cell.model) in of_cells
        ]

    def task_findings(self) -> list[TaskFinding]:
        """Every source against its original on the same items: docs/statistics.md "Tasks, item by item"."""
        return task_findings(self.task_comparisons(), repeated=set(self.same_sets()), data_free=self._data_free)

    def failures(self) -> list[Failure]:
        """Cells that failed when they ran last."""
        found = self._rows(f"SELECT {PLACE}, error, traceback FROM cells WHERE state = 'failed' ORDER BY cell")
        return [Failure(_cell(row), row["error"], row["traceback"]) for row in found]

    def same_sets(self) -> list[Cell]:
        """Cells whose set is that of an earlier draw or seed of their source, which the analysis leaves out.

        Sources without randomness, or of a corpus that is too small to differ, give such sets.
        """
        seen: set[tuple[Any, ...]] = set()
        found = []
        query = f"SELECT {PLACE}, set_sha256 FROM cells WHERE set_sha256 IS NOT NULL AND recipe <> ? ORDER BY cell"
        for row in self._rows(query, ORIGINAL):
            what = (*(row[name] for name in ("model", "recipe", "source", "samples", "length", "repeat")),)
            if (what, row["set_sha256"]) in seen:
                found.append(_cell(row))
            seen.add((what, row["set_sha256"]))
        return found

    def counts(self) -> dict[str, int]:
        """Numbers of cells that are done, failed and waiting."""
        found = self._rows("SELECT state, count(*) AS cells FROM cells WHERE recipe <> ? GROUP BY state", ORIGINAL)
        return {"done": 0, "failed": 0, "waiting": 0, **{row["state"]: row["cells"] for row in found}}

    def cells(self) -> list[CellState]:
        """All cells, as they stand."""
        query = f"SELECT {PLACE}, state, error, notes FROM cells WHERE recipe <> ? ORDER BY cell"
        return [
            CellState(_cell(row), row["state"], row["error"], tuple(json.loads(row["notes"] or "[]")))
            for row in self._rows(query, ORIGINAL)
        ]

    def analyse(self, *, paired: bool = False, difference: float | None = None, seed: int = 0) -> Analysis:
        """All statistics; see docs/statistics.md "What is computed".

        ``paired`` compares sources draw by draw, for sources whose draws share documents. The draws needed are to show
        a ``difference`` of two sources, by default that of the two best. ``seed`` is the bootstrap's.

        Raises:
            CalibrantError: ``difference`` is not above 0.
        """
        known = [score for score in self.scores() if not score.measure.startswith(_LEFT_OUT)]
        random = [label for label, one in self.plan.sources.items() if _is_vocabulary(one)]
        return analyse(
            known,
            {score.measure: score.measure not in LOWER_IS_BETTER for score in known},
            repeated=set(self.same_sets()),
            data_free=self._data_free,
            timed=(SECONDS, SET_SECONDS),
            left_out=random,
            paired=paired,
            difference=difference,
            seed=seed,
        )

    def export(self, folder: str | Path) -> list[Path]:
        """Write the tables of cells, scores and items as Parquet and CSV; files of these names are replaced.

        Raises:
            CalibrantError: the folder cannot be written.
        """
        import pyarrow as pa
        import pyarrow.csv
        import pyarrow.parquet

        written = []
        for name in TABLES:
            query = "SELECT * FROM items JOIN cells USING (cell)" if name == "items" else f"SELECT * FROM {name}"
            table = pa.Table.from_pylist(self._rows(query))
            for ending, write in ((".parquet", pyarrow.parquet.write_table), (".csv", pyarrow.csv.write_csv)):
                target = Path(folder) / f"{name}{ending}"
                with whole_file(target) as beside:
                    write(table, beside)
                written.append(target)
        return written

    def report(self, folder: str | Path | None = None, *, paired: bool = False) -> Path:
        """Write ``report.html``, one page that works offline, and its tables as CSV, Markdown and LaTeX in ``tables/``.

        Earlier files of these names are replaced.

        Args:
            folder: where to write; by default the study's folder.
            paired: see ``analyse``.

        Returns:
            The page's file.

        Raises:
            CalibrantError: the extra ``report`` is not installed, the folder cannot be written, or its ``report.html``
                is no page of a study.
        """
        from calibrant.study.report import write_report  # which reads studies

        return write_report(self, self.folder if folder is None else Path(folder), paired=paired)

    def _scores(self, condition: str) -> list[Score]:
        query = f"SELECT {PLACE}, dataset, measure, value FROM scores WHERE {condition}"
        return [
            Score(**_place(row), measure=row["measure"], on=row["dataset"], value=row["value"])
            for row in self._rows(query, ORIGINAL)
        ]

    def _with_mean(self, scores: list[Score]) -> list[Score]:
        """The scores, and the mean of those cells that have all tasks."""
        found: dict[Cell, list[float]] = {}
        for score in scores:
            if self.tasks.get(score.on, {}).get("main") == score.measure:
                found.setdefault(score.cell, []).append(score.value)
        on = f"mean of {len(self.tasks)} tasks"
        means = [
            # Rounded, since sums of equal shares in another order would differ and count as spread.
            Score(**asdict(cell), measure=ACCURACY, on=on, value=round(sum(values) / len(values), 12))
            for cell, values in found.items()
            if len(values) == len(self.tasks) > 1
        ]
        return scores + means

    def _rows(self, query: str, *values: str) -> list[dict[str, Any]]:
        with read_only(self._file) as connection:
            return rows(connection, query, values)


def _place(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in PLACE.split(", ")}


def _cell(row: dict[str, Any]) -> Cell:
    return Cell(**_place(row))


def _is_vocabulary(source: object) -> bool:
    return isinstance(source, GeneratedSource) and source.strategy == "vocabulary"
