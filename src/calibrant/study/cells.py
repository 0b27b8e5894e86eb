"""The cells of a study's grid, in the order in which they run."""

from dataclasses import dataclass

from calibrant.study.plan import StudyPlan

# The label of an original's own scores, beside those of recipes.
ORIGINAL = "original"


@dataclass(frozen=True)
class Cell:
    """One compression of a study and where it stands in the grid.

    ``repeat`` is 1 for the cells that run on the same set again, to measure the noise of the implementation.
    """

    model: str
    recipe: str
    source: str
    draw: int
    samples: int
    length: int
    seed: int
    repeat: int = 0


def original(model: str) -> Cell:
    """Where the scores of an uncompressed model stand."""
    return Cell(model, ORIGINAL, "", 0, 0, 0, 0)


def grid(plan: StudyPlan, models: list[str], recipes: list[str]) -> list[Cell]:
    """All cells; ``models`` and ``recipes`` are labels in the plan's order.

    Draws come last to be finished: whenever a study stops, its sources have about as many draws each.
    """
    cells = [
        Cell(model, recipe, source, draw, samples, length, seed)
        for draw in range(plan.draws)
        for seed in plan.seeds
        for samples in plan.samples
        for length in plan.length
        for model in models
        for recipe in recipes
        for source in plan.sources
    ]
    first = (next(iter(plan.sources)), 0, max(plan.samples), plan.length[0], plan.seeds[0])
    again = [Cell(model, recipe, *first, 1) for model in models for recipe in recipes] if plan.repeat else []
    return cells + again
