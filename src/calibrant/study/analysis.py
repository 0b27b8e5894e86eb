"""All statistics of a study's scores."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import combinations

import numpy as np

from calibrant.errors import CalibrantError
from calibrant.randomness import make_rng
from calibrant.study.cells import Cell
from calibrant.study.findings import (
    Analysis,
    BestTwo,
    ComponentsWithout,
    RecipeDifference,
    SettingFinding,
    SizeCurve,
    SourceFinding,
)
from calibrant.study.headline import headline
from calibrant.study.score_table import Setting, SettingScores, by_setting
from calibrant.study.scores import Score
from calibrant.study.statistics.comparisons import compare_sources
from calibrant.study.statistics.controls import implementation_noise, zero_control
from calibrant.study.statistics.describe import describe, mean_and_sd
from calibrant.study.statistics.draws_needed import draws_needed
from calibrant.study.statistics.improvement import probability_of_improvement
from calibrant.study.statistics.paired_difference import paired_difference
from calibrant.study.statistics.rank_stability import rank_stability
from calibrant.study.statistics.variance_components import variance_components

_Table = dict[Setting, SettingScores]


def analyse(
    scores: Iterable[Score],
    higher_is_better: Mapping[str, bool],
    *,
    repeated: Collection[Cell] = (),
    data_free: Collection[str] = (),
    timed: Collection[str] = ("seconds",),
    left_out: Collection[str] = (),
    paired: bool = False,
    difference: float | None = None,
    seed: int = 0,
) -> Analysis:
    """The findings of a study; the order of the scores does not matter.

    A draw is a seed with a draw: sets of several seeds count as further draws. Scores of failed cells may be missing;
    what cannot be said without them is None, and headlines name how many are missing.

    Args:
        scores: the table.
        higher_is_better: direction of every measure in the table.
        repeated: cells whose set is the same as an earlier one of their source; they count neither as draws nor as
            missing.
        data_free: recipes that read no data; their scores must be equal over all sets, except those of ``timed``.
        timed: measures of speed, which differ whenever the same command runs again.
        left_out: sources, usually of random tokens, without which variance components are computed as well.
        paired: draw ``i`` of all sources shares documents or what else moves the score; comparisons of sources then
            use the draws that all of them have. Recipes are always compared on the same sets.
        difference: the difference of two sources that the draws needed are to show; by default that of the two best.
        seed: seed of the bootstrap.

    Raises:
        CalibrantError: a measure has no direction, a cell has two scores, or ``difference`` is not above 0.
    """
    if difference is not None and not difference > 0:
        raise CalibrantError(f"difference {difference}: use a number above 0")
    table = by_setting(scores, repeated)
    without = sorted({setting.measure for setting in table} - set(higher_is_better))
    if without:
        raise CalibrantError(
            f"say whether higher is better for {', '.join(without)}: name each of them in `higher_is_better`"
        )
    findings = []
    for setting, own in table.items():
        is_control = setting.recipe in data_free and setting.measure not in timed
        higher = higher_is_better[setting.measure]
        found = _finding(setting, own, higher, is_control, left_out, paired, difference, seed)
        findings.append(replace(found, headline=headline(found)))
    return Analysis(
        tuple(findings), tuple(_recipe_differences(table, higher_is_better, seed)), tuple(_size_curves(table))
    )


def _finding(
    setting: Setting,
    scores: SettingScores,
    higher_is_better: bool,
    is_control: bool,
    left_out: Collection[str],
    paired: bool,
    difference: float | None,
    seed: int,
) -> SettingFinding:
    values = {source: np.array(list(own.values())) for source, own in scores.values.items()}
    together = {source: np.array([own[unit] for unit in scores.shared]) for source, own in scores.values.items()}
    compared = together if paired else values
    sign = -1 if higher_is_better else 1
    described = [SourceFinding(name, tuple(own.tolist()), describe(own)) for name, own in values.items()]
    comparisons = []
    if len(values) > 1 and all(map(len, compared.values())):
        rng_for = partial(_rng, seed, "sources", setting)
        comparisons = compare_sources(compared, rng_for, higher_is_better=higher_is_better, paired=paired)
    without = tuple(name for name in values if name in left_out)
    others = [own for name, own in values.items() if name not in left_out]
    return SettingFinding(
        setting=setting,
        higher_is_better=higher_is_better,
        sources=tuple(sorted(described, key=lambda one: (sign * one.description.mean, one.source))),
        components=variance_components(list(values.values())),
        components_without=ComponentsWithout(without, variance_components(others)) if without else None,
        comparisons=tuple(comparisons),
        rank_stability=(
            rank_stability(np.stack(list(together.values())), higher_is_better=higher_is_better) if together else None
        ),
        best_two=_best_two(compared, sign, paired, difference),
        zero_control=zero_control(np.concatenate(list(values.values()))) if is_control and values else None,
        implementation_noise=implementation_noise(scores.repeats),
        missing=tuple(scores.missing),
        unusable=tuple(scores.unusable),
    )


def _best_two(values: Mapping[str, np.ndarray], sign: int, paired: bool, wanted: float | None) -> BestTwo | None:
    if len(values) < 2 or min(map(len, values.values())) == 0:
        return None
    means = {name: mean_and_sd(own)[0] for name, own in values.items()}
    best, second = sorted(values, key=lambda name: (sign * means[name], name))[:2]
    spreads = [mean_and_sd(own)[1] for own in (values[best], values[second])]
    if paired:
        spreads = [mean_and_sd(values[best] - values[second])[1]]
    known = [sd for sd in spreads if sd is not None]
    if len(known) < len(spreads):
        return None
    sd = float(np.sqrt(np.mean(np.square(known))))
    difference = means[best] - means[second]
    to_see = difference if wanted is None else wanted
    return BestTwo(best, second, difference, sd, to_see, draws_needed(to_see, sd, paired=paired))


def _recipe_differences(table: _Table, higher_is_better: Mapping[str, bool], seed: int) -> Iterator[RecipeDifference]:
    alike: dict[Setting, list[Setting]] = {}
    for setting in table:
        alike.setdefault(replace(setting, recipe=""), []).append(setting)
    for common, settings in alike.items():
        for first, second in combinations(settings, 2):
            for source, own in table[first].values.items():
                other = table[second].values.get(source, {})
                units = [unit for unit in own if unit in other]
                if not units:
                    continue
                a, b = (np.array([values[unit] for unit in units]) for values in (own, other))
                better, worse = first, second
                if (a.mean() < b.mean()) == higher_is_better[common.measure] and a.mean() != b.mean():
                    (a, b), (better, worse) = (b, a), (second, first)
                rng = _rng(seed, "recipes", first, second.recipe, source)
                yield RecipeDifference(
                    model=common.model,
                    source=source,
                    samples=common.samples,
                    length=common.length,
                    measure=common.measure,
                    on=common.on,
                    first=better.recipe,
                    second=worse.recipe,
                    difference=paired_difference(a, b, rng),
                    improvement=probability_of_improvement(
                        a, b, rng, higher_is_better=higher_is_better[common.measure], paired=True
                    ),
                )


def _size_curves(table: _Table) -> Iterator[SizeCurve]:
    curves: dict[tuple[Setting, str], list[Setting]] = {}
    for setting, scores in table.items():
        for source in scores.values:
            curves.setdefault((replace(setting, samples=0), source), []).append(setting)
    for (common, source), settings in curves.items():
        if len(settings) > 1:
            points = [
                (setting.samples, describe(np.array(list(table[setting].values[source].values()))))
                for setting in settings
            ]
            yield SizeCurve(
                common.model, common.recipe, source, common.length, common.measure, common.on, tuple(points)
            )


def _rng(seed: int, purpose: str, setting: Setting, *more: str) -> np.random.Generator:
    """A generator for one comparison, so that no comparison depends on which others there are."""
    named = (setting.model, setting.recipe, setting.samples, setting.length, setting.measure, setting.on)
    return make_rng(seed, purpose, *named, *more)
