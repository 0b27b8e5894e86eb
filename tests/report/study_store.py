"""Stores of studies that never ran, with scores of a known shape."""

import json
from pathlib import Path

import numpy as np

import calibrant as cb
from calibrant.hashing import sha256_json
from calibrant.study.cells import Cell, grid, original
from calibrant.study.store import STORE_NAME, CellResult, CellRow, Failure, Store

RECIPES = ("gptq-w4a16-g64", "wanda-2:4")
SHIFT = {"gptq-w4a16-g64": 0.05, "wanda-2:4": 0.4}
SOURCE = {"c4": 0.0, "self": 0.002, "vocabulary": 0.2}
ITEMS = 40
# What a source's models get wrong of the first 30 items, which the original has right, and right of the others.
LOST, GAINED = {"c4": 3, "self": 1, "vocabulary": 20}, {"c4": 2, "self": 1, "vocabulary": 0}


def plan(**changed: object) -> cb.StudyPlan:
    """Three sources, four draws, two recipes, two sizes and two texts; ``changed`` replaces keys."""
    values = {
        "name": "made",
        "description": "Does it matter what a model is calibrated on?",
        "models": "demo",
        "sources": {
            "c4": {"corpus": "builtin"},
            "self": {"strategy": "self"},
            "vocabulary": {"strategy": "vocabulary"},
        },
        "draws": 4,
        "samples": [8, 32],
        "length": 128,
        "recipes": RECIPES,
        "texts": {"wiki": {"corpus": "builtin"}, "code": {"corpus": "builtin"}},
    }
    return cb.StudyPlan.model_validate({**values, **changed})


def items(cell: Cell) -> list[float]:
    """Scores of a task's items: draw 1 loses one item more than the others."""
    lost = LOST.get(cell.source, 0) + (cell.draw == 1)
    gained = GAINED.get(cell.source, 0)
    return [0.0] * lost + [1.0] * (30 - lost) + [1.0] * gained + [0.0] * (10 - gained)


def result(cell: Cell, texts: list[str], tasks: list[str]) -> CellResult:
    """Scores of a cell, the same whenever it runs."""
    rng = np.random.default_rng([cell.draw, cell.samples, *cell.source.encode(), *cell.recipe.encode()])
    measures: dict[tuple[str, str], tuple[float, float | None]] = {("", "output_bytes"): (12_345_678.0, None)}
    for number, text in enumerate(texts):
        kl = SHIFT.get(cell.recipe, 0.1) * (1 + number) + SOURCE.get(cell.source, 0.1) / max(cell.samples, 1) ** 0.5
        kl += 0.004 * rng.normal()
        measures[text, "kl"] = (kl, 0.001)
        measures[text, "perplexity"] = (20 * np.exp(kl), None)
        measures[text, "same_top"] = (float(np.exp(-kl)), None)
    clock = np.random.default_rng([cell.repeat, cell.draw, *cell.source.encode()])
    seconds = 12 + (6 if "gptq" in cell.recipe else 0) + clock.random()
    set_seconds = {"self": 40.0}.get(cell.source, 1.0) + clock.random()
    set_sha256 = sha256_json([cell.source, cell.draw, cell.samples, cell.seed])
    scores = {(task, "acc"): items(cell) for task in tasks}
    measures |= {place: (float(np.mean(own)), None) for place, own in scores.items()}
    return CellResult(measures, scores, {"seconds": seconds, "set_seconds": set_seconds}, set_sha256, 0, ())


def write_study(
    folder: Path,
    made: cb.StudyPlan,
    *,
    model: str = "model",
    failed: dict[int, str] | None = None,
    waiting: tuple[int, ...] = (),
) -> cb.Study:
    """A study whose cells of the numbers ``failed`` failed, with these errors, and those in ``waiting`` did not run."""
    cells = grid(made, [model], list(made.recipes))
    tasks = [] if made.tasks is None else list(made.tasks.names)
    cells += [original(model)] if tasks else []
    folder.mkdir(parents=True, exist_ok=True)
    store = Store(folder / STORE_NAME)
    about = {
        "name": made.name,
        "description": made.description,
        "plan": made.model_dump_json(),
        "calibrant": "0.1.0",
        "data_free": json.dumps([recipe for recipe in made.recipes if recipe.startswith("rtn")]),
        "libraries": json.dumps({"numpy": "2.0.0", "torch": "2.9.0"}),
    }
    store.set_cells([CellRow(cell, {"": str(number)}, False, "", "", "") for number, cell in enumerate(cells)], about)
    store.describe_tasks({task: {"main": "acc"} for task in tasks})
    for number, cell in enumerate(cells):
        if failed is not None and number in failed:
            store.fail(Failure(cell, failed[number], "Traceback (most recent call last):\n  somewhere\n"))
        elif number not in waiting:
            store.finish(cell, result(cell, list(made.texts), tasks))
    store.close()
    return cb.Study(folder)
