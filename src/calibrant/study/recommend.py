"""Which of a plan's sources to take: runs just enough of its cells to say so."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from calibrant.errors import CalibrantError
from calibrant.progress import Progress
from calibrant.study.cache import Cache
from calibrant.study.halving import Recommendation, recommend
from calibrant.study.plan import GivenSource, StudyPlan
from calibrant.study.resolve import Resolved
from calibrant.study.results import LOWER_IS_BETTER, Study
from calibrant.study.run import run_cells
from calibrant.study.workers import Workers

TEXT_MEASURES = ("kl", "log_perplexity_ratio", "perplexity", "same_top")


def searchable(plan: StudyPlan) -> StudyPlan:
    """The plan with all the draws that a search may use, and without repeats.

    Raises:
        CalibrantError: the plan has more than one model, recipe, size, length or seed.
    """
    if len(plan.sources) < 2:
        raise CalibrantError(f"study {plan.name}: a recommendation needs at least two sources")
    for name in ("models", "recipes", "samples", "length", "seeds"):
        if len(getattr(plan, name)) > 1:
            raise CalibrantError(
                f"study {plan.name}: a recommendation is for one model, recipe and size; {name} has several"
            )
    given = [len(source.sets) for source in plan.sources.values() if isinstance(source, GivenSource)]
    return plan.model_copy(update={"draws": min([plan.shards, *given]), "repeat": False})


def search(
    resolved: Resolved,
    measure: str,
    on: str,
    budget: int,
    smallest_difference: float,
    folder: Path,
    cache: Cache,
    workers: Workers,
    progress: Progress,
) -> Recommendation:
    """Run cells of a ``searchable`` plan by successive halving over draws, and keep their results in ``folder``.

    Raises:
        CalibrantError: no cell has the measure, the budget is too small, or a source's draws are one set.
    """
    plan = resolved.plan
    if on in plan.texts and measure not in TEXT_MEASURES:
        raise CalibrantError(f"{measure} is no measure on the text {on}; there are {', '.join(TEXT_MEASURES)}")
    if on not in plan.texts and (plan.tasks is None or on not in plan.tasks.names):
        raise CalibrantError(f"{on}: no such text or task in the plan")
    asked: set[tuple[str, int]] = set()

    def scores_of(wanted: Sequence[tuple[str, int]]) -> list[float]:
        asked.update(wanted)
        part = replace(resolved, cells=[one for one in resolved.cells if (one.cell.source, one.cell.draw) in asked])
        failures = run_cells(part, folder, cache, workers, progress)
        study = Study(folder)
        again = study.same_sets()
        if again:
            raise CalibrantError(f"source {again[0].source} gives the same set for several draws, so it has no spread")
        scores = study.scores()
        found = {(one.source, one.draw): one.value for one in scores if one.measure == measure and one.on == on}
        if not found and len(failures) < len(part.cells):
            there = sorted({f"{one.measure} on {one.on}" for one in scores if one.on})
            raise CalibrantError(f"no cell has a {measure} on {on}; there are {', '.join(there)}")
        return [found.get(one, math.nan) for one in wanted]

    return recommend(
        list(plan.sources),
        scores_of,
        higher_is_better=measure not in LOWER_IS_BETTER,
        budget=budget,
        most_draws=plan.draws,
        smallest_difference=smallest_difference,
    )
