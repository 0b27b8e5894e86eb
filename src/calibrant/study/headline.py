"""The finding of one setting in one plain sentence."""

from calibrant.study.findings import SettingFinding, SourceFinding
from calibrant.study.measures import measure_name
from calibrant.study.statistics.comparisons import Comparison
from calibrant.wording import listed

_MOST_NAMED = 4


def headline(found: SettingFinding) -> str:
    """What the scores of a setting show, and what they cannot show; ends with what is missing or was left out."""
    return "; ".join([_finding(found), *_reservations(found)]) + "."


def _finding(found: SettingFinding) -> str:
    measured = _measured(found)
    if not found.sources:
        return f"There is no usable score of {measured}"
    control = found.zero_control
    if control is not None and control.passes:
        return f"{measured} is the same over all {control.values} sets, as it must be for a recipe that reads no data"
    if control is not None:
        return (
            f"{measured} differs by up to {control.largest_difference:.3g} over {control.values} sets, though the "
            "recipe reads no data: something else than the data is measured"
        )
    if len(found.sources) == 1:
        return _one_source(measured, found.sources[0])
    if found.components is None:
        best = found.sources[0]
        return (
            f"{best.source} has the best mean of {measured} ({best.description.mean:.4g}), but no source has two "
            "draws, so that no difference can be told from chance"
        )
    if found.components.share is None and found.components.source_variance > 0:
        return f"no two draws of a source differ in {measured}, so that nothing says how much is chance"
    if found.components.share is None:
        return f"{measured} is {found.sources[0].description.mean:.4g} with every source and draw"
    return f"{_share(measured, found)}; {_told_apart(found)}"


def _measured(found: SettingFinding) -> str:
    setting = found.setting
    return f"{measure_name(setting.measure, setting.on)} under {setting.recipe}"


def _one_source(measured: str, only: SourceFinding) -> str:
    said, interval = only.description, only.description.interval
    if said.sd is None or interval is None:
        return f"{measured} is {said.mean:.4g} with {only.source}, from one draw, which says nothing of its spread"
    return (
        f"{measured} is {said.mean:.4g} with {only.source} (sd {said.sd:.2g} over {said.n} draws, 95 % interval "
        f"{interval.low:.4g} to {interval.high:.4g}), and there is no other source to compare it with"
    )


def _share(measured: str, found: SettingFinding) -> str:
    components = found.components
    assert components is not None
    assert components.share is not None
    assert components.share_interval is not None
    low, high = (f"{100 * end:.0f}" for end in (components.share_interval.low, components.share_interval.high))
    return (
        f"The source explains {100 * components.share:.0f} % of the variance of {measured} (95 % interval {low} to "
        f"{high} %)"
    )


def _told_apart(found: SettingFinding) -> str:
    if not found.comparisons:
        return "its sources share no draw, so that they cannot be compared in pairs"
    best = found.comparisons[0].better
    of_best = [one for one in found.comparisons if one.better == best]
    untested = [one.worse for one in of_best if one.p_value is None]
    if len(untested) == len(of_best):
        return f"{best} has the best mean, which is not tested for want of a second draw or of spread"
    if untested:
        those = f"{listed(untested)} {'is' if len(untested) == 1 else 'are'}"
        return f"{_alike(found, best)}; {those} not tested for want of a second draw or of spread"
    return _alike(found, best)


def _alike(found: SettingFinding, best: str) -> str:
    """Which of the tested sources cannot be told apart from the best."""
    tested = [one for one in found.comparisons if one.better == best and one.p_value is not None]
    alike = [one.worse for one in tested if not one.told_apart]
    if not alike:
        every = "every other source" + " that is tested" * (len(tested) < len(found.sources) - 1)
        return f"{best} is better than {'the other source' if len(found.sources) == 2 else every}"
    draws = _draws(tested)
    if len(alike) == 1:
        return f"{best} and {alike[0]} cannot be told apart with {draws}"
    if len(alike) > _MOST_NAMED:
        others = len(found.sources) - 1
        some = f"all {others}" if len(alike) == others else f"{len(alike)} of the {others}"
        return f"{some} other sources cannot be told apart from {best}, the best, with {draws}"
    return f"{listed(alike)} cannot be told apart from {best}, the best, with {draws}"


def _draws(tested: list[Comparison]) -> str:
    numbers = [number for one in tested for number in one.draws]
    least, most = min(numbers), max(numbers)
    return f"{most} draw{'s' * (most > 1)}" if least == most else f"{least} to {most} draws"


def _reservations(found: SettingFinding) -> list[str]:
    said = []
    if found.implementation_noise is not None and not found.implementation_noise.passes:
        said.append(f"one set run twice differs by up to {found.implementation_noise.largest_difference:.3g}")
    if found.missing:
        cells = sum(map(len, (found.missing, found.unusable, *(one.values for one in found.sources))))
        said.append(f"{len(found.missing)} of {cells} cells {'is' if len(found.missing) == 1 else 'are'} missing")
    if found.unusable:
        number = len(found.unusable)
        many = number > 1
        said.append(f"{number} score{'s' * many} {'are' if many else 'is'} not finite and left out")
    return said
