"""Runs a study: first what is missing of its sets and originals, then of its cells."""

import fcntl
import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from calibrant.errors import CalibrantError
from calibrant.hashing import sha256_json
from calibrant.pipeline.record import library_versions
from calibrant.progress import Progress
from calibrant.study.cache import Cache
from calibrant.study.cells import Cell, original
from calibrant.study.resolve import CellWork, Model, Resolved
from calibrant.study.steps import Step, TaskStep, Yardstick
from calibrant.study.store import STORE_NAME, CellResult, CellRow, Failure, Store, finished
from calibrant.study.workers import Finished, Workers
from calibrant.version import __version__

_LOCK = ".calibrant.lock"


def run_cells(resolved: Resolved, folder: Path, cache: Cache, workers: Workers, progress: Progress) -> list[Failure]:
    """Run what is missing, store the results in ``folder``, and return the cells that failed.

    Raises:
        CalibrantError: another process runs the study, or its folder cannot be written.
    """
    cache.clean()
    with _locked(folder), closing(Store(folder / STORE_NAME)) as store:
        originals = {model.label: resolved.yardsticks(model.label) for model in resolved.models.values()}
        rows = [_original_row(model, originals[model.label]) for model in resolved.models.values()]
        gone, again = store.set_cells([*rows, *map(_row, resolved.cells)], _about(resolved))
        if again:
            progress.note(
                f"{again} finished cells are measured on more texts or tasks than before; what is measured stays, and "
                "models whose outputs were not kept are compressed again"
            )
        if gone:
            progress.note(f"{gone} cells are no longer in the plan or have changed; their results stay in the cache")
        done = store.done()
        missing = [work for work in resolved.cells if work.cell not in done]
        unfinished = [row.cell for row in rows if row.cell not in done]
        needed: list[Step] = [work.set_step for work in missing]
        needed += [step for work in missing for step in work.yardsticks.values()]
        needed += [step for cell in unfinished for step in originals[cell.model].values()]
        failed = _run(needed, cache, workers, progress, "sets and originals", lambda _: None)
        for cell in unfinished:
            steps = originals[cell.model]
            ended = next((failed[step.key] for step in steps.values() if step.key in failed), None)
            if ended is not None:
                store.fail(Failure(cell, ended.error or "", ended.traceback))
                continue
            store.finish(cell, _original_result(cache, steps))
            store.describe_tasks(_tasks(cache, steps))
        cells: dict[str, list[CellWork]] = {}
        for work in missing:
            if not any(step.key in failed for step in work.needs):
                cells.setdefault(work.step.key, []).append(work)

        def finish(step: Step) -> None:
            for work in cells[step.key]:
                store.finish(work.cell, _cell_result(cache, work))

        failed |= _run([works[0].step for works in cells.values()], cache, workers, progress, "cells", finish)
        failures = []
        for work in missing:
            ended = next((failed[step.key] for step in (*work.needs, work.step) if step.key in failed), None)
            if ended is not None:
                failures.append(Failure(work.cell, ended.error or "", ended.traceback))
                store.fail(failures[-1])
        return failures


def finished_cells(resolved: Resolved, folder: Path) -> set[Cell]:
    """The cells whose results are in the study's ``folder``.

    Raises:
        CalibrantError: its store cannot be read.
    """
    return finished(folder / STORE_NAME, list(map(_row, resolved.cells)))


def _run(
    steps: Iterable[Step],
    cache: Cache,
    workers: Workers,
    progress: Progress,
    label: str,
    finish: Callable[[Step], None],
) -> dict[str, Finished]:
    """Run the steps whose results the cache lacks, ``finish`` each, and return those that failed by their key."""
    unique = list({step.key: step for step in steps}.values())
    failed = {}
    with progress.task(label, len(unique)) as task:
        waiting = []
        for step in unique:
            if step.is_done(cache):
                finish(step)
                task.advance()
            else:
                waiting.append(step)
        with closing(workers.run(waiting)) as results:
            for ended in results:
                step = waiting[ended.number]
                if ended.error is None:
                    finish(step)
                else:
                    failed[step.key] = ended
                    progress.note(f"failed: {ended.error}")
                task.advance()
    return failed


def _original_row(model: Model, steps: dict[str, Yardstick]) -> CellRow:
    keys = {label: step.key for label, step in steps.items()}
    return CellRow(original(model.label), keys, False, "", sha256_json(model.identity), "")


def _row(work: CellWork) -> CellRow:
    recipe = sha256_json(work.step.recipe.model_dump(mode="json"))
    compression, *measured = work.step.result_keys()
    keys = {"": compression, **dict(zip(work.yardsticks, measured, strict=True))}
    return CellRow(work.cell, keys, work.step.keep_output, work.set_step.key, work.model_sha256, recipe)


def _original_result(cache: Cache, steps: dict[str, Yardstick]) -> CellResult:
    return _gathered(cache, {label: step.key for label, step in steps.items()}, {})


def _cell_result(cache: Cache, work: CellWork) -> CellResult:
    compression, *measured = work.step.result_keys()
    made, ran = cache.result(work.set_step.key) or {}, cache.result(compression) or {}
    costs = {f"seconds of {stage}": seconds for stage, seconds in ran["seconds"].items()}
    costs |= {"seconds": sum(ran["seconds"].values()), "set_seconds": made["seconds"]}
    costs["peak_memory_bytes"] = ran["peak_memory_bytes"]
    keys = {"": compression, **dict(zip(work.yardsticks, measured, strict=True))}
    found = _gathered(cache, keys, costs)
    return CellResult(found.measures, found.items, costs, ran["set_sha256"], ran["fallbacks"], tuple(ran["notes"]))


def _tasks(cache: Cache, steps: dict[str, Yardstick]) -> dict[str, Any]:
    """What lm-eval says of each task: the same for every model."""
    results = {name: cache.result(step.key) or {} for name, step in steps.items() if isinstance(step, TaskStep)}
    return {name: result["task"] for name, result in results.items()}


def _gathered(cache: Cache, keys: dict[str, str], costs: dict[str, float]) -> CellResult:
    """The results with these keys, by data set."""
    measures: dict[tuple[str, str], tuple[float, float | None]] = {}
    items: dict[tuple[str, str], list[float]] = {}
    for dataset, key in keys.items():
        result = cache.result(key) or {}
        measures |= {(dataset, name): (value[0], value[1]) for name, value in result["measures"].items()}
        items |= {(dataset, name): values for name, values in result["items"].items()}
    return CellResult(measures, items, costs)


def _about(resolved: Resolved) -> dict[str, str]:
    """What the store says about the study."""
    return {
        "name": resolved.plan.name,
        "description": resolved.plan.description,
        "plan": resolved.plan.as_written.model_dump_json(),
        "calibrant": __version__,
        "data_free": json.dumps([name for name, recipe in resolved.recipes.items() if not recipe.needs_data]),
        "libraries": json.dumps(library_versions(), sort_keys=True),
    }


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the study's folder for this process."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / _LOCK).open("w")
    except OSError as error:
        raise CalibrantError(f"{folder}: cannot be written ({error.strerror})") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CalibrantError(f"{folder}: another process runs this study; wait for it, or end it") from error
        try:
            yield
        except sqlite3.Error as error:
            raise CalibrantError(f"{folder / STORE_NAME}: cannot be written ({error}); run the study again") from error
