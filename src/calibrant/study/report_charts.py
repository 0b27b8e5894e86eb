"""The charts of a study's report, as rows of plain values."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.stats import rankdata

from calibrant.report.study_page import Chart
from calibrant.report.tables import number_text
from calibrant.study.findings import Analysis, SettingFinding, SizeCurve
from calibrant.study.measures import measure_name
from calibrant.study.score_table import Setting, SettingScores, by_setting
from calibrant.study.scores import Score
from calibrant.study.statistics.describe import Interval, describe

_Rows = list[dict[str, Any]]
_CUT = "An arrow marks an interval that reaches beyond the plot; the table has all of it."
_READS_NOTHING = "The recipe reads no data; see the controls."
_EMPTY = "No usable scores of this recipe, size and measure."


def measure_key(measure: str, on: str) -> str:
    """The value of a measure on a text in the page's choice."""
    return f"{measure}|{on}"


def charts(found: Analysis, scores: Sequence[Score], times: Collection[str], costs: Collection[str]) -> list[Chart]:
    """All charts, in the page's order; ``times`` are the measures that add up to the seconds of a cell."""
    known = {one.setting.measure for one in found.settings}
    table = by_setting(one for one in scores if one.measure in known)
    quality = [one for one in found.settings if one.setting.measure not in costs]
    made = [
        Chart(
            "scores",
            "Scores by source",
            "A dot is a draw, the upright line the mean, the band its 95 % interval. Every panel has a scale of its "
            f"own. {_CUT}",
            _EMPTY,
            [row for one in found.settings for row in _scores(one, table[one.setting])],
            _notes(found, lambda one: one.headline),
            True,
            "sources",
            shows_sources=False,
        ),
        Chart(
            "share",
            "Variance that the source explains",
            "The rest of the variance comes from the draw. The band is the 95 % interval; few sources make it wide.",
            "Undefined: it needs two sources, one of them with two draws, and scores that are not all equal.",
            [row for one in quality for row in _share(one)],
            [_without_measure(_where(one.setting)) | {"note": _READS_NOTHING} for one in quality if one.zero_control],
            True,
            "components",
            shows_sources=False,
        ),
        Chart(
            "dispersion",
            "Dispersion by text and task",
            f"Standard deviation between sources and between draws of one source, with 95 % intervals. {_CUT}",
            "Undefined: it needs two sources, one of them with two draws.",
            list(_dispersions(found.settings)),
            [],
            True,
            "components",
            shows_sources=False,
        ),
        Chart(
            "ranks",
            "Rank stability",
            "Rank of every source in every draw that all sources have: lines that cross are ranks that another draw "
            "would change.",
            "Undefined: it needs two sources and two draws that all of them have.",
            [row for one in quality for row in _ranks(one, table[one.setting])],
            _notes(found, _stability),
            True,
            "components",
        ),
        Chart(
            "cost",
            "Cost against quality",
            f"Seconds to make the set and to compress, on the machine that ran the study. A large mark is a mean over "
            f"draws, with 95 % intervals; small marks are draws. {_CUT}",
            "No cell has both a score and its seconds.",
            list(_cost(quality, table, times)),
            [],
            False,
            "cells",
        ),
    ]
    if found.size_curves:
        sizes = Chart(
            "sizes",
            "Scores by size",
            f"Means over draws by the number of rows, with 95 % intervals. {_CUT}",
            _EMPTY,
            list(_sizes(found)),
            [],
            True,
            "sources",
        )
        made.insert(3, sizes)
    return made


def _where(setting: Setting) -> dict[str, Any]:
    return {
        "model": setting.model,
        "recipe": setting.recipe,
        "samples": setting.samples,
        "length": setting.length,
        "measure": measure_key(setting.measure, setting.on),
    }


def _without_measure(where: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in where.items() if name != "measure"}


def _scores(one: SettingFinding, scores: SettingScores) -> Iterator[dict[str, Any]]:
    where = _where(one.setting)
    limits = _limits(value for source in one.sources for value in source.values)
    for source in one.sources:
        said = source.description
        mean = {"kind": "mean", "source": source.source, "draws": said.n, "value": said.mean}
        yield where | mean | _bar(said.interval, limits)
        for (seed, draw), value in scores.values[source.source].items():
            yield where | {"kind": "draw", "source": source.source, "seed": seed, "draw": draw, "value": value}


def _share(one: SettingFinding) -> Iterator[dict[str, Any]]:
    components = one.components
    if one.zero_control is None and components and components.share is not None and components.share_interval:
        ends = Interval(100 * components.share_interval.low, 100 * components.share_interval.high)
        where = _without_measure(_where(one.setting))
        name = measure_name(one.setting.measure, one.setting.on)
        yield where | {"name": name, "value": 100 * components.share} | _bar(ends, (0.0, 100.0))


def _dispersion(one: SettingFinding, largest: float) -> Iterator[dict[str, Any]]:
    components = one.components
    if components is None:
        return
    where = _without_measure(_where(one.setting)) | {
        "kind_of_measure": one.setting.measure,
        "task": one.setting.on or "every text",
    }
    parts = {
        "between sources": (components.source_variance, components.source_interval),
        "between draws": (components.draw_variance, components.draw_interval),
    }
    for part, (variance, ends) in parts.items():
        bar = _bar(Interval(ends.low**0.5, ends.high**0.5), (0.0, largest))
        yield where | {"part": part, "value": variance**0.5} | bar


