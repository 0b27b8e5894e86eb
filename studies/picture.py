"""Draws the scores of a study by source, a dot for every draw, as the README shows them.

    python studies/picture.py STUDY OUT.svg [--measure kl] [--on TEXT]

Ticks are means; bars are 95 % intervals of the mean over draws (Student's t). Needs the extra ``report``.
"""

import argparse
from pathlib import Path

import altair as alt

import calibrant as cb
from calibrant.recipes.recipe import builtin_recipes
from calibrant.report.page import COLOURS
from calibrant.study.measures import measure_name


def picture(study: cb.Study, measure: str, on: str) -> alt.VConcatChart:
    """One panel for each recipe, each with an axis of its own."""
    settings = [
        one
        for one in study.analyse().settings
        if (one.setting.measure, one.setting.on) == (measure, on) and one.sources
    ]
    names = [*study.plan.sources]
    colour = alt.Color("source:N", scale=alt.Scale(domain=names, range=[*COLOURS[: len(names)]]), legend=None)
    panels = []
    for found in settings:
        draws = [{"source": one.source, "value": value} for one in found.sources for value in one.values]
        means = [
            {"source": one.source, "mean": one.description.mean, "low": ends.low, "high": ends.high}
            for one in found.sources
            if (ends := one.description.interval) is not None
        ]
        scale = alt.Scale(zero=False, nice=False, padding=12)
        title = "nats per token" if measure == "kl" else None
        axis = {"scale": scale, "title": title, "axis": alt.Axis(tickCount=5, format=".3~g")}
        y = alt.Y("source:N", sort=[one.source for one in found.sources], title=None)
        of_means = alt.Chart(alt.Data(values=means))
        bars = of_means.mark_rule(strokeWidth=2, opacity=0.5).encode(
            x=alt.X("low:Q", **axis), x2="high:Q", y=y, color=colour
        )
        ticks = of_means.mark_tick(thickness=3, size=16).encode(x=alt.X("mean:Q", **axis), y=y, color=colour)
        dots = alt.Chart(alt.Data(values=draws)).mark_circle(size=45, opacity=0.9)
        layers = alt.layer(bars, ticks, dots.encode(x=alt.X("value:Q", **axis), y=y, color=colour))
        panels.append(layers.properties(width=300, height=110, title=_described(found.setting.recipe)))
    rows = [alt.hconcat(*panels[first : first + 2]) for first in range(0, len(panels), 2)]
    said = f"{measure_name(measure, on)}, by source of the calibration text: dots are draws, bars 95 % intervals"
    title = alt.TitleParams(said, anchor="start", fontSize=13, offset=12)
    return alt.vconcat(*rows, background="white", title=title, padding={"left": 25, "right": 5, "top": 5, "bottom": 5})


def _described(recipe: str) -> str:
    """A built-in recipe by its method and its name, another one by its name."""
    known = builtin_recipes().get(recipe)
    return recipe if known is None else f"{known.description.partition(',')[0]} ({recipe})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--measure", default="kl")
    parser.add_argument("--on", default="wikitext")
    asked = parser.parse_args()
    picture(cb.Study(asked.study), asked.measure, asked.on).save(asked.output)


if __name__ == "__main__":
    main()
