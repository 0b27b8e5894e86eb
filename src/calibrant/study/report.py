"""The report of a study: a page, and its tables as files."""

from pathlib import Path

import yaml

from calibrant.errors import CalibrantError
from calibrant.output_folder import whole_file
from calibrant.report.page import is_replaceable
from calibrant.report.study_page import PAGE_MARK, Card, Choice, Failed, StudyPage, study_page
from calibrant.report.tables import as_csv, as_latex, as_markdown
from calibrant.study.answer import answer, main_settings
from calibrant.study.cells import Cell
from calibrant.study.findings import Analysis
from calibrant.study.measures import measure_name, unit_of
from calibrant.study.plan import StudyPlan
from calibrant.study.report_charts import charts, measure_key
from calibrant.study.report_tables import tables
from calibrant.study.report_task_tables import task_tables
from calibrant.study.results import OUTPUT_BYTES, SECONDS, SET_SECONDS, Study
from calibrant.study.score_table import Setting

COSTS = (SECONDS, SET_SECONDS, OUTPUT_BYTES)


def write_report(study: Study, folder: Path, *, paired: bool) -> Path:
    """Write the page and the tables; see ``Study.report``."""
    target = folder / "report.html"
    if not is_replaceable(target, PAGE_MARK):
        raise CalibrantError(f"{target}: exists and is not a study's page; choose another folder")
    page = page_values(study, study.analyse(paired=paired), paired)
    html = study_page(page)
    files = {target: html}
    for table in page.tables:
        for ending, write in ((".csv", as_csv), (".md", as_markdown), (".tex", as_latex)):
            files[folder / "tables" / f"{table.name}{ending}"] = write(table)
    for file, text in files.items():
        with whole_file(file) as beside:
            beside.write_text(text, encoding="utf-8")
    return target


def page_values(study: Study, found: Analysis, paired: bool) -> StudyPage:
    """What the page of a study says; ``paired`` is how the sources were compared."""
    plan, counts, scores = study.plan, study.counts(), study.scores()
    settings = [one.setting for one in found.settings]
    measures = sorted({(one.measure, one.on) for one in settings}, key=lambda one: (one[0] in COSTS, one))
    main = main_settings(found, COSTS)
    if main:  # the measure of the answer is shown first
        measures.sort(key=lambda one: one[0] != main[0].setting.measure)
    higher = {(one.setting.measure, one.setting.on): one.higher_is_better for one in found.settings}
    said = answer(found, counts, COSTS)
    return StudyPage(
        name=plan.name,
        description=plan.description,
        answer=said.findings,
        warnings=said.reservations,
        facts=_facts(plan, study.versions, counts) | ({"sources compared": "draw by draw"} if paired else {}),
        cards=_cards([(one.setting, one.headline) for one in main]),
        choices=_choices(settings, measures),
        measures={
            measure_key(*one): {
                "kind": one[0],
                "name": measure_name(one[0]),
                "axis": f"{measure_name(*one)} ({_direction(one[0], higher[one])})",
            }
            for one in measures
        },
        charts=charts(found, scores, (SECONDS, SET_SECONDS), COSTS),
        tables=[
            *tables(found, study.cells(), scores, COSTS),
            *(task_tables(study.task_findings()) if plan.tasks is not None else []),
        ],
        failures=[Failed(_place(one.cell), one.error, one.traceback) for one in study.failures()],
        sources=[*plan.sources],
        recipes=list(dict.fromkeys(one.recipe for one in settings)),
        plan=yaml.safe_dump(
            plan.model_dump(mode="json", exclude_defaults=True), sort_keys=False, allow_unicode=True, width=100
        ),
        versions=study.versions,
    )


def _direction(measure: str, higher_is_better: bool) -> str:
    """A measure's unit, if it has one, and which way is better."""
    unit = unit_of(measure)
    return f"{unit}; " * (unit is not None) + f"{'higher' if higher_is_better else 'lower'} is better"


def _facts(plan: StudyPlan, versions: dict[str, str], counts: dict[str, int]) -> dict[str, str]:
    cells = ", ".join(f"{number:,} {state}" for state, number in counts.items() if number)
    return {
        "sources": f"{len(plan.sources)}",
        "draws": f"{plan.draws}" + (f" for each of {len(plan.seeds)} seeds" if len(plan.seeds) > 1 else ""),
        "sets": f"{' / '.join(map(str, plan.samples))} x {' / '.join(map(str, plan.length))} tokens",
        "models": f"{len(plan.models)}",
        "recipes": f"{len(plan.recipes)}",
        "texts": f"{len(plan.texts)}",
        "tasks": f"{len(plan.tasks.names) if plan.tasks else 0}",
        "cells": cells or "none",
        **({"units": "KL and log perplexity ratio in nats per token"} if plan.texts else {}),
        "calibrant": versions["calibrant"],
    }


def _cards(findings: list[tuple[Setting, str]]) -> list[Card]:
    """Findings of the largest size first."""
    cards: dict[tuple[str, str], list[tuple[Setting, str]]] = {}
    for setting, headline in findings:
        cards.setdefault((setting.model, setting.recipe), []).append((setting, headline))
    models = {model for model, _ in cards}
    sizes = {(setting.samples, setting.length) for setting, _ in findings}
    made = []
    for (model, recipe), own in cards.items():
        own.sort(key=lambda one: (-one[0].samples, -one[0].length, one[0].on))
        said = [
            f"{f'{setting.samples} x {setting.length}: ' if len(sizes) > 1 else ''}{headline}"
            for setting, headline in own
        ]
        made.append(Card(recipe, model if len(models) > 1 else "", said))
    return made


def _choices(settings: list[Setting], measures: list[tuple[str, str]]) -> list[Choice]:
    numbers = {name: sorted({getattr(one, name) for one in settings}, reverse=True) for name in ("samples", "length")}
    models = dict.fromkeys(one.model for one in settings)
    return [
        Choice("measure", "Measure", {measure_key(*one): measure_name(*one) for one in measures}),
        Choice("model", "Model", {model: model for model in models}),
        Choice("samples", "Rows", {str(one): f"{one:,}" for one in numbers["samples"]}),
        Choice("length", "Tokens a row", {str(one): f"{one:,}" for one in numbers["length"]}),
    ]


def _place(cell: Cell) -> str:
    again = ", again" if cell.repeat else ""
    return (
        f"{cell.model}, {cell.recipe}, {cell.source}, {cell.samples} x {cell.length}, seed {cell.seed}, draw "
        f"{cell.draw}{again}"
    )
