"""Charts of a study's page as Vega-Lite; their rows are on the page, and its script picks those of one panel.

Needs the extra ``report``.
"""

from collections.abc import Mapping
from typing import Any

import altair as alt

from calibrant.report.page import COLOURS

# The script puts the name of the picked measure there, with its text or task and without.
_MEASURE, _KIND = "{measure}", "{kind}"
_NUMBER = ".6~g"
# Long names differ at their ends as often as at their beginnings.
_NAMES = alt.Axis(
    labelLimit=200,
    labelExpr="length(datum.label) > 26 ? slice(datum.label, 0, 12) + '...' + slice(datum.label, -12) : datum.label",
)
# Room in pixels for marks at the ends.
_TIGHT: dict[str, Any] = {"zero": False, "nice": False, "padding": 12}


def chart_specs(colours: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Vega-Lite of every chart, by name, with the data set ``rows`` left open.

    Where ``usermeta`` names ``bands``, the script makes the plot high enough for all values of these fields.
    """
    colour = alt.Color("source:N", scale=alt.Scale(domain=[*colours], range=[*colours.values()]), legend=None)
    charts = {
        "scores": _scores(colour),
        "share": _share(),
        "dispersion": _dispersion(),
        "sizes": _sizes(colour),
        "ranks": _ranks(colour),
        "cost": _cost(colour),
    }
    return {name: chart.properties(width="container").to_dict() for name, chart in charts.items()}


def _scores(colour: alt.Color) -> Any:
    y = alt.Y("source:N", sort=None, title=None, axis=_NAMES)
    axis: dict[str, Any] = {
        "scale": alt.Scale(**_TIGHT),
        "title": _MEASURE,
        "axis": alt.Axis(tickCount=5, format=_NUMBER),
    }
    means, draws = _rows("mean"), _rows("draw")
    mean = means.mark_tick(thickness=3, size=22).encode(
        x=alt.X("value:Q", **axis), y=y, color=colour, tooltip=_estimate("mean", "source:N", "draws:Q")
    )
    dots = draws.mark_circle(size=55, opacity=0.9).encode(
        x=alt.X("value:Q", **axis), y=y, color=colour, tooltip=["source:N", "seed:Q", "draw:Q", _number("value")]
    )
    return alt.layer(*_bars(means, axis, y=y, color=colour), mean, dots).properties(usermeta={"bands": ["source"]})


def _share() -> Any:
    y = alt.Y("name:N", sort=None, title=None, axis=_NAMES)
    axis: dict[str, Any] = {
        "scale": alt.Scale(domain=[0, 100]),
        "title": "share of the variance, %",
        "axis": alt.Axis(values=[0, 25, 50, 75, 100]),
    }
    point = _rows().mark_point(filled=True, size=70, opacity=1, color=COLOURS[0])
    point = point.encode(x=alt.X("value:Q", **axis), y=y, tooltip=_estimate("share", alt.Tooltip("name:N", title="of")))
    return alt.layer(*_bars(_rows(), axis, y=y, color=alt.value(COLOURS[0])), point).properties(
        usermeta={"bands": ["name"]}
    )


def _dispersion() -> Any:
    y, offset = alt.Y("task:N", sort=None, title=None, axis=_NAMES), alt.YOffset("part:N", sort=None)
    axis: dict[str, Any] = {
        "scale": alt.Scale(zero=True),
        "title": f"standard deviation of {_KIND}",
        "axis": alt.Axis(tickCount=5, format=_NUMBER),
    }
    parts = alt.Color(
        "part:N",
        scale=alt.Scale(domain=["between sources", "between draws"], range=[*COLOURS[:2]]),
        legend=alt.Legend(title=None, orient="top", symbolOpacity=1),
    )
    point = _rows().mark_point(filled=True, size=70, opacity=1)
    point = point.encode(
        x=alt.X("value:Q", **axis), y=y, yOffset=offset, color=parts, tooltip=_estimate("sd", "task:N", "part:N")
    )
    bars = _bars(_rows(), axis, y=y, yOffset=offset, color=parts)
    return alt.layer(*bars, point).properties(usermeta={"bands": ["task", "part"]})


def _sizes(colour: alt.Color) -> Any:
    gaps = alt.Scale(paddingInner=0.6, paddingOuter=0.3)
    x = alt.X("rows:O", title="rows of the set", scale=gaps, axis=alt.Axis(labelAngle=0))
    offset = alt.XOffset("source:N")
    axis: dict[str, Any] = {"scale": alt.Scale(**_TIGHT), "title": _MEASURE, "axis": alt.Axis(format=_NUMBER)}
    line = _rows().mark_line(opacity=0.6).encode(x=x, xOffset=offset, y=alt.Y("value:Q", **axis), color=colour)
    point = _rows().mark_point(filled=True, size=70, opacity=1)
    point = point.encode(
        x=x,
        xOffset=offset,
        y=alt.Y("value:Q", **axis),
        color=colour,
        tooltip=_estimate("mean", "source:N", "rows:Q", "draws:Q"),
    )
    bars = _bars(_rows(), axis, upright=True, x=x, xOffset=offset, color=colour)
    return alt.layer(*bars, line, point).properties(height=240)


def _ranks(colour: alt.Color) -> Any:
    base = _rows().encode(
        x=alt.X("draw:N", sort=None, title="draw", axis=alt.Axis(labelAngle=0)),
        y=alt.Y(
            "rank:Q",
            scale=alt.Scale(reverse=True, zero=False, nice=False, padding=14),
            title="rank (1 is best)",
            # Of two sources Vega puts a tick between their ranks, whatever the smallest step.
            axis=alt.Axis(tickMinStep=1, labelExpr="datum.value % 1 ? '' : datum.value"),
        ),
        color=colour,
        tooltip=["source:N", alt.Tooltip("draw:N"), "rank:Q"],
    )
    return alt.layer(base.mark_line(strokeWidth=2.5), base.mark_circle(size=110, opacity=1)).properties(height=200)


def _cost(colour: alt.Color) -> Any:
    across: dict[str, Any] = {"scale": alt.Scale(**_TIGHT), "title": "seconds to make the set and compress"}
    upright: dict[str, Any] = {"scale": alt.Scale(**_TIGHT), "title": _MEASURE, "axis": alt.Axis(format=_NUMBER)}
    legend = alt.Legend(title=None, orient="bottom", columns=2, labelLimit=300, symbolOpacity=1)
    place: dict[str, Any] = {
        "x": alt.X("seconds:Q", axis=alt.Axis(tickCount=5, format=_NUMBER), **across),
        "y": alt.Y("value:Q", **upright),
        "color": colour,
        "shape": alt.Shape("recipe:N", sort=None, legend=legend),
    }
    named = ["source:N", "recipe:N", _number("value"), _number("seconds")]
    means = _rows("mean")
    dots = _rows("draw").mark_point(filled=True, size=20, opacity=0.5)
    mean = means.mark_point(filled=True, size=130, opacity=1)
    bars = _bars(means, upright, upright=True, x=place["x"], color=colour)
    bars += _bars(means, across, field="seconds_", y=place["y"], color=colour)
    dots = dots.encode(**place, tooltip=[*named, "seed:Q", "draw:Q"])
    return alt.layer(*bars, dots, mean.encode(**place, tooltip=[*named, "draws:Q"])).properties(height=300)


def _rows(kind: str | None = None) -> Any:
    chart = alt.Chart(alt.NamedData(name="rows"))
    return chart if kind is None else chart.transform_filter(f"datum.kind === '{kind}'")


def _bars(rows: Any, axis: dict[str, Any], *, field: str = "", upright: bool = False, **encodings: Any) -> list[Any]:
    """Intervals, from the fields ``low`` to ``high``, with arrows where they go on beyond the plot."""
    low, high = f"{field}low", f"{field}high"
    along, channel = (alt.Y, "y") if upright else (alt.X, "x")
    known = rows.transform_filter(f"isValid(datum.{low})")
    ends = {channel: along(f"{low}:Q", **axis), f"{channel}2": f"{high}:Q"}
    bars = [known.mark_rule(strokeWidth=7, opacity=0.3, strokeCap="round").encode(**ends, **encodings)]
    for end, arrow in zip((low, high), "▾▴" if upright else "◂▸", strict=True):
        cut = known.transform_filter(f"datum.{end}_cut").mark_text(text=arrow, fontSize=14)
        bars.append(cut.encode(**{channel: along(f"{end}:Q", **axis)}, **encodings))
    return bars


def _number(field: str, title: str | None = None) -> alt.Tooltip:
    return alt.Tooltip(f"{field}:Q", title=title or field, format=".4~g")


def _estimate(title: str, *fields: Any) -> list[Any]:
    """A tooltip of a number with its whole interval."""
    return [*fields, _number("value", title), alt.Tooltip("interval:N", title="95 % interval")]
