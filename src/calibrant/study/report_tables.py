"""The tables of a study's report."""

from collections.abc import Collection, Sequence
from math import isfinite

from calibrant.report.tables import Column, Estimate, Table, Undefined, Value
from calibrant.study.cells import Cell
from calibrant.study.findings import Analysis, SettingFinding
from calibrant.study.measures import measure_name
from calibrant.study.results import CellState
from calibrant.study.score_table import Setting
from calibrant.study.scores import Score
from calibrant.study.statistics.comparisons import Comparison
from calibrant.study.statistics.controls import Control
from calibrant.study.statistics.describe import Interval

ONE_DRAW = "one draw has no spread"
_UNCOMPARED = "a source has one draw"
_PLACE = (
    Column("model", role="key"),
    Column("recipe", role="key"),
    Column("rows", "number", "key"),
    Column("length", "number", "key"),
)
KEYS = (*_PLACE, Column("measure", role="key"), Column("on", role="key"))
_STATES = ("failed", "waiting", "done")


def tables(found: Analysis, cells: Sequence[CellState], scores: Sequence[Score], costs: Collection[str]) -> list[Table]:
    """All tables, in the page's order."""
    return [
        _sources(found),
        _comparisons(found),
        _components(found),
        _recipes(found),
        _controls(found, costs),
        _cells(cells, scores),
    ]


def _sources(found: Analysis) -> Table:
    rows = []
    for setting in found.settings:
        for one in setting.sources:
            said = one.description
            mean = Estimate(said.mean, ends(said.interval), ONE_DRAW)
            spread: Value = Undefined(ONE_DRAW) if said.sd is None else said.sd
            limits = (said.minimum, said.maximum, said.range)
            rows.append((one.source, *keys(setting.setting), said.n, mean, spread, *limits))
    return Table(
        "sources",
        "Sources",
        "Every source in every setting, best mean first: draws, their mean with Student's 95 % interval, standard "
        "deviation over draws, least, most and range.",
        "There is no usable score.",
        (
            Column("source", role="source"),
            *KEYS,
            Column("draws", "number"),
            Column("mean", "estimate"),
            *(Column(name, "number") for name in ("sd", "least", "most", "range")),
        ),
        tuple(rows),
    )


def _comparisons(found: Analysis) -> Table:
    rows = []
    for setting in found.settings:
        if setting.zero_control is not None or _is_constant(setting):
            continue
        for one in setting.comparisons:
            p: Value = Undefined(_UNCOMPARED) if one.adjusted_p_value is None else one.adjusted_p_value
            improvement = one.improvement
            rows.append(
                (
                    one.better,
                    one.worse,
                    *keys(setting.setting),
                    " and ".join(map(str, one.draws)),
                    Estimate(one.difference, ends(one.interval), _UNCOMPARED),
                    p,
                    Estimate(improvement.probability, ends(improvement.interval), _UNCOMPARED),
                    _verdict(one),
                )
            )
    return Table(
        "comparisons",
        "Comparisons",
        "Pairs of sources: difference of means with its own 95 % interval, p-value after Holm's correction for all "
        "pairs of a setting, and the probability that a draw of the better source is better (its interval is of the "
        "bootstrap and too short for few draws). Pairs are told apart below 0.05.",
        "There are no two sources with different scores to compare.",
        (
            Column("better", role="source"),
            Column("worse", role="source"),
            *KEYS,
            Column("draws"),
            Column("difference", "estimate"),
            Column("Holm p", "number"),
            Column("P(better)", "estimate"),
            Column("verdict"),
        ),
        tuple(rows),
    )


def _verdict(one: Comparison) -> str:
    if one.adjusted_p_value is None:
        return "not tested"
    return "told apart" if one.told_apart else "not told apart"


def _is_constant(one: SettingFinding) -> bool:
    return one.components is not None and one.components.share is None and one.components.source_variance == 0


def _components(found: Analysis) -> Table:
    rows = [
        (*keys(one.setting), *_of_components(one))
        for one in found.settings
        if one.zero_control is None and len(one.sources) > 1
    ]
    return Table(
        "components",
        "Variance",
        "How much of the spread comes from the source and how much from the draw, with 95 % intervals; how alike "
        "single draws rank the sources (Kendall's tau; share of pairs of draws with the same best source); and the "
        "draws of each with which a t test of the two best alone would find their difference in 80 % of studies, if it "
        "is as large as it seems here.",
        "Fewer than two sources have a usable score.",
        (
            *KEYS,
            Column("sources", "number"),
            Column("source share %", "estimate"),
            Column("without random tokens %", "estimate"),
            Column("sd between sources", "estimate"),
            Column("sd between draws", "estimate"),
            Column("tau", "number"),
            Column("same best", "number"),
            Column("draws needed", "number"),
        ),
        tuple(rows),
    )