def _dispersions(settings: Sequence[SettingFinding]) -> Iterator[dict[str, Any]]:
    """The rows of all texts of a measure, on one scale, which ends at three times the largest deviation."""
    panels: dict[Setting, list[SettingFinding]] = {}
    for one in settings:
        panels.setdefault(replace(one.setting, on=""), []).append(one)
    for panel in panels.values():
        found = [one.components for one in panel if one.components]
        largest = max((max(each.source_variance, each.draw_variance) for each in found), default=0.0)
        for one in panel:
            yield from _dispersion(one, 3 * largest**0.5)


def _sizes(found: Analysis) -> Iterator[dict[str, Any]]:
    panels: dict[tuple[Any, ...], list[SizeCurve]] = {}
    for curve in found.size_curves:
        panels.setdefault((curve.model, curve.recipe, curve.length, curve.measure, curve.on), []).append(curve)
    for (model, recipe, length, measure, on), curves in panels.items():
        where = {"model": model, "recipe": recipe, "length": length, "measure": measure_key(measure, on)}
        limits = _limits(end for curve in curves for _, one in curve.points for end in (one.minimum, one.maximum))
        for curve in curves:
            for rows, one in curve.points:
                point = {"source": curve.source, "rows": rows, "draws": one.n, "value": one.mean}
                yield where | point | _bar(one.interval, limits)


def _ranks(one: SettingFinding, scores: SettingScores) -> Iterator[dict[str, Any]]:
    if one.rank_stability is None or one.zero_control is not None:
        return
    where, sign = _where(one.setting), -1 if one.higher_is_better else 1
    several = len({seed for seed, _ in scores.shared}) > 1
    for seed, draw in scores.shared:
        values = [sign * own[seed, draw] for own in scores.values.values()]
        for source, rank in zip(scores.values, rankdata(values), strict=True):
            label = f"seed {seed}, {draw}" if several else str(draw)
            yield where | {"source": source, "draw": label, "rank": float(rank)}


def _stability(one: SettingFinding) -> str:
    ranks = one.rank_stability
    if one.zero_control is not None:
        return _READS_NOTHING
    if ranks is None:
        return ""
    tau = "is undefined, as all sources tie" if ranks.tau is None else f"{ranks.tau:.2f}"
    same = f"The same source is best in {100 * ranks.same_best:.0f} % of pairs of draws."
    return f"Kendall's tau between draws: {tau}. {same}"


def _cost(settings: Sequence[SettingFinding], table: dict[Setting, SettingScores], times: Collection[str]) -> _Rows:
    panels: dict[Setting, list[_Point]] = {}
    for one in settings:
        clocks = [table.get(replace(one.setting, measure=time, on="")) for time in times]
        for source, own in table[one.setting].values.items():
            spent = [clock.values.get(source, {}) if clock else {} for clock in clocks]
            units = [unit for unit in own if all(unit in each for each in spent)]
            if units:
                seconds = [sum(each[unit] for each in spent) for unit in units]
                point = _Point(one.setting, source, units, [own[unit] for unit in units], seconds)
                panels.setdefault(replace(one.setting, recipe=""), []).append(point)
    return [row for points in panels.values() for row in _cost_panel(points)]


@dataclass(frozen=True)
class _Point:
    """One source under one recipe: scores and seconds of its draws."""

    setting: Setting
    source: str
    units: list[tuple[int, int]]
    values: list[float]
    seconds: list[float]


def _cost_panel(points: list[_Point]) -> Iterator[dict[str, Any]]:
    limits = _limits(value for point in points for value in point.values)
    spent = _limits(value for point in points for value in point.seconds)
    for point in points:
        where = _where(point.setting) | {"source": point.source}
        value, seconds = describe(np.array(point.values)), describe(np.array(point.seconds))
        mean = {"kind": "mean", "draws": value.n, "value": value.mean, "seconds": seconds.mean}
        across = {f"seconds_{name}": end for name, end in _bar(seconds.interval, spent).items()}
        yield where | mean | _bar(value.interval, limits) | across
        for (seed, draw), score, time in zip(point.units, point.values, point.seconds, strict=True):
            yield where | {"kind": "draw", "seed": seed, "draw": draw, "value": score, "seconds": time}


def _notes(found: Analysis, note: Callable[[SettingFinding], str]) -> _Rows:
    return [_where(one.setting) | {"note": note(one)} for one in found.settings]


def _limits(values: Iterable[float]) -> tuple[float, float] | None:
    """Where a plot ends: intervals of two draws would leave the draws no room."""
    known = list(values)
    least, most = min(known, default=0.0), max(known, default=0.0)
    return (least - (most - least), most + (most - least)) if most > least else None


def _bar(interval: Interval | None, limits: tuple[float, float] | None) -> dict[str, Any]:
    if interval is None:
        return {"interval": "undefined: one draw"}
    low, high = interval.low, interval.high
    least, most = limits or (low, high)
    return {
        "low": max(low, least),
        "high": min(high, most),
        "low_cut": low < least,
        "high_cut": high > most,
        "interval": f"{number_text(low)} to {number_text(high)}",
    }
