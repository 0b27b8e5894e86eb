"""The studies of the repository are plans that load."""

from pathlib import Path

import pytest

import calibrant as cb

FOLDER = Path(__file__).parents[2] / "studies"
STUDIES = sorted([*FOLDER.glob("*.yaml"), *FOLDER.glob("full/*.yaml")])


def test_there_are_studies() -> None:
    assert STUDIES


@pytest.mark.parametrize("file", STUDIES, ids=lambda path: str(path.relative_to(FOLDER)))
def test_a_committed_study_loads(file: Path) -> None:
    plan = cb.load_study_plan(file)
    assert plan.name == file.stem
    for recipe in plan.recipes:
        cb.load_recipe(recipe)


@pytest.mark.parametrize("store", sorted(FOLDER.glob("*/study.sqlite")), ids=lambda path: path.parent.name)
def test_committed_results_are_those_of_the_plan(store: Path) -> None:
    study = cb.Study(store.parent)
    assert study.plan == cb.load_study_plan(FOLDER / f"{store.parent.name}.yaml").as_written
    assert study.counts()["failed"] == 0
    assert study.counts()["done"] > 0
