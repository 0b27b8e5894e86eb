"""Self-contained HTML page about calibration sets, which opens from disk without a network."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from calibrant.calibration.text_statistics import NUMBER_LABELS, RowNumbers, SetStatistics
from calibrant.report.page import COLOURS, check_chart_libraries, render

_SAMPLES = 5
_SAMPLE_CHARACTERS = 1500
_CURVE_POINTS = 200
_BINS = 30
_TITLES = {
    "rank": "Rank and frequency of tokens",
    "growth": "Distinct tokens after each row",
    "lengths": "Counted tokens of a row",
    "perplexities": "Perplexity of a row",
}

# The template contains the same line. A file with this line may be replaced by a newer page.
PAGE_MARK = '<meta name="generator" content="calibrant data inspect">'


@dataclass(frozen=True)
class InspectedSet:
    """A calibration set as the page shows it: name, facts of the manifest, statistics and the text of each row."""

    name: str
    facts: dict[str, str]
    statistics: SetStatistics
    texts: list[str]


def inspection_page(sets: list[InspectedSet], overlaps: list[dict[str, Any]]) -> str:
    """The page as HTML; each of ``overlaps`` has the names of two sets and the shares that they have in common.

    Raises:
        CalibrantError: the extra ``report`` is not installed.
    """
    check_chart_libraries()
    return render(
        "inspection.html",
        sets=sets,
        findings=findings(sets, overlaps),
        labels=NUMBER_LABELS,
        colours=[COLOURS[number % len(COLOURS)] for number in range(len(sets))],
        overlaps=overlaps,
        samples=_SAMPLES,
        characters=_SAMPLE_CHARACTERS,
        charts=_charts(sets),
        titles=_TITLES,
    )


def findings(sets: list[InspectedSet], overlaps: list[dict[str, Any]]) -> list[str]:
    """What the numbers say, as sentences."""
    found = []
    covered = {one.name: value for one in sets if (value := one.statistics.numbers["coverage"]) is not None}
    if len(sets) == 1:
        rows, tokens = len(sets[0].statistics.rows), int(sets[0].statistics.numbers["tokens"] or 0)
        share = covered[sets[0].name]
        found.append(f"{rows:,} rows with {tokens:,} counted tokens cover {share:.1%} of the vocabulary.")
    if len(sets) > 1:
        most, least = max(covered, key=lambda name: covered[name]), min(covered, key=lambda name: covered[name])
        found.append(
            f"{most} covers the largest share of the vocabulary ({covered[most]:.1%}), {least} the smallest "
            f"({covered[least]:.1%})."
            if covered[most] > covered[least]
            else f"All cover {covered[most]:.1%} of the vocabulary."
        )
        likely = {one.name: one.statistics.numbers["perplexity"] for one in sets}
        known = {name: value for name, value in likely.items() if value is not None}
        if len(known) == len(sets):
            nearest = min(known, key=lambda name: known[name])
            found.append(f"{nearest} has the lowest perplexity under the model ({known[nearest]:.3g}).")
        pairs = sum(pair["equal_rows"] > 0 for pair in overlaps)
        found.append(f"{pairs} of {len(overlaps)} pairs of sets share rows." if pairs else "No two sets share a row.")
    odd = sum(len(one.statistics.odd) for one in sets)
    many = "1 row lies far from the others; read it" if odd == 1 else f"{odd:,} rows lie far from the others; read them"
    found.append(f"{many} first." if odd else "No row is unusual.")
    return found


def _charts(sets: list[InspectedSet]) -> dict[str, str]:
    """Charts as SVG, by name."""
    import altair as alt  # slow to import, and only pages need it

    names = [one.name for one in sets]
    colour = alt.Color("set:N", title=None, scale=alt.Scale(domain=names, range=[*COLOURS[: len(names)]]))
    curves = {
        "rank": (_rank_rows(sets), "rank", "frequency", alt.Scale(type="log")),
        "growth": (_growth_rows(sets), "row", "distinct tokens", alt.Scale()),
    }
    charts = {
        name: _svg(
            alt.Chart(alt.InlineData(values=rows))
            .mark_line()
            .encode(
                x=alt.X(f"{x}:Q", scale=scale, axis=alt.Axis(tickMinStep=1, format=",")),  # ranks and rows are integers
                y=alt.Y(f"{y}:Q", scale=scale),
                color=colour,
            )
        )
        for name, (rows, x, y, scale) in curves.items()
    }
    lengths = _histogram_rows(sets, lambda row: float(row.tokens), "tokens", logarithmic=False)
    charts["lengths"] = _histogram(lengths, alt.X("tokens:Q"), colour)
    perplexities = _histogram_rows(sets, lambda row: row.perplexity, "perplexity", logarithmic=True)
    if perplexities:
        charts["perplexities"] = _histogram(perplexities, alt.X("perplexity:Q", scale=alt.Scale(type="log")), colour)
    return charts


def _histogram(rows: list[dict[str, Any]], axis: Any, colour: Any) -> str:
    import altair as alt

    return _svg(
        alt.Chart(alt.InlineData(values=rows))
        .mark_area(interpolate="step-after", opacity=0.4, line=True)
        .encode(x=axis, y=alt.Y("rows:Q", stack=None), color=colour)
    )


def _svg(chart: Any) -> str:
    import vl_convert

    sized = chart.properties(width=420, height=240).configure(font="system-ui, sans-serif", background="transparent")
    return str(vl_convert.vegalite_to_svg(sized.to_json()))


def _rank_rows(sets: list[InspectedSet]) -> list[dict[str, Any]]:
    rows = []
    for one in sets:
        frequencies = one.statistics.token_frequencies
        ranks = np.unique(np.geomspace(1, max(len(frequencies), 1), _CURVE_POINTS).astype(int))[: len(frequencies)]
        rows += [{"set": one.name, "rank": int(rank), "frequency": int(frequencies[rank - 1])} for rank in ranks]
    return rows


def _growth_rows(sets: list[InspectedSet]) -> list[dict[str, Any]]:
    rows = []
    for one in sets:
        growth = one.statistics.coverage_growth
        picked = np.unique(np.linspace(0, len(growth) - 1, _CURVE_POINTS).astype(int))
        rows += [{"set": one.name, "row": int(i) + 1, "distinct tokens": int(growth[i])} for i in picked]
    return rows


def _histogram_rows(
    sets: list[InspectedSet], measure: Callable[[RowNumbers], float | None], axis: str, logarithmic: bool
) -> list[dict[str, Any]]:
    """Histogram of each set on common bins; empty if no row has a measurement."""
    values = {one.name: [value for row in one.statistics.rows if (value := measure(row)) is not None] for one in sets}
    everything = [value for found in values.values() for value in found]
    if not everything:
        return []
    edges = np.histogram_bin_edges(np.log(everything) if logarithmic else everything, bins=_BINS)
    edges = np.exp(edges) if logarithmic else edges
    edges[0], edges[-1] = min(edges[0], *everything), max(edges[-1], *everything)
    rows = []
    for name, found in values.items():
        counts = np.histogram(found, bins=edges)[0]
        rows += [{"set": name, axis: float(edge), "rows": int(c)} for edge, c in zip(edges, [*counts, 0], strict=False)]
    return rows