def _of_components(one: SettingFinding) -> list[Value]:
    components, without, ranks = one.components, one.components_without, one.rank_stability
    no_spread = Undefined("no source has two draws")
    alone = without.components if without is not None else None
    said: list[Value] = [len(one.sources)]
    shares = ((components, "no two draws of a source differ"), (alone, "no source of random tokens, or too few others"))
    for found, reason in shares:
        if found is None or found.share is None or found.share_interval is None:
            said.append(no_spread if components is None else Undefined(reason))
        else:
            ends = found.share_interval
            said.append(Estimate(100 * found.share, (100 * ends.low, 100 * ends.high)))
    if components is None:
        said += [no_spread, no_spread]
    else:
        parts = (
            (components.source_variance, components.source_interval),
            (components.draw_variance, components.draw_interval),
        )
        said += [Estimate(value**0.5, (ends.low**0.5, ends.high**0.5)) for value, ends in parts]
    unranked = Undefined("no two draws that all sources have")
    said.append(unranked if ranks is None else Undefined("all ties") if ranks.tau is None else ranks.tau)
    said.append(unranked if ranks is None else ranks.same_best)
    if one.best_two is None:
        said.append(Undefined(_UNCOMPARED))
    else:
        unknown = Undefined("the two best are equal or nearly, or have no spread")
        said.append(unknown if one.best_two.draws is None else one.best_two.draws)
    return said


def _recipes(found: Analysis) -> Table:
    rows = [
        (
            one.first,
            one.second,
            one.source,
            *keys(Setting(one.model, "", one.samples, one.length, one.measure, one.on), recipe=False),
            one.difference.n,
            Estimate(one.difference.mean, ends(one.difference.interval), ONE_DRAW),
            Estimate(one.improvement.probability, ends(one.improvement.interval), ONE_DRAW),
            one.improvement.verdict,
        )
        for one in found.recipe_differences
    ]
    return Table(
        "recipes",
        "Recipes on the same sets",
        "Pairs of recipes on the same sets of a source, the one with the better mean first: mean of first less second "
        "with its 95 % interval, and the probability that the first is better.",
        "There are no two recipes with scores on one set.",
        (
            Column("first"),
            Column("second"),
            Column("source", role="source"),
            *(column for column in KEYS if column.name != "recipe"),
            Column("draws", "number"),
            Column("first less second", "estimate"),
            Column("P(first better)", "estimate"),
            Column("verdict"),
        ),
        tuple(rows),
    )


def _controls(found: Analysis, costs: Collection[str]) -> Table:
    rows = []
    for one in found.settings:
        if one.setting.measure in costs:
            continue  # times differ whenever the same command runs again
        kinds = (("recipe reads no data", one.zero_control), ("one set run twice", one.implementation_noise))
        rows += [(*keys(one.setting), kind, *_control(control)) for kind, control in kinds if control is not None]
    return Table(
        "controls",
        "Controls",
        "What must be equal: scores of recipes that read no data, over all sets, and of one set that was run twice.",
        "No set was run twice, and no recipe without data was run on two sets.",
        (
            *KEYS,
            Column("control"),
            Column("values", "number"),
            Column("largest difference", "number"),
            Column("result"),
        ),
        tuple(rows),
    )


def _control(control: Control) -> tuple[Value, ...]:
    return control.values, control.largest_difference, "equal" if control.passes else "differs"


def _cells(cells: Sequence[CellState], scores: Sequence[Score]) -> Table:
    measures = sorted({(one.measure, one.on) for one in scores if one.on or one.measure in ("seconds", "set_seconds")})
    values: dict[Cell, dict[tuple[str, str], float]] = {}
    for one in scores:
        values.setdefault(one.cell, {})[one.measure, one.on] = one.value
    rows = []
    for state in sorted(cells, key=lambda one: _STATES.index(one.state)):
        cell, own = state.cell, values.get(state.cell, {})
        reason = {"failed": "the cell failed", "waiting": "the cell has not run"}.get(state.state, "not measured")
        place = (cell.source, cell.model, cell.recipe, cell.samples, cell.length, cell.seed, cell.draw)
        numbers = (_finite(own[measure]) if measure in own else Undefined(reason) for measure in measures)
        said = state.error or "; ".join([*(["second run of the set"] if cell.repeat else []), *state.notes])
        rows.append((*place, state.state, *numbers, said))
    return Table(
        "cells",
        "Cells",
        "Every cell with its scores: failed ones first, then those that wait.",
        "The study has no cells.",
        (
            Column("source", role="source"),
            *_PLACE,
            Column("seed", "number", "key"),
            Column("draw", "number"),
            Column("state"),
            *(Column(measure_name(*measure), "number") for measure in measures),
            Column("error or notes", role="long"),
        ),
        tuple(rows),
    )


def _finite(value: float) -> Value:
    return value if isfinite(value) else Undefined("not finite")


def keys(setting: Setting, *, recipe: bool = True) -> tuple[Value, ...]:
    """The values of ``KEYS``."""
    named = (setting.recipe,) if recipe else ()
    return (setting.model, *named, setting.samples, setting.length, measure_name(setting.measure), setting.on)


def ends(interval: Interval | None) -> tuple[float, float] | None:
    """An interval as tables take it."""
    return None if interval is None else (interval.low, interval.high)
