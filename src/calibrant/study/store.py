"""A study's results: one SQLite file that any program of SQL opens, written by one process, one transaction a cell."""

import json
import os
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from calibrant.errors import CalibrantError, first_line
from calibrant.hashing import sha256_json
from calibrant.study.cells import Cell

STORE_NAME = "study.sqlite"
_VERSION = 1
_FIX = "move it away and run the study again, which takes from the cache what is there, or choose another output"
# How long a writer waits for a program that reads.
_PATIENCE_SECONDS = 60
PLACE = "model, recipe, source, draw, samples, length, seed, repeat"
_SCHEMA = """
CREATE TABLE study (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE cells (
    cell INTEGER PRIMARY KEY,
    model TEXT NOT NULL, recipe TEXT NOT NULL, source TEXT NOT NULL, draw INTEGER NOT NULL,
    samples INTEGER NOT NULL, length INTEGER NOT NULL, seed INTEGER NOT NULL, repeat INTEGER NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('waiting', 'done', 'failed')),
    error TEXT, traceback TEXT,
    key TEXT NOT NULL, set_key TEXT NOT NULL, set_sha256 TEXT, model_sha256 TEXT NOT NULL, recipe_sha256 TEXT NOT NULL,
    fallbacks INTEGER, notes TEXT,
    UNIQUE (model, recipe, source, draw, samples, length, seed, repeat)
) STRICT;
CREATE TABLE measures (
    cell INTEGER NOT NULL REFERENCES cells ON DELETE CASCADE,
    dataset TEXT NOT NULL, measure TEXT NOT NULL, value REAL NOT NULL, standard_error REAL,
    PRIMARY KEY (cell, dataset, measure)
) STRICT, WITHOUT ROWID;
CREATE TABLE items (
    cell INTEGER NOT NULL REFERENCES cells ON DELETE CASCADE,
    dataset TEXT NOT NULL, measure TEXT NOT NULL, item INTEGER NOT NULL, value REAL NOT NULL,
    PRIMARY KEY (cell, dataset, measure, item)
) STRICT, WITHOUT ROWID;
CREATE TABLE costs (
    cell INTEGER NOT NULL REFERENCES cells ON DELETE CASCADE,
    cost TEXT NOT NULL, value REAL NOT NULL,
    PRIMARY KEY (cell, cost)
) STRICT, WITHOUT ROWID;
CREATE VIEW scores AS
    SELECT model, recipe, source, draw, samples, length, seed, repeat, dataset, measure, value, standard_error
    FROM measures JOIN cells USING (cell)
    UNION ALL
    SELECT model, recipe, source, draw, samples, length, seed, repeat, '', cost, value, NULL
    FROM costs JOIN cells USING (cell);
"""


@dataclass(frozen=True)
class CellRow:
    """What identifies a cell's result: hashes of its steps and inputs.

    ``keys`` are those of its results by what they are of: a text's label, a task's name, or "" for the compression.
    """

    cell: Cell
    keys: dict[str, str]
    keeps_output: bool
    set_key: str
    model_sha256: str
    recipe_sha256: str

    @property
    def key(self) -> str:
        """The hash of all keys."""
        return self.key_of(self.keys)

    def key_of(self, labels: Collection[str]) -> str:
        """The hash that the row had if only ``labels`` were measured."""
        kept = {"kept": self.keeps_output} if "" in self.keys else {}
        return sha256_json({label: key for label, key in self.keys.items() if label in ("", *labels)} | kept)


@dataclass(frozen=True)
class CellResult:
    """What came of a cell.

    ``measures`` and ``items`` are by data set (a text's label, a task's name, or "") and measure; ``costs`` are what
    differs between two runs of the same: seconds and memory.
    """

    measures: dict[tuple[str, str], tuple[float, float | None]]
    items: dict[tuple[str, str], list[float]]
    costs: dict[str, float]
    set_sha256: str | None = None
    fallbacks: int | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Failure:
    """A failed cell and what it failed of, in a sentence and in full."""

    cell: Cell
    error: str
    traceback: str | None = None


