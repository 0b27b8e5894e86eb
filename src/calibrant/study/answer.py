"""The finding of a whole study in a few plain sentences."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from calibrant.study.findings import Analysis, SettingFinding
from calibrant.study.measures import measure_name
from calibrant.study.statistics.comparisons import Comparison
from calibrant.study.statistics.variance_components import VarianceComponents
from calibrant.wording import listed

# The measure that the answer is about is the first of these that the study has, or the first by name.
_FIRST = ("kl", "log_perplexity_ratio", "perplexity", "accuracy")
_FEW = 5
# What settings differ by: the name among several, and the name alone.
_DIMENSIONS = {
    "model": ("model", "models"),
    "recipe": ("recipe", "recipes"),
    "samples": ("rows", "sizes"),
    "length": ("length", "lengths"),
    "on": ("text", "texts"),
}


@dataclass(frozen=True)
class Answer:
    """Sentences: what a study found, and what to be wary of."""

    findings: list[str]
    reservations: list[str]


def answer(found: Analysis, counts: Mapping[str, int], costs: Collection[str]) -> Answer:
    """What a study found about its main measure, over all models, recipes, sizes and texts.

    Args:
        found: the analysis.
        counts: numbers of cells that are done, failed and waiting.
        costs: measures that say what a cell costs, not how good it is.
    """
    settings = main_settings(found, costs)
    if not settings:
        said = ["There is no usable score of a recipe that reads data, so that nothing can be said of the sources."]
    elif len(settings) == 1:
        said = [settings[0].headline, *_without(settings)]
    else:
        said = _over(settings)
    return Answer(said, [*_failed_controls(found, costs), *_reservations(settings, counts)])


def main_settings(found: Analysis, costs: Collection[str]) -> list[SettingFinding]:
    """The settings of the measure that the answer is about, without recipes that read no data."""
    usable = [one for one in found.settings if one.setting.measure not in costs and one.zero_control is None]
    usable = [one for one in usable if one.sources]
    measures = sorted({one.setting.measure for one in usable})
    main = next((name for name in _FIRST if name in measures), measures[0] if measures else None)
    return [one for one in usable if one.setting.measure == main]


def _over(settings: Sequence[SettingFinding]) -> list[str]:
    measure, number = measure_name(settings[0].setting.measure), len(settings)
    over = f"{number} {_combined(settings)}"
    compared = [one for one in settings if len(one.sources) > 1]
    if not compared:
        return [f"{settings[0].headline} The other {number - 1} of {over} are below."]
    found = [one.components for one in settings if one.components]
    known = [one for one in found if one.share is not None]
    if not known and any(one.source_variance > 0 for one in found):
        return [f"No two draws of a source differ in {measure} in any of {over}, so that nothing says what is chance."]
    if not known and found:
        return [f"{measure[0].upper()}{measure[1:]} is the same with every source and draw in each of {over}."]
    if not known:
        return [
            f"No source has two draws in any of {over}, so that no difference of {measure} can be told from chance."
        ]
    where = over if len(known) == number else f"{len(known)} of {over}"
    first = f"The source explains {_shares(known)} of the variance of {measure} over {where}; {_intervals(known)}."
    return [first, *_without(settings), _best(compared)]


def _without(settings: Sequence[SettingFinding]) -> list[str]:
    """What is left without the sources that would dominate the variance, such as random tokens."""
    left = [one.components_without for one in settings if one.components_without is not None]
    known = [one.components for one in left if one.components and one.components.share is not None]
    return (
        [f"Without {' and '.join(left[0].sources)} it explains {_shares(known)}; {_intervals(known)}."] if known else []
    )


def _shares(known: Sequence[VarianceComponents]) -> str:
    shares = [100 * one.share for one in known if one.share is not None]
    low, high = f"{min(shares):.0f}", f"{max(shares):.0f}"
    return f"{low} %" if low == high else f"{low} to {high} % (median {median(shares):.0f} %)"


def _intervals(known: Sequence[VarianceComponents]) -> str:
    ends = [one.share_interval for one in known if one.share_interval is not None]
    span = f"{100 * min(end.low for end in ends):.0f} to {100 * max(end.high for end in ends):.0f} %"
    return f"the 95 % intervals span {span}" if len(known) > 1 else f"the 95 % interval is {span}"


def _best(settings: Sequence[SettingFinding]) -> str:
    best, times = Counter(one.sources[0].source for one in settings).most_common(1)[0]
    number = len(settings)
    led = [one for one in settings if one.sources[0].source == best]
    alike = Counter(pair.worse for one in led for pair in _tested(one) if pair.better == best and not pair.told_apart)
    lead = f"{best} has the best mean in {'all' if times == number else f'{times} of'} {number}"
    if 2 * times < number:
        lead = f"No source leads: {best} has the best mean most often, in {times} of {number}"
    if not all(map(_tested, led)):
        return f"{lead}; where sources share no draw or have no second one, they cannot be compared."
    others = {source.source for one in led for source in one.sources} - {best}
    tested = {pair.worse for one in led for pair in _tested(one) if pair.better == best}
    untested = f"; {listed(sorted(others - tested))} could not be tested" if others - tested else ""
    if not alike:
        return (
            f"{lead}, and is told apart from every other source{' that was tested' * bool(untested)} there{untested}."
        )
    rival, often = alike.most_common(1)[0]
    where = "all of them" if often == times else f"{often} of them"
    return f"{lead}, but cannot be told apart from {rival} with {_draws(led, {best, rival})} in {where}{untested}."


def _tested(one: SettingFinding) -> list[Comparison]:
    return [pair for pair in one.comparisons if pair.p_value is not None]


def _draws(settings: Sequence[SettingFinding], among: Collection[str] | None = None) -> str:
    """Numbers of draws of all sources, or of those ``among``."""
    sources = [source for one in settings for source in one.sources]
    numbers = [one.description.n for one in sources if among is None or one.source in among]
    least, most = min(numbers), max(numbers)
    return f"{most} draw{'s' * (most > 1)}" if least == most else f"{least} to {most} draws"


def _reservations(settings: Sequence[SettingFinding], counts: Mapping[str, int]) -> list[str]:
    said = []
    total = sum(counts.values())
    if counts["failed"]:
        said.append(f"{counts['failed']} of {total} cells failed; no number includes them.")
    if counts["waiting"]:
        said.append(f"{counts['waiting']} of {total} cells have not run yet: this is preliminary.")
    draws = [source.description.n for one in settings for source in one.sources]
    if any(one.comparisons for one in settings) and 1 < max(draws) < _FEW:
        said.append(
            f"With {_draws(settings)} a source only large differences can be seen: that two cannot be told apart does "
            "not make them equal."
        )
    return said


def _failed_controls(found: Analysis, costs: Collection[str]) -> list[str]:
    measured = [one for one in found.settings if one.setting.measure not in costs]
    said = []
    if any(one.zero_control is not None and not one.zero_control.passes for one in measured):
        said.append("A recipe that reads no data scores differently on different sets: see the controls first.")
    if any(one.implementation_noise is not None and not one.implementation_noise.passes for one in measured):
        said.append("One set that was run twice scores differently: smaller differences than that mean nothing.")
    return said


def _combined(settings: Sequence[SettingFinding]) -> str:
    """What there are several of."""
    varying = [
        names for field, names in _DIMENSIONS.items() if len({getattr(one.setting, field) for one in settings}) > 1
    ]
    if len(varying) == 1:
        return varying[0][1]
    names = [name for name, _ in varying]
    return f"combinations of {', '.join(names[:-1])} and {names[-1]}"
