"""What an analysis finds, as plain values that pages, tables and JSON are made from."""

from dataclasses import asdict, dataclass
from typing import Any

from calibrant.study.score_table import Setting, SourceUnit
from calibrant.study.statistics.comparisons import Comparison
from calibrant.study.statistics.controls import Control
from calibrant.study.statistics.describe import Description
from calibrant.study.statistics.improvement import Improvement
from calibrant.study.statistics.paired_difference import PairedDifference
from calibrant.study.statistics.rank_stability import RankStability
from calibrant.study.statistics.variance_components import VarianceComponents


@dataclass(frozen=True)
class SourceFinding:
    """One source in one setting: its draws, sorted by seed and draw, and their description."""

    source: str
    values: tuple[float, ...]
    description: Description


@dataclass(frozen=True)
class ComponentsWithout:
    """Variance components of all sources but ``sources``, which would dominate them (random tokens)."""

    sources: tuple[str, ...]
    components: VarianceComponents | None


@dataclass(frozen=True)
class BestTwo:
    """The two best sources, and the number of draws of each with which a t test of them alone would see a difference.

    ``difference`` is the best mean less the second, ``sd`` the root mean square of both sources' standard deviations,
    or that of the paired differences; ``draws`` show a true difference of ``to_see``: that which was asked for, or
    ``difference``. ``draws`` is None if that or ``sd`` is 0, or if more than a million would be needed.
    """

    best: str
    second: str
    difference: float
    sd: float
    to_see: float
    draws: int | None


@dataclass(frozen=True)
class SettingFinding:
    """One measure of one model under one recipe, over sources and draws. What is undefined is None.

    Attributes:
        setting: model, recipe, size, measure and text.
        higher_is_better: direction of the measure.
        sources: every source with a usable score, best mean first.
        components: source against draw.
        components_without: the same without the sources that were to be left out.
        comparisons: all pairs of sources, those of the best first.
        rank_stability: over the sets that every source has.
        best_two: the draws that a finding about the best source needs.
        zero_control: for recipes that read no data.
        implementation_noise: of cells that were run twice on one set; of times, the noise of the clock.
        missing: source, seed and draw of every set without a score, where another source has one.
        unusable: source, seed and draw of every score left out because it is not finite, or beyond 1e100.
        headline: the finding in one English sentence.
    """

    setting: Setting
    higher_is_better: bool
    sources: tuple[SourceFinding, ...]
    components: VarianceComponents | None
    components_without: ComponentsWithout | None
    comparisons: tuple[Comparison, ...]
    rank_stability: RankStability | None
    best_two: BestTwo | None
    zero_control: Control | None
    implementation_noise: Control | None
    missing: tuple[SourceUnit, ...]
    unusable: tuple[SourceUnit, ...]
    headline: str = ""


@dataclass(frozen=True)
class RecipeDifference:
    """Two recipes on the same sets of a source: ``first``, which is better on average, less ``second``."""

    model: str
    source: str
    samples: int
    length: int
    measure: str
    on: str
    first: str
    second: str
    difference: PairedDifference
    improvement: Improvement


@dataclass(frozen=True)
class SizeCurve:
    """A measure by the number of rows: ``points`` are rows and the description of the draws of that size."""

    model: str
    recipe: str
    source: str
    length: int
    measure: str
    on: str
    points: tuple[tuple[int, Description], ...]


@dataclass(frozen=True)
class Analysis:
    """All findings of a study, sorted by model, recipe, size, measure and text."""

    settings: tuple[SettingFinding, ...]
    recipe_differences: tuple[RecipeDifference, ...]
    size_curves: tuple[SizeCurve, ...]

    def as_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return asdict(self)