class Store:
    """A study's file.

    Raises:
        CalibrantError: the file is no study's, or of another version.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        is_new = not file.exists()
        try:
            self._connection = sqlite3.connect(file, timeout=_PATIENCE_SECONDS, isolation_level=None)
            self._connection.execute("PRAGMA foreign_keys = ON")
            self._connection.execute("PRAGMA synchronous = FULL")
            if is_new or not self._tables():
                with self._transaction():
                    for statement in _SCHEMA.split(";\n"):
                        self._connection.execute(statement)
                    self._connection.execute(f"PRAGMA user_version = {_VERSION}")
            version = self._connection.execute("PRAGMA user_version").fetchone()[0]
        except sqlite3.Error as error:
            raise CalibrantError(f"{file}: cannot be opened as a study's store ({error}); {_FIX}") from error
        if version != _VERSION:
            raise CalibrantError(f"{file}: not a study's store of this version of calibrant; {_FIX}")

    def _tables(self) -> list[Any]:
        return self._connection.execute("SELECT name FROM sqlite_schema").fetchall()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._connection.execute("ROLLBACK")
            raise
        self._connection.execute("COMMIT")

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def set_cells(self, rows: Sequence[CellRow], about: dict[str, str]) -> tuple[int, int]:
        """Make the store hold exactly these cells; those that are already there with the same keys stay as they are.

        Cells that are measured on more than before wait again, and keep their measures until then. Returns the number
        of finished cells that went, and that of those which wait again.

        Raises:
            CalibrantError: the store is that of a study with another name.
        """
        name = self._connection.execute("SELECT value FROM study WHERE name = 'name'").fetchone()
        if name is not None and name[0] != about["name"]:
            raise CalibrantError(f"{self.file}: holds the study {name[0]}; choose another output for {about['name']}")
        with self._transaction():
            found = {
                Cell(*place): (number, key)
                for number, key, *place in self._connection.execute(f"SELECT cell, key, {PLACE} FROM cells")
            }
            wanted = {row.cell: row for row in rows}
            before = self._measured_on()
            same = {cell for cell, (_, key) in found.items() if cell in wanted and wanted[cell].key == key}
            more = {
                cell
                for cell, (_, key) in found.items()
                if cell in wanted and cell not in same and wanted[cell].key_of(before) == key
            }
            kept = same | more
            gone = [(number,) for cell, (number, _) in found.items() if cell not in kept]
            done = {row[0] for row in self._connection.execute("SELECT cell FROM cells WHERE state = 'done'")}
            lost = sum(number in done for (number,) in gone)
            again = sum(found[cell][0] in done for cell in more)
            self._connection.executemany("DELETE FROM cells WHERE cell = ?", gone)
            self._connection.executemany(
                "UPDATE cells SET state = 'waiting', key = ? WHERE cell = ?",
                [(wanted[cell].key, found[cell][0]) for cell in more],
            )
            number = self._connection.execute("SELECT coalesce(max(cell), 0) FROM cells").fetchone()[0]
            for row in rows:
                if row.cell not in kept:
                    number += 1
                    hashes = (row.key, row.set_key, row.model_sha256, row.recipe_sha256)
                    self._connection.execute(
                        f"INSERT INTO cells (cell, state, key, set_key, model_sha256, recipe_sha256, {PLACE}) "
                        f"VALUES (?, 'waiting', {', '.join('?' * 12)})",
                        (number, *hashes, *asdict(row.cell).values()),
                    )
            self._connection.executemany("INSERT OR REPLACE INTO study VALUES (?, ?)", about.items())
        return lost, again

    def _measured_on(self) -> set[str]:
        """Labels of the texts and names of the tasks in the plan that the store holds."""
        row = self._connection.execute("SELECT value FROM study WHERE name = 'plan'").fetchone()
        plan = json.loads(row[0]) if row is not None else {}
        return {*plan.get("texts", {}), *(plan.get("tasks") or {}).get("names", ())}

    def describe_tasks(self, tasks: dict[str, Any]) -> None:
        """Store what lm-eval says of each task: versions, hashes, the main metric."""
        about = ("tasks", json.dumps(tasks, sort_keys=True))
        self._connection.execute("INSERT OR REPLACE INTO study VALUES (?, ?)", about)

    def done(self) -> set[Cell]:
        """The cells with results."""
        return {Cell(*place) for place in self._connection.execute(f"SELECT {PLACE} FROM cells WHERE state = 'done'")}

    def finish(self, cell: Cell, result: CellResult) -> None:
        """Store a cell's results."""
        with self._transaction():
            number = self._number(cell)
            self._clear(number)
            self._connection.execute(
                "UPDATE cells SET state = 'done', set_sha256 = ?, fallbacks = ?, notes = ? WHERE cell = ?",
                (result.set_sha256, result.fallbacks, json.dumps(result.notes), number),
            )
            self._connection.executemany(
                "INSERT INTO measures VALUES (?, ?, ?, ?, ?)",
                [(number, *place, *value) for place, value in result.measures.items()],
            )
            self._connection.executemany(
                "INSERT INTO items VALUES (?, ?, ?, ?, ?)",
                [
                    (number, *place, item, value)
                    for place, values in result.items.items()
                    for item, value in enumerate(values)
                ],
            )
            self._connection.executemany(
                "INSERT INTO costs VALUES (?, ?, ?)", [(number, cost, value) for cost, value in result.costs.items()]
            )

    def fail(self, failure: Failure) -> None:
        """Store why a cell failed."""
        with self._transaction():
            number = self._number(failure.cell)
            self._clear(number)
            self._connection.execute(
                "UPDATE cells SET state = 'failed', error = ?, traceback = ? WHERE cell = ?",
                (failure.error, failure.traceback, number),
            )

    def _number(self, cell: Cell) -> int:
        where = " AND ".join(f"{name} = ?" for name in asdict(cell))
        row = self._connection.execute(f"SELECT cell FROM cells WHERE {where}", tuple(asdict(cell).values())).fetchone()
        return int(row[0])

    def _clear(self, number: int) -> None:
        self._connection.execute("UPDATE cells SET error = NULL, traceback = NULL WHERE cell = ?", (number,))
        for table in ("measures", "items", "costs"):
            self._connection.execute(f"DELETE FROM {table} WHERE cell = ?", (number,))


