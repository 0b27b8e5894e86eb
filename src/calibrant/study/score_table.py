"""The table of scores, taken apart into settings: what is compared with each other."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from calibrant.errors import CalibrantError
from calibrant.study.cells import Cell
from calibrant.study.scores import Score

# Squares of larger numbers are not finite; no measure of a model that works comes near.
_LARGEST = 1e100
# Seed and draw of a set, and its source before them.
Unit = tuple[int, int]
SourceUnit = tuple[str, int, int]


@dataclass(frozen=True, order=True)
class Setting:
    """All that is the same among scores that are compared: only source and draw differ."""

    model: str
    recipe: str
    samples: int
    length: int
    measure: str
    on: str


@dataclass(frozen=True)
class SettingScores:
    """The scores of one setting.

    Attributes:
        values: value of every set, by source and then by the set's seed and draw, both sorted.
        repeats: both values of every cell that was run twice.
        unusable: source, seed and draw of every score that is not finite, or beyond 1e100, and was left out.
        repeated: source, seed and draw of every set that is the same as an earlier one of its source, and counts once.
    """

    values: dict[str, dict[Unit, float]] = field(default_factory=dict)
    repeats: list[tuple[float, float]] = field(default_factory=list)
    unusable: list[SourceUnit] = field(default_factory=list)
    repeated: list[SourceUnit] = field(default_factory=list)

    @property
    def missing(self) -> list[SourceUnit]:
        """Source, seed and draw of every set without a score, where another source has one."""
        units = sorted({unit for own in self.values.values() for unit in own})
        cells = [(source, *unit) for source, own in self.values.items() for unit in units if unit not in own]
        return [cell for cell in cells if cell not in self.unusable and cell not in self.repeated]

    @property
    def shared(self) -> list[Unit]:
        """Sets that every source has."""
        owned = [set(own) for own in self.values.values()]
        return sorted(set.intersection(*owned)) if owned else []


def by_setting(scores: Iterable[Score], repeated: Collection[Cell] = ()) -> dict[Setting, SettingScores]:
    """Scores by setting, sorted, so that the order of the table does not matter.

    ``repeated`` are cells whose set is the same as an earlier one of their source.

    Raises:
        CalibrantError: two scores are of the same cell and repeat.
    """
    cells: dict[tuple[Setting, str, Unit, int], float] = {}
    again: set[tuple[Setting, SourceUnit]] = set()
    for score in scores:
        setting = Setting(score.model, score.recipe, score.samples, score.length, score.measure, score.on)
        key = (setting, score.source, (score.seed, score.draw), score.repeat)
        if key in cells:
            raise CalibrantError(
                f"{score.measure} of {score.model}, {score.recipe}, {score.source}, seed {score.seed}, draw "
                f"{score.draw}, repeat {score.repeat} is there twice; give one score for each cell"
            )
        cells[key] = score.value
        if score.cell in repeated:
            again.add((setting, (score.source, score.seed, score.draw)))
    found: dict[Setting, SettingScores] = {}
    for (setting, source, unit, repeat), value in sorted(cells.items(), key=lambda cell: cell[0]):
        table = found.setdefault(setting, SettingScores())
        if (setting, (source, *unit)) in again:
            table.repeated.append((source, *unit))
        elif not -_LARGEST <= value <= _LARGEST:
            table.unusable.append((source, *unit))
        elif repeat == 0:
            table.values.setdefault(source, {})[unit] = value
        elif unit in table.values.get(source, {}):
            table.repeats.append((table.values[source][unit], value))
    return found