@contextmanager
def read_only(file: Path) -> Iterator[sqlite3.Connection]:
    """The store, open for reading.

    Raises:
        CalibrantError: there is no store that can be read.
    """
    if not file.is_file():
        raise CalibrantError(f"{file}: does not exist; run the study first")
    try:
        # What a killed writer began is rolled back by the next to open the file, who must be able to write.
        mode = "rw" if os.access(file, os.W_OK) else "ro"
        with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode={mode}", uri=True)) as connection:
            if connection.execute("PRAGMA user_version").fetchone()[0] != _VERSION:
                raise CalibrantError(f"{file}: not a study's store of this version of calibrant; {_FIX}")
            yield connection
    except sqlite3.Error as error:
        raise CalibrantError(f"{file}: cannot be read as a study's store ({first_line(error)}); {_FIX}") from error


def finished(file: Path, rows: Sequence[CellRow]) -> set[Cell]:
    """Those of ``rows`` whose results the store has; none if there is no store.

    Raises:
        CalibrantError: the file cannot be read.
    """
    if not file.exists() or file.stat().st_size == 0:  # a run that was killed before its first commit
        return set()
    with read_only(file) as connection:
        found = connection.execute(f"SELECT key, {PLACE} FROM cells WHERE state = 'done'").fetchall()
    keys = {Cell(*place): key for key, *place in found}
    return {row.cell for row in rows if keys.get(row.cell) == row.key}


def rows(connection: sqlite3.Connection, query: str, values: Iterable[Any] = ()) -> list[dict[str, Any]]:
    """The rows of a query as dicts."""
    found = connection.execute(query, tuple(values))
    names = [column[0] for column in found.description]
    return [dict(zip(names, row, strict=True)) for row in found]
